"""Read columns of local Parquet files in pieces, without a stream of `datasets`, which imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .images import DataError


class ParquetColumns:
    """The rows of Parquet files, at least one, in order, with some columns that the first file has."""

    def __init__(self, files: Sequence[str], columns: Sequence[str]) -> None:
        self.files, self.columns = list(files), list(columns)
        features = datasets.Features.from_arrow_schema(pq.read_schema(self.files[0]))
        self.features = datasets.Features({column: features[column] for column in self.columns})
        self.num_rows = sum(pq.read_metadata(file).num_rows for file in self.files)

    def __len__(self) -> int:
        return self.num_rows

    def tables(self, size: int) -> Iterator[pa.Table]:
        """Yield pieces of at most `size` rows; raise a [`DataError`] for a broken file or one that lacks a column."""
        for path in self.files:
            with pq.ParquetFile(path) as file:
                for column in self.columns:
                    if column not in file.schema_arrow.names:
                        raise DataError(
                            f"{path}: it has no column {column!r}, which the first file, {self.files[0]}, has. Give "
                            "files with the same columns."
                        )
                try:
                    for batch in file.iter_batches(size, columns=self.columns, use_threads=False):
                        yield pa.Table.from_batches([batch]).select(self.columns)
                except (OSError, pa.ArrowInvalid) as error:
                    raise DataError(
                        f"{path}: it cannot be read: {error}. Write or download the file again."
                    ) from error

    def head(self, table: pa.Table) -> datasets.Dataset:
        """Return the first piece as a dataset with the types that the file's schema states."""
        info = datasets.DatasetInfo(features=self.features)
        return datasets.Dataset(table.replace_schema_metadata(None), info=info)
