"""The OpenVINO backend: one graph of fixed shape per batch size, compiled straight from the torch module.

A dynamic batch dimension costs a factor of two to three on a CPU, hence one graph for each size (decision 1).
"""

from collections.abc import Sequence
from io import BytesIO
from threading import Event
from typing import Any

import openvino as ov
from openvino import properties
from openvino.properties import hint

from service.arrays import Floats
from service.backends.base import Batch, Blob, Graph, Layout, Precision, Program
from service.backends.convert import convert
from service.backends.layouts import TUNING_SECONDS, base_layout, layouts
from service.backends.served import Served
from service.errors import OutOfMemory
from service.machine.memory import settled_bytes

_TYPES: dict[Precision, ov.Type] = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16, "float16": ov.Type.f16}


class OpenVinoBackend:
    """Compiles for the CPU, for `instances` callers at a time."""

    name = "openvino"
    version: str = ov.__version__
    device = "cpu"
    probe_size = 1
    tuning_seconds = TUNING_SECONDS
    exports = True
    improves = False

    def __init__(self, instances: int) -> None:
        self.instances = instances
        self._core = ov.Core()
        native = "BF16" in self._core.get_property("CPU", properties.device.capabilities())
        self.precisions: tuple[Precision, ...] = ("bfloat16", "float32") if native else ("float32",)

    def layouts(self, cores: int) -> Sequence[Layout]:
        """See `Backend.layouts`."""
        return layouts(base_layout(self.instances, cores), cores)

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        return settled_bytes()

    def program(self, module: Served, height: int, width: int) -> Program:
        """See `Backend.program`."""
        return _Converted(self, self._core, convert(module, height, width))

    def restore(self, blob: Blob, layout: Layout, precision: Precision) -> Graph:
        """See `Backend.restore`. As a tensor it is not copied: for b5 that takes a second instead of five."""
        tensor = ov.Tensor(blob)
        compiled = self._core.import_model(tensor, "CPU", _config(layout, precision))
        return _Compiled(compiled, self.instances, tensor)


class _Converted:
    def __init__(self, backend: OpenVinoBackend, core: ov.Core, model: ov.Model) -> None:
        self._backend = backend
        self._core = core
        self._model = model

    def graph(self, size: int, layout: Layout, precision: Precision) -> Graph:
        model = self._model.clone()
        _, *image = self._model.inputs[0].partial_shape
        model.reshape([size, *image])
        compiled = self._core.compile_model(model, "CPU", _config(layout, precision))
        return _Compiled(compiled, self._backend.instances)

    def prepare(self, size: int, layout: Layout, precision: Precision, stopped: Event) -> None:
        raise NotImplementedError

    def faster(self, size: int, layout: Layout, precision: Precision) -> Graph:
        raise NotImplementedError


class _Compiled:
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
        # Copies: the request's own tensors are overwritten by its next batch.
        return tuple(request.get_output_tensor(i).data.copy() for i in range(self._outputs))

    def export(self) -> bytes:
        if self._blob is not None:  # OpenVINO can't read what a restored graph exports
            return bytes(self._blob.data)
        stream = BytesIO()
        self._compiled.export_model(stream)
        return stream.getvalue()

    def room(self, instance: int) -> None:  # noqa: ARG002
        return None


def _config(layout: Layout, precision: Precision) -> dict[str, Any]:
    return {
        hint.inference_precision(): _TYPES[precision],
        properties.num_streams(): layout.streams,
        properties.inference_num_threads(): layout.streams * layout.threads,
        # Decoding runs on the same cores: the kernel places threads better than a fixed core for each stream.
        hint.enable_cpu_pinning(): False,
    }
