"""The backends on a CPU: OpenVINO, and torch's eager module."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import properties
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.properties import hint
from torch.jit import _recursive, _state

from service.backends.base import DTYPES, Backend, Batch, Blob, Graph, Images, Layout, Precision, Program, Served
from service.backends.folding import fold_norms
from service.errors import OutOfMemory
from service.machine import give_back, resident_bytes
from service.results import Floats

# In the messages of RuntimeErrors: neither torch's CPU allocator nor OpenVINO has an exception type for it.
_NO_MEMORY = "can't allocate memory", "Failed to allocate", "bad_alloc"
_OPENVINO: dict[Precision, ov.Type] = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16, "float16": ov.Type.f16}


class CpuBackend(Backend):
    """What both have in common."""

    device = "cpu"
    tuning_seconds = 10.0
    probe_size = 1

    def __init__(self, instances: int) -> None:
        self.instances = instances

    def layouts(self, cores: int) -> Sequence[Layout]:
        """An even share of the cores for each instance, then fewer streams on all cores: halves down to one stream.

        If the number of instances was set by hand, only one stream, for the latency graph.
        """
        base = Layout(self.instances, max(1, cores // self.instances))
        threads = [1 << i for i in range(1, cores.bit_length())] if self.instances == cores else []
        others = [Layout(cores // each, each) for each in threads if cores % each == 0]
        return tuple(dict.fromkeys([base, *others, Layout(1, cores)]))

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        give_back()
        return resident_bytes()


class TorchBackend(CpuBackend):
    """Runs the module as it is. It does not try bfloat16: on a CPU, eager, that gains too little for its error."""

    name = "torch"
    version = str(torch.__version__)
    precisions: tuple[Precision, ...] = ("float32",)

    def program(self, module: Served, height: int, width: int) -> Program:  # noqa: ARG002  eager takes any size
        """The program of `module`, which runs as it is."""
        module.eval()
        return Program(lambda _, layout, precision: _TorchGraph(module, layout.threads, precision))


@dataclass(frozen=True, slots=True)
class _TorchGraph(Graph):
    module: Served
    threads: int
    precision: Precision

    def run(self, instance: int, images: Images) -> tuple[Floats, ...]:  # noqa: ARG002
        torch.set_num_threads(self.threads)  # of the calling thread, which is not ours to make
        autocast = torch.autocast("cpu", DTYPES[self.precision], enabled=self.precision != "float32")
        with _memory_errors(len(images)), torch.inference_mode(), autocast:
            outputs = self.module(torch.from_numpy(np.stack([*images])))  # a copy: an image may be read-only
        return tuple(output.float().numpy() for output in outputs)


class OpenVinoBackend(CpuBackend):
    """Compiles a graph of fixed shape for each batch size: one of a dynamic size is slow (decision 1)."""

    name = "openvino"
    version: str = ov.__version__
    fold = True  # norms; `bench.folding` measures what that saves

    def __init__(self, instances: int) -> None:
        super().__init__(instances)
        self._core = ov.Core()
        native = "BF16" in self._core.get_property("CPU", properties.device.capabilities())
        self.precisions = ("bfloat16", "float32") if native else ("float32",)

    def program(self, module: Served, height: int, width: int) -> Program:
        """The program of `module`, whose norms are folded and which is traced."""
        if self.fold:
            fold_norms(module.model)
        traced = _traced(module, height, width)

        def graph(size: int, layout: Layout, precision: Precision) -> Graph:
            model = traced.clone()
            model.reshape([size, height, width, 3])
            with _memory_errors(size):
                compiled = self._core.compile_model(model, "CPU", _config(layout, precision))
                return _OpenVinoGraph(compiled, self.instances)

        return Program(graph)

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        """The graph exported as `blob`, which it keeps. A tensor is not copied: for b5 that saves four of 5 seconds."""
        tensor = ov.Tensor(blob)
        compiled = self._core.import_model(tensor, "CPU", _config(layout, precision))
        return _OpenVinoGraph(compiled, self.instances, tensor)


class _OpenVinoGraph(Graph):
    def __init__(self, compiled: ov.CompiledModel, instances: int, blob: ov.Tensor | None = None) -> None:
        computes_in = compiled.get_property(hint.inference_precision())
        self.precision = next((name for name, kind in _OPENVINO.items() if kind == computes_in), "float32")
        self._compiled = compiled
        self._blob = blob  # its memory is the graph's
        self._shape: tuple[int, ...] = tuple(compiled.inputs[0].shape)
        self._requests = [compiled.create_infer_request() for _ in range(instances)]

    def run(self, instance: int, images: Images) -> tuple[Floats, ...]:
        request = self._requests[instance]
        with _memory_errors(self._shape[0]):
            request.infer({0: self._padded(images)}, share_inputs=True)
            # Copies: the next batch of the request overwrites its tensors.
            return tuple(tensor.data.copy() for tensor in request.output_tensors)

    def _padded(self, images: Images) -> Batch:
        """The images as a batch of the graph's size; a batch that is whole, or one image, is not copied."""
        if len(images) == self._shape[0] and isinstance(images, np.ndarray):
            return images
        if self._shape[0] == 1:
            return images[0][np.newaxis]
        batch = np.zeros(self._shape, np.uint8)
        np.stack([*images], out=batch[: len(images)])
        return batch

    def export(self) -> bytes:
        if self._blob is not None:  # OpenVINO can't read what a restored graph exports
            return bytes(self._blob.data)
        exported: BytesIO = self._compiled.export_model()
        return exported.getvalue()


@contextmanager
def _memory_errors(size: int) -> Iterator[None]:
    """Raise OutOfMemory for a batch of `size` where the block finds no memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
            raise OutOfMemory(f"a batch of {size} does not fit into memory") from error
        raise


def _traced(module: Served, height: int, width: int) -> ov.Model:
    """Converted by the front end itself, because `ov.convert_model` reports its use over the network."""
    example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    with torch.inference_mode():
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=(example,), trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    del decoder
    # Drop the types that torch makes for each traced module and never frees: 15 MB for each load of a b2. torch's own
    # tests do the same between one another. `tests/service/machine/test_memory.py` watches that it helps.
    torch._C._jit_clear_class_registry()  # noqa: SLF001
    _recursive.concrete_type_store = _recursive.ConcreteTypeStore()
    _state._clear_class_state()  # noqa: SLF001
    return model


def _config(layout: Layout, precision: Precision) -> dict[str, Any]:
    return {
        hint.inference_precision(): _OPENVINO[precision],
        properties.num_streams(): layout.streams,
        properties.inference_num_threads(): layout.streams * layout.threads,
        # Decoding runs on the same cores: the kernel places threads better than a fixed core for each stream.
        hint.enable_cpu_pinning(): False,
    }
