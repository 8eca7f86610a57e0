"""
Measure what rows cost before the first step and in each step: 1,000 distinct images of a shapes world, repeated.

Each run is a process of its own; the second one finds what the first one wrote. A line of the results file holds one run:

    python scripts/benchmarks/startup.py --rows 1000 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
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


def make_rows(folder: Path, number: int) -> None:
    """Write `number` rows of an image, one of the prompts and a score of their own as a dataset folder."""
    import datasets
    import numpy as np
    import pyarrow as pa

    from tgol_trainer.shapes import PROMPTS

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (DISTINCT, 8, 8, 3), dtype=np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    columns = {
        "prompt": [PROMPTS[index % len(PROMPTS)] for index in range(DISTINCT)],
        "image": [datasets.Image().encode_example(image) for image in images],
    }
    block = datasets.Dataset.from_dict(
        columns, features=datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    ).data.table

    def blocks() -> Any:
        for _ in range(number // DISTINCT):
            yield block.append_column("score", pa.array(rng.normal(size=DISTINCT)))

    from datasets.arrow_writer import ArrowWriter

    features = datasets.Features(
        {"prompt": datasets.Value("string"), "image": datasets.Image(), "score": datasets.Value("float64")}
    )
    file = folder / f"rows-{number}.arrow"
    with ArrowWriter(path=str(file), features=features) as writer:
        for part in blocks():
            writer.write_table(part)
        writer.finalize()


def run(folder: Path, number: int, num_proc: int | None) -> dict[str, Any]:
    """Start a training run, make a few steps, and return seconds of each part and the peak of memory."""
    import datasets

    from tgol_trainer import TGOLConfig, TGOLTrainer

    rows = datasets.Dataset.from_file(str(folder / f"rows-{number}.arrow"))
    args = TGOLConfig(
        output_dir=str(folder / f"run-{number}"),
        cache_dir=str(folder / "cache"),
        dataset_num_proc=num_proc,
        per_device_train_batch_size=8,
        max_steps=STEPS,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    clock = time.perf_counter()
    trainer = TGOLTrainer("shapes", args, rows)
    checked = time.perf_counter()
    loader = trainer.get_train_dataloader()
    filled = time.perf_counter()
    batches = iter(loader)
    trainer.model.train()
    for _ in range(STEPS):
        began = time.perf_counter()
        inputs = next(batches)
        draw = trainer.draws(inputs, 0)
        times.append(time.perf_counter() - began)
        del draw
    first = times[0]
    return {
        "rows": number,
        "check_s": round(checked - clock, 2),
        "cache_s": round(filled - checked, 2),
        "first_batch_s": round(first, 3),
        "batch_ms": round(1000 * statistics.median(times[1:]), 2),
        "memory_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
    }


def main() -> None:
    """Run each size twice, and append the results."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--num_proc", type=int, default=None)
    parser.add_argument("--folder", type=Path, help="where the rows and caches are kept; by default a temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=("make", "run"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "make":
        make_rows(options.folder, options.rows[0])
    elif options.child == "run":
        print(json.dumps(run(options.folder, options.rows[0], options.num_proc)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            common = [sys.executable, __file__, "--folder", str(folder)]
            if options.num_proc:
                common += ["--num_proc", str(options.num_proc)]
            for number in options.rows:
                if not (folder / f"rows-{number}.arrow").exists():
                    subprocess.run([*common, "--rows", str(number), "--child", "make"], check=True)
                for start in ("first", "second"):
                    done = subprocess.run(
                        [*common, "--rows", str(number), "--child", "run"], check=True, stdout=subprocess.PIPE, text=True
                    )
                    line = {"start": start, **json.loads(done.stdout.splitlines()[-1]), "cpu": platform.processor()}
                    print(json.dumps(line), flush=True)
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
