"""Imports run one way: cli -> app -> service, and inside service from the top of each list to its bottom."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Of the service, and of each of its packages. Those of one row do not import each other.
LAYERS = {
    "": [
        {"labelled"},
        {"engine"},
        {"registry"},
        {"acquisition", "pipeline"},
        {"options"},
        {"scheduling"},
        {"execution"},
        {"backends"},
        {"content_cache", "postprocess", "tracing"},
        {"results"},
        {"store"},
        {"images"},
        {"architecture"},
        {"memory"},
        {"machine", "workers"},
        {"sharing"},
        {"metrics"},
        {"awake", "errors", "files", "names", "recent"},
    ],
    "registry": [
        {"canaries", "loading"},
        {"catalog", "loader"},
        {"registry", "resident"},
        {"versions"},
        {"residency"},
    ],
    "acquisition": [
        {"repositories"},
        {"importing", "pulling"},
        {"folders", "publishing"},
        {"configs"},
        {"answers", "preprocessing", "proof"},
        {"catalogue", "download"},
    ],
    "labelled": [{"checking", "publishing"}, {"fitting", "running"}, {"folder", "measures"}],
    "scheduling": [{"scheduler"}, {"dispatcher"}, {"lanes"}, {"queues"}],
    "execution": [{"executable"}, {"tuning"}, {"plan_cache", "reference"}, {"plan"}],
    "backends": [{"cpu", "cuda"}, {"cuda_compiling"}, {"base"}, {"folding"}],
    "store": [
        {"remote"},
        {"folder", "location"},
        {"store"},
        {"cards"},
    ],
    "images": [
        {"decoding"},
        {"costs", "sampling"},
        {"tiff"},
        {"formats", "jpeg"},
        {"kinds", "camera_raw"},
        {"header"},
        {"av1", "limits", "resampling"},
        {"geometry"},
    ],
    "architecture": [{"weights"}, {"checkpoints", "pickles"}, {"dialects", "pvt_v2"}, {"variants"}],
}
FOREIGN_TO_APP = {"cli", "pvt_client", "torch", "PIL", "openvino"}
ARRAYS = {"numpy", "safetensors"}  # known only where arrays become bytes, and bytes arrays
# Modules of the standard library that are missing on Windows or macOS.
UNIX_ONLY = {
    "crypt", "curses", "fcntl", "grp", "nis", "ossaudiodev", "posix", "pty", "pwd", "readline", "resource", "spwd",
    "syslog", "termios", "tty",
}  # fmt: skip
FOREIGN_TO_SERVICE = {
    "app",
    "cli",
    "pvt_client",
    "fastapi",
    "starlette",
    "uvicorn",
    "httpx",
    "httpx2",
    "huggingface_hub",
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def parts_of(package: str) -> dict[str, list[Path]]:
    """The files of each module or package that lies in `package` of the service; "" is the service itself."""
    folder = ROOT / "service" / package
    parts: dict[str, list[Path]] = {}
    for path in folder.rglob("*.py"):
        parts.setdefault(path.relative_to(folder).parts[0].removesuffix(".py"), []).append(path)
    parts.pop("__init__")
    return parts


def test_every_module_of_the_service_has_its_layer() -> None:
    packages = {path.parent.relative_to(ROOT / "service") for path in (ROOT / "service").rglob("*.py")}

    assert {str(package).removeprefix(".") for package in packages} == set(LAYERS)
    for package, layers in LAYERS.items():
        assert set(parts_of(package)) == set().union(*layers), package


@pytest.mark.parametrize("package", LAYERS)
def test_service_imports_run_downwards(package: str) -> None:
    prefix = f"service.{package.replace('/', '.')}." if package else "service."
    level = {part: number for number, layer in enumerate(LAYERS[package]) for part in layer}
    upwards = [
        f"{prefix}{part} -> {name}"
        for part, paths in parts_of(package).items()
        for path in paths
        for name in imports(path)
        if name.startswith(prefix) and (target := name.removeprefix(prefix).split(".")[0]) != part
        if level[target] <= level[part]
    ]

    assert upwards == []


def test_no_module_leads_back_to_itself() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("app", "bench", "cli", "pvt_client", "service", "training")
        for path in (ROOT / package).rglob("*.py")
    }
    towards = {
        module: {name if name in names else name.rpartition(".")[0] for name in imports(path)} & set(names) - {module}
        for module, path in names.items()
    }

    TopologicalSorter(towards).prepare()


def test_the_service_knows_no_http_but_where_it_downloads() -> None:
    assert {path.name: roots(path) & FOREIGN_TO_SERVICE for path in (ROOT / "service").rglob("*.py")
            if roots(path) & FOREIGN_TO_SERVICE} == {
        "download.py": {"httpx2", "huggingface_hub"},
        "folders.py": {"huggingface_hub"},  # how its model cards are read
        "pulling.py": {"huggingface_hub"},  # where its hub is
    }  # fmt: skip


def test_the_app_knows_no_tensors() -> None:
    assert {path.name: roots(path) & FOREIGN_TO_APP for path in (ROOT / "app").rglob("*.py")
            if roots(path) & FOREIGN_TO_APP} == {}  # fmt: skip
    assert {path.name for path in (ROOT / "app").rglob("*.py") if roots(path) & ARRAYS} == {
        "data_urls.py",
        "encodings.py",
        "tensors.py",
    }


def test_the_client_knows_only_httpx_and_numpy_and_what_every_platform_has() -> None:
    known = {"httpx", "numpy", "pvt_client"} | (sys.stdlib_module_names - UNIX_ONLY)

    assert {path.name: roots(path) - known for path in (ROOT / "pvt_client").rglob("*.py") if roots(path) - known} == {}
