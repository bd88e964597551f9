"""Clients that can't share a process with others: `python -m tests.app.open_inference.clients CLIENT ADDRESS`.

Two packages define the messages of the protocol's gRPC form under the same names, which protobuf refuses in a process.
KServe's and MLServer's packages also import whole servers, with Kubernetes' and Kafka's clients; only the modules below
are imported of them, unchanged. Each client prints one JSON object.
"""

import asyncio
import base64
import importlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import httpx
import numpy as np

from tests.app.conftest import png

MODEL = "pvt_v2_b0.digits"
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


def module(name: str) -> Any:
    """A module of a package whose `__init__` is left out."""
    package = name.partition(".")[0]
    if package not in sys.modules:
        spec = find_spec(package)
        assert spec
        assert spec.submodule_search_locations
        bare = ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = bare
    return importlib.import_module(name)


def kserve_request(binary: bool) -> Any:
    types = module("kserve.protocol.infer_type")
    tensor = types.InferInput("images", list(PIXELS.shape), "UINT8")
    tensor.set_data_from_numpy(PIXELS, binary_data=binary)
    return types.InferRequest(MODEL, [tensor], request_id="mine", parameters={"priority": 3, "trace": "yes"})


async def kserve_rest(address: str) -> dict[str, Any]:
    clients = module("kserve.inference_client")
    client = clients.InferenceRESTClient(clients.RESTConfig(protocol="v2"))
    found: dict[str, Any] = {
        "live": await client.is_server_live(address),
        "ready": await client.is_server_ready(address),
        "model_ready": await client.is_model_ready(address, MODEL),
    }
    for binary in (False, True):
        answer = await client.infer(address, kserve_request(binary), model_name=MODEL)
        assert answer.id == "mine"
        found[f"logits {binary}"] = answer.get_output_by_name("logits").as_numpy().tolist()
    try:
        await client.infer(address, kserve_request(True), model_name="pvt_v2_b0.none")
    except httpx.HTTPStatusError as error:
        found["refused"] = error.response.status_code
    await client.close()
    return found


async def kserve_grpc(address: str) -> dict[str, Any]:
    clients = module("kserve.inference_client")
    async with clients.InferenceGRPCClient(address) as client:
        answer = await client.infer(kserve_request(True))
        typed = await client.infer(kserve_request(False))
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model_ready": await client.is_model_ready(MODEL),
            "logits True": answer.get_output_by_name("logits").as_numpy().tolist(),
            "logits False": typed.get_output_by_name("logits").as_numpy().tolist(),
        }


def mlserver(address: str) -> dict[str, Any]:
    codecs, types = module("mlserver.codecs"), module("mlserver.types")
    found: dict[str, Any] = {}
    file = png()
    for name, tensor in (
        ("pixels", codecs.NumpyCodec.encode_input("images", PIXELS)),
        ("files", codecs.Base64Codec.encode_input("encoded", [file, file])),
        ("text", codecs.StringCodec.encode_input("encoded", [base64.b64encode(file).decode()] * 2)),
    ):
        request = types.InferenceRequest(id=name, inputs=[tensor], parameters=types.Parameters(content_type="np"))
        # Both with and without the members that are not set, which its REST client leaves out.
        for body in (request.model_dump_json(), types.InferenceRequest.__base__.model_dump_json(request)):
            headers = {"Content-Type": "application/json"}
            response = httpx.post(f"{address}/v2/models/{MODEL}/infer", content=body, headers=headers)
            answer = types.InferenceResponse.model_validate_json(response.content)
            assert answer.id == name
            (logits,) = [each for each in answer.outputs if each.name == "logits"]
            found[name] = codecs.NumpyCodec.decode_output(logits).tolist()
    return found


CLIENTS: dict[str, Callable[[str], Any]] = {each.__name__: each for each in (kserve_rest, kserve_grpc, mlserver)}

if __name__ == "__main__":
    found = CLIENTS[sys.argv[1]](sys.argv[2])
    print(json.dumps(asyncio.run(found) if asyncio.iscoroutine(found) else found))  # noqa: T201
