"""The training script, and the model in the store that it wrote."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.weights import load_weights
from service.files import file_sha256
from service.store.cards import read_card
from training.digits import (
    NAMES,
    SIZES,
    Digits,
    augmented,
    batches,
    normalised,
    predicted,
    publish,
    render,
    rendered,
    seen,
    split,
    train,
)

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "model_store" / "pvt_v2_b0.digits" / "1"


def tiny() -> PVT_V2:
    torch.manual_seed(0)
    return PVT_V2(64, num_classes=10, embed_dims=(8, 8, 8, 8), num_heads=(1,) * 4, depths=(1,) * 4)


@pytest.fixture(scope="module")
def committed() -> PVT_V2:
    card = read_card(FOLDER)
    model = create(card.variant, num_classes=len(card.labels))
    load_weights(model, FOLDER / card.weights.file, card.weights.sha256)
    return model.eval()


def few(count: int) -> Digits:
    digits = split().train
    return Digits(digits.pixels[:count], digits.labels[:count])


def test_split_holds_out_a_stratified_fifth_and_loses_nothing() -> None:
    data, parts = load_digits(), split()

    assert len(parts.train.labels) == 1437
    assert len(parts.held_out.labels) == 360
    both = np.concatenate([parts.train.pixels, parts.held_out.pixels]).reshape(-1, 64)
    assert np.array_equal(np.unique(both, axis=0), np.unique(data.data, axis=0))
    counts = np.bincount(parts.held_out.labels)
    assert np.abs(counts - np.bincount(data.target) / 5).max() < 1


def test_no_image_is_in_both_parts() -> None:
    train_part, held_out = ({image.tobytes() for image in part.pixels} for part in split())

    assert not train_part & held_out


def test_split_is_the_same_each_time() -> None:
    assert np.array_equal(split().held_out.pixels, split().held_out.pixels)


def test_render_gives_64_by_64_grey_from_black_to_white() -> None:
    pixels = np.zeros((8, 8))
    pixels[2:6, 2:6] = 16

    image = render(pixels)

    assert image.mode == "L"
    assert image.size == (64, 64)
    assert image.getpixel((0, 0)) == 0
    assert image.getpixel((32, 32)) == 255


def test_plain_images_are_normalised_as_in_serving() -> None:
    grey = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)

    inputs = normalised(grey)

    assert inputs.shape == (2, 3, 1, 1)
    assert inputs[1, :, 0, 0].tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    assert inputs[0, 2, 0, 0].item() == pytest.approx(-0.406 / 0.225)


def test_augmentation_keeps_the_range_and_inverts_about_half() -> None:
    grey = rendered(few(200)) / 255

    changed = augmented(grey, torch.Generator().manual_seed(0))

    assert changed.shape == grey.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    light = (changed.mean((1, 2, 3)) > 0.5).float().mean()
    assert 0.35 < light < 0.65


@pytest.mark.parametrize("side", [64, 96, 256])
def test_an_image_is_resized_in_training_as_in_serving(side: int) -> None:
    grey = rendered(few(4))

    changed = seen(grey / 255, side, torch.Generator().manual_seed(3))

    served = np.stack(
        [np.asarray(render(each).resize((side, side), Image.Resampling.BICUBIC)) for each in few(4).pixels]
    )
    differences = np.abs(changed.squeeze(1).numpy() * 255 - served).max((1, 2))
    assert changed.shape == (4, 1, side, side)
    assert (differences < 4).any()  # those whose edges are not sharper
    assert (differences > 20).any()


def test_batches_have_every_size_about_as_many_pixels_each_and_see_every_image_as_often() -> None:
    found = list(batches(100, 400, SIZES, torch.Generator().manual_seed(0)))

    assert {side for _, side in found} == {*range(64, 257, 32)}
    assert {side: len(images) for images, side in found} == {64: 64, 96: 28, 128: 16, 160: 10, 192: 8, 224: 8, 256: 8}
    counts = torch.bincount(torch.cat([images for images, _ in found]), minlength=100)
    assert counts.max() - counts.min() <= 1


def test_training_lowers_the_loss() -> None:
    digits = few(64)
    torch.manual_seed(0)
    model = create("pvt_v2_b0", num_classes=10, depths=(1, 1, 1, 1))

    losses = train(model, rendered(digits), torch.from_numpy(digits.labels), steps=8, seed=0, sizes=(64,))

    assert len(losses) == 8
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    digits = few(96)
    cards = []
    for run in ("first", "second"):
        model = tiny()
        train(model, rendered(digits), torch.from_numpy(digits.labels), steps=4, seed=5, sizes=(64, 96))
        cards.append(publish(model, tmp_path / run, digits, "Trained."))

    assert cards[0] == cards[1]
    folder = tmp_path / "first" / "pvt_v2_b0.digits" / "1"
    assert read_card(folder) == cards[0]
    assert file_sha256(folder / "model.safetensors") == cards[1].weights.sha256


def test_committed_card_agrees_with_its_file() -> None:
    card = read_card(FOLDER)
    path = FOLDER / card.weights.file

    assert card.id == FOLDER.parent.name == "pvt_v2_b0.digits"
    assert card.weights.sha256 == file_sha256(path)
    assert card.weights.bytes == path.stat().st_size
    assert card.labels == tuple("0123456789")
    assert (card.preprocessing.height, card.preprocessing.width, card.preprocessing.crop) == (64, 64, 1.0)
    assert card.explain_size == (128, 128)


def test_committed_card_tells_the_models_size_and_accuracy(committed: PVT_V2) -> None:
    card, held_out = read_card(FOLDER), split().held_out
    right = predicted(committed, rendered(held_out)) == torch.from_numpy(held_out.labels)

    assert card.parameters == sum(parameter.numel() for parameter in committed.parameters())
    assert card.accuracy is not None
    assert card.accuracy.images == len(right) == 360
    assert card.accuracy.top1 == pytest.approx(right.double().mean().item(), abs=0.006)  # two images: other kernels
    assert card.accuracy.top1 >= 0.98


def test_samples_are_the_first_held_out_image_of_each_class() -> None:
    held_out = split().held_out

    for digit, name in enumerate(NAMES):
        first = held_out.pixels[np.flatnonzero(held_out.labels == digit)[0]]
        with Image.open(ROOT / "docs" / "digits" / f"{name}.png") as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), np.asarray(render(first)))
