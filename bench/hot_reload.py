"""A new version under constant load: `python -m bench.hot_reload [--rate 40] [--seconds 20]`.

Digits are posted at fixed times, whether the ones before have been answered or not; after a quarter of the time version
2 of the model is put into the store. Printed are failures and latencies before, while it is loaded, and afterwards.
"""

import argparse
import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from bench.bodies import Body
from bench.generator import Call, drive
from bench.openloop import arrivals, percentile
from bench.peers import OURS
from bench.server import ROOT, serving

MODEL = "pvt_v2_b0.digits"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=40, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    images = sorted((ROOT / "docs" / "digits").glob("*.png"))
    posted = [Body("image/png", path.read_bytes()) for path in images]
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "store" / MODEL
        shutil.copytree(ROOT / "model_store" / MODEL / "1", model / "1")
        with serving(OURS, folder, folder / "store") as server:
            server.wait(posted[0])
            print(f"{MODEL}, {arguments.rate:g} requests/s for {arguments.seconds:g} s, version 1 to 2")
            asyncio.run(measure(server.url, model, posted, arguments.rate, arguments.seconds))


async def measure(url: str, model: Path, posted: Sequence[Body], rate: float, seconds: float) -> None:
    """The load, and the new version in the midst of it."""
    start = asyncio.get_running_loop().time() + 0.5
    load = asyncio.create_task(drive(url, posted, arrivals(rate, seconds, uniform=True), start))
    published, ready = await publish(url.removesuffix(OURS.path), model, start + seconds / 4)
    calls = await load
    print(f"noticed, loaded and swapped in {ready - published:.1f} s")
    phases = {"before": (0.0, published), "meanwhile": (published, ready), "afterwards": (ready, float("inf"))}
    for name, (begin, end) in phases.items():
        report(name, [call for call in calls if begin <= call.intended < end])


async def publish(url: str, model: Path, at: float) -> tuple[float, float]:
    """When version 2 was there, and when it answered."""
    loop = asyncio.get_running_loop()
    staged = model / ".2"
    await asyncio.to_thread(shutil.copytree, model / "1", staged)
    await asyncio.sleep(at - loop.time())
    staged.rename(model / "2")
    published = loop.time()
    async with httpx.AsyncClient(base_url=url) as client:
        while (await client.get(f"/models/{MODEL}")).json()["version"] != "2":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return published, loop.time()


def report(name: str, calls: Sequence[Call]) -> None:
    """A line of a phase."""
    times = [1000 * (call.finished - call.intended) for call in calls if call.finished is not None]
    failed = sum(call.status != httpx.codes.OK for call in calls)
    quantiles = ", ".join(f"p{100 * share:g} {percentile(times, share):.1f}" for share in (0.5, 0.99, 1.0))
    print(f"{name:10} {len(calls):5} requests, {failed} failed, ms: {quantiles}")


if __name__ == "__main__":
    main()
