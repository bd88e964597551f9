"""Each call of the service: its options, its request as data, and its result, typed. Nothing here talks to the network.

Each function here is a method of `Client` and `AsyncClient`, which send the call that it returns.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, overload
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray

from pvt_client.errors import ImageTooLarge, InvalidImage, Problem, PvtError, problem
from pvt_client.images import AnyImage, Image, Images, Upload, upload

T_co = TypeVar("T_co", covariant=True)
Floats = NDArray[np.floating[Any]]

JSON, _BINARY = "application/json", "application/octet-stream"
_LONGEST_MS = 3_600_000  # the most that the service takes
_CONNECT_SECONDS = 5.0  # then another attempt, if there is time
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


class MapOptions(CommonOptions, total=False):
    """Options of `explain_map`."""

    class_id: int | None
    """The class to explain; the best one if left out."""


class ExplainOptions(MapOptions, total=False):
    """Options of `explain`."""

    alpha: float | None
    """How opaque the map lies on the image, 0 to 1."""


class ClassScore(NamedTuple):
    """One class and its score, of the kind that `Prediction.activation` names."""

    class_id: int
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best classes of one image, best first; `width` and `height` are those of the image you sent, in pixels.

    `classes` is empty where none reaches its threshold. `activation` says what scores are: shares of a `softmax` over
    all classes, of a `sigmoid` for each class by itself, or with `none` logits. `unknown` says whether the best score
    is too low for any class; None where the model has no bound for that.
    """

    filename: str | None
    width: int
    height: int
    classes: tuple[ClassScore, ...]
    model: str
    version: str
    activation: str = "softmax"
    unknown: bool | None = None

    @property
    def best(self) -> ClassScore:
        """The first of `classes`; raises LookupError where there is none."""
        if not self.classes:
            raise LookupError("no class reached its threshold, so there is no best one: look at classes first")
        return self.classes[0]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Arrays of one image, or of several stacked on a first axis, in the order of the images.

    `embedding` is (D,) or (n, D). `stages` has the requested stages by number, with pool `none` (C, H, W) or
    (n, C, H, W), with `avg` (C,) or (n, C).
    """

    embedding: Floats
    stages: Mapping[int, Floats]
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The embedding of one image, `vector` (D,); `width` and `height` are those of the image you sent, in pixels."""

    width: int
    height: int
    vector: Floats
    model: str
    version: str


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """The exact class activation map of one class: `map.mean() + bias` is `logit`."""

    filename: str | None
    width: int
    height: int
    class_id: int
    label: str
    score: float
    logit: float
    bias: float
    map: Floats
    """(H, W), one value for each cell of the last stage."""
    model: str
    version: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its state; `details` is everything that the service reports of it."""

    id: str
    variant: str
    version: str
    state: str
    """`available`, `remote`, `loading`, `ready` or `failed`."""
    default: bool
    details: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Health:
    """`reasons` says what keeps the service from being live or ready; empty when it is both."""

    live: bool
    ready: bool
    reasons: tuple[str, ...]


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
    recover: Callable[[Problem], T_co | None] = lambda _: None
    """Turns a problem into a result, or into None where it is an error."""

    def request(self, seconds: float | None) -> dict[str, Any]:
        """The arguments of `httpx.Client.build_request`, with `seconds` left; one image is the body, several a form."""
        uploads = self.uploads
        parameters = {name: _text(value) for name, value in self.options.items() if value is not None}
        if seconds is not None and uploads is not None:
            parameters["timeout_ms"] = str(min(max(1, int(seconds * 1000)), _LONGEST_MS))
        connect = _CONNECT_SECONDS if seconds is None else min(_CONNECT_SECONDS, seconds)
        request: dict[str, Any] = {"method": "GET" if uploads is None else "POST", "url": self.path}
        request |= {"params": parameters, "timeout": httpx.Timeout(seconds, connect=connect)}
        if uploads is None or len(uploads) != 1:
            files = [("image", (each.filename or str(i), each.data, _BINARY)) for i, each in enumerate(uploads or ())]
            return {**request, "headers": {"Accept": self.accept}, "files": files or None}
        return {**request, "headers": {"Accept": self.accept, "Content-Type": _BINARY}, "content": uploads[0].data}


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@overload
def predict(image: Images[AnyImage], **options: Unpack[PredictOptions]) -> Call[list[Prediction | PvtError]]: ...


@overload
def predict(image: Image, **options: Unpack[PredictOptions]) -> Call[Prediction]: ...


def predict(
    image: Image | Images[AnyImage], **options: Unpack[PredictOptions]
) -> Call[Prediction] | Call[list[Prediction | PvtError]]:
    """The best classes of an image; of each image of a list in one request, where a bad one becomes its error."""
    uploads = _uploads(image)

    def read_all(body: Mapping[str, Any]) -> list[Prediction | PvtError]:
        pairs = zip(_results(body), uploads, strict=True)
        activation = body.get("activation", "softmax")  # which older services do not say
        return [_prediction(result, sent.filename, activation) for result, sent in pairs]

    def read_one(body: Mapping[str, Any]) -> Prediction:
        (result,) = read_all(body)
        if isinstance(result, PvtError):
            raise result
        return result

    def recover(error: Problem) -> list[Prediction | PvtError] | None:
        """In a list of one image the error takes its place, as it does among several."""
        of_the_image = isinstance(error, InvalidImage | ImageTooLarge) and not error.type.endswith(":body-too-large")
        return [error] if of_the_image else None

    if isinstance(image, list | tuple):
        return Call("/predict", read_all, uploads, options, recover=recover)
    return Call("/predict", read_one, uploads, options)


def features(image: Image | Images[AnyImage], **options: Unpack[FeaturesOptions]) -> Call[Features]:
    """The embedding and the requested stages; those of a list are stacked, and one bad image fails them all."""
    several = isinstance(image, list | tuple)
    stages = options.pop("stages", ())

    def read(body: bytes) -> Features:
        arrays, metadata = _tensors(body)
        arrays = arrays if several else {name: array[0] for name, array in arrays.items()}
        maps = {number: arrays[f"stage{number}"] for number in stages}
        return Features(arrays["embedding"], maps, metadata["model"], metadata["version"])

    parameters = {**options, "stages": ",".join(map(str, stages)) or None}
    return Call("/features", read, _uploads(image), parameters, accept="application/vnd.safetensors")


def embedding(image: Image, **options: Unpack[FeaturesOptions]) -> Call[Embedding]:
    """The embedding of an image, with the size of the image."""

    def read(body: Mapping[str, Any]) -> Embedding:
        (result,) = _results(body)
        vector = np.array(result["embedding"], np.float32)
        return Embedding(result["width"], result["height"], vector, result["model"], result["version"])

    return Call("/features", read, _uploads(image), options)


def explain(image: Image, **options: Unpack[ExplainOptions]) -> Call[bytes]:
    """The exact class activation map laid over the image, as a PNG."""
    return Call("/explain", bytes, _uploads(image), options, accept="image/png")


def explain_map(image: Image, **options: Unpack[MapOptions]) -> Call[Explanation]:
    """The exact class activation map in numbers."""
    uploads = _uploads(image)

    def read(body: Mapping[str, Any]) -> Explanation:
        (result,) = _results(body)
        return Explanation(**result | {"filename": uploads[0].filename, "map": np.array(result["map"], np.float32)})

    return Call("/explain", read, uploads, options)


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


def _uploads(image: Image | Images[AnyImage]) -> list[Upload]:
    return [upload(each) for each in image] if isinstance(image, list | tuple) else [upload(image)]


def _results(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `results`, each with the model and version that are said once for all."""
    return [{**each, "model": body["model"], "version": body["version"]} for each in body["results"]]


def _prediction(result: Mapping[str, Any], filename: str | None, activation: str) -> Prediction | PvtError:
    """One of `results`; `filename` is used where the service was sent none."""
    if "error" in result:
        return problem(result["error"])
    classes = tuple(ClassScore(each["class_id"], each["label"], each["score"]) for each in result["predictions"])
    size = result["width"], result["height"]
    name, model = result["filename"] or filename, (result["model"], result["version"])
    return Prediction(name, *size, classes, *model, activation=activation, unknown=result.get("unknown"))


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
