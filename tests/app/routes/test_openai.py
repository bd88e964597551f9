"""Against OpenAI's own client, unchanged."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import openai
import pytest
from starlette.testclient import TestClient

from app.bodies import EXAMPLE
from tests.app.processes import serving

MODEL = "pvt_v2_b0.digits"
URL = f"data:image/png;base64,{EXAMPLE}"


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


def test_an_image_has_the_form_that_each_of_the_protocols_dialects_gives_it(
    client: TestClient, urls: list[str]
) -> None:
    url, plain = urls[0], urls[0].partition(",")[2]

    def embedded(input_: Any, **members: Any) -> Any:
        response = client.post("/v1/embeddings", json={"input": input_, "model": MODEL, **members})
        assert response.status_code == 200, response.text
        return response.json()["data"]

    expected = embedded([url])
    for form in (
        url,
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},  # OpenAI, vLLM
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"image": url},  # Jina
        {"image": plain},
        {"url": url},
        {"content": [{"type": "image_url", "image_url": {"url": url}}]},  # Cohere, OpenRouter
        {"content": {"type": "image", "format": "base64", "value": url}},  # Elasticsearch
        {"image_url": url.replace("data:image/png;", "DATA:;charset=utf-8;")},
    ):
        assert embedded(form) == expected
        assert embedded([form]) == expected
    for form in (url, plain, {"image": url}):
        assert embedded([form], modality="image") == expected  # Infinity


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_normalised_embeddings_have_length_one_and_the_same_direction(
    server: openai.OpenAI, urls: list[str], encoding: Any
) -> None:
    def embedded(**extra: Any) -> Any:
        found = server.embeddings.create(model=MODEL, input=urls, encoding_format=encoding, extra_body=extra)
        vectors = [cast("Any", each.embedding) for each in found.data]
        return np.array(
            [np.frombuffer(base64.b64decode(each), "<f4") if isinstance(each, str) else each for each in vectors]
        )

    plain = embedded()
    for name in ("normalize", "normalized"):  # TEI's, Jina's
        unit = embedded(**{name: True})
        np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)


def test_members_that_other_servers_know_change_nothing(server: openai.OpenAI, urls: list[str]) -> None:
    """As OpenAI's other servers, vLLM and TEI, ignore what they do not know."""
    expected = server.embeddings.create(model=MODEL, input=urls).data

    extra = {"truncate": True, "truncate_prompt_tokens": -1, "priority": 0, "task": "retrieval.query", "colour": 1}
    many = server.embeddings.create(model=MODEL, input=urls, user="me", dimensions=256, extra_body=extra)

    assert many.data == expected


def test_models_are_listed(server: openai.OpenAI) -> None:
    (listed,) = server.models.list()
    retrieved = server.models.retrieve(MODEL)

    assert (listed.id, listed.object, listed.owned_by) == (MODEL, "model", "pvt-serve")
    assert retrieved == listed
    with pytest.raises(openai.NotFoundError, match="no model"):
        server.models.retrieve("pvt_v2_b0.none")


def test_what_is_wrong_becomes_the_clients_own_exceptions(server: openai.OpenAI, urls: list[str]) -> None:
    create = server.embeddings.create
    with pytest.raises(openai.BadRequestError, match="embed images, not text"):
        create(model=MODEL, input="a cat")
    with pytest.raises(openai.BadRequestError, match=r"dimensions: .* have 256 numbers, and it was not trained for sh"):
        create(model=MODEL, input=urls, dimensions=64)
    with pytest.raises(openai.BadRequestError, match="image 2: not a supported image"):
        create(model=MODEL, input=[urls[0], "data:image/png;base64,AAAA"])
    with pytest.raises(openai.NotFoundError, match=r"no model 'pvt_v2_b0\.none'"):
        create(model="pvt_v2_b0.none", input=urls)
    with pytest.raises(openai.BadRequestError, match="token ids") as ids:
        create(model=MODEL, input=[[9906, 1917]])
    with pytest.raises(openai.AuthenticationError, match="requires an API key") as key:
        server.with_options(api_key="another").embeddings.create(model=MODEL, input=urls)
    assert (ids.value.type, ids.value.param) == ("invalid_request_error", "input")
    assert (key.value.type, key.value.code) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "input: Field required"),
        ([], "the body: Input should be"),
        ({"input": []}, "input: an empty list"),
        ({"input": [1, 2]}, "input: these are token ids of a text"),
        ({"input": [[1, 2], [3]]}, "OpenAIEmbeddings(check_embedding_ctx_length=False)"),
        ({"input": [*range(500)]}, "input: these are token ids of a text"),
        ({"input": [None]}, "input 0: no image; send base64"),
        ({"input": [URL, [0.5]]}, "input 1: a list of numbers"),
        ({"input": {}}, "input 0: an object with the members none, of which one must be the image"),
        ({"input": {"image": URL, "audio": "x"}}, "input 0: an object with the members 'image', 'audio'"),
        ({"input": {"text": "a cat"}}, "input 0: text; the models here see images only"),
        ({"input": {"image": URL, "text": "a cat"}}, "input 0: text; the models here see images only"),
        ({"input": "a cat"}, "input 0: 'a cat' is no data: URL; the models here embed images, not text"),
        ({"input": ""}, "input 0: '' is no data: URL"),
        ({"input": URL, "encoding_format": "hex"}, "encoding_format"),
        ({"input": URL, "embedding_type": "ubinary"}, "embedding_type: Input should be 'float' or 'base64'"),
        ({"input": URL, "modality": "text"}, "modality: Input should be 'image' or 'auto'"),
        ({"input": "a" * 70_000, "modality": "text"}, "modality: Input should be"),
        (
            {"input": [URL] * 65},
            "PVT_MAX_IMAGES allows 64 in one request; in LangChain OpenAIEmbeddings(chu",
        ),
    ],
)
def test_malformed_requests_are_refused_in_openais_form(client: TestClient, body: Any, told: str) -> None:
    response = client.post("/v1/embeddings", json=body)

    assert response.status_code == 400
    error = response.json()["error"]
    assert told in error["message"]
    code = "too_many_images" if "PVT_MAX_IMAGES" in told else "invalid_request"
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": "a cat"}, 400, "input"),
        ({"input": "data:image/png;base64,AAAA", "dimensions": 3}, 400, "dimensions"),
        ({"input": "data:image/png;base64,AAAA", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "data:image/png;base64,AAAA", "model": "pvt_v2_b0.none"}, 404, "model"),
        ({"input": "data:image/png;base64,AAAA"}, 400, "input"),
        ({"input": "https://example.org/a.png"}, 400, "input"),
        ({"input": "data:image/png;base64,AAAA", "modality": "audio"}, 400, "modality"),
        ({}, 400, "input"),
        ([], 400, None),
    ],
)
def test_an_error_names_the_field_that_it_is_about(
    client: TestClient, body: Any, status: int, param: str | None
) -> None:
    response = client.post("/v1/embeddings", json=body)

    assert response.status_code == status
    assert response.json()["error"]["param"] == param
