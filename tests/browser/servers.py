"""A store with the embedded model more than once, and a server that has it in memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import httpx

DIGITS = "pvt_v2_b0.digits"


def copied(store: Path, name: str, **changes: Any) -> None:
    """Put the embedded model, which is in `store`, there again as `name`, with changes to its card."""
    shutil.copytree(store / DIGITS, store / name)
    path = store / name / "1" / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, **({"id": name} if "id" in card else {}), **changes}))


def wait_until_ready(url: str) -> None:
    """Return when the models that the server at `url` preloads are in memory, in all of its workers."""
    while httpx.get(f"{url}/health/ready", timeout=60).status_code != httpx.codes.OK:
        pass
