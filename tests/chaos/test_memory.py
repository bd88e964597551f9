"""In a container's memory, large images and loads wait, are refused with figures, or make room: none ends the process.

Each test runs a real server in a memory cgroup, whose limit the kernel enforces.
"""

import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.app.processes import LARGE_BATCHES, ROOT, serving
from tests.chaos.cgroup import memory_limit
from tests.service.stores import add_model

DIGIT = (ROOT / "docs/digits/seven.png").read_bytes()
GB = 2**30


def png(side: int, mode: str = "RGB") -> bytes:
    Image.new(mode, (side, side), "white").save(buffer := io.BytesIO(), "PNG", compress_level=9)
    return buffer.getvalue()


def webp(side: int) -> bytes:
    """Decoding one takes 12 bytes for each pixel."""
    Image.new("RGB", (side, side), "white").save(buffer := io.BytesIO(), "WebP", method=0, quality=10)
    return buffer.getvalue()


@contextmanager
def contained(limit_bytes: int, cache: Path, command: Sequence[str] = ("-m", "app"), **settings: str) -> Iterator[str]:
    """The address of a server in so much memory; the kernel has ended nothing when the context does."""
    variables = {f"PVT_{name.upper()}": value for name, value in {"cache_dir": str(cache), **settings}.items()}
    with (
        memory_limit(limit_bytes) as group,
        serving(prefix=group.prefix, environment=variables, command=command) as server,
    ):
        yield server.url
        assert group.killed() == 0
        assert server.process.poll() is None


def classify(url: str, image: bytes, model: str = "", timeout: float = 120) -> httpx.Response:
    params = {"model": model} if model else {}
    return httpx.post(f"{url}/predict", params=params, files=[("image", image)], timeout=timeout)


def latencies(url: str, until: list[Future[httpx.Response]]) -> list[float]:
    """The seconds of a small request, again and again until all of `until` have ended, and its answer is 200."""
    seconds = []
    with httpx.Client(timeout=60) as client:
        while not all(each.done() for each in until):
            start = time.monotonic()
            answer = client.post(f"{url}/predict", files=[("image", DIGIT)])
            seconds.append(time.monotonic() - start)
            assert answer.status_code == 200, answer.text
    return seconds


def test_large_images_at_once_are_decoded_one_after_another(tmp_path: Path) -> None:
    """Each takes 200 MB; two of them ended the process."""
    large = png(7000)
    with contained(GB, tmp_path, backend="torch") as url, ThreadPoolExecutor(4) as threads:
        assert classify(url, DIGIT).status_code == 200

        waiting = [threads.submit(classify, url, large) for _ in range(4)]
        assert latencies(url, waiting)

        assert {each.result().status_code for each in waiting} <= {200, 429, 503, 504}
        assert [each.result().status_code for each in waiting].count(200) >= 2


def test_an_image_that_never_fits_is_503_with_the_figures(tmp_path: Path) -> None:
    with contained(3 * GB, tmp_path, memory_mb="700", backend="torch") as url:
        assert classify(url, DIGIT).status_code == 200

        answer = classify(url, webp(6000))

        assert answer.status_code == 503
        assert "MB for decoding do not fit into the" in answer.json()["detail"]
        assert answer.json()["type"].endswith("memory-exhausted")
        assert classify(url, DIGIT).status_code == 200


@pytest.mark.parametrize("budget_mb", ["0", "600"])
def test_a_load_that_does_not_fit_is_503_and_small_requests_go_on(tmp_path: Path, budget_mb: str) -> None:
    """The model would fit; what compiling it takes would not, and ended the process."""
    store = tmp_path / "store"
    add_model(store, "pvt_v2_b3.large", classes=1000, side=224)
    add_model(store, "pvt_v2_b0.tiny", side=32)
    settings = {"model_store": str(store), "default_model": "pvt_v2_b0.tiny", "memory_budget_mb": budget_mb}
    with contained(GB, tmp_path / "cache", **settings) as url, ThreadPoolExecutor(1) as threads:
        assert classify(url, DIGIT).status_code == 200

        load = threads.submit(classify, url, DIGIT, "pvt_v2_b3.large")
        latencies(url, [load])

        assert load.result().status_code == 503
        assert "pvt_v2_b3.large@1" in load.result().json()["detail"]
        assert " MB" in load.result().json()["detail"]
        assert classify(url, DIGIT).status_code == 200


def test_models_that_are_asked_for_in_turn_take_the_place_of_those_that_are_idle(tmp_path: Path) -> None:
    """Room is made for what compiling the next one takes, although no budget for models is set."""
    store = tmp_path / "store"
    names = [f"pvt_v2_b0.model{i}" for i in range(4)]
    for name in names:
        add_model(store, name, side=32)
    settings = {"model_store": str(store), "default_model": names[0], "min_residency_seconds": "0", "memory_mb": "900"}
    with contained(GB, tmp_path / "cache", **settings) as url:
        answers = [classify(url, DIGIT, name) for name in names]

        assert [each.status_code for each in answers] == [200] * len(names)


def test_input_sizes_in_turn_fit_beside_a_model_with_large_batches(tmp_path: Path) -> None:
    """Each reserves what its own graphs take, and what an evicted one took is free again."""
    sizes = ("96", "256", "160", "128")
    with contained(GB, tmp_path, LARGE_BATCHES, memory_mb="1000", max_batch_size="8", sizes_per_model="1") as url:
        answers = [httpx.post(f"{url}/predict?size={size}", files=[("image", DIGIT)], timeout=120) for size in sizes]

        assert [(each.status_code, each.text) for each in answers if each.status_code != 200] == []
        assert classify(url, DIGIT).status_code == 200


def test_batches_that_do_not_fit_are_left_out_and_the_model_serves_without(tmp_path: Path) -> None:
    with contained(GB, tmp_path, LARGE_BATCHES, memory_mb="780", max_batch_size="8") as url:
        assert classify(url, DIGIT).status_code == 200
        model = httpx.get(f"{url}/models/pvt_v2_b0.digits").json()

        assert "MB for models do not fit" in str(model), model


@pytest.mark.timeout(300)  # b3 and b5 are compiled: 66 s on two busy cores
def test_five_models_of_the_family_in_turn_do_in_three_gigabytes(tmp_path: Path) -> None:
    """Loading the b5 alone takes 2 GB at its peak, so that others have to go for it."""
    store, names = tmp_path / "store", [f"pvt_v2_{each}.random" for each in ("b0", "b2", "b3", "b5", "b1")]
    for name in names:
        add_model(store, name, classes=1000, side=32)
    settings = {"model_store": str(store), "default_model": names[0], "min_residency_seconds": "0"}
    one = {"instances": "1", "max_batch_size": "1", "precision": "float32", "timeout_ms": "250000"}
    with contained(3 * GB, tmp_path / "cache", **settings, **one) as url:
        for name in (*names, names[0]):
            answer = classify(url, DIGIT, name, timeout=250)

            assert answer.status_code == 200, (name, answer.text)
