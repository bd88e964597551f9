"""What the OpenAPI document has beyond what the framework finds by itself: bodies, headers, problems, keys.

A route sets `openapi_extra={"requestBody": IMAGES}` or `json_body(...)` for a body that it reads by hand,
`responses={200: ..., **documented(404, *IMAGE_PROBLEMS)}` for its responses, and an `operation_id`; `describe` adds to
every operation what all have in common.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app.bodies import BODY_EXAMPLES, FIELD, ImagesBody
from app.dependencies import API_KEY, MANAGEMENT_KEY
from app.problems import MEANING, MEDIA_TYPE, Problem, dialect, examples
from app.settings import Settings

Json = dict[str, Any]

SUMMARY = "Pyramid Vision Transformer v2 image models behind HTTP."
DESCRIPTION = """\
Classes, embeddings and explanations of images. Send an image as a file in a form, as the raw body, or in JSON.

Every error is an RFC 9457 problem (`application/problem+json`); its `type` is stable, its `detail` says what was wrong
and what to do. Every response carries `X-Request-ID`: yours, where the request has one of up to 128 letters, digits and
`. : / + = @ _ -`. Unknown query parameters, form fields and JSON fields are refused by name.
"""
SERVERS = [{"url": "/", "description": "The server that this document comes from."}]
INFERENCE = "inference"
TAGS = [
    {"name": INFERENCE, "description": "Images in, what a model computes of them out."},
    {"name": "open inference protocol", "description": "The same for clients of KServe and Triton."},
    {"name": "openai", "description": "Embeddings for clients of OpenAI."},
    {"name": "models", "description": "The models that the service has."},
    {"name": "management", "description": "For those who run the service; off without `PVT_MANAGEMENT_KEYS`."},
    {"name": "operations", "description": "Health for orchestrators, metrics for Prometheus; never behind a key."},
]
# The problems of every endpoint that reads images: of the model, the body, the queue, the time.
IMAGE_PROBLEMS = (401, 404, 413, 415, 422, 429, 502, 503, 504)

BINARY: Json = {"type": "string", "format": "binary"}
BINARY_CONTENT: Json = {"schema": BINARY}
_REF = "#/components/schemas/{model}"
_HEADERS: Json = {
    "X-Request-ID": {"description": "The request's id, as the log has it.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds of each step; of several images the slowest one's.",
        "schema": {"type": "string"},
        "example": "decode;dur=0.68, queue;dur=0.09, infer;dur=1.79, total;dur=3.79",
    },
    "Retry-After": {
        "description": "Seconds after which a place, or the model, is likely to be available.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"description": "The scheme of the key.", "schema": {"type": "string", "const": "Bearer"}},
}
_OF_STATUS = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}


def operation_id(route: APIRoute) -> str:
    """The name of an operation that sets none itself: its function's, and what its path adds to that."""
    prefix = match[1] + "_" if (match := re.match("/(v[0-9]+)(/|$)", route.path)) else ""
    return f"{prefix}{route.name}{'_of_version' if '/versions/{' in route.path else ''}"


def schema_of(model: type[BaseModel]) -> Json:
    """The schema of `model` by reference; `describe` moves its definitions to where the reference points."""
    schema = model.model_json_schema(ref_template=_REF)
    definitions = schema.pop("$defs", {})
    return {"$ref": _REF.format(model=model.__name__), "$defs": {**definitions, model.__name__: schema}}


def json_body(model: type[BaseModel], examples: Mapping[str, object]) -> Json:
    """A request body in JSON that the route reads by hand; `examples` are named."""
    return {"required": True, "content": {"application/json": _json_content(model, examples)}}


def _json_content(model: type[BaseModel], examples: Mapping[str, object]) -> Json:
    return {
        "schema": schema_of(model),
        "examples": {name.replace(" ", "-"): {"summary": name, "value": value} for name, value in examples.items()},
    }


# The body that `app.bodies.read_uploads` reads, in all its forms.
IMAGES: Json = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": [FIELD],
                "properties": {FIELD: {"type": "array", "minItems": 1, "items": BINARY}},
                "additionalProperties": False,
            },
            "encoding": {FIELD: {"contentType": "image/*, application/octet-stream"}},
        },
        "image/png": {"schema": BINARY},
        "image/jpeg": {"schema": BINARY},
        "application/octet-stream": {"schema": BINARY},
        "application/json": _json_content(ImagesBody, BODY_EXAMPLES),
    },
}


def describe(app: FastAPI, settings: Settings) -> None:
    """Complete the document of `app` when it is first requested."""
    generate = app.openapi
    unused = {API_KEY} if not settings.api_keys else set()
    unused |= {MANAGEMENT_KEY} if not settings.management_keys else set()

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(generate(), unused)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to extend it


def _completed(document: Json, unused_keys: set[str]) -> Json:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    shared = components.setdefault("responses", {})
    for path, operation in _operations(document):
        _require(operation)
        _secure(operation, unused_keys)
        responses_of = operation["responses"]
        responses_of["500"] = {}
        if form := dialect(path):
            _translate(responses_of, form)
        for status, response in responses_of.items():
            if _is_problem(status, response):
                name = f"problem_{status}"
                shared.setdefault(name, _problem_response(int(status)))
                responses_of[status] = {"$ref": f"#/components/responses/{name}"}
            else:
                response.setdefault("headers", {}).update(_headers(status, operation))
        operation["responses"] = dict(sorted(responses_of.items()))
    for name in ("HTTPValidationError", "ValidationError"):  # the framework's own form of a 422 is never sent
        schemas.pop(name, None)
    # Without any the documentation page would still offer to take a key, if the schemes were there and empty.
    if schemes := {n: each for n, each in components.pop("securitySchemes", {}).items() if n not in unused_keys}:
        components["securitySchemes"] = schemes
    components["headers"] = _HEADERS
    _hoist(document, schemas)
    return document


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in document["paths"].items():
        yield from ((path, each) for each in item.values() if isinstance(each, dict) and "responses" in each)


def _translate(responses: Json, form: type[BaseModel]) -> None:
    """Give the errors that every operation has the form of its protocol, which has no 422."""
    responses.pop("422", None)
    for status in {"400", "500", *responses} & {"400", "401", "500"}:
        if not responses.get(status):
            description = MEANING.get(int(status), "The request is wrong.")
            content = {"application/json": {"schema": schema_of(form)}}
            responses[status] = {"description": f"{description} In the protocol's form.", "content": content}


def _require(operation: Json) -> None:
    """Take null away from a parameter in the path: its function may take None, for another path without it."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and (options := parameter["schema"].pop("anyOf", None)):
            parameter["schema"].update(*(each for each in options if each != {"type": "null"}))


def _secure(operation: Json, unused: set[str]) -> None:
    """Require a key only where one is set; 401 is a response where, and only where, one is required."""
    needed = [each for each in operation.pop("security", []) if not {*each} & unused]
    operation["responses"].pop("401", None)
    if needed:
        operation["security"] = needed
        operation["responses"]["401"] = {}


def _is_problem(status: str, response: Json) -> bool:
    """Whether `response` is the common one of its status: from `documented`, from no route, or the framework's own."""
    if int(status) not in MEANING:
        return False
    own = response.get("description") not in (None, MEANING[int(status)], "Validation Error")
    return not own and (MEDIA_TYPE in response.get("content", {}) or status in {"401", "422", "500"})


def _problem_response(status: int) -> Json:
    content = {"schema": schema_of(Problem), "examples": examples(status)}
    return {"description": MEANING[status], "headers": _headers(str(status)), "content": {MEDIA_TYPE: content}}


def _headers(status: str, operation: Json | None = None) -> Json:
    names = ["X-Request-ID"]
    if status in _OF_STATUS:
        names.append(_OF_STATUS[status])
    if status == "200" and operation and INFERENCE in operation.get("tags", []):
        names.append("Server-Timing")
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _hoist(node: object, schemas: Json) -> None:
    """Move every `$defs` below `node` into `schemas`."""
    if isinstance(node, dict):
        for name, schema in node.pop("$defs", {}).items():
            schemas.setdefault(name, schema)
        for each in [*node.values()]:
            _hoist(each, schemas)
    elif isinstance(node, list):
        for each in node:
            _hoist(each, schemas)
