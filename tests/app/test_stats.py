"""`GET /stats` and its stream."""

import asyncio
import json
import signal
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from app import stats
from app.stats import BatchInfo, Instances, MemoryStats, Request, Share, Traffic, summed
from service.recent import Recent
from service.scheduling.lanes import QueueDepth
from tests.app.conftest import MakeClient, png
from tests.app.processes import post, serving

MEMORY = MemoryStats(
    resident_bytes=10,
    reserved_bytes={"bodies": 1},
    reservable_bytes=100,
    models_bytes={"pvt_v2_b0.digits": 5},
    models_budget_bytes=None,
)


def share(**changes: Any) -> Share:
    batch = BatchInfo(at=1.0, model="pvt_v2_b0.digits", size=1, reason="idle", wait_ms=0.1, run_ms=2.0)
    values: dict[str, Any] = {
        "uptime_seconds": 100.0,
        "window_seconds": 60,
        "in_flight": 1,
        "requests": [(Request("/predict", 200, 100), 30)],
        "queues": {"pvt_v2_b0.digits": QueueDepth(1, 2, 3, 4, 256)},
        "instances": Instances(busy=1, total=2),
        "batches": {1: 10, 4: 5},
        "last": [batch],
        "memory": MEMORY,
    }
    return Share(**values | changes)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_percentiles_are_those_of_numpy_within_three_per_cent() -> None:
    clock, rng = Clock(), np.random.default_rng(5)
    traffic = Traffic(Recent[Request](clock))
    seconds = rng.lognormal(-5, 1.5, 4000)
    for each in seconds:
        traffic.answered("/predict", 200, each)
    clock.now = 1.5

    (route,) = summed([share(requests=[*traffic.recent.counts().items()])]).routes

    assert route.requests == 4000
    assert route.p50_ms == pytest.approx(float(np.percentile(seconds, 50)) * 1000, rel=0.03)
    assert route.p99_ms == pytest.approx(float(np.percentile(seconds, 99, method="inverted_cdf")) * 1000, rel=0.03)


def test_statuses_are_told_apart_and_the_busiest_route_is_first() -> None:
    requests = [
        (Request("/models", 404, 1), 2),
        *(
            (Request("/predict", status, 1), count)
            for status, count in ((200, 5), (422, 2), (429, 3), (499, 6), (503, 4), (500, 1))
        ),
    ]

    first, second = summed([share(requests=requests)]).routes

    assert (first.route, second.route) == ("/predict", "/models")
    assert (first.requests, first.client_errors, first.refused, first.server_errors) == (21, 2, 7, 1)
    assert first.abandoned == 6
    assert (second.requests, second.client_errors) == (2, 2)
    assert first.per_second == 0.35


def test_the_shares_of_several_processes_are_summed() -> None:
    newer = BatchInfo(at=2.0, model="pvt_v2_b0.digits", size=4, reason="full", wait_ms=0.1, run_ms=None)
    other = share(
        last=[newer] * 30, uptime_seconds=5.0, window_seconds=5, queues={"pvt_v2_b1.x": QueueDepth(capacity=9)}
    )

    both = summed([share(), other])

    assert (both.workers, both.uptime_seconds, both.window_seconds, both.in_flight) == (2, 100.0, 60, 2)
    assert both.instances == Instances(busy=2, total=4)
    assert [(each.model, each.queued, each.capacity) for each in both.queues] == [
        ("pvt_v2_b0.digits", 3, 256),
        ("pvt_v2_b1.x", 0, 9),
    ]
    assert (both.batches.batches, both.batches.images, both.batches.mean_size) == (30, 60, 2.0)
    assert [each.at for each in both.batches.last] == [2.0] * 20
    assert (both.memory.resident_bytes, both.memory.reservable_bytes, both.memory.models_budget_bytes) == (
        20,
        200,
        None,
    )
    assert both.routes[0].requests == 60


def test_it_shows_what_was_sent(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "TICK_SECONDS", 0.0)
    client = make_client()
    client.post("/predict", files=[("image", png()), ("image", png())])
    client.post("/predict", content=b"no image", headers={"Content-Type": "image/png"})
    client.get("/health")
    start = client.get("/stats").json()["at"]

    # Until the seconds are over in which these were counted.
    found = client.get("/stats").json()
    while sum(each["requests"] for each in found["routes"]) < 2 or found["batches"]["images"] < 2:
        assert found["at"] < start + 30
        found = client.get("/stats").json()

    (route,) = found["routes"]
    assert (route["route"], route["requests"], route["client_errors"]) == ("/predict", 2, 1)
    assert route["p99_ms"] >= route["p50_ms"] > 0
    assert found["in_flight"] == 0
    (queue,) = found["queues"]
    assert queue == {
        "model": "pvt_v2_b0.digits", "waiting_decode": 0, "decoding": 0, "queued": 0, "running": 0, "capacity": 256,
    }  # fmt: skip
    assert found["batches"]["images"] == 2
    assert sum(each["size"] for each in found["batches"]["last"]) == 2
    assert found["memory"]["models_bytes"]["pvt_v2_b0.digits"] > 1e6
    assert found["memory"]["resident_bytes"] > 1e8


def test_it_is_open_though_keys_are_set(make_client: MakeClient) -> None:
    client = make_client(api_keys=("secret",))

    assert client.get("/stats").status_code == 200
    assert client.get("/models").status_code == 401


async def events(client: httpx.AsyncClient, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with client.stream("GET", "/stats/stream") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        async for line in response.aiter_lines():
            if line:
                field, _, value = line.partition(": ")
                assert field == "data"
                found.append(json.loads(value))
            if len(found) == count:
                return found
    return found


async def test_the_stream_has_an_event_each_second_ends_on_shutdown_and_all_workers_count() -> None:
    with serving(backend="torch", max_batch_size="1", workers="2", instances="2", client_concurrency="1") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            answers = await asyncio.gather(*(events(client, 4) for _ in range(8)))
            for found in answers:
                assert all(0.5 < later["at"] - earlier["at"] < 5 for earlier, later in pairwise(found))
                assert found[-1]["workers"] == 2
                assert found[-1]["instances"]["total"] == 2

            for _ in range(12):
                assert (await asyncio.to_thread(post, server.url, [("image", png())])).status_code == 200
            async with client.stream("GET", "/stats/stream") as response:
                counts = [0]
                async for line in response.aiter_lines():  # until the service ends it, in order
                    if line and counts[-1] < 12:
                        routes = json.loads(line.removeprefix("data: "))["routes"]
                        counts.append(sum(each["requests"] for each in routes if each["route"] == "/predict"))
                        if counts[-1] == 12:
                            server.process.send_signal(signal.SIGTERM)
            assert counts[-1] == 12
        assert server.process.wait(30) == 0


def test_the_head_of_a_stream_ends(client: TestClient) -> None:
    response = client.head("/stats/stream")

    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"].startswith("text/event-stream")


def test_more_streams_than_are_served_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "MOST_STREAMS", 0)

    response = client.get("/stats/stream")

    assert response.status_code == 429
    assert response.headers["Retry-After"] == "1"
    assert "GET /stats" in response.json()["detail"]
