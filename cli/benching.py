"""`pvt-serve bench`."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from time import perf_counter
from typing import Annotated

import numpy as np
import typer

from cli import options
from cli.files import pictures
from cli.terminal import SOME_BAD, CommandError, print_line, run
from pvt_client import AsyncClient, ConnectionFailed, ConnectionLost, PvtError, Retries
from pvt_client.options import PredictOptions

_MADE, _SIZE, _COARSE = 32, (640, 427), (21, 14)
_MOST = 256  # pictures held in memory
_TRAILER = 8  # bytes behind a picture, which decoders do not read
_PATIENCE_SECONDS = 600.0


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Server")(bench)


@dataclass
class _Seen:
    """Seconds that each answer took, and how many failed in which way."""

    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)


def bench(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILES|DIR|GLOB]...", help="Pictures to send; random ones of 640x427 by default."),
    ] = None,
    url: Annotated[
        str, typer.Option(envvar="PVTSERVE_URL", metavar="URL", help="The service.")
    ] = "http://127.0.0.1:8000",
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="How long to ask.")] = 10,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="Requests at the same time.")] = 8,
    model: options.Model = None,
    size: options.Size = None,
    api_key: options.ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write the figures as JSON.")] = False,
) -> None:
    """Measure how many pictures a second a service answers, and how soon.

    No two requests carry the same bytes, so that no cache helps. A refused request counts as failed, and the exit code
    is then 3. One process asks: what it uses of the processor is missing to a service on the same machine, and it may
    not keep a very fast one busy.
    """
    bodies = _read(files) if files else _random()
    asked = PredictOptions(model=model, size=size)
    seen, took = run(_load(url, api_key, bodies, asked, seconds, concurrency))
    figures = _figures(seen, took, concurrency)
    print_line(json.dumps(figures) if as_json else _told(figures))
    if seen.failures:
        raise typer.Exit(SOME_BAD)


def _read(files: Sequence[str]) -> list[bytes]:
    return [path.read_bytes() for path, _ in zip(pictures(files), range(_MOST), strict=False)]


def _random() -> list[bytes]:
    """JPEGs of soft blots with some grain, which compress like photos."""
    from PIL import Image  # noqa: PLC0415  --help need not wait for it

    random, made = np.random.default_rng(), []
    for _ in range(_MADE):
        blots = Image.fromarray(random.integers(0, 256, (*_COARSE[::-1], 3), np.uint8)).resize(_SIZE)
        grain = random.normal(0, 6, (*_SIZE[::-1], 3))
        buffer = BytesIO()
        Image.fromarray(np.clip(np.asarray(blots) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def _different(bodies: Sequence[bytes]) -> Iterator[bytes]:
    """`bodies` over and over, each time with other bytes behind the picture."""
    for number in count():
        yield bodies[number % len(bodies)] + number.to_bytes(_TRAILER, "big")


async def _load(
    url: str,
    api_key: str | None,
    bodies: Sequence[bytes],
    asked: PredictOptions,
    seconds: float,
    concurrency: int,
) -> tuple[_Seen, float]:
    """Ask for `seconds`; what came, and how long it took to the last answer."""
    seen, images = _Seen(), _different(bodies)
    async with AsyncClient(url, api_key=api_key, timeout=_PATIENCE_SECONDS, retries=Retries(attempts=1)) as client:
        await client.predict(next(images), **asked)
        start = perf_counter()

        async def ask() -> None:
            while (begun := perf_counter()) < start + seconds:
                try:
                    await client.predict(next(images), **asked)
                except PvtError as error:
                    if isinstance(error, ConnectionFailed) and not isinstance(error, ConnectionLost):
                        raise  # nobody is there any more
                    seen.failures[type(error).__name__] += 1
                else:
                    seen.seconds.append(perf_counter() - begun)

        await asyncio.gather(*(ask() for _ in range(concurrency)))
        return seen, perf_counter() - start


def _figures(seen: _Seen, took: float, concurrency: int) -> dict[str, object]:
    if not seen.seconds:
        raise CommandError(f"no picture was answered: {_counts(seen.failures)}")
    p50, p90, p99 = (round(float(each) * 1000, 2) for each in np.percentile(seen.seconds, [50, 90, 99]))
    return {
        "seconds": round(took, 2),
        "concurrency": concurrency,
        "images": len(seen.seconds),
        "images_per_second": round(len(seen.seconds) / took, 1),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "failed": dict(seen.failures),
    }


def _told(figures: dict[str, object]) -> str:
    shown = "{images_per_second} images/s   p50 {p50_ms} ms   p90 {p90_ms} ms   p99 {p99_ms} ms\n".format(**figures)
    shown += "{images} images in {seconds} s, {concurrency} at a time".format(**figures)
    failed = figures["failed"]
    return f"{shown}; failed: {_counts(Counter(failed))}" if isinstance(failed, dict) and failed else shown


def _counts(failures: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in failures.most_common()) or "none"
