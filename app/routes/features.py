"""`POST /features`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel

from app.accept import choose
from app.bodies import Upload
from app.dependencies import EngineDep
from app.direct import Endpoint
from app.openapi import BINARY, INFERENCE, PICTURE_PROBLEMS, PICTURES
from app.pieces import InPieces
from app.preferences import patience_seconds
from app.problems import documented
from app.queries import FeaturesQuery
from app.routes.inference import LARGE, answered, encoded
from app.schemas import FeaturesResponse, image_error
from service.answers.encodings import NPY, NPZ, SAFETENSORS, check_holds, encode, json_bytes, json_pieces
from service.errors import ServiceError
from service.postprocess.features import FeatureOptions, features, numbers, stacked
from service.results import InferenceResult

router = APIRouter(tags=[INFERENCE])

JSON = "application/json"
FORMS = (JSON, NPZ, SAFETENSORS, NPY)
_FILE = {"schema": BINARY}


@router.post(
    "/features",
    operation_id="features",
    summary="Embeddings and feature maps of pictures",
    response_model=FeaturesResponse,
    responses={
        200: {"content": dict.fromkeys(FORMS[1:], _FILE)},
        **documented(406, *PICTURE_PROBLEMS),
    },
    openapi_extra={"requestBody": PICTURES},
)
async def extract(request: Request, query: Annotated[FeaturesQuery, Query()], engine: EngineDep) -> Response:
    """The embedding of each picture, and the feature maps of the stages that were asked for.

    As JSON, or with an `Accept` for it as `.npz`, `.safetensors` or, a single array, as `.npy`. There each array has a
    first axis for the picture, and a picture that fails fails the request; in JSON its `error` stands in its place.
    """
    form, wanted = choose(request, FORMS), query.wanted
    check_holds(form, wanted.names)
    infer = partial(
        engine.infer,
        model=query.model,
        size=query.input_size,
        stages=bool(wanted.stages),
        max_wait_seconds=await patience_seconds(request),
        timeout_seconds=query.timeout_seconds,
    )
    uploads, answer = await answered(request, infer, query.timeout_seconds)
    count = numbers(answer, wanted)
    make: Callable[[], Response]
    if form == JSON:
        make = partial(_json, uploads, answer, wanted, request.state.request_id, large=count > LARGE)
    else:
        make = partial(_binary, uploads, answer, wanted, form)
    return await encoded(request, answer.model, make, count)


async def _direct(request: Request, query: BaseModel) -> Response:
    assert isinstance(query, FeaturesQuery)  # noqa: S101  DIRECT says so
    return await extract(request, query, request.state.engine)


DIRECT = Endpoint("/features", FeaturesQuery, _direct)


def _json(
    uploads: Sequence[Upload], answer: InferenceResult, wanted: FeatureOptions, request_id: str, *, large: bool
) -> Response:
    """A FeaturesResponse."""
    results: list[dict[str, Any]] = []
    for upload, result in zip(uploads, answer.results, strict=True):
        if isinstance(result, ServiceError):
            results.append(image_error(upload.filename, result, request_id))
            continue
        arrays = features(result.outputs, wanted)
        body: dict[str, Any] = {"filename": upload.filename, "width": result.width, "height": result.height}
        if wanted.embedding:
            body["embedding"] = arrays["embedding"]
        if wanted.stages:
            maps = {str(i): arrays[f"stage{i}"] for i in wanted.stages}
            body["stages"] = {i: {"shape": each.shape, "data": each.ravel()} for i, each in maps.items()}
        results.append(body)
    content = {"model": answer.model, "version": answer.version, "size": answer.size, "results": results}
    return InPieces(json_pieces(content), JSON) if large else Response(json_bytes(content), media_type=JSON)


def _binary(uploads: Sequence[Upload], answer: InferenceResult, wanted: FeatureOptions, form: str) -> Response:
    arrays = stacked(answer, wanted, [upload.filename for upload in uploads])
    content = encode(arrays, form, {"model": answer.model, "version": answer.version})
    return Response(content, media_type=form)
