"""What users install: service and client, each as a wheel in an environment of its own, outside of the checkout."""

import json
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from shutil import copy
from subprocess import CalledProcessError
from zipfile import ZipFile

import httpx
import pytest

from tests.conftest import ROOT
from tests.installed import Environment, build_client, build_service

DIGITS = "pvt_v2_b0.digits"
# Loads the model in the way that takes least.
QUICK = {"PVT_BACKEND": "torch", "PVT_INSTANCES": "1", "PVT_MAX_BATCH_SIZE": "1", "PVT_CACHE_DIR": ""}
USE_CLIENT = """
import asyncio, importlib.util, sys
from pvt_client import AsyncClient, Client

async def main(url, path):
    async with AsyncClient(url) as client:
        return (await client.predict(path)).best.label

url, path = sys.argv[1:]
with Client(url) as client:
    print(client.predict(path).best.label, client.features(path).embedding.shape)
print(asyncio.run(main(url, path)))
print([name for name in ("torch", "fastapi", "app", "cli", "service") if importlib.util.find_spec(name)])
"""


@pytest.fixture(scope="module")
def service_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_service(tmp_path_factory.mktemp("service-wheel"))


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_client(tmp_path_factory.mktemp("client-wheel"))


@pytest.fixture(scope="module")
def installed(service_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The service."""
    return Environment(service_wheel, tmp_path_factory.mktemp("service"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home folder of a user, and the current one."""
    return tmp_path


def test_the_client_works_where_only_its_wheel_and_requirements_are(
    client_wheel: Path, service_url: str, digits: Path, tmp_path: Path
) -> None:
    environment = Environment(client_wheel, tmp_path / "client")

    done = environment.run("python", "-c", USE_CLIENT, service_url, digits / "seven.png", cwd=tmp_path)

    assert done.stdout.splitlines() == ["7 (256,)", "7", "[]"]


def test_both_wheels_have_the_same_client_in_the_same_version(client_wheel: Path, service_wheel: Path) -> None:
    with ZipFile(client_wheel) as client, ZipFile(service_wheel) as service:
        names = [name for name in client.namelist() if name.startswith("pvt_client/")]
        versions = {tomllib.loads((ROOT / each / "pyproject.toml").read_text())["project"]["version"]
                    for each in (".", "pvt_client")}  # fmt: skip

        assert "pvt_client/py.typed" in names
        assert sorted(names) == sorted(name for name in service.namelist() if name.startswith("pvt_client/"))
        assert [name for name in names if client.read(name) != service.read(name)] == []
    assert len(versions) == 1


def test_the_embedded_model_is_listed_and_predicts_from_any_folder(
    installed: Environment, home: Path, digits: Path
) -> None:
    copy(digits / "seven.png", home)

    listed = installed.run("pvt-serve", "ls", "--json", cwd=home, HOME=str(home))
    predicted = installed.run("pvt-serve", "predict", "-k", "1", "seven.png", cwd=home, HOME=str(home), **QUICK)

    assert [(row["id"], row["state"]) for row in json.loads(listed.stdout)["models"]] == [(DIGITS, "available")]
    assert predicted.stdout.split()[2] == "7"
    assert [each.name for each in home.iterdir()] == ["seven.png"]


@pytest.fixture
def served(installed: Environment, home: Path) -> Iterator[str]:
    """The URL of `pvt-serve serve` with two processes, in a folder with modules that have the names of its own."""
    for name in ("app", "service", "cli"):
        (home / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    variables = installed.variables(HOME=str(home), PVT_WORKERS="2", **QUICK)
    command = [str(installed.bin / "pvt-serve"), "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=home, env=variables, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            records = (json.loads(line) for line in process.stderr)
            yield next(record["url"] for record in records if record["event"] == "listening")
        finally:
            process.terminate()


def test_the_page_is_served_with_its_samples(served: str, digits: Path) -> None:
    assert "<script" in httpx.get(served).text
    assert httpx.get(f"{served}/static/samples/seven.png").content == (digits / "seven.png").read_bytes()


def test_the_embedded_model_is_served_from_any_folder(served: str, digits: Path) -> None:
    response = httpx.post(f"{served}/predict", content=(digits / "two.png").read_bytes(),
                          headers={"Content-Type": "image/png"}, timeout=60)  # fmt: skip

    assert response.json()["results"][0]["predictions"][0]["label"] == "2"
    files = [path.relative_to(ROOT / "app" / "static").as_posix() for path in (ROOT / "app" / "static").rglob("*.*")]
    assert {"main.js", "samples/seven.png"} < {*files}
    for name in files:
        assert httpx.get(f"{served}/static/{name}").status_code == 200, name
    assert "static/main.js" in httpx.get(served).text


def test_what_is_written_goes_into_the_home_folder_beside_a_copy_of_the_embedded_model(
    installed: Environment, home: Path
) -> None:
    with pytest.raises(CalledProcessError) as refused:
        installed.run("pvt-serve", "rm", DIGITS, "--yes", cwd=home, HOME=str(home))
    first = installed.run("pvt-serve", "alias", "production", DIGITS, cwd=home, HOME=str(home))
    listed = installed.run("pvt-serve", "ls", "--json", cwd=home, HOME=str(home))

    store = home / ".local/share/pvt-serve/model_store"
    assert "is part of the package and read only" in refused.value.stderr
    assert first.stderr == f"pvt-serve: {store} is new, with a copy of the embedded model\n"
    assert sorted(each.name for each in store.iterdir() if each.suffix != ".lock") == ["aliases.json", DIGITS]
    assert [row["aliases"] for row in json.loads(listed.stdout)["models"]] == [["production"]]
