"""What KServe's version 1, SageMaker and Vertex AI send to a container, and what they expect of it."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import httpx
import pytest
from botocore.config import Config
from starlette.testclient import TestClient

from app.settings import Settings, SettingsInvalid
from tests.app.conftest import MakeClient
from tests.app.processes import ROOT, serving

MODEL = "pvt_v2_b0.digits"
# In a process of its own, and without the package's `__init__`, which imports a whole server.
_KSERVE = """
import asyncio, importlib, json, sys, types
from importlib.util import find_spec

package = types.ModuleType("kserve")
package.__path__ = [*find_spec("kserve").submodule_search_locations]
sys.modules["kserve"] = package
clients = importlib.import_module("kserve.inference_client")
url, model, *images = sys.argv[1:]

async def main():
    client = clients.InferenceRESTClient(clients.RESTConfig(protocol="v1"))
    answer = await client.infer(url, {"instances": [{"b64": each} for each in images]}, model_name=model)
    try:
        await client.infer(url, {"instances": [{"b64": "abc%"}]}, model_name=model)
    except Exception as error:
        answer["error"] = str(error)
    answer["ready"] = await client.is_model_ready(url, model)
    await client.close()
    print(json.dumps(answer))

asyncio.run(main())
"""
PREDICT = f"/v1/models/{MODEL}:predict"


@pytest.fixture(scope="module")
def images(digits: Path) -> list[bytes]:
    return [(digits / f"{name}.png").read_bytes() for name in ("zero", "seven")]


def b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def labels(predictions: list[Any]) -> list[str]:
    return [each["predictions"][0]["label"] for each in predictions]


@pytest.mark.parametrize(
    "form",
    [
        {"b64": "{}"},  # KServe and TensorFlow Serving
        {"image_bytes": {"b64": "{}"}},
        {"image": {"b64": "{}"}},
        {"input_1": {"b64": "{}"}, "key": "a"},  # Vertex AI's batch prediction adds a key
        {"content": "{}", "mimeType": "image/png"},  # Vertex AI's own image models
        {"data": "{}"},  # TorchServe
        "{}",
        "data:image/png;base64,{}",
        {"image": {"url": "data:image/png;base64,{}"}},
    ],
)
@pytest.mark.parametrize("path", [PREDICT, f"/v1/models/{MODEL}/versions/1:predict", "/invocations"])
def test_instances_have_the_form_of_each_platform(
    client: TestClient, images: list[bytes], form: Any, path: str
) -> None:
    instances = [json.loads(json.dumps(form).replace("{}", b64(each))) for each in images]

    response = client.post(path, json={"signature_name": "serving_default", "instances": instances})

    assert response.status_code == 200
    ours = client.post("/predict", json={"images": [*map(b64, images)]}).json()["results"]
    predictions = response.json()["predictions"]
    assert [*response.json()] == ["predictions"]
    assert predictions == [{k: v for k, v in each.items() if k != "filename"} for each in ours]
    assert labels(predictions) == ["0", "7"]


def test_parameters_are_those_of_predict(client: TestClient, images: list[bytes]) -> None:
    def post(**parameters: Any) -> Any:
        return client.post(PREDICT, json={"instances": [{"b64": b64(images[1])}], "parameters": parameters})

    assert len(post(top_k=2).json()["predictions"][0]["predictions"]) == 2
    assert len(post(top_k="3", size=64, min_score=None).json()["predictions"][0]["predictions"]) == 3
    assert post(model="another").status_code == 200  # the path names the model
    for wrong, reason in (({"topk": 1}, "parameters: topk"), ({"top_k": 0}, "top_k: must be from 1 to 1000"),
                          ({"top_k": [1]}, "parameters: top_k"), ({"min_score": 7}, "min_score 7: must be from 0"),
                          ({"size": 65}, "65")):  # fmt: skip
        response = post(**wrong)
        assert response.status_code == 400
        assert reason in response.json()["error"]


def test_an_instance_that_is_no_image_is_an_error_in_its_place_and_alone_the_response(
    client: TestClient, images: list[bytes]
) -> None:
    for path, status in ((PREDICT, 400), ("/invocations", 422)):
        several = client.post(path, json={"instances": [{"b64": b64(images[0])}, {"b64": "abc%"}, {"b64": "AAAA"}]})
        alone = client.post(path, json={"instances": [{"b64": "abc%"}]})

        good, undecodable, no_image = several.json()["predictions"]
        assert (several.status_code, good["predictions"][0]["label"]) == (200, "0")
        assert "character 4 is '%'" in undecodable["error"]["detail"]
        assert "not a supported image" in no_image["error"]["detail"]
        assert alone.status_code == status
        assert "character 4 is '%'" in alone.text


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, 'the body must be an object with a list of instances: {"instances": [{"b64": "..."}, ...]}'),
        ([], "the body must be an object"),
        ({"instances": {}}, "the body must be an object with a list of instances"),
        ({"inputs": {"image_bytes": [{"b64": "AAAA"}]}}, "inputs: the columns of TensorFlow Serving are not read"),
        ({"instances": []}, "the request carries no image"),
        ({"instances": [{"b64": "AAAA"}] * 65}, "more than 64 images"),
        ({"instances": [[[0, 0, 0]]]}, "instances.0: a list of numbers; send base64"),
        ({"instances": [{"b64": "AAAA"}, 7]}, "instances.1: no image; send base64, a data: URL"),
        ({"instances": [{"b64": "AAAA", "b": 1}]}, "instances.0: an object with the members 'b64', 'b', of which one"),
        ({"instances": [{"text": "a cat"}]}, "instances.0: text; the models here see images only"),
        ({"instances": ["https://example.org/a.png"]}, "images by URL are off"),
        ({"instances": [{"b64": "AAAA"}], "parameters": [1]}, "parameters: must be an object"),
    ],
)
def test_what_is_wrong_is_an_error_of_kserves_form(client: TestClient, body: Any, reason: str) -> None:
    response = client.post(PREDICT, json=body)

    assert response.status_code == 400
    assert [*response.json()] == ["error"]
    assert reason in response.json()["error"]


def test_models_are_listed_and_ready_for_clients_of_kserve(client: TestClient) -> None:
    unknown = client.post("/v1/models/none:predict", json={"instances": [{"b64": "AAAA"}]})

    assert client.get("/v1/models").json()["models"] == [MODEL]
    assert client.get(f"/v1/models/{MODEL}").json().items() >= {"name": MODEL, "ready": True}.items()
    assert client.get("/v1/models/none").status_code == unknown.status_code == 404
    assert "no model 'none'" in unknown.json()["error"]


@pytest.mark.skipif(find_spec("kserve") is None, reason="needs kserve")
def test_kserves_own_client_gets_classes_and_readiness(container: str, images: list[bytes]) -> None:
    command = [sys.executable, "-c", _KSERVE, container, MODEL, *map(b64, images)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (labels(answer["predictions"]), answer["ready"]) == (["0", "7"], True)
    assert answer["error"].startswith("not valid base64, nor a data: URL of it: character 4 is '%', '400 Bad Request'")


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """The service as SageMaker starts its container: `serve`, and the port by SageMaker's variable."""
    environment = {"SAGEMAKER_BIND_TO_PORT": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with serving(
        prefix=(str(ROOT / "deploy" / "serve"),), environment=environment, port="1", backend="torch"
    ) as server:
        yield server.url


@pytest.fixture
def sagemaker(container: str) -> Any:
    """Amazon's client; its requests go to the container as SageMaker sends them on."""
    runtime: Any = boto3.client(
        "sagemaker-runtime", endpoint_url=container, region_name="eu-west-1", aws_access_key_id="x",
        aws_secret_access_key="x", config=Config(retries={"total_max_attempts": 1}),  # noqa: S106
    )  # fmt: skip

    def route(request: Any, **_: Any) -> None:
        request.url = f"{container}/{urlsplit(request.url).path.rpartition('/')[2]}"

    runtime.meta.events.register("before-send.sagemaker-runtime.InvokeEndpoint", route)
    return runtime


@pytest.mark.parametrize("content_type", ["image/png", "application/x-image", "application/octet-stream"])
def test_sagemakers_client_sends_an_image(sagemaker: Any, images: list[bytes], content_type: str) -> None:
    response = sagemaker.invoke_endpoint(
        EndpointName="digits", Body=images[1], ContentType=content_type, Accept="application/json",
        CustomAttributes=f"trace=c000b4f9, top_k=2, model={MODEL}",
    )  # fmt: skip

    answer = json.loads(response["Body"].read())
    assert response["ContentType"] == "application/json"
    assert (answer["model"], labels(answer["results"])) == (MODEL, ["7"])
    assert len(answer["results"][0]["predictions"]) == 2


def test_sagemakers_client_sends_json_and_gets_the_services_errors(sagemaker: Any, images: list[bytes]) -> None:
    def invoke(body: Any, **more: str) -> Any:
        response = sagemaker.invoke_endpoint(
            EndpointName="digits", Body=json.dumps(body), ContentType="application/json", **more
        )
        return json.loads(response["Body"].read())

    assert labels(invoke({"instances": [{"b64": b64(each)} for each in images]})["predictions"]) == ["0", "7"]
    assert labels(invoke({"images": [b64(images[0])]})["results"]) == ["0"]
    for wrong, more in (({"images": [1]}, {}), ({"instances": [{"b64": "AAAA"}]}, {}),
                        ({"images": []}, {"CustomAttributes": "top_k=many"}),
                        ({"images": []}, {"Accept": "text/csv"})):  # fmt: skip
        with pytest.raises(botocore.exceptions.ClientError):
            invoke(wrong, **more)


def test_sagemaker_finds_its_container_ready(container: str) -> None:
    assert httpx.get(f"{container}/ping").status_code == 200


def test_vertex_ai_names_port_paths_and_store(images: list[bytes], model_store: Path) -> None:
    """With the default paths of an endpoint, which lie under those of OpenAI."""
    health = "/v1/endpoints/123/deployedModels/456"
    environment = {
        "AIP_HTTP_PORT": "0", "AIP_HEALTH_ROUTE": health, "AIP_PREDICT_ROUTE": f"{health}:predict",
        "AIP_STORAGE_URI": str(model_store), "AIP_MODE": "PREDICTION",
    }  # fmt: skip
    with serving(environment=environment, port="1", model_store="/nowhere", backend="torch") as server:
        ready = httpx.get(server.url + health)
        request = {"instances": [{"b64": b64(each)} for each in images], "parameters": {"top_k": 1}}
        predicted = httpx.post(f"{server.url}{health}:predict", json=request, timeout=60)
        wrong = httpx.post(f"{server.url}{health}:predict", json={"instances": [{"b64": "AAAA"}]})

    assert ready.status_code == 200
    assert labels(predicted.json()["predictions"]) == ["0", "7"]
    assert (wrong.status_code, [*wrong.json()]) == (400, ["error"])


def test_a_path_for_predictions_may_be_one_of_ours_and_still_reads_what_that_reads(
    make_client: MakeClient, images: list[bytes]
) -> None:
    client = make_client(predict_route="/predict", health_route="/health")

    assert client.get("/health").json()["ready"] is True
    assert labels(client.post("/predict", files={"image": images[0]}).json()["results"]) == ["0"]
    assert labels(client.post("/predict", json={"instances": [b64(images[1])]}).json()["predictions"]) == ["7"]


def test_keys_guard_predictions_and_not_health(make_client: MakeClient, images: list[bytes]) -> None:
    client = make_client(api_keys=("secret",), predict_route="/score", health_route="/alive")
    body = {"instances": [b64(images[0])]}

    for path in (PREDICT, "/invocations", "/score"):
        assert client.post(path, json=body).status_code == 401
        assert client.post(path, json=body, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/ping").status_code == client.get("/alive").status_code == 200


def test_a_health_check_never_counts_against_the_limits_of_its_client(
    make_client: MakeClient,
) -> None:
    client = make_client(client_rate=0.001, client_burst=1, health_route="/alive")

    assert client.get("/models").status_code == 200
    assert client.get("/models").status_code == 429
    assert {client.get(path).status_code for path in ("/ping", "/alive") for _ in range(5)} == {200}


def test_a_variable_of_a_platform_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AIP_HTTP_PORT", "many"), ("AIP_PREDICT_ROUTE", "predict"), ("AIP_HEALTH_ROUTE", "/a b")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            with pytest.raises(SettingsInvalid, match=f"^{name}={value}: "):
                Settings.from_environment()
