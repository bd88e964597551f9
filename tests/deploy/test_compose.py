"""docker-compose.yml: what each profile starts, where it listens, and that the files it names are there."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.openloop import arguments
from tests.conftest import ROOT
from tests.deploy.prometheus import PROMETHEUS

FILES = ["docker-compose.yml"]
GPU = [*FILES, "docker-compose.gpu.yml"]
PLAIN = yaml.safe_load((ROOT / "docker-compose.yml").read_text())

needs_compose = pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose")


def resolved(*files: str, **variables: str) -> dict[str, Any]:
    """The services as docker-compose itself reads them, without anything of this shell or a file .env."""
    environment = {"PATH": os.environ["PATH"], **variables}
    options = [option for file in files for option in ("-f", file)]
    command = ["docker-compose", *options, "--env-file", "deploy/container.env", "config"]  # it has no variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    return services


def test_each_profile_starts_what_it_is_for_and_none_only_the_service() -> None:
    profiles = {name: each.get("profiles", []) for name, each in PLAIN["services"].items()}

    assert profiles == {
        "pvt-serve": [],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
        "load": ["load"],
    }


def test_images_of_others_have_a_version_and_ours_is_built() -> None:
    for name, each in PLAIN["services"].items():
        assert "build" in each or re.fullmatch(r"[\w/.-]+:v?\d+\.\d+\.\d+", each["image"]), name


def test_files_and_volumes_that_it_names_exist() -> None:
    for name, each in PLAIN["services"].items():
        for volume in each.get("volumes", []):
            source = re.sub(r"^\$\{\w+:-([^}]*)\}", r"\1", volume).partition(":")[0]  # its default
            assert (ROOT / source).exists() if source.startswith(".") else source in PLAIN["volumes"], (name, source)
    assert (ROOT / "deploy" / "container.env").is_file()


def test_only_the_service_is_reached_from_elsewhere() -> None:
    ports = {name: each["ports"] for name, each in PLAIN["services"].items() if "ports" in each}

    assert ports == {
        "pvt-serve": ["${PVT_PUBLISH:-8000}:8000"],
        "prometheus": ["127.0.0.1:${PROMETHEUS_PUBLISH:-9090}:9090"],
        "grafana": ["127.0.0.1:${GRAFANA_PUBLISH:-3000}:3000"],
    }


@needs_compose
def test_variables_that_are_no_settings_reach_the_container_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("AWS_ACCESS_KEY_ID=name\nOTEL_SERVICE_NAME=digits\n")

    service = resolved(*FILES, ENV_FILE=str(tmp_path / "env"), PVT_SLOW_MS="70")["pvt-serve"]

    found = service["environment"]
    assert (found["AWS_ACCESS_KEY_ID"], found["OTEL_SERVICE_NAME"]) == ("name", "digits")
    assert str(found["PVT_SLOW_MS"]) == "70"


@needs_compose
def test_the_load_uses_the_image_of_the_service_on_gpus_too() -> None:
    for files, variables in ((FILES, {}), (GPU, {"TORCH_INDEX": "https://example.org"})):
        services = resolved(*files, **variables)
        assert services["load"]["image"] == services["pvt-serve"]["image"]
        assert services["load"]["build"] == services["pvt-serve"]["build"]


@needs_compose
def test_the_load_generator_accepts_its_command_and_finds_its_images() -> None:
    load = resolved(*FILES, LOAD_RATE="7.5", LOAD_PATH="/predict?size=96")["load"]

    assert load["command"][:3] == ["python", "-m", "bench.openloop"]
    given = arguments(load["command"][3:])
    assert (given.url, given.rate, given.seconds) == ("http://127.0.0.1:8000/predict?size=96", 7.5, 600)
    mounted = {target: Path(source) for source, target, _ in (each.split(":") for each in load["volumes"])}
    assert len([*mounted[str(given.bodies)].glob(f"*{given.suffix}")]) == 10
    assert mounted["/srv/bench"] == ROOT / "bench"
    assert load["network_mode"] == "service:pvt-serve"


def test_prometheus_grafana_and_the_service_name_each_others_ports() -> None:
    services = PLAIN["services"]
    (scraped,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/dashboards/provider.yml").read_text())["providers"]

    assert scraped["static_configs"] == [{"targets": ["pvt-serve:8000"]}]
    assert "PVT_PORT=8000" in (ROOT / "Dockerfile").read_text()
    assert source["url"] == "http://prometheus:9090"
    assert "./deploy/prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/pvt-serve.json"
