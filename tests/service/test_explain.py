from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.backends.base import Backend
from service.backends.openvino import OpenVinoBackend
from service.backends.torch import TorchBackend
from service.colours import VIRIDIS
from service.explain import Explanation, explain, maps, overlay
from service.loader import load
from service.results import Answered, Inferred, Timing
from service.store import Store
from service.tuning import Limits
from tests.service.stores import add_model

GREY = np.full((64, 96, 3), 128, np.uint8)


def explanation(heat: list[list[float]], pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = GREY) -> Explanation:
    inferred = Inferred(1, 1, None, Timing(0, 0, 0), pixels)  # type: ignore[arg-type]  # outputs are not looked at
    return Explanation(inferred, 0, "zero", 0.5, 1.0, 0.5, np.array(heat, np.float32))


def shown(png: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(Image.open(BytesIO(png))).astype(np.int64)


@pytest.mark.parametrize("backend", [TorchBackend(1), OpenVinoBackend(1)], ids=lambda backend: backend.name)
@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2_li"])
def test_the_mean_of_each_map_and_the_bias_are_the_logit(tmp_path: Path, variant: str, backend: Backend) -> None:
    add_model(tmp_path, f"{variant}.tiny", classes=5, side=64)
    stored = Store(tmp_path).find(variant)
    loaded = load(stored, [lambda: backend], Limits(1, 1))
    for executable in (loaded, loaded.resized(96, 32)):
        executable.add_stages()
        pixels = np.random.default_rng(0).integers(0, 256, (executable.height, executable.width, 3), dtype=np.uint8)
        (outputs,) = executable.run(0, [pixels], stages=True)
        inferred = Inferred(1, 1, outputs, Timing(0, 0, 0), pixels)
        answered = Answered(stored.require_card(), "1", pixels.shape[:2], executable.head, [inferred])

        for class_id in range(5):
            (explained,) = explain(answered, class_id)
            assert isinstance(explained, Explanation)
            assert explained.map.shape == (executable.height // 32, executable.width // 32)
            assert explained.logit == outputs.logits[class_id]
            assert abs(explained.map.mean() + explained.bias - explained.logit) < 1e-4


def test_the_map_goes_from_dark_blue_to_yellow_and_never_beyond(tmp_path: Path) -> None:  # noqa: ARG001
    image = shown(overlay(explanation([[0, 0, 9], [0, 0, 0]]), 1))

    assert image.shape == (64, 96, 3)
    np.testing.assert_array_equal(image[-1, 0], VIRIDIS[0])
    np.testing.assert_array_equal(image[0, -1], VIRIDIS[255])
    # Of the colours between, as of the values, the order is kept: nothing rings behind the peak or before it.
    greens = image[0, :, 1]
    assert (np.diff(greens) >= 0).all()
    assert greens.min() == VIRIDIS[0, 1]


def test_alpha_mixes_picture_and_map() -> None:
    heat = [[0.0, 1.0], [2.0, 3.0]]
    none, half, all_ = (shown(overlay(explanation(heat), alpha)) for alpha in (0, 0.5, 1))

    np.testing.assert_array_equal(none, GREY)
    assert np.abs(half - (GREY.astype(np.int64) + all_) / 2).max() <= 0.5


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_a_map_that_is_the_same_everywhere_is_all_dark(value: float) -> None:
    image = shown(overlay(explanation([[value] * 3] * 2), 1))

    assert (image == VIRIDIS[0]).all()


def test_the_table_is_viridis() -> None:
    # First, middle and last colour as its authors published them, of 255.
    assert VIRIDIS[[0, 128, 255]].tolist() == [[68, 1, 84], [33, 145, 140], [253, 231, 37]]
    # Lightness rises without a step back, which is what makes it uniform (luma is close enough to see that).
    luma = VIRIDIS[::5] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luma) > 0).all()


def test_maps_of_several_pictures_are_one_array() -> None:
    assert maps([explanation([[0, 1]]), explanation([[2, 3]])]).tolist() == [[[0, 1]], [[2, 3]]]
