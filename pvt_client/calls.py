"""Each call of the service: its options, its request as data, and its result, typed. Nothing here talks to the network.

Each function here is a method of `Client` and `AsyncClient`, which send the call that it returns.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
import numpy as np

from pvt_client.errors import PvtError, problem
from pvt_client.images import Image, Upload, upload
from pvt_client.results import ClassScore, Embedding, Explanation, Features, Floats, Health, Model, Prediction

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

JSON, _BINARY = "application/json", "application/octet-stream"
_LONGEST_MS = 3_600_000  # the most that the service takes
_CONNECT_SECONDS = 5.0  # then another attempt, if there is time
_EXPLANATION = frozenset(each.name for each in fields(Explanation))
_LENGTH = 8  # bytes of the length of a safetensors header
_TYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


class CommonOptions(TypedDict, total=False):
    """Options of every call that sends images; the service decides on those left out."""

    model: str | None
    """`<variant>.<tag>`, a variant alone, or an alias; the service's default model if left out."""
    size: int | tuple[int, int] | str | None
    """Side of the square model input in pixels, or its height and width (also as `"256x384"`); multiples of 32. The
    model's own if left out."""


class PredictOptions(CommonOptions, total=False):
    """Options of `predict`."""

    top_k: int | None
    """How many classes to return at the most, best first; 5 if left out, of a multi-label model all of its answer."""
    min_score: float | None
    """Return only classes with at least this score, in place of the model's own thresholds."""


class FeaturesOptions(CommonOptions, total=False):
    """Options of `features`."""

    stages: Sequence[int]
    """The stages of the pyramid to return, 1 to 4; none if left out."""
    pool: Literal["avg", "none"]
    """Whether stages are returned as means over their maps."""
    normalize: bool
    """Whether vectors are scaled to length 1."""
    dtype: Literal["float32", "float16"]
    """The type of the arrays."""


class EmbedOptions(CommonOptions, total=False):
    """Options of `embed`."""

    normalize: bool
    """Whether vectors are scaled to length 1."""


class MapOptions(CommonOptions, total=False):
    """Options of `explain_map`."""

    class_id: int | None
    """The class to explain; the best one if left out."""


class ExplainOptions(MapOptions, total=False):
    """Options of `explain`."""

    alpha: float | None
    """How opaque the map lies on the image, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Call(Generic[T_co]):
    """A request without its server, and how its response is read."""

    path: str
    read: Callable[[Any], T_co]
    """The result from the body, parsed if it is JSON; raises LookupError, TypeError or ValueError if it is no such."""
    uploads: Sequence[Upload] | None = None
    """The images to POST; None for a GET."""
    options: Mapping[str, object] = field(default_factory=dict)
    accept: str = JSON
    accepted: int | None = None
    """A status that `read` takes, beside those below 400."""

    def request(self, seconds: float | None) -> dict[str, Any]:
        """The arguments of `httpx.Client.build_request`, with `seconds` left; one image is the body, several a form."""
        uploads = self.uploads
        parameters = {name: _text(value) for name, value in self.options.items() if value is not None}
        if seconds is not None and uploads is not None:
            parameters["timeout_ms"] = str(min(max(1, int(seconds * 1000)), _LONGEST_MS))
        connect = _CONNECT_SECONDS if seconds is None else min(_CONNECT_SECONDS, seconds)
        request: dict[str, Any] = {"method": "GET" if uploads is None else "POST", "url": self.path}
        request |= {"params": parameters, "timeout": httpx.Timeout(seconds, connect=connect)}
        headers = {"Accept": self.accept}
        if uploads is None:
            return {**request, "headers": headers}
        if len(uploads) == 1:
            return {**request, "headers": {**headers, "Content-Type": _BINARY}, "content": uploads[0].data}
        files = [("image", (each.filename or str(i), each.data, _BINARY)) for i, each in enumerate(uploads)]
        form = httpx.Request("POST", self.path, files=files)
        # Joined: httpx would send a form in four pieces for each image.
        return {**request, "headers": {**headers, "Content-Type": form.headers["Content-Type"]}, "content": form.read()}


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def predict(image: Image, **options: Unpack[PredictOptions]) -> Call[Prediction]:
    """The best classes of an image."""
    return _only(predictions([upload(image)], **options))


def predictions(uploads: Sequence[Upload], **options: Unpack[PredictOptions]) -> Call[list[Prediction | PvtError]]:
    """The best classes of each of several images in one request, where a bad one becomes its error."""

    def read(body: Mapping[str, Any]) -> list[Prediction | PvtError]:
        return _each(body, uploads, lambda result: _prediction(body, result))

    return Call("/predict", read, uploads, options)


def features(image: Image, **options: Unpack[FeaturesOptions]) -> Call[Features]:
    """The embedding and the requested stages of an image."""
    return _only(features_of([upload(image)], **options))


def features_of(uploads: Sequence[Upload], **options: Unpack[FeaturesOptions]) -> Call[list[Features | PvtError]]:
    """The features of each of several images in one request, which a bad one fails."""
    stages = options.pop("stages", ())

    def read(body: bytes) -> list[Features | PvtError]:
        arrays, metadata = _tensors(body)
        named = metadata["model"], metadata["version"]
        per_image = zip(uploads, arrays["embedding"], *(arrays[f"stage{number}"] for number in stages), strict=True)
        return [Features(vector, dict(zip(stages, maps, strict=True)), *named) for _, vector, *maps in per_image]

    parameters = {**options, "stages": ",".join(map(str, stages)) or None}
    return Call("/features", read, uploads, parameters, accept="application/vnd.safetensors")


def embedding(image: Image, **options: Unpack[FeaturesOptions]) -> Call[Embedding]:
    """The embedding of an image, with the size of the image."""
    return _only(embeddings([upload(image)], **options))


def embeddings(uploads: Sequence[Upload], **options: Unpack[FeaturesOptions]) -> Call[list[Embedding | PvtError]]:
    """The embedding of each of several images in one request, where a bad one becomes its error."""
    return Call("/features", lambda body: _each(body, uploads, _embedding), uploads, options)


def explain(image: Image, **options: Unpack[ExplainOptions]) -> Call[bytes]:
    """The exact class activation map laid over the image, as a PNG."""
    return Call("/explain", bytes, [upload(image)], options, accept="image/png")


def explain_map(image: Image, **options: Unpack[MapOptions]) -> Call[Explanation]:
    """The exact class activation map in numbers."""
    uploads = [upload(image)]
    return _only(Call("/explain", lambda body: _each(body, uploads, _explanation), uploads, options))


def models() -> Call[list[Model]]:
    """Every model that the service has."""
    return Call("/models", lambda body: [_model(each) for each in body["models"]])


def model(name: str) -> Call[Model]:
    """One model."""
    return Call(f"/models/{quote(name, safe='@')}", _model)


def health() -> Call[Health]:
    """Whether the service is live and ready, and if not, why."""
    return Call("/health", lambda body: Health(body["live"], body["ready"], tuple(body["reasons"])), accepted=503)


def _model(fields: Mapping[str, Any]) -> Model:
    """A model as `GET /models` describes it."""
    return Model(**{name: fields[name] for name in ("id", "variant", "version", "state", "default")}, details=fields)


def _only(call: Call[list[T | PvtError]]) -> Call[T]:
    """`call`, of one image, with its result in place of the list."""

    def read(body: Any) -> T:  # noqa: ANN401  whatever the call reads
        (result,) = call.read(body)
        if isinstance(result, PvtError):
            raise result
        return result

    return Call(call.path, read, call.uploads, call.options, call.accept)


def _each(
    body: Mapping[str, Any], uploads: Sequence[Upload], read: Callable[[Mapping[str, Any]], T]
) -> list[T | PvtError]:
    """What `read` makes of each of `results`, which are completed by what is said once for all; or its error."""
    whole = {"model": body["model"], "version": body["version"]}
    pairs = zip(body["results"], uploads, strict=True)
    return [
        problem(each["error"]) if "error" in each else read({**each, **whole, "filename": sent.filename})
        for each, sent in pairs
    ]


def _prediction(body: Mapping[str, Any], result: Mapping[str, Any]) -> Prediction:
    activation = body.get("activation", "softmax")  # which older services do not say
    classes = tuple(ClassScore(each["class_id"], each["label"], each["score"]) for each in result["predictions"])
    size, model = (result["width"], result["height"]), (result["model"], result["version"])
    unknown = result.get("unknown")
    return Prediction(result["filename"], *size, classes, *model, activation=activation, unknown=unknown)


def _embedding(result: Mapping[str, Any]) -> Embedding:
    vector = np.array(result["embedding"], np.float32)
    return Embedding(result["width"], result["height"], vector, result["model"], result["version"])


def _explanation(result: Mapping[str, Any]) -> Explanation:
    known = {name: result[name] for name in _EXPLANATION if name in result}  # newer services may say more
    crop = tuple(result["crop"][side] for side in ("left", "top", "right", "bottom")) if "crop" in result else None
    return Explanation(**{**known, "map": np.array(result["map"], np.float32), "crop": crop})


def _tensors(body: bytes) -> tuple[dict[str, Floats], Mapping[str, str]]:
    """The arrays of a safetensors file by name, and its metadata.

    The file is the length of the header, the header as JSON, then the bytes of the arrays, little-endian. It is the one
    binary form of the service that names the model too.
    """
    start = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    header: dict[str, Any] = json.loads(body[_LENGTH:start])
    metadata: Mapping[str, str] = header.pop("__metadata__", {})
    return {name: _array(memoryview(body)[start:], **entry) for name, entry in header.items()}, metadata


def _array(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> Floats:
    begin, end = data_offsets
    array: Floats = np.frombuffer(data[begin:end], _TYPES[dtype]).reshape(shape)
    return array.copy()  # writable, and it does not keep the bytes of the other arrays in memory
