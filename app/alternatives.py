"""What to send in place of a request that no route takes: its methods, the nearest path, the line to type."""

from collections.abc import Iterator
from difflib import get_close_matches
from http import HTTPStatus

from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.types import Scope

from app.proxies import base_url
from service.names import meant

_SHOWN = 100  # characters of a path that are compared with others
_NEAR = 0.8  # how similar a path with parameters must be, apart from these


def methods(scope: Scope, path: str) -> set[str]:
    """Those that `path` has, by whichever routes; `*` means the whole service."""
    if path == "*":
        return {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"}
    bare = {"type": "http", "path": path, "root_path": "", "headers": []}
    found = {
        method
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        for route in scope["app"].routes
        # Files are mounted, and a mount takes every method.
        if (method == "GET" or not isinstance(route, Mount))
        and route.matches({**bare, "method": method})[0] == Match.FULL
    }
    return found | ({"HEAD"} if "GET" in found else set()) | {"OPTIONS"}


def alternative(scope: Scope, error: HTTPException) -> str:
    """Words to put behind `error`, the framework's refusal of the request; no redirect, whose host the client names."""
    path = scope["state"]["path"]
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allow = (error.headers or {}).get("Allow", "")
        is_inference = error.detail != HTTPStatus.METHOD_NOT_ALLOWED.phrase  # whose endpoints have words of their own
        return "" if is_inference else f"; it takes {allow}{_line(scope, path) if 'POST' in allow else ''}"
    if scope["method"] == "PUT":  # curl -T adds the file's name to a URL that ends with a slash
        folder = path.rpartition("/")[0]
        return _line(scope, folder if "POST" in methods(scope, folder) else "/predict")
    root = scope.get("app_root_path", scope.get("root_path", ""))  # a mounted route changes the latter
    shorter = scope["path"].rstrip("/")
    if shorter.strip("/") and shorter != scope["path"]:
        matches = (route.matches({**scope, "path": shorter})[0] for route in scope["app"].routes)
        if any(match != Match.NONE for match in matches):
            return f"; send it to {shorter}, without the slash"
    templates = {each.path for each in iter_route_contexts(scope["app"].routes) if each.path} - {"/"}
    fixed = [each for each in templates if "{" not in each]
    near = meant(path[-_SHOWN:], [*_filled(path, templates - {*fixed})] or fixed).replace("'/", f"'{root}/", 1)
    return f"{near or ';'} GET {root}/{'docs' if '/docs' in fixed else 'openapi.json'} lists what there is"


def _line(scope: Scope, path: str) -> str:
    """The command that posts a file to `path`, for who has put it."""
    return f"; to send a file: curl -X POST -T FILE {base_url(scope)}{path}" if scope["method"] == "PUT" else ""


def _filled(path: str, templates: set[str]) -> Iterator[str]:
    """Those of `templates` that `path` is nearly one of, with its parameters in their places."""
    segments = path.split("/") if len(path) <= _SHOWN else []
    for template in templates:
        parts = template.split("/")
        if len(parts) == len(segments):
            filled, fixed, given = zip(*map(_segment, parts, segments), strict=True)
            if get_close_matches("/".join(given), ["/".join(fixed)], cutoff=_NEAR):
                yield "/".join(filled)


def _segment(part: str, given: str) -> tuple[str, str, str]:
    """`part` of a template with the parameter that `given` has in its place, and both without that parameter."""
    if "{" not in part:
        return part, part, given
    ending = part.rpartition("}")[2]  # such as :predict
    value, colon, rest = given.partition(":") if ending else (given, "", "")
    return value + ending, ending, colon + rest
