"""Backends that give other logits than they should."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from service.backends.base import Blob, Graph, Images, Layout, Precision, Program, Served
from service.backends.cpu import TorchBackend
from service.results import Floats

Skew = Callable[[Floats, Precision], Floats]


def rolled(logits: Floats, precision: Precision) -> Floats:
    """Every class gets its neighbour's logit."""
    del precision
    return np.roll(logits, 1, axis=1)


def rolled_in_bfloat16(logits: Floats, precision: Precision) -> Floats:
    return rolled(logits, precision) if precision == "bfloat16" else logits


def failing_in_bfloat16(logits: Floats, precision: Precision) -> Floats:
    if precision == "bfloat16":
        raise RuntimeError("no kernel\nfor it")
    return logits


def off_by(share: float) -> Skew:
    return lambda logits, _: logits + np.float32(share * np.abs(logits).max())


def not_a_number(logits: Floats, precision: Precision) -> Floats:
    del precision
    return logits * np.float32("nan")


def bfloat16_is_faster(_: object, precision: Precision, *__: object) -> float:
    """In place of `Tuning._probe`."""
    return 1.0 if precision == "float32" else 0.5


@dataclass
class SkewedGraph:
    graph: Graph
    skew: Skew

    @property
    def precision(self) -> Precision:
        return self.graph.precision

    @precision.setter
    def precision(self, value: Precision) -> None:
        raise NotImplementedError(value)

    def run(self, instance: int, images: Images) -> tuple[Floats, ...]:
        logits, *others = self.graph.run(instance, images)
        return self.skew(logits, self.precision), *others

    def export(self) -> bytes | None:
        return self.graph.export()


class AnyTorch(TorchBackend):
    """Tries bfloat16 too, which an eager module computes in on any CPU."""

    precisions: tuple[Precision, ...] = ("bfloat16", "float32")


class SkewedTorch(AnyTorch):
    """Gives other logits than it should."""

    def __init__(self, skew: Skew) -> None:
        super().__init__(1)
        self.skew = skew

    def program(self, module: Served, height: int, width: int) -> Program:
        program = super().program(module, height, width)
        return Program(lambda *arguments: SkewedGraph(program.graph(*arguments), self.skew))


class Exporting(TorchBackend):
    """Its graphs can be kept, in its own memory; those restored give other logits, where `skew` says so."""

    version = "exporting"
    graphs: ClassVar[list[Graph]] = []

    def __init__(self, skew: Skew = lambda logits, _: logits) -> None:
        super().__init__(1)
        self.skew = skew

    def program(self, module: Served, height: int, width: int) -> Program:
        program = super().program(module, height, width)
        return Program(lambda *arguments: Exported(program.graph(*arguments), lambda logits, _: logits))

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        del layout, precision
        return SkewedGraph(self.graphs[int(blob.tobytes())], self.skew)


class Exported(SkewedGraph):
    def export(self) -> bytes:
        Exporting.graphs.append(self)
        return str(len(Exporting.graphs) - 1).encode()
