import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cli.main import main


class Done(NamedTuple):
    """The end of a command."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


PvtServe = Callable[..., Done]


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_reaches_commands() -> Iterator[None]:
    """Also where the tests run in the background of a script: that ignores the signal, and processes inherit it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pvt_serve(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> PvtServe:
    """Runs a command in this process: pvt_serve("predict", path, ...)."""
    for name in ("PVT_URL", "PVT_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capfd.readouterr())

    return run


@pytest.fixture
def local_engine(monkeypatch: pytest.MonkeyPatch, model_store: Path) -> None:
    """Commands without --url load the embedded model in the way that takes least: nothing compiled, little measured."""
    monkeypatch.setenv("PVT_MODEL_STORE", str(model_store))
    for name, value in {"BACKEND": "torch", "INSTANCES": "1", "MAX_BATCH_SIZE": "1"}.items():
        monkeypatch.setenv(f"PVT_{name}", value)
