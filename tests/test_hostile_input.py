"""Hostile and broken input to `tgol train`: it trains, or ends in a message that names the place, and runs no code."""

import datetime
import io
import json
import math
import os
import pickle
import re
import socket
import struct
import sys
import tarfile
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save

from tests.helpers import quick, that_ends
from tgol_trainer.cli import main
from tgol_trainer.saving.checkpoints import seal
from tgol_trainer.shapes import PROMPTS

WEIGHTS = "pytorch_lora_weights.safetensors"
ROWS = 8
SECONDS = 60
"""A case hangs that waits or computes for so long; the longest takes 6."""


# ---- The table of good rows that each case spoils ----


class Place:
    """A folder with eight good images and their table; what a case changes of it."""

    def __init__(self, folder):
        self.root, self.data = folder, folder / "data"
        self.data.mkdir()
        self.canary = folder / "ran"
        rng = np.random.default_rng(0)
        for index in range(ROWS):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(self.data / f"{index}.png")
        self.rows = [
            {"file_name": f"{index}.png", "prompt": PROMPTS[index], "score": float(index)} for index in range(ROWS)
        ]
        self.flags, self.written = {}, False

    def row(self, **values):
        self.rows[3].update(values)

    def image(self, content=None, name="3.png"):
        """Put bytes in the place of the fourth image; `None` removes it."""
        (self.data / "3.png").unlink()
        if content is not None:
            (self.data / name).write_bytes(content)
        self.row(file_name=name)

    def table(self, content, name="metadata.jsonl"):
        self.written = True
        (self.data / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def lines(self):
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    def csv(self, separator=",", end="\n"):
        lines = [["file_name", "prompt", "score"], *([*map(str, row.values())] for row in self.rows)]
        return end.join(separator.join(line) for line in lines) + end

    def arguments(self):
        if not self.written:
            self.table(self.lines())
        flags = {"model_name_or_path": "shapes", "dataset_name": self.data, "output_dir": self.root / "run"}
        flags |= {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": "true", "report_to": "none"}
        flags |= {"cache_dir": self.root / "cache", **self.flags}
        return [
            "train",
            *(text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))),
        ]


class Payload:
    """Unpickling it writes the canary."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def encoded(kind, mode="RGB", size=(32, 32), **options):
    stream = io.BytesIO()
    Image.new(mode, size, options.pop("color", 0)).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, data=b"", depth=8, colour=2):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def pipe(place):
    place.image()
    os.mkfifo(place.data / "3.png")


def sock(place):
    place.image()
    here = os.getcwd()
    os.chdir(place.data)
    try:
        socket.socket(socket.AF_UNIX).bind("3.png")
    finally:
        os.chdir(here)


def linked(place, target):
    place.image()
    (place.data / "3.png").symlink_to(target)


def column(place, name, values):
    for row, value in zip(place.rows, values, strict=True):
        row[name] = value


def scores(place, *values):
    column(place, "score", (values * ROWS)[:ROWS])


def parquet_of(place, columns, name="train.parquet"):
    for file in place.data.iterdir():
        file.unlink()
    place.written = True
    images = [encoded("PNG", color=(index * 30, 0, 0)) for index in range(ROWS)]
    full = {
        "prompt": list(PROMPTS[:ROWS]),
        "image": [{"bytes": image, "path": None} for image in images],
        "score": [float(index) for index in range(ROWS)],
        **columns(images),
    }
    parquet.write_table(pa.table(full), place.data / name)


def archive_of(place, kind, name, content):
    for file in place.data.iterdir():
        file.unlink()
    place.written = True
    if kind == "zip":
        with zipfile.ZipFile(place.data / "images.zip", "w") as archive:
            archive.writestr(name, content)
    else:
        with tarfile.open(place.data / "images.tar", "w") as archive:
            for index in range(ROWS):
                for ending, data in (
                    ("png", encoded("PNG", color=(index, 0, 0))),
                    ("json", b'{"prompt": "a", "score": %d}' % index),
                ):
                    info = tarfile.TarInfo(f"{index}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def adapter(place, content):
    folder = place.root / "adapter"
    folder.mkdir()
    if callable(content):
        content = content(good_adapter(place))
    if content is not None:
        (folder / WEIGHTS).write_bytes(content)
    place.flags["adapter_name_or_path"] = folder
    return folder


def good_adapter(place):
    """A trained adapter, as bytes."""
    (place.root / "other").mkdir()
    other = Place(place.root / "other")
    assert main(other.arguments()) == 0
    return (other.root / "run" / WEIGHTS).read_bytes()


def pickled_adapter(place):
    folder = adapter(place, None)
    (folder / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Payload(place.canary)))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(place.canary)))


def header(text, length=None, data=b""):
    content = text.encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def config(place, text):
    path = place.root / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    place.flags["config"] = path


def checkpoint(place, spoil):
    """A run that is stopped after its first step, and its checkpoint, spoiled."""
    place.flags |= {"save_strategy": "steps", "save_steps": 1}
    assert main(place.arguments()) == 0
    folder = place.root / "run" / "checkpoint-1"
    spoil(folder)
    place.flags |= {"max_steps": 2, "resume_from_checkpoint": folder}


def poisoned(name, write=lambda payload, file: file.write_bytes(pickle.dumps(payload))):
    """A file that runs code when it is unpickled, in a checkpoint whose list of files is right again."""

    def spoil(place):
        def spoil_folder(folder):
            write(Payload(place.canary), folder / name)
            (folder / "checkpoint.json").unlink()
            seal(folder, resumable=True)

        checkpoint(place, spoil_folder)

    return spoil


def poisoned_torch(name):
    return poisoned(name, lambda payload, file: torch.save({"state": payload}, file))


EVIL = "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}${7*7}<script>alert(1)</script>`id`$(id)"
EVIL += "\n---\nlicense: evil"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(CANARY) (w) file pop showpage\n"

TRAINS = ""
"""The expectation of a case that is sound: it trains."""

# What a case does to the place, and what `tgol train` says; `TRAINS` where it must train.
CASES = {
    # -- images --
    "image: empty file": (lambda p: p.image(b""), "row 3"),
    "image: text": (lambda p: p.image(b"not an image"), "row 3"),
    "image: PNG cut": (lambda p: p.image(encoded("PNG")[:60]), "row 3"),
    "image: PNG header alone": (lambda p: p.image(encoded("PNG")[:8]), "row 3"),
    "image: JPEG cut": (lambda p: p.image(encoded("JPEG", size=(64, 64))[:400]), "row 3"),
    "image: WEBP cut": (lambda p: p.image(encoded("WEBP", size=(64, 64), color=(9, 8, 7))[:40]), "row 3"),
    "image: GIF cut": (lambda p: p.image(encoded("GIF")[:20]), "row 3"),
    "image: TIFF cut": (lambda p: p.image(encoded("TIFF")[:200]), "row 3"),
    "image: PNG without pixels": (lambda p: p.image(png(32, 32)), "row 3"),
    "image: PNG of zero width": (lambda p: p.image(png(0, 32)), "row 3"),
    "image: PNG of 2^31 pixels": (lambda p: p.image(png(2**31 - 1, 1)), "row 3"),
    "image: decompression bomb": (lambda p: p.image(png(60000, 60000)), "row 3"),
    "image: PNG with a text bomb": (
        lambda p: p.image(
            encoded("PNG")[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2 * 10**8))) + encoded("PNG")[33:]
        ),
        "row 3",
    ),
    "image: SVG": (lambda p: p.image(SVG), "row 3"),
    "image: EPS that is called PNG": (lambda p: p.image(EPS), "row 3"),
    "image: PDF": (lambda p: p.image(b"%PDF-1.4\n1 0 obj<<>>endobj"), "row 3"),
    "image: HTML page of an error": (lambda p: p.image(b"<!DOCTYPE html><title>404</title>"), "row 3"),
    "image: pickle": (lambda p: p.image(pickle.dumps(Payload(p.canary))), "row 3"),
    "image: NumPy file with objects": (
        lambda p: p.image(b"\x93NUMPY\x01\x00" + pickle.dumps(Payload(p.canary))),
        "row 3",
    ),
    "image: ZIP": (lambda p: p.image(b"PK\x03\x04" + bytes(30)), "row 3"),
    "image: pointer of Git LFS": (
        lambda p: p.image(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "row 3",
    ),
    "image: WMF": (lambda p: p.image(b"\xd7\xcd\xc6\x9a" + bytes(60)), "row 3"),
    "image: PSD": (lambda p: p.image(b"8BPS\0\1" + bytes(60)), "row 3"),
    "image: FPX": (lambda p: p.image(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)), "row 3"),
    "image: MIC of nested streams": (lambda p: p.image(b"\xd0\xcf\x11\xe0" + bytes(2000), "3.mic"), "row 3"),
    "image: FIFO": (pipe, "row 3"),
    "image: socket": (sock, "row 3"),
    "image: device": (lambda p: linked(p, "/dev/zero"), "row 3"),
    "image: folder": (lambda p: (p.image(), (p.data / "3.png").mkdir()), "image file not found"),
    "image: link to itself": (lambda p: linked(p, "3.png"), "row 3"),
    "image: link to nothing": (lambda p: linked(p, "nothing"), "image file not found"),
    "image: link to a file of the system": (lambda p: linked(p, "/etc/passwd"), "row 3"),
    "image: not there": (lambda p: p.image(), "image file not found"),
    "good rows": (lambda p: None, TRAINS),
    "image: no name": (lambda p: p.row(file_name=None), "missing image"),
    "image: empty name": (lambda p: p.row(file_name=""), "missing image"),
    "image: name of a number": (lambda p: p.row(file_name=3), "values of several types"),
    "image: name of a list": (lambda p: p.row(file_name=["3.png"]), "values of several types"),
    "image: name with a null byte": (lambda p: p.row(file_name="3\0.png"), "row 3"),
    "image: name of 5000 letters": (lambda p: p.row(file_name="a" * 5000), "row 3"),
    "image: name above the folder": (lambda p: p.row(file_name="../../../../etc/passwd"), "image file not found"),
    "image: absolute name": (lambda p: p.row(file_name="/etc/passwd"), "row 3"),
    "image: file URL": (lambda p: p.row(file_name="file:///etc/passwd"), "row 3"),
    "image: URL that answers nothing": (lambda p: p.row(file_name="http://127.0.0.1:9/3.png"), "row 3"),
    "image: name of a chained protocol": (lambda p: p.row(file_name="zip://3.png::/etc/passwd"), "row 3"),
    "image: pattern as a name": (lambda p: p.row(file_name="*.png"), "image file not found"),
    "image: CMYK JPEG": (lambda p: p.image(encoded("JPEG", "CMYK"), "3.jpg"), TRAINS),
    "image: palette": (lambda p: p.image(encoded("PNG", "P")), TRAINS),
    "image: one bit": (lambda p: p.image(encoded("PNG", "1")), TRAINS),
    "image: 16 bit": (lambda p: p.image(encoded("PNG", "I;16")), TRAINS),
    "image: transparent": (lambda p: p.image(encoded("PNG", "RGBA")), TRAINS),
    "image: one pixel": (lambda p: p.image(encoded("PNG", size=(1, 1))), TRAINS),
    "image: 1 by 20000": (lambda p: p.image(encoded("PNG", size=(1, 20000))), TRAINS),
    "image: animation": (
        lambda p: p.image(encoded("GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")]), "3.gif"),
        TRAINS,
    ),
    "image: JPEG that is called PNG": (lambda p: p.image(encoded("JPEG")), TRAINS),
    "image: bytes behind the end": (lambda p: p.image(encoded("PNG") + b"\0" * 1000), TRAINS),
    "image: broken EXIF": (lambda p: p.image(encoded("JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 20), "3.jpg"), TRAINS),
    "image: broken profile": (lambda p: p.image(encoded("PNG", icc_profile=b"nonsense")), TRAINS),
    # -- scores --
    "score: NaN": (lambda p: p.row(score=math.nan), "NaN score.*row 3"),
    "score: infinite": (lambda p: p.row(score=math.inf), "infinite score.*row 3"),
    "score: missing": (lambda p: p.row(score=None), "row 3"),
    "score: no column": (lambda p: [row.pop("score") for row in p.rows], "no column 'score'"),
    "score: 1e300": (lambda p: scores(p, 1e300, 1.0), "weights that float32 cannot hold"),
    "score: 1e39": (lambda p: scores(p, 1e39, 1.0), "weights that float32 cannot hold"),
    "score: smallest of float64": (lambda p: scores(p, 5e-324, 0.0), TRAINS),
    "score: all equal": (lambda p: scores(p, 1.0), "All 8 scores equal"),
    "score: text": (lambda p: scores(p, "good", "bad"), "does not read as a number"),
    "score: numbers as text": (lambda p: scores(p, "1.5", "2.5"), "a cast mends it"),
    "score: list": (lambda p: scores(p, [1.0], [2.0]), "one number per row"),
    "score: object": (lambda p: scores(p, {"a": 1}, {"a": 2}), "one number per row"),
    "score: true and false": (lambda p: scores(p, True, False), TRAINS),
    "score: integer of 30 digits": (lambda p: scores(p, 10**29, 1), "the confidence weights"),
    "score: zscore of 1e300": (
        lambda p: (scores(p, 1e300, -1e300), p.flags.update(score_normalization="zscore")),
        TRAINS,
    ),
    "score: zscore of nearly equal": (
        lambda p: (scores(p, 1.0, 1.0 + 2**-52), p.flags.update(score_normalization="zscore")),
        "equal 1.0 up to rounding",
    ),
    "score: column named twice": (
        lambda p: p.table(p.lines().replace('"score"', '"score": 1, "score"')),
        "specified twice",
    ),
    # -- prompts --
    "prompt: missing": (lambda p: p.row(prompt=None), "row 3"),
    "prompt: empty": (lambda p: p.row(prompt=""), "row 3"),
    "prompt: blanks": (lambda p: p.row(prompt=" \t\n"), "row 3"),
    "prompt: number": (lambda p: column(p, "prompt", range(ROWS)), "must hold text"),
    "prompt: list": (lambda p: column(p, "prompt", [["a"]] * ROWS), "must hold text"),
    "prompt: null byte": (lambda p: p.row(prompt="a\0b"), TRAINS),
    "prompt: half a surrogate pair": (lambda p: p.row(prompt="a \ud800 b"), "surrogate pair"),
    "prompt: a megabyte": (lambda p: p.row(prompt="very " * 200_000), TRAINS),
    "prompt: every script": (lambda p: p.row(prompt="\u202e猫 العربية 🐈‍⬛ \u200b\ufeff"), TRAINS),
    "prompt: template, markup, shell": (
        lambda p: column(p, "prompt", [EVIL.replace("CANARY", str(p.canary))] * ROWS),
        TRAINS,
    ),
    "prompt: brackets of 50000": (lambda p: p.row(prompt="(" * 50_000), TRAINS),
    # -- tables --
    "table: empty": (lambda p: p.table(b""), "empty"),
    "table: line ends alone": (lambda p: p.table(b"\n\n\n"), "empty"),
    "table: byte order mark": (lambda p: p.table(b"\xef\xbb\xbf" + p.lines().encode()), TRAINS),
    "table: CRLF": (lambda p: p.table(p.lines().replace("\n", "\r\n")), TRAINS),
    "table: UTF-16": (lambda p: p.table(p.lines().encode("utf-16")), "UTF-16"),
    "table: latin-1": (
        lambda p: p.table(p.lines().replace(PROMPTS[3], "café").encode("latin-1") + b'{"prompt": "\xe9"}'),
        "not UTF-8",
    ),
    "table: no JSON": (lambda p: p.table("hello\n"), "could not be loaded"),
    "table: cut in a line": (lambda p: p.table(p.lines()[:-20]), "Missing a closing quotation mark"),
    "table: one array": (lambda p: p.table(json.dumps(p.rows)), TRAINS),
    "table: numbers": (lambda p: p.table("1\n2\n3\n"), "could not be loaded"),
    "table: NaN of Python": (lambda p: p.table(p.lines().replace("3.0", "NaN")), "NaN score.*row 3"),
    "table: a million brackets": (lambda p: p.table("[" * 1_000_000), "could not be loaded"),
    "table: integer of 5000 digits": (
        lambda p: p.table(p.lines().replace("3.0", "9" * 5000)),
        "infinite score.*row 3",
    ),
    "table: null bytes": (lambda p: p.table(bytes(1000)), "holds zero bytes"),
    "table: rows of other keys": (
        lambda p: p.table(p.lines() + '{"file_name": "3.png", "other": [1, {"a": 2}]}\n'),
        "row 8",
    ),
    "table: other types in a column": (lambda p: p.row(score="3,0"), "values of several types"),
    "table: no file_name": (lambda p: [row.pop("file_name") for row in p.rows], "no column 'image'"),
    "table: no rows for images": (lambda p: p.table(p.lines().split("\n")[0] + "\n"), "All 1 scores equal"),
    "table: two of them": (lambda p: (p.table(p.csv(), "metadata.csv"), p.table(p.lines())), TRAINS),
    "table: one image, two scores": (lambda p: p.row(file_name="2.png"), TRAINS),
    "csv: good": (lambda p: p.table(p.csv(), "metadata.csv"), TRAINS),
    "csv: semicolons": (lambda p: p.table(p.csv(";"), "metadata.csv"), TRAINS),
    "csv: tabs": (lambda p: p.table(p.csv("\t"), "metadata.csv"), TRAINS),
    "csv: decimal commas": (lambda p: p.table(p.csv(";").replace(".0\n", ",5\n"), "metadata.csv"), TRAINS),
    "csv: thousands": (lambda p: p.table(p.csv(";").replace(".0\n", ",000\n"), "metadata.csv"), TRAINS),
    "csv: open quote": (
        lambda p: p.table(p.csv().replace(PROMPTS[3], '"' + PROMPTS[3]), "metadata.csv"),
        "EOF inside string",
    ),
    "csv: more cells than columns": (
        lambda p: p.table(p.csv().replace("3.0", "3.0,9,9"), "metadata.csv"),
        "has 5 values, and the header names 3",
    ),
    "csv: header alone": (lambda p: p.table("file_name,prompt,score\n", "metadata.csv"), "has no rows"),
    "csv: column named twice": (
        lambda p: p.table(p.csv().replace("prompt,score", "score,score"), "metadata.csv"),
        "2 columns called 'score'",
    ),
    "csv: formula": (lambda p: p.table(p.csv().replace(PROMPTS[3], "=cmd|' /C calc'!A0"), "metadata.csv"), TRAINS),
    "csv: a cell of 10 MB": (
        lambda p: p.table(p.csv().replace(PROMPTS[3], "a" * 10**7), "metadata.csv"),
        "cannot be read beyond line",
    ),
    "parquet: good": (lambda p: parquet_of(p, lambda images: {}), TRAINS),
    "parquet: cut": (
        lambda p: (parquet_of(p, lambda images: {}), os.truncate(p.data / "train.parquet", 500)),
        "could not be loaded",
    ),
    "parquet: text": (
        lambda p: (parquet_of(p, lambda i: {}), (p.data / "train.parquet").write_text("no")),
        "could not be loaded",
    ),
    "parquet: images of text": (lambda p: parquet_of(p, lambda i: {"image": ["x"] * ROWS}), "image file not found"),
    "parquet: images of dates": (
        lambda p: parquet_of(p, lambda i: {"image": [datetime.date(2020, 1, 1)] * ROWS}),
        "must hold images",
    ),
    "parquet: images as bytes": (lambda p: parquet_of(p, lambda images: {"image": images}), TRAINS),
    "parquet: images of other structs": (
        lambda p: parquet_of(p, lambda i: {"image": [{"a": 1}] * ROWS}),
        "missing image",
    ),
    "parquet: paths out of the folder": (
        lambda p: parquet_of(p, lambda i: {"image": [{"bytes": None, "path": "/etc/passwd"}] * ROWS}),
        "row 0: '/etc/passwd'",
    ),
    "parquet: bytes and another path": (
        lambda p: parquet_of(p, lambda images: {"image": [{"bytes": i, "path": "/etc/passwd"} for i in images]}),
        TRAINS,
    ),
    "parquet: decimals": (
        lambda p: parquet_of(p, lambda i: {"score": pa.array(range(ROWS), pa.decimal128(5, 0))}),
        TRAINS,
    ),
    "parquet: float16": (
        lambda p: parquet_of(p, lambda i: {"score": pa.array(np.arange(ROWS, dtype=np.float16))}),
        TRAINS,
    ),
    "parquet: dates as scores": (
        lambda p: parquet_of(p, lambda i: {"score": [datetime.date(2020, 1, 1 + n) for n in range(ROWS)]}),
        "one number per row",
    ),
    "parquet: no rows": (
        lambda p: (
            parquet_of(p, lambda i: {}),
            parquet.write_table(parquet.read_table(p.data / "train.parquet")[:0], p.data / "train.parquet"),
        ),
        "has no rows",
    ),
    "parquet: features of a class that runs": (
        lambda p: (
            parquet_of(p, lambda i: {}),
            parquet.write_table(
                parquet.read_table(p.data / "train.parquet").replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": {"score": {"_type": "os.system"}}}})}
                ),
                p.data / "train.parquet",
            ),
        ),
        "could not be loaded",
    ),
    "folder: empty": (
        lambda p: ([f.unlink() for f in p.data.iterdir()], setattr(p, "written", True)),
        "holds no data",
    ),
    "folder: not there": (lambda p: p.flags.update(dataset_name=p.root / "nothing"), "is not a file or folder here"),
    "folder: a file of text": (
        lambda p: ((p.root / "rows.txt").write_text("a\n"), p.flags.update(dataset_name=p.root / "rows.txt")),
        "a kind that is not read",
    ),
    "folder: a loading script": (
        lambda p: (
            [f.unlink() for f in p.data.iterdir()],
            p.table(f"open({str(p.canary)!r}, 'w')\n", "data.py"),
        ),
        "holds no data",
    ),
    "folder: a script beside the rows": (
        lambda p: (p.data / "data.py").write_text(f"open({str(p.canary)!r}, 'w')"),
        TRAINS,
    ),
    "folder: a pickle": (
        lambda p: (
            [f.unlink() for f in p.data.iterdir()],
            p.table(pickle.dumps(Payload(p.canary)), "train.pkl"),
        ),
        "holds no data",
    ),
    "folder: a damaged save_to_disk": (
        lambda p: (p.table("{", "state.json"), p.table("{}", "dataset_info.json")),
        "could not be loaded",
    ),
    "archive: a bomb": (lambda p: archive_of(p, "zip", "0.png", bytes(10**8)), "holds no data"),
    "archive: names above the folder": (
        lambda p: archive_of(p, "tar", "../../escaped.png", encoded("PNG")),
        "missing prompt",
    ),
    "archive: cut": (
        lambda p: (archive_of(p, "tar", "9.txt", b"x"), os.truncate(p.data / "images.tar", 700)),
        "could not be loaded",
    ),
    # -- adapters --
    "adapter: text": (lambda p: adapter(p, b"hello"), "not a whole safetensors file"),
    "adapter: empty": (lambda p: adapter(p, b""), "not a whole safetensors file"),
    "adapter: not there": (lambda p: adapter(p, None), "holds none"),
    "adapter: a pickle": (pickled_adapter, "cannot be loaded"),
    "adapter: header of 2^60 bytes": (lambda p: adapter(p, header("{}", 2**60)), "not a whole safetensors file"),
    "adapter: header of no JSON": (lambda p: adapter(p, header("{{{")), "not a whole safetensors file"),
    "adapter: header alone": (lambda p: adapter(p, header("{}")), "no tensors"),
    "adapter: offsets beyond the end": (
        lambda p: adapter(p, header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}')),
        "not a whole safetensors file",
    ),
    "adapter: negative shape": (
        lambda p: adapter(p, header('{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}', data=bytes(16))),
        "not a whole safetensors file",
    ),
    "adapter: unknown dtype": (
        lambda p: adapter(p, header('{"a":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}', data=bytes(16))),
        "not a whole safetensors file",
    ),
    "adapter: tensors that overlap": (
        lambda p: adapter(
            p,
            header(
                '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
                data=bytes(16),
            ),
        ),
        "not a whole safetensors file",
    ),
    "adapter: shape of 2^40": (
        lambda p: adapter(
            p, header('{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,16]}}', data=bytes(16))
        ),
        "not a whole safetensors file",
    ),
    "adapter: cut": (lambda p: adapter(p, lambda good: good[:-100]), "not a whole safetensors file"),
    "adapter: NaN": (lambda p: adapter(p, lambda good: good[:-4] + struct.pack("<f", math.nan)), "NaN or infinite"),
    "adapter: metadata of no JSON": (
        lambda p: adapter(p, lambda good: remade(good, {"lora_adapter_metadata": "{{{"})),
        "cannot be loaded",
    ),
    "adapter: metadata of another type": (
        lambda p: adapter(p, lambda good: remade(good, {"lora_adapter_metadata": "[1, 2]"})),
        "cannot be loaded",
    ),
    "adapter: metadata with rank -1": (
        lambda p: adapter(p, lambda good: remade(good, {"lora_adapter_metadata": json.dumps({"unet.r": -1})})),
        "cannot be loaded",
    ),
    "adapter: metadata with a rank of text": (
        lambda p: adapter(p, lambda good: remade(good, {"lora_adapter_metadata": json.dumps({"unet.r": "x"})})),
        "cannot be loaded",
    ),
    "adapter: good": (lambda p: adapter(p, lambda good: good), TRAINS),
    # -- settings --
    "settings: Python's tags": (
        lambda p: config(p, f"beta: !!python/object/apply:builtins.open [{str(p.canary)!r}, w]\n"),
        "config",
    ),
    "settings: an alias of itself": (lambda p: config(p, "a: &a [*a]\n"), "takes no list"),
    "settings: a billion laughs": (
        lambda p: config(
            p,
            "a: &a [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"{c}: &{c} [{','.join(['*' + chr(ord(c) - 1)] * 9)}]\n" for c in "bcdefghi"),
        ),
        "takes no list",
    ),
    "settings: a key twice": (lambda p: config(p, "beta: 1\nbeta: 2\n"), "stands twice"),
    "settings: an unknown key": (lambda p: config(p, "betta: 1\n"), "betta"),
    "settings: a key that is a list": (lambda p: config(p, "? [a]\n: 1\n"), "unhashable"),
    "settings: a value of another type": (lambda p: config(p, "beta: {a: 1}\n"), "'beta' takes no dict"),
    "settings: null": (lambda p: config(p, "beta: null\n"), "'beta' takes no None"),
    "settings: a date": (lambda p: config(p, "beta: 2020-01-01\n"), "'beta' takes no date"),
    "settings: bytes": (lambda p: config(p, bytes(range(256))), "zero bytes"),
    "settings: syntax": (lambda p: config(p, "beta: [1,\n"), "line"),
    "settings: tab": (lambda p: config(p, "a:\n\t- b\n"), "Indent with blanks"),
    "settings: lora_r 0": (lambda p: p.flags.update(lora_r=0), "lora_r"),
    "settings: lora_r 10^9": (lambda p: p.flags.update(lora_r=10**9), "does not fit"),
    "settings: lora_alpha 0": (lambda p: p.flags.update(lora_alpha=0), "lora_alpha"),
    "settings: lora_alpha -1": (lambda p: p.flags.update(lora_alpha=-1), "lora_alpha"),
    "settings: modules that are not there": (
        lambda p: p.flags.update(lora_target_modules="nothing"),
        "does not fit the UNet",
    ),
    "settings: seed -1": (lambda p: p.flags.update(seed=-1), "seed"),
    "settings: seed 2^70": (lambda p: p.flags.update(seed=2**70), "seed"),
    "settings: batch 0": (lambda p: p.flags.update(per_device_train_batch_size=0), "per_device_train_batch_size"),
    "settings: batch -1": (lambda p: p.flags.update(per_device_train_batch_size=-1), "per_device_train_batch_size"),
    "settings: accumulation 0": (
        lambda p: p.flags.update(gradient_accumulation_steps=0),
        "gradient_accumulation_steps",
    ),
    "settings: learning rate -1": (lambda p: p.flags.update(learning_rate=-1), "learning_rate"),
    "settings: learning rate NaN": (lambda p: p.flags.update(learning_rate="nan"), "learning_rate"),
    "settings: learning rate infinite": (lambda p: p.flags.update(learning_rate="inf"), "learning_rate"),
    "settings: temperature 0": (lambda p: p.flags.update(temperature=0), "temperature"),
    "settings: beta NaN": (lambda p: p.flags.update(beta="nan"), "beta"),
    "settings: confidence -1": (lambda p: p.flags.update(confidence_scale=-1), "confidence_scale"),
    "settings: percentile 101": (lambda p: p.flags.update(threshold_percentile=101), "threshold_percentile"),
    "settings: threshold NaN": (lambda p: p.flags.update(threshold="nan"), "`threshold` must be finite"),
    "settings: resolution 0": (lambda p: p.flags.update(resolution=0), "resolution"),
    "settings: resolution of text": (lambda p: p.flags.update(resolution="big"), "resolution"),
    "settings: resolution 10^6": (lambda p: p.flags.update(resolution=10**6), "at most 16384"),
    "settings: max_steps 0": (lambda p: p.flags.update(max_steps=0), "max_steps"),
    "settings: epochs 0": (lambda p: p.flags.update(max_steps=-1, num_train_epochs=0), "num_train_epochs"),
    "settings: save_steps 0": (lambda p: p.flags.update(save_steps=0, save_strategy="steps"), "save_steps"),
    "settings: logging_steps 0": (lambda p: p.flags.update(logging_steps=0), "logging_steps"),
    "settings: warmup -1": (lambda p: p.flags.update(warmup_steps=-1), "warmup_steps"),
    "settings: workers -1": (lambda p: p.flags.update(dataloader_num_workers=-1), "dataloader_num_workers"),
    "settings: unknown optimizer": (lambda p: p.flags.update(optim="adan"), "--optim: invalid"),
    "settings: unknown scheduler": (
        lambda p: p.flags.update(lr_scheduler_type="step"),
        "lr_scheduler_type.*invalid choice",
    ),
    "settings: unknown tracker": (lambda p: p.flags.update(report_to="nothing"), "report_to"),
    "settings: weight decay NaN": (lambda p: p.flags.update(weight_decay="nan"), "weight_decay"),
    "settings: Adam's beta 2": (lambda p: p.flags.update(adam_beta2=2), "adam_beta2"),
    "settings: clipping at NaN": (lambda p: p.flags.update(max_grad_norm="nan"), "max_grad_norm"),
    "settings: fp16 on a CPU": (lambda p: p.flags.update(fp16="true"), "fp16"),
    "settings: output that is a file": (
        lambda p: ((p.root / "run").write_text("x"), None),
        "run",
    ),
    "settings: output below a file": (
        lambda p: ((p.root / "file").write_text("x"), p.flags.update(output_dir=p.root / "file" / "run")),
        "is a file",
    ),
    "settings: output of 300 letters": (
        lambda p: p.flags.update(output_dir=p.root / ("a" * 300)),
        "File name too long",
    ),
    "settings: resume at a first start": (lambda p: p.flags.update(resume_from_checkpoint="true"), TRAINS),
    "settings: resume at nothing": (
        lambda p: p.flags.update(resume_from_checkpoint=p.root / "no"),
        "there is no such folder",
    ),
    "settings: column that is not there": (lambda p: p.flags.update(score_column="rating"), "rating"),
    "settings: one column for two": (lambda p: p.flags.update(score_column="prompt"), "three different ones"),
    "model: not there": (lambda p: p.flags.update(model_name_or_path=p.root / "no"), "does not exist"),
    "model: an empty folder": (
        lambda p: ((p.root / "model").mkdir(), p.flags.update(model_name_or_path=p.root / "model")),
        "holds no model_index.json",
    ),
    "model: an index of no JSON": (
        lambda p: (
            (p.root / "model").mkdir(),
            (p.root / "model" / "model_index.json").write_text("{"),
            p.flags.update(model_name_or_path=p.root / "model"),
        ),
        "is not JSON",
    ),
    "model: an index with a class of its own": (
        lambda p: (
            (p.root / "model").mkdir(),
            (p.root / "model" / "pipeline.py").write_text(f"open({str(p.canary)!r}, 'w')"),
            (p.root / "model" / "model_index.json").write_text(
                json.dumps({"_class_name": ["pipeline", "Evil"], "unet": ["os", "system"]})
            ),
            p.flags.update(model_name_or_path=p.root / "model"),
        ),
        "contains custom code",
    ),
    "model: a pickle": (
        lambda p: (
            (p.root / "model.ckpt").write_bytes(pickle.dumps(Payload(p.canary))),
            p.flags.update(model_name_or_path=p.root / "model.ckpt"),
        ),
        "holds no model_index.json",
    ),
    # -- checkpoints --
    "checkpoint: optimizer that runs": (poisoned_torch("optimizer.pt"), "could run code"),
    "checkpoint: optimizer of a bare pickle": (poisoned("optimizer.pt"), "could run code"),
    "checkpoint: scheduler that runs": (poisoned_torch("scheduler.pt"), "could run code"),
    "checkpoint: random state that runs": (poisoned_torch("rng_state.pth"), "could run code"),
    "checkpoint: state of no JSON": (
        lambda p: checkpoint(p, lambda f: (f / "trainer_state.json").write_text("{")),
        "trainer_state.json has 1 bytes",
    ),
    "checkpoint: state of another type": (
        lambda p: checkpoint(p, lambda f: (f / "trainer_state.json").write_text("[]")),
        "trainer_state.json has 2 bytes",
    ),
    "checkpoint: settings of no JSON": (
        lambda p: checkpoint(p, lambda f: (f / "tgol_state.json").write_text("{")),
        "tgol_state.json has 1 bytes",
    ),
    "checkpoint: manifest of no JSON": (
        lambda p: checkpoint(p, lambda f: (f / "checkpoint.json").write_text("{")),
        "checkpoint.json cannot be read",
    ),
    "checkpoint: weights cut": (
        lambda p: checkpoint(p, lambda f: os.truncate(f / WEIGHTS, 999)),
        "has 999 bytes instead of",
    ),
    "checkpoint: good": (lambda p: checkpoint(p, lambda folder: None), TRAINS),
}


def remade(content, metadata):
    return save(load(content), metadata=metadata)


# ---- What may not happen ----

_state = {"on": False, "hooked": False}
STARTED = []
"""Programs that a case started."""


def _watch(event, arguments):
    if _state["on"] and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        STARTED.append((event, arguments[0]))


@contextmanager
def watched():
    if not _state["hooked"]:
        sys.addaudithook(_watch)
        _state["hooked"] = True

    STARTED.clear()
    _state["on"] = True
    try:
        with that_ends(SECONDS):
            yield
    finally:
        _state["on"] = False


QUICK = ("a billion laughs", "a key twice", "a value of another type", "null", "a date", "output of 300 letters")
"""Cases that are told before a model is loaded."""


@pytest.mark.parametrize("name", quick(list(CASES), *(f"settings: {case}" for case in QUICK)))
def test_hostile_input_trains_or_ends_in_one_message_that_names_it(name, tmp_path, capsys):
    """Any other exception than the exit of the command is a traceback to the user, and fails here."""
    spoil, expected = CASES[name]
    place = Place(tmp_path)
    spoil(place)
    arguments = place.arguments()
    capsys.readouterr()
    with watched():
        try:
            code, message = main(arguments), ""
        except SystemExit as end:
            code, message = (1, end.code) if isinstance(end.code, str) else (end.code, "")
    said = capsys.readouterr().err + message
    assert not place.canary.exists() and not STARTED
    assert not (tmp_path / "escaped.png").exists()
    if expected == TRAINS:
        assert code == 0, said
        weights = load_file(place.root / "run" / WEIGHTS)
        assert all(torch.isfinite(value).all() for value in weights.values())
        return
    assert code in (1, 2), said
    assert re.search(expected or "$^", said, re.DOTALL), said
    assert not (place.root / "run" / WEIGHTS).exists() or name.startswith("checkpoint")
