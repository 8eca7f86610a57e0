"""Columns of local Parquet files in pieces, without a stream of `datasets`, which imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .images import DataError


class ParquetColumns:
    """
    Some columns of the rows of Parquet files, in order.

    Args:
        files (`Sequence[str]`):
            Paths, at least one.
        columns (`Sequence[str]`):
            Columns that the first file has.
    """

    def __init__(self, files: Sequence[str], columns: Sequence[str]) -> None:
        self.files, self.columns = list(files), list(columns)
        features = datasets.Features.from_arrow_schema(pq.read_schema(self.files[0]))
        self.features = datasets.Features({column: features[column] for column in self.columns})
        self.num_rows = sum(pq.read_metadata(file).num_rows for file in self.files)

    def __len__(self) -> int:
        return self.num_rows

    def tables(self, size: int) -> Iterator[pa.Table]:
        """
        Yield the rows.

        Args:
            size (`int`):
                Rows of a piece at most.

        Raises:
            DataError: for a file without one of the columns, or that cannot be read.
        """
        for path in self.files:
            with pq.ParquetFile(path) as file:
                missing = [column for column in self.columns if column not in file.schema_arrow.names]
                if missing:
                    raise DataError(
                        f"{path}: it has no column {missing[0]!r}, which the first file, {self.files[0]}, has. Give "
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
        """Return the first piece as a dataset with the types that the file's own description has."""
        info = datasets.DatasetInfo(features=self.features)
        return datasets.Dataset(table.replace_schema_metadata(None), info=info)
