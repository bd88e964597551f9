"""From the torch module to an OpenVINO model."""

import openvino as ov
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

from service.served import Served


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
    return model
