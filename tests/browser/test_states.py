"""What the page shows when not all is well: keys, limits, refusals, a server that is gone; and to whom."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from tests.app.processes import Server, serving
from tests.browser.conftest import DIGITS, SMALL, Watched, is_answer, watch

LOCKED: Any = {"api_keys": "sesame", "root_path": "/team/images", "max_body_mb": "0.05", "client_rate": "1",
          "client_burst": "10"}  # fmt: skip


@pytest.fixture(scope="module")
def locked(store: Path) -> Iterator[Server]:
    """Behind a key, below a prefix, with limits."""
    with serving(read_log=False, model_store=str(store), preload=DIGITS, **SMALL, **LOCKED) as server:
        yield server


@pytest.fixture
def behind(browser: Browser, locked: Server) -> Iterator[Watched]:
    """A page there, whose refusals the console may log."""
    url = urlsplit(locked.url)
    for each in watch(browser, f"{url.scheme}://{url.netloc}/team/images"):
        yield each
        assert [line for line in each.console if "Failed to load resource" not in line] == []


def test_a_key_is_asked_for_and_kept_for_the_tab(behind: Watched, digits: Path) -> None:
    page = behind.page
    page.goto(behind.url)  # without the slash at the end
    page.wait_for_selector("#key", state="visible")
    refused = httpx.get(f"{behind.url}/models").json()["detail"]
    assert behind.texts("#model-line") == refused
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('#model-line').textContent.includes('none of them')")
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#model option", state="attached")
    page.set_input_files("#file", digits / "two.png")
    page.wait_for_selector("#stages canvas")

    assert behind.bars()[0][0] == "2"
    assert "Authorization: Bearer $KEY" in behind.texts("#code")
    assert f"{behind.url}/predict" in behind.texts("#code")
    assert page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]") == [
        '{"pvt-serve-key":"sesame"}', "{}", ""
    ]  # fmt: skip
    page.reload()
    page.wait_for_selector("#model option", state="attached")


def test_refusals_are_shown_in_the_words_of_the_service(behind: Watched, tmp_path: Path) -> None:
    page, key = behind.page, {"Authorization": "Bearer sesame"}
    page.add_init_script("sessionStorage.setItem('pvt-serve-key', 'sesame')")
    behind.open()
    for name, content in {"text.png": b"<b>no</b> image", "large.png": os.urandom(80_000)}.items():
        (tmp_path / name).write_bytes(content)
        detail = httpx.post(f"{behind.url}/predict", files={"image": content}, headers=key).json()["detail"]
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_function("(text) => document.querySelector('#problem p')?.textContent === text", arg=detail)

        assert page.locator("#problem").is_visible()
        assert page.locator("#problem b").count() == 0
        assert detail in behind.texts("#live-region")


def test_a_client_at_its_limit_still_gets_a_page_that_works(behind: Watched) -> None:
    page, key = behind.page, {"Authorization": "Bearer sesame"}
    page.add_init_script("sessionStorage.setItem('pvt-serve-key', 'sesame')")
    while httpx.get(f"{behind.url}/models", headers=key).status_code != 429:
        pass
    behind.open()
    page.click("#samples button")
    page.wait_for_selector("#bars li")


def test_after_a_429_the_image_is_sent_again_when_the_service_says_so(behind: Watched) -> None:
    page = behind.page
    page.add_init_script("sessionStorage.setItem('pvt-serve-key', 'sesame')")
    behind.open()
    for name in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"):
        with page.expect_response("**/predict*") as got:
            page.click(f"#samples button[title='{name}.png']")
        if got.value.status == 429:
            break
    page.wait_for_selector("#problem", state="visible")

    assert got.value.json()["detail"] in behind.texts("#problem")
    assert "PVT_CLIENT_RATE" in behind.texts("#problem")
    assert "Sends it again in" in behind.texts("#problem")
    page.wait_for_selector("#problem", state="hidden")  # by itself
    page.wait_for_function("(name) => document.querySelector('#preview').alt.includes(name)", arg=name)


def test_a_server_that_is_gone_has_a_banner_until_it_is_back(browser: Browser, store: Path, digits: Path) -> None:
    settings: Any = {"model_store": str(store), "preload": DIGITS, **SMALL}
    with serving(read_log=False, **settings) as server:
        pages = watch(browser, server.url)
        watched = next(pages)
        page = watched.open()
        page.wait_for_selector("#version:not(:empty)")  # the stream is open
        server.process.kill()
        page.wait_for_selector("#banner", state="visible")
        assert "The service does not answer" in watched.texts("#banner")
        page.set_input_files("#file", digits / "six.png")
        page.wait_for_selector("#problem", state="visible")
    with serving(read_log=False, environment={"PVT_PORT": str(urlsplit(watched.url).port)}, **settings) as server:
        page.wait_for_selector("#banner", state="hidden", timeout=60_000)
        page.wait_for_selector("#bars li")

        assert is_answer(watched.bars(), server.url, (digits / "six.png").read_bytes())
        assert [line for line in watched.console if "Failed to load resource" not in line] == []
        next(pages, None)


def test_without_javascript_a_form_posts_a_file(browser: Browser, server: Server, digits: Path) -> None:
    for watched in watch(browser, server.url, java_script_enabled=False):
        page = watched.page
        page.goto(server.url)
        assert page.locator("#choose").is_hidden()
        page.set_input_files("#plain-file", digits / "seven.png")
        page.click("button:has-text('Classify')")
        page.wait_for_url("**/predict")

        assert '"label":"7"' in page.content()
        watched.page.goto("about:blank")


def test_the_live_view_shows_what_stats_count(watched: Watched) -> None:
    page = watched.open("/#live")
    page.click("nav >> text=Try")
    page.click("#samples button[title='five.png']")
    page.wait_for_selector("#stages canvas")
    page.click("nav >> text=Live")
    page.wait_for_function("() => document.querySelector('#routes')?.textContent.includes('/predict')")
    page.wait_for_function("() => document.querySelector('#batches')?.textContent.includes('pvt_v2_b0.digits')")

    assert page.locator("#charts svg").count() == 6
    page.wait_for_function("() => document.querySelectorAll('#charts svg path[d*=L]').length === 15")  # two events
    assert "/static" not in watched.texts("#routes")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_there_is_no_violation_of_accessibility(browser: Browser, server: Server, scheme: str, width: int) -> None:
    for watched in watch(browser, server.url, color_scheme=scheme, reduced_motion="reduce"):
        page = watched.open()
        page.set_viewport_size({"width": width, "height": 844})
        page.click("#samples button[title='five.png']")
        page.wait_for_selector("#stages canvas")
        for view in ("try", "models", "live"):
            page.click(f"nav a[href='#{view}']")
            page.wait_for_selector(f"#{view}", state="visible")
            found = Axe().run(page, options={"resultTypes": ["violations"]})

            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        small = page.evaluate("""() => [...document.querySelectorAll('button, select, summary, a')].filter(each => {
            const box = each.getBoundingClientRect();
            return box.width && (box.width < 44 || box.height < 44);
        }).map((each) => each.outerHTML)""")  # fmt: skip
        assert small == []


def test_the_whole_flow_works_by_keyboard(watched: Watched) -> None:
    page = watched.open()
    focused = (
        "() => document.activeElement.id || document.activeElement.title || document.activeElement.textContent.trim()"
    )
    path = []
    for _ in range(30):
        page.keyboard.press("Tab")
        path.append(page.evaluate(focused))
        if path[-1] == "four.png":
            break
    assert {"Skip to the content", "Models", "Live", "model", "key-summary", "theme", "choose", "draw", "camera"} <= {
        *path
    }
    page.keyboard.press("Enter")
    page.wait_for_selector("#stages canvas")
    assert watched.bars()[0][0] == "4"
    assert watched.texts("#live-region").startswith("4, ")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate(focused) == "where-class":
            break
    page.keyboard.press("9")
    page.wait_for_function("() => document.querySelector('#identity').textContent.includes(' of 9')")
