"""Failures on demand: what a route answers instead of, before or after doing its work."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """
    One way to fail.

    Args:
        kind: `"status"` answers with `status` and does nothing; `"html"` the same with a page of HTML; `"reset"`
            closes the connection with RST before an answer; `"lost"` does the work, then closes with RST; `"cut"`
            sends half of the answer's body, then RST; `"short"` the same with a clean close; `"flip"` changes one byte
            of the body; `"stall"` waits `seconds`, or until [`Faults.clear`], then works as always.
        status: Of `"status"` and `"html"`.
        code: `X-Error-Code`, by which the client chooses its exception.
        message: `X-Error-Message`, and the body.
        headers: Further ones, such as `Retry-After`.
        seconds: Of `"stall"`.
        times: How many requests it hits; None hits all.
        skip: How many requests pass before.
        released: Set by [`Faults.clear`]; ends a `"stall"`.
    """

    kind: str = "status"
    status: int = 500
    code: str | None = None
    message: str = "A fault that was asked for"
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 5.0
    times: int | None = 1
    skip: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.kind not in ("status", "html", "reset", "lost", "cut", "short", "flip", "stall"):
            raise ValueError(f"no fault {self.kind!r}")


class Faults:
    """The faults that wait for requests, by the name of a route."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()

    def add(self, route: str, fault: Fault) -> None:
        """Let the next requests of a route fail."""
        with self._lock:
            self._waiting.setdefault(route, []).append(fault)

    def clear(self) -> None:
        """Forget those that were not met, and let the requests that stall go on."""
        with self._lock:
            for fault in itertools.chain(*self._waiting.values()):
                fault.released.set()
            self._waiting.clear()

    def take(self, route: str) -> Fault | None:
        """Return the fault that this request meets."""
        with self._lock:
            for fault in self._waiting.get(route, []):
                if fault.times == 0:
                    continue
                if fault.skip:
                    fault.skip -= 1
                    return None
                if fault.times is not None:
                    fault.times -= 1
                return fault
        return None
