"""Find, read and load the published weights of reward models, and refuse files that do not fit exactly."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

_SHOWN = 5
_WITHOUT_NETWORK = (
    "Where there is no network, pass the path of a downloaded {what} (`{argument}=`; `tgol score` takes it in "
    "`--reward_options`)."
)

Module = TypeVar("Module", bound=torch.nn.Module)


def find_file(
    source: str | Path, filename: str, *, revision: str | None = None, argument: str = "source"
) -> tuple[Path, str | None]:
    """
    Return a file, on this machine or downloaded from the Hugging Face Hub, and its commit (`None` for a local file).

    `source` is the file itself, a folder that holds `filename`, or a Hub repository `owner/name` (at `revision`).
    Messages call it `argument`.

    Raises:
        FileNotFoundError: if the folder does not hold the file.
        ValueError: if `source` is neither an existing path nor the name of a repository.
        OSError: if the Hub cannot give the file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path, None
    if path.is_dir():
        if not (path / filename).is_file():
            inside = ", ".join(sorted(file.name for file in path.iterdir())[:_SHOWN])
            raise FileNotFoundError(f"The folder {path} has no file {filename}; it holds {inside or 'nothing'}.")
        return path / filename, None
    try:
        found = hf_hub_download(str(source), filename, revision=revision)
    except HFValidationError as error:
        raise ValueError(
            f"{str(source)!r} is not an existing file or folder, and not a Hub repository owner/name."
        ) from error
    except OSError as error:
        raise OSError(
            f"The file {filename} of {source} could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {error}). " + _WITHOUT_NETWORK.format(what="file or folder", argument=argument)
        ) from error
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", found)
    return Path(found), commit[1] if commit else revision


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Read named tensors, on the CPU and in the dtypes of the file, without running code from the file.

    The content decides whether it is safetensors or a pickle of `torch.save`, whose weights may be under `state_dict`.

    Raises:
        ValueError: if the file is a Git-LFS pointer, a web page, damaged, a pickle that can only be read by running
            code, or holds something other than named tensors.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git-LFS pointer, not the weights: fetch the file itself (`git lfs pull`).")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not weights: download the file itself (`hf download`).")
    try:
        read = load_file(path) if head[8:9] == b"{" else torch.load(path, weights_only=True, map_location="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}. Download it again.") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was not read: it is damaged, or it is a pickle that can only be read by running code that is "
            "inside."
        ) from error
    except Exception as error:  # of any type: the bytes of a damaged pickle are read as anything
        raise ValueError(
            f"{path} is damaged or not a file of weights ({type(error).__name__}: {error}). Download it again."
        ) from error
    if isinstance(read, Mapping) and isinstance(read.get("state_dict"), Mapping):
        read = read["state_dict"]
    if not isinstance(read, Mapping):
        raise ValueError(f"{path} holds {type(read).__name__}, not named weights.")
    wrong = [key for key, value in read.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if wrong or not read:
        raise ValueError(f"{path} holds more than named tensors, or none: {_few(map(repr, wrong))}.")
    return dict(read)


def build(make: Callable[[], Module], weights: Mapping[str, torch.Tensor], source: str | Path) -> Module:
    """
    Make a module and load weights into it, or raise a `ValueError` if one is missing, left over or of another shape.

    The module is made on the meta device, so that the weights are held only once, in the dtypes of the file. Messages
    name the `source` of the weights.
    """
    with torch.device("meta"):
        module = make()
    expected = module.state_dict()
    shapes = [
        (name, tuple(weights[name].shape), tuple(tensor.shape))
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    _refuse(source, expected.keys() - weights.keys(), weights.keys() - expected.keys(), shapes)
    module.load_state_dict(dict(weights), strict=True, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise ValueError(f"{source}: the buffer {name} is not part of the weights and not known here.")
            setattr(module.get_submodule(parent), leaf, torch.arange(buffer.shape[-1]).expand(1, -1))
    return module


def load_part(kind: Any, source: str, *, argument: str = "source", **options: Any) -> Any:
    """
    Call `kind.from_pretrained(source, **options)` of a class of transformers.

    Raises:
        ValueError: if a file cannot be read, or holds something else.
        OSError: if the files cannot be found or downloaded. The message says that `argument` takes a folder instead.
    """
    folder = Path(source).expanduser()
    try:
        return kind.from_pretrained(str(folder) if folder.is_dir() else source, **options)
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The weights of {source} were not read: the file is damaged, a Git-LFS pointer (`git lfs pull`), or a "
            "pickle that would run code. Download it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{kind.__name__} of {source} cannot be loaded: {_first_line(error)}") from error
    except OSError as error:
        raise OSError(
            f"{kind.__name__} of {source} could not be loaded, here or from the Hugging Face Hub: "
            f"{_first_line(error)} " + _WITHOUT_NETWORK.format(what="folder", argument=argument)
        ) from error


def load_tokenizer(
    kind: Any, source: str | Path, sizes: Sequence[int], argument: str = "tokenizer", **options: Any
) -> Any:
    """
    Load a tokenizer by [`load_part`], and raise a `ValueError` unless its number of tokens is one of `sizes`.

    Without its files transformers makes an empty tokenizer instead of an error; its scores would know no words.
    """
    tokenizer = load_part(kind, str(source), argument=argument, **options)
    if len(tokenizer) not in sizes:
        raise ValueError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, the weights are for "
            f"{' or '.join(map(str, sizes))}: it belongs to another model, or its files could not be loaded, here or "
            "from the Hugging Face Hub. " + _WITHOUT_NETWORK.format(what="folder", argument=argument)
        )
    return tokenizer


def load_model(model_class: Any, source: str, *, unused: str = "", **options: Any) -> Any:
    """
    Load a model by [`load_part`], or raise a `ValueError` if the file does not hold exactly its weights.

    Transformers only warns. The file may also hold names that match the pattern `unused`, such as those of the other
    tower.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # hides a table of missing and left-over weights; `_refuse` raises instead
    try:
        model, found = load_part(
            model_class, source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    extra = [name for name in found["unexpected_keys"] if not (unused and re.match(unused, name))]
    shapes = [(name, tuple(shape), tuple(wanted)) for name, shape, wanted in sorted(found["mismatched_keys"])]
    _refuse(source, found["missing_keys"], extra, shapes)
    return model


def _refuse(
    source: str | Path,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise a `ValueError` unless all are empty; `shapes` holds names with the shape found and the shape wanted."""
    kinds = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": [f"{name} {shape} instead of {wanted}" for name, shape, wanted in shapes],
    }
    wrong = [f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds.items() if names]
    if wrong:
        raise ValueError(f"{source} does not hold the weights of this reward: {'; '.join(wrong)}.")


def linear_head(width: int) -> torch.nn.Sequential:
    """
    Return the head of ImageReward and of the LAION aesthetic predictor for features of a width, in fp32.

    Its linear layers, with no activation between, are at 0, 2, 4, 6 and 7, as in the published weights.
    """
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    first = [linear(width, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)]
    return torch.nn.Sequential(*first, linear(64, 16), linear(16, 1))


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
