"""A folder somewhere else, by its URL: what lies in it, and the bytes. What fsspec reads, this reads."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from http import HTTPStatus
from typing import Any, BinaryIO, cast

from fsspec.core import url_to_fs

from service.architecture.variants import VARIANTS
from service.errors import StoreUnreachable
from service.store.cards import CARD_FILE
from service.store.index import StoreIndex
from service.store.names import ALIASES_FILE, INDEX_FILE, MODEL_ID, VERSION
from service.store.urls import without_password

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0  # without a byte; a request for a model waits meanwhile
MAX_SMALL_BYTES = 4_000_000  # of a card or the aliases; what is cut off there is no JSON any more
BLOCK_BYTES = 8 << 20  # in one request
_ATTEMPTS = 2  # of ours; s3fs alone makes five and half a minute of a store that is gone
_FILE = re.compile(r"(?P<model>[\w-]+(\.[\w-]+)?)/(?P<version>[^/]+)/[\w.-]+")
_TAGS = ("size", "sha256", "ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated", "created")


class _NoListing(Exception):
    """A web server with nothing that says what it has."""


def root(error: BaseException) -> BaseException:
    """What is behind it: fsspec says of a server that it can't reach that the file is not there."""
    cause = error.__cause__
    known = isinstance(cause, OSError) or (cause is not None and type(cause).__module__.startswith("aiohttp"))
    return root(cause) if cause and known and isinstance(error, FileNotFoundError) else error


def is_not_there(error: BaseException) -> bool:
    """Whether it says that there is no such file, rather than that the store is away."""
    error = root(error)
    return isinstance(error, FileNotFoundError) or getattr(error, "status", None) == HTTPStatus.NOT_FOUND


def _is_refused(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    return isinstance(error, PermissionError) or status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


def reason(error: BaseException) -> str:
    """What went wrong, in words of ours where there are some."""
    error = root(error)
    if isinstance(error, _NoListing):
        return str(error)
    if _is_refused(error):
        return "permission denied; credentials come from the environment, as its own tools read them"
    if is_not_there(error):
        return "it is not there"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


class Location:
    """A folder at `url`. Blocking; every error of listing is `StoreUnreachable`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.shown = without_password(url)
        self.scheme = url.partition("://")[0]

    def files(self) -> Mapping[str, str]:
        """The paths of all files that a store may have, each with what changes when it does, or "" if unknown.

        A folder in it that may not be listed has a card, which can't be read: that tells why.

        Raises:
            StoreUnreachable: they can't be listed.
        """
        try:
            if self.scheme in {"http", "https"}:
                return self._indexed()
            if self.scheme == "file":  # of which a search leaves out what it may not list
                self._fs.ls(self._root)
            found = self._fs.find(self._root, withdirs=self.scheme == "file", detail=True)
            if not found and not self._fs.exists(self._root):
                raise FileNotFoundError(self._root)  # noqa: TRY301  told as all others are
            named = {name.removeprefix(self._root).lstrip("/"): info for name, info in found.items()}
            folders = [path for path, info in named.items() if info.get("type") == "directory"]
            files = {path: _tag(info) for path, info in named.items() if _may_be_ours(path)}
            return _cards_of(folders) | files
        except Exception as error:  # its clients raise almost anything
            raise self.unreachable(error) from error

    def read(self, paths: Sequence[str]) -> Mapping[str, bytes | Exception]:
        """The bytes of small files, or why there are none."""
        if not paths:
            return {}
        names = {self._path(path): path for path in paths}
        got = self._fs.cat(list(names), on_error="return", start=0, end=MAX_SMALL_BYTES)
        return {names[name]: content for name, content in got.items()}

    def open(self, path: str) -> BinaryIO:
        """A file to be read in large pieces from its start, or from elsewhere if it can `seek`."""
        name = self._path(path)
        web = self.scheme in {"http", "https"}
        # A server without ranges gives a file in one piece only; fsspec asks for ranges unless told.
        block = 0 if web and not self._fs.info(name).get("partial") else BLOCK_BYTES
        return cast("BinaryIO", self._fs.open(name, "rb", block_size=block, cache_type="readahead"))

    def unreachable(self, error: BaseException) -> StoreUnreachable:
        """The error to tell callers when the store did not answer with what is needed."""
        said = reason(error).replace(self.url, self.shown)
        return StoreUnreachable(f"the model store {self.shown!r} can't be read: {said}; PVT_MODEL_STORE names it")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        fs, root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False, **self._options())
        if self.scheme == "s3":
            fs.retries = _ATTEMPTS
        return fs, root.rstrip("/")

    @property
    def _fs(self) -> Any:  # noqa: ANN401  fsspec has no types
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _options(self) -> dict[str, Any]:
        if self.scheme == "s3":
            retries = {"total_max_attempts": 1}  # s3fs makes the others
            return {
                "config_kwargs": {
                    "connect_timeout": CONNECT_SECONDS,
                    "read_timeout": READ_SECONDS,
                    "retries": retries,
                }
            }
        if self.scheme in {"http", "https"}:
            from aiohttp import ClientTimeout  # noqa: PLC0415  only who serves from such a store has it

            timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        return {}

    def _indexed(self) -> Mapping[str, str]:
        """By the store's index where it has one, which is one request; else by the server's pages of links."""
        try:
            content = self._fs.cat_file(self._path(INDEX_FILE))
        except FileNotFoundError:
            return self._linked()
        index = StoreIndex.model_validate_json(content)
        return {file.path: file.sha256 for file in index.files if _may_be_ours(file.path)}

    def _linked(self) -> Mapping[str, str]:
        top = self._links("")
        if not (models := [name for name in top if _may_be_model(name)]):
            raise _NoListing(
                f"neither {INDEX_FILE} nor a page of links to models; make the index with `pvt-serve index`"
            )
        versions = [version for model in models for version in self._versions(model)]
        return {f"{version}/{CARD_FILE}": "" for version in versions} | (
            {ALIASES_FILE: ""} if ALIASES_FILE in top else {}
        )

    def _versions(self, model: str) -> list[str]:
        """The folders of a model's versions, or its own where that may not be listed."""
        try:
            return [f"{model}/{name}" for name in self._links(model) if VERSION.fullmatch(name)]
        except Exception as error:
            if not _is_refused(root(error)):
                raise
            return [model]

    def _links(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            links = self._fs.ls(f"{self._path(folder).rstrip('/')}/", detail=False)
            return sorted({link.partition("?")[0].rstrip("/").rpartition("/")[2] for link in links})
        return []


def _may_be_ours(path: str) -> bool:
    """Names come from elsewhere and become paths here, so what is not of the form is not there."""
    if path == ALIASES_FILE:
        return True
    match = _FILE.fullmatch(path)
    if not match or not VERSION.fullmatch(match["version"]) or path.rpartition("/")[2].startswith("."):
        return False
    return _may_be_model(match["model"])


def _cards_of(folders: Sequence[str]) -> dict[str, str]:
    """The cards of versions, and those of models that seem to have none."""
    versions = [path for path in folders if _may_be_ours(f"{path}/{CARD_FILE}")]
    whole = {path.partition("/")[0] for path in versions}
    empty = [path for path in folders if _may_be_model(path) and path not in whole]
    return {f"{path}/{CARD_FILE}": "" for path in (*versions, *empty)}


def _may_be_model(name: str) -> bool:
    return MODEL_ID.fullmatch(name) is not None or name in VARIANTS


def _tag(info: Mapping[str, Any]) -> str:
    return " ".join(str(info[key]) for key in _TAGS if info.get(key) is not None)
