import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cli.embeddings import growing_table
from tests.cli.conftest import PvtServe
from tests.conftest import ROOT
from tests.pvt_client.scripted import Received, Scripted, problem_fields, refused, response, scripted

DIMENSIONS = 4


def vector(data: bytes) -> list[float]:
    return [each / 256 for each in hashlib.sha256(data).digest()[:DIMENSIONS]]


def features(connection: socket.socket, received: Received, *, version: str = "1") -> None:
    """An embedding of each image that depends on its bytes."""
    if b"bad" in received.images and len(received.images) == 1:
        connection.sendall(refused(422, "invalid-image"))
        return
    results = [
        {"filename": None, "error": problem_fields(422, "invalid-image")}
        if data == b"bad"
        else {"filename": None, "width": 6, "height": 5, "embedding": vector(data)}
        for data in received.images
    ]
    connection.sendall(response(200, json.dumps({"model": "m", "version": version, "results": results}).encode()))


def singly(connection: socket.socket, received: Received) -> None:
    """The same, of one image in a request; the second request of a client tries two."""
    if len(received.images) > 1:
        connection.sendall(refused(422, "too-many-images"))
    else:
        features(connection, received)


def images_of(requests: Sequence[Received]) -> list[bytes]:
    return [data for each in requests for data in each.images]


def newer(connection: socket.socket, received: Received) -> None:
    features(connection, received, version="2")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 23 different files that a scripted service takes for images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(23):
        (folder / f"{number:02}.png").write_bytes(b"image %d" % number)
    return folder


def read(table: Path) -> dict[str, Any]:
    if table.suffix == ".npz":
        with np.load(table, allow_pickle=False) as file:
            return {name: file[name].tolist() for name in file.files}
    columns: dict[str, Any] = pq.read_table(table).to_pydict()
    return columns


def check(table: Path, folder: Path) -> None:
    """Every image of `folder` has exactly one row, with its embedding."""
    columns = read(table)
    rows = dict(zip(columns["path"], columns["embedding"], strict=True))
    assert sorted(columns["path"]) == sorted(str(path) for path in folder.iterdir() if b"bad" not in path.read_bytes())
    for path, embedding in rows.items():
        assert embedding == vector(Path(path).read_bytes())


@pytest.fixture(params=["out.parquet", "out.npz"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def test_every_image_becomes_a_row(pvt_serve: PvtServe, images: Path, table: Path) -> None:
    with scripted(features) as server:
        done = pvt_serve("embed", images, "-o", table, "--url", server.url, "--group", "5")

    check(table, images)
    columns = read(table)
    assert (columns["width"][0], columns["height"][0], columns["model"][0], columns["version"][0]) == (6, 5, "m", "1")
    assert columns["bytes"][0] == len(b"image 0")
    assert (done.code, done.out) == (0, f"{table}: 23 rows, 23 of them new, 0 skipped, 0 bad\n")
    assert sorted(each.name for each in table.parent.iterdir()) == sorted(["images", table.name])


def test_parquet_holds_vectors_of_fixed_size_in_row_groups(pvt_serve: PvtServe, images: Path, tmp_path: Path) -> None:
    with scripted(features) as server:
        pvt_serve("embed", images, "-o", tmp_path / "out.parquet", "--url", server.url, "--group", "5")

    with pq.ParquetFile(tmp_path / "out.parquet") as file:
        assert file.num_row_groups == 5
        assert str(file.schema_arrow.field("embedding").type) == "fixed_size_list<element: float>[4]"


def test_a_second_run_keeps_the_size_of_row_groups(pvt_serve: PvtServe, images: Path, tmp_path: Path) -> None:
    command = ("embed", images, "-o", tmp_path / "out.parquet", "--model", "m", "--group", "5")
    with scripted(features) as server:
        pvt_serve(*command, "--url", server.url)
        for number in range(3):
            (images / f"{number:02}.png").write_bytes(b"changed %d" % number)
        pvt_serve(*command, "--url", server.url)

    with pq.ParquetFile(tmp_path / "out.parquet") as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [5, 5, 5, 5, 3]
    check(tmp_path / "out.parquet", images)


def test_a_second_run_embeds_only_new_and_changed_images(pvt_serve: PvtServe, images: Path, table: Path) -> None:
    with scripted(features) as server:
        command = ("embed", images, "-o", table, "--model", "m", "--url", server.url, "--group", "5")
        pvt_serve(*command)
        (images / "new.png").write_bytes(b"a new one")
        (images / "03.png").write_bytes(b"a changed one")
        server.requests.clear()

        done = pvt_serve(*command)

        assert sorted(images_of(server.requests)) == [b"a changed one", b"a new one"]
        server.requests.clear()
        again = pvt_serve(*command)
    assert done.out == f"{table}: 24 rows, 2 of them new, 22 skipped, 0 bad\n"
    assert (again.out, server.requests) == (f"{table}: 24 rows, 0 of them new, 24 skipped, 0 bad\n", [])
    check(table, images)


def test_bad_files_are_listed_at_the_end_and_tried_again(pvt_serve: PvtServe, images: Path, table: Path) -> None:
    (images / "05.png").write_bytes(b"bad")
    (images / "07.png").unlink()
    (images / "07.png").symlink_to("nowhere")
    with scripted(features) as server:
        done = pvt_serve("embed", images, "-o", table, "--model", "m", "--url", server.url)
        (images / "05.png").write_bytes(b"mended")
        (images / "07.png").unlink()
        server.requests.clear()
        mended = pvt_serve("embed", images, "-o", table, "--model", "m", "--url", server.url, "--json")

    assert done.code == 3
    assert done.err.splitlines() == [
        "2 could not be embedded:",
        f"  {images / '07.png'}: No such file or directory",
        f"  {images / '05.png'}: invalid-image (422): d",
    ] or done.err.splitlines()[1:] == [
        f"  {images / '05.png'}: invalid-image (422): d",
        f"  {images / '07.png'}: No such file or directory",
    ]
    assert json.loads(mended.out) == {
        "output": str(table), "rows": 22, "embedded": 1, "skipped": 21, "bad": 0, "errors": [],
    }  # fmt: skip
    assert images_of(server.requests) == [b"mended"]
    check(table, images)


def killed(server: Scripted, table: Path, images: Path) -> None:
    """Run in another process, one request at a time, five rows a part, and kill it while the 14th image waits."""
    reached = threading.Event()

    def hold(connection: socket.socket, _: Received) -> None:
        reached.set()
        connection.recv(1)

    server.behaviours[:] = [singly] * 14 + [hold]
    arguments = ["-o", str(table), "--url", server.url, "--group", "5", "--concurrency", "1", "--model", "m"]
    command = [sys.executable, "-m", "cli", "embed", str(images), *arguments]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            assert reached.wait(60)
        finally:
            process.send_signal(signal.SIGKILL)


def test_a_run_that_is_killed_loses_less_than_a_row_group(pvt_serve: PvtServe, images: Path, table: Path) -> None:
    with scripted(features) as server:
        killed(server, table, images)
        assert not table.exists()
        server.behaviours[:] = [features]
        server.requests.clear()

        done = pvt_serve("embed", images, "-o", table, "--model", "m", "--url", server.url, "--group", "5")

    # The 14th image is sent only after the tenth result was taken, and so the second part written.
    assert len(images_of(server.requests)) == 13
    assert b"image 9" not in images_of(server.requests)
    assert done.out == f"{table}: 23 rows, 13 of them new, 10 skipped, 0 bad\n"
    check(table, images)


def test_a_crash_between_the_whole_file_and_the_end_of_its_parts_doubles_nothing(
    pvt_serve: PvtServe, images: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(features) as server:
        command = ("embed", images, "-o", table, "--model", "m", "--url", server.url, "--group", "5")
        with monkeypatch.context() as context:
            context.setattr(Path, "unlink", _crash)
            assert pvt_serve(*command).code == 1
        assert (table.exists(), len(list(table.parent.glob("*.parts/*.npz")))) == (True, 5)
        (images / "new.png").write_bytes(b"a new one")

        done = pvt_serve(*command)

    assert done.out == f"{table}: 24 rows, 1 of them new, 23 skipped, 0 bad\n"
    check(table, images)


def _crash(*_: object, **__: object) -> None:
    raise OSError("crashed")


def test_an_error_that_ends_a_run_loses_no_embedding(pvt_serve: PvtServe, images: Path, table: Path) -> None:
    with scripted(*[singly] * 9, refused(503, "model-load-failed")) as server:
        command = ("embed", images, "-o", table, "--model", "m", "--url", server.url, "--concurrency", "1")
        done = pvt_serve(*command)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("pvt-serve: model-load-failed (503)")
        server.behaviours[:] = [features]
        server.requests.clear()
        pvt_serve(*command)

    assert len(images_of(server.requests)) == 23 - 8
    check(table, images)


@pytest.mark.parametrize("options", [["--normalize"], ["--size", "64"]])
def test_embeddings_that_can_not_be_compared_do_not_mix(
    pvt_serve: PvtServe, images: Path, table: Path, options: list[str]
) -> None:
    with scripted(features) as server:
        command = ("embed", images, "-o", table, "--url", server.url)
        pvt_serve(*command)
        done = pvt_serve(*command, *options)
        fresh = pvt_serve(*command, *options, "--fresh")

    assert done.code == 2
    assert "give --fresh to begin anew" in done.err
    assert (fresh.code, fresh.out) == (0, f"{table}: 23 rows, 23 of them new, 0 skipped, 0 bad\n")


def test_another_version_of_the_model_is_noticed_though_all_is_done(
    pvt_serve: PvtServe, images: Path, table: Path
) -> None:
    with scripted(features) as server:
        command = ("embed", images, "-o", table, "--url", server.url)
        pvt_serve(*command)
        server.behaviours[:] = [newer]
        done = pvt_serve(*command)

    assert (done.code, "holds embeddings of m@1, these are of m@2" in done.err) == (2, True)


def test_two_runs_do_not_write_one_file(pvt_serve: PvtServe, images: Path, table: Path) -> None:
    with growing_table(table, 5), scripted(features) as server:
        done = pvt_serve("embed", images, "-o", table, "--url", server.url)

    assert (done.code, done.err, server.requests) == (1, f"pvt-serve: another run is writing {table}\n", [])


@pytest.mark.parametrize("content", [b"", b"something else", b"PK\x03\x04", b"PAR1PAR1"])
def test_a_file_of_something_else_is_not_overwritten(
    pvt_serve: PvtServe, images: Path, table: Path, content: bytes
) -> None:
    table.write_bytes(content)

    done = pvt_serve("embed", images, "-o", table, "--url", "localhost:1")

    assert (done.code, done.err.count("\n"), table.read_bytes()) == (1, 1, content)
    assert "is no table of embeddings" in done.err


def test_an_output_of_another_kind_is_a_usage_error(pvt_serve: PvtServe, images: Path) -> None:
    done = pvt_serve("embed", images, "-o", "out.csv")

    assert (done.code, done.err) == (2, "pvt-serve: out.csv: the name must end in .npz or .parquet\n")


def test_without_pyarrow_parquet_says_what_to_install(
    pvt_serve: PvtServe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    done = pvt_serve("embed", images, "-o", tmp_path / "out.parquet")

    assert (done.code, done.out) == (2, "")
    assert "pip install 'pvt-serve[parquet]'" in done.err


def test_a_full_disk_is_one_line_and_keeps_what_was_written(
    pvt_serve: PvtServe, images: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with scripted(features) as server:
        command = ("embed", images, "-o", table, "--model", "m", "--url", server.url)
        with monkeypatch.context() as context:
            context.setattr(os, "fsync", full)
            done = pvt_serve(*command)
        assert (done.code, done.err) == (1, "pvt-serve: [Errno 28] No space left on device\n")
        pvt_serve(*command)

    check(table, images)


@pytest.mark.usefixtures("local_engine")
def test_without_a_service_embeddings_are_the_engine_s(pvt_serve: PvtServe, digits: Path, tmp_path: Path) -> None:
    table = tmp_path / "out.parquet"
    done = pvt_serve("embed", digits, "-o", table, "--normalize")

    columns = read(table)
    assert (done.code, len(columns["path"])) == (0, 10)
    assert np.linalg.norm(columns["embedding"], axis=1) == pytest.approx(np.ones(10), abs=1e-6)
    assert set(columns["width"]) == {64}
