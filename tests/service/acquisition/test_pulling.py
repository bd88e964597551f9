"""Pulling: from a server like the hub into a store, and what may go wrong on the way."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import numpy as np
import pytest
import safetensors.torch
import torch

from service.acquisition.catalogue import (
    DEFAULT_SOURCE,
    SIDE,
    Published,
    SourceName,
    imagenet_labels,
)
from service.acquisition.download import RetryPolicy
from service.acquisition.preprocessing import PRESETS
from service.acquisition.publishing import PULL_FOLDER, verify
from service.acquisition.pulling import Pulled, PullOptions, pull
from service.architecture.weights import read_checkpoint, remap_keys
from service.backends.base import build, plain_logits
from service.errors import (
    PullFailed,
    ServiceError,
    StoreNotWritable,
    WeightsCorrupt,
    WeightsDigestMismatch,
    WeightsMismatch,
    WeightsNotFinite,
    WeightsUnsafe,
)
from service.execution.reference import reference_of
from service.files import file_sha256
from service.store.cards import Preprocessing
from service.store.folder import removable, remove
from service.store.store import Store
from tests.conftest import ROOT
from tests.service.checkpoints import B0, checkpoint, official, path_of, pickled, transformers_state
from tests.service.hub import Fault, Hub, serving_hub
from tests.service.stores import add_model

NOBODY = 65534
QUICK = RetryPolicy(attempts=2, timeout_seconds=30, backoff_seconds=0.001)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def _quick_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden outputs of the true size take long, and threads wait for one another on a busy machine."""
    monkeypatch.setattr("service.acquisition.pulling.SIDE", 32)
    torch.set_num_threads(1)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One with a model in it that must not come to harm."""
    add_model(tmp_path)
    return tmp_path


def fetched(
    hub: Hub,
    store: Path,
    source: SourceName = DEFAULT_SOURCE,
    *,
    model: Published = B0,
    again: bool = False,
) -> Pulled:
    return pull(store, model, PullOptions(source=source, mirror=hub.url, policy=QUICK), again=again)


def unharmed(store: Path) -> bool:
    """The other model is there, nothing half-made is, and everything that is there verifies."""
    left = {path.name for path in store.rglob("*") if path.name.startswith(("new-", ".gone"))}
    return not left and (store / "pvt_v2_b0.tiny").is_dir() and not [v for v in verify(store) if v.failure]


@pytest.mark.parametrize("source", ["timm", "opengvlab", "official", "lucid"])
def test_each_source_becomes_the_same_kind_of_model(hub: Hub, store: Path, source: SourceName) -> None:
    content = checkpoint(source)
    hub.put(path_of(source), content)
    model = B0
    if source == "lucid":  # the published digest is that of the true file
        remote = replace(B0.file("lucid"), sha256=sha256(content).hexdigest())
        model = replace(B0, files=MappingProxyType({"lucid": remote}))

    stored = fetched(hub, store, source, model=model).stored

    card = stored.require_card()
    assert Store(store).find("pvt_v2_b0").require_card() == card
    assert (card.id, stored.version, card.labels) == ("pvt_v2_b0.in1k", "1", imagenet_labels())
    assert (card.parameters, card.licence, card.source) == (3_666_760, "Apache-2.0", B0.file(source).urls[0])
    assert card.accuracy
    assert card.accuracy.top1 == 0.705
    assert card.origin
    assert card.origin.url == hub.url + path_of(source)
    preset = PRESETS[B0.file(source).library]
    assert card.preprocessing == preset.model_copy(update={"height": 32, "width": 32})
    assert card.origin.digest_from == {"official": "nobody", "lucid": "publisher"}.get(source, "hub")
    wanted = remap_keys(transformers_state() if source == "opengvlab" else official())
    found = read_checkpoint(stored.folder / card.weights.file, sha256=card.weights.sha256)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert unharmed(store)


PREPROCESSOR = "/OpenGVLab/pvt_v2_b0/resolve/main/preprocessor_config.json"


def test_what_a_repository_of_transformers_says_of_images_is_in_the_card(hub: Hub, store: Path) -> None:
    content = {"size": {"height": 64, "width": 96}, "resample": 2, "image_processor_type": "PvtImageProcessor"}
    hub.put(path_of("opengvlab"), checkpoint("opengvlab"))
    hub.put(PREPROCESSOR, json.dumps(content).encode())

    pixels = fetched(hub, store, "opengvlab").stored.require_card().preprocessing

    assert (pixels.height, pixels.width, pixels.resize, pixels.interpolation) == (64, 96, "stretch", "bilinear")
    assert unharmed(store)
    assert {path.name for path in (store / ".pull").iterdir()} == {"pvt_v2_b0.in1k.lock"}


def test_a_repository_that_says_what_no_card_can_is_refused_before_its_weights_are_fetched(
    hub: Hub, store: Path
) -> None:
    hub.put(path_of("opengvlab"), checkpoint("opengvlab"))
    hub.put(PREPROCESSOR, b'{"resample": 5}')

    with pytest.raises(
        PullFailed, match=r"preprocessor_config\.json: resample: Input should be 0, 1, 2, 3 or 4; try another"
    ):
        fetched(hub, store, "opengvlab")
    assert len(hub.requests) == 1
    hub.put(PREPROCESSOR, b"{}")
    stored = fetched(hub, store, "opengvlab").stored

    assert stored.require_card().preprocessing == PRESETS["transformers"]
    assert unharmed(store)


def test_golden_outputs_are_those_of_the_plain_module(hub: Hub, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.acquisition.pulling.SIDE", SIDE)
    hub.put(path_of("timm"), checkpoint("timm"))
    stored = fetched(hub, store).stored

    card = stored.require_card()
    reference = reference_of(card, stored.folder)

    assert reference
    assert card.preprocessing == Preprocessing(height=224, width=224, crop=0.9, interpolation="bicubic")
    assert reference.images.shape == (8, 224, 224, 3)
    np.testing.assert_allclose(
        plain_logits(build(card, stored.folder), reference.images), reference.logits, rtol=0, atol=1e-4
    )


def test_what_is_in_the_store_is_not_fetched_again_unless_requested(hub: Hub, store: Path) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    first = fetched(hub, store)
    second = fetched(hub, store)
    third = fetched(hub, store, again=True)

    assert (first.fresh, second.fresh, third.fresh) == (True, False, True)
    assert [each.stored.version for each in (first, second, third)] == ["1", "1", "2"]
    assert len(hub.requests) == 2
    assert not [path for path in (store / PULL_FOLDER).iterdir() if path.suffix != ".lock"]


def test_a_version_whose_weights_were_damaged_is_fetched_again(hub: Hub, store: Path) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    weights = fetched(hub, store).stored.folder / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)

    assert fetched(hub, store).stored.version == "2"


def test_the_second_name_of_a_file_is_tried_where_there_is_no_first(hub: Hub, store: Path) -> None:
    hub.put(path_of("opengvlab", 1), pickled(transformers_state()))

    assert fetched(hub, store, "opengvlab").stored.require_card().origin


def test_a_source_that_has_no_such_file_says_so(hub: Hub, store: Path) -> None:
    with pytest.raises(PullFailed, match="answers 404: there is no such file"):
        fetched(hub, store, "opengvlab")

    assert unharmed(store)


def test_without_a_published_digest_the_first_file_is_trusted_and_no_other(hub: Hub, store: Path) -> None:
    hub.put(path_of("official"), checkpoint("official"))
    fetched(hub, store, "official")
    hub.put(path_of("official"), pickled(dict(official()) | {"head.bias": torch.ones(1000)}))

    with pytest.raises(WeightsDigestMismatch, match=r"has changed: .*pvt-serve rm pvt_v2_b0.in1k@1"):
        fetched(hub, store, "official", again=True)

    remove(store, removable(store, "pvt_v2_b0.in1k@1"))
    assert fetched(hub, store, "official").fresh


def nan_laden() -> bytes:
    weight = official()["head.weight"].clone()
    weight[3, 4] = float("nan")
    return pickled(dict(official()) | {"head.weight": weight})


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/pvt-serve-test-was-here",)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param(lambda: checkpoint("official")[:-1000], WeightsCorrupt, id="truncated"),
        pytest.param(lambda: b"<html>Sign in</html>", WeightsCorrupt, id="a page"),
        pytest.param(lambda: b"", PullFailed, id="empty"),
        pytest.param(nan_laden, WeightsNotFinite, id="NaN"),
        pytest.param(lambda: pickled(dict(official()) | {"head.bias": Code()}), WeightsUnsafe, id="code"),
        pytest.param(lambda: bytes(31_000_000), PullFailed, id="far too large"),
        pytest.param(lambda: checkpoint_of(10), WeightsMismatch, id="10 classes"),
    ],
)
def test_a_file_that_is_no_such_model_leaves_the_store_as_it_was(
    hub: Hub, store: Path, content: object, error: type[ServiceError]
) -> None:
    assert callable(content)
    hub.put(path_of("official"), content())
    with pytest.raises(error):
        fetched(hub, store, "official")

    assert unharmed(store)
    assert not Path("/tmp/pvt-serve-test-was-here").exists()  # noqa: S108
    hub.put(path_of("official"), checkpoint("official"))
    assert fetched(hub, store, "official").fresh


def checkpoint_of(classes: int) -> bytes:
    return pickled(official(classes))


def test_bits_that_flip_on_the_way_are_noticed(hub: Hub, store: Path) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    hub.faults = [Fault(spoil=True)] * 2
    with pytest.raises(WeightsDigestMismatch, match="twice; nothing was kept"):
        fetched(hub, store)

    assert unharmed(store)
    assert fetched(hub, store).fresh


@contextmanager
def pulling_process(hub: Hub, store: Path) -> Iterator[subprocess.Popen[str]]:
    code = "import sys; from pathlib import Path; from service.acquisition import pulling\n"
    code += "from service.acquisition.catalogue import CATALOGUE\n"
    code += "made = pulling.pull(Path(sys.argv[1]), CATALOGUE['pvt_v2_b0'], pulling.PullOptions(mirror=sys.argv[2]))\n"
    code += "print(made.stored.key, made.fresh)"
    command = [sys.executable, "-c", code, str(store), hub.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_processes_that_pull_at_once_fetch_it_once(hub: Hub, store: Path) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    released, begun = threading.Event(), threading.Event()
    hub.faults = [Fault(hold=released, begun=begun)]

    with pulling_process(hub, store) as process, ThreadPoolExecutor(2) as pool:
        assert begun.wait(60)
        both = [pool.submit(fetched, hub, store) for _ in range(2)]
        released.set()
        output, _ = process.communicate(timeout=60)
        results = [each.result(60) for each in both]

    assert output.split() == ["pvt_v2_b0.in1k@1", "True"]
    assert [(each.stored.version, each.fresh) for each in results] == [("1", False)] * 2
    assert len(hub.requests) == 1
    assert unharmed(store)


def test_a_process_that_is_killed_in_the_middle_leaves_a_part_from_which_the_next_resumes(
    hub: Hub, store: Path
) -> None:
    hub.put(path_of("timm"), content := checkpoint("timm"))
    released, begun = threading.Event(), threading.Event()
    hub.faults = [Fault(hold=released, begun=begun)]
    part = store / PULL_FOLDER / "pvt_v2_b0.in1k.timm" / f"{sha256(content).hexdigest()}.safetensors"

    with pulling_process(hub, store) as process:
        assert begun.wait(60)
        while not part.exists() or part.stat().st_size < len(content) // 4:
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"it ended with {process.wait(0.01)}")
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    released.set()
    assert unharmed(store)
    kept = part.stat().st_size

    assert fetched(hub, store).fresh
    assert hub.requests[1]["Range"] == f"bytes={kept}-"
    assert not part.exists()
    assert unharmed(store)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write more, as it does on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_while_fetching_is_reported_and_left_empty(hub: Hub, store: Path) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    with files_of_at_most(5_000_000), pytest.raises(StoreNotWritable, match=r"can't be written .*File too large"):
        fetched(hub, store)

    assert not [path for path in store.rglob("*") if path.name.startswith("pvt_v2_b0.in1k.timm")]
    assert unharmed(store)
    assert fetched(hub, store).fresh


def test_a_disk_that_takes_no_more_while_converting_is_reported_and_left_empty(hub: Hub, store: Path) -> None:
    small = {name: tensor.half() for name, tensor in official().items()}
    hub.put(path_of("official"), pickled(small))
    with files_of_at_most(10_000_000), pytest.raises(StoreNotWritable, match="File too large"):
        fetched(hub, store, "official")

    assert unharmed(store)
    assert fetched(hub, store, "official").fresh


@contextmanager
def without_rights() -> Iterator[None]:
    """As a user whom permissions stop."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_store_is_reported_and_goes_on_serving(hub: Hub) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    with TemporaryDirectory() as name:  # whose parents every user may enter
        store = Path(name)
        add_model(store)
        store.chmod(0o555)
        with without_rights():
            with pytest.raises(
                StoreNotWritable, match=r"can't be written \(Permission denied\); write to a store where"
            ):
                fetched(hub, store)
            assert Store(store).find("pvt_v2_b0.tiny").card
        store.chmod(0o755)

        assert hub.requests == []
        assert fetched(hub, store).fresh


def test_a_pull_that_waits_for_another_can_be_stopped(hub: Hub, store: Path) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    released, begun, stop = threading.Event(), threading.Event(), threading.Event()
    hub.faults = [Fault(hold=released, begun=begun)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetched, hub, store)
        assert begun.wait(60)
        stop.set()
        with pytest.raises(PullFailed, match=r"stopped while another process pulled pvt_v2_b0.in1k"):
            pull(store, B0, PullOptions(mirror=hub.url), stop=stop)
        released.set()

        assert first.result(60).fresh


def test_the_file_of_a_model_is_what_its_card_says(hub: Hub, store: Path) -> None:
    hub.put(path_of("timm"), checkpoint("timm"))
    stored = fetched(hub, store).stored

    card = stored.require_card()
    assert file_sha256(stored.folder / "model.safetensors") == card.weights.sha256
    assert len(safetensors.torch.load_file(stored.folder / "model.safetensors")) == len(official())
    assert B0.file("timm").sha256 is None


def test_a_mirror_takes_the_place_of_scheme_and_host() -> None:
    url = B0.file("official").urls[0]

    assert PullOptions().address(url) == (url, False)
    assert PullOptions(mirror="http://mirror:8080/models/").address(url) == (
        "http://mirror:8080/models/whai362/PVT/releases/download/v2/pvt_v2_b0.pth",
        False,
    )


def test_the_hub_may_be_another_and_only_it_gets_the_users_token(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, release = B0.file("timm").urls[0], B0.file("official").urls[0]
    mirrored = PullOptions(mirror="https://mirror.example/base")
    assert PullOptions().address(timm) == (timm, True)
    assert mirrored.address(timm) == (f"https://mirror.example/base{path_of('timm')}", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")

    assert PullOptions().address(timm) == (f"https://hub.example{path_of('timm')}", True)
    assert PullOptions().address(release) == (release, False)
    assert mirrored.address(timm) == (f"https://mirror.example/base{path_of('timm')}", False)
