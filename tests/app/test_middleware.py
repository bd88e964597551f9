import hashlib
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from starlette.testclient import TestClient

from tests.app.conftest import MakeClient, png
from tests.app.processes import serving


def test_a_request_id_is_echoed(client: TestClient) -> None:
    assert client.get("/health", headers={"X-Request-ID": "abc-123"}).headers["X-Request-ID"] == "abc-123"


@pytest.mark.parametrize("given", [None, "", "with space", "x" * 129, 'quote"'])
def test_an_id_that_is_missing_or_unfit_is_made_anew(client: TestClient, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-ID": given}

    assert re.fullmatch(r"[0-9a-f]{32}", client.get("/health", headers=headers).headers["X-Request-ID"])


def test_a_request_is_one_log_line(client: TestClient) -> None:
    with structlog.testing.capture_logs() as lines:
        client.post("/predict", files={"image": png()}, headers={"X-Request-ID": "one"})
        client.get("/health")

    (line,) = [line for line in lines if line["event"] == "request"]
    assert (line["method"], line["path"], line["status"], line["request_id"]) == ("POST", "/predict", 200, "one")
    assert (line["model"], line["images"]) == ("pvt_v2_b0.digits", 1)
    assert line["ms"] > 0


def requests(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line["event"] == "request"]


def test_the_line_says_what_was_done_and_where_the_time_went(make_client: MakeClient) -> None:
    client, image = make_client(), png(size=(40, 30))
    with structlog.testing.capture_logs() as lines:
        answer = client.post("/predict", content=image, headers={"Content-Type": "image/png"})

    (line,) = requests(lines)
    assert (line["version"], line["pixels"], line["batch_size"]) == ("1", 1200, 1)
    assert line["batch_reason"] in {"idle", "full"}  # full where batches of one were measured to be the best
    assert (line["bytes_received"], line["bytes_sent"]) == (len(image), len(answer.content))
    header = dict(entry.split(";dur=") for entry in answer.headers["Server-Timing"].split(", "))
    assert {*line["stages_ms"]} == {*header} - {"total"} >= {"read", "wait", "decode", "queue", "infer", "encode"}
    assert all(line["stages_ms"][stage] == float(header[stage]) for stage in line["stages_ms"])
    assert sum(line["stages_ms"].values()) <= line["ms"] + 0.05


def test_slow_requests_and_failures_of_the_service_are_warnings(make_client: MakeClient) -> None:
    slow, fast, never = (make_client(slow_ms=ms) for ms in (0.001, 3_600_000, 0))
    with structlog.testing.capture_logs() as lines:
        for client in (slow, fast, never):
            client.get("/models")
        slow.get("/health")  # a probe that succeeds is not logged, however slow
        fast.post("/predict?timeout_ms=1", content=png(), headers={"Content-Type": "image/png"})  # while it loads
        fast.get("/models/nothing")

    assert [(line["status"], line["log_level"]) for line in requests(lines)] == [
        (200, "warning"),
        (200, "info"),
        (200, "info"),
        (504, "warning"),
        (404, "info"),
    ]


def test_the_line_of_a_key_has_its_hash_and_the_address_behind_the_proxy_and_every_field_is_documented() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "operations.md").read_text().partition("## The log")[2]
    documented = {*re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)))}
    with serving(api_keys="secret-key", trusted_proxies="127.0.0.1", workers="2", backend="torch",
                 max_batch_size="1", instances="2") as server:  # fmt: skip
        forwarded = {"X-Forwarded-For": "203.0.113.9"}
        with httpx.Client(base_url=server.url, headers=forwarded, timeout=60) as client:
            key = {"Authorization": "Bearer secret-key"}
            assert client.post("/predict", files={"image": png()}, headers=key).status_code == 200
            assert client.post("/predict", files={"image": png()}).status_code == 401
        answered, refused = server.event("request"), server.event("request")

    assert answered["client"] == f"key:{hashlib.sha256(b'secret-key').hexdigest()[:8]}"
    assert answered["address"] == "203.0.113.9"
    assert (refused["client"], refused["problem"], refused["level"]) == ("ip:203.0.113.9", "Unauthorized", "info")
    assert "address" not in refused
    assert {*answered, *refused} <= documented
    assert "secret-key" not in str(server.seen)
