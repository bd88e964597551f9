from pathlib import Path

import numpy as np
import pytest

from service.backends.torch import TorchBackend
from service.errors import CardInvalid, ModelLoadFailed, WeightsDigestMismatch, WeightsMismatch
from service.loader import Executable, load
from service.store import Store
from tests.service.stores import add_model
from tests.service.test_store import edit_card

BACKEND = TorchBackend(instances=1, threads=1)


def load_tiny(root: Path, max_batch_size: int = 4) -> Executable:
    return load(Store(root).find("pvt_v2_b0.tiny"), BACKEND, max_batch_size)


def pictures(count: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    return list(np.random.default_rng(1).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def test_a_loaded_model_answers_each_image_as_if_it_were_alone(tmp_path: Path) -> None:
    add_model(tmp_path)
    executable = load_tiny(tmp_path)
    images = pictures(executable.plan.largest)

    together = executable.run(0, images)

    for image, outputs in zip(images, together, strict=True):
        (alone,) = executable.run(0, [image])
        np.testing.assert_allclose(outputs.logits, alone.logits, atol=1e-5)
        np.testing.assert_allclose(outputs.embedding, alone.embedding, atol=1e-5)


def test_the_plan_is_measured_up_to_the_setting(tmp_path: Path) -> None:
    add_model(tmp_path)

    executable = load_tiny(tmp_path, max_batch_size=1)

    assert executable.plan.sizes == (1,)
    assert executable.plan.time(1) > 0


def test_the_report_says_what_was_loaded_and_how(tmp_path: Path) -> None:
    add_model(tmp_path)

    report = load_tiny(tmp_path).report

    assert (report.backend, report.precision) == ("torch", "float32")
    assert report.load_seconds > 0


def test_memory_that_was_freed_before_does_not_make_a_model_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = add_model(tmp_path) / "model.safetensors"
    monkeypatch.setattr("service.loader._resident_bytes", lambda: 10**9)

    assert load_tiny(tmp_path).report.memory_bytes == path.stat().st_size


def test_a_card_with_another_number_of_labels_than_the_head_is_refused(tmp_path: Path) -> None:
    edit_card(add_model(tmp_path), labels=["one", "two"])

    with pytest.raises(WeightsMismatch, match=r"head\.weight"):
        load_tiny(tmp_path)


def test_a_card_with_another_number_of_parameters_is_refused(tmp_path: Path) -> None:
    edit_card(add_model(tmp_path), parameters=7)

    with pytest.raises(CardInvalid, match="the card says 7 parameters"):
        load_tiny(tmp_path)


def test_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = add_model(tmp_path) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(WeightsDigestMismatch):
        load_tiny(tmp_path)


def test_a_card_that_makes_the_model_answer_nan_is_refused(tmp_path: Path) -> None:
    pixels = {"height": 32, "width": 32, "mean": [0.0, 0.0, 0.0], "std": [1e-320, 1e-320, 1e-320]}
    edit_card(add_model(tmp_path), preprocessing=pixels)

    with pytest.raises(ModelLoadFailed, match="gives NaN or infinity"):
        load_tiny(tmp_path)
