from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.remotes import S3, add_small


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    server = S3()
    yield server
    server.server.stop()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A server of the S3 protocol, which the environment names."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store in a folder, with one small model that can't be loaded."""
    root = tmp_path / "source"
    add_small(root)
    return root
