"""Name and fill the files of a run beside its weights: state, and arguments without secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict

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


def saved_state(model: ModelMixin, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights that `model.save_pretrained(folder / name)` wrote, in the dtype of `model`."""
    return type(model).from_pretrained(folder / name, dtype=model.dtype).state_dict()
