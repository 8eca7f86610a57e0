"""Load a dataset from the Hub, a saved dataset, a folder of images or videos, or a table."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetsError
from pyarrow.dataset import ParquetFragmentScanOptions

from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer.data.images import DataError
from tgol_trainer.data.parquet import ParquetColumns
from tgol_trainer.data.rows import DEFAULT_COLUMNS, Columns

from .archives import unpacked
from .filling import fill, lacking
from .folders import file_names, rows_of_split, tell_of_copies, tell_of_files, words_of
from .image_folder import files_below, load_image_folder
from .paths import AnyDataset, resolve_files
from .ratings import JOURNAL, is_rated, load_rated
from .shards import incomplete
from .tables import check_table, csv_options, is_empty_parquet
from .webdataset import flattened

logger = logging.getLogger(__name__)


_BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, TypeError, KeyError, EOFError, DatasetsError),
    *(pa.ArrowException, tarfile.TarError, zlib.error),
)
"""What readers of broken files raise."""


def load_scored_dataset(
    source: str,
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    columns: Columns = DEFAULT_COLUMNS,
    folder_scores: bool = False,
) -> AnyDataset:
    """
    Load a dataset of prompts, images or videos, and scores. Rows are not checked here, see [`prepare_dataset`].

    Args:
        source (`str`):
            A Hub id `"owner/name"`; a folder written by `Dataset.save_to_disk` or by `tgol rate`; a folder of images
            or videos with `metadata.jsonl` or `metadata.csv`, whose `file_name` column names the files; a folder of
            images or videos alone, whose prompts and scores are read as docs/data.md says; a folder of
            Parquet, JSON Lines or CSV files, or of WebDataset tars, whose JSON fields become columns such as
            `json.prompt`; one such file; or a zip file of such a folder. Paths in a table count from the folder of
            the table.
        name (`str`, *optional*): Configuration of a dataset that has several.
        split (`str`, *optional*, defaults to `"train"`):
            Split, or a slice such as `"train[:1000]"` where `datasets` allows it. A single file is one split, whatever
            its name.
        streaming (`bool`, *optional*, defaults to `False`): Return a stream instead of downloading first.
        columns ([`Columns`], *optional*):
            The paths in its image column and in its video column, by default `"video"`, are resolved.
        folder_scores (`bool`, *optional*, defaults to `False`):
            Take the scores of a folder whose table has none, or that has no table, from the names of its folders:
            numbers, or words such as `good` and `bad`.

    Returns:
        [`datasets.Dataset`], or [`datasets.IterableDataset`] with `streaming`.

    Raises:
        DataError: if `source` is none of the above or cannot be loaded; the cause is chained.
    """
    dataset: AnyDataset = _find(source, name, _Wanted(split, streaming, columns, folder_scores=folder_scores))
    return dataset


def load_columns(
    source: str,
    only: Sequence[str],
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    folder_scores: bool = False,
) -> AnyDataset | ParquetColumns:
    """
    Load some columns of a dataset, to look at its scores. Paths are not resolved. Parquet files that have all the
    columns are not copied to the cache, and their other columns are not read.

    Args:
        source (`str`): As for [`load_scored_dataset`].
        only (`Sequence[str]`): Columns that are wanted. The result may have more.
        name (`str`, *optional*): Configuration.
        split (`str`, *optional*, defaults to `"train"`): Split.
        streaming (`bool`, *optional*, defaults to `False`): Return a stream, or [`ParquetColumns`].
        folder_scores (`bool`, *optional*, defaults to `False`): As for [`load_scored_dataset`].

    Returns:
        [`ParquetColumns`] of local Parquet files with all the columns, a stream of other Parquet files, else what
        [`load_scored_dataset`] returns.

    Raises:
        DataError: as [`load_scored_dataset`].
    """
    wanted = _Wanted(split, streaming, only=list(only), folder_scores=folder_scores)
    dataset: AnyDataset | ParquetColumns = _find(source, name, wanted)
    return dataset


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What to load of a source; with `only`, some columns whose paths are not resolved."""

    split: str
    streaming: bool
    columns: Columns = DEFAULT_COLUMNS
    only: list[str] | None = None
    folder_scores: bool = False

    @property
    def base_split(self) -> str:
        """The split without a slice: `"train[:100]"` -> `"train"`."""
        return re.sub(r"\W.*", "", self.split)

    @property
    def used(self) -> list[str]:
        """Columns that are read."""
        columns = self.columns
        return self.only or [
            *columns.names,
            columns.video or "video",
            "file_name",
            *([columns.group] if columns.group else []),
        ]


def _find(source: str, name: str | None, wanted: _Wanted) -> Any:
    path = Path(source).expanduser()
    if wanted.streaming and wanted.split != wanted.base_split:
        raise DataError(
            f"`split`: a stream takes no slice such as {wanted.split!r}. Name the split alone, or do not stream."
        )
    rated = path.parent if path.name == JOURNAL else path
    if is_rated(rated):
        return _as_wanted(load_rated(rated, wanted.split), wanted)
    if path.is_file() and path.suffix.lower() == ".zip":
        path = unpacked(path)
    if path.is_dir():
        return _load_folder(path, name, wanted)
    if path.is_file():
        return _load_file(path, wanted)
    here = f"(looked from {os.getcwd()})"
    if not is_hub_id(source) or path.suffix.lower() in _BUILDERS:
        raise DataError(
            f"`source`: {source!r} is not a file or folder here {here}, and not a Hub id, which has the form "
            "'owner/name'. Check the path."
        )
    hint = (
        f"No file or folder of that name exists here {here}, so it was taken for a Hub id. Check its spelling, the "
        "`name` of the configuration and the `split`; for a private or gated dataset, log in with `hf auth login`."
    )
    with _loading(source, hint):
        dataset = flattened(_load(wanted, source, name), wanted.columns, wanted.only)
    commit = hub_commit(dataset)
    if commit and not dataset.info.download_checksums:  # cards read the Hub id and commit where `datasets` noted them
        dataset.info.download_checksums = {f"hf://datasets/{source}@{commit}/": {}}
    return dataset


def hub_commit(dataset: AnyDataset) -> str | None:
    """Return the commit of the Hub that a dataset was downloaded from, where its place in the cache tells it."""
    files = getattr(dataset, "cache_files", None) or [{"filename": ""}]
    commit = re.search(r"[/\\]([0-9a-f]{40})[/\\][^/\\]+$", files[0]["filename"])
    return commit[1] if commit else None


@contextlib.contextmanager
def _loading(source: str | Path, hint: str) -> Iterator[None]:
    """Turn errors of `datasets` into a [`DataError`] that says what to check."""
    try:
        yield
    except LOAD_ERRORS as error:
        inner = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        if is_empty_parquet(Path(source)):
            raise DataError(f"`source`: {str(source)!r} has no rows.") from error
        raise DataError(
            f"`source`: {str(source)!r} could not be loaded: {type(inner).__name__}: {inner}\n{hint}"
        ) from error


def _load(wanted: _Wanted, *args: Any, **kwargs: Any) -> Any:
    """Call `datasets.load_dataset`, or read some columns of Parquet files where only some are wanted."""
    split, only = wanted.split, wanted.only
    if only is None:
        return datasets.load_dataset(*args, split=split, streaming=wanted.streaming, **kwargs)
    builder = datasets.load_dataset_builder(*args, **kwargs)
    # Only the builder of Parquet files has these options, and a stream takes no slice.
    by_column = hasattr(builder.config, "fragment_scan_options") and split == wanted.base_split
    if not (wanted.streaming or by_column):
        return datasets.load_dataset(*args, split=split, **kwargs)
    files = (builder.config.data_files or {}).get(split, [])
    local = bool(files) and all(os.path.isfile(file) for file in files)
    if by_column and local and set(only) <= set(pq.read_schema(files[0]).names):
        return ParquetColumns(files, only)
    dataset = builder.as_streaming_dataset(split=split)
    if by_column and set(only) <= set(dataset.features or ()):
        builder.config.columns = only
        # Otherwise all rows of the columns are held in memory before the first row.
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(pre_buffer=False)
        dataset = builder.as_streaming_dataset(split=split)
    return dataset


def _load_file(path: Path, wanted: _Wanted) -> Any:
    return _as_written(_read_table(path, wanted), path, wanted, csv=_is_csv(path))


def _load_metadata(path: Path, wanted: _Wanted, *, own_split: bool) -> Any:
    """Load the metadata of a folder: of one split, or with `own_split` false the rows of one of several."""
    whole = dataclasses.replace(wanted, split=wanted.base_split, streaming=False, only=None)
    table = _read_table(path, whole)
    roles = lacking(table, wanted.columns, wanted.only)
    if wanted.folder_scores and "score" not in roles:
        logger.warning("%s: its scores are used, and not the names of folders (`folder_scores`).", path)
    if not roles:
        return _rows_of_table(path, table, wanted, own_split=own_split)
    full = dataclasses.replace(wanted, streaming=False, only=None)
    rows = _rows_of_table(path, table, full, own_split=own_split)
    return _as_wanted(fill(rows, path, wanted.columns, roles, folder_scores=wanted.folder_scores), wanted)


def _rows_of_table(path: Path, table: datasets.Dataset, wanted: _Wanted, *, own_split: bool) -> Any:
    names = file_names(table, wanted.columns)
    tell_of_files(names, path)
    chosen = [True] * len(names) if own_split else rows_of_split(names, path, wanted.base_split)
    if all(chosen):
        return _load_file(path, wanted)
    if wanted.split != wanted.base_split:
        raise DataError(
            f"`split`: {str(path)!r} has rows of several splits, told apart by folder, so it takes no slice such as "
            f"{wanted.split!r}. Name the split alone."
        )
    dataset = _read_table(path, dataclasses.replace(wanted, only=None))
    if wanted.streaming:
        dataset = dataset.filter(lambda row, index: chosen[index], with_indices=True)
    else:
        dataset = dataset.select([index for index, kept in enumerate(chosen) if kept])
    return _as_written(dataset, path, wanted, csv=_is_csv(path))


def _is_csv(path: Path) -> bool:
    return _BUILDERS.get(path.suffix.lower()) == "csv"


def _read_table(path: Path, wanted: _Wanted) -> Any:
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise DataError(
            f"`source`: {str(path)!r} is a file of a kind that is not read; give one of {', '.join(_BUILDERS)}, or a "
            "folder."
        )
    hint = (
        "Check that the file is not empty, that every line has the same columns, and that it is UTF-8 (save a "
        "spreadsheet as 'CSV UTF-8')."
    )
    if builder == "json":
        check_table(path)
    options = csv_options([path], wanted.used) if builder == "csv" else {}
    with _loading(path, hint):
        return _load(wanted, builder, data_files={wanted.base_split: glob.escape(str(path))}, **options)


def _as_written(dataset: Any, path: Path, wanted: _Wanted, *, csv: bool) -> Any:
    """Strip the column names of a CSV file, as in `prompt , score`, and resolve the paths of a whole dataset."""
    if csv:
        known = dataset.column_names or []
        names = {name: name.strip() for name in known if name != name.strip() and name.strip() not in known}
        if len(set(names.values())) == len(names):
            dataset = dataset.rename_columns(names)
    dataset = flattened(dataset, wanted.columns, wanted.only)
    if wanted.only is not None:
        return dataset
    if isinstance(dataset, datasets.Dataset):
        tell_of_copies(dataset, path, wanted.columns)
    return resolve_files(dataset, path if path.is_dir() else path.parent, wanted.columns)


def _load_folder(path: Path, name: str | None, wanted: _Wanted) -> Any:
    lacking = incomplete(path)
    if lacking is not None and not any((path / "data").glob("*.parquet")):
        raise DataError(f"`source`: {lacking}")  # there are only settings
    if lacking is not None:
        logger.warning("%s Until then, only the rows that are there are read.", lacking)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _load_saved(path, wanted)
    for folder in (path / wanted.base_split, path):
        found = [folder / file for file in _METADATA if (folder / file).is_file()]
        if len(found) > 1:
            logger.warning("%s: %s is read, %s is not. Remove one of them.", folder, found[0].name, found[1].name)
        if found:
            return _load_metadata(found[0], wanted, own_split=folder != path)
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")]
    metadata = any(file.name in _METADATA for file in files)
    tables = [file for file in files if file.suffix.lower() in _BUILDERS and file.name not in _METADATA]
    images = [] if metadata else files_below(path)
    if images:
        beside = {name for image in images for name in (image, os.path.splitext(image)[0])}
        tables = [file for file in tables if file.relative_to(path).with_suffix("").as_posix() not in beside]
        if all(file.suffix.lower() == ".tar" for file in tables):
            return _load_images(path, images, wanted)
    if not tables and not metadata:
        raise DataError(
            f"`source`: the folder {str(path)!r} holds no data: no images, no videos and no {', '.join(_BUILDERS)} "
            "file. A zip file is read if it is named itself."
        )
    for file in tables:
        if _BUILDERS[file.suffix.lower()] == "json":
            check_table(file)
    builder, options = str(path), {"name": name}
    if images and tables and not metadata:
        # `datasets` takes a folder for what most of its files are, here images, and would not read the tables.
        builder, options = _tables_of(path, tables, wanted)
    elif glob.escape(str(path)) != str(path):
        # `datasets` takes `cats [512]` for a pattern. It must be told what the folder holds, since it looks for a
        # folder of the escaped name otherwise.
        shards = [file for file in tables if file.parent == path / "data"] or tables
        kinds = Counter(_BUILDERS[file.suffix.lower()] for file in shards)
        builder = "imagefolder" if metadata else kinds.most_common(1)[0][0]
        options |= {"data_dir": glob.escape(str(path.absolute()))}
    if "data_files" not in options and tables and all(map(_is_csv, tables)):
        options |= csv_options(tables, wanted.used)
    hint = f"Check that the folder has a split {wanted.split!r} and that its files have the same columns."
    with _loading(path, hint):
        dataset = _load(wanted, builder, **options)
    return _as_written(dataset, path, wanted, csv="sep" in options)


def _load_images(path: Path, files: list[str], wanted: _Wanted) -> AnyDataset:
    if wanted.split != wanted.base_split:
        raise DataError(
            f"`split`: {str(path)!r} has no table, and takes no slice such as {wanted.split!r}. Name the split alone."
        )
    with _loading(path, "Check that its files can be read."):
        dataset = load_image_folder(path, files, wanted.split, wanted.columns, folder_scores=wanted.folder_scores)
    if wanted.streaming:
        return dataset.to_iterable_dataset(num_shards=max(1, min(64, len(dataset))))
    return dataset


def _tables_of(path: Path, tables: list[Path], wanted: _Wanted) -> tuple[str, dict[str, Any]]:
    """Return the builder and the arguments that load the tables of one split, by the split in their names."""
    builders = {_BUILDERS[file.suffix.lower()] for file in tables}
    names = sorted(file.relative_to(path).as_posix() for file in tables)
    if len(builders) > 1:
        raise DataError(f"`source`: {str(path)!r} holds tables of several kinds: {names}. Name one file.")
    split = wanted.base_split
    words = {name: set(re.split(r"[\W\d_]+", name.lower())) for name in names}
    if any(words[name].intersection(known) for name in names for known in SPLIT_KEYWORDS.values()):
        names = [name for name in names if words[name].intersection(words_of(split))]
    elif split != "train":  # every row would be trained on too
        names = []
    if not names:
        found = sorted(words)
        raise DataError(
            f"`split`: none of the tables {found} in {str(path)!r} belongs to the split {split!r}, which must be a "
            "word in a table's name."
        )
    (builder,) = builders
    files = [path / name for name in names]
    options = {"data_files": {split: [glob.escape(str(file)) for file in files]}}
    return builder, options | (csv_options(files, wanted.used) if builder == "csv" else {})


def _load_saved(path: Path, wanted: _Wanted) -> AnyDataset:
    with _loading(path, "Save it again with `dataset.save_to_disk`."):
        dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        split = wanted.split
        if split not in dataset:
            raise DataError(
                f"`split`: {str(path)!r} has the splits {list(dataset)}, not {split!r}. Give one of them; a saved "
                "dataset takes no slice such as 'train[:100]'."
            )
        dataset = dataset[split]
    elif wanted.split != "train":  # every row would be trained on too
        raise DataError(
            f"`split`: {str(path)!r} is a saved dataset without splits, so {wanted.split!r} is not in it. Leave the "
            "split out for all rows, or save a `datasets.DatasetDict` with a split of each name."
        )
    return _as_wanted(dataset, wanted)


def _as_wanted(dataset: datasets.Dataset, wanted: _Wanted) -> AnyDataset:
    """Return a dataset as a stream where one is wanted, in parts for workers to share."""
    return dataset.to_iterable_dataset(num_shards=max(1, min(64, len(dataset)))) if wanted.streaming else dataset
