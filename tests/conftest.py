from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def readme() -> str:
    """The README's text."""
    return (ROOT / "README.md").read_text()


@pytest.fixture(scope="session", autouse=True)
def _no_plan_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans that tests measure are kept among tests only, those in processes they start included."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PVT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        environment.setenv("PVT_RELOAD_SECONDS", "0")  # the thread that watches a store takes its time to end
        yield


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_store() -> Path:
    """The store that is part of the project, with the embedded model."""
    return ROOT / "model_store"
