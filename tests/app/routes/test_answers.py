"""Models as others train them, imported and asked over HTTP: headless, multi-label, one logit, calibrated, raw.

The truth is timm's own model, torch's own activation, or transformers' own pipeline.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import timm
import torch
import tritonclient.http as triton
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tritonclient.utils import InferenceServerException

from pvt_client import AsyncClient, Client, InvalidRequest
from service.acquisition.importing import ImportOptions, import_model
from service.acquisition.preprocessing import PreprocessingOptions
from service.results import Floats
from tests.app.processes import serving
from tests.cli import conftest as commands

pvt_serve = commands.pvt_serve
SIDE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = ("bird", "cat", "dog", "owl", "pig", "rat")
THRESHOLDS = (0.5, 0.4, 0.6, 0.45, 0.55, 0.3)
# The answers of each model, and how many classes it has.
MODELS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "backbone": (0, {}),
    "plain": (6, {}),
    "multi": (6, {"activation": "sigmoid"}),
    "tuned": (6, {"activation": "sigmoid", "temperature": 1.5, "thresholds": ", ".join(map(str, THRESHOLDS))}),
    "binary": (1, {"activation": "sigmoid", "unknown_below": 0.5}),
    "calm": (6, {"temperature": 2.5, "unknown_below": 0.9}),
    "raw": (6, {"activation": "none"}),
}


def of_timm(classes: int) -> Any:
    """timm's own model, with logits as far apart as trained ones are."""
    torch.manual_seed(classes)
    model = timm.create_model("pvt_v2_b0", num_classes=classes).eval()
    if classes:
        torch.nn.init.normal_(model.head.weight, std=0.15)
        torch.nn.init.normal_(model.head.bias)
    return model


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """PNGs of the models' own size, so that no resampling stands between them and the truth."""
    random, encoded = np.random.default_rng(0), []
    for _ in range(3):
        coarse = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file := BytesIO(), "png")
        encoded.append(file.getvalue())
    return encoded


def tensor(photos: list[bytes]) -> torch.Tensor:
    pixels = np.stack([np.asarray(Image.open(BytesIO(photo))) for photo in photos])
    scaled = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def truth(photos: list[bytes]) -> Mapping[int, Floats]:
    """What timm's models give for the photos, by their number of classes: logits, or embeddings without a head."""
    with torch.inference_mode():
        return {classes: of_timm(classes)(tensor(photos)).numpy() for classes in (0, 1, 6)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    (root / "labels.txt").write_text("\n".join(LABELS))
    for tag, (classes, given) in MODELS.items():
        answers = dict(given)
        if "thresholds" in answers:
            (root / "thresholds.json").write_text(f"[{answers['thresholds']}]")
            answers["thresholds"] = str(root / "thresholds.json")
        save_file(of_timm(classes).state_dict(), file := root / f"{tag}.safetensors")
        options = ImportOptions(
            file=file,
            variant="b0",
            tag=tag,
            labels=str(root / "labels.txt") if classes == len(LABELS) else None,
            preprocessing=PreprocessingOptions(height=SIDE, width=SIDE, crop=1.0),
            **answers,
        )
        import_model(root / "store", options)
    return root / "store"


@pytest.fixture(scope="module")
def url(store: Path) -> Iterator[str]:
    with serving(
        read_log=False, model_store=str(store), default_model="pvt_v2_b0.plain", backend="torch", instances="1",
        max_batch_size="1", precision="float32",
    ) as server:  # fmt: skip
        yield server.url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def predicted(http: httpx.Client, tag: str, photo: bytes, **query: Any) -> Any:
    """The response of `/predict`, and in it the answer of the one image."""
    response = http.post("/predict", params={"model": f"pvt_v2_b0.{tag}", **query}, files={"image": photo})
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return response.json(), result


def scores_of(result: Any) -> dict[int, float]:
    return {each["class_id"]: each["score"] for each in result["predictions"]}


def expected(tag: str, logits: Floats) -> Floats:
    """torch's own activation of timm's logits."""
    _, answers = MODELS[tag]
    scaled = torch.from_numpy(logits) / answers.get("temperature", 1.0)
    kind = answers.get("activation", "softmax")
    found: Floats = (scaled if kind == "none" else getattr(torch, kind)(scaled, *[-1] * (kind == "softmax"))).numpy()
    return found


@pytest.mark.parametrize("tag", ["plain", "multi", "tuned", "binary", "calm", "raw"])
def test_scores_are_torchs_activation_of_timms_logits(
    http: httpx.Client, photos: list[bytes], truth: Mapping[int, Floats], tag: str
) -> None:
    classes, answers = MODELS[tag]
    lowest = -1e9 if tag == "raw" else 0
    for photo, logits in zip(photos, truth[classes], strict=True):
        whole, result = predicted(http, tag, photo, min_score=lowest, top_k=1000)

        assert whole["activation"] == answers.get("activation", "softmax")
        found = scores_of(result)
        assert [*found] == np.argsort(-logits).tolist()
        np.testing.assert_allclose([found[i] for i in range(classes)], expected(tag, logits), rtol=5e-4, atol=1e-6)


def test_a_multi_label_answer_has_each_class_that_reaches_its_threshold(
    http: httpx.Client, photos: list[bytes], truth: Mapping[int, Floats]
) -> None:
    for tag, thresholds in (("multi", (0.5,) * 6), ("tuned", THRESHOLDS)):
        for photo, logits in zip(photos, truth[6], strict=True):
            _, result = predicted(http, tag, photo)
            assert {*scores_of(result)} == {*np.flatnonzero(expected(tag, logits) >= thresholds).tolist()}
            assert "unknown" not in result

    counts = {len(scores_of(predicted(http, "multi", photo)[1])) for photo in photos}
    assert counts != {6}  # so that a threshold was of consequence


def test_min_score_replaces_thresholds_and_may_leave_nothing(http: httpx.Client, photos: list[bytes]) -> None:
    everything = scores_of(predicted(http, "multi", photos[0], min_score=0)[1])
    bound = sorted(everything.values())[2]

    some = scores_of(predicted(http, "multi", photos[0], min_score=bound)[1])
    none = predicted(http, "plain", photos[0], min_score=1)[1]

    assert {*some} == {i for i, score in everything.items() if score >= bound}
    assert none["predictions"] == []
    for query, message in (
        ({"min_score": 1.5}, "from 0 to 1"),
        ({"min_score": "nan"}, "finite"),
        ({"min_score": "x"}, ""),
    ):
        refused = http.post("/predict", params={"model": "pvt_v2_b0.plain", **query}, files={"image": photos[0]})
        assert (refused.status_code, message in refused.json()["detail"]) == (422, True)
        assert "min_score" in refused.json()["detail"]


def test_an_image_whose_best_score_is_too_low_is_unknown(
    http: httpx.Client, photos: list[bytes], truth: Mapping[int, Floats]
) -> None:
    for tag, bound in (("calm", 0.9), ("binary", 0.5)):
        found = [predicted(http, tag, photo)[1]["unknown"] for photo in photos]
        assert found == (expected(tag, truth[MODELS[tag][0]]).max(axis=1) < bound).tolist()
        assert len(predicted(http, "calm", photos[0])[1]["predictions"]) == 5


@pytest.mark.parametrize("tag", ["plain", "multi", "tuned", "binary", "calm", "raw"])
def test_explain_has_the_score_of_predict(http: httpx.Client, photos: list[bytes], tag: str) -> None:
    query = {"model": f"pvt_v2_b0.{tag}"}
    response = http.post("/explain", params=query, files={"image": photos[1]}, headers={"Accept": "application/json"})
    (found,) = response.json()["results"]

    best = predicted(http, tag, photos[1], min_score=-1e9 if tag == "raw" else 0, top_k=1)[1]["predictions"]
    assert [(found["class_id"], found["label"])] == [(each["class_id"], each["label"]) for each in best]
    assert found["score"] == pytest.approx(best[0]["score"], rel=1e-4)
    assert np.mean(found["map"]) + found["bias"] == pytest.approx(found["logit"], abs=1e-4)


@pytest.mark.parametrize("tag", ["plain", "multi", "tuned", "binary", "calm", "raw"])
def test_the_open_inference_protocol_has_the_same_scores(
    url: str, http: httpx.Client, photos: list[bytes], truth: Mapping[int, Floats], tag: str
) -> None:
    classes, output = MODELS[tag][0], "logits" if tag == "raw" else "probabilities"
    sent = triton.InferInput("encoded", [len(photos)], "BYTES")
    sent.set_data_from_numpy(np.array(photos, dtype=np.object_), binary_data=True)
    best = triton.InferRequestedOutput(output, class_count=classes)
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        answer = client.infer(f"pvt_v2_b0.{tag}", [sent])
        named = client.infer(f"pvt_v2_b0.{tag}", [sent], outputs=[best]).as_numpy(output)
        outputs = [each["name"] for each in client.get_model_metadata(f"pvt_v2_b0.{tag}")["outputs"]]

    np.testing.assert_allclose(answer.as_numpy(output), expected(tag, truth[classes]), rtol=5e-4, atol=1e-6)
    first = scores_of(predicted(http, tag, photos[0], min_score=-1e9 if tag == "raw" else 0, top_k=1000)[1])
    for entry in named[0]:
        value, index, label = entry.decode().split(":")
        assert float(value) == pytest.approx(first[int(index)], abs=1e-5)
        assert label == (LABELS[int(index)] if classes > 1 else "class 0")
    assert ("probabilities" in outputs) == (tag != "raw")


def test_a_model_without_a_head_gives_timms_embedding_everywhere(
    url: str, http: httpx.Client, photos: list[bytes], truth: Mapping[int, Floats]
) -> None:
    files = [("image", photo) for photo in photos]
    model = {"model": "pvt_v2_b0.backbone"}
    features = http.post("/features", params={**model, "stages": "4", "pool": "avg"}, files=files).json()["results"]
    urls = [f"data:image/png;base64,{base64.b64encode(photo).decode()}" for photo in photos]
    openai = http.post("/v1/embeddings", json={**model, "input": urls}).json()["data"]
    sent = triton.InferInput("encoded", [len(photos)], "BYTES")
    sent.set_data_from_numpy(np.array(photos, dtype=np.object_), binary_data=True)
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        answer = client.infer("pvt_v2_b0.backbone", [sent])
        outputs = {each["name"]: each["shape"] for each in client.get_model_metadata("pvt_v2_b0.backbone")["outputs"]}
        config = client.get_model_config("pvt_v2_b0.backbone")
        with pytest.raises(
            InferenceServerException, match=r"output 'logits': .* no classification head; it has embedding"
        ):
            client.infer("pvt_v2_b0.backbone", [sent], outputs=[triton.InferRequestedOutput("logits")])
    with Client(url) as ours:
        vectors = [ours.embedding(photo, model="pvt_v2_b0.backbone").vector for photo in photos]
        with pytest.raises(InvalidRequest, match="no classification head"):
            ours.predict(photos[0], model="pvt_v2_b0.backbone")

    for found in (
        [each["embedding"] for each in features],
        [each["stages"]["4"]["data"] for each in features],
        [each["embedding"] for each in openai],
        answer.as_numpy("embedding"),
        vectors,
    ):
        np.testing.assert_allclose(found, truth[0], rtol=5e-4, atol=2e-5)
    assert [each["name"] for each in answer.get_response()["outputs"]] == ["embedding"]
    assert [*outputs] == ["embedding", "stage1", "stage2", "stage3", "stage4"]
    assert outputs["embedding"] == [-1, 256]
    assert [each["name"] for each in config["output"]] == [*outputs]


@pytest.mark.parametrize("endpoint", ["predict", "explain"])
def test_a_model_without_a_head_refuses_to_name_classes_and_says_what_it_does(
    http: httpx.Client, photos: list[bytes], endpoint: str
) -> None:
    refused = http.post(f"/{endpoint}", params={"model": "pvt_v2_b0.backbone"}, files={"image": photos[0]})

    assert refused.status_code == 422
    problem = refused.json()
    assert "'pvt_v2_b0.backbone' has no classification head" in problem["detail"]
    assert "/features or /v1/embeddings" in problem["detail"]


def test_models_say_what_they_answer(http: httpx.Client) -> None:
    listed = {each["id"].partition(".")[2]: each for each in http.get("/models").json()["models"]}

    headless, tuned = listed["backbone"], listed["tuned"]
    assert (headless["num_classes"], headless["tasks"]) == (0, ["features"])
    assert not {"activation", "temperature"} & headless.keys()
    assert (tuned["num_classes"], tuned["tasks"]) == (6, ["predict", "explain", "features"])
    assert (tuned["activation"], tuned["temperature"]) == ("sigmoid", 1.5)
    assert (listed["plain"]["activation"], listed["raw"]["activation"]) == ("softmax", "none")
    assert listed["calm"]["unknown_below"] == 0.9
    assert not {"labels", "thresholds", "preprocessing"} & tuned.keys()

    one = http.get("/models/pvt_v2_b0.tuned").json()
    assert (one["labels"], one["thresholds"]) == ([*LABELS], [*THRESHOLDS])
    assert one["preprocessing"].items() >= {"height": SIDE, "crop": 1.0, "mean": [*MEAN], "std": [*STD]}.items()
    assert http.get("/models/pvt_v2_b0.multi").json()["thresholds"] == 0.5
    assert http.get("/models/pvt_v2_b0.backbone").json()["labels"] == []
    assert http.get("/models/pvt_v2_b1.in1k").json()["state"] == "remote"


def test_the_openapi_document_describes_answers(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()

    parameters = {each["name"]: each for each in document["paths"]["/predict"]["post"]["parameters"]}
    assert "thresholds of the model's card" in parameters["min_score"]["description"]
    schemas = document["components"]["schemas"]
    assert schemas["PredictResponse"]["properties"]["activation"]["enum"] == ["softmax", "sigmoid", "none"]
    assert "none of the classes" in schemas["ImageResult"]["properties"]["unknown"]["description"]
    assert schemas["ModelDetails"]["properties"].keys() >= {"labels", "thresholds", "preprocessing", "tasks"}


def test_the_client_reads_every_kind_of_answer(url: str, http: httpx.Client, photos: list[bytes]) -> None:
    with Client(url) as client:
        multi, empty = (client.predict(photos[0], model="pvt_v2_b0.multi", min_score=bound) for bound in (None, 1.0))
        (calm,) = client.predict([photos[0]], model="pvt_v2_b0.calm")
        raw = client.predict(photos[0], model="pvt_v2_b0.raw", min_score=-100.0)

    assert {each.class_id: each.score for each in multi.classes} == scores_of(predicted(http, "multi", photos[0])[1])
    assert (multi.activation, multi.unknown, empty.classes) == ("sigmoid", None, ())
    with pytest.raises(LookupError, match="no class reached its threshold"):
        _ = empty.best
    assert calm.unknown is predicted(http, "calm", photos[0])[1]["unknown"]  # type: ignore[union-attr]
    assert (raw.activation, raw.best.score) == (
        "none",
        predicted(http, "raw", photos[0], top_k=1)[1]["predictions"][0]["score"],
    )


@pytest.mark.anyio
async def test_the_async_client_passes_min_score_on(url: str, photos: list[bytes]) -> None:
    async with AsyncClient(url) as client:
        found = [each async for each in client.predict_many(photos, model="pvt_v2_b0.multi", min_score=1.0)]

    assert [result.classes for _, result in found] == [()] * 3  # type: ignore[union-attr]


@pytest.fixture
def run(pvt_serve: commands.PvtServe, monkeypatch: pytest.MonkeyPatch, store: Path) -> commands.PvtServe:
    """Runs a command on the same store, or with --url on the service."""
    for name, value in {"MODEL_STORE": store, "BACKEND": "torch", "INSTANCES": 1, "MAX_BATCH_SIZE": 1}.items():
        monkeypatch.setenv(f"PVT_{name}", str(value))
    return pvt_serve


@pytest.mark.parametrize("remote", [True, False])
def test_predict_on_the_command_line_answers_as_the_service_does(
    run: commands.PvtServe, tmp_path: Path, http: httpx.Client, photos: list[bytes], *, remote: bool
) -> None:
    (image := tmp_path / "photo.png").write_bytes(photos[0])

    def predict(tag: str, *options: str) -> list[str]:
        where = ("--url", str(http.base_url)) if remote else ()
        done = run("predict", *where, "--model", f"pvt_v2_b0.{tag}", *options, image)
        assert done.code == 0, done.err
        return done.lines

    (tuned,), (calm,) = (map(json.loads, predict(tag, "--json")) for tag in ("tuned", "calm"))
    assert scores_of(tuned) == pytest.approx(scores_of(predicted(http, "tuned", photos[0])[1]), rel=1e-4)
    assert tuned["activation"] == "sigmoid"
    assert calm["unknown"] is predicted(http, "calm", photos[0])[1]["unknown"]
    assert predict("multi", "--min-score", "1") == [f"{image}  no class"]
    assert predict("multi", "--min-score", "1", "--csv")[1:] == [f"{image},,,,,,"]
    assert "%" not in predict("raw")[0]


@pytest.mark.parametrize("remote", [True, False])
def test_commands_know_a_model_without_a_head(
    run: commands.PvtServe, tmp_path: Path, url: str, photos: list[bytes], truth: Mapping[int, Floats], *, remote: bool
) -> None:
    (image := tmp_path / "photo.png").write_bytes(photos[0])
    options = (*(("--url", url) if remote else ()), "--model", "pvt_v2_b0.backbone", image)

    for refused in (run("predict", *options), run("explain", *options, "-o", tmp_path / "map.png")):
        assert (refused.code, "no classification head" in refused.err) == (2, True)
    assert run("embed", *options, "-o", tmp_path / "all.npz").code == 0
    with np.load(tmp_path / "all.npz") as table:
        np.testing.assert_allclose(table["embedding"], truth[0][:1], rtol=5e-4, atol=2e-5)


def test_bench_measures_a_model_without_a_head_by_its_embeddings(run: commands.PvtServe, url: str) -> None:
    done = run("bench", "--url", url, "--model", "pvt_v2_b0.backbone", "--seconds", "0.2", "--json")

    figures = json.loads(done.out)
    assert (done.code, figures["failed"]) == (0, {})
    assert figures["images"] > 0


def test_verify_checks_the_embedding_of_a_model_without_a_head(run: commands.PvtServe, store: Path) -> None:
    done = run("verify")
    assert "ok   pvt_v2_b0.backbone@1  8 reference outputs reproduced" in done.lines

    (listed,) = [row for row in json.loads(run("ls", "--json").out)["models"] if row["id"] == "pvt_v2_b0.backbone"]
    assert listed["num_classes"] == 0
    with safe_open(store / "pvt_v2_b0.backbone" / "1" / "reference.safetensors", "np") as file:
        assert {*file.keys()} == {"images", "embeddings"}
