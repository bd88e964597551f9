import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from service.backends.served import build, plain_logits
from service.errors import ReferenceInvalid
from service.execution.reference import Reference, packed, reference_of, synthetic_images
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


@pytest.mark.parametrize("wrong", [reference(classes=4), reference(side=64)])
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
