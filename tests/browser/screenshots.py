"""Every state of the page as a picture, in light and dark, wide and narrow.

`python -m tests.browser.screenshots FOLDER [STATE...]`
"""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.app.processes import ROOT, serving
from tests.browser.servers import DIGITS as MODEL
from tests.browser.servers import copied, wait_until_ready

DIGITS = ROOT / "docs" / "digits"
SMALL: Any = {"backend": "torch", "precision": "float32", "instances": "1", "max_batch_size": "4"}


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
    points = [(28, 16), (72, 16), (62, 40), (52, 62), (45, 86)]
    page.mouse.move(box["x"] + 28 * box["width"] / 100, box["y"] + 16 * box["height"] / 100)
    page.mouse.down()
    for x, y in points:
        page.mouse.move(box["x"] + x * box["width"] / 100, box["y"] + y * box["height"] / 100)
    page.mouse.up()
    page.wait_for_selector("#stages canvas")


def _cold(page: Page) -> None:
    page.route("**/predict*", lambda route: route.fulfill(
        status=503, content_type="application/problem+json", headers={"Retry-After": "4", "X-Request-ID": "f" * 32},
        json={"title": "Model loading", "detail": "pvt_v2_b0.digits@1 is being loaded; send the request again"},
    ))  # fmt: skip
    page.click("#samples button[title='two.png']")
    page.wait_for_selector(".problem.waits")


def _limit(page: Page) -> None:
    page.route("**/predict*", lambda route: route.fulfill(
        status=429, content_type="application/problem+json", headers={"Retry-After": "7", "X-Request-ID": "f" * 32},
        json={"title": "Client limit exceeded", "detail": "this client may send 5 requests a second (PVT_CLIENT_RATE)"},
    ))  # fmt: skip
    page.click("#samples button[title='two.png']")
    page.wait_for_selector("#problem", state="visible")


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
        shoot(browser, server.url, target, sys.argv[2:] or [*STATES])
        browser.close()
