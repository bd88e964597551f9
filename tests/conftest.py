from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def readme() -> str:
    """The README's text."""
    return (ROOT / "README.md").read_text()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def model_store() -> Path:
    """The store that is part of the project, with the embedded model."""
    return ROOT / "model_store"
