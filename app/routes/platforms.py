"""Classes of images for version 1 of KServe's protocol, which is TensorFlow Serving's, for SageMaker and Vertex AI."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.routing import BaseRoute

from app.bodies import EXAMPLE, Link, Upload, check_count, images_of, parse_json, read_json, read_uploads
from app.dependencies import EngineDep, require_key
from app.json_images import image_of
from app.openapi import IMAGE_PROBLEMS, IMAGES, json_body
from app.problems import PREDICT, Problem, documented, refusals
from app.routes.images import ClassPrediction, PredictQuery, PredictResponse, prediction_bytes, predictions
from app.routes.inference import JSON, chosen_media_type, encoded, infer_images
from app.routes.operations import get_readiness
from app.settings import Settings
from service.errors import InvalidRequest, reasons
from service.memory import BODIES, Reservation
from service.postprocess import check_classes
from service.results import InferenceResult

router = APIRouter(tags=["platforms"])

Parameters = Mapping[str, Any]
ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
_ROWS = '{"instances": [{"b64": "..."}, ...]}'


class BytesInstance(BaseModel):
    """An image, in base64."""

    b64: str


class InstancesRequest(BaseModel):
    """Images in rows. Other members, such as `signature_name`, are ignored."""

    instances: Annotated[
        list[BytesInstance | str | dict[str, BytesInstance | str]],
        Field(
            min_length=1,
            description='`{"b64": ...}`, that under any other name, such as `{"image_bytes": {"b64": ...}}`, or a '
            "string: base64, a `data:` URL, or an address where PVT_URL_HOSTS allows it.",
        ),
    ]
    parameters: Annotated[
        dict[str, str | float | None] | None,
        Field(description="Those of `/predict` in its query: `top_k`, `min_score`, `size`, `timeout_ms`, `model`."),
    ] = None


class Prediction(BaseModel):
    """One instance; width and height are its image's own, in pixels, and the others as in `/predict`."""

    width: int
    height: int
    predictions: list[ClassPrediction]
    unknown: bool | None = None


class InstanceError(BaseModel):
    """The problem of one instance among several."""

    error: Problem


class InstancesResponse(BaseModel):
    """One entry for each instance, in their order."""

    predictions: list[Prediction | InstanceError]


_EXAMPLES = {
    "base64": {"instances": [{"b64": EXAMPLE}]},
    "a named input": {"instances": [{"image_bytes": {"b64": EXAMPLE}}], "parameters": {"top_k": 2}},
}
_INSTANCES = json_body(InstancesRequest, _EXAMPLES)
_post = partial(
    router.post,
    summary="Classify images (KServe version 1)",
    response_model=InstancesResponse,
    responses=refusals(PREDICT, 400, 401, 403, 404, 413, 415, 429, 502, 503, 504),
    openapi_extra={"requestBody": _INSTANCES},
)


# Every form of `/predict`, and instances.
_BODIES = {**IMAGES, "content": {**IMAGES["content"], **_INSTANCES["content"]}}


@_post(f"/v1/models/{{name}}{PREDICT}")
@_post(f"/v1/models/{{name}}/versions/{{version}}{PREDICT}")
async def predict(
    request: Request,
    engine: EngineDep,
    name: Annotated[str, Path(description="`<variant>.<tag>`, or a variant alone.")],
    version: str | None = None,
) -> Response:
    """The best classes of each instance.

    One that is no image becomes an `error` in its place and the others have results; the error of a single one is the
    response.
    """
    with engine.request(), engine.memory.reserve(0, BODIES) as held:
        most = request.state.settings.max_images
        images, parameters = await read_json(request, held, lambda body: _instances(parse_json(body), most))
        query = _query(parameters, {"model": f"{name}@{version}" if version else name})
        _, result = await _classified(request, query, images, held)
    body = await encoded(request, result, partial(_rows, request, result, query))
    return Response(body, media_type=JSON)


@router.post(
    "/invocations",
    summary="Classify images (SageMaker, Vertex AI)",
    response_model=PredictResponse | InstancesResponse,
    responses=documented(406, *IMAGE_PROBLEMS),
    openapi_extra={"requestBody": _BODIES},
)
async def invocations(request: Request, engine: EngineDep, query: Annotated[PredictQuery, Query()]) -> Response:
    """As `/predict`, for the same bodies; or for `{"instances": [...]}` as KServe's version 1.

    Parameters are in the query, in `X-Amzn-SageMaker-Custom-Attributes` (`top_k=2,model=...`) and beside the instances;
    the last one counts.
    """
    chosen_media_type(request, (JSON,))
    beside: list[Parameters] = []  # the instances, if the body has some

    def parse(body: bytes, max_images: int) -> list[Upload | Link]:
        value = parse_json(body)
        if not isinstance(value, dict) or "instances" not in value:
            return images_of(value, max_images)
        images, parameters = _instances(value, max_images)
        beside.append(parameters)
        return images

    with engine.request(), engine.memory.reserve(0, BODIES) as held:
        images = await read_uploads(request, held, parse)
        query = _query(query.model_dump(exclude_unset=True), _attributes(request), *beside)
        names, result = await _classified(request, query, images, held)
    make = (
        partial(_rows, request, result, query) if beside else partial(prediction_bytes, request, names, result, query)
    )
    return Response(await encoded(request, result, make), media_type=JSON)


def own_routes(settings: Settings) -> list[BaseRoute]:
    """Those at the paths that the settings name, which win over others: what is read there is read as before."""
    own = APIRouter(include_in_schema=False)
    if path := settings.predict_route:
        own.post(path, dependencies=[Depends(require_key)])(invocations)
    if path := settings.health_route:
        own.get(path)(get_readiness)
    return own.routes


async def _classified(
    request: Request, query: PredictQuery, images: list[Upload | Link], held: Reservation
) -> tuple[list[str | None], InferenceResult]:
    check = partial(check_classes, min_score=query.min_score)
    return await infer_images(request, query, images, held, check=check)


def _instances(value: object, max_images: int) -> tuple[list[Upload | Link], Parameters]:
    """The images of an InstancesRequest, and its parameters; by hand, up to the first mistake."""
    match value:
        case {"instances": list(instances), **others}:
            check_count(len(instances), max_images)
        case {"inputs": _}:
            raise InvalidRequest(f"inputs: the columns of TensorFlow Serving are not read; send rows: {_ROWS}")
        case _:
            raise InvalidRequest(f"the body must be an object with a list of instances: {_ROWS}")
    parameters = others.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise InvalidRequest('parameters: must be an object, such as {"top_k": 2}')
    return [image_of(each, f"instances.{i}") for i, each in enumerate(instances)], parameters


def _query(*parameters: Parameters) -> PredictQuery:
    """Of several with one name the last; numbers may be strings, as they are in a query."""
    given = {name: each for group in parameters for name, each in group.items() if each is not None}
    texts = {name: each if isinstance(each, str) else orjson.dumps(each).decode() for name, each in given.items()}
    try:
        return PredictQuery.model_validate(texts)
    except ValidationError as error:
        raise InvalidRequest(f"parameters: {reasons(error)}") from error


def _attributes(request: Request) -> Parameters:
    """The parameters in SageMaker's header; what else its sender put there is for others."""
    pairs = [each.partition("=") for each in request.headers.get(ATTRIBUTES, "").replace(";", ",").split(",")]
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip() in PredictQuery.model_fields}


def _rows(request: Request, result: InferenceResult, query: PredictQuery) -> bytes:
    """An InstancesResponse."""
    entries = predictions(request, [None] * len(result.results), result, query)
    return orjson.dumps({"predictions": [{k: v for k, v in each.items() if k != "filename"} for each in entries]})
