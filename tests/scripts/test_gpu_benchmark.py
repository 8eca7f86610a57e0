"""The GPU benchmark from end to end on tiny networks, without a GPU."""

import json
import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow
def test_each_tiny_case_is_planned_timed_and_written_and_the_first_log_ratio_is_zero(tmp_path):
    command = [ROOT / "scripts/benchmarks/gpu.sh", "--tiny", tmp_path, tmp_path / "rows.jsonl"]
    environment = {
        "PYTHON": sys.executable,
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=600)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["case"]["dtype"] for row in rows] == ["float32", "bfloat16", "bfloat16", "bfloat16"]
    for row in rows:
        assert "error" not in row, row["error"]
        first, second = row["log_ratios"]
        assert first == [0.0, 0.0] != second
        assert row["images_per_second"] == 2 / row["seconds"]
        assert row["plan"]["tensors"] > 0 < row["share_of_rate"]
