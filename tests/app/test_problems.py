from base64 import b64encode
from typing import Any

import pytest
import structlog
from starlette.testclient import TestClient

from app import problems
from service import errors
from service.engine import Engine
from service.errors import QueueFull
from tests.app.conftest import MakeClient, png

MODEL = "pvt_v2_b0.digits"
INFER = f"/v2/models/{MODEL}/infer"
TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 64, 64, 3], "data": [0] * 12_288}
TIMES = ("wait;dur=", "decode;dur=", "queue;dur=", "infer;dur=", "encode;dur=", "total;dur=")


def descendants(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(each for child in kind.__subclasses__() for each in descendants(child))]


def test_every_error_of_the_service_has_a_status() -> None:
    unmapped = [
        kind.__name__
        for kind in descendants(errors.ServiceError)
        if kind is not errors.ServiceError and not any(ancestor in problems.STATUS for ancestor in kind.__mro__)
    ]

    assert unmapped == []


def test_an_unexpected_error_is_anonymous_and_logged(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("the secret")

    client = make_client()
    monkeypatch.setattr("app.routes.models.model_info", fail)

    with structlog.testing.capture_logs() as lines:
        response = client.get("/models/pvt_v2_b0.digits", headers={"X-Request-ID": "mine"})

    assert response.status_code == 500
    assert response.json()["type"] == "urn:pvt-serve:problem:internal-error"
    assert response.json()["request_id"] == response.headers["X-Request-ID"] == "mine"
    assert "secret" not in response.text
    unexpected, request = lines
    assert (unexpected["event"], repr(unexpected["exc_info"])) == ("unexpected_error", "LookupError('the secret')")
    assert (request["event"], request["status"]) == ("request", 500)
    assert 'route="/models/{model_id}",status="500"' in client.get("/metrics").text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("DELETE", "/predict", 405)])
def test_what_the_framework_refuses_is_a_problem_too(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)

    assert response.status_code == status
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.json()["request_id"] == response.headers["X-Request-ID"]


def test_with_keys_set_a_request_must_carry_one(make_client: MakeClient) -> None:
    client = make_client(api_keys=("first", "second"))

    refused = client.get("/models")
    wrong = client.get("/models", headers={"Authorization": "Bearer third"})
    basic = client.get("/models", headers={"Authorization": "Basic second"})
    right = client.get("/models", headers={"Authorization": "Bearer second"})

    assert [each.status_code for each in (refused, wrong, basic, right)] == [401, 401, 401, 200]
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/health").status_code == 200
    assert client.get("/openapi.json").json()["paths"]["/predict"]["post"]["security"]


def test_a_service_that_shuts_down_says_when_to_come_back(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object, __: float | None = None) -> None:
        raise errors.ShuttingDown("the service is shutting down")

    monkeypatch.setattr("service.engine.Engine.request", refuse)

    response = make_client().post("/predict", content=b"x", headers={"Content-Type": "image/png"})

    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")


def body(path: str) -> dict[str, Any]:
    url = "data:image/png;base64," + b64encode(png()).decode()
    return {"inputs": [TENSOR]} if path == INFER else {"input": url, "model": MODEL}


@pytest.mark.parametrize("path", ["/v2/x", "/v1/x", "/v2", "/v1"])
def test_other_protocols_know_no_422(path: str) -> None:
    foreign = problems.translated(path, problems.problem(errors.InvalidRequest("no")))

    assert foreign is not None
    assert foreign[0] == 400


@pytest.mark.parametrize("path", ["/predict", "/", "/v20", "/v", "/health"])
def test_our_own_paths_speak_our_own_form(path: str) -> None:
    assert problems.translated(path, problems.problem(errors.InvalidRequest("no"))) is None


@pytest.mark.parametrize("path", [INFER, "/v1/embeddings"])
def test_answers_have_ids_times_and_metrics_as_predictions_have(client: TestClient, path: str) -> None:
    response = client.post(path, json=body(path), headers={"X-Request-ID": "mine"})

    assert response.status_code == 200
    assert response.headers["x-request-id"] == "mine"
    assert all(each in response.headers["server-timing"] for each in TIMES)
    route = INFER.replace(MODEL, "{name}") if path == INFER else path
    assert f'pvt_http_requests_total{{method="POST",route="{route}",status="200"}}' in client.get("/metrics").text


@pytest.mark.parametrize("path", [INFER, "/v1/embeddings"])
def test_a_full_queue_says_when_to_come_back(client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    async def full(*_: object, **__: object) -> None:
        raise QueueFull("the queue is full", retry_after_seconds=2.5)

    monkeypatch.setattr(Engine, "infer", full)
    response = client.post(path, json=body(path))

    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    error = response.json()["error"]
    assert (error if path == INFER else error["message"]) == "the queue is full"


def test_keys_are_asked_for_where_some_are_set_but_not_of_probes(make_client: MakeClient) -> None:
    client = make_client(api_keys=("one",))
    for path in ("/v2", INFER, "/v2/repository/index", "/v1/embeddings", "/v1/models"):
        method = "GET" if path in {"/v2", "/v1/models"} else "POST"
        refused = client.request(method, path)

        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]
        assert client.request(method, path, headers={"Authorization": "Bearer one"}).status_code != 401
    assert [client.get(f"/v2/health/{each}").status_code for each in ("live", "ready")] == [200, 200]


def test_memory_that_ran_out_is_no_fault_of_the_code() -> None:
    response = problems.unexpected(MemoryError(), {"type": "http", "state": {"request_id": "id", "path": "/predict"}})

    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert b"memory-exhausted" in response.body
