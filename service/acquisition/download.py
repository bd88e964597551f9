"""Downloads one file over HTTP: resumes it, tries again after errors, and checks its SHA-256.

Until the file is complete, its bytes lie in `<name>.part`, and what the server said of it in `<name>.json`. A process
that is killed leaves both, and the next download of the same file resumes there.
"""

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from io import BufferedRandom
from pathlib import Path
from threading import Event
from typing import Literal

import httpx
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import PullFailed, WeightsDigestMismatch
from service.store.folder import check_room, writing

log = structlog.get_logger(component="download")

Progress = Callable[[int, int | None], None]
DigestSource = Literal["publisher", "hub"]

_certificates = cache(httpx.create_ssl_context)  # reading them takes longer than to download a small file
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to give up: after `attempts` in a row without a new byte. Times are in seconds."""

    attempts: int = 5
    timeout_seconds: float = 30.0  # without a byte
    backoff_seconds: float = 1.0  # doubled each time
    max_backoff_seconds: float = 30.0
    max_retry_after_seconds: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRequest:
    """A file to download: its URL, the SHA-256 that was published for it, if any, and the most bytes it may have.

    `room_bytes` must be free besides its own bytes before it is downloaded.
    """

    url: str
    sha256: str | None = None
    max_bytes: int
    room_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DownloadedFile:
    """A file that was downloaded. `digest_from` is who gave the SHA-256 that it was checked against, if anybody did."""

    path: Path
    sha256: str
    bytes: int
    digest_from: DigestSource | None
    revision: str | None


class SourceFileMissing(PullFailed):
    """The server has no such file."""


def download(
    request: FileRequest,
    target: Path,
    *,
    root: Path,
    on_progress: Progress = lambda _done, _total: None,
    stop: Event | None = None,
    policy: RetryPolicy = RetryPolicy(),
) -> DownloadedFile:
    """Download a file to `target`, in the store at `root`; it appears whole. One caller at a time for each target.

    `on_progress` is called with the number of bytes so far and, where known, of the whole file. Setting `stop` ends
    the download soon.

    Raises:
        PullFailed: it can't be downloaded; the message says why. The bytes so far are kept for the next time.
        WeightsDigestMismatch: the bytes, downloaded twice, have not the expected SHA-256; none are kept.
        StoreNotWritable: the folder of `target` can't be written, or has no room.
    """
    with httpx.Client(
        follow_redirects=True,
        verify=_certificates(),
        timeout=policy.timeout_seconds,
        headers={"Accept-Encoding": "identity", "User-Agent": "pvt-serve"},
        event_hooks={"request": [_refuse_unencrypted(request.url)]},
    ) as client:
        return _Transfer(client, request, _Partial(target), root, on_progress, stop or Event(), policy).run()


def discard(target: Path) -> None:
    """Delete a downloaded file, or what there is of it."""
    _Partial(target).drop()
    with suppress(OSError):
        target.unlink(missing_ok=True)


def without_secrets(url: str) -> str:
    """A URL for messages: without user, password and query."""
    return str(httpx.URL(url).copy_with(username="", password="", query=None, fragment=None))


def _refuse_unencrypted(url: str) -> Callable[[httpx.Request], None]:
    """A hook that refuses a redirect from `url` to plain HTTP, if `url` is HTTPS."""

    def hook(request: httpx.Request) -> None:
        if url.startswith("https:") and request.url.scheme != "https":
            redirect = without_secrets(str(request.url))
            raise PullFailed(f"{without_secrets(url)} redirects to {redirect}, which is not encrypted; refused")

    return hook


class _Retry(Exception):
    """The attempt failed, and the next one may succeed; `after_seconds` is when the server wants it.

    `from_start` says that the partial file belongs to another file than the server has now.
    """

    def __init__(self, reason: str, after_seconds: float | None = None, *, from_start: bool = False) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds
        self.from_start = from_start


class _Metadata(BaseModel):
    """What a server said of a file: its ETag, its size in bytes, its SHA-256 and the revision it belongs to."""

    model_config = ConfigDict(frozen=True)

    etag: str | None = None
    total: int | None = None
    sha256: str | None = None
    revision: str | None = None


class _Partial:
    """The beginning of `target` on disk. It survives the process between any two calls.

    A complete target that nobody has taken counts as a partial file again when it is opened.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._path = target.with_name(f"{target.name}.part")
        self._metadata_path = target.with_name(f"{target.name}.json")
        # Mutable state: the open file, the size and the hash of its bytes, and what is known of the whole file.
        self._file: BufferedRandom
        self.hash = hashlib.sha256()
        self.size = 0
        self.metadata = _Metadata()

    @contextmanager
    def opened(self, root: Path) -> Iterator[None]:
        """Read what an earlier attempt left, and close the file at the end. Raises StoreNotWritable."""
        with writing(root):
            self._open()
        try:
            yield
        finally:
            with suppress(OSError):
                self._file.close()

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.metadata = _Metadata.model_validate_json(self._metadata_path.read_bytes())
        except (FileNotFoundError, ValidationError):  # then nobody knows to which file the bytes belong
            self.metadata = _Metadata()
            self._path.unlink(missing_ok=True)
        if self.metadata.total is not None and self.target.exists():
            self.target.replace(self._path)
        self._file = self._path.open("a+b")
        self._file.seek(0)
        self.hash = hashlib.file_digest(self._file, "sha256")
        self.size = self._file.tell()
        if self.metadata.total is not None and self.size > self.metadata.total:
            self.resume(0, _Metadata())

    def range_headers(self, sha256: str | None) -> dict[str, str]:
        """Headers that request the rest; none, where nothing could show that it belongs to the partial file."""
        etag = self.metadata.etag if self.metadata.etag and not self.metadata.etag.startswith("W/") else None
        if not self.size or not (etag or sha256):
            return {}
        return {"Range": f"bytes={self.size}-"} | ({"If-Range": etag} if etag else {})

    def resume(self, start: int, metadata: _Metadata) -> None:
        """Continue at byte `start`, which is 0 or the size so far, of the file with this metadata."""
        if start != self.size:
            self._file.truncate(0)
            self.hash, self.size = hashlib.sha256(), 0
        if metadata != self.metadata or not self._metadata_path.exists():
            self._metadata_path.write_text(metadata.model_dump_json(exclude_none=True))
            self.metadata = metadata

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._file.flush()
        self.hash.update(chunk)
        self.size += len(chunk)

    def drop(self) -> None:
        """Delete it."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._metadata_path.unlink(missing_ok=True)
        self.size, self.metadata = 0, _Metadata()

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        self._path.replace(self.target)


@dataclass(slots=True)
class _Transfer:
    """One call of `download`: attempts until one succeeds or the policy ends them."""

    client: httpx.Client
    request: FileRequest
    partial: _Partial
    root: Path
    on_progress: Progress
    stop: Event
    policy: RetryPolicy
    wrong_digests: int = 0  # mutable, as is the partial file

    def run(self) -> DownloadedFile:
        failed_attempts = 0
        while True:
            with self.partial.opened(self.root):
                size_before = self.partial.size
                try:
                    return self._attempt()
                except httpx.UnsupportedProtocol as error:
                    raise self._failure(f"{error}; it must begin with https:// or http://") from error
                except (_Retry, httpx.TransportError) as error:
                    retry = error if isinstance(error, _Retry) else _Retry(str(error) or type(error).__name__)
                    if retry.from_start:
                        self.partial.drop()
                    failed_attempts = 0 if self.partial.size > size_before else failed_attempts + 1
                    if failed_attempts >= self.policy.attempts:
                        raise self._failure(f"{retry}, {failed_attempts} times in a row; {self._kept()}") from error
                    self._wait(retry, failed_attempts)
                except (httpx.HTTPError, httpx.InvalidURL) as error:
                    raise self._failure(f"{error}; {self._kept()}") from error

    def _attempt(self) -> DownloadedFile:
        partial = self.partial
        if partial.size > 0 and partial.size == partial.metadata.total:
            return self._checked()
        headers = partial.range_headers(self.request.sha256 or partial.metadata.sha256)
        with self.client.stream("GET", self.request.url, headers=headers) as response:
            start, metadata = _check_response(response, partial.size, partial.metadata)
            self._check_metadata(start, metadata)
            with writing(self.root):
                partial.resume(start, metadata)
            for chunk in response.iter_raw():
                self._append(chunk, metadata.total)
        if partial.size == 0:
            raise self._failure("the file is empty; try another --source")
        if metadata.total is not None and partial.size < metadata.total:
            raise _Retry(f"cut off after {partial.size} of {metadata.total} bytes")
        return self._checked()

    def _check_metadata(self, start: int, metadata: _Metadata) -> None:
        """Refuse, before a byte is downloaded, a file that can't be right or has no room."""
        total, expected = metadata.total, self.request.sha256
        if total is not None and total > self.request.max_bytes:
            raise self._failure(f"{total} bytes, which no such model has (at most {self.request.max_bytes})")
        if expected and metadata.sha256 not in {None, expected}:
            raise WeightsDigestMismatch(
                f"{self._url}: SHA-256 is {metadata.sha256} by the hub's header, {expected} was published; "
                "nothing was fetched"
            )
        check_room(self.root, self.request.room_bytes + (total - start if total else 0))

    def _append(self, chunk: bytes, total: int | None) -> None:
        if self.stop.is_set():
            raise self._failure(f"stopped; {self._kept()}")
        if self.partial.size + len(chunk) > (total or self.request.max_bytes):
            self.partial.drop()
            raise self._failure("more bytes than it should have; nothing was kept")
        try:
            with writing(self.root):
                self.partial.append(chunk)
        except Exception:
            self.partial.drop()  # so that it does not go on filling the disk
            raise
        self.on_progress(self.partial.size, total)

    def _checked(self) -> DownloadedFile:
        """The file, if it has the expected digest; else it is downloaded once more, from its beginning."""
        partial, expected = self.partial, self.request.sha256 or self.partial.metadata.sha256
        sha256, size, revision = partial.hash.hexdigest(), partial.size, partial.metadata.revision
        if expected and sha256 != expected:
            partial.drop()
            self.wrong_digests += 1
            if self.wrong_digests == 1:
                raise _Retry("the bytes have another SHA-256 than they should", 0.0)
            raise WeightsDigestMismatch(
                f"{self._url}: SHA-256 is {sha256}, expected {expected}, twice; nothing was kept, try another --source"
            )
        with writing(self.root):
            partial.finish()
        digest_from: DigestSource = "publisher" if self.request.sha256 else "hub"
        return DownloadedFile(partial.target, sha256, size, digest_from if expected else None, revision)

    def _wait(self, retry: _Retry, failed_attempts: int) -> None:
        """Wait before the next attempt: as long as the server asks for, else a random time that grows."""
        policy, after = self.policy, retry.after_seconds
        if after is not None and after > policy.max_retry_after_seconds:
            raise self._failure(f"{retry}, and asks to come back in {after:.0f} s; {self._kept()}")
        backoff = min(policy.backoff_seconds * 2 ** max(failed_attempts - 1, 0), policy.max_backoff_seconds)
        seconds = after if after is not None else backoff * random.uniform(0.5, 1)  # noqa: S311  it is no secret
        log.warning("download_again", url=self._url, reason=str(retry), in_seconds=round(seconds, 1))
        if self.stop.wait(seconds):
            raise self._failure(f"stopped; {self._kept()}")

    @property
    def _url(self) -> str:
        return without_secrets(self.request.url)

    def _failure(self, message: str) -> PullFailed:
        return PullFailed(f"{self._url}: {message}")

    def _kept(self) -> str:
        if self.partial.size:
            return f"{self.partial.size / 1e6:.1f} MB are kept, pull again to go on from there"
        return "pull again to try anew; PVT_MIRROR names another server to ask"


def _check_response(response: httpx.Response, size: int, before: _Metadata) -> tuple[int, _Metadata]:
    """At which byte the response begins, and what it says of the file, of which `size` bytes are on disk."""
    code, url = response.status_code, without_secrets(str(response.url))
    if code in _RETRIED:
        raise _Retry(f"{url} answers {code} {response.reason_phrase}", _retry_after(response))
    if code in {404, 410}:
        raise SourceFileMissing(f"{url} answers {code}: there is no such file; try another --source")
    if code in {401, 403}:
        raise PullFailed(f"{url} answers {code}: it requires credentials; try another --source, or PVT_MIRROR")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise PullFailed(f"{url} sends the file compressed, which was not requested; try another --source")
    content_range = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    metadata = _metadata(response, content_range)
    if code == httpx.codes.OK:
        return 0, metadata
    if code == httpx.codes.PARTIAL_CONTENT and content_range:
        known, new = before.model_dump(exclude_none=True), metadata.model_dump(exclude_none=True)
        same = all(known[name] == new[name] for name in ("etag", "total", "sha256") if name in known and name in new)
        if same and int(content_range[1]) == size:
            return size, _Metadata.model_validate(known | new)
    if code in {httpx.codes.PARTIAL_CONTENT, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE}:
        raise _Retry("it has changed since it was begun", 0.0, from_start=True)
    raise PullFailed(f"{url} answers {code} {response.reason_phrase}".rstrip() + ", which is no file")


def _metadata(response: httpx.Response, content_range: re.Match[str] | None) -> _Metadata:
    """From the response and the redirects before it: the hub describes a file where it redirects to its bytes."""
    hub = {name: value for each in (*response.history, response) for name, value in each.headers.items() if value}
    sha256 = hub.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
    whole = response.status_code != httpx.codes.PARTIAL_CONTENT
    length = response.headers.get("content-length") if whole else content_range and content_range[3]
    sizes = [int(size) for size in (length, hub.get("x-linked-size")) if size and size.isdecimal()]
    return _Metadata(
        etag=response.headers.get("etag"),
        total=next(filter(None, sizes), None),
        sha256=sha256 if _SHA256.fullmatch(sha256) else None,
        revision=hub.get("x-repo-commit"),
    )


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds: the header gives them, or a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
