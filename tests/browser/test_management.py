"""The table of models, and what a management key lets its owner do with them."""

import httpx
import pytest
from playwright.sync_api import Page

from tests.app.processes import Server
from tests.browser.conftest import EVIL, MANAGEMENT, Watched
from tests.browser.servers import DIGITS

B0, B1 = "pvt_v2_b0.in1k", "pvt_v2_b1.in1k"


@pytest.fixture
def managing(lenient: Watched) -> Page:
    """The view of the models with a management key."""
    page = lenient.open("/#models")
    page.fill("#manage-key", "root")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"[data-model='{DIGITS}']")
    return page


_HAS_VERSION = """(model) => [...document.querySelectorAll("#models-table tbody tr")].some((each) =>
    each.querySelector("strong").textContent === model && each.children[3].textContent === "1")"""


def press(page: Page, action: str, model: str) -> None:
    page.click(f"button[aria-label='{action} {model}']")


def wait_for_state(page: Page, model: str, state: str) -> None:
    page.wait_for_function(
        """([model, state]) => {
            const row = [...document.querySelectorAll("#models-table tbody tr")].find((each) =>
                each.querySelector("strong").textContent === model);
            return row?.querySelector(".state").textContent === state && row.querySelector("button");
        }""",
        arg=[model, state],
    )


def test_the_models_view_is_the_table_of_models(watched: Watched, server: Server) -> None:
    page = watched.open("/#models")
    page.wait_for_selector("#models-table tbody tr")

    listed = httpx.get(f"{server.url}/models").json()["models"]
    rows = page.locator("#models-table tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == [each["id"] for each in listed]
    first = next(row for row in rows if row.startswith(DIGITS))
    assert "● in memory" in first
    (accuracy,) = [each["accuracy"]["top1"] for each in listed if each["id"] == DIGITS]
    assert f"{100 * accuracy:.1f} %" in first
    assert page.locator("#models-table button").count() == 0
    assert "PVT_MEMORY_BUDGET_MB" in watched.texts("#models-memory")


def test_a_model_is_loaded_pinned_and_unloaded(managing: Page, server: Server) -> None:
    page = managing
    httpx.post(f"{server.url}/models/{EVIL}/unload", headers=MANAGEMENT).raise_for_status()
    page.reload()
    wait_for_state(page, EVIL, "○ on disk")
    press(page, "Load", EVIL)
    wait_for_state(page, EVIL, "● in memory")
    page.wait_for_function(
        "(id) => document.querySelector(`#model option[value='${id}']`).textContent.includes('in memory')", arg=EVIL
    )
    press(page, "Pin", EVIL)
    wait_for_state(page, EVIL, "● in memory, pinned")
    assert httpx.get(f"{server.url}/models/{EVIL}").json()["pinned"] is True
    assert page.locator(f"button[aria-label='Unload {EVIL}']").count() == 0
    press(page, "Unpin", EVIL)
    wait_for_state(page, EVIL, "● in memory")
    press(page, "Unload", EVIL)
    wait_for_state(page, EVIL, "○ on disk")
    assert httpx.get(f"{server.url}/models/{EVIL}").json()["state"] == "available"


def test_a_published_model_is_pulled_and_what_goes_wrong_is_in_the_words_of_the_service(
    managing: Page, lenient: Watched, server: Server
) -> None:
    page = managing
    press(page, "Pull", B1)  # which the hub has not
    page.wait_for_selector("#manage-problem", state="visible")
    reason = httpx.get(f"{server.url}/models/{B1}").json()["reason"]
    assert reason in lenient.texts("#manage-problem")
    press(page, "Pull", B0)
    page.wait_for_function(_HAS_VERSION, arg=B0)

    assert httpx.get(f"{server.url}/models/{B0}").json()["version"] == "1"
    assert page.locator("#manage-problem").is_hidden()


def test_a_wrong_management_key_is_refused_in_the_words_of_the_service(managing: Page, lenient: Watched) -> None:
    page = managing
    page.fill("#manage-key", "wrong")
    page.keyboard.press("Enter")
    press(page, "Unload", DIGITS)
    page.wait_for_selector("#manage-problem", state="visible")
    refused = httpx.post(f"{lenient.url}/models/{DIGITS}/unload", headers={"Authorization": "Bearer wrong"})

    assert refused.json()["detail"] in lenient.texts("#manage-problem")
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    page.click("#manage-forget")
    page.wait_for_function("() => !document.querySelector('[data-model]')")
    assert page.evaluate("sessionStorage.length") == 0
