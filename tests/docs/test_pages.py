"""The pages say what the code says, and name only what there is."""

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from app import problems
from app.addresses import Reach
from app.clients import Clients
from app.main import create_app
from app.metrics import HttpMetrics, ProcessMetrics
from app.remote_images.fetching import Fetcher
from app.settings import Settings
from service.metrics import EngineMetrics
from tests.docs.generated import DECISION, DECISIONS, PAGES, ROOT, renewed, slug

DOCS = ROOT / "docs"
FRONT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
TEXTS = [*FRONT, *sorted(DOCS.rglob("*.md"))]
CODE = ("app", "bench", "cli", "pvt_client", "service", "tests", "training")
# Variables of docker-compose.yml and of commands, which are no settings of the service.
COMPOSE = {"PVT_PUBLISH", "PVT_STORE_VOLUME", "PVT_MEM_LIMIT", "PVT_CPUS", "PVT_URL", "PVT_KEY"}
# Problems that come from the framework, and the one of any error that is not a ServiceError.
OTHER_PROBLEMS = {"not-found", "method-not-allowed", "internal-error"}


@pytest.mark.parametrize(("page", "lines"), [("README.md", 120), ("docs/architecture.md", 150)])
def test_a_page_that_is_to_be_read_at_once_stays_short(page: str, lines: int) -> None:
    assert len((ROOT / page).read_text().splitlines()) <= lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_that_are_made_from_the_code_are_up_to_date(page: Path) -> None:
    text = page.read_text()

    assert text == renewed(text, PAGES[page]), "run python -m tests.docs.generated"


def test_the_settings_page_begins_with_the_eight_that_one_needs_first() -> None:
    first = (DOCS / "settings.md").read_text().partition("## How values are written")[0]
    names = re.findall(r"^\| `PVT_(\w+)` \|", first, re.MULTILINE)

    assert len(names) == 8
    assert {name.lower() for name in names} <= {*Settings.model_fields}


def test_every_problem_is_on_the_page_of_errors_with_its_status_and_no_other_is() -> None:
    create_app(Settings())  # imports every module that has errors of its own
    kinds = (problems.problem(kind.__new__(kind, "")) for kind in problems.kinds())
    expected = {(str(each.status), each.type.rpartition(":")[2]) for each in kinds}

    rows = re.findall(r"^\| (\d{3}) \| `([\w-]+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)

    assert len(rows) == len({*rows})
    assert {row for row in rows if row[1] not in OTHER_PROBLEMS} == expected
    assert {name for _, name in rows} >= OTHER_PROBLEMS


def test_every_metric_is_on_the_page_of_operations_and_no_other_is() -> None:
    registry = CollectorRegistry()
    for make in (EngineMetrics, HttpMetrics, ProcessMetrics):
        make(registry)
    Clients(Settings(), registry)
    Fetcher(Reach(), registry, max_bytes=1, seconds=1)
    counters = {metric.name for metric in registry.collect() if metric.type == "counter"}
    expected = {f"{name}_total" if name in counters else name for name in (each.name for each in registry.collect())}

    section = (DOCS / "operations.md").read_text().partition("## Metrics")[2].partition("come with the service")[0]

    found = {*re.findall(r"`((?:pvt|http_server)_\w+)`", section)}
    assert found == expected | {"pvt_ready", "pvt_worker_restarts_total", "pvt_grpc_requests_total"}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_is_one(page: Path) -> None:
    known = {f"PVT_{name.upper()}" for name in Settings.model_fields} | COMPOSE

    assert {*re.findall(r"\bPVT_[A-Z][A-Z_]*[A-Z]\b", page.read_text())} <= known


def test_every_decision_has_one_number_its_context_and_what_was_decided_or_measured() -> None:
    sections = [
        (int(number), path.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0])
        for path in DECISIONS.glob("*.md")
        for heading, number, _ in DECISION.findall(path.read_text())
    ]

    assert sorted(number for number, _ in sections) == [*range(1, len(sections) + 1)]
    for number, text in sections:
        parts = re.findall(r"^\*\*(Context|Decision|Measurement)\.\*\*", text, re.MULTILINE)
        assert parts in (["Context", "Decision", "Measurement"], ["Context", "Decision"], ["Context", "Measurement"]), (
            number
        )
        assert text.endswith("\n"), f"decision {number}: a blank line after it"
        assert not re.search(r"@@|^[A-Z]+$", text, re.MULTILINE), number  # a figure that was to be filled in


def test_every_decision_that_is_cited_exists() -> None:
    numbers = {int(number) for path in DECISIONS.glob("*.md") for _, number, _ in DECISION.findall(path.read_text())}
    files = chain(TEXTS, *((ROOT / folder).rglob("*.py") for folder in CODE))

    cited = {(file, number) for file in files for number in _citations(file.read_text())}

    assert {number for _, number in cited} <= numbers
    assert any(file.suffix == ".py" for file, _ in cited)


def test_every_path_that_the_architecture_names_exists() -> None:
    text = (DOCS / "architecture.md").read_text()
    roots = "|".join((*CODE, "docs", "deploy", "model_store"))
    named = {*re.findall(rf"`((?:{roots})(?:/[\w.-]+)*)`", text)}

    assert len(named) > 30
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page", FRONT, ids=lambda page: page.name)
def test_links_of_the_pages_at_the_root_lead_somewhere(page: Path) -> None:
    """Those of docs/ are checked by the site's strict build."""
    text = page.read_text()
    for target in [*re.findall(r"\]\((?!https?:)([^)]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_an_image_is_called_an_image(page: Path) -> None:
    assert not re.search(r"\bpictures?\b", page.read_text(), re.IGNORECASE)


def _citations(text: str) -> Iterator[int]:
    """The numbers in `decision 12`, `decisions 3 and 4`, and `decisions [21](...) to 23`."""
    for listed in re.findall(r"\bdecisions?\s+(\[?\d+(?:\]\([^)]*\))?(?:(?:,| and| to)\s+\d+)*)", text, re.IGNORECASE):
        yield from map(int, re.findall(r"\d+", re.sub(r"\([^)]*\)", "", listed)))
