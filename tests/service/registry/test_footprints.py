from pathlib import Path

import pytest

from service.registry.residency import Footprint, Footprints
from service.store.store import Store, StoredModel
from tests.service.stores import add_model

MEASURED = Footprint(bytes=123, seconds=4.5)


@pytest.fixture
def stored(tmp_path: Path) -> StoredModel:
    add_model(tmp_path / "store")
    return Store(tmp_path / "store").find("pvt_v2_b0.tiny")


@pytest.mark.parametrize(("compiled", "bytes_"), [(False, 4), (True, 12)])
def test_before_the_first_load_it_is_estimated_from_the_number_of_parameters(
    stored: StoredModel, compiled: bool, bytes_: int
) -> None:
    estimate = Footprints(None, compiled=compiled).of(stored)

    assert not estimate.measured
    assert estimate.bytes == bytes_ * stored.require_card().parameters
    assert 2 < estimate.seconds < 4


def test_what_was_measured_is_remembered_by_the_next_process_of_the_same_kind(
    stored: StoredModel, tmp_path: Path
) -> None:
    Footprints(tmp_path, "openvino/2").remember(stored, MEASURED)

    assert Footprints(tmp_path, "openvino/2").of(stored) == MEASURED
    assert not Footprints(tmp_path, "torch").of(stored).measured


def test_what_can_not_be_written_is_remembered_all_the_same(stored: StoredModel, tmp_path: Path) -> None:
    (tmp_path / "footprints").write_text("in the way")
    footprints = Footprints(tmp_path)
    footprints.remember(stored, MEASURED)

    assert footprints.of(stored) == MEASURED


def test_a_broken_file_is_no_footprint(stored: StoredModel, tmp_path: Path) -> None:
    Footprints(tmp_path).remember(stored, MEASURED)
    (file,) = (tmp_path / "footprints").iterdir()
    file.write_text('{"bytes": -1}')

    assert not Footprints(tmp_path).of(stored).measured


def test_the_peak_is_estimated_until_it_is_measured_and_never_below_what_stays(stored: StoredModel) -> None:
    footprints, parameters = Footprints(None), stored.require_card().parameters

    assert footprints.peak_bytes(stored, cached=False) > 160_000_000 + 20 * parameters
    assert footprints.peak_bytes(stored, cached=True) < footprints.peak_bytes(stored, cached=False)
    footprints.remember(stored, Footprint(bytes=300_000_000, seconds=1.0, peak_bytes=400_000_000))
    assert footprints.peak_bytes(stored, cached=False) == 400_000_000
    assert footprints.peak_bytes(stored, cached=True) == 300_000_000
