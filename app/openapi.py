"""What the OpenAPI document has beyond what the framework finds by itself: bodies, headers, problems, keys.

A route sets `openapi_extra={"requestBody": IMAGES}` or `json_body(...)` for a body that it reads by hand, and
`responses=documented(...)`; `describe` adds to every operation what all have in common.
"""

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app.bodies import BODY_EXAMPLES, FIELD, ImagesBody
from app.dependencies import API_KEY, MANAGEMENT_KEY
from app.problems import MEANING, MEDIA_TYPE, Problem, dialect, documented, examples
from app.settings import Settings

Json = dict[str, Any]

_DESCRIPTION = """\
Classes, embeddings and explanations of images. Send an image as a file in a form, as the raw body, or in JSON.

Every error is an RFC 9457 problem (`application/problem+json`); its `type` is stable, its `detail` says what was wrong
and what to do. Every response carries `X-Request-ID`: yours, where the request has one of up to 128 letters, digits and
`. : / + = @ _ -`. Unknown query parameters, form fields and JSON fields are refused by name.
"""
INFERENCE = "inference"
_TAGS = [
    {"name": INFERENCE, "description": "Images in, what a model computes of them out."},
    {"name": "open inference protocol", "description": "The same for clients of KServe and Triton."},
    {"name": "openai", "description": "Embeddings for clients of OpenAI."},
    {"name": "platforms", "description": "Classes for KServe's version 1, SageMaker and Vertex AI."},
    {"name": "models", "description": "The models that the service has."},
    {"name": "management", "description": "For those who run the service; off without `PVT_MANAGEMENT_KEYS`."},
    {"name": "operations", "description": "Health for orchestrators, metrics for Prometheus; never behind a key."},
]
# The problems of every endpoint that reads images: of the model, the body, the queue, the time.
IMAGE_PROBLEMS = (401, 403, 404, 413, 415, 422, 429, 502, 503, 504)

BINARY: Json = {"type": "string", "format": "binary"}
BINARY_CONTENT: Json = {"schema": BINARY}
_REF = "#/components/schemas/{model}"
_HEADERS: Json = {
    "X-Request-ID": {"description": "The request's id, as the log has it.", "schema": {"type": "string"}},
    "Server-Timing": {
        "description": "Milliseconds of each step, `load` if it waited for that; of several images the slowest's.",
        "schema": {"type": "string"},
        "example": "read;dur=0.13, wait;dur=0.05, decode;dur=0.68, queue;dur=0.09, infer;dur=1.79, total;dur=3.79",
    },
    "Cache-Status": {
        "description": "Whether images were found in the content cache (RFC 9211); only with PVT_CACHE_MB.",
        "schema": {"type": "string"},
        "example": "pvt-serve; hit",
    },
    "Retry-After": {
        "description": "Seconds after which a place, or the model, is likely to be available.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {"description": "The scheme of the key.", "schema": {"type": "string", "const": "Bearer"}},
}
_HEADER_OF = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}  # besides X-Request-ID


def operation_id(route: APIRoute) -> str:
    """The name of an operation that sets none itself: its function's, and what its path adds to that."""
    prefix = match[1] + "_" if (match := re.match("/(v[0-9]+)(/|$)", route.path)) else ""
    return f"{prefix}{route.name}{'_of_version' if '/versions/{' in route.path else ''}"


# What the application says of itself.
INFO: Json = {
    "title": "pvt-serve",
    "version": version("pvt-serve"),
    "summary": "Pyramid Vision Transformer v2 image models behind HTTP.",
    "description": _DESCRIPTION,
    "openapi_tags": _TAGS,
    "servers": [{"url": "/", "description": "The server that this document comes from."}],
    "license_info": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    "generate_unique_id_function": operation_id,
    "redoc_url": None,  # one page of documentation is enough, and that one loads a logo from elsewhere
}


def schema_of(model: type[BaseModel]) -> Json:
    """The schema of `model` by reference; `describe` moves its definitions to where the reference points."""
    schema = model.model_json_schema(ref_template=_REF)
    definitions = schema.pop("$defs", {})
    return {"$ref": _REF.format(model=model.__name__), "$defs": {**definitions, model.__name__: schema}}


def json_body(model: type[BaseModel], examples: Mapping[str, object]) -> Json:
    """A request body in JSON that the route reads by hand; `examples` are named."""
    named = {name.replace(" ", "-"): {"summary": name, "value": value} for name, value in examples.items()}
    return {"required": True, "content": {"application/json": {"schema": schema_of(model), "examples": named}}}


# The body that `app.bodies.read_uploads` reads, in all its forms.
IMAGES = json_body(ImagesBody, BODY_EXAMPLES)
_FORM: Json = {
    "type": "object",
    "required": [FIELD],
    "properties": {FIELD: {"type": "array", "minItems": 1, "items": BINARY}},
    "additionalProperties": False,
}
IMAGES["content"] = {
    "multipart/form-data": {"schema": _FORM, "encoding": {FIELD: {"contentType": "image/*, application/octet-stream"}}},
    **dict.fromkeys(("image/png", "image/jpeg", "application/octet-stream"), BINARY_CONTENT),
    **IMAGES["content"],
}


def describe(app: FastAPI, settings: Settings) -> None:
    """Complete the document of `app` when it is first requested."""
    generate = app.openapi
    keys = {API_KEY: settings.api_keys, MANAGEMENT_KEY: settings.management_keys}
    used = {name for name, values in keys.items() if values}

    def openapi() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(generate(), used)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to extend it


def _completed(document: Json, used_keys: set[str]) -> Json:
    components = document["components"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, dialect(path), used_keys)
    schema = schema_of(Problem)
    components["responses"] = {
        f"problem_{status}": {
            "description": meaning,
            "headers": _headers(str(status)),
            "content": {MEDIA_TYPE: {"schema": schema, "examples": examples(status)}},
        }
        for status, meaning in MEANING.items()
    }
    components["headers"] = _HEADERS
    for name in ("HTTPValidationError", "ValidationError"):  # the framework's own form of a 422 is never sent
        components["schemas"].pop(name, None)
    # Without any the documentation page would still offer to take a key, if the schemes were there and empty.
    if schemes := {name: each for name, each in components.pop("securitySchemes", {}).items() if name in used_keys}:
        components["securitySchemes"] = schemes
    _hoist(document, components["schemas"])
    return document


def _complete(operation: Json, form: type[BaseModel] | None, used_keys: set[str]) -> None:
    """Add what every operation has; `form` is that of its protocol's errors, None for problems."""
    for parameter in operation.get("parameters", ()):
        # The function may take None, for another path without this parameter.
        if parameter["in"] == "path" and (options := parameter["schema"].pop("anyOf", None)):
            parameter["schema"].update(*(each for each in options if each != {"type": "null"}))
    responses = operation["responses"]
    # 401 is a response where, and only where, a key is required.
    responses.pop("401", None)
    common = {"500"}
    if keys := [each for each in operation.pop("security", []) if {*each} <= used_keys]:
        operation["security"] = keys
        common.add("401")
    if form is None:
        common |= {"422"} & {*responses}
        responses.update({str(status): each for status, each in documented(*map(int, common)).items()})
    else:
        responses.pop("422", None)
        responses.update({status: _refusal(status, form) for status in common | ({"400"} - {*responses})})
    for response in responses.values():
        if "image/png" in (
            content := response.get("content", {})
        ):  # what the endpoint sends unless `Accept` says otherwise
            response["content"] = {"image/png": content.pop("image/png"), **content}
        if "text/event-stream" in content:  # not a string: each event's data is JSON
            content["text/event-stream"] = {"schema": {}}
    timed = INFERENCE in operation["tags"]
    for status, response in responses.items():
        if "$ref" in response:
            response.pop("description", None)  # the framework's
        else:
            more = ["Server-Timing", "Cache-Status"] if timed and status == "200" else []
            response.setdefault("headers", {}).update(_headers(status, *more))
    operation["responses"] = dict(sorted(responses.items()))


def _refusal(status: str, form: type[BaseModel]) -> Json:
    description = MEANING.get(int(status), "The request is wrong.")
    content = {"application/json": {"schema": schema_of(form)}}
    return {"description": f"{description} In the protocol's form.", "content": content}


def _headers(status: str, *more: str) -> Json:
    names = ["X-Request-ID", *([_HEADER_OF[status]] if status in _HEADER_OF else []), *more]
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _hoist(node: object, schemas: Json) -> None:
    """Move every `$defs` below `node` into `schemas`."""
    if isinstance(node, dict):
        for name, schema in node.pop("$defs", {}).items():
            schemas.setdefault(name, schema)
        node = [*node.values()]
    if isinstance(node, list):
        for each in node:
            _hoist(each, schemas)
