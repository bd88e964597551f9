"""Measures a GPU: engines side by side, where the pipeline saturates, and the service over HTTP.

    python -m bench.gpu                                    everything, into docs/benchmarks-gpu.md
    python -m bench.gpu --add --stages engines --variants pvt_v2_b5 --batches 8

Compiling takes minutes, so a run may be made in pieces: each adds to docs/benchmarks/gpu.json as soon as it is done,
and `--add` keeps what is there, but for what is measured again.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from time import perf_counter, sleep

import httpx
import torch
from tqdm import tqdm

from bench.bodies import bodies
from bench.gpu_engines import best, copy_rate, measure, peak_flops
from bench.gpu_report import report
from bench.gpu_results import GpuEngine, GpuLimits, GpuPeak, GpuResults, GpuServing
from bench.images import jpegs
from bench.load import Wrk
from bench.machine import machine, versions
from bench.make_store import TAG, make_store
from bench.ours import cuda_device
from bench.peers import OURS
from bench.results import Closed
from bench.server import ROOT, Server, serving
from service.architecture.variants import VARIANTS
from service.images.decoding import decode
from service.images.geometry import Geometry
from service.machine import usable_cores

DOCS = ROOT / "docs"
STAGES = ("engines", "serving", "limits", "report")
VARIANTS_SHOWN = ("pvt_v2_b0", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b5")
BATCHES = (1, 8, 64, 256)
CLIENTS = (1, 8, 64, 256)
EMBEDDED = "pvt_v2_b0.digits"
IMAGES = 64
# A queue for the most clients, so that none is refused.
SETTINGS = {"PVT_DEVICE": "cuda", "PVT_QUEUE_SIZE": "1024"}
IMPROVED_SECONDS = 3600.0  # for compiling every batch size in the background


def main() -> None:
    """Read the command line, measure, and write."""
    arguments = _arguments()
    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU; this measures one. `make bench` measures a CPU")
    path = arguments.out / "benchmarks" / "gpu.json"
    results = _read(path) if arguments.add else GpuResults()
    command = shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]])
    results = results.model_copy(
        update={
            "card": torch.cuda.get_device_name(0),
            "machine": machine(),
            "versions": {**versions(), "CUDA": str(torch.version.cuda)},
            "commands": (*results.commands, *([] if command in results.commands else [command])),
        }
    )
    stages = {"engines": _engines, "serving": _serving, "limits": _limits}
    for stage in arguments.stages:
        if stage in stages:
            results = stages[stage](results, path, arguments)
    if "report" in arguments.stages:
        (arguments.out / "benchmarks-gpu.md").write_text(report(results))
        print(f"written: {arguments.out / 'benchmarks-gpu.md'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--add", action="store_true", help="to the results that are there, instead of starting anew")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks-gpu.md and benchmarks/")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS_SHOWN))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4], help="numbers of worker processes to try")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each load, and of each engine in each round")
    return parser.parse_args()


def _engines(results: GpuResults, path: Path, arguments: argparse.Namespace) -> GpuResults:
    from bench.peak import flops  # noqa: PLC0415  it takes torch's counter, which nothing else needs

    device, card = torch.device("cuda", 0), cuda_device("cuda:0")
    counts = {variant: flops(variant) for variant in arguments.variants}
    peak = GpuPeak(flops=peak_flops(device), side=8192)
    results = results.model_copy(update={"flops": {**results.flops, **counts}, "peak": peak})
    todo = [(variant, batch) for variant in arguments.variants for batch in arguments.batches]
    for variant, batch in tqdm(todo, desc="engines"):
        rows = measure(device, card, variant, batch, rounds=arguments.rounds, seconds=arguments.seconds / 3)
        results = add_engines(results, rows)
        _write(path, results)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return results


def add_engines(results: GpuResults, rows: Sequence[GpuEngine]) -> GpuResults:
    """`results` with `rows`, which take the place of those of the same engine, variant and batch size."""
    new = {(row.engine, row.variant, row.batch) for row in rows}
    kept = [row for row in results.engines if (row.engine, row.variant, row.batch) not in new]
    return results.model_copy(update={"engines": (*kept, *rows)})


def _limits(results: GpuResults, path: Path, arguments: argparse.Namespace) -> GpuResults:
    decoded, copied = decode_rate(usable_cores(), arguments.seconds), copy_rate(torch.device("cuda", 0))
    limits = tuple(
        GpuLimits(variant=variant, decode=decoded, copy_to_device=copied, compute=rate)
        for variant in arguments.variants
        if (rate := best(results.engines, variant))
    )
    results = results.model_copy(update={"limits": limits})
    _write(path, results)
    return results


def decode_rate(threads: int, seconds: float) -> float:
    """Images per second that so many threads decode to 224x224, with nothing else to do."""
    images, geometry = jpegs(IMAGES), Geometry(224, 224, 0.9, "bicubic")
    counts = [0] * threads
    start = perf_counter()

    def work(thread: int) -> None:
        while perf_counter() < start + seconds:
            decode(images[counts[thread] % len(images)], geometry, max_pixels=50_000_000)
            counts[thread] += 1

    running = [Thread(target=work, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts) / (perf_counter() - start)


def _serving(results: GpuResults, path: Path, arguments: argparse.Namespace) -> GpuResults:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for variant in arguments.variants:
            make_store(folder / variant, variant)
        stores = {f"{variant}.{TAG}": folder / variant for variant in arguments.variants}
        stores[EMBEDDED] = ROOT / "model_store"
        wrk = Wrk(folder / "bodies", bodies(jpegs(IMAGES), OURS.form))
        for model, store in stores.items():
            for workers in arguments.workers:
                settings = {"PVT_DEFAULT_MODEL": model, "PVT_PRELOAD": model, "PVT_WORKERS": str(workers)}
                with serving(OURS, folder, store, {**SETTINGS, **settings}) as server:
                    loops = _loops(server, model, workers, wrk, arguments)
                served = GpuServing(model=model, workers=workers, loops=loops)
                others = [each for each in results.serving if (each.model, each.workers) != (model, workers)]
                results = results.model_copy(update={"serving": (*others, served)})
                _write(path, results)
    return results


def _loops(server: Server, model: str, workers: int, wrk: Wrk, arguments: argparse.Namespace) -> tuple[Closed, ...]:
    (body,) = bodies(jpegs(1), OURS.form)
    server.wait(body)
    _wait_until_improved(server, model, workers)
    for clients in arguments.clients:
        wrk.run(server.url, clients, 1)  # a first load warms sockets and threads up
    loops = []
    for _ in range(arguments.rounds):
        for clients in arguments.clients:
            server.settle(body)
            loops.append(wrk.run(server.url, clients, arguments.seconds))
    return tuple(loops)


def _wait_until_improved(server: Server, model: str, workers: int) -> None:
    """Every worker says so, several times: who answers can't be chosen."""
    url, quiet = server.url.removesuffix("/predict") + f"/models/{model}", 0
    end = perf_counter() + IMPROVED_SECONDS
    while quiet < 8 * workers:
        if perf_counter() > end:
            raise RuntimeError(f"{model} was still being compiled after {IMPROVED_SECONDS:g} s; call again, it goes on")
        quiet = 0 if httpx.get(url, timeout=60).json().get("improving") else quiet + 1
        sleep(0.05 if quiet else 1.0)


def _read(path: Path) -> GpuResults:
    return GpuResults.model_validate_json(path.read_bytes()) if path.exists() else GpuResults()


def _write(path: Path, results: GpuResults) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    main()
