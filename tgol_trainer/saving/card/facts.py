"""The facts of a model card as dataclasses, and their JSON form without secrets."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

from tgol_trainer._secrets import is_secret


@dataclasses.dataclass
class DatasetFacts:
    """
    One dataset of the run.

    Args:
        name (`str`, *optional*): Hub id or another name. A local path is replaced by a remark.
        revision (`str`, *optional*): Commit of the dataset.
        num_rows (`int`, *optional*): Rows trained on.
        num_dropped (`int`, *optional*): Rows that could not be used.
        columns (`list[str]`, *optional*, defaults to `[]`): Names of the columns used.
    """

    name: str | None = None
    revision: str | None = None
    num_rows: int | None = None
    num_dropped: int | None = None
    columns: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Hyperparameter:
    """
    One setting of the run.

    Args:
        name (`str`): Its name. A setting named like a secret (`*_token`, `*password`, `*secret`) is left out.
        value (`Any`, *optional*): Its value. A local path is replaced by a remark.
        is_default (`bool`, *optional*, defaults to `False`): Whether it is the default, shown in a folded table.
    """

    name: str
    value: Any = None
    is_default: bool = False


@dataclasses.dataclass
class EvaluationRow:
    """
    One score, measured before and after training on the same prompts and seeds.

    Args:
        name (`str`): Name of the score.
        trained (`bool`, *optional*, defaults to `False`): Whether this score made the training labels.
        win_rate (`float`, *optional*): Share of images that score above the base model's, 0 to 1.
        interval (`tuple[float, float]`, *optional*):
            Interval of the win rate, 0 to 1. State its level in `CardFacts.evaluation_note`.
        mean_before (`float`, *optional*): Mean score of the base model.
        mean_after (`float`, *optional*): Mean score of the trained model.
        num_prompts (`int`, *optional*): Prompts evaluated.
        num_images (`int`, *optional*): Images evaluated.
    """

    name: str
    trained: bool = False
    win_rate: float | None = None
    interval: tuple[float, float] | None = None
    mean_before: float | None = None
    mean_after: float | None = None
    num_prompts: int | None = None
    num_images: int | None = None


@dataclasses.dataclass
class CardImage:
    """
    One image of the card.

    Args:
        path (`str`): Path inside the card's folder, relative to it, with forward slashes.
        alt (`str`, *optional*, defaults to `""`): What the image shows, for people who cannot see it.
        prompt (`str`, *optional*): Prompt of the image, shown below it. Without one, the metadata hold `alt`.
    """

    path: str
    alt: str = ""
    prompt: str | None = None


@dataclasses.dataclass
class ExportRow:
    """
    One export that was read back and compared with what was trained.

    Args:
        format (`str`): `diffusers`, `peft`, `comfyui` or `merged`.
        files (`list[str]`, *optional*, defaults to `[]`): Names of its files or folders, relative to the card.
        dtype (`str`, *optional*): Dtype of its tensors.
        weight (`float`, *optional*, defaults to 1.0): Strength that the adapter was exported with.
        num_tensors (`int`, *optional*): Number of tensors in the file; each matched a trained one.
        weights_equal (`bool`, *optional*): Whether the weights read back equal the trained ones bit for bit.
        difference (`float`, *optional*): Largest difference of the denoiser's output from the trained one's.
        effect (`float`, *optional*): Largest difference between the outputs of the trained and the base model.
        image_difference (`float`, *optional*):
            Mean difference of one image with the same prompt and seed, in grey levels of 0 to 255.
        note (`str`, *optional*): How to use it, or how it was checked.
    """

    format: str
    files: list[str] = dataclasses.field(default_factory=list)
    dtype: str | None = None
    weight: float = 1.0
    num_tensors: int | None = None
    weights_equal: bool | None = None
    difference: float | None = None
    effect: float | None = None
    image_difference: float | None = None
    note: str | None = None


@dataclasses.dataclass
class SharedFile:
    """
    One file of a run's weights, for one program.

    Args:
        file (`str`): Its name.
        program (`str`): The program that reads it as trained: `diffusers` or `ComfyUI`.
        elsewhere (`str`): What the other program makes of it, one sentence.
        check (`str`, *optional*): How the file was compared with what was trained.
    """

    file: str
    program: str
    elsewhere: str
    check: str | None = None


@dataclasses.dataclass
class CardFacts:
    """
    What a model card states. Every field is optional. The card leaves out a section without facts.

    Args:
        model_name (`str`, *optional*, defaults to `""`): Title. Of a path or Hub id, the last part is used.
        hub_model_id (`str`, *optional*): Hub id of the trained model. It is the title where `model_name` is empty.
        base_model (`str`, *optional*): Hub id of the base model. Anything else is dropped.
        base_model_revision (`str`, *optional*): Commit of the base model.
        base_model_note (`str`, *optional*):
            Description of a base model without a Hub id, such as `"a local folder, name not recorded"`.
        pipeline_class (`str`, *optional*): Name of the diffusers pipeline class.
        pipeline_tag (`str`, *optional*, defaults to `"text-to-image"`): Task on the Hub.
        license (`str`, *optional*): License identifier, if it is known.
        license_name (`str`, *optional*): Name of the license if the identifier is `other`.
        license_link (`str`, *optional*): Link to its text if the identifier is `other`.
        datasets (`list[DatasetFacts]`, *optional*, defaults to `[]`): Training data.
        threshold (`dict[str, Any]`, *optional*, defaults to `{}`):
            `value`, `source`, `percentile`, `num_positive`, `num_negative`, `num_ties`, `moved_from`, `normalization`
            (`method`, `center`, `scale`). Each other key becomes a line of its own. `None` counts as absent.
        weights (`dict[str, Any]`, *optional*, defaults to `{}`):
            `mean`, `max`, `top_1_percent_share` (0 to 1) and `confidence_scale` of the confidence weights.
        adapter (`dict[str, Any]`, *optional*, defaults to `{}`):
            Adapter configuration: `r`, `lora_alpha`, `target_modules` and so on.
        full_finetuning (`bool`, *optional*, defaults to `False`): Whether all weights were trained, not an adapter.
        merged (`bool`, *optional*, defaults to `False`):
            Whether the folder is a complete pipeline that contains the trained weights.
        hyperparameters (`list[Hyperparameter]`, *optional*, defaults to `[]`): Settings of the run.
        training (`dict[str, Any]`, *optional*, defaults to `{}`):
            `steps`, `epochs` and `train_seconds`. Every other key is a final metric.
        evaluations (`list[EvaluationRow]`, *optional*, defaults to `[]`): One row per score.
        evaluation_note (`str`, *optional*): How the evaluation was done: level of the intervals, seeds, sampler.
        pictures (`list[CardImage]`, *optional*, defaults to `[]`): Before-and-after images.
        example_prompt (`str`, *optional*): A prompt of the training data, used in examples.
        usage (`str`, *optional*, defaults to `""`): Python source that loads the model and makes an image.
        files (`list[SharedFile]`, *optional*, defaults to `[]`): The adapter's files, where there are several.
        exports (`list[ExportRow]`, *optional*, defaults to `[]`): Exports with the results of their checks.
        hardware (`str`, *optional*): Device of the training run.
        versions (`dict[str, str]`, *optional*, defaults to `{}`): Package name to version.
        limits (`list[str]`, *optional*, defaults to `[]`): Known limits, one sentence each.
        created (`str`, *optional*): Date of the card.
    """

    model_name: str = ""
    hub_model_id: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    base_model_note: str | None = None
    pipeline_class: str | None = None
    pipeline_tag: str | None = "text-to-image"
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    datasets: list[DatasetFacts] = dataclasses.field(default_factory=list)
    threshold: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    full_finetuning: bool = False
    merged: bool = False
    hyperparameters: list[Hyperparameter] = dataclasses.field(default_factory=list)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluations: list[EvaluationRow] = dataclasses.field(default_factory=list)
    evaluation_note: str | None = None
    pictures: list[CardImage] = dataclasses.field(default_factory=list)
    example_prompt: str | None = None
    usage: str = ""
    files: list[SharedFile] = dataclasses.field(default_factory=list)
    exports: list[ExportRow] = dataclasses.field(default_factory=list)
    hardware: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: list[str] = dataclasses.field(default_factory=list)
    created: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """
        Return the facts as plain JSON types. Non-finite numbers and unknown objects become text.

        Returns:
            `dict[str, Any]`: the fields, without the hyperparameters and dictionary keys whose name marks a secret.
        """
        return _plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CardFacts:
        """
        Rebuild facts from the result of [`~CardFacts.to_dict`].

        Args:
            data (`Mapping[str, Any]`): Field names to plain JSON types.

        Returns:
            [`CardFacts`]

        Raises:
            ValueError: if a name is not a field of the facts or of one of their parts.
        """
        values = dict(data)
        try:
            for name, part in _PARTS.items():
                if name in values:
                    values[name] = [part(**item) for item in values[name]]
            facts = cls(**values)
        except TypeError as error:
            raise ValueError(f"These are not the facts of a card: {error}.") from error
        for row in facts.evaluations:
            row.interval = (row.interval[0], row.interval[1]) if row.interval else None
        return facts


_PARTS: dict[str, Any] = {
    "datasets": DatasetFacts,
    "hyperparameters": Hyperparameter,
    "evaluations": EvaluationRow,
    "pictures": CardImage,
    "files": SharedFile,
    "exports": ExportRow,
}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not is_secret(str(key))}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items if not (isinstance(item, Hyperparameter) and is_secret(item.name))]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "tolist"):  # a NumPy or torch value; this module imports neither
        return _plain(value.tolist())
    return str(getattr(value, "__name__", value))
