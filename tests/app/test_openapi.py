from typing import Any

import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from app.bodies import BODY_EXAMPLES
from app.open_inference.messages import InferResponse
from app.problems import MEANING, Problem
from app.routes.images import ExplainResponse, FeaturesResponse, PredictResponse
from app.routes.openai import EmbeddingsResponse
from tests.app.conftest import MakeClient

Json = dict[str, Any]


@pytest.fixture(scope="module")
def document(client: TestClient) -> Json:
    described: Json = client.get("/openapi.json").json()
    return described


def operations(document: Json) -> dict[str, Json]:
    return {each["operationId"]: each for path in document["paths"].values() for each in path.values()}


def references(node: object) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(each) for each in node.values()))
    return set().union(*(references(each) for each in node)) if isinstance(node, list) else set()


def test_operations_have_short_names_of_their_own_and_a_tag_that_is_described(document: Json) -> None:
    named = operations(document)
    described = {tag["name"] for tag in document["tags"]}

    assert len(named) == sum(len(path) for path in document["paths"].values())
    assert {"predict", "list_models", "get_model", "get_health", "get_metrics"} <= {*named}
    assert all(each["tags"] and {*each["tags"]} <= described for each in named.values())
    assert document["servers"]


def test_every_reference_leads_somewhere(document: Json) -> None:
    for reference in references(document):
        node = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]


def test_every_error_of_every_operation_is_a_problem_with_its_headers(document: Json) -> None:
    shared = document["components"]["responses"]
    for operation in operations(document).values():
        for status, answer in operation["responses"].items():
            if "$ref" in answer:
                assert answer["$ref"] == f"#/components/responses/problem_{status}"
            else:
                assert "X-Request-ID" in answer["headers"]
        assert "500" in operation["responses"]

    assert all({*each["content"]} == {"application/problem+json"} for each in shared.values())
    assert all("X-Request-ID" in each["headers"] for each in shared.values())
    assert "Retry-After" in shared["problem_429"]["headers"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_problem_has_an_example_of_its_status(document: Json) -> None:
    for name, response in document["components"]["responses"].items():
        status = int(name.removeprefix("problem_"))
        assert response["description"] == MEANING[status]
        shown = response["content"]["application/problem+json"]["examples"].values()
        problems = [Problem.model_validate(each["value"]) for each in shown]
        assert {each.status for each in problems} == {status}
    internal = document["components"]["responses"]["problem_500"]["content"]["application/problem+json"]["examples"]
    assert internal["internal-error"]["summary"] == MEANING[500]


def test_what_is_in_a_path_is_never_null(document: Json) -> None:
    parameters = [each for operation in operations(document).values() for each in operation.get("parameters", ())]
    in_paths = [each for each in parameters if each["in"] == "path"]

    assert {"version", "name", "model_id"} <= {each["name"] for each in in_paths}
    assert all(each["schema"]["type"] == "string" for each in in_paths)


def test_predictions_say_where_their_time_went(document: Json) -> None:
    assert "Server-Timing" in operations(document)["predict"]["responses"]["200"]["headers"]
    assert "Server-Timing" not in operations(document)["list_models"]["responses"]["200"]["headers"]


def test_keys_are_asked_for_only_where_some_are_set(document: Json, make_client: MakeClient) -> None:
    locked = make_client(api_keys=("one",), management_keys=("two",)).get("/openapi.json").json()

    assert "securitySchemes" not in document["components"]
    assert not any("security" in each or "401" in each["responses"] for each in operations(document).values())
    assert {*locked["components"]["securitySchemes"]} == {"api_key", "management_key"}
    named = operations(locked)
    assert named["predict"]["security"] == [{"api_key": []}]
    assert named["get_scheduler"]["security"] == [{"management_key": []}]
    assert "security" not in named["get_health"]
    refusal = locked["components"]["responses"]["problem_401"]
    assert "WWW-Authenticate" in refusal["headers"]


@pytest.mark.parametrize("name", [name for name in BODY_EXAMPLES if name != "URL"])
def test_every_example_of_a_json_body_is_answered(client: TestClient, document: Json, name: str) -> None:
    content = operations(document)["predict"]["requestBody"]["content"]["application/json"]
    example = content["examples"][name.replace(" ", "-")]["value"]

    response = client.post("/predict", json=example)

    assert response.status_code == 200
    assert all("predictions" in each for each in response.json()["results"])


@pytest.mark.parametrize(
    "answer", [PredictResponse, FeaturesResponse, ExplainResponse, EmbeddingsResponse, InferResponse]
)
def test_every_answer_about_images_has_an_example_that_is_one(document: Json, answer: type[BaseModel]) -> None:
    (example,) = document["components"]["schemas"][answer.__name__]["examples"]

    assert answer.model_validate(example, extra="forbid").model_dump(mode="json", exclude_unset=True) == example
