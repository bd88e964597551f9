from ipaddress import ip_address, ip_network

import pytest

from app.addresses import HostRule, Reach, host_name, is_public


def reach(*hosts: str, private: str | None = None) -> Reach:
    return Reach([HostRule.parse(host) for host in hosts], [ip_network(private)] if private else [])


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_an_address_of_the_public_internet_is_public_in_every_form_that_leads_there(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.1", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.31.0.1"),
        *("192.0.0.1", "192.0.0.9", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1"),
        *("203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::127.0.0.1", "::8.8.8.8", "fe80::1", "fec0::1", "fc00::1", "fd12::1", "ff02::1", "100::1"),
        *("2001:db8::1", "3fff::1", "2001:2::1", "2001:20::1", "5f00::1", "64:ff9b:1::a00:1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2002:a00:1::1", "2002:808:808::1"),
        *("2001:0:7f00:1::", "2001:0:808:808::f7f7:f7f7"),  # Teredo
    ],
)
def test_no_other_address_is_public_in_any_form(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org"),
        ("a_b.example.org", "a_b.example.org"),
        ("xn--mnchen-3ya.de", "xn--mnchen-3ya.de"),
        ("127.0.0.1.", "127.0.0.1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("::FFFF:7f00:1", "::ffff:127.0.0.1"),
    ],
)
def test_a_host_has_one_spelling(host: str, known: str) -> None:
    assert str(ip_address(known)) == host_name(host) if ":" in known else host_name(host) == known


@pytest.mark.parametrize(
    "host",
    [
        *("", ".", "..", "a..b", "example.org..", "-a.org", "a-.org", "a b.org", "ex%61mple.org", "a\\b", "a,b"),
        *("127.1", "127.0.1", "2130706433", "0177.0.0.1", "0x7f000001", "0x7f.1", "127.0.0.0x1", "1.2.3.4.5", "0"),
        *("a.1", "fe80::1%eth0", "x" * 64 + ".org", ".".join(["x" * 60] * 5), "münchen.de", "example.org\n"),
        *("\uff11\uff12\uff17.0.0.1", "127\u30020.0.1"),
    ],
)
def test_what_is_neither_a_name_nor_an_address_in_its_usual_form_is_no_host(host: str) -> None:
    assert host_name(host) is None


@pytest.mark.parametrize(
    ("rule", "url", "allowed"),
    [
        ("example.org", ("example.org", 443, "https"), True),
        ("EXAMPLE.org.", ("example.org", 80, "http"), True),
        ("example.org", ("example.org", 8443, "https"), False),
        ("example.org", ("example.org", 80, "https"), False),
        ("example.org", ("sub.example.org", 443, "https"), False),
        ("example.org", ("badexample.org", 443, "https"), False),
        ("example.org", ("example.org.evil.net", 443, "https"), False),
        ("example.org:8443", ("example.org", 8443, "https"), True),
        ("example.org:8443", ("example.org", 443, "https"), False),
        ("*.example.org", ("a.b.example.org", 443, "https"), True),
        ("*.example.org", ("example.org", 443, "https"), False),
        ("*.example.org", ("badexample.org", 443, "https"), False),
        ("*", ("anything.net", 443, "https"), True),
        ("*", ("anything.net", 22, "http"), False),
        ("*:8080", ("anything.net", 8080, "http"), True),
        ("[::1]:9000", ("::1", 9000, "http"), True),
        ("10.0.0.5", ("10.0.0.5", 80, "http"), True),
    ],
)
def test_a_rule_allows_its_host_at_its_port_and_no_other(rule: str, url: tuple[str, int, str], allowed: bool) -> None:
    assert reach(rule).allows(*url) is allowed


@pytest.mark.parametrize(
    "entry",
    [
        *("", "http://example.org", "example.org/x", "a b", "*.*", "a.*.org", "**", "x:0", "x:65536", "x:", "127.1"),
        *("::1", "[::1", "[127.1]", "münchen.de", "user@example.org"),
    ],
)
def test_what_is_no_rule_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        HostRule.parse(entry)


def test_a_private_address_is_reached_only_in_a_named_network_and_only_for_a_named_host() -> None:
    inside, outside = ip_address("10.1.2.3"), ip_address("192.168.0.1")

    assert reach("store.local:9000", private="10.0.0.0/8").reaches("store.local", 9000, inside)
    assert reach("*.local", private="10.0.0.0/8").reaches("store.local", 80, ip_address("::ffff:10.1.2.3"))
    assert not reach("store.local:9000", private="10.0.0.0/8").reaches("store.local", 9000, outside)
    assert not reach("store.local:9000").reaches("store.local", 9000, inside)
    assert not reach("*", private="10.0.0.0/8").reaches("store.local", 80, inside)
    assert not reach("*", "other.local", private="10.0.0.0/8").reaches("store.local", 80, inside)
    assert reach("*").reaches("example.org", 443, ip_address("8.8.8.8"))
