"""The load of a soak: callers of every kind, good and bad, whose answers are checked."""

import asyncio
import io
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from PIL import Image

from bench.server import ROOT

MODEL, SECOND = "pvt_v2_b0.digits", "pvt_v2_b0.second"
MANAGEMENT_KEY = "soak-key"
PREDICTING = 2  # callers
_PAUSE_SECONDS = 0.02  # of each caller after an answer: the load is steady, not the most that fits
_SLOW_SECONDS = 2.0  # of one slow upload
_RELOAD_SECONDS = 4.0
WARM_SECONDS = 60.0
_TYPE = "application/octet-stream"
_BUSY = frozenset({429, 503})
_MOST_WRONG = 20
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(slots=True)
class Tally:
    """What came of the requests: by kind of load how many were good or refused, and what was wrong. Mutable."""

    good: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)

    def add(self, kind: str, answer: httpx.Response, good: Callable[[httpx.Response], bool]) -> None:
        """Count `answer`; refusals are good only with `Retry-After`."""
        if answer.status_code in _BUSY and "Retry-After" in answer.headers:
            self.refused[kind] += 1
        elif good(answer):
            self.good[kind] += 1
        else:
            self.note(f"{kind}: {answer.status_code} {answer.text[:200]}")

    def note(self, what: str) -> None:
        """Something that was wrong; the first ones are kept."""
        if len(self.wrong) < _MOST_WRONG:
            self.wrong.append(what)


def images() -> list[tuple[str, bytes]]:
    """Digits with their labels, each as a PNG and as JPEGs of three sizes."""
    found = []
    for label, word in enumerate(_WORDS):
        data = (ROOT / "docs" / "digits" / f"{word}.png").read_bytes()
        found.append((str(label), data))
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for side in (96, 320, 1024):
            file = io.BytesIO()
            image.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
            found.append((str(label), file.getvalue()))
    return found


def _labelled(label: str) -> Callable[[httpx.Response], bool]:
    def good(answer: httpx.Response) -> bool:
        return answer.is_success and answer.json()["results"][0]["predictions"][0]["label"] == label

    return good


class Load(AbstractAsyncContextManager["Load"]):
    """All callers at once, from entry to exit."""

    def __init__(self, url: str, tally: Tally, reloads: int = 2) -> None:
        """It is warm after so many `reloads` of the second model."""
        self._tally = tally
        self._reloads = reloads
        self._address = urlsplit(url)
        self._client = httpx.AsyncClient(base_url=url, timeout=60)
        self._images = images()
        self._embeddings: dict[int, list[float]] = {}
        self._warm, self._ending = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        callers = [*[self._predict] * PREDICTING, self._features, self._explain, self._bad, self._hang_up, self._slow,
                   self._reload]  # fmt: skip
        self._tasks = [asyncio.create_task(self._repeat(caller)) for caller in callers]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Every request under way is answered first."""
        self.end()
        await asyncio.gather(*self._tasks)
        await self._client.aclose()

    def end(self) -> None:
        """Begin no other request."""
        self._ending.set()

    async def warm(self) -> None:
        """Return when every kind of load has run, and the second model often enough; or after `WARM_SECONDS`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._warm.wait(), WARM_SECONDS)
        self._tally.latencies_ms.clear()

    async def _repeat(self, call: Callable[[int], Awaitable[None]]) -> None:
        for number in count():
            if self._ending.is_set():
                return
            try:
                await call(number)
            except (OSError, httpx.HTTPError, asyncio.IncompleteReadError) as error:
                self._tally.note(f"{call.__name__.strip('_')}: {error!r}")
            await asyncio.sleep(_PAUSE_SECONDS)

    def _image(self, number: int) -> tuple[str, bytes]:
        return self._images[number % len(self._images)]

    async def _post(self, path: str, data: bytes, **headers: str) -> httpx.Response:
        return await self._client.post(path, content=data, headers={"Content-Type": _TYPE, **headers})

    async def _predict(self, number: int) -> None:
        label, data = self._image(number)
        start = perf_counter()
        answer = await self._post("/predict", data)
        self._tally.latencies_ms.append((perf_counter() - start) * 1000)
        self._tally.add("predictions", answer, _labelled(label))

    async def _features(self, number: int) -> None:
        index = number % len(self._images)

        def good(answer: httpx.Response) -> bool:
            if not answer.is_success:
                return False
            embedding: list[float] = answer.json()["results"][0]["embedding"]
            first = self._embeddings.setdefault(index, embedding)
            scale = max(map(abs, first))
            return max(abs(one - other) for one, other in zip(first, embedding, strict=True)) < 0.05 * scale

        self._tally.add("features", await self._post("/features", self._image(index)[1]), good)

    async def _explain(self, number: int) -> None:
        answer = await self._post("/explain", self._image(number)[1])
        self._tally.add("explanations", answer, lambda it: it.is_success and it.content.startswith(b"\x89PNG"))

    async def _bad(self, number: int) -> None:
        _, data = self._image(number)
        bad = (data[: len(data) // 2], b"no image", b"")[number % 3]
        self._tally.add("bad images", await self._post("/predict", bad), lambda it: it.status_code == httpx.codes(422))

    async def _connect(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which the head of a request with the body `data` was sent."""
        host, port = self._address.hostname, self._address.port
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: {_TYPE}\r\nContent-Length: {len(data)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode())
        return reader, writer

    async def _hang_up(self, number: int) -> None:
        _, data = self._image(number)
        _, writer = await self._connect(data)
        writer.write(data[: len(data) // (1 + number % 2)])  # within the body, or after it
        await writer.drain()
        await asyncio.sleep(0.001 * (number % 10))
        writer.transport.abort()
        self._tally.good["hang-ups"] += 1

    async def _slow(self, number: int) -> None:
        label, data = self._image(4 * number + 3)
        reader, writer = await self._connect(data)
        size = -(-len(data) // 20)
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(_SLOW_SECONDS / 20)
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
        head, _, body = raw.partition(b"\r\n\r\n")
        fields: Any = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
        answer = httpx.Response(int(head.split()[1]), headers=fields, content=body)
        self._tally.add("slow uploads", answer, _labelled(label))

    async def _reload(self, number: int) -> None:
        label, data = self._image(number)
        answer = await self._post(f"/predict?model={SECOND}", data)
        self._tally.add("predictions of a model that is loaded for them", answer, _labelled(label))
        headers = {"Authorization": f"Bearer {MANAGEMENT_KEY}"}
        unloaded = await self._client.post(f"/models/{SECOND}/unload", headers=headers)
        self._tally.add("unloads", unloaded, lambda it: it.is_success)
        if number + 1 >= self._reloads:
            self._warm.set()
        await asyncio.sleep(_RELOAD_SECONDS)
