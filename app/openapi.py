"""What the OpenAPI document says beyond what the framework finds out by itself: bodies, headers, problems, keys.

A route gives `openapi_extra={"requestBody": PICTURES}` or `json_body(...)` for a body that it reads by hand,
`responses={200: binary(...), **documented(404, *PICTURE_PROBLEMS)}` for what it answers, and an `operation_id`;
`describe` adds to every operation what all have in common.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app.bodies import BODY_EXAMPLES, FIELD, ImagesBody
from app.dependencies import API_KEY, MANAGEMENT_KEY
from app.dialects import DIALECTS
from app.problems import MEANING, MEDIA_TYPE, Problem, examples
from app.settings import Settings

Json = dict[str, Any]

SUMMARY = "Pyramid Vision Transformer v2 image models behind HTTP."
DESCRIPTION = """\
Classes, embeddings and explanations of pictures. Send a picture as a file in a form, as the raw body, or in JSON.

Every error is an RFC 9457 problem (`application/problem+json`); its `type` is stable, its `detail` says what was wrong
and what to do. Every response carries `X-Request-ID`: yours, where the request has one of up to 128 letters, digits and
`. : / + = @ _ -`. Unknown query parameters, form fields and JSON fields are refused by name.
"""
SERVERS = [{"url": "/", "description": "The server that this document comes from."}]
INFERENCE = "inference"
TAGS = [
    {"name": INFERENCE, "description": "Pictures in, what a model makes of them out."},
    {"name": "open inference protocol", "description": "The same for clients of KServe and Triton."},
    {"name": "openai", "description": "Embeddings for clients of OpenAI."},
    {"name": "models", "description": "What the service can answer with."},
    {"name": "management", "description": "For those who run the service; off without `PVT_MANAGEMENT_KEYS`."},
    {"name": "operations", "description": "Health for orchestrators, metrics for Prometheus; never behind a key."},
]
# What an endpoint that reads pictures may answer beside its own: the model, the body, the queue, the time.
PICTURE_PROBLEMS = (401, 404, 413, 415, 422, 429, 502, 503, 504)

BINARY: Json = {"type": "string", "format": "binary"}
_REF = "#/components/schemas/{model}"
_HEADERS: Json = {
    "X-Request-ID": {"description": "The request's id, as the log has it.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds of each step; of several pictures the slowest one's.",
        "schema": {"type": "string"},
        "example": "decode;dur=0.68, queue;dur=0.09, infer;dur=1.79, total;dur=3.79",
    },
    "Retry-After": {
        "description": "Seconds after which there is likely to be a place, or the model.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"description": "The scheme of the key.", "schema": {"type": "string", "const": "Bearer"}},
}
_OF_STATUS = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}


def operation_id(route: APIRoute) -> str:
    """The name of an operation that gives none itself: its function's, and what its path adds to that."""
    prefix = match[1] + "_" if (match := re.match("/(v[0-9]+)(/|$)", route.path)) else ""
    return f"{prefix}{route.name}{'_of_version' if '/versions/{' in route.path else ''}"


def schema_of(model: type[BaseModel]) -> Json:
    """The schema of `model` by reference; `describe` puts the definitions it brings where the reference points."""
    schema = model.model_json_schema(ref_template=_REF)
    definitions = schema.pop("$defs", {})
    return {"$ref": _REF.format(model=model.__name__), "$defs": {**definitions, model.__name__: schema}}


def json_body(model: type[BaseModel], examples: Mapping[str, object]) -> Json:
    """A request body in JSON that the route reads by hand; `examples` are named."""
    return {"required": True, "content": {"application/json": _json_content(model, examples)}}


def binary(description: str, *media_types: str) -> Json:
    """A response, or further media types of one, whose body is bytes in one of `media_types`."""
    return {"description": description, "content": {each: {"schema": BINARY} for each in media_types}}


def _json_content(model: type[BaseModel], examples: Mapping[str, object]) -> Json:
    return {
        "schema": schema_of(model),
        "examples": {name.replace(" ", "-"): {"summary": name, "value": value} for name, value in examples.items()},
    }


# The body that `app.bodies.read_uploads` reads, in all its forms.
PICTURES: Json = {
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
    """Make the document of `app` complete when it is first asked for."""
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
    responses = components.setdefault("responses", {})
    for path, operation in _operations(document):
        _require(operation)
        _secure(operation, unused_keys)
        answers = operation["responses"]
        answers["500"] = {}
        if dialect := DIALECTS.get("/" + path[1:].partition("/")[0]):
            _translate(answers, dialect.model)
        for status, answer in answers.items():
            if _is_problem(status, answer):
                name = f"problem_{status}"
                responses.setdefault(name, _problem_response(int(status)))
                answers[status] = {"$ref": f"#/components/responses/{name}"}
            else:
                answer.setdefault("headers", {}).update(_headers(status, operation))
        operation["responses"] = dict(sorted(answers.items()))
    for name in ("HTTPValidationError", "ValidationError"):  # the framework's own form of a 422, which is never sent
        schemas.pop(name, None)
    schemes = components.get("securitySchemes", {})
    components["securitySchemes"] = {name: each for name, each in schemes.items() if name not in unused_keys}
    components["headers"] = _HEADERS
    _hoist(document, schemas)
    return document


def _operations(document: Json) -> Iterator[tuple[str, Json]]:
    for path, item in document["paths"].items():
        yield from ((path, each) for each in item.values() if isinstance(each, dict) and "responses" in each)


def _translate(answers: Json, form: type[BaseModel]) -> None:
    """Give the errors that every operation has the form of its protocol, which has no 422."""
    answers.pop("422", None)
    for status in {"400", "500", *answers} & {"400", "401", "500"}:
        if not answers.get(status):
            description = MEANING.get(int(status), "The request is wrong.")
            content = {"application/json": {"schema": schema_of(form)}}
            answers[status] = {"description": f"{description} In the protocol's form.", "content": content}


def _require(operation: Json) -> None:
    """Leave no null to a parameter in the path: its function may take None, for another path that is without it."""
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and (options := parameter["schema"].pop("anyOf", None)):
            parameter["schema"].update(*(each for each in options if each != {"type": "null"}))


def _secure(operation: Json, unused: set[str]) -> None:
    """Ask for a key only where one is set; 401 is an answer where, and only where, one is asked for."""
    needed = [each for each in operation.pop("security", []) if not {*each} & unused]
    operation["responses"].pop("401", None)
    if needed:
        operation["security"] = needed
        operation["responses"]["401"] = {}


def _is_problem(status: str, answer: Json) -> bool:
    """Whether `answer` is the common one of its status: from `documented`, from nobody, or the framework's own."""
    if int(status) not in MEANING:
        return False
    own = answer.get("description") not in (None, MEANING[int(status)], "Validation Error")
    return not own and (MEDIA_TYPE in answer.get("content", {}) or status in {"401", "422", "500"})


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
