"""One origin: reads a request, finds its route, meets a fault or does the work, and answers."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .faults import Fault, Faults
from .store import Refused

MAX_BODY = 256 * 2**20
HTML = b"<!doctype html><html><head><title>502</title></head><body><h1>Bad gateway</h1></body></html>"


@dataclass
class Request:
    """What came in, and what was answered."""

    origin: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    route: str = ""
    status: int = 0
    groups: tuple[str | None, ...] = ()

    @property
    def token(self) -> str | None:
        """The bearer token of the request."""
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind.lower() == "bearer" else None

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass
class Answer:
    """What goes out."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    """Return an answer of JSON."""
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


Route = tuple[str, str, str, Callable[[Request], Answer]]
"""Name, method, pattern of the path, and what answers."""


class Origin:
    """
    A server on a port of its own.

    Args:
        name: Of the log.
        host: In its address, a name of 127.0.0.1.
        routes: The first that matches answers.
        faults: Looked up by the name of the route.
        log: Gets every request.
    """

    def __init__(self, name: str, host: str, routes: list[Route], faults: Faults, log: list[Request]) -> None:
        self.name, self.faults, self.log = name, faults, log
        self.routes = [(route, method, re.compile(path), work) for route, method, path, work in routes]
        handler = type("Handler", (_Handler,), {"origin": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://{host}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Close the port."""
        self.server.shutdown()
        self.server.server_close()

    def work(self, request: Request, fault: Fault | None) -> Answer:
        """Return the answer of the route, or of a fault that comes before the work."""
        if fault is not None and fault.kind == "stall":
            fault.released.wait(fault.seconds)
        if fault is not None and fault.kind in ("status", "html"):
            if fault.kind == "html":
                return Answer(fault.status, HTML, {"Content-Type": "text/html; charset=utf-8", **fault.headers})
            return _refusal(Refused(fault.status, fault.code, fault.message), fault.headers)
        for name, method, pattern, work in self.routes:
            match = pattern.fullmatch(request.path)
            if name == request.route and method == request.method and match:
                try:
                    return work(request)
                except Refused as refused:
                    return _refusal(refused, {})
        # Loud: a client asks for something that a test would otherwise take for a failure of the client.
        return as_json({"error": f"LOOPBACK HUB HAS NO ROUTE {request.method} {request.path}"}, 501)

    def route_of(self, request: Request) -> str:
        """Return the name of the route that answers, `unknown` without one."""
        for name, method, pattern, _ in self.routes:
            match = pattern.fullmatch(request.path)
            if method == request.method and match:
                request.groups = match.groups()
                return name
        return "unknown"


def _refusal(refused: Refused, headers: dict[str, str]) -> Answer:
    named = {"X-Error-Code": refused.code or "", "X-Error-Message": refused.message}
    return as_json(refused.body, refused.status, **{key: value for key, value in named.items() if value}, **headers)


class _Handler(BaseHTTPRequestHandler):
    origin: Origin
    protocol_version = "HTTP/1.1"
    timeout = 60  # an idle connection ends
    wbufsize = -1  # one packet an answer: two wait for each other's acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Stay silent; the log is a list."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if sum(map(len, parts)) > MAX_BODY:
                    raise ValueError("body too large")
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            raise ValueError("body too large")
        return self.rfile.read(length)

    def _any(self) -> None:
        parts = urlsplit(self.path)
        request = Request(
            self.origin.name,
            self.command,
            parts.path,
            parse_qs(parts.query, keep_blank_values=True),
            {name.lower(): value for name, value in self.headers.items()},
            self._body(),
        )
        request.route = self.origin.route_of(request)
        self.origin.log.append(request)
        fault = self.origin.faults.take(request.route)
        if fault is not None and fault.kind == "reset":
            return self._reset()
        answer = self.origin.work(request, fault)
        request.status = answer.status
        if fault is not None and fault.kind == "lost":
            return self._reset()
        return self._send(answer, fault)

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        body = answer.body
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault is not None and fault.kind in ("cut", "short"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault.kind == "cut":
                self._reset()
            return
        self.wfile.write(body)

    def _reset(self) -> None:
        # Lingering for no time makes the system send RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile.close()

    def handle(self) -> None:
        """Serve a connection; one that the client or a fault has closed is no error of ours."""
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True

    def finish(self) -> None:
        """Close what a fault has not closed yet."""
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _any
