"""Routes that run as plain Starlette endpoints do what the framework's own would; parameters; media types."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.routing import BaseRoute
from starlette.testclient import TestClient

from app.main import create_app
from app.problems import NotAcceptable
from app.routes.images import ExplainQuery, FeaturesQuery, PredictQuery
from app.routes.inference import InferenceRoute, chosen_media_type
from app.settings import Settings
from tests.app.conftest import png

OFFERED = ("application/json", "application/x-npz", "image/png")
Ways = tuple[TestClient, TestClient]


def frameworks_own(route: BaseRoute) -> APIRoute:
    assert isinstance(route, InferenceRoute)
    return APIRoute(route.path, route.endpoint, methods=route.methods, dependencies=route.dependencies)


@pytest.fixture(scope="module")
def ways(model_store: Path) -> Iterator[Ways]:
    """Two services with a key, of which the second runs these routes in the framework's own way."""
    with ExitStack() as stack:
        clients = []
        for plain in (True, False):
            app = create_app(Settings(model_store=model_store, api_keys=("key",), max_body_mb=0.01))  # type: ignore[arg-type]
            if not plain:
                app.router.routes[:3] = [frameworks_own(route) for route in app.router.routes[:3]]
            clients.append(stack.enter_context(TestClient(app, raise_server_exceptions=False)))
        yield clients[0], clients[1]


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 200),
        ("?top_k=2", 200),
        ("?top_k=1&top_k=3", 200),
        ("?timeout_ms=20000&model=pvt_v2_b0", 200),
        ("?top_k=0", 422),
        ("?top_k=many", 422),
        ("?topk=2", 422),
        ("?topk=2&topk=3&top_k=1001", 422),
        ("?top_k=", 422),
        ("?model=", 404),
        ("?model=pvt_v2_b0.none", 404),
        ("?timeout_ms=1.5", 422),
        ("?%C3%A9=1", 422),
    ],
)
def test_parameters_are_checked_alike(ways: Ways, query: str, status: int) -> None:
    assert responses(ways, query=query)[0] == status


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer other", "Basic key", "bearer key", "Bearer key"])
def test_keys_are_checked_alike(ways: Ways, authorization: str | None) -> None:
    headers = {"Content-Type": "image/png"} | ({} if authorization is None else {"Authorization": authorization})

    assert responses(ways, headers=headers)[0] == (200 if authorization in ("bearer key", "Bearer key") else 401)


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"", "image/png", 422),
        (b"no image", "text/plain", 415),
        (b"x" * 10_001, "image/png", 413),
        (b"{", "application/json", 422),
    ],
)
def test_bodies_are_refused_alike(ways: Ways, content: bytes, content_type: str, status: int) -> None:
    headers = {"Content-Type": content_type, "Authorization": "Bearer key"}

    assert responses(ways, content=content, headers=headers)[0] == status


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/features?normalize=true&dtype=float16&embedding=1", 200),
        ("/features?stages=1,1", 422),
        ("/features?embedding=maybe&pool=max&size=big", 422),
        ("/features?embedding=false", 422),
        ("/explain?alpha=nan", 422),
        ("/explain?class_id=10&size=64", 422),
    ],
)
def test_features_and_explanations_are_alike(ways: Ways, path: str, status: int) -> None:
    assert responses(ways, path=path)[0] == status


def test_other_methods_are_refused_alike(ways: Ways) -> None:
    first, second = (client.get("/predict") for client in ways)

    assert first.status_code == second.status_code == 405
    assert first.headers["Allow"] == second.headers["Allow"]


def test_both_count_under_the_same_route(ways: Ways) -> None:
    for client in ways:
        client.post("/predict", content=png(), headers={"Content-Type": "image/png", "Authorization": "Bearer key"})

        assert 'pvt_http_requests_total{method="POST",route="/predict",status="200"}' in client.get("/metrics").text


def responses(
    ways: Ways,
    *,
    path: str = "/predict",
    query: str = "",
    content: bytes = png(),
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    """Status and body, which both must have alike."""
    sent = headers or {"Content-Type": "image/png", "Authorization": "Bearer key"}
    first, second = (
        client.post(f"{path}{query}", content=content, headers={**sent, "X-Request-ID": "1"}) for client in ways
    )
    assert first.json() == second.json()
    assert first.headers.keys() == second.headers.keys()
    assert first.status_code == second.status_code
    return first.status_code, first.json()


def request(*accept: str) -> Request:
    return Request({"type": "http", "headers": [(b"accept", each.encode()) for each in accept]})


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ([], "application/json"),
        (["*/*"], "application/json"),
        (["application/*"], "application/json"),
        (["image/*"], "image/png"),
        (["application/x-npz"], "application/x-npz"),
        (["application/json;q=0.5, image/png"], "image/png"),
        (["text/html", "application/x-npz;q=0.1"], "application/x-npz"),
        (["text/html,application/xhtml+xml,*/*;q=0.8"], "application/json"),
    ],
)
def test_the_media_type_that_the_client_prefers_is_chosen(accept: list[str], chosen: str) -> None:
    assert chosen_media_type(request(*accept), OFFERED) == chosen


@pytest.mark.parametrize("accept", ["text/html", "nonsense", ";;", "a/b/c", "application/json;q=0", "\xff"])
def test_a_client_that_accepts_none_of_them_learns_which_there_are(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="responds with application/json, application/x-npz, image/png"):
        chosen_media_type(request(accept), OFFERED)


@pytest.mark.parametrize(
    ("query", "given", "message"),
    [
        (PredictQuery, {"top_k": "0"}, "must be from 1 to 1000"),
        (PredictQuery, {"top_k": "1001"}, "must be from 1 to 1000"),
        (PredictQuery, {"min_score": "nan"}, "Input should be a finite number"),
        (PredictQuery, {"min_score": "much"}, "Input should be a valid number"),
        (PredictQuery, {"timeout_ms": "0"}, "must be from 1 to 3600000"),
        (ExplainQuery, {"class_id": "-1"}, "must be at least 0"),
        (ExplainQuery, {"alpha": "1.5"}, "must be from 0 to 1"),
        (ExplainQuery, {"alpha": "x"}, "Input should be a valid number"),
        (FeaturesQuery, {"stages": "9"}, "must be different numbers from 1 to 4"),
        (FeaturesQuery, {"stage": "1"}, "no such name; did you mean 'stages'?"),
    ],
)
def test_the_error_of_a_number_out_of_range_names_the_range(
    query: type[BaseModel], given: dict[str, str], message: str
) -> None:
    with pytest.raises(ValidationError) as raised:
        query.model_validate(given)

    (error,) = raised.value.errors()
    assert message in error["msg"]


def test_a_size_is_a_side_or_height_and_width() -> None:
    sizes = [PredictQuery.model_validate(given).input_size for given in ({}, {"size": "224"}, {"size": "256x384"})]

    assert sizes == [None, (224, 224), (256, 384)]


def test_the_range_is_in_the_schema_too() -> None:
    schema, _ = PredictQuery.model_json_schema()["properties"]["top_k"]["anyOf"]

    assert (schema["minimum"], schema["maximum"]) == (1, 1000)
