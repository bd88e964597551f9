"""Java's own HTTP client, which offers `Upgrade: h2c` with every request."""

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tests.app.processes import LIGHT, serving

PROGRAM = Path(__file__).parent / "Predict.java"


@pytest.mark.skipif(not shutil.which("java") and not os.environ.get("CI"), reason="needs java; CI has it")
def test_javas_client_gets_the_right_answer_to_every_request(digits: Path, tmp_path: Path) -> None:
    labels = {}
    for label, name in enumerate(("zero", "one", "two", "three")):
        labels[str(digits / f"{name}.png")] = str(label)
        large = tmp_path / f"{name}.bmp"
        Image.open(digits / f"{name}.png").convert("RGB").resize((700, 700)).save(large)
        labels[str(large)] = str(label)

    with serving(**LIGHT) as server:
        command = ["java", str(PROGRAM), f"{server.url}/predict", *labels]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    assert ran.returncode == 0, ran.stderr
    seen: Counter[str] = Counter()
    for line in ran.stdout.splitlines():
        how, file, version, body = line.split("\t")
        assert version == "HTTP_1_1"
        assert json.loads(body)["results"][0]["predictions"][0]["label"] == labels[file], line
        seen[how] += 1
    assert seen == {"length": 24, "chunked": 24, "concurrent": 24}
