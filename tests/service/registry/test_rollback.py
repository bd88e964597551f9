"""Where the newest version turns out to be wrong when it is loaded, the version before it serves."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from service.engine import Engine
from service.errors import ReferenceInvalid
from service.execution.reference import Reference, packed, synthetic_images
from service.metrics import EngineMetrics
from service.options import EngineOptions
from tests.app.conftest import png
from tests.service.store.test_store import edit_card
from tests.service.stores import add_model

TINY = "pvt_v2_b0.tiny"


@pytest.mark.parametrize("classes", [3, 0])
async def test_a_newest_version_that_fails_its_golden_outputs_is_passed_over_and_reported(
    tmp_path: Path, classes: int
) -> None:
    first = add_model(tmp_path, TINY, classes=classes)
    second = first.parent / "2"
    shutil.copytree(first, second)
    wrong = np.random.default_rng(0).standard_normal((4, classes or 256)).astype(np.float32)
    data, file = packed(Reference(synthetic_images(32, 32), wrong, embeddings=not classes))
    (second / file.file).write_bytes(data)
    edit_card(second, reference=file.model_dump())
    options = EngineOptions(model_store=tmp_path, default_model=TINY, backend="torch", instances=1, max_batch_size=1)

    async with Engine(options, EngineMetrics(CollectorRegistry())) as engine:
        answered = await engine.infer([png()])
        with pytest.raises(ReferenceInvalid):
            await engine.infer([png()], model=f"{TINY}@2")
        status = await engine.model(TINY)

    assert (answered.model, answered.version) == (TINY, "1")
    assert [(each.version, each.state) for each in status.versions] == [("2", "failed"), ("1", "ready")]
    assert isinstance(status.versions[0].failure, ReferenceInvalid)
