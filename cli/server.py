"""`pvt-serve serve`, and `pvt-serve bench`, which measures a service."""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from cli import KEY_VARIABLE, URL_VARIABLE, options
from cli.terminal import SOME_FAILED, USAGE, CommandError, print_line

if TYPE_CHECKING:
    from cli.inputs import Source
    from pvt_client.calls import CommonOptions

_RANDOM_IMAGES, _SIZE, _COARSE = 32, (640, 427), (21, 14)
_MAX_IMAGES = 256  # held in memory
_TRAILER = 8  # bytes after an image, which decoders do not read; they differ from request to request


def serve(
    host: Annotated[
        str | None, Option(help="Address to listen on; 0.0.0.0 or :: for all, unix:/path for a socket.  [PVT_HOST]")
    ] = None,
    port: Annotated[int | None, Option(help="Port to listen on; 0 takes a free one.  [PVT_PORT]")] = None,
    workers: Annotated[int | None, Option(help="Processes that share the port.  [PVT_WORKERS]")] = None,
    model_store: Annotated[str | None, Option(help="The model store.  [PVT_MODEL_STORE]")] = None,
    preload: Annotated[str | None, Option(help="Models to load at start, a,b,c.  [PVT_PRELOAD]")] = None,
) -> None:
    """Serve models over HTTP until Ctrl-C.

    The same as `python -m app`. Every other setting is an environment variable, see docs/settings.md; an option
    given here wins over its variable. On a terminal the log is text and begins with the addresses to open.
    """
    given = {"HOST": host, "PORT": port, "WORKERS": workers, "MODEL_STORE": model_store, "PRELOAD": preload}
    # Worker processes read them there, too.
    os.environ.update({f"PVT_{name}": str(value) for name, value in given.items() if value is not None})
    os.environ.pop(URL_VARIABLE, None)  # which other commands read
    if os.environ.pop(KEY_VARIABLE, None) and not {"PVT_API_KEYS", "PVT_MANAGEMENT_KEYS"} & {*os.environ}:
        raise CommandError(
            f"{KEY_VARIABLE} is the key that commands send, and locks no service: set PVT_API_KEYS or "
            f"PVT_MANAGEMENT_KEYS for that, or unset {KEY_VARIABLE}",
            USAGE,
        )
    from app.starting import Starting

    starting = Starting()
    from app.__main__ import StartRefused, serve

    try:
        code = serve(starting)
    except StartRefused as error:
        raise CommandError(str(error), USAGE) from error
    raise Exit(code)


def bench(
    files: Annotated[
        list[str] | None,
        Argument(metavar="[FILES|DIR|GLOB|-]...", help="Images to send; random ones of 640x427 by default."),
    ] = None,
    files_from: options.FilesFrom = None,
    url: options.ServiceUrl = None,
    seconds: Annotated[float, Option(min=0.1, max=3600, help="How long to send requests.")] = 10,
    concurrency: Annotated[int, Option(min=1, max=1024, help="Requests at the same time.")] = 8,
    model: options.Model = None,
    size: options.Size = None,
    key: options.Key = None,
    as_json: Annotated[bool, Option("--json", help="Write the figures as JSON.")] = False,
) -> None:
    """Measure the throughput and latency of a service.

    No two requests carry the same bytes, so that no cache helps. A refused request counts as failed, and the exit code
    is then 3. One process sends the requests: on the same machine it takes processor time from the service, and it may
    not keep a very fast service busy.
    """
    import numpy as np

    from cli.checks import check_size
    from cli.environment import service_url
    from cli.inputs import images
    from cli.terminal import spinner
    from pvt_client.calls import CommonOptions

    check_size(size)
    named = images(files, files_from) if files or files_from is not None else ()
    bodies = [_bytes(each) for each in islice(named, _MAX_IMAGES)] or _random()
    query = CommonOptions(model=model, size=size)
    with spinner(f"sending requests for {seconds:g} s"):
        measured = asyncio.run(_load(service_url(url), key, bodies, query, seconds, concurrency))
    latencies, failures, took = measured
    failed = ", ".join(f"{number} {name}" for name, number in failures.most_common())
    if not latencies:
        raise CommandError(f"no request succeeded: {failed or 'none'}")
    p50, p90, p99 = (round(float(each) * 1000, 2) for each in np.percentile(latencies, [50, 90, 99]))
    number, rate, took = len(latencies), round(len(latencies) / took, 1), round(took, 2)
    if as_json:
        figures = {"seconds": took, "concurrency": concurrency, "images": number, "images_per_second": rate}
        print_line(json.dumps({**figures, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "failed": dict(failures)}))
    else:
        print_line(f"{rate} images/s   p50 {p50} ms   p90 {p90} ms   p99 {p99} ms")
        suffix = f"; failed: {failed}" if failed else ""
        print_line(f"{number} images in {took} s, {concurrency} at a time{suffix}")
    if failures:
        raise Exit(SOME_FAILED)


def _bytes(image: "Source") -> bytes:
    return image.read_bytes() if isinstance(image, Path) else image.getvalue()


def _random() -> list[bytes]:
    """JPEGs of soft blots with some grain, which compress like photos."""
    import numpy as np
    from PIL import Image

    random, bodies = np.random.default_rng(), []
    for _ in range(_RANDOM_IMAGES):
        blots = Image.fromarray(random.integers(0, 256, (*_COARSE[::-1], 3), np.uint8)).resize(_SIZE)
        grain = random.normal(0, 6, (*_SIZE[::-1], 3))
        buffer = BytesIO()
        Image.fromarray(np.clip(np.asarray(blots) + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        bodies.append(buffer.getvalue())
    return bodies


async def _load(
    url: str, key: str | None, bodies: Sequence[bytes], query: "CommonOptions", seconds: float, concurrency: int
) -> tuple[list[float], Counter[str], float]:
    """Send requests for `seconds`.

    Returns the seconds that each response took, how often a request failed in which way, and the seconds in all.
    """
    from cli.environment import TIMEOUT_SECONDS
    from pvt_client import AsyncClient, ConnectionFailed, ConnectionLost, InvalidRequest, PvtError, Retries

    latencies: list[float] = []
    failures: Counter[str] = Counter()
    images = (bodies[number % len(bodies)] + number.to_bytes(_TRAILER, "big") for number in count())
    once = Retries(attempts=1)
    async with AsyncClient(url, api_key=key, timeout=TIMEOUT_SECONDS, retries=once) as client:
        send: Callable[..., Awaitable[object]] = client.predict
        try:
            await send(next(images), **query)
        except InvalidRequest:  # a model without a head names no classes; what else may be wrong is wrong here too
            send = client.embedding
            await send(next(images), **query)
        start = perf_counter()

        async def requests() -> None:
            while (begun := perf_counter()) < start + seconds:
                try:
                    await send(next(images), **query)
                except PvtError as error:
                    if isinstance(error, ConnectionFailed) and not isinstance(error, ConnectionLost):
                        raise  # the service has ended
                    failures[type(error).__name__] += 1
                else:
                    latencies.append(perf_counter() - begun)

        await asyncio.gather(*(requests() for _ in range(concurrency)))
        return latencies, failures, perf_counter() - start
