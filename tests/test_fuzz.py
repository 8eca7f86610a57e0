"""Bytes of anything at all, found by hypothesis, as images, tables and adapters: read, or refused by this library."""

import io
import json
import os
import sys
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from tests.helpers import that_ends
from tests.tiny import stable_diffusion
from tgol_trainer import adapters
from tgol_trainer.data import Columns, DataError, ImageError, open_image, prepare_dataset
from tgol_trainer.sources import load_scored_dataset

pytestmark = pytest.mark.slow

SECONDS = 20
"""An example hangs that waits or computes for so long."""


# ---- What may not happen ----

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
_state = {"on": False, "found": []}


def _watch(event, arguments):
    if not _state["on"]:
        return
    if event in FORBIDDEN:
        _state["found"].append((event, str(arguments)[:200]))
    elif event == "open" and str(arguments[0]).endswith("secret.png"):
        _state["found"].append((event, str(arguments[0])))


@pytest.fixture(scope="module", autouse=True)
def hooked():
    if not _state.get("hooked"):
        sys.addaudithook(_watch)
        _state["hooked"] = True


@contextmanager
def watched():
    """Nothing is started, unpickled or read beside the folder, and there is an end."""

    _state.update(on=True, found=[])
    try:
        with that_ends(SECONDS):
            yield
    finally:
        _state["on"] = False
    assert not _state["found"]


def examples(number):
    return settings(max_examples=number, suppress_health_check=list(HealthCheck))


# ---- Bytes ----


def png():
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def encoded(kind):
    stream = io.BytesIO()
    Image.open(io.BytesIO(png())).save(stream, kind)
    return stream.getvalue()


@st.composite
def mutated(draw, seeds):
    """One of the seeds with some of its bytes replaced, removed, repeated or moved; or any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        if not content:
            break
        at = draw(st.integers(0, len(content) - 1))
        end = min(len(content), at + draw(st.integers(1, 16)))
        change = draw(st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat"]))
        if change == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "set":
            content[at:end] = bytes([draw(st.sampled_from([0, 1, 127, 128, 255]))]) * (end - at)
        elif change == "cut":
            del content[at:]
        elif change == "drop":
            del content[at:end]
        elif change == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        else:
            content[at:at] = content[at:end] * draw(st.integers(1, 50))
    return bytes(content)


def with_sums(content):
    """A PNG whose checksums are right, so that what was changed is read and not refused for its sum."""
    out, at = bytearray(content[:8]), 8
    while at + 12 <= len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        body = content[at + 4 : at + 8 + length]
        if len(body) < 4 + length:
            break
        out += content[at : at + 4] + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + length
    return bytes(out) + content[at:]


KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "JPEG2000", "AVIF")
IMAGES = [encoded(kind) for kind in KINDS]


@given(mutated(IMAGES), st.booleans())
@examples(1500)
def test_bytes_as_an_image_are_opened_as_rgb_or_refused(content, sums):
    if sums and content.startswith(b"\x89PNG"):
        content = with_sums(content)
    with watched():
        try:
            image = open_image({"bytes": content, "path": None})
        except ImageError as error:
            assert str(error)
        else:
            assert image.mode == "RGB" and min(image.size) > 0


# ---- Tables ----

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
NAMES = st.one_of(st.sampled_from(["0.png", "1.png", "2.png", "no.png", "0.png/", "./0.png", "sub/../1.png"]), VALUES)
KEYS = st.sampled_from(["file_name", "prompt", "score", "image", "", "split", "__index_level_0__"])
ROW = st.one_of(
    st.fixed_dictionaries({"file_name": NAMES, "prompt": VALUES, "score": VALUES}),
    st.dictionaries(KEYS, VALUES, max_size=4),
)
GOOD = [{"file_name": f"{index}.png", "prompt": f"prompt {index}", "score": index + 0.5} for index in range(3)]
JSON_SEEDS = ["".join(json.dumps(row) + "\n" for row in GOOD).encode(), json.dumps(GOOD).encode()]
CSV_SEEDS = [
    b'file_name,prompt,score\n0.png,a,1.5\n1.png,"b, c",2.5\n2.png,d,-3\n',
    b"file_name;prompt;score\n0.png;a;1,5\n1.png;b;2,5\n",
]


def parquet_bytes():
    stream = io.BytesIO()
    rows = {"prompt": ["a", "b"], "image": [{"bytes": png(), "path": None}] * 2, "score": [1.0, 2.0]}
    parquet.write_table(pa.table(rows), stream)
    return stream.getvalue()


PARQUET_SEEDS = [parquet_bytes()]


def read_folder(name, content):
    """Load a folder with a table of these bytes and check its rows, as training does."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "data")
        folder.mkdir()
        (Path(place) / "secret.png").write_bytes(png())
        if name.startswith("metadata"):
            for index in range(3):
                (folder / f"{index}.png").write_bytes(png())
        (folder / name).write_bytes(content)
        datasets.config.HF_DATASETS_CACHE = Path(place, "cache")
        with watched():
            try:
                rows, report = prepare_dataset(load_scored_dataset(str(folder)), Columns(), (16, 16))
            except DataError as error:
                assert str(error)
            else:
                assert report.num_kept == len(rows) > 0
                assert np.isfinite(rows.scores).all()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)


@given(
    st.one_of(
        mutated(JSON_SEEDS), st.lists(ROW, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    )
)
@examples(120)
def test_bytes_as_json_lines_are_rows_or_refused(content):
    read_folder("metadata.jsonl", content)


@given(mutated(CSV_SEEDS))
@examples(120)
def test_bytes_as_csv_are_rows_or_refused(content):
    read_folder("metadata.csv", content)


@given(mutated(PARQUET_SEEDS))
@examples(120)
def test_bytes_as_parquet_are_rows_or_refused(content):
    read_folder("train.parquet", content)


# ---- Adapters ----


def adapter_bytes():
    from peft import LoraConfig

    pipeline = stable_diffusion()
    adapters.add_policy(pipeline.unet, LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    with tempfile.TemporaryDirectory() as folder:
        adapters.save_adapter(type(pipeline), "unet", pipeline.unet, Path(folder))
        return (Path(folder) / adapters.WEIGHTS_NAME).read_bytes()


ADAPTERS = [save({"unet.a.lora_A.weight": torch.ones(2, 2)}, metadata={"format": "pt"})]


@pytest.fixture(scope="module")
def whole():
    return adapter_bytes()


def header_changed(content, change):
    """An adapter whose header is other JSON; its data stay."""
    length = int.from_bytes(content[:8], "little")
    text = change(content[8 : 8 + length])
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


@given(data=st.data())
@examples(300)
def test_bytes_as_an_adapter_are_loaded_or_refused(whole, data):
    length = int.from_bytes(whole[:8], "little")
    if data.draw(st.booleans()):
        header = data.draw(mutated([whole[8 : 8 + length]]))
        content = header_changed(whole, lambda _: header)
    else:
        content = data.draw(mutated([whole, *ADAPTERS]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / adapters.WEIGHTS_NAME).write_bytes(content)
        with watched():
            try:
                if adapters.adapter_file(folder) is not None:
                    adapters.load_trained(stable_diffusion(), "unet", folder)
            except ValueError as error:
                assert str(error) and os.path.basename(folder) in str(error)
