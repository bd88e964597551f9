"""The content cache over HTTP: what `Cache-Status`, `ETag`, `Cache-Control` and `If-None-Match` do, and for whom."""

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx2
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from PIL import Image
from starlette.testclient import TestClient
from tritonclient.grpc import service_pb2
from tritonclient.grpc._utils import _get_inference_request

from app.main import create_app, engine_options
from app.open_inference.grpc_messages import SERVICE
from app.open_inference.messages import HEADER_LENGTH
from app.settings import Settings, SettingsInvalid
from app.workers import Worker, WorkerGroup
from tests.app.conftest import png
from tests.app.open_inference.test_grpc import free_port

MODEL = "pvt_v2_b0.digits"
HIT, MISS = "pvt-serve; hit", "pvt-serve; fwd=miss"


@pytest.fixture(scope="module")
def cached(model_store: Path) -> Iterator[TestClient]:
    settings = Settings(
        model_store=model_store, backend="torch", precision="float32", max_batch_size=1, cache_mb=20,
        grpc_port=free_port(),
    )  # fmt: skip
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def image(request: pytest.FixtureRequest) -> bytes:
    """An image that no other test sends."""
    rng = np.random.default_rng(list(request.node.nodeid.encode()))
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def post(client: TestClient, image: bytes, path: str = "/predict", **headers: str) -> httpx2.Response:
    headers = {"content-type": "image/png"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(path, content=image, headers=headers)


def statuses(*responses: httpx2.Response) -> list[str | None]:
    return [each.headers.get("cache-status") for each in responses]


def test_it_is_off_by_default(client: TestClient, image: bytes) -> None:
    for response in (post(client, image), post(client, image)):
        assert response.status_code == 200
        assert {"cache-status", "etag"}.isdisjoint(response.headers)
    assert "pvt_cache_hits_total{" not in client.get("/metrics").text


@pytest.mark.parametrize(
    ("path", "accept"),
    [
        ("/predict", "*/*"),
        ("/features", "*/*"),
        ("/features?stages=1,4", "application/x-npz, */*;q=0.1"),
        ("/explain", "image/png"),
    ],
)
def test_a_hit_has_the_bytes_of_the_answer_that_was_computed(
    cached: TestClient, image: bytes, path: str, accept: str
) -> None:
    answers = [post(cached, image, path, accept=accept) for _ in range(2)]

    assert statuses(*answers) == [MISS, HIT]
    assert answers[0].content == answers[1].content
    assert len({each.headers["etag"] for each in answers}) == 1
    assert re.fullmatch(r'"[0-9a-f]{32}"', answers[0].headers["etag"])
    assert post(cached, image, path, accept=accept, cache_control="no-store").content == answers[0].content


def test_what_only_renders_an_answer_is_no_part_of_its_key(cached: TestClient, image: bytes) -> None:
    paths = ("/predict", "/predict?top_k=2", "/predict?min_score=0.2&timeout_ms=60000", "/features?dtype=float16")
    answers = [post(cached, image, path) for path in paths]

    assert statuses(*answers) == [MISS, HIT, HIT, HIT]
    assert [len(each.json()["results"][0]["predictions"]) for each in answers[:2]] == [5, 2]
    assert post(cached, image, "/predict?size=96").headers["cache-status"] == MISS


def test_nothing_but_the_images_bytes_counts(cached: TestClient, image: bytes) -> None:
    url = "data:image/webp;base64," + base64.b64encode(image).decode()
    answers = [
        post(cached, image),
        post(cached, image, content_type="image/jpeg"),
        post(cached, image, content_type="application/octet-stream"),
        cached.post("/predict", files={"image": ("a.gif", image, "image/gif")}),
        cached.post("/predict", json={"images": [url]}),
    ]

    assert statuses(*answers) == [MISS, *[HIT] * 4]
    assert len({str(each.json()["results"][0]["predictions"]) for each in answers}) == 1
    assert answers[3].json()["results"][0]["filename"] == "a.gif"


def test_metadata_that_turns_an_image_makes_another_one_of_it(cached: TestClient, image: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).save(buffer, "png", exif=exif)

    upright, turned = post(cached, image), post(cached, buffer.getvalue())

    assert statuses(upright, turned) == [MISS, MISS]
    sizes = [(each["width"], each["height"]) for each in (r.json()["results"][0] for r in (upright, turned))]
    assert sizes == [(40, 30), (30, 40)]


def test_every_protocol_shares_the_results(cached: TestClient, image: bytes) -> None:
    encoded = base64.b64encode(image).decode()
    tensor = triton.InferInput("encoded", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([image], np.object_))
    body, length = triton.InferenceServerClient.generate_request_body([tensor])
    answers = [
        post(cached, image),
        post(cached, image, "/invocations"),
        cached.post("/v1/embeddings", json={"model": MODEL, "input": ["data:image/png;base64," + encoded]}),
        cached.post(f"/v2/models/{MODEL}/infer", content=body, headers={HEADER_LENGTH: str(length)}),
    ]

    assert [each.status_code for each in answers] == [200] * 4, [each.text for each in answers]
    assert statuses(*answers) == [MISS, HIT, HIT, HIT]


def test_calls_over_grpc_share_them_too(cached: TestClient, image: bytes) -> None:
    app: Any = cached.app
    tensor = triton_grpc.InferInput("encoded", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([image], np.object_))
    request = _get_inference_request(
        MODEL, [tensor], "", "", None, sequence_id=0, sequence_start=False, sequence_end=False, priority=0,
        timeout=None, parameters=None,
    )  # fmt: skip
    post(cached, image)

    with grpc.insecure_channel(f"127.0.0.1:{app.state.started['settings'].grpc_port}") as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            service_pb2.ModelInferRequest.SerializeToString,
            service_pb2.ModelInferResponse.FromString,
        )
        calls = [call.with_call(request, metadata=each)[1] for each in ((), (("cache-control", "no-store"),))]

    found = [dict(each.trailing_metadata())["cache-status"] for each in calls]
    assert found == [HIT, "pvt-serve; fwd=request"]


def test_several_images_say_how_many_were_found(cached: TestClient, image: bytes) -> None:
    post(cached, image)
    files = [("image", ("a", image)), ("image", ("b", image + b"\0")), ("image", ("c", image + b"\0"))]

    mixed, all_found = [cached.post("/predict", files=files) for _ in range(2)]

    assert statuses(mixed, all_found) == [f'{MISS}; detail="hits=1, coalesced=1, misses=1"', HIT]
    assert mixed.json() == all_found.json()


def test_cache_control_goes_round_it(cached: TestClient, image: bytes) -> None:
    around = "pvt-serve; fwd=request"

    assert statuses(
        post(cached, image, cache_control="no-store"),
        post(cached, image, cache_control='x="1", No-Cache'),
        post(cached, image),
        post(cached, image, cache_control="no-cache"),
        post(cached, image, cache_control="max-age=0"),
    ) == [around, around, HIT, around, HIT]


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}'])
def test_if_none_match_of_the_same_answer_is_412(cached: TestClient, image: bytes, form: str) -> None:
    """RFC 9110, 13.1.2: 304 for GET and HEAD alone."""
    tag = post(cached, image).headers["etag"]

    response = post(cached, image, if_none_match=form.format(tag))

    assert (response.status_code, response.headers["etag"]) == (412, tag)
    assert response.json()["type"] == "urn:pvt-serve:problem:answer-unchanged"


@pytest.mark.parametrize("tag", ["*", '"0123"', "", "nonsense"])
def test_if_none_match_of_another_answer_changes_nothing(cached: TestClient, image: bytes, tag: str) -> None:
    response = post(cached, image, if_none_match=tag)

    assert response.status_code == 200
    assert response.json()["results"]


def test_errors_have_no_tag_and_are_not_kept(cached: TestClient) -> None:
    answers = [post(cached, b"nothing", if_none_match="*") for _ in range(2)]

    assert [each.status_code for each in answers] == [422, 422]
    assert all("etag" not in each.headers for each in answers)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_openapi_document_is_validated_by_its_tag(cached: TestClient, method: str) -> None:
    whole = cached.request(method, "/openapi.json")
    same = cached.request(method, "/openapi.json", headers={"If-None-Match": f'"x", W/{whole.headers["etag"]}'})
    other = cached.request(method, "/openapi.json", headers={"If-None-Match": '"x"'})

    assert [each.status_code for each in (whole, same, other)] == [200, 304, 200]
    assert (same.content, same.headers["etag"]) == (b"", whole.headers["etag"])


def test_metrics_and_statistics_count_hits_and_misses(cached: TestClient, image: bytes) -> None:
    names = ("pvt_cache_hits_total", "pvt_cache_misses_total", "pvt_images_total", "pvt_cache_bytes")

    def counts() -> list[float]:
        app: Any = cached.app
        samples = app.state.started["metrics"].samples(names)
        return [sum(each.value for each in samples if each.name == name) for name in names]

    before = counts()
    post(cached, image)
    post(cached, image)
    after = counts()
    stats = cached.get(f"/v2/models/{MODEL}/stats").json()["model_stats"][0]["inference_stats"]

    assert [new - old for new, old in zip(after, before, strict=True)][:3] == [1, 1, 2]
    assert after[3] > before[3]
    assert [stats[each]["count"] for each in ("cache_hit", "cache_miss")] == after[:2]
    assert stats["cache_hit"]["ns"] > 0
    scraped = {line.partition(" ")[0] for line in cached.get("/metrics").text.splitlines()}
    assert {"pvt_cache_bytes", "pvt_cache_evictions_total"} <= scraped


def test_each_key_finds_only_its_own(model_store: Path) -> None:
    settings = Settings(
        model_store=model_store, backend="torch", precision="float32", max_batch_size=1, cache_mb=20,
        api_keys="one,two",  # type: ignore[arg-type]  # as in the environment
    )  # fmt: skip
    with TestClient(create_app(settings)) as client:
        answers = [post(client, png(), authorization=f"Bearer {key}") for key in ("one", "two", "one", "two")]

    assert statuses(*answers) == [MISS, MISS, HIT, HIT]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"cache_mb": "300", "memory_mb": "700"}, "PVT_CACHE_MB: 300 MB for each process are more than half"),
        ({"cache_mb": "0.5"}, "PVT_CACHE_MB=0.5: .*1 or more"),
        ({"cache_mb": "-1"}, "PVT_CACHE_MB=-1: "),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], reason: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"PVT_{name.upper()}", value)

    with pytest.raises(SettingsInvalid, match=reason):
        create_app(Settings.from_environment())


def test_workers_share_it_out(tmp_path: Path) -> None:
    options = engine_options(Settings(cache_mb=300))

    assert options.cache_bytes == 300_000_000
    assert Worker(WorkerGroup(tmp_path, 3), 0, 0).share_of(options).cache_bytes == 100_000_000
