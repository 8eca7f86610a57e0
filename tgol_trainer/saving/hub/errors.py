"""One error for all that can go wrong on the way to the Hub, with its cause, its remedy, and never a token."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Iterator

TOKEN = re.compile(r"(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{17,}")
"""What an access token of the Hub looks like."""

_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."


class PushError(RuntimeError):
    """A push did not succeed; the message says why, what to do, and that nothing local was lost."""


def redacted(text: str, token: str | None = None) -> str:
    """
    Return a text without access tokens.

    Args:
        text (`str`):
            Any text, such as the message of an exception.
        token (`str`, *optional*):
            A token that may have another shape than the Hub's.
    """
    for secret in filter(None, (token, (token or "").strip())):
        text = text.replace(secret, "***")
    return TOKEN.sub("hf_***", text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    for _ in range(20):
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error; that of the storage client stands in its text only."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    match = re.search(r"\b(?:HTTP status|status:?|error[^0-9]{0,30}\()\D{0,20}([45]\d\d)\b", str(error))
    return int(match[1]) if match else None


def _explained(error: BaseException) -> tuple[str, str]:
    """Return cause and remedy in a sentence each."""
    names = {type(link).__name__ for link in _chain(error)}
    status = _status(error)
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set, so nothing may leave this machine.", "Unset it."
    if "LocalTokenNotFoundError" in names:
        return "There is no token.", _LOGIN
    if "LocalProtocolError" in names:
        return "The token holds signs that cannot be sent.", _LOGIN
    if "RevisionNotFoundError" in names:
        return "The Hub has no such branch.", "Check the revision."
    if "RepositoryNotFoundError" in names or status == 404:
        return "The Hub does not know the repository, or hides it from this token.", f"Check its name. {_LOGIN}"
    if "JSONDecodeError" in names or any(isinstance(link, json.JSONDecodeError) for link in _chain(error)):
        return "The Hub, or a proxy before it, answered with a page instead of data.", "Try again later."
    known = {
        400: ("The Hub refused the request as malformed (400).", "Read its message below."),
        401: ("The Hub does not accept the token, or there is none (401).", _LOGIN),
        403: ("The token may not write there (403).", f"Check the owner in the repository's name. {_LOGIN}"),
        409: ("Something else is writing to the repository (409).", "Try again."),
        412: ("Something else has committed to the repository in the meantime (412).", "Try again."),
        413: ("A file is too large (413).", "Remove it, or ask the Hub for more room."),
        429: ("The Hub asks for fewer requests (429).", "Wait some minutes and try again."),
    }
    if status in known:
        return known[status]
    if status is not None and status >= 500:
        return f"The Hub has a problem of its own ({status}).", "Try again later."
    return "The connection to the Hub failed or broke.", "Check the network and try again."


def _last_words(error: BaseException) -> str:
    server = next(filter(None, (getattr(link, "server_message", None) for link in _chain(error))), None)
    text = f"{type(error).__name__}: {server or str(error)}"
    return " ".join(text.split())[:400]


def push_error(error: BaseException, what: str, *, token: str | None = None, resume: str | None = None) -> PushError:
    """
    Make a [`PushError`] of any failure of the client.

    Args:
        error (`BaseException`):
            The failure. It stays the cause unless it carries a token.
        what (`str`):
            What was tried, such as "creating the repository user/name".
        token (`str`, *optional*):
            The token in use.
        resume (`str`, *optional*):
            A sentence on how to go on.

    Returns:
        [`PushError`], to be raised as it is.
    """
    cause, remedy = _explained(error)
    parts = [f"The push to the Hub failed while {what}. {cause} {remedy}", *([resume] if resume else [])]
    made = PushError(redacted("\n".join([*parts, f"({_last_words(error)})"]), token))
    told = "".join(traceback.format_exception(error))
    made.__cause__ = error if redacted(told, token) == told else None
    made.__suppress_context__ = True
    return made
