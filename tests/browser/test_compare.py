"""A second image or a second model beside the first."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from tests.app.processes import Server
from tests.browser.components import off_from_components
from tests.browser.conftest import EVIL, MANAGEMENT, MARKUP, Watched


def scores_of(url: str, path: Path) -> dict[str, float]:
    response = httpx.post(f"{url}/predict?top_k=10", files={"image": path.read_bytes()}, timeout=60)
    return {each["label"]: each["score"] for each in response.json()["results"][0]["predictions"]}


def mirrored(watched: Watched) -> list[tuple[str, str, str]]:
    """The score on the left, the class, the score on the right, of each row."""
    found: list[Any] = watched.page.eval_on_selector_all(
        "#mirror tbody tr",
        "all => all.map(({ children: [left, name, right] }) =>"
        " [left.dataset.score, name.textContent, right.dataset.score])",
    )
    return [(left, name, right) for left, name, right in found]


def test_a_second_image_is_shown_beside_the_first(watched: Watched, server: Server, digits: Path) -> None:
    first, second = digits / "three.png", digits / "eight.png"
    page = watched.open()
    page.set_input_files("#file", first)
    page.wait_for_selector("#bars li")
    page.click("#compare-toggle")
    page.set_input_files("#other-file", second)
    page.wait_for_selector("#compare-stages canvas")

    expected = [scores_of(server.url, first), scores_of(server.url, second)]
    rows = mirrored(watched)
    assert [name for _, name, _ in rows[:2]] == ["3", "8"]
    assert {name for _, name, _ in rows} == {name for each in expected for name in [*each][:5]}
    for left, name, right in rows:
        assert [float(left), float(right)] == pytest.approx([each[name] for each in expected], abs=1e-6)
    widths = page.eval_on_selector_all("#mirror .fill", "all => all.map((each) => parseFloat(each.style.width))")
    assert widths == pytest.approx([100 * float(each) for left, _, right in rows for each in (left, right)], abs=0.01)
    response = httpx.post(
        f"{server.url}/features?stages=1,2,3,4", headers={"Accept": "application/vnd.safetensors"},
        files=[("image", path.read_bytes()) for path in (first, second)],
    )  # fmt: skip
    arrays = load(response.content)
    a, b = arrays["embedding"].astype(float)
    assert f"cosine {a @ b / np.linalg.norm(a) / np.linalg.norm(b):.4f} of" in watched.texts("#cosine")
    for n in range(4):
        canvases = [f"#compare-stages figure:nth-child({n + 1}) canvas:nth-child({i})" for i in (1, 2)]
        assert off_from_components([watched.pixels(each) for each in canvases], [*arrays[f"stage{n + 1}"]]) <= 2, n


def test_a_second_model_is_shown_beside_the_first(lenient: Watched, server: Server, digits: Path) -> None:
    """It has the same weights, so the embeddings are the same, and other labels."""
    httpx.post(f"{server.url}/models/{EVIL}/load", headers=MANAGEMENT, timeout=120).raise_for_status()
    page, first = lenient.open(), digits / "two.png"
    page.set_input_files("#file", first)
    page.wait_for_selector("#bars li")
    page.click("#compare-toggle")
    page.select_option("#other-model", EVIL)
    page.wait_for_selector("#compare-stages canvas")

    rows = mirrored(lenient)
    score = pytest.approx(scores_of(server.url, first)["2"], abs=1e-6)
    assert [(left and float(left), name, right and float(right)) for left, name, right in rows[:2]] == [
        (score, "2", ""),
        ("", f"2 {MARKUP}", score),
    ]
    assert "cosine 1.0000 of the two embeddings, 256 numbers each" in lenient.texts("#cosine")
    assert EVIL in lenient.texts("#pair")
    assert page.locator("img[src=x]").count() == 0


def test_a_second_image_that_is_none_is_refused_in_the_words_of_the_service(lenient: Watched, digits: Path) -> None:
    page = lenient.open()
    page.set_input_files("#file", digits / "two.png")
    page.wait_for_selector("#bars li")
    page.click("#compare-toggle")
    assert page.locator("#compare-hint").is_visible()
    page.set_input_files("#other-file", {"name": "text.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_selector("#compare-problem", state="visible")

    assert "not a supported image" in lenient.texts("#compare-problem")
    assert lenient.bars()[0][0] == "2"
    page.click("#other-same")
    page.wait_for_selector("#compare-problem", state="hidden")
