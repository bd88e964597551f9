"""What a flood on one model does to a trickle on another: `python -m bench.fairness [--seconds 10] [--rounds 3]`.

Two models of the same variant; one image at a time goes to the one, while wrk floods the other. Rounds with
and without the flood go in turn; printed are the trickle's p50 and p99 of all rounds.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

import httpx
from tqdm import tqdm

from bench.bodies import bodies
from bench.images import jpegs
from bench.load import Wrk
from bench.make_store import make_store
from bench.peers import OURS
from bench.server import serving
from service.store.folder import write_model
from service.store.store import Store

VARIANT, IMAGES, PAUSE_SECONDS = "pvt_v2_b0", 32, 0.05
TRICKLE, FLOOD = f"{VARIANT}.trickle", f"{VARIANT}.flood"
HEADERS = {"Content-Type": "image/jpeg"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10, help="of each round")
    parser.add_argument("--rounds", type=int, default=3, help="with and without the flood")
    parser.add_argument("--flood", type=int, default=64, help="clients of the flooded model")
    arguments = parser.parse_args()
    print(f"{VARIANT} at 224, twice, JPEG 640x427, {arguments.rounds} rounds of {arguments.seconds} s")
    with TemporaryDirectory() as name:
        store = two_models(Path(name))
        with serving(OURS, Path(name), store, {"PVT_DEFAULT_MODEL": TRICKLE}) as server:
            server.wait(bodies(jpegs(1), "raw")[0])
            measure(
                server.url.removesuffix(OURS.path), Path(name), arguments.seconds, arguments.rounds, arguments.flood
            )


def two_models(folder: Path) -> Path:
    """A store with the same weights under two names."""
    made = make_store(folder / "made", VARIANT)
    weights = (Store(folder / "made").find(made.id).folder / made.weights.file).read_bytes()
    for id_ in (TRICKLE, FLOOD):
        write_model(folder / "store", "1", made.model_copy(update={"id": id_}), weights)
    return folder / "store"


def measure(url: str, folder: Path, seconds: int, rounds: int, flood: int) -> None:
    """The rounds."""
    images = jpegs(IMAGES)
    wrk = Wrk(folder / "bodies", bodies(images, "raw"))
    alone: list[float] = []
    beside: list[float] = []
    flooded: list[float] = []
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as pool:
        for model in (TRICKLE, FLOOD):
            post(client, model, images[0])
        for _ in tqdm(range(rounds), desc="rounds", leave=False):
            alone += trickle(client, images, seconds)
            running = pool.submit(wrk.run, f"{url}/predict?model={FLOOD}", flood, seconds + 2)
            sleep(1)  # until the flood's queue is full
            beside += trickle(client, images, seconds)
            flooded.append(running.result().images_per_second)
    report("trickle alone", alone)
    report(f"beside a flood of {flood} clients, {median(flooded):.1f} images/s", beside)


def trickle(client: httpx.Client, images: Sequence[bytes], seconds: float) -> list[float]:
    """Seconds that each answer took, one image after the other."""
    took: list[float] = []
    end = perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter()
        post(client, TRICKLE, images[len(took) % len(images)])
        took.append(perf_counter() - start)
        sleep(PAUSE_SECONDS)
    return took


def post(client: httpx.Client, model: str, image: bytes) -> None:
    """Raises httpx.HTTPStatusError when it is not answered."""
    client.post("/predict", params={"model": model}, content=image, headers=HEADERS).raise_for_status()


def report(name: str, seconds: Sequence[float]) -> None:
    """One line."""
    ordered = sorted(seconds)
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] * 1000 for share in (0.5, 0.99))
    print(f"  {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {ordered[-1] * 1000:.1f} ms, {len(ordered)} images")


if __name__ == "__main__":
    main()
