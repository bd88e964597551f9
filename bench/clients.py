"""What our own ways to ask cost: `python -m bench.clients [--seconds 4] [--rounds 5] [--model digits] [--small]`.

The Python client's `predict_many`, with threads and on an event loop, with one image in a request and with several, in
turn with wrk, each on 8 connections to the same server; and what `pvt-serve embed` does in its process, files read and
table written, in turn with a bare loop of decoding and inference, one thread for each core. Ratios are computed within
each round.
"""

import argparse
import asyncio
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TypeVar

from tqdm import tqdm

from bench.bare import bare_loop
from bench.bodies import bodies
from bench.images import USUAL, jpegs
from bench.load import Wrk
from bench.make_store import make_store
from bench.ours import Ours
from bench.peers import OURS
from bench.ratios import some
from bench.server import ROOT, serving
from cli.embeddings import FileState, growing_table
from cli.inference import connect
from pvt_client import AsyncClient, Client, Embedding

CLIENTS, IMAGES, SEVERAL = 8, 64, 16
# Images per second of one of the things that are compared.
Rate = Callable[[], float]
T = TypeVar("T")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", choices=["b0", "digits"], default="b0", help="b0 at 224, or the embedded one at 64")
    parser.add_argument("--small", action="store_true", help="images of the size that the model takes")
    parser.add_argument("--only", choices=["client", "embed"], help="one of the two comparisons")
    arguments = parser.parse_args()
    side = {"b0": 224, "digits": 64}[arguments.model] if arguments.small else 0
    images = jpegs(IMAGES, (side, side) if side else USUAL)
    with TemporaryDirectory() as name:
        folder, store = Path(name), ROOT / "model_store"
        if arguments.model == "b0":
            make_store(store := folder / "store", "pvt_v2_b0")
        shown = "x".join(map(str, (side, side) if side else USUAL))
        print(f"{arguments.model}, JPEG {shown}, {arguments.rounds} rounds of {arguments.seconds} s")
        if arguments.only != "embed":
            over_http(images, folder, store, arguments.seconds, arguments.rounds)
        if arguments.only != "client":
            asyncio.run(here(images, folder, store, arguments.seconds, arguments.rounds))


def over_http(images: Sequence[bytes], folder: Path, store: Path, seconds: int, rounds: int) -> None:
    """The client beside wrk."""
    wrk = Wrk(folder / "bodies", bodies(images, "raw"))
    model = _only_model(store)
    with serving(OURS, folder, store, {"PVT_DEFAULT_MODEL": model}) as server:
        server.wait(bodies(images, "raw")[0])
        url = server.url.removesuffix(OURS.path)

        def with_threads(images_per_request: int) -> float:
            with Client(url, images_per_request=images_per_request) as client:
                return _rate(client.predict_many(_until(images, seconds), concurrency=CLIENTS))

        async def on_a_loop(images_per_request: int) -> float:
            start, count = perf_counter(), 0
            async with AsyncClient(url, images_per_request=images_per_request) as client:
                async for _ in client.predict_many(_until(images, seconds), concurrency=CLIENTS):
                    count += 1
            return count / (perf_counter() - start)

        ways: dict[str, Rate] = {
            "wrk": lambda: wrk.run(server.url, CLIENTS, seconds).images_per_second,
            "Client, one a request": partial(with_threads, 1),
            "Client": partial(with_threads, SEVERAL),
            "AsyncClient, one a request": lambda: asyncio.run(on_a_loop(1)),
            "AsyncClient": lambda: asyncio.run(on_a_loop(SEVERAL)),
        }
        turns = [{name: rate() for name, rate in ways.items()} for _ in tqdm(range(rounds), leave=False)]
        _report(turns)
        for name in ("Client", "AsyncClient"):
            gain = some([each[name] / each[f"{name}, one a request"] for each in turns])
            print(f"{name}: several in a request reach {gain} times as many as one")


async def here(images: Sequence[bytes], folder: Path, store: Path, seconds: int, rounds: int) -> None:
    """Embedding in this process beside the bare loop."""
    model = _only_model(store)
    os.environ |= {"PVT_MODEL_STORE": str(store), "PVT_DEFAULT_MODEL": model, "PVT_CACHE_DIR": str(folder / "plans")}
    sources = folder / "images"
    sources.mkdir()
    for number, image in enumerate(images):
        (sources / f"{number}.jpg").write_bytes(image)
    paths, bare = sorted(sources.iterdir()), Ours(store)
    async with connect(None, None) as inference:

        async def embed(turn: int) -> float:
            start, count = perf_counter(), 0
            with growing_table(folder / f"{turn}.parquet", 500) as table:
                async for path, result in inference.embedding_many(_until(paths, seconds)):
                    if not isinstance(result, Embedding):
                        raise result
                    count += 1
                    table.add(FileState(f"{path}#{count}", *FileState.of(path)[1:]), result)
                table.finish()
            return count / (perf_counter() - start)

        await embed(-1)  # loads the model
        turns = []
        for turn in tqdm(range(rounds), leave=False):
            bare_rate = await asyncio.to_thread(bare_loop, bare, images, seconds)
            turns.append({"bare loop": bare_rate, "embed": await embed(turn)})
    _report(turns)


def _only_model(store: Path) -> str:
    (model,) = (each.name for each in store.iterdir())
    return model


def _until(items: Sequence[T], seconds: float) -> Iterator[T]:
    """`items` over and over, for `seconds`."""
    end = perf_counter() + seconds
    return itertools.takewhile(lambda _: perf_counter() < end, itertools.cycle(items))


def _rate(results: Iterator[object]) -> float:
    start = perf_counter()
    count = sum(1 for _ in results)
    return count / (perf_counter() - start)


def _report(rounds: Sequence[Mapping[str, float]]) -> None:
    """Each way's images per second, and its ratio to the first one's."""
    first = next(iter(rounds[0]))
    for name in rounds[0]:
        ratios = some([each[name] / each[first] for each in rounds])
        print(f"{name:26} {some([each[name] for each in rounds])} images/s, {ratios} of {first}")


if __name__ == "__main__":
    main()
