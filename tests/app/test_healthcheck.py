"""The health check of containers: it follows host, port and Unix socket, and knows no proxy."""

import json
import os
import re
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import healthcheck
from tests.app.processes import ROOT, serving

LIGHT: Any = {"backend": "torch", "max_batch_size": "1"}
PROXIES = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"), "http://127.0.0.1:1")


def check(**variables: str) -> tuple[int, str]:
    """Exit code and reason, with proxies that nobody reaches."""
    environment = {**os.environ, **PROXIES, "no_proxy": "", **variables}
    command = [sys.executable, "-m", "app.healthcheck"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.strip()


def test_it_follows_the_address_and_ignores_proxies(tmp_path: Path) -> None:
    path = tmp_path / "pvt.sock"
    with serving(**LIGHT, host="::") as server:
        port = str(httpx.URL(server.url).port)
        for host in ("::", "0.0.0.0", "127.0.0.1", "::1", "[::1]", "localhost"):  # noqa: S104  so that it is asked
            assert check(PVT_HOST=host, PVT_PORT=port) == (0, ""), host
    with serving(**LIGHT, host=f"unix:{path}", default_model="pvt_v2_b0.none"):
        code, reason = check(PVT_HOST=f"unix:{path}", PVT_PORT="8000")

    assert code == 1
    assert reason.startswith("/health/ready answered 503: ")
    assert "pvt_v2_b0.none" in reason
    assert check(PVT_HOST="::", PVT_PORT=port)[1].startswith("not reached: ")
    assert check(PVT_HOST=f"unix:{path}.none")[1].startswith("not reached: ")


@pytest.mark.parametrize("port", ["0", "", "http", "٣"])
def test_a_port_that_is_no_number_is_named(port: str) -> None:
    assert check(PVT_PORT=port) == (1, f"PVT_PORT={port} names no port; a health check needs the port's number")


@pytest.mark.parametrize(("port", "expected"), [("tcp://10.0.0.11:8001", "8000"), ("8001", "8001")])
def test_a_port_that_kubernetes_sets_for_a_service_means_the_default(
    monkeypatch: pytest.MonkeyPatch, port: str, expected: str
) -> None:
    asked: list[tuple[str, str]] = []

    def connections(*address: str) -> list[HTTPConnection]:
        asked.append((address[0], address[1]))
        return []

    monkeypatch.setenv("PVT_PORT", port)
    monkeypatch.setattr(healthcheck, "connections", connections)

    assert healthcheck.main() == 1
    assert asked == [("127.0.0.1", expected)]


def test_the_container_and_compose_run_it_and_nothing_else() -> None:
    """Neither names an address of its own, which PVT_HOST and PVT_PORT would not change."""
    command = ["CMD", "python", "-m", "app.healthcheck"]
    (dockerfile,) = re.findall(r"HEALTHCHECK[^\n]*\\\n\s*CMD (\[.*\])", (ROOT / "Dockerfile").read_text())
    (compose,) = re.findall(r"healthcheck:\n\s*test: (\[.*\])", (ROOT / "docker-compose.yml").read_text())

    assert json.loads(dockerfile) == command[1:]
    assert json.loads(compose) == command


def test_it_imports_nothing_of_the_service() -> None:
    code = "import sys, app.healthcheck; print(*sorted({m.split('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    known = ["pydantic", "fastapi", "starlette", "torch", "service", "httpx"]
    done = subprocess.run([sys.executable, "-c", code, *known], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == ""
