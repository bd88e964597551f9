"""Distributions built from the checkout, and installed in empty environments outside of it."""

import os
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path
from shutil import copytree, ignore_patterns
from sysconfig import get_path

from packaging.requirements import Requirement

from tests.conftest import ROOT


def build_service(folder: Path) -> Path:
    """The wheel of pvt-serve, built from a copy: setuptools leaves files where it builds."""
    source = folder / "source"
    for package in ("app", "cli", "pvt_client", "service", "model_store/pvt_v2_b0.digits"):
        copytree(ROOT / package, source / package, symlinks=True, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    return _build(source, folder)


def build_client(folder: Path) -> Path:
    """The wheel of pvt-client."""
    return _build(ROOT / "pvt_client", folder)


def _build(source: Path, folder: Path) -> Path:
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    # Where the checkout is on the path, pip finds it installed.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd="/", env=variables, timeout=110)


class Environment:
    """A virtual environment with `wheel` and what it requires, directly or not, and nothing else.

    The requirements are links to those of this environment, so that nothing is downloaded.
    """

    def __init__(self, wheel: Path, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        _pip("--python", self.bin / "python", "install", "--no-deps", "--no-index", "--no-compile", wheel)
        packages = Path(get_path("purelib", vars={"base": str(folder)}))
        (own,) = packages.glob("*.dist-info")
        for required in _required(Distribution.at(own)):
            for name in {file.parts[0] for file in required.files or ()} - {"..", "__pycache__"}:
                (packages / name).symlink_to(str(required.locate_file(name)))

    def run(self, *command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, to its end; raises CalledProcessError unless it exits with 0."""
        return subprocess.run(
            [self.bin / command[0], *command[1:]], cwd=cwd, env=self.variables(**variables), check=True,
            capture_output=True, text=True, timeout=110,
        )  # fmt: skip

    @staticmethod
    def variables(**variables: str) -> dict[str, str]:
        """The environment variables of a user who has never heard of this checkout."""
        return {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **variables}


def _required(root: Distribution) -> list[Distribution]:
    """Every distribution that `root` requires without extras of its own, directly or not."""
    found: dict[str, Distribution] = {}
    todo: list[tuple[Distribution, frozenset[str]]] = [(root, frozenset())]
    while todo:
        each, extras = todo.pop()
        for requirement in map(Requirement, each.requires or ()):
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            if requirement.name not in found:
                found[requirement.name] = distribution(requirement.name)
                todo.append((found[requirement.name], frozenset(requirement.extras)))
    unique = {str(each.locate_file("")) + each.name: each for each in found.values()}
    return list(unique.values())
