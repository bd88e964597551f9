"""What a server's answer means for a download that may have begun before."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from service.acquisition.partial import Note
from service.errors import PullFailed

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Again(Exception):
    """It did not work this time; `after_seconds` is when the server asks to come back."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class Stale(Again):
    """What is here belongs to another file than the server has now."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, 0.0)


class SourceFileMissing(PullFailed):
    """The server has no such file."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes begins at byte `start` of the file of which `note` tells."""

    start: int
    note: Note


def shown(url: str) -> str:
    """A URL without what may be a secret in it."""
    return str(httpx.URL(url).copy_with(username="", password="", query=None, fragment=None))


def check(response: httpx.Response, size: int, before: Note) -> Reply:
    """How to go on from `size` bytes of the file of which `before` tells.

    Raises:
        Again: it is worth another attempt.
        PullFailed: it is not.
    """
    code, where = response.status_code, shown(str(response.url))
    if code in _AGAIN:
        raise Again(f"{where} answers {code} {response.reason_phrase}", _retry_after(response))
    if code in {404, 410}:
        raise SourceFileMissing(f"{where} answers {code}: there is no such file; try another --source")
    if code in {401, 403}:
        raise PullFailed(f"{where} answers {code}: it wants to know who asks; try another --source, or PVT_MIRROR")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise PullFailed(f"{where} sends the file compressed, though asked not to; try another --source")
    note = _note(response)
    if code == httpx.codes.OK:
        return Reply(0, note)
    if code == httpx.codes.PARTIAL_CONTENT and _continues(response, size, before, note):
        known = before.model_dump() | note.model_dump(exclude_none=True)
        return Reply(size, Note.model_validate(known))
    if code in {httpx.codes.PARTIAL_CONTENT, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE}:
        raise Stale("it has changed since it was begun")
    raise PullFailed(f"{where} answers {code} {response.reason_phrase}".rstrip() + ", which is no file")


def _continues(response: httpx.Response, size: int, before: Note, now: Note) -> bool:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    same = all(
        old is None or new is None or old == new
        for old, new in ((before.etag, now.etag), (before.total, now.total), (before.sha256, now.sha256))
    )
    return found is not None and int(found[1]) == size and same


def _note(response: httpx.Response) -> Note:
    """From the answer, and from the redirects before it: the hub tells of a file where it redirects to its bytes."""
    said: dict[str, str] = {}
    for each in (*response.history, response):
        for name in ("x-linked-etag", "x-linked-size", "x-repo-commit"):
            if value := each.headers.get(name):
                said[name] = value
    sha256 = said.get("x-linked-etag", "").removeprefix("W/").strip('"').lower()
    return Note(
        etag=response.headers.get("etag"),
        total=_total(response) or _number(said.get("x-linked-size")),
        sha256=sha256 if _SHA256.fullmatch(sha256) else None,
        revision=said.get("x-repo-commit"),
    )


def _total(response: httpx.Response) -> int | None:
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        return _number(found[3]) if found else None
    return _number(response.headers.get("content-length"))


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds: the header gives them, or a date."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
