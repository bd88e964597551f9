"""First figures of this machine: `python -m bench [--seconds 5] [--rounds 5]`, or `make bench`.

Rounds go in turn over all loads, so that drift of a shared machine hits all alike; medians are printed, with spread.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tqdm import tqdm

from bench.bare import bare_loop
from bench.load import Load, Wrk
from bench.make_store import make_store
from bench.pictures import jpegs
from bench.server import ROOT, serving

VARIANT = "pvt_v2_b0"
CLIENTS = (1, 8)
PICTURES = 64
STARTS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="of each load")
    parser.add_argument("--rounds", type=int, default=5, help="over all loads")
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        pictures = jpegs(PICTURES)
        make_store(folder / "store", VARIANT)
        starts(pictures[0])
        throughput(folder, pictures, arguments.seconds, arguments.rounds)


def starts(picture: bytes) -> None:
    """Process start to first prediction, and memory then, with the embedded model."""
    seconds, megabytes = [], []
    for _ in tqdm(range(STARTS), desc="starts", leave=False):
        with serving(model_store=str(ROOT / "model_store")) as server:
            seconds.append(server.first_prediction(picture))
            megabytes.append(server.resident_bytes() / 1e6)
    print("embedded model, process start to first prediction:", spread(seconds, "s"))
    print("embedded model, resident memory then:", spread(megabytes, "MB"))


def throughput(folder: Path, pictures: Sequence[bytes], seconds: int, rounds: int) -> None:
    """Load on the server, and the bare loop beside it."""
    model, store = f"{VARIANT}.bench", folder / "store"
    wrk = Wrk(folder, pictures)
    loads: dict[int, list[Load]] = {clients: [] for clients in CLIENTS}
    cpu_ms, bare, ratios = [], [], []
    for _ in tqdm(range(rounds), desc="rounds", leave=False):
        with serving(model_store=str(store), default_model=model) as server:
            for picture in pictures:
                server.predict(picture)
            for clients in CLIENTS:
                before = server.cpu_seconds()
                loads[clients].append(wrk.run(f"{server.url}/predict", clients, seconds))
            cpu_ms.append((server.cpu_seconds() - before) / (loads[clients][-1].images_per_second * seconds) * 1000)
        bare.append(bare_loop(store, model, pictures, seconds))
        ratios.append(loads[CLIENTS[-1]][-1].images_per_second / bare[-1])
    print(f"{VARIANT} at 224, JPEG 640x427, {rounds} rounds of {seconds} s, {PICTURES} different pictures:")
    for clients, runs in loads.items():
        failed = sum(run.failed for run in runs)
        rate = spread([run.images_per_second for run in runs], "images/s")
        print(f"  {clients} clients: {rate}; p50 {spread([run.p50_ms for run in runs], 'ms')}; "
              f"p99 {spread([run.p99_ms for run in runs], 'ms')}; {failed} failed")  # fmt: skip
    print("  bare loop of decode and inference, one per core:", spread(bare, "images/s"))
    print(f"  {CLIENTS[-1]} clients / bare loop:", spread(ratios, ""))
    print(f"  processor time per image with {CLIENTS[-1]} clients:", spread(cpu_ms, "ms"))


def spread(values: Sequence[float], unit: str) -> str:
    """Median, and least and greatest."""
    return f"{median(values):.3g} {unit} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
