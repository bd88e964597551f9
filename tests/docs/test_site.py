"""The site of the pages: every link in it leads somewhere, and a browser needs no network for it."""

import os
import re
import subprocess
import sys
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.conftest import ROOT

ASSETS = ROOT / "docs" / "assets"


class Loaded(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect what is loaded without a click."""
        named = dict(attrs)
        if tag in {"script", "img", "iframe", "source"}:
            self.urls.append(named.get("src") or "")
        if tag == "link" and named.get("rel") not in {"canonical", "prev", "next"}:
            self.urls.append(named.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does it: a dead link or anchor fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(folder),
    ]  # with --quiet it counts no warnings
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_becomes_one_of_the_site(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}

    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}

    assert pages - built == {Path("assets/README")}


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text())

        assert len(loaded.urls) > 3
        assert [url for url in loaded.urls if re.match(r"\w+:|//", url) and not url.startswith("data:")] == [], page
        here = (page.parent / re.sub(r"[?#].*", "", url) for url in loaded.urls if url and not url.startswith("data:"))
        if page.name != "404.html":  # which is for web servers, with paths from the root
            assert [path for path in here if not path.exists()] == [], page
    assert not any("@import" in sheet.read_text() or "//fonts." in sheet.read_text() for sheet in site.rglob("*.css"))


def test_diagrams_are_drawn_by_the_copy_that_comes_with_the_pages(site: Path) -> None:
    page = (site / "architecture.html").read_text()

    assert page.count('<pre class="mermaid">') == 2
    assert page.index("assets/mermaid.tiny.js") > 0


def test_scripts_from_elsewhere_are_unchanged() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \|.*\| `([0-9a-f]{64})` \|$", (ASSETS / "README.md").read_text(), re.MULTILINE)

    assert {name for name, _ in rows} == {path.name for path in ASSETS.glob("*.js")}
    for name, digest in rows:
        assert sha256((ASSETS / name).read_bytes()).hexdigest() == digest
