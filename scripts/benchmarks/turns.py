"""
Run programs in turns, one step at a time, so that what slows the machine for a while slows them all.

A program stops itself at the end of each step (SIGSTOP) and goes on when its turn comes. All of them stay in memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS_FILE = "STEPS_FILE"
"""Variable that names the file of a program's steps."""


def peak_memory() -> int:
    """Return the peak of this process's memory in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


class StepClock:
    """
    Time the steps of this process, which stops after each of them. Steps before the first stop are not timed.

    Args:
        untimed (`int`, *optional*, defaults to 1): Steps before the first stop.
    """

    def __init__(self, untimed: int = 1) -> None:
        self.untimed = untimed
        self.seconds: list[float] = []
        self.resumed: float | None = None

    def end_step(self) -> None:
        """Note how long the step took, stop, and return when the next turn begins."""
        ended = time.perf_counter()
        self.untimed -= 1
        if self.untimed > 0:
            return
        if self.resumed is not None:
            self.seconds.append(ended - self.resumed)
        os.kill(os.getpid(), signal.SIGSTOP)
        self.resumed = time.perf_counter()

    def write(self, **facts: Any) -> None:
        """Write the seconds and other facts into the file that the environment names."""
        Path(os.environ[STEPS_FILE]).write_text(json.dumps({"seconds": self.seconds, **facts}))


class Program:
    """
    A program that times its steps with a [`StepClock`]. It starts at once and runs up to its first stop.

    Args:
        command (`Sequence[str]`): What is run.
        folder (`Path`): Its steps and what it prints are written here.
        environment (`dict[str, str]`): Variables beside those of this process.

    Raises:
        RuntimeError: where the program ends before its last step, or has steps left; with what it printed last.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.log = folder / "steps.json", folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(  # noqa: S603
                command, stdout=log, stderr=log, env={**os.environ, **environment, STEPS_FILE: str(self.file)}
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
        """Return when the program has stopped."""
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self.process.returncode = os.waitstatus_to_exitcode(status)
            raise self._failure("ended early")

    def _go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)  # notices a program that has been killed while it was stopped
        if self.process.returncode is not None:
            raise self._failure(f"was ended ({self.process.returncode})")

    def _failure(self, what: str) -> RuntimeError:
        return RuntimeError(f"{self.process.args!r} {what}:\n{self.log.read_text()[-3000:]}")

    def step(self) -> None:
        """Run one step."""
        self._go_on()
        self._wait()

    def finish(self) -> dict[str, Any]:
        """Let the program end; return what its clock wrote."""
        self._go_on()
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            self.kill()
            raise self._failure("has more steps than turns")
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode:
            raise self._failure(f"failed ({self.process.returncode})")
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def kill(self) -> None:
        """End the program at once; nothing happens where it has ended."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
