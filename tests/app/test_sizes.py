"""Input sizes over HTTP: side by side, compiled on first use, bounded in number."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.execution.executable import Executable
from service.execution.tuning import Reserve
from service.results import Outputs, Pixels
from tests.app.conftest import MakeClient, png
from tests.service.stores import add_model

SIZES = ("32", "64", "32x96")
IMAGES = [png(colour) for colour in ("red", "green", "blue", "white")]


@pytest.fixture
def tiny(make_client: MakeClient, tmp_path: Path) -> TestClient:
    add_model(tmp_path)
    return make_client(model_store=tmp_path, default_model="pvt_v2_b0.tiny", backend="torch", sizes_per_model=2)


def ask(client: TestClient, path: str, size: str, image: bytes) -> Any:
    headers = {"Content-Type": "image/png", "Accept": "application/json"}
    response = client.post(path, params={"size": size}, content=image, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()["results"][0]


def score(result: Any) -> float:
    """The best class's, however the endpoint tells it."""
    return float(result["predictions"][0]["score"] if "predictions" in result else result["score"])


def test_batches_never_mix_sizes(tiny: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[set[tuple[int, ...]]] = []
    run = Executable.run

    def noted(self: Executable, instance: int, images: Sequence[Pixels], **how: Any) -> list[Outputs]:
        batches.append({(self.height, self.width, 3), *(each.shape for each in images)})
        return run(self, instance, images, **how)

    questions = [(path, size, image) for path in ("/predict", "/explain") for size in SIZES for image in IMAGES]
    alone = [score(ask(tiny, *question)) for question in questions]
    monkeypatch.setattr(Executable, "run", noted)
    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(lambda question: score(ask(tiny, *question)), questions))

    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(each, 5) for each in alone}) > len(SIZES)  # sizes and images do give different answers
    assert {len(shapes) for shapes in batches} == {1}
    assert {shape for shapes in batches for shape in shapes} == {(32, 32, 3), (64, 64, 3), (32, 96, 3)}


def test_a_size_is_made_ready_once_and_the_least_recently_used_goes(
    tiny: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    resized = Executable.resized

    def noted(self: Executable, height: int, width: int, reserve: Reserve) -> Executable:
        made.append((height, width))
        return resized(self, height, width, reserve)

    monkeypatch.setattr(Executable, "resized", noted)
    for size in ("32", "64", "96", "64", "64", "128", "64", "96"):
        ask(tiny, "/predict", size, IMAGES[0])

    # 32 is the model's own; 96 went for 128, as two besides its own are kept.
    assert made == [(64, 64), (96, 96), (128, 128), (96, 96)]
