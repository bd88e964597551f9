"""Misspelled names get the nearest one, on every endpoint."""

import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.bodies import EXAMPLE
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import MakeClient, png

PNG = {"Content-Type": "image/png"}


@pytest.mark.parametrize(
    ("path", "name", "near"),
    [
        ("/predict", "topk", "top_k"),
        ("/predict", "top-k", "top_k"),
        ("/predict", "TopK", "top_k"),
        ("/predict", "k", "top_k"),
        ("/predict", "threshold_score", "min_score"),
        ("/predict", "Model", "model"),
        ("/features", "normalise", "normalize"),
        ("/features", "stage", "stages"),
        ("/features", "embeddings", "embedding"),
        ("/features", "input-size", "size"),
        ("/explain", "class", "class_id"),
        ("/explain", "classId", "class_id"),
        ("/explain", "timeout", "timeout_ms"),
        ("/explain", "opacity-alpha", "alpha"),
    ],
)
def test_a_misspelled_parameter_gets_the_nearest_one(client: TestClient, path: str, name: str, near: str) -> None:
    response = client.post(path, params={name: "1"}, content=png(), headers=PNG)

    assert response.status_code == 422
    assert f"query {name}: no such name; did you mean {near!r}? there are model, size" in response.json()["detail"]


def test_one_wrong_value_and_one_wrong_name_are_both_named(client: TestClient) -> None:
    detail = client.post("/predict?top_k=0&zzz=1", content=png(), headers=PNG).json()["detail"]

    assert detail.startswith("query top_k: must be from 1 to 1000; query zzz: no such name; there are model, size,")


@pytest.mark.parametrize("name", ["", "x" * 60_000, "é", "{reason}", "%00"])
def test_a_name_like_none_gets_a_short_answer(client: TestClient, name: str) -> None:
    response = client.post("/predict", params={name: "1"}, content=png(), headers=PNG)

    assert response.status_code == 422
    assert ": no such name; there are model," in response.json()["detail"]
    assert len(response.content) < 600


@pytest.mark.parametrize(
    ("model", "near"),
    [("b2", "pvt_v2_b2"), ("digits", "pvt_v2_b0.digits"), ("PVT_V2_B0.digits", "pvt_v2_b0.digits"), ("b0", "pvt_v2_b0"),
     ("pvt_v2_b2_in1k", "pvt_v2_b2.in1k"), ("pvt_v2_b0.digist", "pvt_v2_b0.digits"), ("PVT-v2-B5", "pvt_v2_b5")],
)  # fmt: skip
def test_a_misspelled_model_gets_the_nearest_one(client: TestClient, model: str, near: str) -> None:
    body = {"input": f"data:image/png;base64,{EXAMPLE}", "model": model}
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [1], "data": [EXAMPLE]}
    answers = [
        *(client.post(f"/{each}?model={model}", content=png(), headers=PNG) for each in ("predict", "features")),
        client.get(f"/models/{model}"),
        client.post("/v1/embeddings", json=body),
        client.get(f"/v1/models/{model}"),
        client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]}),
        client.get(f"/v2/models/{model}"),
    ]

    assert {each.status_code for each in answers} == {404}
    assert [each.text for each in answers if f"did you mean '{near}'?" not in each.text] == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"image": "x"}', "unknown field 'image'; did you mean 'images'? the body must be an object with a list of"),
        ('{"Images": []}', "unknown field 'Images'; did you mean 'images'? the body must be"),
        ('{"instances": []}', "unknown field 'instances'; did you mean 'images'? the body must be an object"),
        ('{"images": ["x"], "topK": 1}', "unknown field 'topK'; parameters go in the query"),
    ],
)
def test_a_misspelled_member_of_json_gets_the_right_one(client: TestClient, body: str, reason: str) -> None:
    response = client.post("/predict", content=body)

    assert response.status_code == 422
    assert reason in response.json()["detail"]


def test_a_misspelled_member_of_managements_json_gets_the_right_one(make_client: MakeClient) -> None:
    client = make_client(management_keys=("key",))

    response = client.put("/aliases/a", json={"Model": "x"}, headers={"Authorization": "Bearer key"})

    assert response.status_code == 422
    assert "body Model: no such name; did you mean 'model'?" in response.json()["detail"]


@pytest.mark.parametrize("content_type", ["", "application/x-www-form-urlencoded", "text/plain", "application/json"])
def test_managements_json_may_have_any_content_type(make_client: MakeClient, content_type: str) -> None:
    headers = {"Authorization": "Bearer key", "Content-Type": content_type}
    client = make_client(management_keys=("key",))

    wrong = client.put("/aliases/a", content=b'{"model": "b9"}', headers=headers)
    broken = client.put("/aliases/a", content=b'{"model"', headers=headers)

    assert (wrong.status_code, broken.status_code) == (422, 422)
    assert "alias target 'b9'" in wrong.json()["detail"]
    assert "JSON" in broken.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "way"),
    [
        ("POST", "/Predict", "did you mean '/predict'?"),
        ("POST", "/predicts", "did you mean '/predict'?"),
        ("POST", "/api/predict", "did you mean '/predict'?"),
        ("GET", "/healthz", "did you mean '/health'?"),
        ("GET", "/health/readyz", "did you mean '/health/ready'?"),
        ("POST", "/v1/embedding", "did you mean '/v1/embeddings'?"),
        ("POST", "/predict/", "send it to /predict, without the slash"),
        ("POST", "/v2/model/b9/infer", "did you mean '/v2/models/b9/infer'?"),
        ("GET", "/v2/models/b9/configs", "did you mean '/v2/models/b9/config'?"),
        ("POST", "/v1/model/b9:predict", "did you mean '/v1/models/b9:predict'?"),
        ("GET", "/model/b9", "did you mean '/models/b9'?"),
        ("GET", "/%00", "/\\u0000: Not Found; GET /docs lists what there is"),
        ("GET", "/" + "x" * 20_000, "; GET /docs lists what there is"),
    ],
)
def test_a_misspelled_path_gets_the_nearest_one(client: TestClient, method: str, path: str, way: str) -> None:
    response = client.request(method, path)

    assert response.status_code == 404
    assert way in response.text


def test_a_misspelled_path_below_a_prefix_gets_the_nearest_one_as_the_client_reaches_it(
    make_client: MakeClient,
) -> None:
    client = make_client(root_path="/images")

    assert "did you mean '/images/predict'? GET /images/docs lists" in client.post("/images/predicts").text


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/invocations", "curl -X POST -T FILE https://example.org/pvt/invocations"),
        ("/v1/embeddings", "curl -X POST -T FILE https://example.org/pvt/v1/embeddings"),
        ("/v2/models/b9/infer", "curl -X POST -T FILE https://example.org/pvt/v2/models/b9/infer"),
        ("/v1/models/b9:predict", "curl -X POST -T FILE https://example.org/pvt/v1/models/b9:predict"),
        ("/predict", "curl -X POST -T FILE https://example.org/pvt/predict"),
        ("/predict/one.png", "curl -X POST -T FILE https://example.org/pvt/predict"),
        ("/one.png", "curl -X POST -T FILE https://example.org/pvt/predict"),
        ("/invocations/one.png", "curl -X POST -T FILE https://example.org/pvt/invocations"),
        ("/predict/", "curl -X POST -T FILE https://example.org/pvt/predict"),
    ],
)
def test_a_file_that_is_put_anywhere_is_told_the_line_to_type_behind_a_proxy_too(
    model_store: Path, path: str, line: str
) -> None:
    front = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "example.org", "X-Forwarded-Prefix": "/pvt"}
    app = create_app(Settings(model_store=model_store, trusted_proxies="127.0.0.1"))  # type: ignore[arg-type]  # as from a variable
    with TestClient(app, client=("127.0.0.1", 9)) as client:
        response = client.put(path, content=png(), headers=front)

    assert response.status_code in {404, 405}
    assert re.search(rf"{re.escape(line)}(?![/\w])", response.text)


@pytest.mark.parametrize("path", ["/predict", "/features", "/explain"])
def test_a_file_that_is_put_where_images_go_is_told_the_line_to_type(client: TestClient, path: str) -> None:
    url = f"http://testserver{path}"

    response = client.put(path, content=png())

    assert (response.status_code, response.headers["Allow"]) == (405, "OPTIONS, POST")
    assert f"curl -F image=@FILE {url}, or curl -X POST -T FILE {url}" in response.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/predict", "POST"), ("POST", "/models", "GET"), ("DELETE", "/health", "GET")],
)
def test_another_method_is_told_the_one_that_a_path_takes(
    client: TestClient, method: str, path: str, allowed: str
) -> None:
    response = client.request(method, path)

    assert response.status_code == 405
    assert allowed in response.headers["Allow"].split(", ")
    assert f"it takes {allowed}" in response.json()["detail"]


@pytest.mark.parametrize(
    ("headers", "way"),
    [
        ({}, "(PVT_API_KEYS)"),
        ({"X-API-Key": "one"}, "; 'x-api-key' is not read"),
        ({"Authorisation": "Bearer one"}, "; 'authorisation' is not read"),
        ({"X-Authorization": "Bearer one"}, "; 'x-authorization' is not read"),
        ({"Origin": "https://example.org", "Via": "1.1 proxy"}, "(PVT_API_KEYS)"),
        ({"Authorization": "one"}, "; the Authorization that was sent is no Bearer"),
        ({"Authorization": "Token one"}, "; the Authorization that was sent is no Bearer"),
        ({"Authorization": "Bearer secret"}, "; the one that was sent is none of them"),
        ({"Authorization": "Bearer two"}, "; the one that was sent is for management"),
    ],
)
def test_a_key_in_another_place_is_told_where_it_goes(
    make_client: MakeClient, headers: dict[str, str], way: str
) -> None:
    client = make_client(api_keys=("one",), management_keys=("two",))

    response = client.post("/predict", content=png(), headers=headers)

    assert response.status_code == 401
    assert response.json()["detail"].endswith(way)
