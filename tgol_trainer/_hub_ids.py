"""Recognise ids of the Hugging Face Hub by their form."""

from __future__ import annotations


def is_hub_id(name: str | None, *, owner: bool = True) -> bool:
    """
    Return whether a text has the form of a Hub id, by the rule of huggingface_hub. Asks neither the Hub nor the disk.

    Args:
        name (`str`, *optional*): The text.
        owner (`bool`, *optional*, defaults to `True`): Whether the id must name its owner, as in `owner/name`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and (not owner or "/" in str(name))
