import re

import pytest
import structlog
from starlette.testclient import TestClient

from tests.app.conftest import png


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
