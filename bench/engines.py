"""Engines without a server: milliseconds per image of a variant at 224, on one thread or on all cores.

    python -m bench.engines --engine ours --variant pvt_v2_b0 --threads 1

Prints an `Engine` record as a JSON line for each batch size. Each engine is as its own guide starts it; a process of
its own for each call, since thread counts are set for whole processes. Times are wall-clock, medians.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bench.make_store import make_store
from bench.ours import Ours, module
from bench.peers.common import make_model
from bench.results import Engine

BATCHES = (1, 8)
SIDE = 224
_RUNS, _SECONDS = 3, 1.0  # at the least, of each batch size

Run = Callable[[], object]


def eager(variant: str, batch: int, threads: int) -> tuple[Run, int]:
    """The model of transformers, eager, float32."""
    torch.set_num_threads(threads)
    model, pixels = make_model(variant), torch.randn(batch, 3, SIDE, SIDE)
    return torch.inference_mode()(lambda: model(pixels)), batch


def compiled(variant: str, batch: int, threads: int) -> tuple[Run, int]:
    """The same through torch.compile in its default mode, for one shape."""
    torch.set_num_threads(threads)
    model, pixels = torch.compile(make_model(variant), dynamic=False), torch.randn(batch, 3, SIDE, SIDE)
    return torch.inference_mode()(lambda: model(pixels)), batch


def onnx(variant: str, batch: int, threads: int) -> tuple[Run, int]:
    """ONNX Runtime on an export of our module (whose answers are transformers'), batch dimension dynamic."""
    import onnxruntime  # noqa: PLC0415  only this engine needs it

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_exported(variant), options, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((batch, 3, SIDE, SIDE), dtype=np.float32)
    return lambda: session.run(None, {"pixels": pixels}), batch


def openvino(variant: str, batch: int, threads: int) -> tuple[Run, int]:
    """OpenVINO as it comes: converted with a dynamic batch dimension, compiled with no setting but the threads."""
    import openvino as ov  # noqa: PLC0415  not before bench.ours, which keeps its telemetry from being imported

    model = ov.convert_model(module(variant), example_input=torch.zeros(1, 3, SIDE, SIDE))
    model.reshape([-1, 3, SIDE, SIDE])
    request = ov.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads}).create_infer_request()
    pixels = np.random.default_rng(0).standard_normal((batch, 3, SIDE, SIDE), dtype=np.float32)
    return lambda: request.infer({0: pixels}), batch


def ours(variant: str, batch: int, threads: int) -> tuple[Run, int]:
    """Ours as the server loads it: an instance on each of `threads` cores, each with its own `batch` images."""
    with TemporaryDirectory() as folder:
        make_store(Path(folder), variant)
        loaded = Ours(folder, instances=threads)
    images = list(np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8))
    return lambda: loaded.on_all(lambda instance: loaded.infer(instance, images)), batch * threads


ENGINES: dict[str, Callable[[str, int, int], tuple[Run, int]]] = {
    "torch": eager,
    "torch.compile": compiled,
    "onnxruntime": onnx,
    "openvino": openvino,
    "ours": ours,
}


def _exported(variant: str) -> bytes:
    dynamic: dict[str, Any] = {"pixels": {0: "batch"}, "logits": {0: "batch"}}
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["logits"], "dynamic_axes": dynamic}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(module(variant), (torch.zeros(1, 3, SIDE, SIDE),), path, dynamo=False, **names)
        return path.read_bytes()


def _milliseconds(run: Run) -> float:
    """Median of a run's wall-clock time, after two to warm up."""
    run()
    run()
    times: list[float] = []
    while len(times) < _RUNS or sum(times) < _SECONDS:
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return median(times) * 1000


def main() -> None:
    """Read the command line, measure, and print the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=ENGINES)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--threads", required=True, type=int)
    arguments = parser.parse_args()
    for batch in BATCHES:
        run, images = ENGINES[arguments.engine](arguments.variant, batch, arguments.threads)
        record = {"engine": arguments.engine, "variant": arguments.variant, "batch": batch}
        print(Engine(**record, threads=arguments.threads, ms=_milliseconds(run) / images).model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
