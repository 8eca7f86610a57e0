"""
Measure what rows cost before the first step and in each step: 1,000 distinct random images, repeated.

Each run is a process of its own; the second one finds what the first one wrote. A line of the results is one run:

    python scripts/benchmarks/startup.py --rows 1000 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "startup.jsonl"
DISTINCT = 1000
STEPS = 20


def make_rows(file: Path, number: int) -> None:
    """Write `number` rows, each an image, a prompt and a score of its own."""
    import datasets
    import numpy as np
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    from tgol_trainer.shapes import PROMPTS

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (DISTINCT, 8, 8, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    kinds = {"prompt": datasets.Value("string"), "image": datasets.Image()}
    columns = {
        "prompt": [PROMPTS[index % len(PROMPTS)] for index in range(DISTINCT)],
        "image": [datasets.Image().encode_example(image) for image in images],
    }
    block = datasets.Dataset.from_dict(columns, datasets.Features(kinds)).data.table
    with ArrowWriter(path=str(file), features=datasets.Features({**kinds, "score": datasets.Value("float64")})) as out:
        for _ in range(number // DISTINCT):
            out.write_table(block.append_column("score", pa.array(rng.normal(size=DISTINCT))))
        out.finalize()


def own_memory() -> int:
    """Return the bytes that this process holds beside mapped files, whose pages the system takes back (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def run(folder: Path, number: int) -> dict[str, Any]:
    """Start a training run, draw a few batches; return the processor's seconds of each part and the memory held."""
    import datasets

    from tgol_trainer import TGOLConfig, TGOLTrainer

    rows = datasets.Dataset.from_file(str(folder / f"rows-{number}.arrow"))
    args = TGOLConfig(
        output_dir=str(folder / f"run-{number}"),
        cache_dir=str(folder / "cache"),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    TGOLTrainer("shapes", TGOLConfig(**{**args.to_dict(), "output_dir": str(folder / "empty")}))  # imports, model
    memory = own_memory()
    began = time.process_time()
    trainer = TGOLTrainer("shapes", args, rows)
    checked = time.process_time()
    loader = trainer.get_train_dataloader()
    filled = time.process_time()
    held = [own_memory()]
    times, batches = [], iter(loader)
    for _ in range(STEPS + 1):
        start = time.process_time()
        trainer.draws(next(batches), 0)
        times.append(time.process_time() - start)
        held.append(own_memory())
    return {
        "rows": number,
        "check_s": round(checked - began, 2),
        "cache_s": round(filled - checked, 2),
        "first_batch_s": round(times[0], 3),
        "batch_ms": round(1000 * statistics.median(times[1:]), 2),
        "memory_mb": round((max(held) - memory) / 1e6),
    }


def main() -> None:
    """Run each size twice, and append the results."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where the rows and caches are kept; by default a temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options.folder, options.rows[0])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number in options.rows:
            file = folder / f"rows-{number}.arrow"
            if not file.exists():
                make_rows(file, number)
            command = [sys.executable, __file__, "--folder", str(folder), "--rows", str(number), "--child"]
            for start in ("first", "second"):
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this file
                line = {"start": start, **json.loads(done.stdout.splitlines()[-1]), "machine": platform.machine()}
                print(json.dumps(line), flush=True)
                with options.results.open("a", encoding="utf-8") as results:
                    results.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
