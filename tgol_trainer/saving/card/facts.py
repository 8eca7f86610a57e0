"""What a model card states: plain dataclasses, turned into JSON types without secrets."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(r"((^|_)token|password|passwd|secret|api_key)$", re.IGNORECASE)


@dataclasses.dataclass
class DatasetFacts:
    """
    One dataset of the run.

    Args:
        name (`str`, *optional*): Hub id, or any other name; what reads like a local path is replaced by a remark.
        revision (`str`, *optional*): Commit of the dataset.
        num_rows (`int`, *optional*): Rows trained on.
        num_dropped (`int`, *optional*): Rows left out as unusable.
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
        name (`str`): Its name. Names that hold a secret (`hub_token`, `*_token`, `*password`, `*secret`) are left out.
        value (`Any`, *optional*): Its value; local paths are replaced by a remark.
        is_default (`bool`, *optional*, defaults to `False`):
            Whether the value is the default; defaults go into a folded table.
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
            Interval of the win rate, 0 to 1; its level belongs into `CardFacts.evaluation_note`.
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
        path (`str`): Path relative to the card, with forward slashes, not leaving its folder.
        alt (`str`, *optional*, defaults to `""`): What the image shows, for those who cannot see it.
        prompt (`str`, *optional*): Prompt of the image, shown below it; without one, `alt` stands in the metadata.
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
        dtype (`str`, *optional*): Precision of its tensors.
        weight (`float`, *optional*, defaults to 1.0): Strength that the adapter was exported with.
        num_tensors (`int`, *optional*): Tensors of the file, all of them matched.
        weights_equal (`bool`, *optional*): Whether the weights read back are those trained, bit for bit.
        difference (`float`, *optional*): Largest difference of the denoiser's output from the trained one's.
        effect (`float`, *optional*): Largest difference between the outputs of the trained and the base model.
        image_difference (`float`, *optional*):
            Mean difference of one image of equal prompt and seed, in grey levels of 0 to 255.
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
class CardFacts:
    """
    What a model card states. Every field may stay empty; a section without facts is left out of the card.

    Args:
        model_name (`str`, *optional*, defaults to `""`): Title; of a path or Hub id, the last part is used.
        hub_model_id (`str`, *optional*): Hub id of the trained model; names the card where `model_name` is empty.
        base_model (`str`, *optional*): Hub id of the base model; anything that is no Hub id is dropped.
        base_model_revision (`str`, *optional*): Commit of the base model.
        base_model_note (`str`, *optional*):
            What the base model is, where it has no Hub id, such as `"a local folder, name not recorded"`.
        pipeline_class (`str`, *optional*): Name of the diffusers pipeline class.
        pipeline_tag (`str`, *optional*, defaults to `"text-to-image"`): Task on the Hub.
        license (`str`, *optional*): License identifier, only where known.
        license_name (`str`, *optional*): Its name, where the identifier is `other`.
        license_link (`str`, *optional*): Where its text is, where the identifier is `other`.
        datasets (`list[DatasetFacts]`, *optional*, defaults to `[]`): Training data.
        threshold (`dict[str, Any]`, *optional*, defaults to `{}`):
            `value`, `source`, `percentile`, `num_positive`, `num_negative`, `num_ties`, `moved_from`, `normalization`
            (`method`, `center`, `scale`). Other keys become a line each; `None` counts as absent.
        weights (`dict[str, Any]`, *optional*, defaults to `{}`):
            `mean`, `max`, `top_1_percent_share` (0 to 1) and `confidence_scale` of the confidence weights.
        adapter (`dict[str, Any]`, *optional*, defaults to `{}`):
            Adapter configuration: `r`, `lora_alpha`, `target_modules` and so on.
        full_finetuning (`bool`, *optional*, defaults to `False`): Whether all weights were trained, not an adapter.
        merged (`bool`, *optional*, defaults to `False`):
            Whether the folder is a complete pipeline with the trained weights in it.
        hyperparameters (`list[Hyperparameter]`, *optional*, defaults to `[]`): Settings of the run.
        training (`dict[str, Any]`, *optional*, defaults to `{}`):
            `steps`, `epochs`, `train_seconds`; every other key is a final metric.
        evaluations (`list[EvaluationRow]`, *optional*, defaults to `[]`): One row a score.
        evaluation_note (`str`, *optional*): How the evaluation was made: level of the intervals, seeds, sampler.
        images (`list[Image]`, *optional*, defaults to `[]`): Before-and-after images.
        example_prompt (`str`, *optional*): A prompt of the training data, for examples.
        usage (`str`, *optional*, defaults to `""`): Python source that loads the model and makes an image.
        exports (`list[ExportRow]`, *optional*, defaults to `[]`): Exports that were checked.
        hardware (`str`, *optional*): What it was trained on.
        versions (`dict[str, str]`, *optional*, defaults to `{}`): Package name to version.
        limits (`list[str]`, *optional*, defaults to `[]`): Known limits, a sentence each.
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
    exports: list[ExportRow] = dataclasses.field(default_factory=list)
    hardware: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: list[str] = dataclasses.field(default_factory=list)
    created: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """
        Return the facts as plain JSON types; non-finite numbers and unknown objects become text.

        Returns:
            `dict[str, Any]`: The fields, without hyperparameters and dictionary keys whose name says they are secret.
        """
        return _plain(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CardFacts:
        """
        Rebuild facts from what [`~CardFacts.to_dict`] gave.

        Args:
            data (`Mapping[str, Any]`):
                Field names to plain JSON types.

        Returns:
            [`CardFacts`]

        Raises:
            ValueError: For a name that is no field, in the facts or in one of their parts.
        """
        values = dict(data)
        try:
            for name, part in _PARTS.items():
                if name in values:
                    values[name] = [part(**item) for item in values[name]]
            facts = cls(**values)
        except TypeError as error:
            raise ValueError(f"These are no facts of a card: {error}.") from error
        for row in facts.evaluations:
            row.interval = (row.interval[0], row.interval[1]) if row.interval else None
        return facts


_PARTS: dict[str, Any] = {
    "datasets": DatasetFacts,
    "hyperparameters": Hyperparameter,
    "evaluations": EvaluationRow,
    "pictures": CardImage,
    "exports": ExportRow,
}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not SECRET_NAME.search(str(key))}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(x) for x in items if not (isinstance(x, Hyperparameter) and SECRET_NAME.search(x.name))]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "tolist"):  # NumPy and torch, neither imported here
        return _plain(value.tolist())
    return str(getattr(value, "__name__", value))
