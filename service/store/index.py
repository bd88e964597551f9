"""The list of a store's files, for servers that have no listing: `index.json` at its root."""

import os
from hashlib import file_digest
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.errors import WeightsUnavailable
from service.store.aliases import ALIASES_FILE
from service.store.names import MODEL_ID, VERSION
from service.store.writes import check_writable

INDEX_FILE = "index.json"


class IndexedFile(BaseModel):
    """A file by its path below the store's root."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoreIndex(BaseModel):
    """Every file of a store, weights too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        paths = [path for path in sorted(root.glob("*/*/*")) if _of_a_model(path)]
        aliases = root / ALIASES_FILE
        index = StoreIndex(files=tuple(_indexed(root, path) for path in [*paths, aliases] if path.is_file()))
        if not root.is_dir():
            raise NotADirectoryError(20, "no folder")
    except OSError as error:
        raise WeightsUnavailable(f"{root}: the model store can't be read ({error.strerror or error})") from error
    with NamedTemporaryFile("w", dir=root, prefix=".index", delete=False) as file:
        file.write(index.model_dump_json(indent=1) + "\n")
    Path(file.name).chmod(0o644)
    os.replace(file.name, root / INDEX_FILE)  # noqa: PTH105
    return index


def _of_a_model(path: Path) -> bool:
    version = path.parent
    named = MODEL_ID.fullmatch(version.parent.name) and VERSION.fullmatch(version.name)
    return bool(named) and not path.name.startswith(".")


def _indexed(root: Path, path: Path) -> IndexedFile:
    with path.open("rb") as file:
        sha256 = file_digest(file, "sha256").hexdigest()
    return IndexedFile(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=sha256)
