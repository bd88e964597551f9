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
from typing import Annotated, Any, Literal
from urllib.parse import quote, quote_plus, unquote, urlsplit

from fsspec.core import strip_protocol, url_to_fs
from pydantic import Field

from service.errors import StoreUnreachable, WeightsUnavailable
from service.files import atomic_write, file_sha256
from service.store.cards import CARD_FILE, Record, Sha256
from service.store.store import ALIASES_FILE, INDEX_FILE, MODEL_ID, VERSION, check_writable, is_model_name

CONNECT_SECONDS = 5.0
READ_SECONDS = 20.0  # without a byte; a request that needs the model waits meanwhile
MAX_SMALL_BYTES = 4_000_000  # of a card or the aliases; what is cut off there is no longer JSON
SECRET_LENGTH = 8  # characters of a value in a URL's query from which on it is hidden without its name too
SHORTEST_PASSWORD = 4
BLOCK_BYTES = 8 << 20  # in one request
CHUNK_BYTES = 1 << 20
DENIED = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_NOT_REGULAR = "no regular file"
_ATTEMPTS = 2  # ours; s3fs alone makes five, which takes half a minute when the store is gone
_QUERY = re.compile(r"(\w+://[^\s?'\"<>]+)\?[^\s'\"<>]*")
_FILE = re.compile(rf"(?P<model>[\w-]+(\.[\w-]+)?)/{VERSION.pattern}/[\w-][\w.-]*")
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
        name = re.sub(r"[^a-z0-9]+", "-", without_secrets(self.url).lower()).strip("-")[-60:]
        return self.cache / f"{name}-{sha256(_without_password(self.url).encode()).hexdigest()[:12]}"


def without_secrets(url: str) -> str:
    """`url` for messages: without user, password and query, which may be a token or a signature."""
    return re.split(r"[?#]", _without_password(url), maxsplit=1)[0].rstrip("/")


def secrets_of(url: str) -> list[str]:
    """What of `url` no message may show, in the forms in which it may be in there, the longest first."""
    query, userinfo = url.partition("?")[2], urlsplit(url).netloc.rpartition("@")[0]
    found = {f"{userinfo}@", userinfo.partition(":")[2], query, *re.split("[&#]", query)}
    found |= {value for pair in found if len(value := pair.partition("=")[2]) >= SECRET_LENGTH}
    found = {each for each in found if "=" in each or len(each) >= SHORTEST_PASSWORD}  # "a" would hide every a
    forms = {form for each in found for form in (each, unquote(each), quote(unquote(each)), quote_plus(unquote(each)))}
    return sorted(forms - {""}, key=len, reverse=True)


def hide(text: str, secrets: Sequence[str]) -> str:
    """`text` without `secrets`, whatever they are part of; where there are any, without the query of each URL too."""
    if secrets:
        text = _QUERY.sub(r"\1?***", text)
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _without_password(url: str) -> str:
    """`url` without user and password, and without a slash at its end."""
    host = urlsplit(url).netloc
    return url.replace(host, host.rpartition("@")[2], 1).rstrip("/") if host else url.rstrip("/")


def is_url(store: str) -> bool:
    """Whether `store` is a URL rather than a folder."""
    return re.fullmatch(r"[a-z][a-z0-9+.-]+://.+", store) is not None


def objection(url: str) -> str | None:
    """Why this installation can't read `url`; None when it can."""
    scheme = url.partition("://")[0]
    if scheme not in _PACKAGES:
        return f"{scheme}:// is none of " + ", ".join(f"{known}://" for known in _PACKAGES)
    package, extra = _PACKAGES[scheme]
    if package and importlib.util.find_spec(package) is None:
        return f"{scheme}:// needs the package {package}: pip install 'pvt-serve[{extra}]'"
    return None


class IndexedFile(Record, extra="ignore"):  # a newer release may write more
    """A file by its path below the store's root."""

    path: str
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class StoreIndex(Record, extra="ignore"):
    """Every file of a store, weights too."""

    format: Literal[1] = 1
    files: tuple[IndexedFile, ...]


def write_index(root: Path) -> StoreIndex:
    """List the files of the store in the folder `root` in its index, by an atomic write.

    Raises:
        WeightsUnavailable: the folder can't be read.
        StoreNotWritable, OSError: it is the store of the package; the index can't be written.
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


def _root_cause(error: BaseException) -> BaseException:
    """The error behind `error`: fsspec raises FileNotFoundError for a server that it can't reach."""
    cause = error.__cause__
    known = isinstance(cause, OSError) or (cause is not None and type(cause).__module__.startswith("aiohttp"))
    return _root_cause(cause) if cause and known and isinstance(error, FileNotFoundError) else error


def status_of(error: BaseException) -> int | None:
    """The HTTP status that says what `error` does; None where the store did not answer, or not in HTTP's terms."""
    error = _root_cause(error)
    if isinstance(error, FileNotFoundError):
        return HTTPStatus.NOT_FOUND
    return HTTPStatus.FORBIDDEN if isinstance(error, PermissionError) else getattr(error, "status", None)


class Location:
    """A folder at `url`. Blocking; `name` is the URL for messages."""

    def __init__(self, url: str) -> None:
        self.name = without_secrets(url)
        self._scheme = url.partition("://")[0]
        self._is_web = self._scheme in {"http", "https"}
        folder, mark, query = url.partition("?") if self._is_web else (url, "", "")
        self._url, self._query = folder.rstrip("/"), mark + query  # which goes with the path of every file
        self._secrets = secrets_of(url)

    def files(self) -> Mapping[str, str]:
        """The paths of all files that a store may have, each with a tag that changes when the file does, or "".

        A folder that may not be listed gets a card, so that the attempt to read that reports why.
        Raises StoreUnreachable.
        """
        try:
            return self._indexed() if self._is_web else self._found()
        except Exception as error:  # the clients of fsspec raise almost anything
            raise self.unreachable(error) from error

    def read(self, paths: Sequence[str]) -> Mapping[str, bytes | Exception]:
        """The bytes of small files, or why they can't be read; raises StoreUnreachable if that is true of all."""
        names = {self._path(path): path for path in paths}
        pipes = {name: OSError(_NOT_REGULAR) for name in names if self._is_pipe(name)}
        readable = [name for name in names if name not in pipes]
        try:  # not `cat`, which takes a question mark for a pattern
            contents = self._fs.cat_ranges(readable, 0, MAX_SMALL_BYTES, on_error="return") if readable else []
        except Exception as error:
            raise self.unreachable(error) from error
        found = dict(zip(readable, contents, strict=True)) | pipes
        return {names[name]: content for name, content in found.items()}

    def chunks(self, path: str, start: int) -> Iterator[tuple[int, bytes]]:
        """The bytes of a file from `start` on, or all where the server knows no ranges, each chunk with its offset.

        Raises:
            WeightsUnavailable: there is no such file.
            StoreUnreachable: it can't be read.
        """
        try:
            name = self._path(path)
            if self._is_pipe(name):
                raise OSError(_NOT_REGULAR)  # noqa: TRY301  becomes the same error as all others
            # A server without ranges sends the whole file; without block 0 fsspec requests ranges all the same.
            block = 0 if self._is_web and not self._fs.info(name).get("partial") else BLOCK_BYTES
            with self._fs.open(name, "rb", block_size=block, cache_type="readahead") as source:
                with suppress(ValueError):  # a stream
                    source.seek(start)
                offset = source.tell()
                while chunk := source.read(CHUNK_BYTES):
                    yield offset, chunk
                    offset += len(chunk)
        except Exception as error:
            if status_of(error) == HTTPStatus.NOT_FOUND:
                why = "it is not there, though the card names it; copy it there"
                raise WeightsUnavailable(f"{self.name}/{path}: {why}") from error
            why = f"{self.reason(error)}; PVT_MODEL_STORE names the store"
            raise StoreUnreachable(f"{self.name}/{path} can't be read: {why}") from error

    def unreachable(self, error: BaseException) -> StoreUnreachable:
        """The error for callers when the store did not give what is needed."""
        why = self.reason(error)
        return StoreUnreachable(f"the model store {self.name!r} can't be read: {why}; PVT_MODEL_STORE names it")

    def reason(self, error: BaseException) -> str:
        """What went wrong, for messages; without the URL's secrets."""
        error, status = _root_cause(error), status_of(error)
        if isinstance(error, _NoListing):
            return str(error)
        if status in DENIED:
            return "permission denied; credentials come from the environment, as its own tools read them"
        if status == HTTPStatus.NOT_FOUND:
            return "it is not there"
        if isinstance(error, TimeoutError):
            return "no answer in time"
        message = hide(str(error).replace(self._url, self.name).partition("\n")[0], self._secrets)
        return f"{type(error).__name__}: {message[:200]}"

    @cached_property
    def _fs(self) -> Any:  # noqa: ANN401  fsspec has no types
        options: dict[str, Any] = {}
        if self._scheme == "s3":
            retries = {"total_max_attempts": 1}  # s3fs makes the others
            timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
            options = {"config_kwargs": {**timeouts, "retries": retries}}
        if self._is_web:
            from aiohttp import ClientTimeout  # noqa: PLC0415  an extra, installed for such stores only

            timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        fs, _ = url_to_fs(self._url, skip_instance_cache=True, use_listings_cache=False, **options)
        if self._scheme == "s3":
            fs.retries = _ATTEMPTS
        return fs

    def _path(self, path: str) -> str:
        return str(strip_protocol(f"{self._url}/{path}")).rstrip("/") + self._query

    def _is_pipe(self, name: str) -> bool:
        """Whether reading could wait for ever, as that of a pipe or a device in a local folder does."""
        return self._scheme == "file" and self._fs.exists(name) and self._fs.info(name)["type"] == "other"

    def _found(self) -> Mapping[str, str]:
        root = self._path("")
        if self._scheme == "file":  # of which `find` silently leaves out what may not be listed
            files = self._listed()
        else:
            found = self._fs.find(root, detail=True)
            by_path = {name.removeprefix(root).lstrip("/"): str(info) for name, info in found.items()}
            files = {path: tag for path, tag in by_path.items() if _is_store_file(path)}
        if not files and not self._fs.exists(root):
            raise FileNotFoundError(root)
        return files

    def _indexed(self) -> Mapping[str, str]:
        """From the store's index, which is one request; without one, from the server's pages of links."""
        try:
            content = self._fs.cat_file(self._path(INDEX_FILE))
        except FileNotFoundError:
            return self._listed()
        index = StoreIndex.model_validate_json(content)
        return {file.path: file.sha256 for file in index.files if _is_store_file(file.path)}

    def _listed(self) -> Mapping[str, str]:
        """From listings of the store's folder and those of its models; on a web server, its pages of links."""
        top = self._names_in("")
        models = [name for name in top if is_model_name(name)]
        if self._is_web and not models:
            raise _NoListing(
                f"neither {INDEX_FILE} nor a page of links to models; make the index with `pvt-serve index`"
            )
        cards = {f"{folder}/{CARD_FILE}": "" for model in models for folder in self._version_folders(model)}
        return cards | ({ALIASES_FILE: ""} if ALIASES_FILE in top else {})

    def _version_folders(self, model: str) -> list[str]:
        """The folders of a model's versions, or the model's own where that has none or may not be listed."""
        try:
            versions = [f"{model}/{name}" for name in self._names_in(model) if VERSION.fullmatch(name)]
            return versions or ([model] if not self._is_web and self._fs.isdir(self._path(model)) else [])
        except Exception as error:
            if self._is_web and status_of(error) not in DENIED:
                raise
            return [model]

    def _names_in(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            where = f"{self._path(folder).removesuffix(self._query)}/{self._query}"
            paths = [path.removeprefix(where) for path in self._fs.ls(where, detail=False)]
            return sorted({path.partition("?")[0].rstrip("/").rpartition("/")[2] for path in paths})
        return []


def _is_store_file(path: str) -> bool:
    """Remote names become local paths, so every name that has not the form of a store's file is ignored."""
    match = _FILE.fullmatch(path)
    return path == ALIASES_FILE or (match is not None and is_model_name(match["model"]))
