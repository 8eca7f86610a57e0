"""A client process of `tests/jobs/test_jobs.py`: reads the named prompt sets from a loopback Hub."""

from __future__ import annotations

import json
import logging
import sys

from tgol_trainer.data import DataError
from tgol_trainer.sources import load_prompts

if __name__ == "__main__":
    logging.basicConfig()
    found = {}
    for name in ("hpsv2", "hpsv2-photo", "partiprompts", "pickapic-test", "tester/prompts"):
        read = load_prompts(name)
        found[name] = [read.texts, read.categories, read.revision]
    read = load_prompts("partiprompts", category_column="Challenge")
    found["partiprompts by Challenge"] = [read.texts, read.categories, read.revision]
    read = load_prompts(f"hpsv2-anime@{found['hpsv2'][2][:10]}")
    found["hpsv2-anime at its commit"] = [read.texts, read.categories, read.revision]
    for name, source, column in (("none", "hpsv2-anime@absent", None), ("by a column", "hpsv2-anime", "Style")):
        try:
            load_prompts(source, category_column=column)
        except DataError as error:
            found[f"hpsv2-anime {'at ' if column is None else ''}{name}"] = str(error)
    sys.stdout.write(f"\n{json.dumps(found)}\n")
