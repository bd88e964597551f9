import ssl
from ipaddress import ip_address

import pytest

from app.addresses import Address
from app.bodies import Link, Upload
from app.problems import ImageUnreachable, ImageUrlRefused
from tests.app.remote_images.internet import OTHER, PRIVATE, PUBLIC, Internet, answer, fetch, fetcher, redirect


@pytest.mark.parametrize(
    ("url", "port", "server_name", "host"),
    [
        ("http://example.org/a/cat.png?x=1#f", 80, None, b"example.org"),
        ("https://example.org/a/cat.png?x=1", 443, "example.org", b"example.org"),
        ("https://EXAMPLE.org.:443/a/cat.png?x=1", 443, "example.org", b"example.org"),
        ("https://example.org:8443/a/cat.png?x=1", 8443, "example.org", b"example.org:8443"),
    ],
)
async def test_an_image_comes_from_the_address_that_was_checked_under_the_hosts_own_name(
    url: str, port: int, server_name: str | None, host: bytes
) -> None:
    internet = Internet({"example.org": [PUBLIC]}, [answer()])

    async with fetcher(internet, "example.org", "example.org:8443") as each:
        got = await each.fetched([Link(url)], "id")

    assert got == [Upload("cat.png", b"image")]
    assert (internet.asked, internet.connected) == (["example.org"], [(PUBLIC, port)])
    (stream,) = internet.streams
    assert stream.server_name == server_name
    assert stream.sent.startswith(b"GET /a/cat.png?x=1 HTTP/1.1\r\nHost: " + host + b"\r\n")
    assert b"Accept-Encoding: identity\r\n" in stream.sent
    if stream.context:
        assert stream.context.check_hostname
        assert stream.context.verify_mode is ssl.CERT_REQUIRED


async def test_without_hosts_the_setting_is_named_and_nothing_is_asked() -> None:
    internet = Internet({})

    (error,) = await fetch(internet, "https://example.org/", hosts=())

    assert isinstance(error, ImageUrlRefused)
    assert "PVT_URL_HOSTS" in str(error)
    assert internet.asked == []


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.org/", "neither http:// nor https://"),
        ("file:///etc/passwd", "neither http:// nor https://"),
        ("//example.org/", "neither http:// nor https://"),
        ("example.org/x", "neither http:// nor https://"),
        ("", "neither http:// nor https://"),
        ("http://example.org@10.0.0.7/", "carries credentials"),
        ("http://user:word@example.org/", "carries credentials"),
        ("http://example.org\\@10.0.0.7/", "carries credentials"),
        ("http://exam\rple.org/", "malformed"),
        ("http://exa mple.org/", "neither a name nor an address"),
        ("http://[::1/", "malformed"),
        ("http://\uff11\uff12\uff17.0.0.1/", "malformed"),
        ("http:///x", "neither a name nor an address"),
        ("http://127.1/", "neither a name nor an address"),
        ("http://0x7f000001/", "neither a name nor an address"),
        ("http://2130706433/", "neither a name nor an address"),
        ("http://0177.0.0.1/", "malformed"),
        ("http://example.org:22/", "none that PVT_URL_HOSTS allows"),
        ("http://example.org:0/", "none that PVT_URL_HOSTS allows"),
        ("https://example.org:80/", "none that PVT_URL_HOSTS allows"),
        ("http://example.org.evil.net/", "none that PVT_URL_HOSTS allows"),
        ("http://evilexample.org/", "none that PVT_URL_HOSTS allows"),
        ("http://10.0.0.7/", "none that PVT_URL_HOSTS allows"),
        ("http://127\u30020.0.1/", "none that PVT_URL_HOSTS allows"),
    ],
)
async def test_a_url_that_is_not_allowed_is_refused_before_anything_is_asked(url: str, reason: str) -> None:
    internet = Internet({})

    (error,) = await fetch(internet, url)

    assert isinstance(error, ImageUrlRefused)
    assert reason in str(error)
    assert (internet.asked, internet.connected) == ([], [])


@pytest.mark.parametrize(
    "addresses",
    [
        [],
        [PRIVATE],
        [PUBLIC, PRIVATE],
        [PRIVATE, PUBLIC],
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:10.0.0.7"],
        ["64:ff9b::a00:7"],
        ["2002:a00:7::"],
        ["fe80::1%1"],
        ["0.0.0.1"],
    ],
)
async def test_a_name_with_an_address_that_is_not_public_is_never_connected_to(addresses: list[str]) -> None:
    internet = Internet({"cdn.example.org": addresses})

    (error,) = await fetch(internet, "http://cdn.example.org/")

    assert internet.connected == []
    assert isinstance(error, ImageUnreachable)
    # The same words as for a name that is not there, and no address.
    assert str(error) == "the URL's host cdn.example.org can't be reached at a public address"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/", "http://127.0.0.1./", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[::7f00:1]/",
            "http://169.254.169.254/latest/meta-data", "http://127\u30020\u30020\u30021/"]
)  # fmt: skip
async def test_any_public_host_does_not_mean_an_address_that_is_not(url: str) -> None:
    local = ["127.0.0.1", "::1", "::ffff:127.0.0.1", "::7f00:1", "169.254.169.254"]
    internet = Internet({str(each): [str(each)] for each in map(ip_address, local)})

    (error,) = await fetch(internet, url, hosts=["*"], private="127.0.0.0/8")

    assert isinstance(error, ImageUnreachable)
    assert len(internet.asked) == 1
    assert internet.connected == []


async def test_a_name_is_resolved_once_for_a_connection_so_that_no_second_answer_counts() -> None:
    internet = Internet({"example.org": [PUBLIC]}, [answer()])

    async def rebinding(host: str, port: int) -> list[Address]:
        found = await Internet.resolve(internet, host, port)
        internet.names = {"example.org": [PRIVATE]}
        return found

    internet.resolve = rebinding  # type: ignore[method-assign]

    got = await fetch(internet, "http://example.org/", "http://example.org/")

    assert got[0] == b"image"
    assert isinstance(got[1], ImageUnreachable)  # a connection of its own, and the private address is refused
    assert internet.connected == [(PUBLIC, 80)]


async def test_of_several_addresses_the_next_is_tried_when_one_does_not_answer() -> None:
    internet = Internet({"example.org": [OTHER, PUBLIC]}, [answer()])
    internet.dead = {OTHER}

    assert await fetch(internet, "http://example.org/") == [b"image"]
    assert internet.connected == [(OTHER, 80), (PUBLIC, 80)]


async def test_a_redirect_is_followed_to_a_host_that_is_allowed() -> None:
    names = {"example.org": [PUBLIC], "cdn.example.org": [OTHER]}
    internet = Internet(names, [redirect("https://cdn.example.org/b"), redirect("/c"), answer()])

    assert await fetch(internet, "http://example.org/a") == [b"image"]
    assert internet.connected == [(PUBLIC, 80), (OTHER, 443), (OTHER, 443)]
    assert internet.streams[-1].sent.startswith(b"GET /c HTTP/1.1\r\nHost: cdn.example.org\r\n")


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://10.0.0.7/admin", "none that PVT_URL_HOSTS allows"),
        ("//evil.net/", "none that PVT_URL_HOSTS allows"),
        ("https://example.org:6379/", "none that PVT_URL_HOSTS allows"),
        ("http://example.org/", "from https to http"),
        ("file:///etc/passwd", "neither http:// nor https://"),
        ("https://example.org@evil.net/", "carries credentials"),
        ("http://[evil.net", "neither a name nor an address"),
        ("http://exa\u0001.evil.net", "malformed"),
        ("http:////[evil.net]", "malformed"),
    ],
)
async def test_a_redirect_to_where_it_may_not_is_refused_without_naming_the_place(location: str, reason: str) -> None:
    internet = Internet({"example.org": [PUBLIC]}, [redirect(location)])

    (error,) = await fetch(internet, "https://example.org/a")

    assert isinstance(error, ImageUrlRefused)
    assert reason in str(error)
    assert not [told for told in ("10.0.0.7", "evil.net", "6379", "passwd") if told in str(error)]
    assert internet.connected == [(PUBLIC, 443)]


async def test_a_redirect_to_an_allowed_name_with_a_private_address_is_refused() -> None:
    names = {"example.org": [PUBLIC], "db.example.org": [PRIVATE]}
    internet = Internet(names, [redirect("https://db.example.org/")])

    (error,) = await fetch(internet, "https://example.org/a")

    assert isinstance(error, ImageUnreachable)
    assert "db." not in str(error)
    assert internet.connected == [(PUBLIC, 443)]


async def test_more_than_three_redirects_are_not_followed() -> None:
    internet = Internet({"example.org": [PUBLIC]}, [redirect("/again")] * 5)

    (error,) = await fetch(internet, "https://example.org/a")

    assert str(error) == "the URL redirects more than 3 times"
    assert len(internet.connected) == 4


async def test_a_private_store_is_reached_where_the_settings_name_both_host_and_network() -> None:
    internet = Internet({"minio.local": [PRIVATE]}, [answer()])

    got = await fetch(internet, "http://minio.local:9000/b/cat.png", hosts=["minio.local:9000"], private="10.0.0.0/8")

    assert got == [b"image"]
