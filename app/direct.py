"""The short way to the endpoints whose speed matters.

The framework's own way to a coroutine, through its middlewares, its matching, its exit stacks and its dependencies,
costs a third of all that a request costs here beside decoding and inference (docs/architecture.md). So requests for
these endpoints are taken off before it. The framework knows them all the same: for schema and pages, and for every
other method.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from app import problems
from app.dependencies import bearer, require_key


class Endpoint(NamedTuple):
    """What answers `POST path`: `query` checks its parameters, `respond` gets them checked."""

    path: str
    query: type[BaseModel]
    respond: Callable[[Request, BaseModel], Awaitable[Response]]


class Direct:
    """Answers POST requests for exactly the path of one of `endpoints`; passes everything else on."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, Endpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = endpoint
        request = Request(scope, receive, send)
        try:
            response = await _respond(request, endpoint)
        except problems.FORESEEN as error:
            response = await problems.respond(request, error)
        await response(scope, receive, send)


async def _respond(request: Request, endpoint: Endpoint) -> Response:
    if (settings := request.state.settings).api_keys:
        await require_key(await bearer(request), settings)
    return await endpoint.respond(request, _query(request, endpoint.query))


def _query(request: Request, model: type[BaseModel]) -> BaseModel:
    if not request.scope["query_string"]:
        return model()
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as error:
        # As the framework words it.
        raise RequestValidationError([{**each, "loc": ("query", *each["loc"])} for each in error.errors()]) from error
