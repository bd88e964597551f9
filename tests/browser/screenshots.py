"""Every state of the page as a picture, in light and dark, wide and narrow; or the pictures of the docs.

`python -m tests.browser.screenshots FOLDER [STATE...]`, or `docs/assets` for those.
"""

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.app.processes import ROOT, serving
from tests.browser.servers import DIGITS as MODEL
from tests.browser.servers import copied, wait_until_ready

DIGITS = ROOT / "docs" / "digits"
SMALL: Any = {"backend": "torch", "precision": "float32", "instances": "1", "max_batch_size": "1"}


def _sample(page: Page, name: str) -> None:
    page.click(f"#samples button[title='{name}.png']")
    page.wait_for_selector("#stages canvas")


def _empty(page: Page) -> None:
    page.wait_for_selector("#samples img")


def _answer(page: Page) -> None:
    _sample(page, "three")


def _large(page: Page) -> None:
    _sample(page, "eight")
    page.select_option("#size", "224")
    page.wait_for_function("() => document.querySelector('#identity').textContent.includes('224 \\u00d7 224')")
    page.wait_for_function("() => document.querySelector('#stages').textContent.includes('56 \\u00d7 56')")


def _strip(page: Page) -> None:
    page.set_input_files("#file", [DIGITS / f"{name}.png" for name in ("one", "three", "five", "eight")])
    page.wait_for_selector("#stages canvas")
    page.select_option("#basis", "all")
    page.wait_for_selector("#stages.several")


def _compare(page: Page) -> None:
    _sample(page, "three")
    page.click("#compare-toggle")
    page.set_input_files("#other-file", DIGITS / "eight.png")
    page.wait_for_selector("#compare-stages canvas")


def _models(page: Page) -> None:
    page.click("nav >> text=Models")
    page.wait_for_selector("#models-table tbody tr")
    page.fill("#manage-key", "root")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-model] button")


def _live(page: Page) -> None:
    for name in ("one", "two", "three", "four", "five", "six"):
        _sample(page, name)
    page.click("nav >> text=Live")
    page.wait_for_function("() => document.querySelector('#routes')?.textContent.includes('/predict')")
    page.wait_for_function("() => document.querySelectorAll('#charts path[d*=L]').length")
    page.wait_for_function(
        "() => (document.querySelector('#charts path').getAttribute('d').match(/L/g) ?? []).length > 5"
    )


def _refusal(page: Page) -> None:
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"})
    page.wait_for_selector("#problem", state="visible")


def _too_large(page: Page) -> None:
    page.set_input_files("#file", {"name": "large.png", "mimeType": "image/png", "buffer": bytes(400_000)})
    page.wait_for_selector("#problem", state="visible")


def _draw(page: Page) -> None:
    page.click("#draw")
    box = page.locator("#pad").bounding_box()
    assert box
    upper = [(47 + 20 * math.cos(a), 31 + 19 * math.sin(a)) for a in np.radians(range(-150, 91, 6))]
    lower = [(47 + 23 * math.cos(a), 69 + 19 * math.sin(a)) for a in np.radians(range(-90, 151, 6))]
    points = [(box["x"] + x * box["width"] / 100, box["y"] + y * box["height"] / 100) for x, y in upper + lower]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points:
        page.mouse.move(*point)
    page.mouse.up()
    page.wait_for_function("() => !document.querySelector('.stale')")
    page.wait_for_function("() => document.querySelector('#identity').textContent.includes(' of 3')")
    page.wait_for_timeout(2000)  # for the stages of the last stroke


def _refused(page: Page, status: int, seconds: int, title: str, detail: str) -> None:
    """A sample is refused, for so many seconds."""
    page.route("**/predict*", lambda route: route.fulfill(
        status=status, content_type="application/problem+json", json={"title": title, "detail": detail},
        headers={"Retry-After": str(seconds), "X-Request-ID": "f" * 32},
    ))  # fmt: skip
    page.click("#samples button[title='two.png']")
    page.wait_for_selector("#problem", state="visible")


def _cold(page: Page) -> None:
    _refused(page, 503, 4, "Model loading", "pvt_v2_b0.digits@1 is being loaded; send the request again")


def _limit(page: Page) -> None:
    _refused(page, 429, 7, "Client limit exceeded", "this client may send 5 requests a second (PVT_CLIENT_RATE)")


def _banner(page: Page) -> None:
    page.route("**/predict*", lambda route: route.abort())
    page.route("**/stats*", lambda route: route.abort())
    page.click("#samples button[title='two.png']")
    page.wait_for_selector("#banner", state="visible")


def _key(page: Page) -> None:
    page.click("#key-summary")
    page.wait_for_selector("#key", state="visible")


STATES: dict[str, Callable[[Page], None]] = {
    "empty": _empty, "answer": _answer, "large": _large, "strip": _strip, "compare": _compare, "models": _models,
    "live": _live, "refusal": _refusal, "too-large": _too_large, "draw": _draw, "cold": _cold, "limit": _limit,
    "banner": _banner, "key": _key,
}  # fmt: skip


# Of the docs: the name of the file, the state, and the last element that is on it.
DOCS = {
    "page": ("draw", "#more .columns > section"),
    "page-compare": ("compare", "#compare"),
    "page-models": ("models", "#models > section"),
    "page-live": ("live", "#live .columns > section:last-child"),
    "page-refusal": ("refusal", "#try > .columns > section"),
}


@contextmanager
def _store() -> Iterator[Path]:
    """The embedded model twice, as two models."""
    with TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "model_store" / MODEL, Path(folder) / MODEL)
        copied(Path(folder), "pvt_v2_b0.copy")
        yield Path(folder)


def shoot(browser: Browser, url: str, folder: Path, names: list[str]) -> None:
    """Write `NAME-SCHEME-WIDTH.png` of each state."""
    for scheme in ("light", "dark"):
        for width in (1200, 390):
            for name in names:
                context = browser.new_context(
                    viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
                )
                page = context.new_page()
                page.goto(url)
                page.wait_for_function("() => document.querySelector('#model-line').textContent.includes(':')")
                STATES[name](page)
                page.mouse.move(0, 0)
                page.screenshot(path=folder / f"{name}-{scheme}-{width}.png", full_page=True)
                context.close()
            context = browser.new_context(
                viewport={"width": width, "height": 500}, color_scheme=scheme, java_script_enabled=False
            )
            page = context.new_page()
            page.goto(url)
            page.screenshot(path=folder / f"no-js-{scheme}-{width}.png", full_page=True)
            context.close()


def _traffic(page: Page, url: str) -> None:
    """A minute of requests, while the page counts them."""
    images = [path.read_bytes() for path in sorted(DIGITS.iterdir())]
    with ThreadPoolExecutor(8) as pool:
        for turn in range(60):
            wave = 1 + round(3 + 3 * math.sin(turn / 5))
            for image in images[:wave]:
                pool.submit(httpx.post, f"{url}/predict", files={"image": image}, timeout=60)
            page.wait_for_timeout(1000)


def shoot_for_docs(browser: Browser, url: str, folder: Path) -> None:
    """Write the pictures of the docs."""
    for name, (state, last) in DOCS.items():
        page = browser.new_page(viewport={"width": 1120, "height": 844}, reduced_motion="reduce")
        page.goto(url)
        page.wait_for_function("() => document.querySelector('#model-line').textContent.includes(':')")
        if state == "live":
            _traffic(page, url)
        STATES[state](page)
        page.mouse.move(0, 0)
        box = page.locator(last).first.bounding_box()
        assert box
        bottom = box["y"] + box["height"] + page.evaluate("scrollY") + 14
        shot = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": 1120, "height": bottom})
        Image.open(BytesIO(shot)).save(folder / f"{name}.png", optimize=True)
        page.close()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    settings: Any = {"preload": MODEL, "management_keys": "root", "max_body_mb": "0.3"}
    with (
        _store() as store,
        serving(read_log=False, model_store=str(store), **SMALL, **settings) as server,
        sync_playwright() as playwright,
    ):
        wait_until_ready(server.url)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        if target.resolve() == ROOT / "docs" / "assets":
            shoot_for_docs(browser, server.url, target)
        else:
            shoot(browser, server.url, target, sys.argv[2:] or [*STATES])
        browser.close()
