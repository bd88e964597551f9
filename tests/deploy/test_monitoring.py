"""Rules and dashboard: checked by promtool, and run by a real Prometheus that scrapes a real server under load."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from PIL import Image
from prometheus_client import CollectorRegistry

from app.addresses import Reach
from app.clients import Clients
from app.metrics import HttpMetrics, ProcessMetrics
from app.remote_images.fetching import Fetcher
from app.settings import Settings
from bench.dashboard import Source, draw
from service.metrics import EngineMetrics
from tests.app.processes import Server, serving
from tests.conftest import ROOT
from tests.deploy.prometheus import PROMETHEUS, WINDOW, Prometheus, scraping

RULES = [rule for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "pvt-serve.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
# The query of deploy/kubernetes' autoscaler and of docs/operations.md: images that no thread or instance works at.
WAITING = 'sum(pvt_queue_images{state=~"waiting_decode|queued"})'
# What a healthy server on a CPU, of one process, without keys, limits and images by URL, has no data for.
NO_DATA = {
    "GPU memory": "there is no GPU",
    "GPU utilisation": "there is no GPU",
    "Images by key": "there are no keys",
    "Refused by a client's own limit": "there are no such limits",
    "Images by URL": "they are off",
    "Cancelled": "nobody hangs up",
    "Evictions": "nothing is evicted",
    "Memory of models, budget": "there is no budget",
    "Restarts and lost log lines, workers replaced": "there is one process",
}
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool") and not os.environ.get("CI"), reason="needs promtool; CI has it"
)


class Stack(NamedTuple):
    server: Server
    prometheus: Prometheus


def until(condition: Callable[[], object], *, seconds: float = 100) -> None:
    """Return when it holds."""
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, condition
        sleep(0.05)  # leaves the cores to those who are watched


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if not shutil.which("prometheus") and not os.environ.get("CI"):
        pytest.skip("needs Debian's package prometheus")
    with (
        serving(read_log=False, backend="torch", precision="float32", instances="1", max_batch_size="4",
                queue_size="8", preload="pvt_v2_b0.digits") as server,
        scraping(server.url, tmp_path_factory.mktemp("prometheus")) as prometheus,
    ):  # fmt: skip
        until(lambda: httpx.get(f"{server.url}/health/ready").is_success)
        yield Stack(server, prometheus)


@contextmanager
def load(url: str, folder: Path, rate: int) -> Iterator[None]:
    """The load generator of docker-compose.yml, which sends the PNGs of `folder`."""
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["load"]
    module = service["command"][:3]
    assert module[0] == "python"
    options = [f"--url={url}/predict", f"--bodies={folder}", "--suffix=.png", "--content-type=image/png"]
    assert {each.partition("=")[0] for each in options} < {each.partition("=")[0] for each in service["command"]}
    command = [sys.executable, *module[1:], *options, f"--rate={rate}", "--seconds=100"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


@needs_promtool
def test_promtool_accepts_configuration_and_rules() -> None:
    for command in (["check", "config", "prometheus.yml"], ["check", "rules", "--lint-fatal", "rules.yml"]):
        done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_each_alert_fires_where_it_has_to_and_only_there() -> None:
    path = ROOT / "tests" / "deploy" / "rules.test.yml"

    done = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load(path.read_text())["tests"]
    samples = [sample for test in tests for each in test["promql_expr_test"] for sample in each["exp_samples"]]
    fired = {name for sample in samples for name in re.findall(r'alertname="(\w+)"', sample["labels"])}
    assert fired == {*ALERTS}


def test_each_alert_has_its_section_in_the_runbook_and_no_other_has() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    urls = {name: rule["annotations"]["runbook_url"] for name, rule in ALERTS.items()}
    project = re.findall(r'^Documentation = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    assert urls == {name: f"{project[0]}/blob/main/docs/runbook.md#{name.lower()}" for name in ALERTS}
    sections = dict(re.findall(r"^## (PvtServe\w+)\n(.*?)(?=^## |\Z)", runbook, re.MULTILINE | re.DOTALL))
    assert [*sections] == [*ALERTS]
    for name, section in sections.items():
        assert all(f"**{part}.**" in section for part in ("Means", "Look at", "Do")), name
        assert ALERTS[name]["labels"]["severity"] in section.splitlines()[1], name
        assert {*ALERTS[name]["annotations"]} == {"summary", "description", "runbook_url"}, name


def test_the_runbook_names_only_what_there_is() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    code = "".join(path.read_text() for folder in ("app", "service") for path in (ROOT / folder).rglob("*.py"))
    panels = {panel["title"] for panel in PANELS}
    errors = {*re.findall(r"^\| \d+ \| `([\w-]+)`", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)}

    assert {*re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", runbook)} <= panels | {"Targets"}
    assert {*re.findall(r"`([a-z]+-[a-z-]+)`", runbook)} <= errors | {"nvidia-smi", "pvt-serve"}
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", runbook):  # metrics, stages, and events of the log
        assert re.search(rf"\b{name.removesuffix('_total')}\b", code), name


# Names of processes, of a group of workers, and of the page of metrics itself.
UNREGISTERED = {"process_start_time_seconds", "process_cpu_seconds_total", "process_resident_memory_bytes", "pvt_ready",
                "pvt_worker_restarts_total", "up"}  # fmt: skip


def _labels() -> dict[str, set[str]]:
    """The labels of each series that the code can make, by its name in queries."""
    registry = CollectorRegistry()
    for make in (EngineMetrics, HttpMetrics, ProcessMetrics):
        make(registry)
    Clients(Settings(), registry)
    Fetcher(Reach(), registry, max_bytes=1, seconds=1)
    found = {name: {*each._labelnames} for name, each in registry._names_to_collectors.items()}  # type: ignore[attr-defined]
    return {name: labels | ({"le"} if name.endswith("_bucket") else set()) for name, labels in found.items()}


def _queries() -> list[str]:
    variables = [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    annotations = [each["expr"] for each in DASHBOARD["annotations"]["list"]]
    return [*(rule["expr"] for rule in RULES), *(query for _, query in EXPRESSIONS), *variables, *annotations]


def test_every_metric_and_label_of_rules_and_dashboard_is_one() -> None:
    known = _labels() | {name: set[str]() for name in UNREGISTERED}
    known |= {"ALERTS": {"alertname", "alertstate"}, **{rule["record"]: set() for rule in RULES if "record" in rule}}
    always = {"job", "instance"}
    for query in _queries():
        selectors = re.findall(r"\b((?:pvt|http_server|process|job:|up\b|ALERTS)[\w:]*)(?:\{([^}]*)\})?", query)
        used = set[str]()
        for name, matchers in selectors:
            assert name in known, (name, query)
            used |= known[name]
            assert {*re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", matchers)} <= known[name] | always, query
        grouped = {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in labels.split(",")}
        assert selectors, query
        assert grouped <= used | always, query


def _lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """What of `given` is not in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if value is not None:
                yield from _lost(value, kept.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for i, pair in enumerate(zip(given, kept, strict=True)):
            yield from _lost(*pair, f"{path}[{i}]")
    elif given != kept:
        yield f"{path}: {given!r}, not {kept!r}"


def test_grafanas_own_library_reads_the_dashboard_and_loses_nothing() -> None:
    register_default_plugins()

    read = Dashboard.from_json(DASHBOARD)

    assert [*_lost(DASHBOARD, json.loads(json.dumps(read, cls=JSONEncoder)))] == []


def test_panels_have_ids_units_places_and_the_data_source_that_is_chosen() -> None:
    everything = DASHBOARD["panels"]
    ids = [panel["id"] for panel in everything]
    places = [
        (x, y)
        for place in (panel["gridPos"] for panel in everything)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len({*ids}) == len(ids)
    assert len({*places}) == len(places)
    assert {x for x, _ in places} == {*range(24)}
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert [each["uid"] for each in sources] == ["${datasource}"] * len(sources)
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        names = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
        assert names <= {target["legendFormat"] for target in panel["targets"]}
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    named = {name for query in _queries() for name in re.findall(r"\$(\w+)", query)} - {"__rate_interval"}
    assert named | {"datasource"} == {*variables}
    (source,) = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert variables["datasource"]["query"] == source["type"]
    assert variables["datasource"]["current"]["value"] == source["uid"]


def _run(query: str) -> str:
    """A query of the dashboard, as Grafana sends it."""
    query = query.replace("$__rate_interval", WINDOW)
    return re.sub(r"\$(instance|model)\b", ".*", query)


def test_every_query_runs_and_each_panel_shows_something(stack: Stack, digits: Path) -> None:
    server, prometheus = stack
    image = (digits / "seven.png").read_bytes()
    without: set[str] = set()

    def has_data() -> bool:
        httpx.post(f"{server.url}/predict", content=image, headers={"Content-Type": "image/png"})
        httpx.post(f"{server.url}/predict", content=b"none", headers={"Content-Type": "image/png"})
        legends = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
        found = {
            f"{title}, {target['legendFormat']}": prometheus.query(_run(target["expr"])) for title, target in legends
        }
        empty = {name for name, series in found.items() if not series}
        without.clear()
        without.update(name if name in NO_DATA else name.partition(", ")[0] for name in empty)
        return without <= {*NO_DATA}

    until(has_data)

    assert without == {*NO_DATA}
    for rule in RULES:
        prometheus.query(rule["expr"])
    groups = prometheus.client.get("/api/v1/rules").json()["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
    until(lambda: not prometheus.alerts())


def test_the_picture_of_the_docs_has_every_panel(stack: Stack) -> None:
    figure = draw(Source(str(stack.prometheus.client.base_url), 60))

    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [panel["title"] for panel in PANELS]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "ready" in texts
    assert texts.count("No data") <= len(NO_DATA)


def test_alerts_and_an_autoscalers_query_rise_with_the_queue_and_fall_with_it(stack: Stack, tmp_path: Path) -> None:
    """Decoding is the bottleneck: the queue in front of the instances stays short, and still the load is seen."""
    server, prometheus = stack
    seven = Image.open(ROOT / "docs" / "digits" / "seven.png").convert("RGB")
    seven.resize((1900, 1900), Image.Resampling.BICUBIC).save(tmp_path / "large.png", compress_level=1)
    share = "sum(pvt_queue_images) / sum(pvt_queue_capacity_images)"
    undecoded = 'sum(pvt_queue_images{state="waiting_decode"}) > sum(pvt_queue_depth)'
    fired: dict[str, dict[str, Any]] = {}

    def have_fired() -> bool:
        fired.update(prometheus.alerts())
        return {"PvtServeQueueFull", "PvtServeRefusing"} <= {*fired}

    assert prometheus.value(WAITING) == 0
    with load(server.url, tmp_path, rate=150):
        until(have_fired)
        until(lambda: prometheus.value(WAITING) >= 4 and prometheus.value(share) > 0.8)
        until(lambda: prometheus.query(undecoded))

    assert fired["PvtServeQueueFull"]["labels"]["model"] == "pvt_v2_b0.digits"
    for alert in fired.values():
        assert not re.search(r"error|<no value>|\{\{", alert["annotations"]["description"])
    until(lambda: prometheus.value(WAITING) == 0 and not prometheus.alerts())
