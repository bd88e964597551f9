"""What the content cache saves and costs, one request at a time: `python -m bench.content_cache [--rounds 200]`.

The embedded model, and pvt_v2_b0 at 224, with JPEGs of 640x427. Requests to a service without a cache and to one with
it go in turn: an image that is new to both, and to the second one the same again. Printed are medians, and the 10th
percentiles, which other work on the machine disturbs least, with their quotients: of the service's time (`total` of
`Server-Timing`) and of this client's, of which HTTP on both sides is a part.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import httpx
import numpy as np
from tqdm import tqdm

from bench.bodies import Body, bodies
from bench.images import jpegs
from bench.make_store import make_store
from bench.peers import OURS
from bench.server import ROOT, serving

VARIANT, CACHE_MB, TRAILER = "pvt_v2_b0", "100", 4
Seconds = tuple[float, float]  # of the service, and of the client
Round = tuple[Seconds, Seconds, Seconds]  # a request without a cache, a miss, a hit


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        made = make_store(folder / "made", VARIANT)
        stores = {"pvt_v2_b0.digits": ROOT / "model_store", made.id: folder / "made"}
        for number, (model, store) in enumerate(stores.items()):
            own = folder / str(number)
            print(f"{model}\n{summary(measure(own, store, model, arguments.rounds))}")


def measure(folder: Path, store: Path, model: str, rounds: int) -> list[Round]:
    """The rounds, with two services in `folder`."""
    figures: list[Round] = []
    with ExitStack() as stack:
        urls = []
        for cache_mb in ("0", CACHE_MB):
            own = folder / cache_mb
            own.mkdir(parents=True)
            settings = {"PVT_DEFAULT_MODEL": model, "PVT_CACHE_MB": cache_mb, "PVT_TIMEOUT_MS": "120000"}
            server = stack.enter_context(serving(OURS, own, store, settings))
            server.wait(bodies(jpegs(1, seed=1), "raw")[0])
            urls.append(server.url)
        (image,), client = jpegs(1), stack.enter_context(httpx.Client(timeout=60))
        for number in tqdm(range(rounds), leave=False):
            body = Body("image/jpeg", image + number.to_bytes(TRAILER, "big"))
            # The first of two services has the quieter machine, as threads of the other one still wind down.
            plain = _seconds(client, urls[0], body, "") if number % 2 else None
            miss, hit = (_seconds(client, urls[1], body, status) for status in ("fwd=miss", "hit"))
            figures.append((_seconds(client, urls[0], body, "") if plain is None else plain, miss, hit))
    return figures


def summary(rounds: Sequence[Round]) -> str:
    """Milliseconds of each kind of request, and how many times a hit's and a plain request's a miss takes."""
    low, middle = np.percentile(rounds, [10, 50], axis=0) * 1000
    lines = []
    for side, of in enumerate(("service", "client")):
        kinds = zip(("without a cache", "miss", "hit"), low[:, side], middle[:, side], strict=True)
        each = ", ".join(f"{name} {a:.2f} (median {b:.2f}) ms" for name, a, b in kinds)
        plain, miss, hit = low[:, side]
        lines.append(f"{of}: {each}; miss / without {miss / plain:.2f}, miss / hit {miss / hit:.1f}")
    return "\n".join(lines)


def _seconds(client: httpx.Client, url: str, body: Body, status: str) -> Seconds:
    start = perf_counter()
    response = client.post(url, content=body.data, headers={"Content-Type": body.content_type})
    seconds = perf_counter() - start
    headers = response.raise_for_status().headers
    found = headers.get("cache-status", "").partition("; ")[2]
    if found != status:
        raise RuntimeError(f"Cache-Status is {found!r}, not {status!r}: this is not what is measured")
    return float(headers["server-timing"].rpartition("total;dur=")[2]) / 1000, seconds


if __name__ == "__main__":
    main()
