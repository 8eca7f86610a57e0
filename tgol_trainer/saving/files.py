"""Name and fill the files of a run beside its weights: state, and arguments without secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict

from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer._secrets import without_secrets
from tgol_trainer.config import TGOLConfig

if TYPE_CHECKING:
    from diffusers import ModelMixin

STATE_NAME = "tgol_state.json"
ARGUMENTS_NAME = "training_args.json"


class ReportedConfig(FrozenDict):
    """A denoiser's config with the methods that Trainer's reporting integrations (TensorBoard, MLflow) call."""

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return dict(self)

    def to_json_string(self) -> str:
        """Return indented JSON; what JSON does not have becomes text."""
        return json.dumps(dict(self), indent=2, default=str)


def public_arguments(args: TGOLConfig) -> dict[str, Any]:
    """Return every argument of a run but secrets, private fields and paths of this machine; JSON-serialisable."""
    private = {"output_dir", "logging_dir", "resume_from_checkpoint", "hub_model_id", "run_name", "cache_dir"}
    values = without_secrets(args.to_dict())
    return {name: value for name, value in values.items() if name not in private and not name.startswith("_")}


def recorded_expert(source: str) -> str | None:
    """
    Return which of two transformers an adapter was trained for, as its run recorded it.

    Args:
        source (`str`): File, folder or Hub id of an adapter.

    Returns:
        `str`, *optional*: `"high_noise"`, `"low_noise"`, or `None` where nothing is recorded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    path = Path(source).expanduser()
    file = (path if path.is_dir() else path.parent) / ARGUMENTS_NAME
    if not path.exists() and is_hub_id(source):
        try:
            file = Path(hf_hub_download(source, ARGUMENTS_NAME))
        except (EntryNotFoundError, HfHubHTTPError):  # loading the adapter itself says what is wrong
            return None
    if not file.is_file():
        return None
    expert: str | None = json.loads(file.read_text(encoding="utf-8")).get("expert")
    return expert


def saved_state(model: ModelMixin, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights that `model.save_pretrained(folder / name)` wrote, in the dtype of `model`."""
    return type(model).from_pretrained(folder / name, dtype=model.dtype).state_dict()
