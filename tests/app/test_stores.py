"""The service with a model store by URL."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings
from tests.app.conftest import MakeClient, png
from tests.service.remotes import site
from tests.service.stores import add_model

TINY = "pvt_v2_b0.tiny"


def test_a_model_in_memory_goes_on_answering_when_its_store_is_gone(make_client: MakeClient, tmp_path: Path) -> None:
    add_model(tmp_path / "store")
    add_model(tmp_path / "store", "pvt_v2_b0.later")
    with site(tmp_path / "store") as server:
        client = make_client(
            model_store=server.url, store_cache_dir=tmp_path / "cache", default_model=TINY, backend="torch"
        )
        listed = [each["state"] for each in client.get("/models").json()["models"] if each["state"] != "remote"]
        first = client.post("/predict", files=[("image", png())])

    gone = client.post("/predict", params={"size": 64}, files=[("image", png())])
    never = client.post("/predict", params={"model": "pvt_v2_b0.later"}, files=[("image", png())])

    assert listed == ["available", "available"]
    assert (first.status_code, gone.status_code) == (200, 200)
    assert (never.status_code, never.json()["title"]) == (503, "Store unreachable")
    assert client.get("/health/ready").status_code == 200


def test_wrong_bytes_are_said_and_a_store_put_right_is_used_at_once(make_client: MakeClient, tmp_path: Path) -> None:
    weights = add_model(tmp_path / "store") / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with site(tmp_path / "store") as server:
        client = make_client(
            model_store=server.url, store_cache_dir=tmp_path / "cache", default_model=TINY, backend="torch"
        )
        wrong = client.post("/predict", files=[("image", png())])
        weights.write_bytes(content)
        right = client.post("/predict", files=[("image", png())])

    assert (wrong.status_code, wrong.json()["title"]) == (503, "Weights digest mismatch")
    assert right.status_code == 200


def test_a_url_that_can_not_be_read_is_refused_at_start() -> None:
    with pytest.raises(ValidationError, match="ftp:// is none of s3://"):
        Settings(model_store="ftp://host/store")
