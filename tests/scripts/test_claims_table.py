"""The table of families and claims: read from pytest's own files, and of the families that there are."""

import importlib.util
import re

import pytest

from tests import ROOT
from tgol_trainer.families import FAMILIES

TWINS = {"ltx": "LTXPipeline", "ltx-2": "LTX2Pipeline", "wan": "WanPipeline", "wan 2.2 5b": "WanPipeline"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("claims_table", ROOT / "scripts" / "claims_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_says_yes_only_where_a_test_passed_for_each_tiny_pipeline(script, tmp_path):
    """ltx-2 is not ltx; Wan has two tiny pipelines, of which one was not offloaded; what was skipped did not run."""
    loads, zero, offloads = (script.CLAIMS[name] for name in ("loads back", "begins at 0", "offloaded"))
    cases = {
        f"{loads}[ltx-2]": "",
        f"{loads}[ltx]": "<skipped/>",
        f"{zero}[float32-ltx-2]": "",
        f"{zero}[bfloat16-ltx-2]": "<failure/>",
        f"{zero}[float32-wan]": "",
        f"{zero}[float32-wan 2.2 5b]": "",
        f"{offloads}[wan]": "",
        "test_something_else": "",
    }
    text = "".join(f'<testcase name="{name}">{inside}</testcase>' for name, inside in cases.items())
    (tmp_path / "run.xml").write_text(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    rows = script.table(script.read_runs([tmp_path / "run.xml"], TWINS), TWINS).splitlines()
    head, *body = ([cell.strip() for cell in row.strip("|").split("|")] for row in [rows[0], *rows[2:]])
    said = {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in body}
    wanted = ("loads back", "begins at 0", "offloaded", "learns")
    assert {kind: [cells[name] for name in wanted] for kind, cells in said.items()} == {
        "LTXPipeline": ["–", "–", "–", "–"],
        "LTX2Pipeline": ["yes", "no", "–", "–"],
        "WanPipeline": ["–", "yes", "–", "–"],
    }


def test_the_page_has_a_row_for_each_family_and_a_column_for_each_claim_that_a_test_makes(script):
    start, end = script.MARKERS
    lines = script.PAGE.read_text(encoding="utf-8").split(start)[1].split(end)[0].strip().splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")][1:] == list(script.CLAIMS)
    assert {re.match(r"\| `(\w+)`", line)[1] for line in lines[2:]} == set(FAMILIES)
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("*/test_*.py"))
    assert [test for test in script.CLAIMS.values() if f"def {test}(" not in tests] == []
