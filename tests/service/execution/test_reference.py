import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from service.backends.base import build, plain_logits
from service.errors import ReferenceInvalid
from service.execution.reference import (
    MIN_COSINE,
    TOLERANCE,
    Reference,
    packed,
    reference_of,
    synthetic_images,
    worst,
)
from service.store.cards import ModelCard, ReferenceFile, read_card
from tests.conftest import ROOT
from tests.service.stores import add_model

DIGITS = ROOT / "model_store" / "pvt_v2_b0.digits" / "1"


def stored(tmp_path: Path, reference: Reference) -> tuple[ModelCard, Path]:
    folder = add_model(tmp_path)
    data, file = packed(reference)
    (folder / file.file).write_bytes(data)
    return read_card(folder).model_copy(update={"reference": file}), folder


def reference(classes: int = 3, side: int = 32) -> Reference:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    return Reference(images, random.standard_normal((2, classes)).astype(np.float32))


def test_a_packed_reference_is_read_again(tmp_path: Path) -> None:
    written = reference()

    read = reference_of(*stored(tmp_path, written))

    assert read is not None
    np.testing.assert_array_equal(read.images, written.images)
    np.testing.assert_array_equal(read.logits, written.logits)


def test_a_card_without_a_reference_has_none(tmp_path: Path) -> None:
    folder = add_model(tmp_path)

    assert reference_of(read_card(folder), folder) is None


def test_a_reference_file_that_is_missing_is_named(tmp_path: Path) -> None:
    card, folder = stored(tmp_path, reference())
    (folder / "reference.safetensors").unlink()

    with pytest.raises(ReferenceInvalid, match=r"reference\.safetensors: No such file"):
        reference_of(card, folder)


def test_a_reference_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    card, folder = stored(tmp_path, reference())
    (folder / "reference.safetensors").write_bytes(packed(reference(side=64))[0])

    with pytest.raises(ReferenceInvalid, match=r"SHA-256 is \w+, expected"):
        reference_of(card, folder)


def test_a_pipe_in_place_of_a_reference_file_is_not_waited_for(tmp_path: Path) -> None:
    card, folder = stored(tmp_path, reference())
    (folder / "reference.safetensors").unlink()
    os.mkfifo(folder / "reference.safetensors")

    with pytest.raises(ReferenceInvalid, match=r"reference\.safetensors: no regular file"):
        reference_of(card, folder)


NUMBERS = Reference(np.array(7, np.uint8), np.array(0.5, np.float32))


@pytest.mark.parametrize("wrong", [reference(classes=4), reference(side=64), NUMBERS])
def test_a_reference_that_does_not_fit_the_model_is_refused(tmp_path: Path, wrong: Reference) -> None:
    with pytest.raises(ReferenceInvalid, match="must be uint8"):
        reference_of(*stored(tmp_path, wrong))


def test_a_reference_that_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    card, folder = stored(tmp_path, reference())
    data = b"no such thing"
    (folder / "reference.safetensors").write_bytes(data)

    file = ReferenceFile(file="reference.safetensors", sha256=hashlib.sha256(data).hexdigest())

    with pytest.raises(ReferenceInvalid, match="no safetensors file with 'images' and 'logits'"):
        reference_of(card.model_copy(update={"reference": file}), folder)


def test_synthetic_images_are_the_same_every_time_and_use_the_whole_range() -> None:
    images = synthetic_images(64, 96)

    assert images.shape == (4, 64, 96, 3)
    assert (images.min(), images.max()) == (0, 255)
    np.testing.assert_array_equal(images, synthetic_images(64, 96))
    assert len({image.tobytes() for image in images}) == 4


def test_the_embedded_models_reference_is_what_plain_float32_gives() -> None:
    card = read_card(DIGITS)

    read = reference_of(card, DIGITS)

    assert read is not None
    assert sorted(read.logits.argmax(axis=1)) == list(range(10))
    torch.set_num_threads(1)
    np.testing.assert_allclose(plain_logits(build(card, DIGITS), read.images), read.logits, atol=1e-3)


def of(*logits: Sequence[float]) -> Reference:
    return Reference(np.zeros((len(logits), 2, 2, 3), np.uint8), np.array(logits, np.float32))


def test_an_image_whose_logits_are_near_zero_is_measured_with_the_spread_of_all() -> None:
    wanted = of([4, 0, -4], [3, 0, -3], [0.01, 0, -0.01])
    given = wanted.logits + np.array([[0.0], [0.0], [1.0]], np.float32) * np.array([[0.02, -0.02, 0.02]], np.float32)

    deviation = wanted.deviation(given)

    assert deviation.image == 2
    assert deviation.share == pytest.approx(0.02 / ((8 + 6 + 0.02) / 3))
    assert deviation.objection("bfloat16") is None  # though the third image's own cosine is 0.41


def test_a_deviation_that_the_cosine_of_many_classes_hides_is_refused() -> None:
    random = np.random.default_rng(0)
    wanted = of(*random.standard_normal((4, 1000)).tolist())
    given = wanted.logits.copy()
    given[1, 500] += 1.02 * TOLERANCE * wanted.spread

    deviation = wanted.deviation(given)

    assert deviation.cosine > MIN_COSINE
    assert "of their spread, 0.03 is allowed" in (deviation.objection("bfloat16") or "")


def test_small_deviations_of_all_of_many_classes_are_refused_by_the_cosine() -> None:
    random = np.random.default_rng(0)
    wanted = of(*random.standard_normal((4, 1000)).tolist())
    signs = random.choice([-1.0, 1.0], (4, 1000)).astype(np.float32)
    given = wanted.logits + np.float32(0.9 * TOLERANCE * wanted.spread) * signs

    deviation = wanted.deviation(given)

    assert deviation.share < TOLERANCE
    assert deviation.cosine < MIN_COSINE
    assert deviation.objection("bfloat16")


@pytest.mark.parametrize(("distance", "allowed"), [(0.95, True), (1.05, False)])
def test_classes_may_change_places_up_to_the_tolerance_between_them(distance: float, allowed: bool) -> None:
    apart = 10 * TOLERANCE * distance
    wanted = of([10, 10 - apart, 0], [0, 5, 10])
    given = wanted.logits.copy()
    given[0, :2] = 10 - apart / 2, 10 - apart / 2 + 0.01

    deviation = wanted.deviation(given)

    assert (deviation.changed, deviation.images) == (1, 2)
    assert deviation.swap == pytest.approx(TOLERANCE * distance, rel=1e-4)
    assert deviation.share < TOLERANCE
    assert (deviation.objection("bfloat16") is None) == allowed
    assert f"{deviation.swap:.2g} of the spread apart" in str(deviation)


def test_one_class_is_measured_across_images() -> None:
    wanted = of([5], [-5])

    assert wanted.deviation(np.array([[5.1], [-5.1]], np.float32)).objection("bfloat16") is None
    assert wanted.deviation(np.array([[5.5], [-5.0]], np.float32)).objection("bfloat16")
    assert of([5]).deviation(np.array([[5.01]], np.float32)).objection("bfloat16") is None
    assert of([5]).deviation(np.array([[6.0]], np.float32)).objection("bfloat16")


def test_the_worst_of_several_has_each_ones_worst() -> None:
    wanted = of([10, 9.9, 0], [0, 5, 10])
    far, swapped = wanted.logits.copy(), wanted.logits.copy()
    far[1, 0] = 0.2
    swapped[0, :2] = 9.9, 9.95

    found = worst([wanted.deviation(far), wanted.deviation(swapped)])

    assert found.largest == pytest.approx(0.2)
    assert found.changed == 1
    assert found.swap == pytest.approx(0.01, rel=1e-3)
