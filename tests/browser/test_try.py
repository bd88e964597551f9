"""Every way to give an image, and what the page then shows."""

from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Page
from safetensors.numpy import load

from tests.app.processes import Server
from tests.browser.components import off_from_components
from tests.browser.conftest import EVIL, MARKUP, Watched, is_answer
from tests.browser.strokes import STROKES


def give_as_sample(page: Page, path: Path) -> None:
    page.click(f"#samples button[title='{path.name}']")


def give_as_file(page: Page, path: Path) -> None:
    page.set_input_files("#file", path)


def give_by_event(page: Page, path: Path, event: str) -> None:
    code = """([text, name, event]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(text), (each) => each.charCodeAt(0))], name));
        document.body.dispatchEvent(event === "drop"
            ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
    }"""
    page.evaluate(code, [b64encode(path.read_bytes()).decode(), path.name, event])


def draw(page: Page, strokes: list[list[tuple[float, float]]]) -> None:
    box = page.locator("#pad").bounding_box()
    assert box
    for stroke in strokes:
        points = [(box["x"] + x * box["width"] / 100, box["y"] + y * box["height"] / 100) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()


WAYS: dict[str, Callable[[Page, Path], None]] = {
    "sample": give_as_sample,
    "file": give_as_file,
    "drop": lambda page, path: give_by_event(page, path, "drop"),
    "paste": lambda page, path: give_by_event(page, path, "paste"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_bars_are_the_answer_of_predict(watched: Watched, server: Server, digits: Path, way: str) -> None:
    path = digits / "two.png"
    page = watched.open()
    WAYS[way](page, path)
    page.wait_for_selector("#bars li")

    bars = watched.bars()
    assert is_answer(bars, server.url, path.read_bytes())
    assert watched.texts("#best") == f"2 {100 * bars[0][1]:.1f} %"
    widths = page.eval_on_selector_all("#bars .fill", "all => all.map(each => parseFloat(each.style.width))")
    assert widths == pytest.approx([100 * score for _, score in bars], abs=0.01)
    assert len(watched.texts("#request-id")) == 32
    assert "infer" in watched.texts("#timing")


def drawn(watched: Watched, url: str) -> str:
    """The best label, once the bars are the answer to the ink that is there since the pointer went up."""
    for _ in range(50):
        watched.page.wait_for_function("() => seen.sent.at(-1)?.at > seen.up && seen.running === 0")
        bars = watched.bars()
        if is_answer(bars, url, watched.sent()):
            return bars[0][0]
    pytest.fail(f"the bars {bars} are no answer to what was sent last")


def test_nine_of_ten_drawn_digits_are_right(watched: Watched, server: Server) -> None:
    page = watched.open()
    page.click("#draw")
    best = {}
    for digit, strokes in STROKES.items():
        page.click("#clear")
        draw(page, strokes)
        best[str(digit)] = drawn(watched, server.url)

    assert sum(digit == label for digit, label in best.items()) >= 9, best


def test_of_fifty_fast_strokes_the_last_one_wins_and_one_request_is_under_way(watched: Watched, server: Server) -> None:
    page = watched.open()
    page.click("#draw")
    draw(page, [[(20 + n, 10 + n), (40 + n, 50 + n / 2)] for n in range(50)])
    drawn(watched, server.url)

    assert page.evaluate("seen.most") == 1


def test_the_newest_image_wins_and_what_it_replaces_is_given_up(watched: Watched) -> None:
    page = watched.open()
    page.route("**/predict*", lambda route: route.continue_() if "nine.png" in (route.request.post_data or "") or
               page.evaluate("seen.sent.length") > 1 else None)  # fmt: skip
    page.click("#samples button[title='one.png']")  # never answered
    page.wait_for_function("() => seen.sent.length === 1")
    page.click("#samples button[title='nine.png']")
    page.wait_for_selector("#bars li")

    assert watched.bars()[0][0] == "9"
    assert page.evaluate("[seen.most, seen.running]") == [1, 0]


def test_several_images_are_one_request_and_a_strip(watched: Watched, digits: Path, tmp_path: Path) -> None:
    page = watched.open()
    bad = tmp_path / "no image.png"
    bad.write_text("no image at all")
    page.set_input_files("#file", [digits / "one.png", bad, digits / "two.png"])
    page.wait_for_selector("#strip-tools", state="visible")

    assert [each.strip() for each in page.locator("#strip button").all_inner_texts()] == ["1", "✕ error", "2"]
    page.click("#strip button:nth-child(3)")
    assert watched.bars()[0][0] == "2"
    page.click("#strip button:nth-child(2)")
    assert "not a supported image" in watched.texts("#problem")
    with page.expect_download() as download:
        page.click("#save-csv")
    rows = download.value.path().read_text().splitlines()
    assert (rows[0], len(rows)) == ('"file","rank","class_id","label","score","error"', 12)
    assert rows[1].startswith('"one.png","1","1","1","0.9')
    assert page.evaluate("seen.sent.length") == 1


def test_a_label_with_markup_stays_text(watched: Watched, digits: Path) -> None:
    page = watched.open()
    page.select_option("#model", EVIL)
    page.wait_for_function(f"() => document.querySelector('#model-line').textContent.startsWith('{EVIL}')")
    page.route("**/predict*", lambda route: route.continue_(headers={**route.request.headers, "prefer": "wait=60"}))
    page.set_input_files("#file", digits / "two.png")
    page.wait_for_selector("#bars li")
    page.wait_for_selector("#stages canvas")

    assert watched.bars()[0][0] == f"2 {MARKUP}"
    assert page.locator("img[src=x]").count() == 0
    assert page.title() == "Try · pvt-serve"
    assert page.locator("#draw").is_hidden()  # its labels are no digits
    page.click("text=Python")
    assert f'model="{EVIL}"' in watched.texts("#code")


def test_the_overlay_is_the_map_on_the_crop_of_the_model(watched: Watched, server: Server, digits: Path) -> None:
    """Of an image of 600 x 300 the model sees the 300 x 300 in its middle; a mark is in that one's corner."""
    image = Image.new("RGB", (600, 300))
    image.paste(Image.open(digits / "eight.png").resize((300, 300)), (150, 0))
    image.paste("red", (150, 0, 180, 30))
    buffer = BytesIO()
    image.save(buffer, "png")
    page = watched.open()
    page.set_input_files("#file", {"name": "wide.png", "mimeType": "image/png", "buffer": buffer.getvalue()})
    page.wait_for_selector("#stages canvas")
    found = httpx.post(
        f"{server.url}/explain", files={"image": buffer.getvalue()}, headers={"Accept": "application/json"}
    )
    explained = found.json()["results"][0]

    def pixels(opacity: int) -> NDArray[np.int64]:
        page.locator("#opacity").fill(str(opacity))
        return watched.pixels("#overlay")

    cells = np.array(explained["map"])
    step = 512 // len(cells)
    shown = pixels(100)[step // 2 :: step, step // 2 :: step]  # nearly the middles of cells: enlarging is bilinear
    expected = colormaps["viridis"]((cells - cells.min()) / np.ptp(cells))[..., :3] * 255
    assert np.abs(shown - expected).max() <= 6  # two steps of the colour scale
    bare = pixels(0)
    assert (bare[5:45, 5:45] - [255, 0, 0] == 0).all()
    assert not (bare[60:, 60:, 0] > bare[60:, 60:, 1] + 40).any()
    assert abs(cells.mean() + explained["bias"] - explained["logit"]) < 1e-3
    line = watched.texts("#identity")
    assert f"mean {cells.mean():.4f} + bias {explained['bias']:.4f}" in line
    assert f"is the logit {explained['logit']:.4f} of {explained['label']} ✓" in line
    assert [float(each) for each in page.locator("#map-table td").all_inner_texts()] == pytest.approx(
        cells.ravel(), abs=1e-3
    )


def test_another_class_has_another_map(watched: Watched, server: Server, digits: Path) -> None:
    page = watched.open()
    page.set_input_files("#file", digits / "eight.png")
    page.wait_for_selector("#stages canvas")
    page.select_option("#where-class", "3")
    page.wait_for_function("() => document.querySelector('#identity').textContent.includes(' of 3')")

    found = httpx.post(f"{server.url}/explain?class_id=3", files={"image": (digits / "eight.png").read_bytes()},
                       headers={"Accept": "application/json"}).json()["results"][0]  # fmt: skip
    assert f"logit {found['logit']:.4f} of 3" in watched.texts("#identity")


def plain(text: str) -> str:
    """With a letter in the place of the multiplication sign."""
    return text.replace("\N{MULTIPLICATION SIGN}", "x")


def test_the_map_has_the_cells_of_its_input_size_and_its_mean_and_the_bias_are_the_logit(
    watched: Watched, server: Server, digits: Path
) -> None:
    page, image = watched.open(), (digits / "eight.png").read_bytes()
    page.set_input_files("#file", digits / "eight.png")
    page.wait_for_function("() => document.querySelector('#stages').textContent.includes('32 \u00d7 32')")
    assert page.input_value("#size") == "128"  # as the card's explain_size says
    found = httpx.post(f"{server.url}/explain?size=128&class_id=8", files={"image": image},
                       headers={"Accept": "application/json"}, timeout=60).json()["results"][0]  # fmt: skip
    cells = np.array(found["map"])
    page.locator("#opacity").fill("100")

    assert cells.shape == (4, 4)
    assert cells.mean() + found["bias"] == pytest.approx(found["logit"], abs=1e-3)
    assert f"is the logit {found['logit']:.4f} of 8 ✓" in watched.texts("#identity")
    assert f"score is {100 * found['score']:.1f} %" in watched.texts("#identity")
    assert "4 x 4 cells, each of 32 x 32 pixels of the 128 x 128 input" in plain(watched.texts("#identity"))
    shown = watched.pixels("#overlay")[64::128, 64::128]
    expected = colormaps["viridis"]((cells - cells.min()) / np.ptp(cells))[..., :3] * 255
    assert np.abs(shown - expected).max() <= 4
    sizes = [plain(each) for each in page.locator("#size option").all_inner_texts()]
    assert sizes == ["64 x 64, the model's", "128 x 128", "224 x 224", "320 x 320", "448 x 448"]
    page.select_option("#size", "64")
    page.wait_for_function("() => document.querySelector('#stages').textContent.includes('1: 16 \u00d7 16')")
    assert "2 x 2 cells, each of 32 x 32 pixels of the 64 x 64 input" in plain(watched.texts("#identity"))


def stages_of(url: str, path: Path) -> list[NDArray[np.float32]]:
    """The four maps of an image, each (channels, height, width)."""
    response = httpx.post(f"{url}/features?stages=1,2,3,4&size=128", files={"image": path.read_bytes()},
                          headers={"Accept": "application/vnd.safetensors"})  # fmt: skip
    stages = load(response.content)
    return [stages[f"stage{n}"][0] for n in (1, 2, 3, 4)]


def test_the_colours_of_the_stages_are_the_principal_components_of_numpy(
    watched: Watched, server: Server, digits: Path
) -> None:
    page = watched.open()
    page.set_input_files("#file", digits / "three.png")
    page.wait_for_selector("#stages canvas")
    for n, maps in enumerate(stages_of(server.url, digits / "three.png")):
        shown = watched.pixels(f"#stages figure:nth-child({n + 1}) canvas")
        assert off_from_components([shown], [maps]) <= 2, n


def test_images_of_a_strip_share_the_components_of_all_of_them(watched: Watched, server: Server, digits: Path) -> None:
    page, paths = watched.open(), [digits / f"{name}.png" for name in ("one", "eight", "three")]
    page.set_input_files("#file", paths)
    page.wait_for_selector("#stages canvas")
    page.select_option("#basis", "all")
    page.wait_for_selector("#stages.several canvas")
    of_all = [stages_of(server.url, path) for path in paths]

    for n in range(4):
        shown = [watched.pixels(f"#stages figure:nth-child({n + 1}) canvas:nth-child({i + 1})") for i in range(3)]
        assert off_from_components(shown, [stages[n] for stages in of_all]) <= 2, n


def test_the_colours_are_those_of_matplotlib(watched: Watched) -> None:
    watched.open()
    found = watched.page.evaluate("import(new URL('static/viridis.js', document.baseURI)).then((it) => it.VIRIDIS)")

    assert np.abs(np.array(found) - colormaps["viridis"](np.arange(256), bytes=True)[:, :3].astype(int)).max() <= 1


def test_the_camera_has_one_request_under_way(watched: Watched) -> None:
    page = watched.open()
    page.click("#camera")
    page.wait_for_function("() => seen.sent.length >= 5")
    page.click("#camera")
    page.wait_for_function("() => seen.running === 0")

    assert page.evaluate("seen.most") == 1
    assert page.locator("#bars li").count() == 5
