"""Engines on a GPU, side by side: transformers' model eager and compiled, and ours, all with the same weights."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.gpu_results import GpuEngine
from bench.ours import OnDevice
from bench.peers.common import make_model
from service.backends.base import Batch
from service.backends.cuda import CudaDevice
from service.backends.cuda_compiling import TorchCompiler
from service.results import Floats

SIDE = 224
ENGINES = ("transformers", "max-autotune", "pvt-serve")
_AT_ONCE = 4  # batches of theirs that are put on the card before it is waited for, so that it is not idle in between
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Logits = Callable[[], Floats]


@dataclass(frozen=True, slots=True)
class Entry:
    """An engine that is ready: `work(seconds)` gives images per second, `logits` what it says of the images."""

    precision: str
    work: Callable[[float], float]
    logits: Logits


def measure(
    device: torch.device,
    card: CudaDevice,
    variant: str,
    batch: int,
    *,
    rounds: int,
    seconds: float,
    compiler: TorchCompiler | None = None,
) -> list[GpuEngine]:
    """All engines with one batch size, in turn, `rounds` times. One that fails gets a note, and the others go on.

    `card` is `device` as ours sees it; `compiler` is what compiles ours.
    """
    images = np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8)
    truth = _truth(device, variant, images)
    makers: dict[str, Callable[[], Entry]] = {
        "transformers": lambda: _theirs(device, variant, images, None),
        "max-autotune": lambda: _theirs(device, variant, images, "max-autotune"),
        "pvt-serve": lambda: _ours(card, variant, images, compiler),
    }
    ready: dict[str, Entry] = {}
    notes: dict[str, str] = {}
    for name, make in makers.items():
        try:
            ready[name] = make()
        except Exception as error:  # noqa: BLE001  whatever it is, it is reported in its place
            notes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    rates: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, entry in ready.items():
            rates[name].append(entry.work(seconds))
    return [
        _row(ready[name], truth, engine=name, variant=variant, batch=batch, images_per_second=tuple(rates[name]))
        if name in ready
        else GpuEngine(engine=name, variant=variant, batch=batch, note=notes[name])
        for name in makers
    ]


def _row(entry: Entry, truth: Tensor, **known: Any) -> GpuEngine:  # noqa: ANN401  fields of the record
    relative, cosine = _error(entry.logits(), truth)
    return GpuEngine(relative=relative, cosine=cosine, precision=entry.precision, **known)


def peak_flops(device: torch.device, side: int = 8192, seconds: float = 2.0) -> float:
    """Operations per second of the fastest of many bfloat16 matrix products of `side`."""
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    best, end = 0.0, perf_counter() + seconds
    while perf_counter() < end:
        _wait(device)
        start = perf_counter()
        for _ in range(10):
            torch.mm(a, b, out=out)
        _wait(device)
        best = max(best, 10 * 2 * side**3 / (perf_counter() - start))
    return best


def copy_rate(device: torch.device, batch: int = 64, seconds: float = 1.0) -> float:
    """Images per second whose pixels get onto the card from pinned memory, one batch after another."""
    here = torch.zeros((batch, SIDE, SIDE, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(here, device=device)

    def work() -> None:
        there.copy_(here, non_blocking=True)
        _wait(device)

    return _rate(work, batch, seconds)


def _truth(device: torch.device, variant: str, images: Batch) -> Tensor:
    torch.backends.cudnn.allow_tf32 = False
    model = make_model(variant).to(device)
    with torch.inference_mode():
        singly = [model(_normalised(device, images[i : i + 1])).logits for i in range(len(images))]
    return torch.cat(singly).float().cpu()


def _theirs(device: torch.device, variant: str, images: Batch, mode: str | None) -> Entry:
    """Input normalised and on the card beforehand: that is what a user of theirs times."""
    model = make_model(variant).to(device, torch.bfloat16)
    run = torch.compile(model, mode=mode, dynamic=False) if mode else model
    pixels = _normalised(device, images).to(torch.bfloat16)

    @torch.inference_mode()
    def logits() -> Tensor:
        given: Tensor = run(pixels).logits
        return given

    for _ in range(5):
        logits()

    def work() -> None:
        for _ in range(_AT_ONCE):
            logits()
        _wait(device)

    return Entry(
        "bfloat16",
        lambda seconds: _rate(work, _AT_ONCE * len(images), seconds),
        lambda: logits().float().cpu().numpy(),
    )


def _ours(card: CudaDevice, variant: str, images: Batch, compiler: TorchCompiler | None) -> Entry:
    """As the server runs it, copies to the card and back included, with as many batches on their way as there."""
    ours = OnDevice(card, (variant, make_model(variant).state_dict()), len(images), (_MEAN, _STD), compiler)

    def work(seconds: float) -> float:
        done = [0] * ours.instances
        start = perf_counter()

        def one(instance: int) -> None:
            while perf_counter() < start + seconds:
                ours.run(instance, images)
                done[instance] += len(images)

        threads = [threading.Thread(target=one, args=(instance,)) for instance in range(ours.instances)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done) / (perf_counter() - start)

    return Entry(ours.precision, work, lambda: ours.run(0, images))


def _normalised(device: torch.device, images: Batch) -> Tensor:
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    shape = (1, 3, 1, 1)
    return (pixels - torch.tensor(_MEAN, device=device).view(shape)) / torch.tensor(_STD, device=device).view(shape)


def _error(logits: Floats, truth: Tensor) -> tuple[float, float]:
    given = torch.from_numpy(np.array(logits))
    relative = float((given - truth).abs().max() / truth.abs().max())
    return relative, float(torch.nn.functional.cosine_similarity(given, truth, dim=1).min())


def _rate(work: Callable[[], None], images: int, seconds: float) -> float:
    count, start = 0, perf_counter()
    while perf_counter() < start + seconds or not count:
        work()
        count += images
    return count / (perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best(rows: Sequence[GpuEngine], variant: str, engine: str = "pvt-serve") -> float:
    """The greatest images per second that `engine` reached with `variant`, with whatever batch size; 0 without any."""
    return max((max(row.images_per_second) for row in rows
                if (row.variant, row.engine) == (variant, engine) and row.images_per_second), default=0.0)  # fmt: skip
