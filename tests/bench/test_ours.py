from pathlib import Path

import numpy as np
import pytest

from bench.bare import bare_loop
from bench.images import jpegs
from bench.make_store import make_store
from bench.ours import Graphs, Ours, module
from bench.peak import flops


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    make_store(folder, "pvt_v2_b0")
    return folder


def test_the_bare_loop_decodes_and_infers(store: Path) -> None:
    ours = Ours(store, instances=1)

    assert ours.precision in {"float32", "bfloat16"}
    assert bare_loop(ours, jpegs(2), 0.01) > 0


def test_what_an_instance_raises_is_raised(store: Path) -> None:
    def fail(_instance: int) -> None:
        raise LookupError("instance")

    with pytest.raises(LookupError, match="instance"):
        Ours(store, instances=1).on_all(fail)


def test_our_graphs_take_every_batch_size_up_to_the_largest(store: Path) -> None:
    graphs = Graphs(store, 2, threads=1)
    batch = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)

    assert graphs.logits(batch).shape == (2, 1000)
    np.testing.assert_allclose(graphs.logits(batch)[:1], graphs.logits(batch[:1]), atol=0.05)


def test_operations_are_about_twice_the_published_multiply_adds() -> None:
    assert flops("pvt_v2_b0") == pytest.approx(2 * 0.57e9, rel=0.02)
    assert sum(parameter.numel() for parameter in module("pvt_v2_b0").parameters()) == 3_666_760
