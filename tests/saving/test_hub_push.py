"""The table of faults in docs/sharing.md: each row is met by a real push to the loopback Hub, over xet and LFS."""

import json
import re
import subprocess
import sys

import pytest

from tests import ROOT
from tests.hub.table import CASES
from tgol_trainer.saving.hub import Repository, RunPushes, background

pytestmark = pytest.mark.xdist_group("hub table")

LINES = (ROOT / "docs" / "sharing.md").read_text().splitlines()
CELLS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in LINES if line.startswith("| ")]
ROWS = [row for row in CELLS if len(row) == 5 and row[0] != "Call"]


@pytest.fixture(scope="module")
def outcomes():
    found = {}
    for way in ("xet", "LFS"):
        command = [sys.executable, "-m", "tests.hub.table", way.lower()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[way] = json.loads(done.stdout)
    return found


def test_every_case_stands_in_the_table_for_both_ways_of_transfer():
    listed = [
        f"{call}: {fault} {way}" for call, fault, ways, *_ in ROWS for way in ways.replace("both", "xet LFS").split()
    ]
    assert sorted(listed) == sorted(f"{name} {way}" for name in CASES for way in ("xet", "LFS"))


@pytest.mark.parametrize(("call", "fault", "ways", "waits", "seen"), ROWS, ids=[", ".join(row[:3]) for row in ROWS])
def test_a_fault_does_what_the_table_says_and_the_next_push_arrives(outcomes, call, fault, ways, waits, seen):
    for way in ways.replace("both", "xet LFS").split():
        found = outcomes[way][f"{call}: {fault}"]
        assert found["waited"] == float(waits)
        if seen.startswith("Nothing"):
            assert found["error"] is None and found["arrived"]
        else:
            assert seen.removesuffix(".") in found["error"]
            assert found.get("again", True)
        if found["error"] and "Nothing was uploaded" not in found["error"]:
            assert re.search(r"`tgol push \S+ --hub_model_id \S+` pushes", found["error"])


def test_an_answer_that_was_lost_makes_two_commits_over_xet_and_one_over_lfs(outcomes):
    """The client repeats the commit in the one and not in the other; either way the files are there."""
    titles = {way: found["commit: the answer is lost"]["commits"] for way, found in outcomes.items()}
    assert titles == {"xet": ["A push", "A push", "initial commit"], "LFS": ["A push", "initial commit"]}


def test_a_failure_outside_the_client_is_logged_without_the_token(tmp_path, monkeypatch, caplog):
    token = "not of the Hub's form"

    def fail(*_, **__):
        raise OSError(f"cannot read {token}")

    monkeypatch.setattr(background, "push_run", fail)
    pushes = RunPushes(Repository("o/n", token=token), tmp_path, "end", always=False)
    pushes.final("The end", blocking=False)
    pushes.finish()
    assert pushes.failed == ["the end"]
    assert "OSError: cannot read ***" in caplog.text and token not in caplog.text
