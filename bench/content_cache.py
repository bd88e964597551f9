"""What the content cache saves and costs, one request at a time: `python -m bench.content_cache [--rounds 200]`.

The embedded model, and pvt_v2_b0 at 224, with JPEGs of 640x427. Requests to a service without a cache and to one with
it go in turn: an image that is new to both, and to the second one the same again. Printed are medians, and the 10th
percentiles, which other work on the machine disturbs least, with their quotients.
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
Round = tuple[float, float, float]  # seconds of a request without a cache, of a miss, of a hit


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
            print(f"{model}: {summary(measure(own, store, model, arguments.rounds))}")


def measure(folder: Path, store: Path, model: str, rounds: int) -> list[Round]:
    """The rounds, with two services in `folder`."""
    figures: list[Round] = []
    with ExitStack() as stack:
        urls = []
        for cache_mb in ("0", CACHE_MB):
            own = folder / cache_mb
            own.mkdir(parents=True)
            settings = {"PVT_DEFAULT_MODEL": model, "PVT_CACHE_MB": cache_mb}
            server = stack.enter_context(serving(OURS, own, store, settings))
            server.wait(bodies(jpegs(1, seed=1), "raw")[0])
            urls.append(server.url)
        (image,), client = jpegs(1), stack.enter_context(httpx.Client(timeout=60))
        for number in tqdm(range(rounds), leave=False):
            body = Body("image/jpeg", image + number.to_bytes(TRAILER, "big"))
            expected = ((urls[0], ""), (urls[1], "fwd=miss"), (urls[1], "hit"))
            plain, miss, hit = (_seconds(client, url, body, status) for url, status in expected)
            figures.append((plain, miss, hit))
    return figures


def summary(rounds: Sequence[Round]) -> str:
    """Milliseconds of each kind of request, and how many times a hit's and a plain request's a miss takes."""
    low, middle = np.percentile(rounds, [10, 50], axis=0) * 1000
    names = ("without a cache", "miss", "hit")
    each = (f"{name} {a:.2f} (median {b:.2f}) ms" for name, a, b in zip(names, low, middle, strict=True))
    return f"{', '.join(each)}; miss / without {low[1] / low[0]:.2f}, miss / hit {low[1] / low[2]:.1f}"


def _seconds(client: httpx.Client, url: str, body: Body, status: str) -> float:
    start = perf_counter()
    response = client.post(url, content=body.data, headers={"Content-Type": body.content_type})
    seconds = perf_counter() - start
    found = response.raise_for_status().headers.get("cache-status", "").partition("; ")[2]
    if found != status:
        raise RuntimeError(f"Cache-Status is {found!r}, not {status!r}: this is not what is measured")
    return seconds


if __name__ == "__main__":
    main()
