"""The health check of containers: it follows host, port and Unix socket, and knows no proxy."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from app import healthcheck
from app.settings import Settings
from tests.app.conftest import png
from tests.app.processes import LIGHT, ROOT, serving
from tests.unprivileged import open_folder

__all__ = ["open_folder"]

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


def test_compose_passes_every_setting_but_those_of_the_image() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    passed = re.findall(r"^      (PVT_\w+):", text.partition("environment:")[2], re.MULTILINE)
    image = {"PVT_HOST", "PVT_PORT", "PVT_CACHE_DIR", "PVT_STORE_CACHE_DIR"}

    assert sorted(passed) == sorted({f"PVT_{name.upper()}" for name in Settings.model_fields} - image)


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose")
def test_compose_itself_resolves_them_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("PVT_API_KEYS=one,two\nPVT_SLOW_MS=70\nPVT_PUBLISH=9000\n")
    command = ["docker-compose", "-f", "docker-compose.yml", "--env-file", str(tmp_path / "env"), "config"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PVT_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)

    found = dict(re.findall(r"^      (PVT_\w+): (.*)$", done.stdout, re.MULTILINE))
    assert found["PVT_API_KEYS"] == "one,two"
    assert found["PVT_SLOW_MS"].strip("'\"") == "70"
    assert found["PVT_PRELOAD"] == "pvt_v2_b0.digits"
    assert found.get("PVT_QUEUE_SIZE") in {None, "null"}  # not the empty string, which is no number
    assert "PVT_PUBLISH" not in found  # which is none of the service's


def test_the_image_names_its_user_by_number_and_its_caches_belong_to_the_group() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()

    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["10001:0"]
    (group, mode, folders) = re.findall(
        r"install --directory .*--group (\S+) --mode (\d+) (.*)$", dockerfile, re.MULTILINE
    )[0]
    named = re.findall(r"PVT_(?:STORE_)?CACHE_DIR=(\S+)", dockerfile)
    assert (group, mode, {*folders.split()}) == ("0", "770", {*named})


@pytest.mark.skipif(not shutil.which("make") or not shutil.which("docker-compose"), reason="needs make, docker-compose")
@pytest.mark.parametrize(
    ("index", "expected"), [(None, None), ("", ""), ("https://index.test/cu", "https://index.test/cu")]
)
def test_the_image_takes_torch_for_cpus_unless_an_index_is_set_even_to_nothing(
    index: str | None, expected: str | None
) -> None:
    (default,) = re.findall(r"^ARG TORCH_INDEX=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_INDEX"}
    environment |= {} if index is None else {"TORCH_INDEX": index}
    run = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    built = re.findall(r"--build-arg TORCH_INDEX=(\S*)", run(["make", "--dry-run", "image"]).stdout)
    composed, *others = re.findall(
        r"TORCH_INDEX: (.*)", run(["docker-compose", "-f", "docker-compose.yml", "config"]).stdout
    )

    assert default.endswith("/cpu")
    assert built == ([] if expected is None else [expected])
    assert {*others} <= {composed}  # of the load generator
    assert composed.strip("'") == (default if expected is None else expected)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become another user")
def test_it_serves_as_a_user_that_the_system_does_not_know(open_folder: Path) -> None:
    cache = open_folder / "cache"
    cache.mkdir()
    os.chown(cache, 10001, 0)
    cache.chmod(0o770)
    # It may read whatever root may, such as an interpreter in root's home, and write what its user and group may.
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    prefix = ["setpriv", "--reuid=1234567", "--regid=0", "--clear-groups", *reads, "env", "-u", "HOME"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this container's root can't become another user")
    with serving(prefix=prefix, cache_dir=str(cache), max_batch_size="1", instances="1") as server:
        answer = httpx.post(f"{server.url}/predict", files={"image": png()}, timeout=60)
        assert (answer.status_code, server.stop()) == (200, 0)

    written = [path for path in cache.rglob("*") if path.is_file()]
    assert written
    assert {path.stat().st_uid for path in written} == {1234567}
