"""Debian's Chromium, a server, and a page that must not do what the tests did not expect."""

import os
import shutil
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, Request, sync_playwright

from tests.app.conftest import png
from tests.app.processes import Server, serving
from tests.browser.servers import DIGITS, copied
from tests.service.checkpoints import checkpoint, path_of
from tests.service.hub import Hub, serving_hub

CHROMIUM = shutil.which("chromium")
EVIL = "pvt_v2_b0.evil"
MANAGEMENT = {"Authorization": "Bearer root"}
MARKUP = '<img src=x onerror="document.title=1">'
SMALL: Any = {"backend": "torch", "precision": "float32", "instances": "1", "max_batch_size": "2"}
# Which images were sent, violations of the policy, and when the pointer last went up.
_WATCH = """
window.seen = { sent: [], violations: [], up: 0, running: 0, most: 0 };
addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) => {
  seen.violations.push(violatedDirective + " " + blockedURI);
});
addEventListener("pointerup", () => { seen.up = performance.now(); }, true);
const original = window.fetch;
window.fetch = async (url, options = {}) => {
  if (!String(url).includes("/predict")) return original(url, options);
  seen.sent.push({ at: performance.now(), images: options.body.getAll("image") });
  seen.most = Math.max(seen.most, ++seen.running);
  try { return await original(url, options); } finally { seen.running--; }
};
"""
_MODEL_IN_USE = """() => {
  const id = document.querySelector("#model").value;
  return id && document.querySelector("#model-line").textContent.startsWith(`${id}:`);
}"""


@dataclass
class Watched:
    """A page, and what it did that tests must expect."""

    page: Page
    url: str
    console: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def open(self, path: str = "/") -> Page:
        self.page.goto(self.url + path)
        self.page.wait_for_function(_MODEL_IN_USE)
        return self.page

    def bars(self) -> list[tuple[str, float]]:
        """Label and score of each."""
        found = self.page.eval_on_selector_all(
            "#bars li", "all => all.map(each => [each.querySelector('.name').textContent, Number(each.dataset.score)])"
        )
        return [(label, score) for label, score in found]

    def sent(self) -> bytes:
        """The image that was sent last."""
        code = """() => new Promise((done) => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result);
            reader.readAsDataURL(seen.sent.at(-1).images[0]);
        })"""
        return b64decode(self.page.evaluate(code).partition(",")[2])

    def pixels(self, canvas: str) -> NDArray[np.int64]:
        """(height, width, 3), from 0 to 255."""
        address = self.page.locator(canvas).evaluate("canvas => canvas.toDataURL()")
        return np.asarray(Image.open(BytesIO(b64decode(address.partition(",")[2]))).convert("RGB")).astype(np.int64)

    def texts(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


def is_answer(bars: list[tuple[str, float]], url: str, image: bytes) -> bool:
    """Whether `bars` are what the service says of `image` by itself."""
    response = httpx.post(f"{url}/predict", files={"image": image}, timeout=60)
    expected = response.json()["results"][0]["predictions"]
    return [label for label, _ in bars] == [each["label"] for each in expected] and all(
        abs(score - each["score"]) < 1e-6 for (_, score), each in zip(bars, expected, strict=True)
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM and not os.environ.get("CI"):
        pytest.skip("needs chromium; CI has it")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def store(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, and the same with markup for labels."""
    store = tmp_path_factory.mktemp("store")
    shutil.copytree(model_store / DIGITS, store / DIGITS)
    copied(store, EVIL, labels=[f"{n} {MARKUP}" for n in range(10)])
    return store


@pytest.fixture(scope="package")
def hub() -> Iterator[Hub]:
    """A hub that has one of the published models."""
    with serving_hub() as hub:
        hub.put(path_of("timm"), checkpoint("timm"))
        yield hub


@pytest.fixture(scope="package")
def server(store: Path, hub: Hub) -> Iterator[Server]:
    """As a user starts it, with the model in memory."""
    more: Any = {"management_keys": "root", "pull": "on_demand", "mirror": hub.url}
    with serving(read_log=False, model_store=str(store), preload=DIGITS, **more, **SMALL) as server:
        httpx.post(f"{server.url}/explain", files={"image": png(size=(64, 64))}, timeout=60)  # its graph too is there
        yield server


def watch(browser: Browser, url: str, **options: Any) -> Iterator[Watched]:
    """A page at `url`; whatever it asks of other origins, and whatever it logs, is kept."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    context.add_init_script(_WATCH)
    watched = Watched(context.new_page(), url)
    watched.page.set_default_timeout(120_000)

    def requested(request: Request) -> None:
        if not request.url.startswith((url.partition("/team")[0], "blob:", "data:")):
            watched.foreign.append(request.url)

    watched.page.on("request", requested)
    watched.page.on("console", lambda message: watched.console.append(f"{message.type}: {message.text}"))
    watched.page.on("pageerror", lambda error: watched.console.append(str(error)))
    yield watched
    assert watched.foreign == []
    if watched.page.evaluate("typeof seen") == "object":
        assert watched.page.evaluate("seen.violations") == []
    context.close()


@pytest.fixture
def watched(browser: Browser, server: Server) -> Iterator[Watched]:
    """A page at the server; it must log nothing."""
    for each in watch(browser, server.url):
        yield each
        assert each.console == []


@pytest.fixture
def lenient(browser: Browser, server: Server) -> Iterator[Watched]:
    """The same; the console may log refusals."""
    for each in watch(browser, server.url):
        yield each
        assert [line for line in each.console if "Failed to load resource" not in line] == []
