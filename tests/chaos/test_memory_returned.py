"""What large images took is given back to the kernel within seconds."""

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
from PIL import Image

from tests.app.processes import ROOT, serving

DIGIT = (ROOT / "docs/digits/seven.png").read_bytes()
MB = 10**6


def falls_below(limit: int, resident: Callable[[], int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while resident() > limit and time.monotonic() < end:
        time.sleep(0.1)
    return resident() <= limit


def test_memory_of_large_images_is_given_back_within_seconds(tmp_path: Path) -> None:
    """Of images that are answered, and of some that are refused when all their memory is taken."""
    Image.new("RGB", (7000, 7000), (90, 120, 40)).save(buffer := io.BytesIO(), "PNG", compress_level=1)
    images = [buffer.getvalue(), buffer.getvalue()[: len(buffer.getvalue()) * 9 // 10]] * 4
    variables = {"PVT_CACHE_DIR": str(tmp_path), "PVT_MEMORY_MB": "0"}
    with serving(environment=variables) as server, ThreadPoolExecutor(8) as pool:
        httpx.post(f"{server.url}/predict", files=[("image", DIGIT)], timeout=60)
        process = psutil.Process(server.process.pid)

        def resident() -> int:
            return int(process.memory_info().rss)

        before = resident()
        answers = pool.map(
            lambda image: httpx.post(f"{server.url}/predict", files=[("image", image)], timeout=60), images
        )

        assert [answer.status_code for answer in answers] == [200, 422] * 4
        assert falls_below(before + 120 * MB, resident), (before, resident())
        after = httpx.post(f"{server.url}/predict", files=[("image", DIGIT)], timeout=60)
        assert after.json()["results"][0]["predictions"][0]["label"] == "7"
