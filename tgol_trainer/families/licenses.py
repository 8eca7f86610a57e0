"""The licence of a base model, from its own card; never guessed."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SECONDS = 10.0


def _license_of(card_data: Any, repository: str | None) -> dict[str, str]:
    """Return the licence; its name and link only where it is `other`, a relative link only with a repository."""
    found = {name: getattr(card_data, name, None) for name in ("license", "license_name", "license_link")}
    if not isinstance(found["license"], str):
        return {}
    if found["license"] != "other":
        return {"license": found["license"]}
    link = found["license_link"]
    if isinstance(link, str) and not re.match(r"https?://", link):
        name = link.removeprefix("./")
        known = repository is not None and not name.startswith(("/", "~")) and ".." not in name.split("/")
        found["license_link"] = f"https://huggingface.co/{repository}/blob/main/{name}" if known else None
    return {name: value for name, value in found.items() if isinstance(value, str)}


def folder_license(folder: str | Path) -> dict[str, str]:
    """
    Read the licence of a model in a local folder from the metadata of its README.md.

    Args:
        folder (`str` or `Path`):
            Of the model.

    Returns:
        `dict[str, str]`: `license`, `license_name`, `license_link`; what is not known is left out.
    """
    return _read(Path(folder).expanduser() / "README.md", None)


def _read(file: Path, repository: str | None) -> dict[str, str]:
    from huggingface_hub import ModelCard

    if not file.is_file():
        return {}
    try:
        return _license_of(ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data, repository)
    except Exception as error:  # a card of someone else, in whatever state; nothing depends on it
        logger.info("The metadata of the base model's card cannot be read, so its license is not known: %s", error)
        return {}


@functools.lru_cache(maxsize=8)
def hub_license(hub_id: str, revision: str | None) -> dict[str, str]:
    """
    Read the licence of a model on the Hub: from the copy of its card in the cache, else by asking the Hub once.

    Args:
        hub_id (`str`):
            `owner/name`.
        revision (`str`, *optional*):
            Of the model.

    Returns:
        `dict[str, str]`: `license`, `license_name`, `license_link`; nothing where the Hub cannot be asked.
    """
    from huggingface_hub import constants, model_info, try_to_load_from_cache

    copy = try_to_load_from_cache(hub_id, "README.md", revision=revision)
    if isinstance(copy, str):
        return _read(Path(copy), hub_id)
    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        return _license_of(model_info(hub_id, revision=revision, timeout=_SECONDS).card_data, hub_id)
    except Exception as error:  # no network, no such repository, no right: the card does without
        logger.info("The Hub does not say under which license %s is, so the card names none: %s", hub_id, error)
        return {}
