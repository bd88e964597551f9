"""Signals while it starts: nothing is under way, so it ends at once, in order, and without a traceback."""

import os
import signal
import subprocess
import sys

import pytest

from tests.app.processes import ROOT

# In the place of torch, whose import takes seconds and must not be cut short by luck.
TORCH = """
import sys, time
print("importing", file=sys.stderr, flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("command", "workers", "sig"),
    [
        (["-m", "app"], "1", signal.SIGTERM),
        (["-m", "app"], "1", signal.SIGINT),
        (["-m", "app"], "2", signal.SIGTERM),
        (["-m", "cli", "serve"], "1", signal.SIGTERM),
        (["-m", "cli", "serve"], "2", signal.SIGINT),
    ],
)
def test_a_signal_in_the_midst_of_imports_ends_it_with_0_and_not_a_word(
    tmp_path_factory: pytest.TempPathFactory, command: list[str], workers: str, sig: signal.Signals
) -> None:
    folder = tmp_path_factory.mktemp("start")  # a short name, as those of sockets must be
    (folder / "torch.py").write_text(TORCH)
    socket = folder / "socket"
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "PVT_HOST": f"unix:{socket}",
        "PVT_WORKERS": workers,
        "TMPDIR": str(folder),
    }
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        try:
            for _ in range(int(workers)):
                assert process.stderr.readline() == "importing\n"
            assert socket.exists()

            process.send_signal(sig)
            said = process.stderr.read()  # to its end, which is that of the last process
        finally:
            process.kill()

    assert process.returncode == 0
    assert [line for line in said.splitlines() if '"event":"draining"' not in line] == []
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["torch.py"]
