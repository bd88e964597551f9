"""The OpenVINO backend: one graph of fixed shape per batch size, compiled straight from the torch module.

A dynamic batch dimension costs a factor of two to three on a CPU, hence one graph for each size (decision 1).
"""

from io import BytesIO
from typing import Any

import openvino as ov
import torch
from openvino import properties
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.properties import hint
from torch.jit import _recursive, _state

from service.backends.base import Batch, Blob, CpuBackend, Graph, Layout, Precision, Program
from service.backends.module import Served
from service.errors import OutOfMemory
from service.results import Floats

_TYPES: dict[Precision, ov.Type] = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16, "float16": ov.Type.f16}


class OpenVinoBackend(CpuBackend):
    """Compiles for the CPU, for `instances` callers at a time."""

    name = "openvino"
    version: str = ov.__version__

    def __init__(self, instances: int) -> None:
        super().__init__(instances)
        self._core = ov.Core()
        native = "BF16" in self._core.get_property("CPU", properties.device.capabilities())
        self.precisions: tuple[Precision, ...] = ("bfloat16", "float32") if native else ("float32",)

    def program(self, module: Served, height: int, width: int) -> Program:
        """The program of `module`, which is traced."""
        return _Program(self._core, self.instances, _convert(module, height, width))

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        """The graph exported as `blob`, which it keeps. A tensor is not copied: for b5 that saves four of 5 seconds."""
        tensor = ov.Tensor(blob)
        return _Graph(self._core.import_model(tensor, "CPU", _config(layout, precision)), self.instances, tensor)


class _Program:
    optimized = None

    def __init__(self, core: ov.Core, instances: int, model: ov.Model) -> None:
        self._core = core
        self._instances = instances
        self._model = model

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
        model = self._model.clone()
        _, *image = self._model.inputs[0].partial_shape
        model.reshape([size, *image])
        return _Graph(self._core.compile_model(model, "CPU", _config(layout, precision)), self._instances)


class _Graph:
    def __init__(self, compiled: ov.CompiledModel, instances: int, blob: ov.Tensor | None = None) -> None:
        computes_in = compiled.get_property(hint.inference_precision())
        self.precision: Precision = next((name for name, kind in _TYPES.items() if kind == computes_in), "float32")
        self._compiled = compiled
        self._blob = blob  # its memory is the graph's
        self._outputs = len(compiled.outputs)
        self._requests = [compiled.create_infer_request() for _ in range(instances)]

    def run(self, instance: int, batch: Batch) -> tuple[Floats, ...]:
        request = self._requests[instance]
        try:
            request.infer({0: batch}, share_inputs=True)
        except MemoryError as error:
            raise OutOfMemory(f"a batch of {len(batch)} does not fit into memory") from error
        # Copies: the next batch of the request overwrites its tensors.
        return tuple(request.get_output_tensor(i).data.copy() for i in range(self._outputs))

    def input_buffer(self, instance: int) -> None:  # noqa: ARG002
        return None

    def export(self) -> bytes:
        if self._blob is not None:  # OpenVINO can't read what a restored graph exports
            return bytes(self._blob.data)
        stream = BytesIO()
        self._compiled.export_model(stream)
        return stream.getvalue()


def _convert(module: Served, height: int, width: int) -> ov.Model:
    """`module` as an OpenVINO model with a dynamic batch dimension.

    It calls the front end directly, because `ov.convert_model` reports its use over the network.
    """
    example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    with torch.inference_mode():
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=(example,), trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    model.reshape([-1, height, width, 3])
    del decoder
    _forget_traces()
    return model


def _forget_traces() -> None:
    """Drop the types that torch makes for each traced module and never frees: 15 MB for each load of a b2.

    torch's own tests do the same between one another. `tests/service/machine/test_memory.py` watches that it helps.
    """
    torch._C._jit_clear_class_registry()  # noqa: SLF001
    _recursive.concrete_type_store = _recursive.ConcreteTypeStore()
    _state._clear_class_state()  # noqa: SLF001


def _config(layout: Layout, precision: Precision) -> dict[str, Any]:
    return {
        hint.inference_precision(): _TYPES[precision],
        properties.num_streams(): layout.streams,
        properties.inference_num_threads(): layout.streams * layout.threads,
        # Decoding runs on the same cores: the kernel places threads better than a fixed core for each stream.
        hint.enable_cpu_pinning(): False,
    }
