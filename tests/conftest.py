import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.app.processes import LIGHT, serving

ROOT = Path(__file__).parent.parent
# Threads that wait for one another give their core to the tests beside them; read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from tests.vision import define_operators  # noqa: E402  with it comes torch

define_operators()  # before any test imports what imports torchvision


@pytest.fixture(scope="session", autouse=True)
def _modules_are_no_garbage() -> None:
    """Every load and unload looks for garbage, as in the service, which leaves out what is there at its start too."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_plan_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans that tests measure are kept among tests only, those in processes they start included."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PVT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("PVT_RELOAD_SECONDS", "0")  # the thread that watches a store takes its time to end
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_runs_for_a_measurement() -> Iterator[None]:
    """What is loaded in a test is timed as always, though not as often: nobody looks at how exact it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.execution.plan._RUNS", 2)
        patch.setattr("service.execution.plan._MIN_RUNS", 2)
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_store() -> Path:
    """The store that is part of the project, with the embedded model."""
    return ROOT / "model_store"


@pytest.fixture(scope="session")
def digits() -> Path:
    """The folder of example images: zero.png to nine.png."""
    return ROOT / "docs" / "digits"


@pytest.fixture(scope="session")
def service_url() -> Iterator[str]:
    """`pvt-serve serve` with the embedded model, loaded in the way that takes least; options win over variables."""
    command = ("-m", "cli", "serve", "--port", "0")
    with serving(read_log=False, command=command, port="1", **LIGHT) as server:
        yield server.url
