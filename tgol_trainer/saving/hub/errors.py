"""Explain a failed push: one error with its cause and remedy, and without tokens."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator

from tgol_trainer._secrets import TOKEN

_LOGIN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."

_BY_TYPE = {
    "OfflineModeIsEnabled": ("HF_HUB_OFFLINE is set, so nothing may leave this machine.", "Unset it."),
    "LocalTokenNotFoundError": ("There is no token.", _LOGIN),
    "LocalProtocolError": ("The token holds characters that cannot be sent.", _LOGIN),
    "RevisionNotFoundError": ("The Hub has no such branch.", "Check the revision."),
}
_NOT_FOUND = ("The Hub does not know the repository, or hides it from this token.", f"Check its name. {_LOGIN}")
_BY_STATUS = {
    400: ("The Hub refused the request as malformed (400).", "Read its message below."),
    401: ("The Hub does not accept the token, or there is none (401).", _LOGIN),
    403: ("The token may not write there (403).", f"Check the owner in the repository's name. {_LOGIN}"),
    404: _NOT_FOUND,
    409: ("Something else is writing to the repository (409).", "Try again."),
    412: ("Something else has committed to the repository in the meantime (412).", "Try again."),
    413: ("A file is too large (413).", "Remove it, or ask the Hub for more room."),
    429: ("The Hub asks for fewer requests (429).", "Wait some minutes and try again."),
}


class PushError(RuntimeError):
    """A push did not succeed. The message says why, what to do, and that nothing local was lost."""


def redacted(text: str, token: str | None = None) -> str:
    """Return a text without access tokens and without `token`, which may have another form than the Hub's."""
    for secret in filter(None, (token, (token or "").strip())):
        text = text.replace(secret, "***")
    return TOKEN.sub("hf_***", text)


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    for _ in range(20):  # a chain could be a circle
        if current is None:
            return
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error. The storage client gives its status only in the text."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    match = re.search(r"\b(?:HTTP status|status:?|error[^0-9]{0,30}\()\D{0,20}([45]\d\d)\b", str(error))
    return int(match[1]) if match else None


def _explained(error: BaseException) -> tuple[str, str]:
    """Return cause and remedy, one sentence each."""
    names = {type(link).__name__ for link in _chain(error)}
    for name, explanation in _BY_TYPE.items():
        if name in names:
            return explanation
    status = _status(error)
    if "RepositoryNotFoundError" in names or status == 404:
        return _NOT_FOUND
    if "JSONDecodeError" in names:
        return "The Hub, or a proxy before it, answered with a page instead of data.", "Try again later."
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if status is not None and status >= 500:
        return f"The Hub has a problem of its own ({status}).", "Try again later."
    return "The connection to the Hub failed or broke.", "Check the network and try again."


def _last_words(error: BaseException) -> str:
    server = next(filter(None, (getattr(link, "server_message", None) for link in _chain(error))), None)
    return " ".join(f"{type(error).__name__}: {server or error}".split())[:400]


def push_error(error: BaseException, what: str, *, token: str | None = None, resume: str | None = None) -> PushError:
    """
    Make a [`PushError`] of any failure of the client.

    Args:
        error (`BaseException`): The failure. It stays the cause unless it holds a token.
        what (`str`): What was tried, such as "creating the repository user/name".
        token (`str`, *optional*): The token in use.
        resume (`str`, *optional*): A sentence that says how to continue.
    """
    cause, remedy = _explained(error)
    lines = [f"The push to the Hub failed while {what}. {cause} {remedy}", resume or "", f"({_last_words(error)})"]
    made = PushError(redacted("\n".join(filter(None, lines)), token))
    trace = "".join(traceback.format_exception(error))
    made.__cause__ = error if redacted(trace, token) == trace else None
    made.__suppress_context__ = True
    return made
