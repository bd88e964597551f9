import fcntl
import os
import signal
import subprocess
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from service.architecture.pvt_v2 import create
from service.backends import cuda_compiling
from service.backends.base import Served
from service.backends.cuda_compiling import OPTIONS, Job, Placed, TorchCompiler

# Traces the whole module and compiles nothing.
QUICK: dict[str, Any] = {"backend": "aot_eager", "dynamic": False, "fullgraph": True}


def served(variant: str = "pvt_v2_b0") -> Served:
    torch.manual_seed(0)
    return Served(create(variant, num_classes=3), (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)).eval()


@pytest.mark.parametrize("variant", ["pvt_v2_b0", "pvt_v2_b2_li"])
def test_the_compiler_traces_a_placed_module_whole(variant: str) -> None:
    placed = Placed(served(variant), torch.float32).eval()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8))
    compiled = TorchCompiler(None, options=QUICK)(placed)

    with torch.no_grad():
        for mine, true in zip(compiled(pixels), placed(pixels), strict=True):
            torch.testing.assert_close(mine, true, atol=1e-4, rtol=1e-4)


def test_a_module_is_compiled_for_one_shape_and_without_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    options_seen: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda _, **options: options_seen.append(options))

    TorchCompiler(None)(nn.Identity())

    assert options_seen == [{"mode": "max-autotune-no-cudagraphs", "dynamic": False, "fullgraph": True}]
    assert dict(OPTIONS) == options_seen[0]


NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS")


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


@pytest.mark.usefixtures("unset")
def test_what_was_compiled_is_kept_in_the_cache(tmp_path: Path) -> None:
    TorchCompiler(tmp_path, 3)(nn.Identity())

    folder = str(tmp_path / "torch")
    assert [os.environ[name] for name in NAMES] == [folder, f"{folder}/triton", "1"]
    assert TorchCompiler(tmp_path, 3)._environment(tmp_path)[NAMES[2]] == "3"  # which the helper compiles with


@pytest.mark.usefixtures("unset")
def test_a_folder_that_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")

    TorchCompiler(tmp_path)(nn.Identity())

    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"


def test_a_helper_process_compiles_a_copy(tmp_path: Path) -> None:
    module = served()

    TorchCompiler(tmp_path, options=QUICK).prepare(Job(module, torch.float32, (1, 64, 64, 3), "cpu"), Event())

    assert not next(module.parameters()).is_meta  # it had a copy


def test_the_error_of_a_helper_process_is_reported_in_its_words(tmp_path: Path) -> None:
    compiler = TorchCompiler(tmp_path, options={**QUICK, "backend": "no_such_backend"})

    with pytest.raises(RuntimeError, match="no_such_backend"):
        compiler.prepare(Job(served(), torch.float32, (1, 64, 64, 3), "cpu"), Event())


def test_without_a_cache_there_is_no_helper_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.backends.cuda_compiling.subprocess.Popen", lambda *_, **__: pytest.fail("a process"))

    TorchCompiler(None).prepare(Job(served(), torch.float32, (1, 64, 64, 3), "cpu"), Event())


def test_a_helper_process_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("service.backends.cuda_compiling.os._exit", ended.append)
    monkeypatch.setattr("service.backends.cuda_compiling.sleep", lambda _: pytest.fail("slept"))

    cuda_compiling._watch(parent=os.getppid() + 1)

    assert ended == [1]


def test_a_helper_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.backends.cuda_compiling.HELPER_SECONDS", 0.01)

    with pytest.raises(subprocess.TimeoutExpired):
        TorchCompiler(tmp_path, options=QUICK).prepare(Job(served(), torch.float32, (1, 64, 64, 3), "cpu"), Event())


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[bytes]"]:
    """The helper processes that were started."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr("service.backends.cuda_compiling.subprocess.Popen", start)
    return started


def test_a_helper_process_ends_when_it_is_stopped(tmp_path: Path, helpers: list["subprocess.Popen[bytes]"]) -> None:
    stopped = Event()
    stopped.set()

    TorchCompiler(tmp_path, options=QUICK).prepare(Job(served(), torch.float32, (1, 64, 64, 3), "cpu"), stopped)

    assert [helper.returncode for helper in helpers] == [-signal.SIGKILL]


def test_a_stopped_job_does_not_wait_for_another_process(
    tmp_path: Path, helpers: list["subprocess.Popen[bytes]"]
) -> None:
    stopped = Event()
    stopped.set()
    with (tmp_path / "torch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would
        TorchCompiler(tmp_path, options=QUICK).prepare(Job(served(), torch.float32, (1, 64, 64, 3), "cpu"), stopped)

    assert helpers == []
