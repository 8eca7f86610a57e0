"""Read the licence of a base model from its own card."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def folder_license(folder: str | Path) -> dict[str, str]:
    """Read the licence of a model in a local folder from its README.md; the result is as in [`hub_license`]."""
    return _read_card(Path(folder).expanduser() / "README.md", None)


@functools.lru_cache(maxsize=8)
def hub_license(hub_id: str, revision: str | None) -> dict[str, str]:
    """
    Read the licence of a model on the Hub: from the copy of its card in the cache, else by asking the Hub once.

    Args:
        hub_id (`str`): `owner/name`.
        revision (`str`, *optional*): Revision of the model.

    Returns:
        `dict[str, str]`: `license`, `license_name`, `license_link`, without what is not known; empty where the Hub
        cannot be asked.
    """
    from huggingface_hub import constants, model_info, try_to_load_from_cache

    copy = try_to_load_from_cache(hub_id, "README.md", revision=revision)
    if isinstance(copy, str):
        return _read_card(Path(copy), hub_id)
    if constants.HF_HUB_OFFLINE:
        return {}
    try:
        return _license_of(model_info(hub_id, revision=revision, timeout=10.0).card_data, hub_id)
    except Exception as error:  # no network, no such repository, no right: the card does without
        logger.info("The Hub does not say under which license %s is, so the card names none: %s", hub_id, error)
        return {}


def _read_card(file: Path, hub_id: str | None) -> dict[str, str]:
    from huggingface_hub import ModelCard

    if not file.is_file():
        return {}
    try:
        return _license_of(ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data, hub_id)
    except Exception as error:  # a card of someone else, in whatever state; nothing depends on it
        logger.info("The metadata of the base model's card cannot be read, so its license is not known: %s", error)
        return {}


def _license_of(card_data: Any, hub_id: str | None) -> dict[str, str]:
    """Return the licence; its name and link only where it is `other`, a relative link only with a Hub id."""
    found = {name: getattr(card_data, name, None) for name in ("license", "license_name", "license_link")}
    if not isinstance(found["license"], str):
        return {}
    if found["license"] != "other":
        return {"license": found["license"]}
    link = found["license_link"]
    if isinstance(link, str) and not re.match(r"https?://", link):
        file = link.removeprefix("./")
        inside = hub_id is not None and not file.startswith(("/", "~")) and ".." not in file.split("/")
        found["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{file}" if inside else None
    return {name: value for name, value in found.items() if isinstance(value, str)}
