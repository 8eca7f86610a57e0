"""The files of a run beside its weights: state, arguments without secrets, and a config that reports can read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict

from tgol_trainer.config import TGOLConfig

if TYPE_CHECKING:
    from diffusers import ModelMixin

STATE_NAME = "tgol_state.json"
ARGUMENTS_NAME = "training_args.json"


class ReportedConfig(FrozenDict):
    """A denoiser's config with the methods by which Trainer's reporting integrations (TensorBoard, MLflow) read it."""

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary."""
        return dict(self)

    def to_json_string(self) -> str:
        """Return indented JSON; what JSON does not have becomes text."""
        return json.dumps(dict(self), indent=2, default=str)


def public_arguments(args: TGOLConfig) -> dict[str, Any]:
    """Every argument of a run but tokens and paths of this machine; JSON-serialisable."""
    private = {"output_dir", "logging_dir", "resume_from_checkpoint", "hub_model_id", "run_name"}
    return _without_tokens({name: value for name, value in args.to_dict().items() if name not in private})


def _without_tokens(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_tokens(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name != "token" and not name.endswith("_token") and not name.startswith("_")
    }


def saved_state(model: ModelMixin, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the weights that `model.save_pretrained(folder / name)` wrote, in the dtype of `model`."""
    return type(model).from_pretrained(folder / name, dtype=model.dtype).state_dict()
