"""The endpoints that take images: `POST /predict`, `/features` and `/explain`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import AfterValidator, BaseModel, Field, JsonValue
from pydantic.config import JsonDict
from typing_extensions import override

from app.dependencies import require_key
from app.encodings import NPY, NPZ, SAFETENSORS, Stack, check_holds, encode, json_bytes, json_pieces
from app.openapi import BINARY_CONTENT, IMAGE_PROBLEMS, IMAGES, INFERENCE, operation_id
from app.problems import Problem, documented, problem
from app.routes.inference import JSON, LARGE, InferenceQuery, InferenceRoute, answer, chosen_media_type, encoded, infer
from service import postprocess
from service.engine import DefaultSize
from service.errors import InvalidRequest, ServiceError
from service.postprocess import (
    DEFAULT_CLASSES,
    MOST_CLASSES,
    ClassScore,
    FeatureOptions,
    check_classes,
    classify,
    feature,
    numbers,
    scores,
)
from service.postprocess import features as selected_features
from service.results import JSON_INSTEAD, InferenceResult, require_all
from service.results import ImageResult as Inferred
from service.store.cards import Activation

router = APIRouter(
    tags=[INFERENCE],
    route_class=InferenceRoute,
    dependencies=[Depends(require_key)],
    generate_unique_id_function=operation_id,
)

PNG = "image/png"
MOST_PNG_SIDE = 2048
_STAGES = re.compile(r"[1-4](,[1-4])*")
_SEVEN = {"class_id": 7, "label": "7", "score": 0.9713}
_EIGHT = {"class_id": 8, "label": "8", "score": 0.0069}
_FEATURES = {"embedding": [-0.2731, 1.204], "stages": {"4": {"shape": [2, 1, 1], "data": [-0.2731, 1.204]}}}
_EXPLANATION = {
    **_SEVEN,
    "logit": 5.5,
    "bias": -0.5,
    "crop": {"left": 0.0, "top": 0.0, "right": 64.0, "bottom": 64.0},
    "map": [[4.0, 8.0, 8.0, 4.0], [5.0, 7.0, 7.0, 5.0], [5.0, 7.0, 7.0, 5.0], [4.0, 8.0, 8.0, 4.0]],
}

_EXPLAIN_SIZE: DefaultSize = attrgetter("explain_size")
InputSize = Annotated[tuple[int, int], Field(description="Of the model's input: height and width, in pixels.")]
Names = Sequence[str | None]  # of the images' files


class ImageError(BaseModel):
    """The problem of one image among several."""

    filename: str | None
    error: Problem


class ImageInfo(BaseModel):
    """An image; width and height are its own, in pixels."""

    filename: str | None
    width: int
    height: int


def example(image: Mapping[str, Any], **more: JsonValue) -> JsonDict:
    """The example in a response's schema, of which `image` and `more` are the endpoint's own."""
    result: dict[str, Any] = {"filename": "seven.png", "width": 64, "height": 64, **image}
    response: dict[str, Any] = {"model": "pvt_v2_b0.digits", "version": "1", **more, "results": [result]}
    return {"examples": [response]}


def documentation(*binary: str) -> dict[str, Any]:
    """What the route of an endpoint that takes images documents, with the `binary` forms of its response."""
    content: dict[int | str, Any] = {200: {"content": dict.fromkeys(binary, BINARY_CONTENT)}} if binary else {}
    statuses = (406, 412, *IMAGE_PROBLEMS) if binary else (412, *IMAGE_PROBLEMS)
    return {"openapi_extra": {"requestBody": IMAGES}, "responses": {**content, **documented(*statuses)}}


def image_results(request: Request, names: Names, result: InferenceResult) -> list[dict[str, Any]]:
    """For each image an ImageInfo, to be completed, or an ImageError, for orjson."""
    return [
        {"filename": name, "error": problem(image, request.state.request_id).model_dump()}
        if isinstance(image, ServiceError)
        else {"filename": name, "width": image.width, "height": image.height}
        for name, image in zip(names, result.results, strict=True)
    ]


class PredictQuery(InferenceQuery):
    """Parameters of `POST /predict`."""

    top_k: Annotated[
        int | None,
        Field(
            ge=1,
            le=MOST_CLASSES,
            description=f"How many classes to name at the most, best first. By default {DEFAULT_CLASSES}; of a "
            "multi-label model (`sigmoid`) all that reach their threshold.",
        ),
    ] = None
    min_score: Annotated[
        float | None,
        Field(
            allow_inf_nan=False,
            description="Name only classes with at least this score, in place of the thresholds of the model's card: "
            "from 0 to 1, or any logit where the activation is `none`.",
        ),
    ] = None


class ClassPrediction(BaseModel):
    """One class; `score` is what the response's `activation` makes of its logit: a share of 1, or the logit itself."""

    class_id: int
    label: str
    score: float


class ImageResult(ImageInfo):
    """The result for one image; width and height are its own, in pixels."""

    predictions: Annotated[
        list[ClassPrediction], Field(description="Best first; empty where no class reaches its threshold.")
    ]
    unknown: Annotated[
        bool | None,
        Field(
            description="Whether the best score is below the card's `unknown_below`, so that the image shows none of "
            "the classes; absent where the card has no such bound."
        ),
    ] = None


class PredictResponse(BaseModel, json_schema_extra=example({"predictions": [_SEVEN, _EIGHT]}, activation="softmax")):
    """The results, in the order of the images."""

    model: str
    version: str
    activation: Activation
    results: list[ImageResult | ImageError]


@router.post("/predict", summary="Classify images", response_model=PredictResponse, **documentation())
async def predict(request: Request, query: Annotated[PredictQuery, Query()]) -> Response:
    """The best classes of one image or several; of a multi-label model all that reach their threshold.

    What a score is, `activation` says. A model without a head names no classes and is refused. With several, a bad one
    becomes an `error` in its place and the others have results. With a single image, its error is the response.
    """
    check = partial(check_classes, min_score=query.min_score)
    names, result = await infer(request, query, check=check)
    body = await encoded(request, result, partial(prediction_bytes, request, names, result, query))
    return Response(body, media_type=JSON)


def prediction_bytes(request: Request, names: Names, result: InferenceResult, query: PredictQuery) -> bytes:
    """A PredictResponse as JSON; building the model first would cost as much as all else in this module."""
    whole = {"model": result.model, "version": result.version, "activation": result.card.activation}
    return orjson.dumps({**whole, "results": predictions(request, names, result, query)})


def predictions(request: Request, names: Names, result: InferenceResult, query: PredictQuery) -> list[dict[str, Any]]:
    """For each image an ImageResult or an ImageError, for orjson."""
    results = image_results(request, names, result)
    for entry, image in zip(results, result.results, strict=True):
        if not isinstance(image, ServiceError):
            # A ClassScore has a ClassPrediction's fields, and orjson knows dataclasses.
            found = classify(image.outputs.logits, result.card, query.top_k, query.min_score)
            entry.update(found)
            _count_score(request, result, image, found["predictions"])
    return results


def _count_score(request: Request, result: InferenceResult, image: Inferred, best_first: Sequence[ClassScore]) -> None:
    """Count the best class's score, also where it is below the model's threshold; logits have no range to count in."""
    if result.card.activation == "none":
        return
    score = best_first[0].score if best_first else float(scores(image.outputs.logits, result.card).max())
    request.state.engine.scored(result.model, score)


def _are_stages(value: str) -> str:
    if value and (not _STAGES.fullmatch(value) or len({*value.split(",")}) < len(value.split(","))):
        raise ValueError("must be different numbers from 1 to 4, separated by commas, such as 1,4")
    return value


class FeaturesQuery(InferenceQuery):
    """Parameters of `POST /features`."""

    embedding: Annotated[bool, Field(description="Whether the response has the embedding.")] = True
    stages: Annotated[
        str,
        AfterValidator(_are_stages),
        Field(description="Stages whose feature maps to return, such as `1,4`; their strides are 4, 8, 16 and 32."),
    ] = ""
    pool: Annotated[
        Literal["avg", "none"], Field(description="`avg`: the mean of each map over its positions, not the map.")
    ] = "none"
    normalize: Annotated[
        bool, Field(description="Scale each vector of channels, in a map the one at each position, to length 1.")
    ] = False
    dtype: Annotated[
        Literal["float32", "float16"], Field(description="Of the numbers; float16 halves the binary forms.")
    ] = "float32"

    @property
    def wanted(self) -> FeatureOptions:
        """The same, as the engine's."""
        stages = tuple(int(stage) for stage in self.stages.split(",") if stage)
        return FeatureOptions(self.embedding, stages, self.pool, self.normalize, self.dtype)


class StageMap(BaseModel):
    """A feature map: `shape` is channels, height, width, or channels alone; `data` is flat, the last axis fastest."""

    shape: list[int]
    data: list[float]


class ImageFeatures(ImageInfo):
    """The features of one image; width and height are its own, in pixels, `stages` is by number."""

    embedding: list[float] | None = None
    stages: dict[str, StageMap] | None = None


class FeaturesResponse(BaseModel, json_schema_extra=example(_FEATURES, size=[64, 64])):
    """The features, in the order of the images."""

    model: str
    version: str
    size: InputSize
    results: list[ImageFeatures | ImageError]


@router.post(
    "/features",
    summary="Embeddings and feature maps of images",
    response_model=FeaturesResponse,
    **documentation(NPZ, SAFETENSORS, NPY),
)
async def features(request: Request, query: Annotated[FeaturesQuery, Query()]) -> Response:
    """The embedding of each image, and the feature maps of the requested stages.

    As JSON, or with an `Accept` for it as `.npz`, `.safetensors` or, a single array, as `.npy`. There each array has a
    first axis for the image, and an image that fails fails the request; in JSON its `error` stands in its place.
    """
    media_type, wanted = chosen_media_type(request, (JSON, NPZ, SAFETENSORS, NPY)), query.wanted
    check_holds(media_type, wanted.names)
    names, result = await infer(request, query, stages=bool(wanted.stages))
    pieces = (
        json_pieces(_features(request, names, result, wanted))
        if media_type == JSON
        else _arrays(media_type, names, result, wanted)
    )
    return await answer(request, result, pieces, numbers(result, wanted.stages), media_type)


def _arrays(media_type: str, names: Names, result: InferenceResult, wanted: FeatureOptions) -> Iterator[bytes]:
    """One of the binary forms; raises as `require_all`, before the first piece."""
    outputs = [each.outputs for each in require_all(result.results, names, JSON_INSTEAD)]

    def stack(name: str) -> Stack:
        return Stack.of(len(outputs), lambda i: feature(outputs[i], name, wanted))

    stacks = {name: stack(name) for name in wanted.names}
    return encode(stacks, media_type, {"model": result.model, "version": result.version})


def _features(request: Request, names: Names, result: InferenceResult, wanted: FeatureOptions) -> dict[str, Any]:
    """A FeaturesResponse, its results one by one as they are encoded."""

    def results() -> Iterator[dict[str, Any]]:
        for entry, image in zip(image_results(request, names, result), result.results, strict=True):
            if not isinstance(image, ServiceError):
                arrays = selected_features(image.outputs, wanted)
                if wanted.embedding:
                    entry["embedding"] = arrays["embedding"]
                if wanted.stages:
                    maps = {str(i): arrays[f"stage{i}"] for i in wanted.stages}
                    entry["stages"] = {i: {"shape": array.shape, "data": array.ravel()} for i, array in maps.items()}
            yield entry

    return {"model": result.model, "version": result.version, "size": result.size, "results": results()}


class ExplainQuery(InferenceQuery):
    """Parameters of `POST /explain`."""

    class_id: Annotated[
        int | None, Field(ge=0, description="The class to explain; each image's most likely one if absent.")
    ] = None
    alpha: Annotated[
        float,
        Field(ge=0, le=1, allow_inf_nan=False, description="How opaque the map lies on the image (PNG only)."),
    ] = 0.5
    output_size: Annotated[
        int | None,
        Field(
            ge=1,
            le=MOST_PNG_SIDE,
            description="Pixels of the longer side of the PNG, its aspect ratio kept; those of the model's input if "
            "absent (PNG only).",
        ),
    ] = None

    @property
    @override
    def default_size(self) -> DefaultSize:
        return _EXPLAIN_SIZE


class Crop(BaseModel):
    """A rectangle in an upright image, in its own pixels from its left upper corner."""

    left: float
    top: float
    right: float
    bottom: float


class ImageExplanation(ImageInfo):
    """What speaks for one class where: the mean of `map`, plus `bias`, is `logit`; `score` is as in `/predict`."""

    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    crop: Annotated[
        Crop,
        Field(
            description="The part of the upright image that `map` covers. It exceeds the image where the model's "
            "preprocessing puts a border around it."
        ),
    ]
    map: Annotated[list[list[float]], Field(description="Rows, top to bottom; a cell is 32 x 32 pixels of the input.")]


class ExplainResponse(BaseModel, json_schema_extra=example(_EXPLANATION, size=[128, 128])):
    """The explanations, in the order of the images."""

    model: str
    version: str
    size: InputSize
    results: list[ImageExplanation | ImageError]


@router.post(
    "/explain", summary="Where in an image a class is seen", response_model=ExplainResponse, **documentation(PNG, NPY)
)
async def explain(request: Request, query: Annotated[ExplainQuery, Query()]) -> Response:
    """The exact class activation map of one class: the mean of its map, plus its bias, is its logit.

    As a PNG of one image, as the model saw it, with the map on it; or, with an `Accept` for it, as JSON or `.npy`.
    """
    media_type = chosen_media_type(request, (PNG, JSON, NPY))
    names, result = await infer(
        request,
        query,
        stages=True,
        check=partial(check_classes, class_id=query.class_id),
        check_count=partial(_check_count, media_type),
    )
    count = LARGE + 1 if media_type == PNG else numbers(result, [4])  # compressing takes milliseconds
    body = partial(_explanations, request, media_type, names, result, query)
    return Response(await encoded(request, result, body, count), media_type=media_type)


def _check_count(media_type: str, count: int) -> None:
    if media_type == PNG and count > 1:
        raise InvalidRequest(f"{PNG} shows one image and the request has {count}; send one, or accept {JSON} or {NPY}")


def _explanations(
    request: Request, media_type: str, names: Names, result: InferenceResult, query: ExplainQuery
) -> bytes:
    """A PNG, a `.npy` or, as JSON, an ExplainResponse."""
    explanations = postprocess.explain(result, query.class_id)
    if media_type == JSON:
        results = image_results(request, names, result)
        for entry, each in zip(results, explanations, strict=True):
            if not isinstance(each, ServiceError):
                entry |= {name: getattr(each, name) for name in ("class_id", "label", "score", "logit", "bias")}
                entry |= {"crop": dict(zip(Crop.model_fields, each.region, strict=True)), "map": each.map}
        return json_bytes({"model": result.model, "version": result.version, "size": result.size, "results": results})
    found = require_all(explanations, names, JSON_INSTEAD)
    if media_type == PNG:
        return postprocess.overlay(found[0], query.alpha, query.output_size)
    return b"".join(encode({"map": Stack.of(len(found), lambda i: found[i].map)}, NPY, {}))
