"""What people open in a browser: the page, its files, and `/docs`. PVT_UI=off takes them away.

The page loads nothing from elsewhere, and the policy below lets it do nothing else (Content Security Policy, level 3).
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from app.caching import validated
from app.dependencies import SettingsDep, require_management, require_one_process
from app.problems import Forbidden, Unauthorized
from app.proxies import base_url
from app.settings import Settings

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent.parent / "static"
TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",  # kept, and asked for by its ETag
}
# Read once: a name of a request never becomes a path.
FILES: Mapping[str, bytes] = {
    path.relative_to(FOLDER).as_posix(): path.read_bytes()
    for folder in (FOLDER, FOLDER / "samples")
    for path in sorted(folder.iterdir())
    if path.suffix in TYPES
}


@router.get("/")
async def index(request: Request, settings: SettingsDep) -> Response:
    """The page. Its paths are relative, but below a known prefix absolute: that may be without the slash at its end."""
    way, words = await _management(request, settings)
    content = FILES["index.html"]
    for name, text in {"url": base_url(request.scope), "way": way, "management": words}.items():
        content = content.replace(b"{{%b}}" % name.encode(), escape(text).encode())
    if root := request.scope.get("root_path", ""):
        content = content.replace(b'="./', f'="{root}/'.encode())
    return _file(request, content, ".html")


async def _management(request: Request, settings: Settings) -> tuple[Literal["open", "key", "refused"], str]:
    """Whether a page at this address can manage models, and the words for it: where it can't, those of a refusal."""
    try:
        await require_one_process(settings)
        await require_management(request, settings)
    except Unauthorized:
        return "key", "A management key (PVT_MANAGEMENT_KEYS) lets this page load, pin, unload and pull models."
    except Forbidden as error:
        return "refused", f"{error}. A page reaches only the address that it came from."
    return "open", "This port needs no management key: the table has buttons."


@router.get("/static/{name:path}")
async def static_file(request: Request, name: str) -> Response:
    """One of its files."""
    if name not in FILES:
        raise HTTPException(404)
    return _file(request, FILES[name], Path(name).suffix)


def _file(request: Request, content: bytes, suffix: str) -> Response:
    return validated(request, content, TYPES[suffix], HEADERS)


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> HTMLResponse:
    """Every endpoint, to try out; it loads nothing from elsewhere."""
    root = request.scope.get("root_path", "")
    files = f"{root}/static-offline-docs"
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title="pvt-serve - Swagger UI",
        swagger_js_url=f"{files}/swagger-ui-bundle.js",
        swagger_css_url=f"{files}/swagger-ui.css",
        swagger_favicon_url=f"{files}/favicon.png",
    )
