"""The manifests of deploy/kubernetes: rendered by kubectl, against published schemas and the service itself."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.app.conftest import png
from tests.app.open_inference.clients import module
from tests.conftest import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(each.name for each in (FOLDER / "overlays").iterdir())
ALL = [*OVERLAYS, "hpa"]
SCHEMAS: dict[str, type[BaseModel]] = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor}
OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
ENDING_SECONDS = 4  # what docs/operations.md asks for beyond the drain
QUERY_METRIC = re.compile(r"(pvt_\w+|<<\.Series>>)\{([^}]*)\}")


def components_supported() -> bool:
    """Whether there is a kubectl whose kustomize knows components (3.7, in kubectl from 1.21 on)."""
    if not shutil.which("kubectl"):
        return False
    command = ["kubectl", "version", "--client", "--output", "json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["clientVersion"]
    return (int(found["major"]), int(re.sub(r"\D", "", found["minor"]))) >= (1, 21)


pytestmark = pytest.mark.skipif(not components_supported(), reason="needs kubectl 1.21 or newer")


@pytest.fixture(scope="module")
def client(model_store: Path) -> Iterator[TestClient]:
    settings: Any = {"backend": "torch", "precision": "float32", "instances": "1", "max_batch_size": 1}
    with TestClient(create_app(Settings(model_store=model_store, **settings))) as client:
        assert client.post("/predict", files={"image": png(size=(64, 64))}).status_code == 200
        yield client


@cache
def rendered(name: str) -> list[dict[str, Any]]:
    """The objects of an overlay, or of `hpa`: the CPU overlay with that component instead of KEDA's."""
    folder = FOLDER / "overlays" / name
    if name == "hpa":
        folder = FOLDER / "overlays" / ".test-hpa"
        folder.mkdir()
        text = "kind: Kustomization\nresources: [../cpu]\ncomponents: [../../components/hpa]\n"
        (folder / "kustomization.yaml").write_text(text)
    try:
        done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    finally:
        if name == "hpa":
            shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing deprecated
    return list(yaml.safe_load_all(done.stdout))


def of_kind(name: str, kind: str) -> dict[str, Any]:
    (found,) = [each for each in rendered(name) if each["kind"] == kind]
    return found


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind(name, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(name: str) -> dict[str, Any]:
    (found,) = pod(name)["containers"]
    assert isinstance(found, dict)
    return found


def configured(name: str) -> dict[str, str]:
    """The settings of a pod."""
    data = of_kind(name, "ConfigMap")["data"]
    return {key: str(value) for key, value in data.items()}


def image_environment() -> dict[str, str]:
    return dict(re.findall(r"(PVT_\w+)=(\S+)", (ROOT / "Dockerfile").read_text()))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_own_schemas_take_every_object(name: str, version: str) -> None:
    kinds = set()
    for each in rendered(name):
        if each["kind"] in SCHEMAS:
            continue
        kinds.add(each["kind"])
        kubernetes_validate.validate(each, version, strict=True)

    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceAccount", "ConfigMap"} <= kinds
    misspelled = of_kind(name, "Deployment") | {"spec": of_kind(name, "Deployment")["spec"] | {"replica": 3}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelled, version, strict=True)


@pytest.mark.parametrize("kind", sorted(SCHEMAS))
def test_the_operators_own_models_know_every_field(kind: str) -> None:
    found = of_kind("autoscaling", kind)

    assert SCHEMAS[kind].model_validate(found).model_dump(mode="json", by_alias=True, exclude_unset=True) == found


def test_kserves_own_model_knows_every_field() -> None:
    example = yaml.safe_load((FOLDER / "examples" / "kserve.yaml").read_text())
    for kind, found in {
        "inference_service": example,
        "inference_service_spec": example["spec"],
        "predictor_spec": example["spec"]["predictor"],
    }.items():
        name = "V1beta1" + "".join(part.capitalize() for part in kind.split("_"))
        model = getattr(module(f"kserve.models.v1beta1_{kind}"), name)
        assert set(found) <= set(model.attribute_map.values())
    in_pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": example["spec"]["predictor"]["containers"]}}

    kubernetes_validate.validate(in_pod, NEWEST, strict=True)


@pytest.mark.parametrize("name", ALL)
def test_every_setting_is_one_and_has_a_value_that_the_service_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = configured(name)
    for key, value in (image_environment() | found).items():
        monkeypatch.setenv(key, value)
    settings = Settings.from_environment()

    assert {key.removeprefix("PVT_").lower() for key in found} <= set(Settings.model_fields)
    assert str(settings.model_store) == image_environment()["PVT_MODEL_STORE"]


def ports(name: str) -> Iterator[tuple[str, Any]]:
    """Each place that names a port of the container."""
    yield "service", of_kind(name, "Service")["spec"]["ports"][0]["targetPort"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield probe, container(name)[probe]["httpGet"]["port"]
    for rule in of_kind(name, "NetworkPolicy")["spec"]["ingress"]:
        yield "policy", rule["ports"][0]["port"]


@pytest.mark.parametrize("name", ALL)
def test_ports_paths_and_folders_are_the_images_and_the_services(name: str, client: TestClient) -> None:
    own = container(name)
    environment = image_environment()
    paths = ["/health/ready", "/health/live", "/metrics"]

    assert own["ports"] == [{"name": "http", "containerPort": int(environment["PVT_PORT"])}]
    assert {port for _, port in ports(name)} == {"http"}
    assert own["readinessProbe"]["httpGet"]["path"] == own["startupProbe"]["httpGet"]["path"] == "/health/ready"
    assert own["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert [client.get(path).status_code for path in paths] == [200, 200, 200]
    mounted = {each["mountPath"] for each in own["volumeMounts"]}
    assert mounted == {environment["PVT_CACHE_DIR"], environment["PVT_STORE_CACHE_DIR"], "/tmp"}  # noqa: S108
    assert {each["name"] for each in own["volumeMounts"]} == {each["name"] for each in pod(name)["volumes"]}


@pytest.mark.parametrize("name", ALL)
def test_a_pod_may_do_little_and_has_time_to_drain(name: str) -> None:
    own, whole, found = container(name), pod(name), configured(name)
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user

    assert whole["securityContext"]["runAsNonRoot"]
    assert (whole["securityContext"]["runAsUser"], whole["securityContext"]["runAsGroup"]) == (10001, 0)
    assert (int(user[1]), int(user[2])) == (10001, 0)
    assert own["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert whole["automountServiceAccountToken"] is False
    draining = int(found["PVT_DRAIN_DELAY_SECONDS"]) + int(found["PVT_SHUTDOWN_SECONDS"])
    assert whole["terminationGracePeriodSeconds"] >= draining + ENDING_SECONDS
    limits, requests = own["resources"]["limits"], own["resources"]["requests"]
    assert limits["cpu"] == requests["cpu"]
    assert int(limits["cpu"]) >= 1  # a whole number: as many instances
    assert limits["memory"] == requests["memory"]
    assert ("nvidia.com/gpu" in limits) is (name == "gpu") is (found.get("PVT_DEVICE") == "cuda")


def queries() -> Iterator[tuple[str, str]]:
    """Metric and labels of every query by which replicas are added."""
    for trigger in of_kind("autoscaling", "ScaledObject")["spec"]["triggers"]:
        for metric, labels in QUERY_METRIC.findall(trigger["metadata"]["query"]):
            yield metric, labels
    (rule,) = yaml.safe_load((FOLDER / "components" / "hpa" / "adapter-rules.yaml").read_text())["rules"]["custom"]
    (horizontal,) = of_kind("hpa", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert horizontal["pods"]["metric"]["name"] == rule["name"]["as"]
    ((series, _),) = QUERY_METRIC.findall(rule["seriesQuery"])
    ((_, labels),) = QUERY_METRIC.findall(rule["metricsQuery"])
    yield series, labels


def test_autoscalers_ask_for_metrics_and_labels_that_there_are(client: TestClient) -> None:
    samples = [
        each for family in text_string_to_metric_families(client.get("/metrics").text) for each in family.samples
    ]
    found = list(queries())

    assert len(found) == 2
    for metric, labels in found:
        (states,) = re.findall(r'state=~"([^"]*)"', labels)
        of_metric = [each for each in samples if each.name == metric]
        assert set(states.split("|")) <= {each.labels["state"] for each in of_metric}


@pytest.mark.parametrize("name", ["autoscaling", "hpa"])
def test_an_autoscaler_alone_says_how_many_there_are(name: str) -> None:
    assert "replicas" not in of_kind(name, "Deployment")["spec"]
    kind = "ScaledObject" if name == "autoscaling" else "HorizontalPodAutoscaler"
    assert of_kind(name, kind)["spec"]["scaleTargetRef"]["name"] == of_kind(name, "Deployment")["metadata"]["name"]


def test_what_scrapes_finds_the_service() -> None:
    monitor, service = of_kind("autoscaling", "ServiceMonitor"), of_kind("autoscaling", "Service")

    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert (
        service["spec"]["selector"].items()
        <= of_kind("autoscaling", "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    )


def test_volumes_of_the_persistent_cache_are_claimed() -> None:
    claims = {each["metadata"]["name"] for each in rendered("autoscaling") if each["kind"] == "PersistentVolumeClaim"}

    assert {
        each["persistentVolumeClaim"]["claimName"]
        for each in pod("autoscaling")["volumes"]
        if "persistentVolumeClaim" in each
    } == claims


def test_the_page_names_what_is_there() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    named = {Path(each) for each in re.findall(r"deploy/kubernetes/[\w./-]+", text)}

    assert {Path("deploy/kubernetes/overlays") / each for each in OVERLAYS} <= named
    assert [each for each in named if not (ROOT / each).exists()] == []
