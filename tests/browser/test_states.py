"""What the page shows when not all is well: keys, limits, refusals, a server that is gone; and to whom."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Route

from tests.app.processes import Server, serving
from tests.browser.conftest import EVIL, MANAGEMENT, SMALL, Watched, is_answer, watch
from tests.browser.servers import DIGITS, wait_until_ready

LOCKED: Any = {"api_keys": "sesame", "root_path": "/team/images", "max_body_mb": "0.05", "client_rate": "1",
          "client_burst": "10"}  # fmt: skip


# Every text that the page shows as a problem, with the class of its element.
_NOTE_PROBLEMS = """() => {
  seen.problems = [];
  const target = document.querySelector("#problem");
  new MutationObserver(() => seen.problems.push(`${target.className}: ${target.textContent}`))
    .observe(target, { childList: true, subtree: true, characterData: true });
}"""


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


def test_a_model_that_is_not_in_memory_has_a_countdown_until_it_is(lenient: Watched, server: Server) -> None:
    httpx.post(f"{server.url}/models/{EVIL}/unload", headers=MANAGEMENT).raise_for_status()
    page = lenient.open()
    page.evaluate(_NOTE_PROBLEMS)
    page.select_option("#model", EVIL)
    page.wait_for_function(f"() => document.querySelector('#model-line').textContent.startsWith('{EVIL}')")
    page.click("#samples button[title='two.png']")
    page.wait_for_selector("#bars li")

    first, *_ = page.evaluate("seen.problems")
    assert first.startswith("problem waits: Model loading (503)")
    assert "Sends it again in " in first
    assert page.locator("#problem").is_hidden()
    page.wait_for_function(
        f"() => document.querySelector('#model option[value=\"{EVIL}\"]').textContent.includes('in memory')"
    )


def test_an_answer_is_dimmed_while_the_next_one_is_under_way(watched: Watched) -> None:
    page, held = watched.open(), list[Route]()
    assert "Drop an image here" in watched.texts("#invite")  # and there is none yet
    page.click("#samples button[title='one.png']")
    page.wait_for_selector("#stages canvas")
    page.route("**/predict*", lambda route: held.append(route))  # noqa: PLW0108  it needs a function of its own
    page.click("#samples button[title='two.png']")
    page.wait_for_function("() => getComputedStyle(document.querySelector('#answer')).opacity < 0.5")
    page.wait_for_function("() => getComputedStyle(document.querySelector('#more')).opacity < 0.5")
    while not held:
        page.evaluate("0")

    assert watched.bars()[0][0] == "1"
    assert page.locator("#answer").get_attribute("aria-busy") == "true"
    assert watched.texts("#live-region") == "Reading the image"
    held[0].continue_()
    page.wait_for_function("() => getComputedStyle(document.querySelector('#answer')).opacity === '1'")
    assert watched.bars()[0][0] == "2"
    assert page.locator(".stale").count() == 0


def test_with_several_workers_everything_is_as_with_one(browser: Browser, store: Path, digits: Path) -> None:
    settings: Any = {"model_store": str(store), "preload": DIGITS, "workers": "2", "management_keys": "root"}
    with serving(read_log=False, **settings, **SMALL) as server:
        wait_until_ready(server.url)
        for watched in watch(browser, server.url):
            page = watched.open()
            page.set_input_files("#file", [digits / "one.png", digits / "two.png"])
            page.wait_for_selector("#stages canvas")
            assert is_answer(watched.bars(), server.url, (digits / "one.png").read_bytes())
            page.wait_for_function("() => document.querySelector('#live-state').textContent.includes('2 workers')")
            page.click("nav >> text=Models")
            page.wait_for_selector("#models-table tbody tr")
            refused = httpx.post(f"{server.url}/models/{DIGITS}/load", headers=MANAGEMENT).json()["detail"]
            assert refused in watched.texts("#manage-note")
            assert watched.console == []


def test_a_server_that_is_gone_has_a_banner_until_it_is_back_and_one_that_drains_says_so(
    browser: Browser, store: Path, digits: Path
) -> None:
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
        page.wait_for_selector("#banner", state="hidden")
        page.wait_for_selector("#bars li")

        assert is_answer(watched.bars(), server.url, (digits / "six.png").read_bytes())
        page.click("#camera")
        page.wait_for_function("() => seen.sent.at(-1).images[0].name === 'camera.jpg' && !seen.running")
        page.evaluate(_NOTE_PROBLEMS)
        with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port)) as upload:
            upload.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nand")  # not complete
            server.process.send_signal(signal.SIGTERM)
            page.wait_for_function("() => seen.problems.some((each) => each.includes('the service is shutting down'))")
            page.wait_for_selector("#banner", state="visible")
        assert server.process.wait(60) == 0
        assert page.evaluate("seen.most") == 1
        page.click("#camera")
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


@pytest.mark.parametrize(
    ("scheme", "width", "zoom"),
    [("light", 1200, 1), ("dark", 1200, 1), ("light", 390, 1), ("dark", 390, 1), ("light", 600, 2)],
)
def test_there_is_no_violation_of_accessibility(
    browser: Browser, server: Server, digits: Path, *, scheme: str, width: int, zoom: int
) -> None:
    """A zoom of 200 % leaves a window of 1200 pixels 600 of the page's."""
    for watched in watch(browser, server.url, color_scheme=scheme, reduced_motion="reduce", device_scale_factor=zoom):
        page = watched.page
        page.add_init_script("sessionStorage.setItem('pvt-serve-management-key', 'root')")
        watched.open()
        page.set_viewport_size({"width": width, "height": 844 // zoom})
        page.set_input_files("#file", [digits / "five.png", digits / "six.png"])
        page.wait_for_selector("#stages canvas")
        page.click("#compare-toggle")
        page.click("#other-strip button")
        page.wait_for_selector("#compare-stages canvas")
        for view, shown in {"try": "#mirror", "models": "[data-model] button", "live": "#charts"}.items():
            page.click(f"nav a[href='#{view}']")
            page.wait_for_selector(f"#{view} {shown}", state="visible")
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
