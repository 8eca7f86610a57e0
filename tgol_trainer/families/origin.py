"""Where a base model came from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgol_trainer._hub_ids import is_hub_id

from .licenses import folder_license

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclasses.dataclass(frozen=True)
class ModelOrigin:
    """
    Where a base model came from, for the card.

    Args:
        hub_id (`str`, *optional*): `owner/name`; `None` for a local folder or an object of unknown origin.
        revision (`str`, *optional*): Commit hash where known, else the revision asked for.
        note (`str`, *optional*): What the card says where there is no Hub id.
        loading_code (`str`, *optional*):
            Python lines that define `pipe`, where `DiffusionPipeline.from_pretrained` is not the way.
        call_arguments (`dict[str, Any]`, *optional*, defaults to `{}`):
            Keyword arguments that suit the model where the pipeline's defaults do not, for the snippet of its card and
            for images sampled during training.
        license (`dict[str, str]`, *optional*, defaults to `{}`):
            `license`, `license_name` and `license_link` of a local folder's own card.
    """

    hub_id: str | None = None
    revision: str | None = None
    note: str | None = None
    loading_code: str | None = None
    call_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    license: dict[str, str] = dataclasses.field(default_factory=dict, kw_only=True)

    @classmethod
    def of_source(cls, source: str, revision: str | None = None, file: str = "model_index.json") -> ModelOrigin:
        """Describe what `from_pretrained(source, revision=revision)` loads; the commit is that of `file`'s copy."""
        if Path(source).expanduser().exists() or not is_hub_id(source):
            return cls(note="a local folder whose name is not recorded", license=folder_license(source))
        from huggingface_hub import try_to_load_from_cache

        copy = try_to_load_from_cache(source, file, revision=revision)
        commit = Path(copy).parents[file.count("/")].name if isinstance(copy, str) else None
        return cls(hub_id=source, revision=commit or revision)

    @classmethod
    def of_pipeline(cls, pipeline: DiffusionPipeline) -> ModelOrigin:
        """Describe a loaded pipeline by the name that its config remembers, if any."""
        name = getattr(pipeline, "name_or_path", None) or pipeline.config.get("_name_or_path")
        return cls.of_source(name) if name else cls(note="a pipeline object of unknown origin")
