"""Requests that schemathesis makes up from the OpenAPI document, good and bad, against the application itself."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks

from tests.app.processes import serving
from tests.service.stores import add_model

MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
NAMES = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
         "response_schema_conformance"]  # fmt: skip


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with a tiny model."""
    root = tmp_path_factory.mktemp("store")
    add_model(root)
    tiny: dict[str, Any] = {
        "default_model": "pvt_v2_b0.tiny",
        "backend": "torch",
        "max_batch_size": "1",
        "max_input_side": "64",
    }
    with serving(model_store=str(root), **tiny) as server:
        yield server.url


def test_made_up_requests_get_only_answers_that_are_documented(url: str) -> None:
    load_all_checks()
    checks: Any = CHECKS.get_by_names(NAMES)
    document = httpx.get(f"{url}/openapi.json").json()
    seen: set[tuple[str, int]] = set()

    @settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
              suppress_health_check=[*HealthCheck])  # fmt: skip
    @given(data=st.data())
    def requests(data: st.DataObject, operation: Any) -> None:
        ways: list[Any] = [operation.as_strategy(generation_mode=mode) for mode in MODES]
        case = data.draw(st.one_of(ways))
        response = case.call(base_url=url)
        seen.add((operation.path, response.status_code))
        case.validate_response(response, checks=checks)

    schema: Any = schemathesis.openapi.from_dict(document)
    for found in schema.get_all_operations():
        requests(operation=found.ok())

    assert {path for path, _ in seen} == {*document["paths"]}
    assert ("/predict", 422) in seen
