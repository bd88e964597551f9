"""Downloads one file: resumes it, tries again after errors, and checks its SHA-256.

The hub's own library says what a file of the hub is and who may have it. The bytes of every file are fetched the same
way. They lie in a folder, in a file that is named after its whole content: the SHA-256, or else the server's ETag. So
what a killed process leaves is never joined to other content.
"""

import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from threading import Event
from urllib.parse import quote, unquote, urlsplit

import httpx2
import structlog
from huggingface_hub import HfFileMetadata, get_hf_file_metadata, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported without saying so

from service.errors import PullFailed, StoreNotWritable, WeightsDigestMismatch
from service.files import file_sha256
from service.store.cards import Origin
from service.store.folder import check_room, writing

log = structlog.get_logger(component="download")

Progress = Callable[[int, int | None], None]

MAX_BACKOFF_SECONDS, MAX_RETRY_AFTER_SECONDS = 30.0, 300.0
_AGENT = {"user-agent": "pvt-serve"}
_RETRIED = {408, 425, 429, 500, 502, 503, 504}
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What to do about a refusal, by the hub's own code for it.
_ANY_CREDENTIALS = (
    "it requires credentials; a hub's are HF_TOKEN or 'hf auth login', else try another --source, or PVT_MIRROR"
)
_CREDENTIALS = {
    "GatedRepo": "it requires credentials; a hub's are HF_TOKEN or 'hf auth login', of an account that accepted the "
    "terms on its page of the hub; else try another --source, or PVT_MIRROR",
    "RepoNotFound": "there is no such repository, or it is private and requires credentials: check its name, then set "
    "HF_TOKEN or 'hf auth login'",
}
_STRONG_ETAG = re.compile(r'"[^"]{1,60}"')


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When to give up: after `attempts` in a row without a new byte. Times are in seconds."""

    attempts: int = 5
    timeout_seconds: float = 30.0  # without a byte
    backoff_seconds: float = 1.0  # doubled each time


class SourceFileMissing(PullFailed):
    """The server has no such file."""


class _Retry(Exception):
    """The attempt failed, and the next one may succeed; `after_seconds` is when the server wants it."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


@dataclass(slots=True, kw_only=True)
class Download:
    """The download of `url` into `folder`, which is for this file alone, in the store at `root`.

    Args:
        url: with `/resolve/` in its path, it is that of a file of a hub.
        token: whether the hub gets the user's token.
        sha256: the SHA-256 that was published, if any was.
        max_bytes: the most bytes that the file may have.
        room_bytes: what must be free besides the file's own bytes before it is downloaded.
        on_progress: called with the number of bytes so far and, where known, of the whole file.
        stop: ends the download soon when it is set.
    """

    url: str
    folder: Path
    root: Path
    max_bytes: int
    room_bytes: int = 0
    sha256: str | None = None
    token: bool = False
    on_progress: Progress = lambda _done, _total: None
    stop: Event = field(default_factory=Event)
    policy: RetryPolicy = RetryPolicy()
    # Mutable state: bytes that this attempt has received, and how often the whole file had a wrong digest.
    _received: int = field(default=0, init=False)
    _wrong_digests: int = field(default=0, init=False)

    def run(self) -> tuple[Path, Origin]:
        """The downloaded file, and where it comes from. One caller at a time for each folder.

        Raises:
            PullFailed: it can't be downloaded; the message says why. The bytes so far are kept for the next time.
            WeightsDigestMismatch: the bytes, downloaded twice, have not the expected SHA-256; none are kept.
            StoreNotWritable: the folder can't be written, or has no room.
        """
        failed_attempts = 0
        while True:
            self._received = 0
            try:
                return self._attempt()
            except httpx2.UnsupportedProtocol as error:
                raise self._failure(f"{error}; it must begin with https:// or http://") from error
            except (_Retry, httpx2.TransportError) as error:
                failed_attempts = 0 if self._received else failed_attempts + 1
                reason = str(error) or type(error).__name__
                if failed_attempts >= self.policy.attempts:
                    raise self._failure(f"{reason}, {failed_attempts} times in a row; {self._kept()}") from error
                self._wait(reason, error.after_seconds if isinstance(error, _Retry) else None, failed_attempts)
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise self._failure(f"{error}; {self._kept()}") from error

    def _attempt(self) -> tuple[Path, Origin]:
        known = self._metadata()
        hub_sha256 = known.etag if known and known.commit_hash and _SHA256.fullmatch(known.etag or "") else None
        expected, total = self.sha256 or hub_sha256, known.size if known else None
        if hub_sha256 not in {None, expected}:
            raise WeightsDigestMismatch(
                f"{self._name}: SHA-256 is {hub_sha256} by the hub's header, {expected} was published; "
                "nothing was fetched"
            )
        with writing(self.root):
            part = next((each for each in self.folder.glob("*") if _begins(each, expected)), None)
            size = part.stat().st_size if part else 0
        if part is None or size != total:
            part = self._fetch(expected, part, size, total)
        with writing(self.root):
            sha256, size = file_sha256(part), part.stat().st_size
        if not size:
            raise self._failure("the file is empty; try another --source")
        if expected not in {None, sha256}:
            discard(self.folder)
            self._wrong_digests += 1
            if self._wrong_digests == 1:
                raise _Retry("the bytes have another SHA-256 than they should", 0.0)
            raise WeightsDigestMismatch(
                f"{self._name}: SHA-256 is {sha256}, expected {expected}, twice; nothing was kept, try another --source"
            )
        return part, Origin(
            url=self._name,
            sha256=sha256,
            bytes=size,
            digest_from="publisher" if self.sha256 else "hub" if expected else "nobody",
            revision=known.commit_hash if known else None,
        )

    def _metadata(self) -> HfFileMetadata | None:
        """What the hub says of the file; None where it is of no hub."""
        if self.token and is_offline_mode():
            raise self._failure("HF_HUB_OFFLINE is set, which forbids it")
        if "/resolve/" not in self.url:
            return None
        timeout = self.policy.timeout_seconds
        try:
            return get_hf_file_metadata(self.url, token=None if self.token else False, timeout=timeout, headers=_AGENT)
        except OfflineModeIsEnabled as error:
            raise self._failure("HF_HUB_OFFLINE is set, which forbids it") from error
        except HfHubHTTPError as error:
            raise _refusal(error.response) from error

    def _fetch(self, expected: str | None, part: Path | None, size: int, total: int | None) -> Path:
        """Fetch the bytes after the first `size`, which `part` has; the file that has them all."""
        headers = build_hf_headers(token=None if self.token else False, headers=_AGENT)
        headers["Accept-Encoding"] = "identity"
        if part and size:
            headers |= {"Range": f"bytes={size}-"} | ({} if expected else {"If-Range": unquote(part.stem)})
        hooks = {"request": [self._refuse_unencrypted]}
        with (
            httpx2.Client(follow_redirects=True, timeout=self.policy.timeout_seconds, event_hooks=hooks) as client,
            client.stream("GET", self.url, headers=headers) as response,
        ):
            content_range, etag = (response.headers.get(name, "") for name in ("content-range", "etag"))
            if part and (response.status_code, content_range) == (416, f"bytes */{size}"):
                return part  # it has them all already
            name = expected or (quote(etag, safe="") if _STRONG_ETAG.fullmatch(etag) else "unnamed")
            path = self.folder / f"{name}{PurePosixPath(urlsplit(self.url).path).suffix}"
            code, continued = response.status_code, content_range.startswith(f"bytes {size}-")
            resumed = code == HTTPStatus.PARTIAL_CONTENT and path == part and continued
            if code in {206, 416} and not resumed:
                discard(self.folder)
                raise _Retry("it has changed since it was begun", 0.0)
            if code not in {200, 206}:
                raise _refusal(response)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise self._failure("it was sent compressed, which was not requested; try another --source")
            length = content_range.rpartition("/")[2] if resumed else response.headers.get("content-length", "")
            self._write(response, path, size if resumed else 0, int(length) if length.isdecimal() else total)
        return path

    def _refuse_unencrypted(self, request: httpx2.Request) -> None:
        """Raises PullFailed where a redirect leads from HTTPS to anything else."""
        if self.url.startswith("https:") and request.url.scheme != "https":
            redirect = without_secrets(str(request.url))
            raise PullFailed(f"{self._name} redirects to {redirect}, which is not encrypted; refused")

    def _write(self, response: httpx2.Response, path: Path, start: int, total: int | None) -> None:
        """Write what the response has from byte `start` on, of `total` if that is known."""
        if total is not None and total > self.max_bytes:
            raise self._failure(f"{total} bytes, which no such model has (at most {self.max_bytes})")
        check_room(self.root, self.room_bytes + (total - start if total else 0))
        if start == 0:
            discard(self.folder)  # what it holds is of other content
        size = start
        try:
            with writing(self.root):
                self.folder.mkdir(parents=True, exist_ok=True)
                with path.open("ab" if start else "wb") as file:
                    for chunk in response.iter_raw():
                        if self.stop.is_set():
                            raise self._failure(f"stopped; {self._kept()}")
                        size += len(chunk)
                        if size > (total or self.max_bytes):
                            discard(self.folder)
                            raise self._failure("more bytes than it should have; nothing was kept")
                        file.write(chunk)
                        self._received += len(chunk)
                        self.on_progress(size, total)
        except StoreNotWritable:
            discard(self.folder)  # so that it does not go on filling the disk
            raise
        if total is not None and size < total:
            raise _Retry(f"cut off after {size} of {total} bytes")

    def _wait(self, reason: str, after_seconds: float | None, failed_attempts: int) -> None:
        """Wait before the next attempt: as long as the server wants, else a random time that grows."""
        backoff = min(self.policy.backoff_seconds * 2 ** max(failed_attempts - 1, 0), MAX_BACKOFF_SECONDS)
        seconds = backoff * random.uniform(0.5, 1) if after_seconds is None else after_seconds  # noqa: S311  no secret
        if seconds > MAX_RETRY_AFTER_SECONDS:
            raise self._failure(f"{reason}, and asks to come back in {seconds:.0f} s; {self._kept()}")
        log.warning("download_again", url=self._name, reason=reason, in_seconds=round(seconds, 1))
        if self.stop.wait(seconds):
            raise self._failure(f"stopped; {self._kept()}")

    @property
    def _name(self) -> str:
        return without_secrets(self.url)

    def _failure(self, message: str) -> PullFailed:
        return PullFailed(f"{self._name}: {message}")

    def _kept(self) -> str:
        if kept := sum(part.stat().st_size for part in self.folder.glob("*")):
            return f"{kept / 1e6:.1f} MB are kept, pull again to go on from there"
        return "pull again to try anew; PVT_MIRROR names another server to ask"


def discard(folder: Path) -> None:
    """Delete what was downloaded into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)


def without_secrets(url: str) -> str:
    """A URL for messages: without user, password and query."""
    return str(httpx2.URL(url).copy_with(username="", password="", query=None, fragment=None))


def _begins(part: Path, sha256: str | None) -> bool:
    """Whether its content is, or begins, that with this digest; without a digest, whether a server can tell."""
    return part.stem == sha256 if sha256 else _STRONG_ETAG.fullmatch(unquote(part.stem)) is not None


def _refusal(response: httpx2.Response) -> Exception:
    """The error for a status that comes with no file."""
    code, url = response.status_code, without_secrets(str(response.url))
    if code in _RETRIED:
        return _Retry(f"{url} answers {code} {response.reason_phrase}", _retry_after(response))
    kind = response.headers.get("x-error-code", "")
    what = {"RepoNotFound": "repository", "RevisionNotFound": "revision"}.get(kind, "file")
    if code in {404, 410}:
        return SourceFileMissing(f"{url} answers {code}: there is no such {what}; try another --source")
    if code in {401, 403}:
        return PullFailed(f"{url} answers {code}: {_CREDENTIALS.get(kind, _ANY_CREDENTIALS)}{_of_token()}")
    return PullFailed(f"{url} answers {code} {response.reason_phrase}".rstrip() + ", which is no file")


def _of_token() -> str:
    return " (the token that is set does not suffice)" if get_token() else ""


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds: the header gives them, or a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
