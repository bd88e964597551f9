from pathlib import Path

import pytest

from tests.app.conftest import MakeClient, png
from tests.service.stores import add_model

KEY = {"Authorization": "Bearer manager"}


@pytest.mark.parametrize("broken", ["card.json", "model.safetensors"])
def test_only_those_who_manage_see_whole_paths(make_client: MakeClient, tmp_path: Path, broken: str) -> None:
    (add_model(tmp_path) / broken).write_text("{")
    client = make_client(
        model_store=tmp_path, default_model="pvt_v2_b0.tiny", backend="torch", management_keys=("manager",)
    )

    def seen(headers: dict[str, str]) -> str:
        failed = client.post("/predict", files={"image": png()}, headers=headers)
        loaded = client.post("/v2/models/pvt_v2_b0.tiny/infer", content=b"{}", headers=headers)
        pages = [client.get(path, headers=headers) for path in ("/models", "/models/pvt_v2_b0.tiny", "/health/ready")]
        index = client.post("/v2/repository/index", headers=headers)
        return "\n".join(response.text for response in (failed, loaded, *pages, index))

    assert str(tmp_path) not in (strangers := seen({}))
    assert f"pvt_v2_b0.tiny/1/{broken}" in strangers
    assert str(tmp_path) in seen(KEY)
