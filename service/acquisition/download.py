"""One file over HTTP onto this machine: resumed, tried again, and held against its SHA-256.

What is there of it lies in `<name>.part`, with what is known of it in `<name>.json`, until all of it is there and
checked. A process that is killed leaves both, and the next one goes on from there.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from ssl import SSLContext
from threading import Event
from typing import Literal

import httpx
import structlog

from service.acquisition.partial import Part
from service.acquisition.replies import Again, Reply, Stale, check, shown
from service.errors import PullFailed, WeightsDigestMismatch
from service.store.writes import check_room, writing

log = structlog.get_logger(component="download")

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to go on: `attempts` in a row that bring nothing, and times in seconds."""

    attempts: int = 5
    timeout_seconds: float = 30.0  # without a byte
    backoff_seconds: float = 1.0  # doubled each time
    max_backoff_seconds: float = 30.0
    max_retry_after_seconds: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A file: its URL, the SHA-256 its bytes must have, if that was published, and how many it may have at most.

    `room` is how many bytes beside its own must be free before it is fetched.
    """

    url: str
    sha256: str | None = None
    max_bytes: int
    room: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is here, and what is known of it.

    `digest_from` says who gave the SHA-256 that it has been held against; None: nobody did.
    """

    path: Path
    sha256: str
    bytes: int
    digest_from: Literal["publisher", "hub"] | None
    revision: str | None


def download(
    wanted: Wanted,
    target: Path,
    *,
    root: Path,
    tell: Progress = lambda _done, _total: None,
    stop: Event | None = None,
    patience: Patience = Patience(),
) -> Fetched:
    """Fetch `wanted` to `target`, in the store at `root`; it appears whole. One caller at a time for each target.

    `tell` is called with the bytes that are here and, where known, of how many. Setting `stop` gives up soon.

    Raises:
        PullFailed: it can't be had; the message says why, and what is here is kept for the next time.
        WeightsDigestMismatch: the bytes, fetched twice, are not those they should be; none are kept.
        StoreNotWritable: the folder of `target` can't be written, or has no room.
    """
    stop = stop or Event()
    with httpx.Client(
        follow_redirects=True,
        verify=_certificates(),
        timeout=patience.timeout_seconds,
        headers={"Accept-Encoding": "identity", "User-Agent": "pvt-serve"},
        event_hooks={"request": [_secure(wanted.url)]},
    ) as client:
        return _Transfer(client, wanted, Part(target), root=root, tell=tell, stop=stop, patience=patience).run()


@cache
def _certificates() -> SSLContext:
    """Read once: that takes longer than a small file."""
    return httpx.create_ssl_context()


def _secure(url: str) -> Callable[[httpx.Request], None]:
    """What is asked for over TLS is not fetched without it because of a redirect."""

    def hook(request: httpx.Request) -> None:
        if url.startswith("https:") and request.url.scheme != "https":
            raise PullFailed(f"{shown(url)} redirects to {shown(str(request.url))}, which is not encrypted; refused")

    return hook


class _Transfer:
    def __init__(
        self,
        client: httpx.Client,
        wanted: Wanted,
        part: Part,
        *,
        root: Path,
        tell: Progress,
        stop: Event,
        patience: Patience,
    ) -> None:
        self._client = client
        self._wanted = wanted
        self._part = part
        self._root = root
        self._tell = tell
        self._stop = stop
        self._patience = patience
        # Mutable state: how often the whole file was here and was not what it should be.
        self._spoiled = 0

    def run(self) -> Fetched:
        fruitless = 0
        while True:
            with writing(self._root):
                before = self._part.open()
            try:
                return self._attempt()
            except httpx.UnsupportedProtocol as error:
                raise PullFailed(
                    f"{shown(self._wanted.url)}: {error}; it must begin with https:// or http://"
                ) from error
            except (Again, httpx.TransportError) as error:
                if isinstance(error, Stale):
                    self._part.drop()
                fruitless = 0 if self._part.size > before else fruitless + 1
                reason = str(error) or type(error).__name__
                if fruitless >= self._patience.attempts:
                    raise PullFailed(
                        f"{shown(self._wanted.url)}: {reason}, {fruitless} times in a row; {self._kept()}"
                    ) from error
                self._pause(reason, error.after_seconds if isinstance(error, Again) else None, fruitless)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise PullFailed(f"{shown(self._wanted.url)}: {error}; {self._kept()}") from error
            finally:
                self._part.close()

    def _attempt(self) -> Fetched:
        part = self._part
        if part.whole:
            return self._checked()
        with self._client.stream("GET", self._wanted.url, headers=part.conditions(self._digest())) as response:
            reply = check(response, part.size, part.note)
            self._expect(reply)
            with writing(self._root):
                part.go_on(reply.start, reply.note)
            for chunk in response.iter_raw():
                self._take(chunk, reply)
        if part.size == 0:
            raise PullFailed(f"{shown(self._wanted.url)}: the file is empty; try another --source")
        if reply.note.total is not None and part.size < reply.note.total:
            raise Again(f"cut off after {part.size} of {reply.note.total} bytes")
        return self._checked()

    def _expect(self, reply: Reply) -> None:
        """Refuse before a byte is fetched what can't be right, or has no room."""
        total, most = reply.note.total, self._wanted.max_bytes
        if total is not None and total > most:
            raise PullFailed(f"{shown(self._wanted.url)}: {total} bytes, which no such model has (at most {most})")
        if self._wanted.sha256 and reply.note.sha256 not in {None, self._wanted.sha256}:
            raise WeightsDigestMismatch(
                f"{shown(self._wanted.url)}: SHA-256 is {reply.note.sha256} by the hub's header, "
                f"{self._wanted.sha256} was published; nothing was fetched"
            )
        check_room(self._root, self._wanted.room + (total or 0) - (reply.start if total else 0))

    def _take(self, chunk: bytes, reply: Reply) -> None:
        if self._stop.is_set():
            raise PullFailed(f"{shown(self._wanted.url)}: stopped; {self._kept()}")
        if self._part.size + len(chunk) > (reply.note.total or self._wanted.max_bytes):
            self._part.drop()
            raise PullFailed(f"{shown(self._wanted.url)}: more bytes than it should have; nothing was kept")
        try:
            with writing(self._root):
                self._part.add(chunk)
        except Exception:
            self._part.drop()  # what fills a disk is not left on it
            raise
        self._tell(self._part.size, reply.note.total)

    def _digest(self) -> str | None:
        """The SHA-256 that the file must have, as far as that is known."""
        return self._wanted.sha256 or self._part.note.sha256

    def _checked(self) -> Fetched:
        """The file, if it is what it should be; else it is fetched once more, from its beginning."""
        part, wanted = self._part, self._digest()
        actual = part.sha256()
        if wanted and actual != wanted:
            part.drop()
            self._spoiled += 1
            if self._spoiled == 1:
                raise Again("the bytes have another SHA-256 than they should", 0.0)
            raise WeightsDigestMismatch(
                f"{shown(self._wanted.url)}: SHA-256 is {actual}, expected {wanted}, twice; nothing was kept, try "
                "another --source"
            )
        digest_from: Literal["publisher", "hub"] | None = None
        if wanted:
            digest_from = "publisher" if self._wanted.sha256 else "hub"
        size, revision = part.size, part.note.revision
        with writing(self._root):
            part.finish()
        return Fetched(part.target, actual, size, digest_from, revision)

    def _pause(self, reason: str, after: float | None, fruitless: int) -> None:
        patience = self._patience
        if after is not None and after > patience.max_retry_after_seconds:
            raise PullFailed(
                f"{shown(self._wanted.url)}: {reason}, and asks to come back in {after:.0f} s; {self._kept()}"
            )
        backoff = min(patience.backoff_seconds * 2 ** max(fruitless - 1, 0), patience.max_backoff_seconds)
        seconds = after if after is not None else backoff * random.uniform(0.5, 1)  # noqa: S311  it is no secret
        log.warning("download_again", url=shown(self._wanted.url), reason=reason, in_seconds=round(seconds, 1))
        if self._stop.wait(seconds):
            raise PullFailed(f"{shown(self._wanted.url)}: stopped; {self._kept()}")

    def _kept(self) -> str:
        size = self._part.size
        if size:
            return f"{size / 1e6:.1f} MB are kept, pull again to go on from there"
        return "pull again to try anew; PVT_MIRROR names another server to ask"
