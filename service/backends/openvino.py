"""The OpenVINO backend: one graph of fixed shape per batch size, compiled straight from the torch module.

A dynamic batch dimension costs a factor of two to three on a CPU, hence one graph for each size (docs/architecture.md).
"""

from typing import Any

import openvino as ov
import torch
from openvino import properties
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.properties import hint

from service.backends.base import Batch, Graph, Precision, Program, Served
from service.errors import OutOfMemory
from service.outputs import Floats

_TYPES: dict[Precision, ov.Type] = {"float32": ov.Type.f32, "bfloat16": ov.Type.bf16}


class OpenVinoBackend:
    """`instances` streams, each of `threads` threads, on the CPU."""

    name = "openvino"

    def __init__(self, instances: int, threads: int, precision: Precision | None = None) -> None:
        """`precision` None means bfloat16 where the CPU computes in it, float32 elsewhere."""
        self.instances = instances
        self._core = ov.Core()
        self._precision: Precision = precision or ("bfloat16" if self._has_bfloat16() else "float32")
        self._config: dict[str, Any] = {
            hint.inference_precision(): _TYPES[self._precision],
            properties.num_streams(): instances,
            properties.inference_num_threads(): instances * threads,
            # Decoding runs on the same cores: the kernel places threads better than a fixed core for each stream.
            hint.enable_cpu_pinning(): False,
        }

    def program(self, module: Served, height: int, width: int) -> Program:
        """See `Backend.program`."""
        return _Converted(self._core, self._config, self._precision, self.instances, _convert(module, height, width))

    def _has_bfloat16(self) -> bool:
        return "BF16" in self._core.get_property("CPU", properties.device.capabilities())


class _Converted:
    def __init__(
        self, core: ov.Core, config: dict[str, Any], precision: Precision, instances: int, model: ov.Model
    ) -> None:
        self.precision = precision
        self._core = core
        self._config = config
        self._instances = instances
        self._model = model

    def graph(self, size: int) -> Graph:
        model = self._model.clone()
        _, *image = self._model.inputs[0].partial_shape
        model.reshape([size, *image])
        return _Compiled(self._core.compile_model(model, "CPU", self._config), self._instances)


class _Compiled:
    def __init__(self, compiled: ov.CompiledModel, instances: int) -> None:
        self._requests = [compiled.create_infer_request() for _ in range(instances)]

    def run(self, instance: int, batch: Batch) -> tuple[Floats, Floats]:
        request = self._requests[instance]
        try:
            request.infer({0: batch}, share_inputs=True)
        except MemoryError as error:
            raise OutOfMemory(f"a batch of {len(batch)} does not fit into memory") from error
        # Copies: the request's own tensors are overwritten by its next batch.
        return request.get_output_tensor(0).data.copy(), request.get_output_tensor(1).data.copy()


def _convert(module: Served, height: int, width: int) -> ov.Model:
    """`module` as an OpenVINO model with a dynamic batch dimension.

    The front end is called directly because `ov.convert_model` reports its use over the network.
    """
    example = torch.zeros(1, height, width, 3, dtype=torch.uint8)
    with torch.inference_mode():
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=(example,), trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    model.reshape([-1, height, width, 3])
    return model
