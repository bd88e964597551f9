import pytest
import structlog
from starlette.testclient import TestClient

from app import problems
from service import errors
from tests.app.conftest import MakeClient


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
