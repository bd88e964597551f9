"""Other clients of the protocol than Triton's, unchanged, each in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.app.conftest import png
from tests.app.open_inference.clients import MODEL, PIXELS
from tests.app.processes import ROOT, serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(backend="torch", precision="float32", read_log=False) as process:
        yield process.url


def run(client: str, address: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.app.open_inference.clients", client, address]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def logits(url: str) -> Any:
    """What Triton's own client gets for the pixels, and for two files."""
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        pixels = triton.InferInput("images", list(PIXELS.shape), "UINT8")
        pixels.set_data_from_numpy(PIXELS)
        files = triton.InferInput("encoded", [2], "BYTES")
        files.set_data_from_numpy(np.array([png()] * 2, dtype=np.object_))
        return [client.infer(MODEL, [each]).as_numpy("logits") for each in (pixels, files)]


def test_kserves_client_gets_what_tritons_gets(url: str, logits: Any) -> None:
    found = run("kserve_rest", url)

    assert (found["live"], found["ready"], found["model_ready"], found["refused"]) == (True, True, True, 404)
    np.testing.assert_allclose(found["logits True"], logits[0], rtol=1e-6)
    np.testing.assert_allclose(found["logits False"], logits[0], rtol=1e-6)


def test_mlservers_codecs_make_requests_and_read_responses(url: str, logits: Any) -> None:
    found = run("mlserver", url)

    for name, expected in (("pixels", logits[0]), ("files", logits[1]), ("text", logits[1])):
        np.testing.assert_allclose(np.reshape(found[name], (2, 10)), expected, rtol=1e-6)


def test_parameters_that_mean_nothing_here_are_ignored_and_shared_memory_is_refused_by_name(url: str) -> None:
    tensor = triton.InferInput("images", list(PIXELS.shape), "UINT8")
    tensor.set_data_from_numpy(PIXELS)
    shared = triton.InferInput("images", list(PIXELS.shape), "UINT8")
    shared.set_shared_memory("region", PIXELS.nbytes)
    output = triton.InferRequestedOutput("logits")
    output.set_shared_memory("region", 80)
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        options = {"priority": 2, "sequence_id": 7, "sequence_start": True, "parameters": {"mine": 1.5, "yours": "x"}}
        assert client.infer(MODEL, [tensor], **options).as_numpy("logits").shape == (2, 10)
        with pytest.raises(InferenceServerException, match=r"inputs\.0\.parameters\.shared_memory_region: .*not supp"):
            client.infer(MODEL, [shared])
        with pytest.raises(InferenceServerException, match=r"outputs\.0\.parameters\.shared_memory_region: .*not supp"):
            client.infer(MODEL, [tensor], outputs=[output])


def test_extensions_that_are_missing_are_refused_with_what_to_do(url: str) -> None:
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        for call, told in (
            (client.get_system_shared_memory_status, "shared memory is not supported; send"),
            (lambda: client.register_system_shared_memory("a", "/a", 8), "shared memory is not supported; send"),
            (client.unregister_cuda_shared_memory, "CUDA shared memory is not supported; send"),
            (client.get_trace_settings, "traces are not supported; Server-Timing"),
            (lambda: client.update_trace_settings(MODEL, {"trace_level": "OFF"}), "traces are not supported"),
            (client.get_log_settings, "PVT_LOG_FORMAT"),
        ):
            with pytest.raises(InferenceServerException, match=told) as raised:
                call()
            assert raised.value.status() == "501"
