"""Web pages of other origins: off unless PVT_CORS_ORIGINS names them, and then errors are readable too."""

import socket
from http.client import HTTPResponse
from itertools import product
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from app.settings import Settings, SettingsInvalid
from tests.app.conftest import MakeClient, png
from tests.app.processes import LIGHT, serving

PAGE = "https://app.example.org"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-request-id, prefer",
}
ALLOWED = "access-control-allow-origin"


def test_by_default_no_page_is_allowed_anything(client: TestClient) -> None:
    answered = client.get("/models", headers={"Origin": PAGE})
    preflight = client.options("/predict", headers=PREFLIGHT)

    assert answered.status_code == 200
    for response in (answered, preflight):
        assert [name for name in response.headers if name.startswith("access-control-")] == []


@pytest.mark.parametrize("origins", [PAGE, f"http://localhost:3000,{PAGE}", "HTTPS://App.Example.org:443"])
def test_a_page_of_a_named_origin_may_send_and_read(make_client: MakeClient, origins: str) -> None:
    client = make_client(cors_origins=origins, api_keys="secret", client_rate=0.001, client_burst=1, max_body_mb=0.001)
    preflights = [client.options("/predict", headers=PREFLIGHT) for _ in range(3)]  # they count for no limit
    key = {"Origin": PAGE, "Authorization": "Bearer secret"}
    refused = {
        401: client.get("/models", headers={"Origin": PAGE}),
        413: client.post("/predict", content=b"x" * 2000, headers={**key, "Content-Type": "image/png"}),
        429: client.get("/models", headers=key),
    }

    for preflight in preflights:
        assert (preflight.status_code, preflight.headers[ALLOWED]) == (200, PAGE)
        assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
        assert {"POST", "PUT", "DELETE"} <= {*preflight.headers["access-control-allow-methods"].split(", ")}
        assert "Origin" in preflight.headers["vary"]
    for status, response in refused.items():
        assert response.status_code == status
        assert (response.headers[ALLOWED], response.headers["vary"]) == (PAGE, "Origin")
        exposed = {*response.headers["access-control-expose-headers"].split(", ")}
        assert {"X-Request-ID", "Server-Timing", "Retry-After"} <= exposed
        assert "access-control-allow-credentials" not in response.headers


def test_pages_of_other_origins_are_not(make_client: MakeClient) -> None:
    client = make_client(cors_origins=PAGE)
    for origin in ("https://evil.example", "http://app.example.org", f"{PAGE}.evil.example", f"{PAGE}:8443", "null"):
        preflight = client.options("/predict", headers={**PREFLIGHT, "Origin": origin})
        answered = client.get("/health", headers={"Origin": origin})

        assert (preflight.status_code, answered.status_code) == (400, 200)
        assert ALLOWED not in preflight.headers
        assert ALLOWED not in answered.headers
        assert answered.headers["vary"] == "Origin"  # a cache may not give it to an allowed page
    assert client.get("/health").headers["vary"] == "Origin"


def test_with_a_star_any_page_may(make_client: MakeClient) -> None:
    client = make_client(cors_origins="*")
    preflight = client.options("/predict", headers={**PREFLIGHT, "Origin": "null"})
    answered = client.post("/predict", files={"image": png()}, headers={"Origin": "https://any.example"})
    failed = client.get("/predict", headers={"Origin": "https://any.example"})

    assert (preflight.status_code, preflight.headers[ALLOWED]) == (200, "*")
    assert (answered.status_code, answered.headers[ALLOWED]) == (200, "*")
    assert (failed.status_code, failed.headers[ALLOWED]) == (405, "*")


def test_an_unexpected_error_is_readable_too(make_client: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret")

    client = make_client(cors_origins=PAGE)
    monkeypatch.setattr("app.routes.page.base_url", fail)
    broken = client.get("/", headers={"Origin": PAGE})

    assert (broken.status_code, broken.headers[ALLOWED]) == (500, PAGE)
    assert "secret" not in broken.text


PARTS = {
    400: b"POST /predict HTTP/1.1\r\nHost: x\r\nOrigin: %b\r\nContent-Length: x\r\n\r\n",
    431: b"POST /predict HTTP/1.1\r\nHost: x\r\nOrigin: %b\r\nCookie: " + b"a" * 70_000,
    408: b"POST /predict HTTP/1.1\r\nHost: x\r\nOrigin: %b\r\nContent-Length: 1000\r\n\r\nslow",
}


@pytest.mark.parametrize(
    ("origins", "callers"), [(PAGE, {PAGE: PAGE, "https://evil.example": None}), ("*", {PAGE: "*"})]
)
def test_refusals_of_the_parser_are_readable_too(origins: str, callers: dict[str, str | None]) -> None:
    """So that a page learns why its upload over a slow line was ended."""
    with serving(**LIGHT, cors_origins=origins, client_timeout_seconds="1") as server:
        url = httpx.URL(server.url)
        for (origin, allowed), (status, head) in product(callers.items(), PARTS.items()):
            with socket.create_connection((url.host, url.port or 0), timeout=30) as connection:
                connection.sendall(head % origin.encode())
                response = HTTPResponse(connection)
                response.begin()

                if (allowed, status) == (None, 408):  # bodies from pages of other sites are not even waited for
                    assert (response.status, response.headers[ALLOWED]) == (403, None)
                    continue
                assert (response.status, response.headers[ALLOWED]) == (status, allowed)
                assert response.headers["vary"] == "Origin"
                assert response.headers["access-control-expose-headers"] == (allowed and "X-Request-ID")


def test_plain_options_still_say_which_methods_there_are(make_client: MakeClient) -> None:
    response = make_client(cors_origins=PAGE).options("/predict", headers={"Origin": PAGE})

    assert (response.status_code, response.headers["allow"]) == (204, "OPTIONS, POST")


def test_an_open_management_port_stays_closed_to_pages(make_client: MakeClient) -> None:
    client = make_client(cors_origins="*", management_port=9999)
    refused = client.get("http://localhost:9999/aliases", headers={"Origin": PAGE})

    assert refused.status_code == 403


@pytest.mark.parametrize(
    "value",
    ["example.org", "https://example.org/", "https://example.org/app", "https://*.example.org", "null", "https://a b"],
)
def test_what_is_no_origin_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PVT_CORS_ORIGINS", value)

    with pytest.raises(SettingsInvalid, match=r"is no origin; write https://example\.org"):
        Settings.from_environment()


BODIES: dict[str, Any] = {
    "form": {"files": {"image": png()}},
    "text": {"content": png(), "headers": {"Content-Type": "text/plain;charset=UTF-8"}},
    "urlencoded": {"content": png(), "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
    "nothing said": {"content": png()},
}


@pytest.mark.parametrize("path", ["/predict", "/features", "/explain", "/invocations", "/v1/embeddings",
                                  "/v2/models/pvt_v2_b0.digits/infer"])  # fmt: skip
def test_a_form_of_another_site_is_refused_before_it_is_read(client: TestClient, path: str) -> None:
    for site, origin in (("cross-site", PAGE), ("same-site", "http://other.testserver"), (None, PAGE), (None, "null")):
        headers = {"Origin": origin, "Content-Type": "text/plain", **({"Sec-Fetch-Site": site} if site else {})}
        refused = client.post(path, content=png(), headers=headers)

        assert refused.status_code == 403, origin
        assert "PVT_CORS_ORIGINS" in refused.text


@pytest.mark.parametrize("body", BODIES)
def test_who_is_no_page_of_another_site_may_send_any_form_of_body(client: TestClient, body: str) -> None:
    """Programs, which send no `Origin`; the service's own page; a page that opens a file; a preflighted request."""
    given = {"headers": {}, **BODIES[body]}
    for headers in (
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://testserver"},
        {"Origin": "https://public.example", "Sec-Fetch-Site": "same-origin"},
        {"Origin": PAGE, "X-Request-ID": "preflighted"},
    ):
        answered = client.post("/predict", **{**given, "headers": {**given["headers"], **headers}})

        assert answered.status_code == 200, headers


@pytest.mark.parametrize("origins", [PAGE, "*"])
def test_a_form_of_a_named_origin_is_read(make_client: MakeClient, origins: str) -> None:
    client = make_client(cors_origins=origins)

    answered = client.post("/predict", files={"image": png()}, headers={"Origin": PAGE, "Sec-Fetch-Site": "cross-site"})

    assert (answered.status_code, answered.headers[ALLOWED]) == (200, origins)


def test_behind_a_proxy_the_host_that_it_says_is_the_own_one(make_client: MakeClient) -> None:
    client = make_client(trusted_proxies="unix")
    headers = {"Origin": "http://public.example", "X-Forwarded-Host": "public.example"}

    assert client.post("/predict", files={"image": png()}, headers=headers).status_code == 200
    assert (
        client.post("/predict", files={"image": png()}, headers={"Origin": "http://public.example"}).status_code == 403
    )
