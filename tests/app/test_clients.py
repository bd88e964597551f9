import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from app import clients
from app.clients import Allowance, ClientLimits, Directory
from app.problems import ClientLimitExceeded
from app.settings import Settings, encodings
from tests.app.conftest import MakeClient, png

PROXIES = "10.0.0.0/8,2001:db8:aaaa::/48"


def name(peer: str | None, *headers: tuple[str, str], proxies: str = PROXIES) -> str:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"headers": raw, "client": (peer, 1) if peer is not None else None}
    return Directory(Settings(trusted_proxies=proxies)).identify(scope)[0]  # type: ignore[arg-type]  # as from a variable


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("192.0.2.7", "ip:192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "ip:2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "ip:2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "ip:192.0.2.7"),
        ("::FFFF:c000:0207", "ip:192.0.2.7"),
        ("fe80::1%eth0", "ip:fe80::/64"),
        ("", "ip:unix"),
        (None, "ip:unix"),
    ],
)
def test_a_client_is_its_address_or_the_network_of_its_subscriber(peer: str | None, expected: str) -> None:
    assert name(peer) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("6.6.6.6, 192.0.2.7", "192.0.2.7"),
        ("6.6.6.6, 192.0.2.7, 10.9.9.9", "192.0.2.7"),
        ("192.0.2.7:4711", "192.0.2.7"),
        ("[2001:db8:1:2::3]:80, ::ffff:10.0.0.9", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),  # one of the proxies' own network
        ("6.6.6.6, unknown", "10.0.0.1"),
        ("6.6.6.6, unknown, 10.0.0.2", "10.0.0.2"),
        ("6.6.6.6,", "10.0.0.1"),
        ("", "10.0.0.1"),
        (", ".join(["6.6.6.6"] * 1000), "10.0.0.1"),  # no chain of proxies is so long
        (", ".join(["6.6.6.6"] + ["10.0.0.2"] * 200), "10.0.0.2"),
    ],
)
def test_a_trusted_proxy_names_its_client_last(value: str, expected: str) -> None:
    assert name("10.0.0.1", ("x-forwarded-for", value)) == f"ip:{expected}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("for=192.0.2.7", "192.0.2.7"),
        ('for=6.6.6.6, For="192.0.2.7:80";proto=https;by=10.0.0.1', "192.0.2.7"),
        ('for="[2001:db8:1:2::3]:80", for=10.0.0.4', "2001:db8:1:2::/64"),
        ('for=192.0.2.7;host="x, for=6.6.6.6"', "192.0.2.7"),
        ('for=192.0.2.7;host="x;for=6.6.6.6"', "192.0.2.7"),
        ("for=6.6.6.6, for=_hidden", "10.0.0.1"),
        ("for=6.6.6.6, proto=https", "10.0.0.1"),
        ('for=6.6.6.6, for="192.0.2.7', "10.0.0.1"),
    ],
)
def test_the_standards_header_is_read_too(value: str, expected: str) -> None:
    assert name("10.0.0.1", ("forwarded", value)) == f"ip:{expected}"


def test_several_headers_are_one_list() -> None:
    assert name("10.0.0.1", ("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "192.0.2.7")) == "ip:192.0.2.7"


@pytest.mark.parametrize("peer", ["192.0.2.1", "", "::1"])
def test_who_is_no_trusted_proxy_names_nobody(peer: str) -> None:
    assert name(peer, ("x-forwarded-for", "6.6.6.6")) == name(peer)
    assert name(peer, ("forwarded", "for=6.6.6.6")) == name(peer)


def test_a_header_that_the_proxy_only_passes_on_names_nobody() -> None:
    """A proxy writes one of the two; which of them is the client's own invention can't be told."""
    assert name("10.0.0.1", ("x-forwarded-for", "192.0.2.7"), ("forwarded", "for=6.6.6.6")) == "ip:10.0.0.1"
    assert name("10.0.0.1", ("x-forwarded-for", "192.0.2.7"), ("forwarded", "for=192.0.2.7")) == "ip:192.0.2.7"


def test_a_proxy_on_a_unix_socket_is_trusted_where_the_setting_says_so() -> None:
    assert name("", ("x-forwarded-for", "192.0.2.7"), proxies="unix") == "ip:192.0.2.7"
    assert name(None, ("x-forwarded-for", "192.0.2.7"), proxies="unix") == "ip:192.0.2.7"
    assert name("10.0.0.1", ("x-forwarded-for", "192.0.2.7"), proxies="unix") == "ip:10.0.0.1"


@pytest.mark.parametrize("key", ["plain", "schlüssel", "à", "ключ", "with space", "\udce9t\udce9"])
def test_a_key_is_known_in_utf8_and_in_latin_1(key: str) -> None:
    directory = Directory(Settings(api_keys=(SecretStr(key),), management_keys=(SecretStr("other"),)))
    for sent in encodings(key):
        found = directory.identify({"headers": [(b"authorization", b"bearer " + sent)], "client": ("192.0.2.7", 1)})

        assert found == (clients.key_name(key), "api")
        assert len(found[0]) == len("key:01234567")


@pytest.mark.parametrize("value", ["Bearer nothing", "Basic plain", "plain", "Bearer", "Bearer plain plain", ""])
def test_a_key_that_the_service_does_not_have_makes_no_client(value: str) -> None:
    directory = Directory(Settings(api_keys=(SecretStr("plain"),)))
    scope = {"headers": [(b"authorization", value.encode())], "client": ("192.0.2.7", 1)}

    assert directory.identify(scope) == ("ip:192.0.2.7", "")


def test_an_allowance_holds_its_rate_whatever_is_sent() -> None:
    allowance, now, taken = Allowance(), 0.0, 0
    for _ in range(1000):
        now += 0.01
        while not allowance.wait_seconds(now, 5, 10):
            allowance.take(now, 5)
            taken += 1

    assert taken == pytest.approx(10 + 5 * 10, abs=1)


def test_after_its_wait_an_allowance_has_room_and_not_before() -> None:
    allowance = Allowance()
    allowance.take(100.0, 2, 10)
    wait = allowance.wait_seconds(100.0, 2, 4)

    assert wait == pytest.approx(3.5)
    assert allowance.wait_seconds(100.0 + wait - 0.01, 2, 4) > 0
    assert allowance.wait_seconds(100.0 + wait + 1e-9, 2, 4) == 0


def test_limits_remember_a_bounded_number_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_CLIENTS", 10)
    limits = ClientLimits(Settings(client_rate=0.001, client_burst=1, client_concurrency=1), CollectorRegistry())
    scope = {"state": {"images": 1}}
    with limits.admitted("stays", scope):
        for number in range(1000):
            with limits.admitted(f"ip:{number}", scope):
                pass
        with pytest.raises(ClientLimitExceeded), limits.admitted("stays", scope):
            pass

        assert len(limits._idle) == 10
        assert list(limits._active) == ["stays"]
    with pytest.raises(ClientLimitExceeded), limits.admitted("ip:999", scope):  # the latest are those remembered
        pass
    with limits.admitted("ip:0", scope):
        pass


def test_a_rate_counts_images_and_says_when_there_is_room_again(make_client: MakeClient) -> None:
    client = make_client(client_rate=0.5, client_burst=2)
    files = [("image", png())] * 5

    first = client.post("/predict", files=files)
    second = client.post("/predict", files=files[:1])

    assert first.status_code == 200
    assert (second.status_code, second.json()["title"]) == (429, "Client limit exceeded")
    assert 6 <= int(second.headers["Retry-After"]) <= 8  # five images, of which two may be at once
    assert "PVT_CLIENT_RATE" in second.json()["detail"]
    assert client.get("/predict").status_code == 429
    assert client.get("/nothing").status_code == 429
    metrics = client.get("/metrics").text
    assert 'pvt_client_refusals_total{limit="rate"} 3.0' in metrics
    assert 'pvt_http_requests_total{method="POST",route="/predict",status="429"} 1.0' in metrics


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/v2/health/live", "/metrics"])
def test_probes_and_scrapes_have_no_limit(make_client: MakeClient, path: str) -> None:
    client = make_client(client_rate=0.001, client_burst=1)

    assert {client.get(path).status_code for _ in range(5)} == {200}


def test_management_has_no_limit(make_client: MakeClient) -> None:
    client = make_client(client_rate=0.001, client_burst=1, management_keys=("secret",))
    headers = {"Authorization": "Bearer secret"}

    assert {client.get("/debug/scheduler", headers=headers).status_code for _ in range(5)} == {200}


def test_each_key_has_a_limit_of_its_own(make_client: MakeClient) -> None:
    client = make_client(client_rate=0.001, client_burst=1, api_keys=("one", "two"))

    def get(key: str) -> int:
        return client.get("/models", headers={"Authorization": f"Bearer {key}"}).status_code

    assert [get("one"), get("one"), get("two"), get("two"), get("none"), get("other")] == [200, 429, 200, 429, 401, 429]


def test_usage_is_counted_for_configured_keys_only(make_client: MakeClient) -> None:
    client = make_client(api_keys=("one", "two"))
    body = png()
    headers = {"Authorization": "Bearer one", "Content-Type": "image/png"}
    answer = client.post("/predict", content=body, headers=headers)
    client.post("/predict", content=body, headers=headers | {"Authorization": "Bearer three"})

    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("pvt_key_")]
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if "_created" not in line}
    one, two = (clients.key_name(key).removeprefix("key:") for key in ("one", "two"))
    assert values.pop(f'pvt_key_seconds_total{{key="{one}"}}') > 0
    assert {name: value for name, value in values.items() if value} == {
        f'pvt_key_requests_total{{key="{one}"}}': 1,
        f'pvt_key_images_total{{key="{one}"}}': 1,
        f'pvt_key_bytes_total{{direction="received",key="{one}"}}': len(body),
        f'pvt_key_bytes_total{{direction="sent",key="{one}"}}': len(answer.content),
    }
    assert {name.partition('key="')[2].partition('"')[0] for name in values} == {one, two}
