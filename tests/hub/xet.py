"""The content-addressed storage that `hf_xet` speaks to: xorbs of compressed chunks, shards that say what files are.

Formats as the client writes them (measured, hf_xet 1.8.0): a xorb is chunks one behind the other, each with a header
of 8 bytes; a shard is records of 48 bytes, of which a file has one header, its terms, and a record with its SHA-256.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

HASH = 32
RECORD = 48
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30


def hash_text(raw: bytes) -> str:
    """How xet writes a hash: four little-endian words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _block(data: bytes, out: bytearray) -> None:
    """Decompress one LZ4 block onto `out`."""
    at = 0
    while at < len(data):
        token, at = data[at], at + 1
        length, at = _length(data, at, token >> 4)
        out += data[at : at + length]
        at += length
        if at >= len(data):
            return
        start, at = len(out) - struct.unpack_from("<H", data, at)[0], at + 2
        length, at = _length(data, at, token & 15)
        for index in range(start, start + length + 4):  # may overlap what it writes
            out.append(out[index])


def _length(data: bytes, at: int, value: int) -> tuple[int, int]:
    if value < 15:
        return value, at
    while True:
        more, at = data[at], at + 1
        value += more
        if more != 255:
            return value, at


def unlz4(data: bytes) -> bytes:
    """Decompress an LZ4 frame."""
    magic, flags = struct.unpack_from("<IB", data)
    if magic != 0x184D2204:
        raise ValueError("no LZ4 frame")
    at = 7 + (8 if flags & 0x08 else 0) + (4 if flags & 0x01 else 0)
    out = bytearray()
    while True:
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size == 0:
            return bytes(out)
        block = data[at : at + (size & 0x7FFFFFFF)]
        if size >> 31:
            out += block
        else:
            _block(block, out)
        at += len(block) + (4 if flags & 0x10 else 0)


def ungroup(data: bytes) -> bytes:
    """Undo the grouping of every fourth byte."""
    out, at = bytearray(len(data)), 0
    for first in range(4):
        count = len(range(first, len(data), 4))
        out[first::4] = data[at : at + count]
        at += count
    return bytes(out)


def chunks(xorb: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield where each chunk of a xorb begins and ends, and what it holds."""
    at = 0
    while at + 8 <= len(xorb) and xorb[at : at + 7] != b"XETBLOB":
        packed, scheme = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        size, end = int.from_bytes(xorb[at + 5 : at + 8], "little"), at + 8 + packed
        data = xorb[at + 8 : end]
        content = data if scheme == 0 else unlz4(data) if scheme == 1 else ungroup(unlz4(data))
        if scheme > 2 or len(content) != size:
            raise ValueError(f"chunk at {at}: scheme {scheme}, {len(content)} bytes for {size}")
        yield at, end, content
        at = end


@dataclass(frozen=True)
class Term:
    """A run of chunks of one xorb."""

    xorb: str
    start: int
    end: int
    size: int


def files_of_shard(shard: bytes) -> Iterator[tuple[str, str, list[Term]]]:
    """Yield hash, SHA-256 and terms of every file that a shard describes."""
    at = RECORD  # behind the shard's own header
    while shard[at : at + HASH] != b"\xff" * HASH:
        name = hash_text(shard[at : at + HASH])
        flags, count = struct.unpack_from("<II", shard, at + HASH)
        at += RECORD
        terms = []
        for _ in range(count):
            _, size, start, end = struct.unpack_from("<4I", shard, at + HASH)
            terms.append(Term(hash_text(shard[at : at + HASH]), start, end, size))
            at += RECORD
        if flags & WITH_VERIFICATION:
            at += RECORD * count
        if not flags & WITH_METADATA:
            raise ValueError("a file without its SHA-256")
        yield name, hash_text(shard[at : at + HASH]), terms
        at += RECORD


class ContentStore:
    """Xorbs and files of xet."""

    def __init__(self) -> None:
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Term]] = {}

    def add_shard(self, shard: bytes) -> list[tuple[str, str, bytes]]:
        """Register the files of a shard; returns hash, SHA-256 and content of each."""
        found = []
        for name, sha256, terms in files_of_shard(shard):
            self.files[name] = terms
            found.append((name, sha256, b"".join(self._content(term) for term in terms)))
        return found

    def _content(self, term: Term) -> bytes:
        return b"".join([part for _, _, part in chunks(self.xorbs[term.xorb])][term.start : term.end])

    def reconstruction(self, name: str, first: int, last: int | None, url: str) -> dict[str, object] | None:
        """Say where the bytes `first` to `last` (inclusive) of a file lie; None where it has none."""
        position, offset, terms = 0, 0, []
        fetch: dict[str, list[dict[str, object]]] = {}
        for term in self.files[name]:
            begin, position = position, position + term.size
            if position <= first or (last is not None and begin > last):
                continue
            if not terms:
                offset = first - begin
            where = {"start": term.start, "end": term.end}
            terms.append({"hash": term.xorb, "unpacked_length": term.size, "range": where})
            edges = [(start, end) for start, end, _ in chunks(self.xorbs[term.xorb])]
            bytes_ = {"start": edges[term.start][0], "end": edges[term.end - 1][1] - 1}
            fetch.setdefault(term.xorb, []).append(
                {"range": where, "url": f"{url}/xorbs/{term.xorb}?signature=loopback", "url_range": bytes_}
            )
        if not terms:
            return None
        return {"offset_into_first_range": offset, "terms": terms, "fetch_info": fetch}
