import pytest

from bench.precision import EMBEDDED, STORE, deviations
from service.backends.base import build
from service.backends.cpu import TorchBackend
from service.execution.reference import TOLERANCE, reference_of
from service.store.store import Store


def test_each_batch_size_is_held_against_float32() -> None:
    stored = Store(STORE).find(EMBEDDED)
    reference = reference_of(stored.require_card(), stored.folder)
    assert reference
    module = build(stored.require_card(), stored.folder)

    exact = deviations(TorchBackend(1), module, reference, "float32", (1, 4))
    reduced = deviations(TorchBackend(1), module, reference, "bfloat16", (4,))

    assert [each.images for each in exact] == [10, 10]
    assert max(each.share for each in exact) < 1e-5
    assert reduced[0].share == pytest.approx(TOLERANCE / 15, rel=0.9)
