"""The content cache over HTTP: `Cache-Control` of a request, `Cache-Status` and `ETag` of its response, 304 and 412."""

from collections.abc import Mapping
from functools import partial
from hashlib import sha256

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from app.problems import AnswerUnchanged, expected
from service.content_cache import DIGEST_BYTES, CacheUse
from service.results import ImageResult, InferenceResult

NAME = "pvt-serve"  # of this cache, in Cache-Status
_OK = 200


def cache_use(request: Request) -> CacheUse | None:
    """How `request` uses the content cache; None where there is none.

    `Cache-Control: no-cache` computes anew and stores that, `no-store` does neither (RFC 9111, 5.2.1). Who has a key
    finds only what was stored with that key.
    """
    state = request.scope["state"]  # by its name it costs each request a microsecond more
    if not state["settings"].cache_mb:
        return None
    said = ",".join(request.headers.getlist("cache-control")).lower().split(",")
    directives = {each.partition("=")[0].strip() for each in said}
    store = "no-store" not in directives
    partition = state["client"] if state["role"] else ""
    return CacheUse(lookup=store and "no-cache" not in directives, store=store, partition=partition)


def cache_status(request: Request, result: InferenceResult) -> str:
    """The value of `Cache-Status` (RFC 9211) for `result`; empty where there is no cache."""
    if (use := cache_use(request)) is None:
        return ""
    if not use.lookup:
        return f"{NAME}; fwd=request"
    ways = [each.reuse if isinstance(each, ImageResult) else "" for each in result.results]
    if len({*ways}) == 1:
        return f"{NAME}; " + {"hit": "hit", "coalesced": "fwd=miss; collapsed", "": "fwd=miss"}[ways[0]]
    hits, coalesced = ways.count("hit"), ways.count("coalesced")
    return f'{NAME}; fwd=miss; detail="hits={hits}, coalesced={coalesced}, misses={ways.count("")}"'


def entity_tag(content: bytes) -> str:
    """A strong validator of `content`."""
    return f'"{sha256(content).hexdigest()[:32]}"'


def if_none_match(request: Request) -> set[str]:
    """The tags of the request's `If-None-Match`, which are compared weakly (RFC 9110, 13.1.2), or `*`."""
    said = ",".join(request.headers.getlist("if-none-match")).split(",")
    return {each.strip().removeprefix("W/") for each in said}


def validated(request: Request, content: bytes, media_type: str, headers: Mapping[str, str] | None = None) -> Response:
    """`content` in response to GET, with its tag; 304 where `If-None-Match` names that."""
    tag = entity_tag(content)
    headers = {**(headers or {}), "ETag": tag}
    if if_none_match(request) & {tag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


async def tagged(request: Request, response: Response) -> Response:
    """`response` to POST, with its tag where it is whole; 412 where `If-None-Match` names that.

    304 is for GET and HEAD alone, for all other methods it is 412 (RFC 9110, 13.1.2). `*` names nothing: the target of
    the request has no representation of its own.
    """
    if response.status_code != _OK or isinstance(response, StreamingResponse):
        return response
    body = bytes(response.body)
    make = partial(entity_tag, body)
    tag = make() if len(body) <= DIGEST_BYTES else await request.state.engine.encode(make)
    if tag in if_none_match(request):
        response = await expected(request, AnswerUnchanged("the answer is still the one that If-None-Match names"))
    response.headers["ETag"] = tag
    return response
