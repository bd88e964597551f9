"""Downloads one file: resumes it, tries again after errors, and checks its SHA-256.

The hub's own library says what a file of the hub is and who may have it. The bytes of every file are fetched the same
way. Until they are checked they lie in a folder, in a file that is named after the content that it will have: its
SHA-256, or else the server's ETag. So a process that is killed leaves nothing that could be joined to other content.
"""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Literal
from urllib.parse import quote, unquote

import httpx2
import structlog
from huggingface_hub import HfFileMetadata, get_hf_file_metadata
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported without saying so

from service.errors import PullFailed, StoreNotWritable, WeightsDigestMismatch
from service.files import file_sha256
from service.store.cards import Origin
from service.store.folder import check_room, writing

log = structlog.get_logger(component="download")

Progress = Callable[[int, int | None], None]
DigestSource = Literal["publisher", "hub", "nobody"]

MAX_BACKOFF_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 300.0
_AGENT = {"user-agent": "pvt-serve"}
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STRONG_ETAG = re.compile(r'"[^"]{1,60}"')


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to give up: after `attempts` in a row without a new byte. Times are in seconds."""

    attempts: int = 5
    timeout_seconds: float = 30.0  # without a byte
    backoff_seconds: float = 1.0  # doubled each time


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRequest:
    """A file to download: its URL, the SHA-256 that was published for it, if any, and the most bytes it may have.

    A URL with `/resolve/` in its path is that of a file of a hub, which gets the user's token if `token` is set.
    `room_bytes` must be free besides its own bytes before it is downloaded.
    """

    url: str
    token: bool = False
    sha256: str | None = None
    max_bytes: int
    room_bytes: int = 0


class SourceFileMissing(PullFailed):
    """The server has no such file."""


def download(
    request: FileRequest,
    folder: Path,
    *,
    root: Path,
    on_progress: Progress = lambda _done, _total: None,
    stop: Event | None = None,
    policy: RetryPolicy = RetryPolicy(),
) -> tuple[Path, Origin]:
    """Download a file into `folder`, of this file alone, in the store at `root`. One caller at a time for each folder.

    `on_progress` is called with the number of bytes so far and, where known, of the whole file. Setting `stop` ends
    the download soon.

    Raises:
        PullFailed: it can't be downloaded; the message says why. The bytes so far are kept for the next time.
        WeightsDigestMismatch: the bytes, downloaded twice, have not the expected SHA-256; none are kept.
        StoreNotWritable: the folder can't be written, or has no room.
    """
    hook = partial(refuse_unencrypted, request.url)
    with httpx2.Client(
        follow_redirects=True, timeout=policy.timeout_seconds, event_hooks={"request": [hook]}
    ) as client:
        return _Transfer(client, request, folder, root, on_progress, stop or Event(), policy).run()


def refuse_unencrypted(url: str, redirect: httpx2.Request) -> None:
    """Raises PullFailed where HTTPS would go on as something else."""
    if url.startswith("https:") and redirect.url.scheme != "https":
        target = without_secrets(str(redirect.url))
        raise PullFailed(f"{without_secrets(url)} redirects to {target}, which is not encrypted; refused")


def without_secrets(url: str) -> str:
    """A URL for messages: without user, password and query."""
    return str(httpx2.URL(url).copy_with(username="", password="", query=None, fragment=None))


class _Retry(Exception):
    """The attempt failed, and the next one may succeed; `after_seconds` is when the server wants it."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


@dataclass(slots=True)
class _Transfer:
    """One call of `download`: attempts until one succeeds or the policy ends them."""

    client: httpx2.Client
    request: FileRequest
    folder: Path
    root: Path
    on_progress: Progress
    stop: Event
    policy: RetryPolicy
    # Mutable state: bytes that this attempt has received, and how often the whole file had a wrong digest.
    received: int = 0
    wrong_digests: int = 0

    def run(self) -> tuple[Path, Origin]:
        failed_attempts = 0
        while True:
            self.received = 0
            try:
                return self._attempt()
            except httpx2.UnsupportedProtocol as error:
                raise self._failure(f"{error}; it must begin with https:// or http://") from error
            except (_Retry, httpx2.TransportError) as error:
                failed_attempts = 0 if self.received else failed_attempts + 1
                reason = str(error) or type(error).__name__
                if failed_attempts >= self.policy.attempts:
                    raise self._failure(f"{reason}, {failed_attempts} times in a row; {self._kept()}") from error
                self._wait(reason, error.after_seconds if isinstance(error, _Retry) else None, failed_attempts)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise self._failure(f"{error}; {self._kept()}") from error

    def _attempt(self) -> tuple[Path, Origin]:
        known = self._metadata()
        hub_sha256 = known.etag if known and known.commit_hash and _SHA256.fullmatch(known.etag or "") else None
        expected, total = self.request.sha256 or hub_sha256, known.size if known else None
        if hub_sha256 not in {None, expected}:
            raise WeightsDigestMismatch(
                f"{self._url}: SHA-256 is {hub_sha256} by the hub's header, {expected} was published; "
                "nothing was fetched"
            )
        with writing(self.root):
            part = next((each for each in self.folder.glob("*") if _is_part_of(each, expected)), None)
            size = part.stat().st_size if part else 0
        if part is None or size != total:
            part = self._receive(expected, part, size, total)
        with writing(self.root):
            sha256, size = file_sha256(part), part.stat().st_size
        if not size:
            raise self._failure("the file is empty; try another --source")
        if expected not in {None, sha256}:
            raise self._wrong_digest(sha256, expected)
        digest_from: DigestSource = "publisher" if self.request.sha256 else "hub" if expected else "nobody"
        revision = known.commit_hash if known else None
        return part, Origin(url=self._url, sha256=sha256, bytes=size, digest_from=digest_from, revision=revision)

    def _metadata(self) -> HfFileMetadata | None:
        """What the hub says of the file; None where it is of no hub."""
        if "/resolve/" not in self.request.url:
            return None
        try:
            return get_hf_file_metadata(
                self.request.url, token=self._token, timeout=self.policy.timeout_seconds, headers=_AGENT
            )
        except OfflineModeIsEnabled as error:
            raise self._failure("HF_HUB_OFFLINE is set, which forbids it") from error
        except HfHubHTTPError as error:
            raise _refusal(error.response) from error

    def _wrong_digest(self, sha256: str, expected: str | None) -> Exception:
        discard(self.folder)
        self.wrong_digests += 1
        if self.wrong_digests == 1:
            return _Retry("the bytes have another SHA-256 than they should", 0.0)
        return WeightsDigestMismatch(
            f"{self._url}: SHA-256 is {sha256}, expected {expected}, twice; nothing was kept, try another --source"
        )

    def _receive(self, expected: str | None, part: Path | None, size: int, total: int | None) -> Path:
        """Fetch the bytes after the first `size`, which `part` has; the file that has them all."""
        headers = build_hf_headers(token=self._token, headers=_AGENT) | {"Accept-Encoding": "identity"}
        if part and size:
            headers |= {"Range": f"bytes={size}-"} | ({} if expected else {"If-Range": unquote(part.stem)})
        with self.client.stream("GET", self.request.url, headers=headers) as response:
            content_range = response.headers.get("content-range", "")
            if part and response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                if content_range == f"bytes */{size}":  # it is complete
                    return part
                raise self._changed()
            etag = response.headers.get("etag", "")
            name = expected or (quote(etag, safe="") if _STRONG_ETAG.fullmatch(etag) else "unnamed")
            path = self.folder / f"{name}{PurePosixPath(response.url.path).suffix}"
            if response.status_code == HTTPStatus.PARTIAL_CONTENT:
                if path != part or not content_range.startswith(f"bytes {size}-"):
                    raise self._changed()
                length = content_range.rpartition("/")[2]
            elif response.status_code == HTTPStatus.OK:
                size, length = 0, response.headers.get("content-length", "")
            else:
                raise _refusal(response)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise self._failure("it was sent compressed, which was not requested; try another --source")
            self._write(response, path, size, int(length) if length.isdecimal() else total)
        return path

    def _write(self, response: httpx2.Response, path: Path, start: int, total: int | None) -> None:
        """Write what the response has from byte `start` on, of `total` if that is known."""
        if total is not None and total > self.request.max_bytes:
            raise self._failure(f"{total} bytes, which no such model has (at most {self.request.max_bytes})")
        check_room(self.root, self.request.room_bytes + (total - start if total else 0))
        if start == 0:
            discard(self.folder)  # what is there is of other content
        try:
            with writing(self.root):
                self.folder.mkdir(parents=True, exist_ok=True)
                with path.open("ab" if start else "wb") as file:
                    for chunk in response.iter_raw():
                        size = start + self.received + len(chunk)
                        if self.stop.is_set():
                            raise self._failure(f"stopped; {self._kept()}")
                        if size > (total or self.request.max_bytes):
                            discard(self.folder)
                            raise self._failure("more bytes than it should have; nothing was kept")
                        file.write(chunk)
                        self.received += len(chunk)
                        self.on_progress(size, total)
        except StoreNotWritable:
            discard(self.folder)  # so that it does not go on filling the disk
            raise
        if total is not None and start + self.received < total:
            raise _Retry(f"cut off after {start + self.received} of {total} bytes")

    def _wait(self, reason: str, after_seconds: float | None, failed_attempts: int) -> None:
        """Wait before the next attempt: as long as the server wants, else a random time that grows."""
        if after_seconds is not None and after_seconds > MAX_RETRY_AFTER_SECONDS:
            raise self._failure(f"{reason}, and asks to come back in {after_seconds:.0f} s; {self._kept()}")
        backoff = min(self.policy.backoff_seconds * 2 ** max(failed_attempts - 1, 0), MAX_BACKOFF_SECONDS)
        seconds = after_seconds if after_seconds is not None else backoff * random.uniform(0.5, 1)  # noqa: S311  it is no secret
        log.warning("download_again", url=self._url, reason=reason, in_seconds=round(seconds, 1))
        if self.stop.wait(seconds):
            raise self._failure(f"stopped; {self._kept()}")

    def _changed(self) -> _Retry:
        discard(self.folder)
        return _Retry("it has changed since it was begun", 0.0)

    @property
    def _token(self) -> bool | None:
        return None if self.request.token else False  # None: the one of HF_TOKEN or of `hf auth login`, if any

    @property
    def _url(self) -> str:
        return without_secrets(self.request.url)

    def _failure(self, message: str) -> PullFailed:
        return PullFailed(f"{self._url}: {message}")

    def _kept(self) -> str:
        if kept := sum(part.stat().st_size for part in self.folder.glob("*")):
            return f"{kept / 1e6:.1f} MB are kept, pull again to go on from there"
        return "pull again to try anew; PVT_MIRROR names another server to ask"


def discard(folder: Path) -> None:
    """Delete what was downloaded into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_part_of(part: Path, sha256: str | None) -> bool:
    """Whether its content is, or begins, that with this digest; without a digest, whether a server can tell."""
    return part.stem == sha256 if sha256 else _STRONG_ETAG.fullmatch(unquote(part.stem)) is not None


def _refusal(response: httpx2.Response) -> Exception:
    """The error for a status that comes with no file."""
    code, url = response.status_code, without_secrets(str(response.url))
    if code in _RETRIED:
        return _Retry(f"{url} answers {code} {response.reason_phrase}", _retry_after(response))
    if code in {404, 410}:
        return SourceFileMissing(f"{url} answers {code}: there is no such file; try another --source")
    if code in {401, 403}:
        return PullFailed(
            f"{url} answers {code}: it requires credentials; a hub's are HF_TOKEN or 'hf auth login', else try another "
            "--source, or PVT_MIRROR"
        )
    return PullFailed(f"{url} answers {code} {response.reason_phrase}".rstrip() + ", which is no file")


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds: the header gives them, or a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
