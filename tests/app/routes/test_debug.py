from collections.abc import Mapping
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.app.conftest import MakeClient, png

KEY = {"Authorization": "Bearer boss"}


def look(client: TestClient, headers: Mapping[str, str] = KEY) -> Any:
    response = client.get("/debug/scheduler", headers=headers)
    assert response.status_code == 200
    return response.json()


@pytest.mark.parametrize("headers", [{}, KEY])
def test_without_management_keys_it_is_off_and_says_how_to_turn_it_on(
    client: TestClient, headers: dict[str, str]
) -> None:
    response = client.get("/debug/scheduler", headers=headers)

    assert response.status_code == 403
    assert response.headers["Content-Type"] == "application/problem+json"
    assert "set PVT_MANAGEMENT_KEYS" in response.json()["detail"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer user"}, {"Authorization": "Basic boss"}])
def test_only_a_management_key_opens_it(make_client: MakeClient, headers: dict[str, str]) -> None:
    response = make_client(api_keys=("user",), management_keys=("boss",)).get("/debug/scheduler", headers=headers)

    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_management_key_gives_no_predictions(make_client: MakeClient) -> None:
    client = make_client(api_keys=("user",), management_keys=("boss",))

    assert client.post("/predict", files={"image": png()}, headers=KEY).status_code == 401


def test_queues_instances_and_the_last_releases_are_shown(make_client: MakeClient) -> None:
    client = make_client(management_keys=("boss",), instances=2, queue_size=9)
    client.post("/predict", files={"image": png()}).raise_for_status()
    client.post("/predict", files={"image": png()}).raise_for_status()

    shown = look(client)

    (queue,) = shown["queues"]
    plan = client.get("/models/pvt_v2_b0.digits").json()["batch_plan"]
    assert {queue["model"]: queue["capacity"]} == {"pvt_v2_b0.digits": 9}
    assert queue["batch_plan"] == plan
    assert [queue[name] for name in ("waiting_decode", "decoding", "queued", "running", "admitted")] == [0] * 5
    assert queue["virtual_seconds"] > 0
    assert [each["busy"] for each in shown["instances"]] == [False, False]
    newest, oldest = shown["releases"]
    assert newest["seconds_ago"] < oldest["seconds_ago"]
    assert [newest[name] for name in ("model", "size", "alone")] == ["pvt_v2_b0.digits", 1, True]
    assert newest["reason"] in {"idle", "full"}
    assert newest["run_ms"] > 0
    assert newest["wait_ms"] >= 0


def test_it_is_documented_with_its_key(make_client: MakeClient) -> None:
    described = make_client(management_keys=("secret",)).get("/openapi.json").json()

    operation = described["paths"]["/debug/scheduler"]["get"]
    assert operation["security"] == [{"management_key": []}]
    assert {"200", "401", "403"} <= {*operation["responses"]}
