"""Weights of reward models as their authors published them: found, read and loaded with nothing left over."""

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

Module = TypeVar("Module", bound=torch.nn.Module)


def find_file(
    source: str | Path, filename: str, *, revision: str | None = None, argument: str = "source"
) -> tuple[Path, str | None]:
    """
    Find a file of weights: on this machine, or on the Hugging Face Hub.

    Args:
        source (`str` or `Path`):
            The file itself, a folder that holds `filename`, or a Hub repository `owner/name`.
        filename (`str`):
            Name in the folder or the repository.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository; its default branch otherwise. Not used for local files.
        argument (`str`, *optional*, defaults to `"source"`):
            Name of the argument that `source` comes from, for messages.

    Returns:
        `tuple[Path, str | None]`: the file, and the commit it belongs to; `None` for a local file.

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
            f"{str(source)!r} is no existing file or folder, and no Hub repository owner/name."
        ) from error
    except OSError as error:
        raise OSError(
            f"The file {filename} of {source} could not be had from the Hugging Face Hub "
            f"({type(error).__name__}: {error}). Where there is no network, pass the path of a downloaded file or "
            f"folder (`{argument}=`; `tgol score` takes it in `--reward_options`)."
        ) from error
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", found)
    return Path(found), commit[1] if commit else revision


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Read a file of weights without running code from it: safetensors, or a pickle restricted to tensors.

    Args:
        path (`str` or `Path`):
            A `.safetensors` file or one written by `torch.save`, told apart by content. Weights under a key
            `state_dict` are taken out.

    Returns:
        `dict[str, torch.Tensor]`: on the CPU, in the dtypes of the file.

    Raises:
        ValueError: if the file is a Git-LFS pointer, a web page, damaged, a pickle that needs code to be read, or
            holds something other than named tensors.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git-LFS pointer, not the weights: fetch the file itself (`git lfs pull`).")
    if head.lstrip()[:1] == b"<":
        raise ValueError(f"{path} is a web page, not weights: download the file itself (`hf download`).")
    if head[8:9] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors: {error}. Download it again.") from error
    try:
        read = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no plain file of weights: to read it means to run code that is inside, or it is damaged. "
            "It was not read."
        ) from error
    except Exception as error:  # of any type: the bytes of a damaged pickle are read as anything
        raise ValueError(
            f"{path} is damaged or no file of weights ({type(error).__name__}: {error}). Download it again."
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
    Make a module and load weights into it, all of them and no others.

    The module is made without memory of its own, so that the weights are held once, in the dtypes of the file.

    Args:
        make (`Callable`):
            Returns the module.
        weights (`Mapping[str, torch.Tensor]`):
            By the names of the module's `state_dict()`.
        source (`str` or `Path`):
            Where the weights come from, for messages.

    Returns:
        `torch.nn.Module`: what `make` returned, loaded.

    Raises:
        ValueError: if a weight is missing, left over, or of another shape.
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


def from_pretrained(kind: Any, source: str, *, argument: str = "source", **options: Any) -> Any:
    """
    Load a part of a reward in the format of transformers, or say which part failed and what can be passed instead.

    Args:
        kind (`type`):
            Class with `from_pretrained`.
        source (`str`):
            Hub repository or folder.
        argument (`str`, *optional*, defaults to `"source"`):
            Name of the argument that `source` comes from, for messages.
        options:
            Passed to `from_pretrained`.

    Returns:
        `Any`: what `kind.from_pretrained` returns.

    Raises:
        ValueError: if the file of weights is damaged, a Git-LFS pointer, or a pickle that needs code to be read, or a
            file holds something else.
        OSError: if the files cannot be had.
    """
    folder = Path(source).expanduser()
    try:
        return kind.from_pretrained(str(folder) if folder.is_dir() else source, **options)
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The weights of {source} were not read: the file is damaged, a Git-LFS pointer (`git lfs pull`), or a "
            "pickle that means to run code. Download it again."
        ) from error
    except ValueError as error:
        raise ValueError(f"{kind.__name__} of {source} cannot be loaded: {_first_line(error)}") from error
    except OSError as error:
        raise OSError(
            f"{kind.__name__} of {source} could not be had, here or from the Hugging Face Hub: {_first_line(error)} "
            f"Where there is no network, pass the path of a downloaded folder (`{argument}=`; `tgol score` takes it "
            "in `--reward_options`)."
        ) from error


def load_tokenizer(kind: Any, source: str | Path, sizes: Sequence[int], **options: Any) -> Any:
    """
    Load a tokenizer and refuse one that does not fit the weights.

    Without its files transformers makes an empty tokenizer instead of an error; its scores would know no words.

    Args:
        kind (`type`):
            Class of the tokenizer.
        source (`str` or `Path`):
            Hub repository or folder.
        sizes (`Sequence[int]`):
            Numbers of tokens that fit.
        options:
            Passed to [`from_pretrained`], with `argument="tokenizer"` by default.

    Returns:
        `transformers.PreTrainedTokenizerBase`

    Raises:
        ValueError: if it has another number of tokens.
        OSError: if it cannot be had.
    """
    tokenizer = from_pretrained(kind, str(source), **{"argument": "tokenizer", **options})
    if len(tokenizer) not in sizes:
        argument = options.get("argument", "tokenizer")
        raise ValueError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, the weights are for "
            f"{' or '.join(map(str, sizes))}: it is another model's, or its files could not be had, here or from the "
            "Hugging Face Hub. Where there is no network, pass the path of a folder with them "
            f"(`{argument}=`; `tgol score` takes it in `--reward_options`)."
        )
    return tokenizer


def load_strictly(model_class: Any, source: str, *, unused: str = "", **options: Any) -> Any:
    """
    Load a model of transformers and refuse a file that does not hold exactly its weights, where transformers warns.

    Args:
        model_class (`type`):
            Class with `from_pretrained`.
        source (`str`):
            Hub repository or folder.
        unused (`str`, *optional*, defaults to `""`):
            Pattern of names that the file may hold beside, such as those of the other tower.
        options:
            Passed to [`from_pretrained`].

    Returns:
        `transformers.PreTrainedModel`

    Raises:
        ValueError: if a weight is missing, left over or of another shape, or the file cannot be read.
        OSError: if the model cannot be had.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of what is missing or left over: the towers that are not used
    try:
        model, found = from_pretrained(
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
    """Raise a `ValueError` unless all are empty; `shapes` are names with what is there and what should be."""
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
    Return the head of ImageReward and of the LAION aesthetic predictor: five linear layers, no activation between.

    Args:
        width (`int`):
            Length of a feature.

    Returns:
        `torch.nn.Sequential`: with linear layers at 0, 2, 4, 6 and 7, as in the published weights; in fp32.
    """
    linear, dropout = torch.nn.Linear, torch.nn.Dropout
    return torch.nn.Sequential(
        linear(width, 1024),
        dropout(0.2),
        linear(1024, 128),
        dropout(0.2),
        linear(128, 64),
        dropout(0.1),
        linear(64, 16),
        linear(16, 1),
    )


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
