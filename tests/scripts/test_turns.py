"""Programs of the throughput benchmark take turns, and end with their parent's patience."""

import importlib
import os
import signal
import sys

import pytest

from tests import ROOT

FOLDER = ROOT / "scripts" / "benchmarks"
PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(FOLDER)!r})
from turns import StepClock
clock = StepClock(untimed=2)
for step in range(int(sys.argv[3])):
    time.sleep(float(sys.argv[2]))
    open(sys.argv[1], "a").write(sys.argv[2] + " ")
    clock.end_step()
clock.write(name=sys.argv[2])
"""


@pytest.fixture
def start(tmp_path):
    sys.path.insert(0, str(FOLDER))
    turns = importlib.import_module("turns")
    sys.path.pop(0)
    started = []

    def program(name, steps):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "order"), name, str(steps)]
        started.append(turns.Program(command, tmp_path / name, {}))
        return started[-1]

    yield program
    for each in started:
        each.kill()


def test_programs_take_turns_and_stopped_time_is_not_counted(start, tmp_path):
    slow, fast = start("0.2", 4), start("0.01", 4)
    for _ in range(2):
        slow.step()
        fast.step()
    assert (tmp_path / "order").read_text().split() == ["0.2"] * 2 + ["0.01"] * 2 + ["0.2", "0.01"] * 2
    found = fast.finish()
    assert found["name"] == "0.01" and len(found["seconds"]) == 2 and max(found["seconds"]) < 0.2


def test_a_program_that_is_killed_while_it_stands_still_or_has_steps_left_is_an_error(start):
    program = start("0.01", 4)
    os.kill(program.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, program.process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(RuntimeError, match=r"was ended \(-9\)"):
        program.step()
    with pytest.raises(RuntimeError, match="has more steps than turns"):
        start("0.02", 4).finish()
    with pytest.raises(RuntimeError, match="ended early"):
        start("0.03", 1)
