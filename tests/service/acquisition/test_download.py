"""Downloads from a real server over real sockets, and their faults."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
import numpy as np
import pytest

from service.acquisition.download import Download, RetryPolicy
from service.errors import PullFailed, StoreNotWritable, WeightsDigestMismatch
from service.store.cards import Origin
from tests.service.hub import Fault, Hub, serving_hub

CONTENT = np.random.default_rng(0).bytes(1_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HUB = "/timm/pvt_v2_b0.in1k/resolve/main/model.safetensors"
RELEASE = "/whai362/PVT/releases/download/v2/pvt_v2_b0.pth"
QUICK = RetryPolicy(attempts=3, timeout_seconds=5, backoff_seconds=0.001)
HALF = len(CONTENT) // 2


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub() as hub:
        hub.put(HUB, CONTENT)
        hub.put(RELEASE, CONTENT)
        yield hub


@dataclass(frozen=True)
class Fetched:
    content: bytes
    origin: Origin


def download(url: str, root: Path, *, policy: RetryPolicy = QUICK, **options: Any) -> Download:
    return Download(url=url, folder=root / "file", root=root, policy=policy, **{"max_bytes": 2_000_000, **options})


def fetch(hub: Hub, root: Path, path: str = HUB, **options: Any) -> Fetched:
    file, origin = download(hub.url + path, root, **options).run()
    assert file.suffix == Path(path).suffix
    return Fetched(file.read_bytes(), origin)


def left(root: Path) -> list[int]:
    """The sizes of the files that are kept."""
    return [path.stat().st_size for path in (root / "file").glob("*")]


def test_a_file_of_the_hub_is_held_against_the_digest_that_its_redirect_names(hub: Hub, tmp_path: Path) -> None:
    fetched = fetch(hub, tmp_path)

    assert fetched.content == CONTENT
    assert fetched.origin == Origin(
        url=hub.url + HUB, sha256=SHA256, bytes=len(CONTENT), digest_from="hub", revision="c0ffee"
    )


@pytest.mark.parametrize("path", [HUB, RELEASE])
def test_a_release_or_a_plain_mirror_has_no_digest_and_nobody_has_given_one(
    hub: Hub, tmp_path: Path, path: str
) -> None:
    hub.digests = False
    origin = fetch(hub, tmp_path, path).origin

    assert (origin.sha256, origin.digest_from, origin.revision) == (SHA256, "nobody", None)


def test_a_published_digest_counts(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path, RELEASE, sha256=SHA256).origin.digest_from == "publisher"


def test_a_private_repository_takes_the_users_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"  # noqa: S105
    monkeypatch.setenv("HF_TOKEN", hub.token)

    assert fetch(hub, tmp_path, token=True).content == CONTENT


def test_a_mirror_never_gets_the_users_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"  # noqa: S105
    monkeypatch.setenv("HF_TOKEN", hub.token)

    with pytest.raises(PullFailed, match="answers 401: it requires credentials; a hub's are HF_TOKEN"):
        fetch(hub, tmp_path)


def test_a_hub_is_left_alone_where_the_user_is_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(PullFailed, match="HF_HUB_OFFLINE is set"):
        fetch(hub, tmp_path)


def test_progress_is_reported_up_to_the_whole(hub: Hub, tmp_path: Path) -> None:
    reports: list[tuple[int, int | None]] = []
    fetch(hub, tmp_path, on_progress=lambda done, total: reports.append((done, total)))

    assert reports == sorted(reports)
    assert reports[-1] == (len(CONTENT), len(CONTENT))


@pytest.mark.parametrize("path", [HUB, RELEASE])
def test_a_download_that_is_cut_off_resumes_where_it_ended(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.faults = [Fault(cut=HALF), Fault(cut=1000)]

    assert fetch(hub, tmp_path, path).content == CONTENT
    first, second, third = hub.requests
    assert "Range" not in first
    assert (second["Range"], third["Range"]) == (f"bytes={HALF}-", f"bytes={HALF + 1000}-")
    assert path == HUB or second["If-Range"].startswith('"')  # where no digest would show that it has changed


@pytest.mark.parametrize("path", [HUB, RELEASE])
def test_another_process_resumes_where_one_gave_up(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.faults = [Fault(cut=HALF), Fault(status=503), Fault(status=503), Fault(status=503)]
    with pytest.raises(PullFailed, match=r"503 Service Unavailable, 3 times in a row; 0.5 MB are kept"):
        fetch(hub, tmp_path, path)
    hub.requests.clear()

    assert fetch(hub, tmp_path, path).content == CONTENT
    assert [request.get("Range") for request in hub.requests] == [f"bytes={HALF}-"]


def test_a_server_that_sends_everything_again_is_taken_at_its_word(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(cut=HALF), Fault(whole=True)]

    assert fetch(hub, tmp_path, RELEASE).content == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_from_its_beginning(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(cut=HALF), *[Fault(status=503)] * 3]
    with pytest.raises(PullFailed):
        fetch(hub, tmp_path, RELEASE)
    changed = CONTENT[::-1]
    hub.put(RELEASE, changed)

    assert fetch(hub, tmp_path, RELEASE).content == changed


def test_a_range_of_another_version_is_not_joined_to_this_one(hub: Hub, tmp_path: Path) -> None:
    """From a server that takes no notice of If-Range."""
    hub.faults = [Fault(cut=HALF, etag='"1"'), Fault(etag='"2"', careless=True)]

    assert fetch(hub, tmp_path, RELEASE).content == CONTENT
    assert [(request.get("Range"), request.get("If-Range")) for request in hub.requests] == [
        (None, None),
        (f"bytes={HALF}-", '"1"'),
        (None, None),
    ]


def test_a_part_without_digest_and_strong_etag_is_not_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(cut=HALF, etag='W/"1"'), Fault(etag='W/"1"')]

    assert fetch(hub, tmp_path, RELEASE).content == CONTENT
    assert [request.get("Range") for request in hub.requests] == [None, None]


@pytest.mark.parametrize("path", [HUB, RELEASE])
def test_a_part_that_is_longer_than_the_file_now_is_dropped(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.faults = [Fault(cut=HALF), *[Fault(status=503)] * 3]
    with pytest.raises(PullFailed):
        fetch(hub, tmp_path, path)
    hub.put(path, short := CONTENT[:1000])

    assert fetch(hub, tmp_path, path).content == short
    assert left(tmp_path) == [1000]


def test_bytes_that_came_wrong_are_fetched_once_more(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(spoil=True)]

    assert fetch(hub, tmp_path).content == CONTENT


def test_bytes_that_stay_wrong_are_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(spoil=True)] * 2
    with pytest.raises(WeightsDigestMismatch, match=rf"SHA-256 is [0-9a-f]{{64}}, expected {SHA256}"):
        fetch(hub, tmp_path)

    assert left(tmp_path) == []
    assert fetch(hub, tmp_path).content == CONTENT


def test_a_hub_that_has_another_file_than_was_published_is_not_used(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(WeightsDigestMismatch, match="was published; nothing was fetched"):
        fetch(hub, tmp_path, sha256="0" * 64)

    assert hub.requests == []
    assert left(tmp_path) == []


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(hub: Hub, tmp_path: Path, status: int) -> None:
    hub.faults = [Fault(status=status, headers={"Retry-After": "0"})]

    assert fetch(hub, tmp_path, policy=RetryPolicy(backoff_seconds=100)).content == CONTENT


def test_retry_after_may_be_a_date(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(status=429, headers={"Retry-After": formatdate(0, usegmt=True)})]

    assert fetch(hub, tmp_path, policy=RetryPolicy(backoff_seconds=100)).content == CONTENT


def test_a_retry_after_that_is_too_long_is_reported_instead(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(status=429, headers={"Retry-After": "3600"})]

    with pytest.raises(PullFailed, match=r"429 Too Many Requests, and asks to come back in 3600 s"):
        fetch(hub, tmp_path)


def test_a_server_that_falls_silent_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    released = threading.Event()
    hub.faults = [Fault(hold=released)]
    fetched = fetch(hub, tmp_path, policy=RetryPolicy(timeout_seconds=0.2, backoff_seconds=0.001))
    released.set()

    assert fetched.content == CONTENT
    assert hub.requests[1]["Range"] == f"bytes={HALF}-"


def test_a_server_that_is_gone_is_reported_and_nothing_is_left(tmp_path: Path) -> None:
    with serving_hub() as gone:
        pass

    with pytest.raises(PullFailed, match="3 times in a row; pull again to try anew"):
        fetch(gone, tmp_path)


def test_a_missing_file_is_reported_at_once(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(PullFailed, match="answers 404: there is no such file; try another --source"):
        fetch(hub, tmp_path, "/timm/none/resolve/main/model.safetensors")


def test_a_file_that_is_too_large_for_the_model_is_not_fetched(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(PullFailed, match=r"1000000 bytes, which no such model has"):
        fetch(hub, tmp_path, max_bytes=1000)


def test_a_stream_without_end_is_cut(hub: Hub, tmp_path: Path) -> None:
    hub.lengths = hub.digests = False
    with pytest.raises(PullFailed, match="more bytes than it should have"):
        fetch(hub, tmp_path, max_bytes=300_000)

    assert left(tmp_path) == []


def test_a_file_of_unknown_length_ends_where_the_server_ends(hub: Hub, tmp_path: Path) -> None:
    hub.lengths = hub.digests = False

    assert fetch(hub, tmp_path).content == CONTENT


@pytest.mark.parametrize(("first", "then"), [("https", "http"), ("https", "ftp")])
def test_a_redirect_from_tls_to_plain_http_is_refused(first: str, then: str) -> None:
    started = download(f"{first}://hub.example/x", Path())
    with pytest.raises(PullFailed, match="which is not encrypted; refused"):
        started._refuse_unencrypted(httpx2.Request("GET", f"{then}://cdn.example/x?Signature=secret"))


def test_stopping_ends_it_soon_and_keeps_the_bytes_so_far(hub: Hub, tmp_path: Path) -> None:
    stop = threading.Event()
    with pytest.raises(PullFailed, match=r"stopped; .* MB are kept"):
        fetch(hub, tmp_path, on_progress=lambda *_: stop.set(), stop=stop)

    (kept,) = left(tmp_path)
    assert 0 < kept < len(CONTENT)


@pytest.mark.parametrize("path", [HUB, RELEASE])
def test_a_complete_file_that_nobody_took_is_not_sent_again(hub: Hub, tmp_path: Path, path: str) -> None:
    fetch(hub, tmp_path, path)
    hub.requests.clear()

    assert fetch(hub, tmp_path, path).content == CONTENT
    assert [request.get("Range") for request in hub.requests] == ([] if path == HUB else [f"bytes={len(CONTENT)}-"])


@pytest.mark.parametrize("path", [HUB, RELEASE])
def test_a_file_of_unknown_content_in_the_folder_is_ignored(hub: Hub, tmp_path: Path, path: str) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "unnamed.pth").write_bytes(b"something else")

    assert fetch(hub, tmp_path, path).content == CONTENT
    assert left(tmp_path) == [len(CONTENT)]


def test_too_little_room_is_reported_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(StoreNotWritable, match=r"MB left, .* MB are needed; make room"):
        fetch(hub, tmp_path, room_bytes=10**18)


def test_a_disk_that_fills_up_is_reported_and_the_partial_file_is_deleted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> BinaryIO:
        return open("/dev/full", "wb")  # noqa: PTH123  Path.open is replaced

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(StoreNotWritable, match=r"is full \(No space left on device, .* MB left\); make room"):
            fetch(hub, tmp_path)

    assert left(tmp_path) == []
    assert fetch(hub, tmp_path).content == CONTENT


@pytest.mark.parametrize("path", [HUB, RELEASE, HUB + "/none"])
def test_secrets_in_a_url_are_not_in_messages(hub: Hub, tmp_path: Path, path: str) -> None:
    hub.faults = [Fault(status=418)]
    secret = hub.url.replace("://", "://user:secret@")
    with pytest.raises(PullFailed, match=r"418|404") as caught:
        download(secret + path, tmp_path).run()

    assert "secret" not in str(caught.value)
