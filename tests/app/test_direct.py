"""The short way and the framework's own give the same answers."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.direct import Direct
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import png

Ways = tuple[TestClient, TestClient]


@pytest.fixture(scope="module")
def ways(model_store: Path) -> Iterator[Ways]:
    """Two services with a key, of which the second has no short way."""
    with ExitStack() as stack:
        clients = []
        for short in (True, False):
            app = create_app(Settings(model_store=model_store, api_keys=("key",), max_body_mb=0.01))  # type: ignore[arg-type]
            if not short:
                app.user_middleware = [
                    each for each in app.user_middleware if getattr(each.cls, "__name__", "") != Direct.__name__
                ]
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
    assert _answers(ways, query=query)[0] == status


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer other", "Basic key", "bearer key", "Bearer key"])
def test_keys_are_checked_alike(ways: Ways, authorization: str | None) -> None:
    headers = {"Content-Type": "image/png"} | ({} if authorization is None else {"Authorization": authorization})

    assert _answers(ways, headers=headers)[0] == (200 if authorization in ("bearer key", "Bearer key") else 401)


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"", "image/png", 422),
        (png(), "text/plain", 415),
        (b"x" * 10_001, "image/png", 413),
        (b"{", "application/json", 422),
    ],
)
def test_bodies_are_refused_alike(ways: Ways, content: bytes, content_type: str, status: int) -> None:
    headers = {"Content-Type": content_type, "Authorization": "Bearer key"}

    assert _answers(ways, content=content, headers=headers)[0] == status


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
def test_features_and_explanations_are_asked_for_alike(ways: Ways, path: str, status: int) -> None:
    assert _answers(ways, path=path)[0] == status


def test_other_methods_go_the_frameworks_way(ways: Ways) -> None:
    first, second = (client.get("/predict") for client in ways)

    assert first.status_code == second.status_code == 405
    assert first.headers["Allow"] == second.headers["Allow"]


def test_both_ways_count_under_the_same_route(ways: Ways) -> None:
    for client in ways:
        client.post("/predict", content=png(), headers={"Content-Type": "image/png", "Authorization": "Bearer key"})

        assert 'pvt_http_requests_total{method="POST",route="/predict",status="200"}' in client.get("/metrics").text


def _answers(
    ways: Ways,
    *,
    path: str = "/predict",
    query: str = "",
    content: bytes = png(),
    headers: dict[str, str] | None = None,
) -> tuple[int, Any]:
    """What both answer alike: status and body, but for the times and the score's last digits."""
    sent = headers or {"Content-Type": "image/png", "Authorization": "Bearer key"}
    first, second = (
        client.post(f"{path}{query}", content=content, headers={**sent, "X-Request-ID": "1"}) for client in ways
    )
    assert first.json() == second.json()
    assert first.headers.keys() == second.headers.keys()
    assert first.status_code == second.status_code
    return first.status_code, first.json()
