"""The list of a store's files, for servers that have no listing: `index.json` at its root."""

from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.errors import WeightsUnavailable
from service.store.names import ALIASES_FILE, INDEX_FILE, MODEL_ID, VERSION
from service.store.writes import check_writable, replacing


class IndexedFile(BaseModel):
    """A file by its path below the store's root."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer release may write more

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoreIndex(BaseModel):
    """Every file of a store, weights too."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    files: tuple[IndexedFile, ...]


def write_index(root: Path) -> StoreIndex:
    """List the store in the folder `root` in its index, which is replaced as a whole.

    Raises:
        WeightsUnavailable: the folder can't be read.
        StoreNotWritable: it is the store of the package.
        OSError: the index can't be written.
    """
    check_writable(root)
    try:
        paths = [*_of_models(root), root / ALIASES_FILE]
        index = StoreIndex(files=tuple(_indexed(root, path) for path in paths if path.is_file()))
    except OSError as error:
        raise WeightsUnavailable(
            f"{error.filename or root}: the model store can't be read ({error.strerror or error})"
        ) from error
    with replacing(root / INDEX_FILE) as file:
        file.write((index.model_dump_json(indent=1) + "\n").encode())
    return index


def _of_models(root: Path) -> Iterator[Path]:
    """What lies in version folders. One that can't be read is told of: left out, it would be gone for all readers."""
    for model in sorted(root.iterdir()):
        if MODEL_ID.fullmatch(model.name) and model.is_dir():
            versions = [path for path in sorted(model.iterdir()) if VERSION.fullmatch(path.name) and path.is_dir()]
            for version in versions:
                yield from (path for path in sorted(version.iterdir()) if not path.name.startswith("."))


def _indexed(root: Path, path: Path) -> IndexedFile:
    with path.open("rb") as file:
        sha256 = file_digest(file, "sha256").hexdigest()
    return IndexedFile(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=sha256)
