"""Embeddings in one Parquet file: a row group for each block, the vector a list of fixed size."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cli.blocks import COLUMNS, Block
from cli.made import BrokenTable, Made
from cli.terminal import USAGE, CommandError

_MADE = b"pvt-serve"
_ROWS = 4096


def require() -> None:
    """Raises CommandError when pyarrow is not installed."""
    _pyarrow()


def write(path: Path, blocks: Callable[[], Iterable[Block]], made: Made) -> None:
    """Write what `blocks` gives, a row group for each."""
    pa, parquet = _pyarrow()
    text = {name: pa.string() for name in ("path", "model", "version")}
    numbers = {"width": pa.int32(), "height": pa.int32(), "bytes": pa.int64(), "mtime_ns": pa.int64()}
    types = {**text, **numbers, "embedding": pa.list_(pa.float32(), made.dimensions)}
    schema = pa.schema([(name, types[name]) for name in COLUMNS], metadata={_MADE: json.dumps(made.fields())})
    with parquet.ParquetWriter(path, schema) as writer:
        for block in blocks():
            columns: dict[str, Any] = block.columns()
            vectors = pa.array(columns.pop("embedding").reshape(-1), pa.float32())
            arrays = {name: pa.array(column.tolist(), types[name]) for name, column in columns.items()}
            arrays["embedding"] = pa.FixedSizeListArray.from_arrays(vectors, made.dimensions)
            writer.write_table(pa.table([arrays[name] for name in COLUMNS], schema=schema))


def read(path: Path) -> Iterator[Block]:
    """The rows of `path`, some at a time.

    Raises:
        BrokenTable: it is none that `write` made.
    """
    pa, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS, columns=list(COLUMNS)):
                columns = {name: batch.column(name) for name in COLUMNS}
                vectors = columns.pop("embedding")
                arrays = {name: np.array(column.to_pylist()) for name, column in columns.items()}
                flat = vectors.flatten().to_numpy()
                yield Block(**arrays, embedding=flat.reshape(len(vectors), -1))
    except (pa.ArrowInvalid, KeyError) as error:
        raise BrokenTable(f"{path} is no table of embeddings: {error}") from error


def made_of(path: Path) -> Made:
    """How the embeddings in `path` were made; raises BrokenTable."""
    pa, parquet = _pyarrow()
    try:
        return Made(**json.loads((parquet.read_schema(path).metadata or {})[_MADE]))
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError) as error:
        raise BrokenTable(f"{path} is no table of embeddings: {error}") from error


def _pyarrow() -> tuple[Any, Any]:
    """The library, which is untyped; only this command needs it."""
    try:
        import pyarrow as pa  # noqa: PLC0415  optional
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        told = "Parquet needs pyarrow: pip install 'pvt-serve[parquet]', or write to a .npz"
        raise CommandError(told, USAGE) from error
    return pa, parquet
