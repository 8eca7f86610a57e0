"""Keep tensors by key in safetensors files that are written whole and read through a memory map."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tgol_trainer._files import write_file

logger = logging.getLogger(__name__)

_KEYS, _ENDS, _LENGTHS = "keys", ".ends", ".lengths"


def key_of(*parts: str | int) -> bytes:
    """Return a 16-byte key of its parts; other parts, or the same in another order, give another key."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def keys_of(texts: Sequence[str]) -> np.ndarray:
    """Return the keys of N texts, (N, 2) uint64."""
    return np.frombuffer(bytearray(b"".join(map(key_of, texts))), dtype=np.uint64).reshape(-1, 2)


class TensorStore:
    """
    Tensors by 16-byte keys. A file holds many entries whose tensors have equal shapes, but for the first dimension of
    a ragged store.

    Files appear whole. A file that cannot be read is removed and its entries count as missing, so an interrupted job
    continues where it was. Tensors keep their dtype, bfloat16 included.

    Args:
        folder (`Path`):
            Folder of the files; made where missing.
        ragged (`bool`, *optional*, defaults to `False`):
            Tensors are (L, ...), each with an L of its own. Zero rows at the end are not stored; reading gives all L
            rows back.
    """

    def __init__(self, folder: Path, ragged: bool = False) -> None:
        self.folder, self.ragged = Path(folder), ragged
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"The cache folder {self.folder} cannot be made: {error}. Set `cache_dir` to a folder that you may "
                "write to, or `cache=False` to encode at each step."
            ) from error
        self._maps: dict[int, Any] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # each process opens its own

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Look for the files that there are, those of other processes among them."""
        files, keys = [], []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as opened:
                    keys.append(opened.get_tensor(_KEYS).numpy().view(np.uint64))
                files.append(path)
            except SafetensorError as error:
                logger.warning("%s cannot be read (%s) and is written anew.", path, error)
                path.unlink(missing_ok=True)
            except FileNotFoundError:  # another run removed it
                continue
        joined = np.concatenate([np.empty((0, 2), np.uint64), *keys])
        file = np.repeat(np.arange(len(keys), dtype=np.int32), [len(part) for part in keys])
        row = np.concatenate([np.empty(0, np.int32), *(np.arange(len(part), dtype=np.int32) for part in keys)])
        order = np.lexsort((joined[:, 1], joined[:, 0]))
        self._files, self._maps = files, {}
        self._keys, self._file, self._row = joined[order], file[order], row[order]

    def bytes_of(self, entry: Mapping[str, torch.Tensor | list[torch.Tensor]]) -> int:
        """Return the bytes that an entry, the first of each name, takes in a file."""
        kept = [value[0][: _used_rows(value[0])] if self.ragged else value[0] for value in entry.values()]
        return sum(value.numel() * value.element_size() for value in kept)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the (M,) int64 places of (M, 2) uint64 keys, -1 for those that are missing."""
        start = np.searchsorted(self._keys[:, 0], keys[:, 0])
        places = np.full(len(keys), -1, dtype=np.int64)
        open_ = np.arange(len(keys))
        while open_.size:  # keys that share their first half stand side by side
            open_ = open_[start[open_] < len(self._keys)]
            found = self._keys[start[open_]]
            open_, found = open_[same := found[:, 0] == keys[open_, 0]], found[same]
            hit = found[:, 1] == keys[open_, 1]
            places[open_[hit]] = start[open_[hit]]
            open_ = open_[~hit]
            start[open_] += 1
        return places

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Return which of (M, 2) uint64 keys have no entry, (M,) bool."""
        return self.find(keys) < 0

    def write(self, keys: np.ndarray, entries: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """
        Write one file of new entries; [`refresh`] makes them readable.

        Args:
            keys (`numpy.ndarray`): (M, 2) uint64.
            entries (`Sequence[Mapping[str, torch.Tensor]]`): M entries on the CPU, with equal names and shapes.
        """
        stored = {_KEYS: torch.from_numpy(keys.view(np.int64))}
        for name in entries[0]:
            tensors = [entry[name] for entry in entries]
            if self.ragged:
                used = [_used_rows(tensor) for tensor in tensors]
                stored[name + _ENDS] = torch.tensor([0, *np.cumsum(used).tolist()])
                stored[name + _LENGTHS] = torch.tensor([len(tensor) for tensor in tensors])
                stored[name] = torch.cat([tensor[:rows] for tensor, rows in zip(tensors, used, strict=True)])
            else:
                stored[name] = torch.stack(tensors)
        name = hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()  # two processes may write equal entries
        write_file(self.folder / f"{name}.safetensors", save({k: v.contiguous() for k, v in stored.items()}))

    def read(self, keys: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the tensors of entries as [`read_rows`] does, stacked: name to (M, ...)."""
        return {name: torch.stack(tensors) for name, tensors in self.read_rows(keys).items()}

    def read_rows(self, keys: np.ndarray) -> dict[str, list[torch.Tensor]]:
        """
        Return the tensors of entries: name to M tensors, on the CPU.

        Args:
            keys (`numpy.ndarray`): (M, 2) uint64.

        Raises:
            KeyError: for a key without an entry.
        """
        places = self.find(keys)
        if (places < 0).any():
            raise KeyError(f"{int((places < 0).sum())} of {len(keys)} entries are not in {self.folder}.")
        rows = [self._read_one(int(self._file[place]), int(self._row[place])) for place in places]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _read_one(self, file: int, row: int) -> dict[str, torch.Tensor]:
        mapped = self._maps.get(file)
        if mapped is None:
            with safe_open(self._files[file], "pt") as opened:
                names = [name for name in opened.keys() if name != _KEYS]  # noqa: SIM118 - not a mapping
                mapped = self._maps[file] = {name: opened.get_tensor(name) for name in names}
        if not self.ragged:
            return {name: tensor[row] for name, tensor in mapped.items()}
        found = {}
        for name in [name for name in mapped if not name.endswith((_ENDS, _LENGTHS))]:
            start, end = mapped[name + _ENDS][row : row + 2].tolist()
            used, length = mapped[name][start:end], int(mapped[name + _LENGTHS][row])
            found[name] = torch.cat([used, used.new_zeros(length - len(used), *used.shape[1:])])
        return found


def _used_rows(tensor: torch.Tensor) -> int:
    """Return the number of rows up to the last one that is not zero."""
    used = tensor.reshape(len(tensor), -1).ne(0).any(dim=1).nonzero()
    return int(used[-1]) + 1 if len(used) else 0
