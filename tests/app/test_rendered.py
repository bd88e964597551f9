from threading import Event

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter
from starlette.testclient import TestClient

from app.rendered import RENDER_BURST, MetricsPage, openapi_route
from tests.app.conftest import MakeClient


def test_metrics_are_fresh_until_somebody_scrapes_too_often() -> None:
    registry, collected = CollectorRegistry(), []
    counter = Counter("scrapes", "So many.", registry=registry)
    page = MetricsPage(registry, lambda: collected.append(1))

    texts = []
    for _ in range(1000):
        counter.inc()
        texts.append(page.text())

    assert [f"scrapes_total {n + 1}.0".encode() in text for n, text in enumerate(texts[:RENDER_BURST])] == [
        True
    ] * RENDER_BURST
    assert len(collected) < 500


def test_metrics_are_fresh_where_rendering_takes_long_because_others_have_the_cores() -> None:
    registry = CollectorRegistry()
    counter = Counter("scrapes", "So many.", registry=registry)

    def wait() -> None:
        Event().wait(0.02)

    page = MetricsPage(registry, wait)

    for n in range(1, 3 * RENDER_BURST):
        counter.inc()
        assert f"scrapes_total {n}.0".encode() in page.text()


def test_the_document_is_made_once(make_client: MakeClient) -> None:
    client = make_client()
    app = client.app
    assert isinstance(app, FastAPI)
    first = client.get("/openapi.json")
    app.openapi_schema = None

    assert client.get("/openapi.json").content == first.content
    assert app.openapi_schema is None
    assert first.headers["content-type"] == "application/json"
    assert [route for route in app.routes if getattr(route, "path", "") == "/openapi.json"] == [
        route for route in app.routes if getattr(route, "name", "") == "openapi"
    ]


def test_the_document_names_the_path_below_which_it_is_served() -> None:
    inner, outer = (
        FastAPI(servers=[{"url": "/"}], openapi_url="/openapi.json", docs_url=None, redoc_url=None),
        FastAPI(),
    )
    inner.router.routes[:] = [openapi_route(inner)]
    outer.mount("/inner", inner)
    client = TestClient(outer)

    assert client.get("/inner/openapi.json").json()["servers"] == [{"url": "/inner"}]
