"""A model store by URL: what URLs can be read, the files that lie there, and their bytes. fsspec reads them.

Web servers that do not list their folders have `index.json` at the store's root, which lists its files.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from fsspec.core import url_to_fs
from pydantic import ConfigDict, Field

from service.architecture.variants import VARIANTS
from service.errors import StoreUnreachable, WeightsUnavailable
from service.files import atomic_write, file_sha256
from service.store.cards import CARD_FILE, Record, Sha256
from service.store.folder import check_writable
from service.store.names import ALIASES_FILE, INDEX_FILE, MODEL_ID, VERSION

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0  # without a byte; a request that needs the model waits meanwhile
MAX_SMALL_BYTES = 4_000_000  # of a card or the aliases; what is cut off there is no longer JSON
BLOCK_BYTES = 8 << 20  # in one request
_NOT_REGULAR = "no regular file"
_ATTEMPTS = 2  # ours; s3fs alone makes five, which takes half a minute when the store is gone
_URL = re.compile(r"[a-z][a-z0-9+.-]+://.+")
_FILE = re.compile(r"(?P<model>[\w-]+(\.[\w-]+)?)/(?P<version>[^/]+)/[\w.-]+")
_TAGS = ("size", "sha256", "ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated", "created")
# The package that must be installed for each kind of URL, and the extra that installs it.
_PACKAGES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "hf": (None, None),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "file": (None, None),
    "memory": (None, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """A store by `url`, the folder for copies of its files, and how many bytes of weights that may hold."""

    url: str
    cache: Path
    cache_bytes: int
    poll_seconds: float = 30.0

    @property
    def folder(self) -> Path:
        """The folder for the copies of this store; its name says which store it is."""
        url = without_password(self.url)
        name = re.sub(r"[^a-z0-9]+", "-", url.lower()).strip("-")[-60:]
        return self.cache / f"{name}-{sha256(url.encode()).hexdigest()[:12]}"


def without_password(url: str) -> str:
    """`url` for messages: without user and password, and without a slash at its end."""
    host = urlsplit(url).netloc
    return (url.replace(host, host.rpartition("@")[2], 1) if "@" in host else url).rstrip("/")


def is_url(store: str) -> bool:
    """Whether `store` is a URL rather than a folder."""
    return _URL.fullmatch(store) is not None


def objection(url: str) -> str | None:
    """Why this installation can't read `url`; None when it can."""
    scheme = url.partition("://")[0]
    if scheme not in _PACKAGES:
        return f"{scheme}:// is none of " + ", ".join(f"{known}://" for known in _PACKAGES)
    package, extra = _PACKAGES[scheme]
    if package and importlib.util.find_spec(package) is None:
        return f"{scheme}:// needs the package {package}: pip install 'pvt-serve[{extra}]'"
    return None


class IndexedFile(Record):
    """A file by its path below the store's root."""

    model_config = ConfigDict(extra="ignore")  # a newer release may write more

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class StoreIndex(Record):
    """Every file of a store, weights too."""

    model_config = ConfigDict(extra="ignore")

    format: Literal[1] = 1
    files: tuple[IndexedFile, ...]


def write_index(root: Path) -> StoreIndex:
    """List the files of the store in the folder `root` in its index, by an atomic write.

    Raises:
        WeightsUnavailable: the folder can't be read.
        StoreNotWritable: it is the store of the package.
        OSError: the index can't be written.
    """
    check_writable(root)
    try:
        files = tuple(
            IndexedFile(path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=file_sha256(path))
            for path in (*_version_files(root), root / ALIASES_FILE)
            if path.is_file()
        )
    except OSError as error:
        raise WeightsUnavailable(
            f"{error.filename or root}: the model store can't be read ({error.strerror or error})"
        ) from error
    index = StoreIndex(files=files)
    atomic_write(root / INDEX_FILE, index.model_dump_json(indent=1) + "\n")
    return index


def _version_files(root: Path) -> Iterator[Path]:
    """Raises an OSError for a folder that can't be read: an index without its files would hide it from all readers."""
    for model in sorted(root.iterdir()):
        if MODEL_ID.fullmatch(model.name) and model.is_dir():
            for version in sorted(model.iterdir()):
                if VERSION.fullmatch(version.name) and version.is_dir():
                    yield from (path for path in sorted(version.iterdir()) if not path.name.startswith("."))


class _NoListing(Exception):
    """A web server with nothing that lists its files."""


def root_cause(error: BaseException) -> BaseException:
    """The error behind `error`: fsspec raises FileNotFoundError for a server that it can't reach."""
    cause = error.__cause__
    known = isinstance(cause, OSError) or (cause is not None and type(cause).__module__.startswith("aiohttp"))
    return root_cause(cause) if cause and known and isinstance(error, FileNotFoundError) else error


def is_missing(error: BaseException) -> bool:
    """Whether it says that there is no such file, rather than that the store does not answer."""
    error = root_cause(error)
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) == HTTPStatus.NOT_FOUND


def _is_forbidden(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    return isinstance(error, PermissionError) or status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


def reason(error: BaseException) -> str:
    """What went wrong, for messages."""
    error = root_cause(error)
    if isinstance(error, _NoListing):
        return str(error)
    if _is_forbidden(error):
        return "permission denied; credentials come from the environment, as its own tools read them"
    if is_missing(error):
        return "it is not there"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


class Location:
    """A folder at `url`. Blocking; every error of listing is `StoreUnreachable`. `name` is the URL for messages."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.name = without_password(url)
        self._scheme = url.partition("://")[0]
        self._is_web = self._scheme in {"http", "https"}

    def files(self) -> Mapping[str, str]:
        """The paths of all files that a store may have, each with a tag that changes when the file does, or "".

        A folder that may not be listed gets a card, so that the attempt to read that reports why.

        Raises:
            StoreUnreachable: they can't be listed.
        """
        try:
            if self._is_web:
                return self._indexed()
            local = self._scheme == "file"
            if local:  # `find` silently leaves out what may not be listed
                self._fs.ls(self._root)
            found = self._fs.find(self._root, withdirs=local, detail=True)
            if not found and not self._fs.exists(self._root):
                raise FileNotFoundError(self._root)  # noqa: TRY301  becomes the same error as all others
            by_path = {name.removeprefix(self._root).lstrip("/"): info for name, info in found.items()}
            folders = [path for path, info in by_path.items() if info.get("type") == "directory"]
            files = {path: _tag(info) for path, info in by_path.items() if _is_store_file(path)}
            return _cards_of(folders) | files
        except Exception as error:  # the clients of fsspec raise almost anything
            raise self.unreachable(error) from error

    def read(self, paths: Sequence[str]) -> Mapping[str, bytes | Exception]:
        """The bytes of small files, or why they can't be read."""
        if not paths:
            return {}
        names = {self._path(path): path for path in paths}
        pipes = {name: OSError(_NOT_REGULAR) for name in names if self._is_pipe(name)}
        readable = [name for name in names if name not in pipes]
        contents = self._fs.cat(readable, on_error="return", start=0, end=MAX_SMALL_BYTES) if readable else {}
        return {names[name]: content for name, content in (contents | pipes).items()}

    def open(self, path: str) -> BinaryIO:
        """A file to be read in large blocks from its start, or from elsewhere if it can `seek`."""
        name = self._path(path)
        if self._is_pipe(name):
            raise OSError(_NOT_REGULAR)
        # A server without ranges sends the whole file; without block 0 fsspec requests ranges all the same.
        block = 0 if self._is_web and not self._fs.info(name).get("partial") else BLOCK_BYTES
        return cast("BinaryIO", self._fs.open(name, "rb", block_size=block, cache_type="readahead"))

    def unreachable(self, error: BaseException) -> StoreUnreachable:
        """The error for callers when the store did not give what is needed."""
        why = reason(error).replace(self.url, self.name)
        return StoreUnreachable(f"the model store {self.name!r} can't be read: {why}; PVT_MODEL_STORE names it")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        fs, root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False, **self._options())
        if self._scheme == "s3":
            fs.retries = _ATTEMPTS
        return fs, root.rstrip("/")

    @property
    def _fs(self) -> Any:  # noqa: ANN401  fsspec has no types
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _is_pipe(self, name: str) -> bool:
        """Whether reading could wait for ever, as that of a pipe or a device in a local folder does."""
        return self._scheme == "file" and self._fs.exists(name) and self._fs.info(name)["type"] == "other"

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _options(self) -> dict[str, Any]:
        if self._scheme == "s3":
            retries = {"total_max_attempts": 1}  # s3fs makes the others
            timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
            return {"config_kwargs": {**timeouts, "retries": retries}}
        if self._is_web:
            from aiohttp import ClientTimeout  # noqa: PLC0415  an extra, installed for such stores only

            timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        return {}

    def _indexed(self) -> Mapping[str, str]:
        """From the store's index, which is one request; without one, from the server's pages of links."""
        try:
            content = self._fs.cat_file(self._path(INDEX_FILE))
        except FileNotFoundError:
            return self._linked()
        index = StoreIndex.model_validate_json(content)
        return {file.path: file.sha256 for file in index.files if _is_store_file(file.path)}

    def _linked(self) -> Mapping[str, str]:
        top = self._links("")
        if not (models := [name for name in top if _is_model_name(name)]):
            raise _NoListing(
                f"neither {INDEX_FILE} nor a page of links to models; make the index with `pvt-serve index`"
            )
        versions = [version for model in models for version in self._versions(model)]
        aliases = {ALIASES_FILE: ""} if ALIASES_FILE in top else {}
        return {f"{version}/{CARD_FILE}": "" for version in versions} | aliases

    def _versions(self, model: str) -> list[str]:
        """The folders of a model's versions, or the model's own where that may not be listed."""
        try:
            return [f"{model}/{name}" for name in self._links(model) if VERSION.fullmatch(name)]
        except Exception as error:
            if not _is_forbidden(root_cause(error)):
                raise
            return [model]

    def _links(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            links = self._fs.ls(f"{self._path(folder).rstrip('/')}/", detail=False)
            return sorted({link.partition("?")[0].rstrip("/").rpartition("/")[2] for link in links})
        return []


def _is_store_file(path: str) -> bool:
    """Remote names become local paths, so every name that has not the form of a store's file is ignored."""
    if path == ALIASES_FILE:
        return True
    match = _FILE.fullmatch(path)
    if not match or not VERSION.fullmatch(match["version"]) or path.rpartition("/")[2].startswith("."):
        return False
    return _is_model_name(match["model"])


def _cards_of(folders: Sequence[str]) -> dict[str, str]:
    """The cards of versions, and one for each model in which no version is found."""
    versions = [path for path in folders if _is_store_file(f"{path}/{CARD_FILE}")]
    models = {path.partition("/")[0] for path in versions}
    empty = [path for path in folders if _is_model_name(path) and path not in models]
    return {f"{path}/{CARD_FILE}": "" for path in (*versions, *empty)}


def _is_model_name(name: str) -> bool:
    return MODEL_ID.fullmatch(name) is not None or name in VARIANTS


def _tag(info: Mapping[str, Any]) -> str:
    return " ".join(str(info[key]) for key in _TAGS if info.get(key) is not None)
