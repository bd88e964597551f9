"""The machine's measured peak, and how much arithmetic a model takes.

    python -m bench.peak --threads 1

Prints `Peak` records as JSON lines: the best of torch's and OpenVINO's large square matrix product, in float32, and in
bfloat16 where the CPU computes in it. A floating-point operation is a multiplication or an addition.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np
import openvino as ov
import torch
from openvino import opset13, properties
from openvino.properties import hint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.ours import module
from bench.results import Peak

SIDE = 2048
_SECONDS = 2.0


def peaks(threads: int) -> list[Peak]:
    """For each precision that the CPU computes in natively."""
    torch.set_num_threads(threads)
    native = ov.Core().get_property("CPU", properties.device.capabilities())
    kinds = [("float32", torch.float32, ov.Type.f32)]
    if "BF16" in native:
        kinds.append(("bfloat16", torch.bfloat16, ov.Type.bf16))
    best = []
    for name, dtype, kind in kinds:
        seen = {"torch": _best(_torch(dtype)), "OpenVINO": _best(_openvino(kind, threads))}
        by = max(seen, key=lambda library: seen[library])
        best.append(Peak(precision=name, threads=threads, flops=seen[by], by=f"{by}, {SIDE} x {SIDE} x {SIDE}"))
    return best


def flops(variant: str, side: int = 224) -> int:
    """Floating-point operations of one image of `side`: convolutions, matrix products, attention; nothing pointwise."""
    # The counter does not know the CPU's fused attention, hence attention as two matrix products.
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        module(variant)(torch.zeros(1, 3, side, side))
    return int(counter.get_total_flops())


def _torch(dtype: torch.dtype) -> Callable[[], object]:
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _openvino(kind: ov.Type, threads: int) -> Callable[[], object]:
    """The right factor is a constant, as weights are, so that it may be packed beforehand."""
    left = opset13.parameter([SIDE, SIDE], np.float32)
    right = opset13.constant(np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32))
    model = ov.Model([opset13.matmul(left, right, transpose_a=False, transpose_b=False)], [left])
    config = {hint.inference_precision(): kind, properties.inference_num_threads(): threads}
    request = ov.Core().compile_model(model, "CPU", config).create_infer_request()
    values = np.random.default_rng(1).standard_normal((SIDE, SIDE), dtype=np.float32)
    return lambda: request.infer({0: values}, share_inputs=True)


def _best(run: Callable[[], object]) -> float:
    """Operations per second of the fastest run."""
    run()
    fastest, end = float("inf"), perf_counter() + _SECONDS
    while perf_counter() < end:
        start = perf_counter()
        run()
        fastest = min(fastest, perf_counter() - start)
    return 2 * SIDE**3 / fastest


def main() -> None:
    """Read the command line, measure, and print the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", required=True, type=int)
    for peak in peaks(parser.parse_args().threads):
        print(peak.model_dump_json())


if __name__ == "__main__":
    main()
