from pathlib import Path

import pytest
import torch

from bench.make_store import make_store
from service.architecture.pvt_v2 import create
from service.architecture.weights import read_checkpoint
from service.errors import WeightsMismatch
from service.store.store import Store


def test_a_store_has_one_model_that_loads(tmp_path: Path) -> None:
    card = make_store(tmp_path, "pvt_v2_b0")

    (model,) = Store(tmp_path).models()
    assert model.require_card() == card
    assert (card.id, len(card.labels), card.parameters) == ("pvt_v2_b0.bench", 1000, 3_666_760)
    assert (card.preprocessing.height, card.preprocessing.crop) == (224, 0.9)


def test_a_seed_gives_the_same_weights_again_and_another_gives_others(tmp_path: Path) -> None:
    digests = [make_store(tmp_path / str(i), "pvt_v2_b0", seed=seed).weights.sha256 for i, seed in enumerate((1, 1, 2))]

    assert digests[0] == digests[1] != digests[2]


def test_weights_may_come_from_a_checkpoint(tmp_path: Path) -> None:
    state = create("pvt_v2_b0").state_dict()
    torch.save({"model": state}, tmp_path / "checkpoint.pth")

    make_store(tmp_path / "store", "pvt_v2_b0", checkpoint=tmp_path / "checkpoint.pth")

    written = read_checkpoint(tmp_path / "store" / "pvt_v2_b0.bench" / "1" / "model.safetensors")
    torch.testing.assert_close(written["head.weight"], state["head.weight"])


def test_a_checkpoint_of_another_variant_is_refused(tmp_path: Path) -> None:
    torch.save(create("pvt_v2_b0").state_dict(), tmp_path / "checkpoint.pth")

    with pytest.raises(WeightsMismatch):
        make_store(tmp_path / "store", "pvt_v2_b1", checkpoint=tmp_path / "checkpoint.pth")
