"""Against OpenAI's own client, unchanged."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from tests.app.processes import serving

MODEL = "pvt_v2_b0.digits"


@pytest.fixture(scope="module")
def server() -> Iterator[openai.OpenAI]:
    with serving(api_keys="key") as process, openai.OpenAI(base_url=f"{process.url}/v1", api_key="key") as client:
        yield client


@pytest.fixture(scope="module")
def urls(digits: Path) -> list[str]:
    files = [(digits / f"{name}.png").read_bytes() for name in ("zero", "seven")]
    return ["data:image/png;base64," + base64.b64encode(each).decode() for each in files]


def test_embeddings_come_as_the_client_asks_by_itself_and_as_lists(
    server: openai.OpenAI, client: TestClient, urls: list[str]
) -> None:
    by_itself = server.embeddings.create(model=MODEL, input=urls)
    lists = server.embeddings.create(model=MODEL, input=urls, encoding_format="float")
    ours = client.post("/features", json={"images": urls}).json()["results"]

    assert (by_itself.model, by_itself.object, by_itself.usage.total_tokens) == (MODEL, "list", 0)
    assert [each.index for each in by_itself.data] == [0, 1]
    for first, second, own in zip(by_itself.data, lists.data, ours, strict=True):
        np.testing.assert_allclose(first.embedding, own["embedding"], atol=1e-4)
        np.testing.assert_allclose(second.embedding, own["embedding"], atol=1e-4)


def test_one_url_or_objects_with_urls_are_taken_too(client: TestClient, urls: list[str]) -> None:
    def embedded(input_: Any) -> Any:
        return client.post("/v1/embeddings", json={"input": input_, "model": MODEL}).json()["data"]

    expected = embedded([urls[0]])
    for form in (
        urls[0],
        {"type": "image_url", "image_url": {"url": urls[0]}},
        {"type": "image_url", "image_url": urls[0]},
    ):
        assert embedded(form) == expected
        assert embedded([form]) == expected


def test_models_are_listed(server: openai.OpenAI) -> None:
    assert [each.id for each in server.models.list()] == [MODEL]
    assert server.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="no model"):
        server.models.retrieve("pvt_v2_b0.none")


def test_what_is_wrong_becomes_the_clients_own_exceptions(server: openai.OpenAI, urls: list[str]) -> None:
    create = server.embeddings.create
    with pytest.raises(openai.BadRequestError, match="embeds images, not text"):
        create(model=MODEL, input="a cat")
    with pytest.raises(openai.BadRequestError, match="dimensions: the models here were not trained"):
        create(model=MODEL, input=urls, dimensions=64)
    with pytest.raises(openai.BadRequestError, match="image 2: not a supported image"):
        create(model=MODEL, input=[urls[0], "data:image/png;base64,AAAA"])
    with pytest.raises(openai.NotFoundError, match=r"no model 'pvt_v2_b0\.none'"):
        create(model="pvt_v2_b0.none", input=urls)
    with pytest.raises(openai.AuthenticationError, match="requires an API key"):
        server.with_options(api_key="another").embeddings.create(model=MODEL, input=urls)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "input: Field required"),
        ([], "the body: Input should be"),
        ({"input": []}, "carries no image"),
        ({"input": [1]}, "input"),
        ({"input": [[1, 2]]}, "input"),
        ({"input": "data:image/png;base64,AAAA", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "data:image/png;base64,AAAA", "colour": 1}, "colour: Extra inputs"),
        ({"input": "https://example.org/a.png"}, "is no data: URL"),
    ],
)
def test_malformed_requests_are_refused_in_openais_form(client: TestClient, body: Any, told: str) -> None:
    response = client.post("/v1/embeddings", json=body)

    assert response.status_code == 400
    error = response.json()["error"]
    assert told in error["message"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": "a cat"}, 400, "input"),
        ({"input": "data:image/png;base64,AAAA", "dimensions": 3}, 400, "dimensions"),
        ({"input": "data:image/png;base64,AAAA", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "data:image/png;base64,AAAA", "model": "pvt_v2_b0.none"}, 404, "model"),
        ({"input": "data:image/png;base64,AAAA"}, 400, None),
    ],
)
def test_an_error_names_the_field_that_it_is_about(
    client: TestClient, body: Any, status: int, param: str | None
) -> None:
    response = client.post("/v1/embeddings", json=body)

    assert response.status_code == status
    assert response.json()["error"]["param"] == param
