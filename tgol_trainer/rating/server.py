"""The server of the rating page: it asks nothing of other machines, and answers when a rating is on the disk."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgol_trainer.data.images import VisualError
from tgol_trainer.sources.ratings import SKIPPED, UNDONE, Journal, Kind

from .tasks import Pictures, Task, order_for

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

CHOICES: dict[Kind, tuple[Any, ...]] = {
    "ratings": (1, 2, 3, 4, 5),
    "thumbs": ("up", "down"),
    "pairs": ("first", "second", "tie"),
}
_LONGEST_NAME = 60
_RANGE = re.compile(r"bytes=(\d{1,15})-(\d{0,15})")
_LARGEST_BODY = 10_000
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
_POLICY += "media-src 'self'; "
_FILES = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")}
_FILES |= {"/page.js": ("page.js", "text/javascript")}


@dataclasses.dataclass(frozen=True)
class Session:
    """
    What the page rates and where the ratings go.

    Args:
        pictures ([`Pictures`]): The images.
        tasks (`Sequence[Task]`): What is to be rated.
        folder (`Path`): Output folder.
        kind (`str`): What is given.
        seed (`int`): Seed of the orders.
        by_prompt (`bool`): Whether images of one prompt follow each other and are shown together.
        commands (`tuple[str, ...]`): What to run next, shown at the end.
    """

    pictures: Pictures
    tasks: Sequence[Task]
    folder: Path
    kind: Kind
    seed: int = 0
    by_prompt: bool = False
    commands: tuple[str, ...] = ()


class _Refused(Exception):
    """An answer that is not a rating; the text says why."""


def make_app(session: Session, journal: Journal, hosts: Sequence[str]) -> Starlette:
    """
    Make the application.

    Args:
        session ([`Session`]): What is rated.
        journal ([`Journal`]): Where ratings are written.
        hosts (`Sequence[str]`): Names that a browser may know this machine by; `"*"` for all.

    Returns:
        `starlette.applications.Starlette`

    Raises:
        ImportError: without the extra `rate`.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError("The page needs starlette and uvicorn: pip install starlette uvicorn") from error
    page = _Page(session, journal)
    routes = [Route(path, page.file, methods=["GET"]) for path in _FILES]
    routes += [
        Route("/tasks", page.tasks, methods=["GET"]),
        Route("/image/{picture}", page.image, methods=["GET"]),
        Route("/answer", page.answer, methods=["POST"]),
    ]
    # Otherwise a page elsewhere could have its own name point to this machine, and read the images.
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))])


class _Page:
    def __init__(self, session: Session, journal: Journal) -> None:
        self._session, self._journal = session, journal
        self._tasks = {task.id: task for task in session.tasks}
        # A Space shows its page inside one of the Hub.
        frames = "https://huggingface.co" if os.environ.get("SPACE_ID") else "'none'"
        self._headers = {**_HEADERS, "Content-Security-Policy": f"{_POLICY}frame-ancestors {frames}"}

    def file(self, request: Request) -> Response:
        from starlette.responses import Response

        name, kind = _FILES[request.url.path]
        content = files(__package__).joinpath("page", name).read_bytes()
        return Response(content, media_type=kind, headers=self._headers)

    def tasks(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        try:
            rater = _name(request.query_params.get("rater"))
        except _Refused as error:
            return JSONResponse({"error": str(error)}, 400, headers=self._headers)
        session = self._session
        ordered = order_for(session.tasks, rater, session.seed, by_prompt=session.by_prompt)
        given = self._journal.of(rater)
        return JSONResponse(
            {
                "kind": session.kind,
                "medium": session.pictures.medium,
                "by_prompt": session.by_prompt,
                "commands": session.commands,
                "tasks": [{"id": task.id, "prompt": task.prompt, "images": task.pictures} for task in ordered],
                "answers": {task: _answer_of(entry) for task, entry in given.items() if task in self._tasks},
            },
            headers=self._headers,
        )

    def image(self, request: Request) -> Response:
        from starlette.responses import Response

        try:
            convert = request.query_params.get("as") == "webm"
            content, kind = self._session.pictures.for_browser(request.path_params["picture"], convert=convert)
        except (KeyError, OSError, VisualError):
            return Response(status_code=404, headers=self._headers)
        headers = {**self._headers, "Cache-Control": "private, max-age=3600", "Accept-Ranges": "bytes"}
        part = _RANGE.fullmatch(request.headers.get("range", ""))
        if part is None or int(part[1]) >= len(content):
            return Response(content, media_type=kind, headers=headers)
        # Safari plays no video that does not come in parts.
        end = min(int(part[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {part[1]}-{end}/{len(content)}"
        return Response(content[int(part[1]) : end + 1], 206, media_type=kind, headers=headers)

    async def answer(self, request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse

        try:
            # A form of another site cannot send this type without asking first, and is not answered then.
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                raise _Refused("send JSON")
            if int(request.headers.get("content-length") or _LARGEST_BODY + 1) > _LARGEST_BODY:
                raise _Refused("too long")
            try:
                wanted = json.loads(await request.body())
            except ValueError as error:
                raise _Refused("not JSON") from error
            await run_in_threadpool(self._save, wanted)
        except _Refused as error:
            return JSONResponse({"error": str(error)}, 400, headers=self._headers)
        except OSError as error:
            return JSONResponse({"error": f"not saved: {error}"}, 500, headers=self._headers)
        return JSONResponse({"saved": True}, headers=self._headers)

    def _save(self, wanted: Any) -> None:
        if not isinstance(wanted, dict):
            raise _Refused("send an object with rater, task and answer")
        rater, answer = _name(wanted.get("rater")), wanted.get("answer")
        task = self._tasks.get(str(wanted.get("task")))
        if task is None:
            raise _Refused("there is no such task; load the page again")
        if answer == "skip" or answer is None:
            self._journal.append(rater, task.id, {SKIPPED if answer == "skip" else UNDONE: True})
            return
        if isinstance(answer, bool) or answer not in CHOICES[self._session.kind]:
            raise _Refused(f"the answer must be one of {CHOICES[self._session.kind]}")
        kept = [self._session.pictures.keep(picture, self._session.folder) for picture in task.pictures]
        names = ("image_0", "image_1") if len(kept) == 2 else ("image",)
        given = {"choice" if len(kept) == 2 else "rating": answer}
        self._journal.append(rater, task.id, {"prompt": task.prompt, **dict(zip(names, kept, strict=True)), **given})


def _name(value: Any) -> str:
    name = " ".join(value.split()) if isinstance(value, str) else ""
    if not (0 < len(name) <= _LONGEST_NAME and name.isprintable()):
        raise _Refused(f"a rater's name has 1 to {_LONGEST_NAME} characters")
    return name


def _answer_of(entry: dict[str, Any]) -> Any:
    return "skip" if entry.get(SKIPPED) else entry.get("rating", entry.get("choice"))


def serve(app: Starlette, host: str, port: int, ready: Callable[[str], None]) -> None:
    """
    Serve an application until it is interrupted.

    Args:
        app (`Starlette`): The application.
        host (`str`): Address to listen on.
        port (`int`): Port; 0 for a free one.
        ready (`Callable[[str], None]`): Called with the address of the page when it can be opened.

    Raises:
        OSError: if the port is taken; the message says what to do.
    """
    import uvicorn

    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(
            f"`--port`: nothing can listen on {host}, port {port}: {error.strerror}. Give another `--port`, or 0 for "
            "a free one."
        ) from error
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listener.getsockname()[1]}")
    config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])
