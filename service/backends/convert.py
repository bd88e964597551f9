"""From the torch module to an OpenVINO model."""

import openvino as ov
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch.jit import _recursive, _state

from service.backends.served import Served


def convert(module: Served, height: int, width: int) -> ov.Model:
    """`module` as an OpenVINO model with a dynamic batch dimension.

    The front end is called directly because `ov.convert_model` reports its use over the network.
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
    """Drop the types that torch has made for each traced module: it keeps them for ever, 15 MB for each load of a b2.

    As torch's own tests do between one another; `tests/service/machine/test_memory.py` watches that it helps.
    """
    torch._C._jit_clear_class_registry()  # noqa: SLF001
    _recursive.concrete_type_store = _recursive.ConcreteTypeStore()
    _state._clear_class_state()  # noqa: SLF001
