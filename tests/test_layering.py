"""Imports run one way: cli -> app -> service, and inside service from the top of this list to its bottom."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Modules of one row do not import each other.
LAYERS = [
    {"engine"},
    {"models"},
    {"sourcing", "listing"},
    {"residents"},
    {"pipeline", "loading", "supply"},
    {"loader", "registry", "watching", "on_demand"},
    {"reload", "executable"},
    {"improving"},
    {"holdings", "name_table"},
    {"entries", "golden"},
    {"footprints"},
    {"remote"},
    {"pulling", "importing", "verification", "removal"},
    {"publishing"},
    {"scheduler", "store", "options", "tuning"},
    {"pictures"},
    {"dispatcher", "plan_cache", "reference"},
    {"backends"},
    {"features", "explain", "tensors"},
    {"pixel_lists"},
    {"served", "stored", "results", "catalogue"},
    {"mirror", "byte_cache"},
    {"locations"},
    {"cards"},
    {"store_index"},
    {"aliases"},
    {"names"},
    {"admission"},
    {"lanes"},
    {"activity"},
    {"queues"},
    {"plan", "weights", "images"},
    {"encodings", "download"},
    {"replies"},
    {"outputs", "pvt_v2", "image_limits", "resampling"},
    {"visible", "partial", "writes", "labels"},
    {"requests", "devices"},
    {
        "errors",
        "metrics",
        "workers",
        "cores",
        "variants",
        "memory",
        "colours",
        "eviction",
        "geometry",
        "store_urls",
        "invalid",
    },
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
FOREIGN_TO_APP = {"cli", "pvt_client", "torch", "PIL", "openvino", "numpy", "safetensors"}
FOREIGN_TO_SERVICE = {"app", "cli", "pvt_client", "fastapi", "starlette", "uvicorn", "httpx"}


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


def test_every_module_of_the_service_has_its_layer() -> None:
    modules = {
        path.relative_to(ROOT / "service").parts[0].removesuffix(".py") for path in (ROOT / "service").rglob("*.py")
    }

    assert modules - {"__init__", "__pycache__"} == set(LEVEL)


def test_service_imports_run_downwards() -> None:
    upwards = []
    for path in (ROOT / "service").rglob("*.py"):
        module = path.relative_to(ROOT / "service").parts[0].removesuffix(".py")
        targets = {name.split(".")[1] for name in imports(path) if name.startswith("service.")} - {module}
        upwards += [f"{module} -> {target}" for target in targets if LEVEL[target] <= LEVEL[module]]

    assert upwards == []


def test_the_service_knows_no_http_but_where_it_downloads() -> None:
    assert {path.name: roots(path) & FOREIGN_TO_SERVICE for path in (ROOT / "service").rglob("*.py")
            if roots(path) & FOREIGN_TO_SERVICE} == {"download.py": {"httpx"}, "replies.py": {"httpx"}}  # fmt: skip


def test_the_app_knows_no_tensors() -> None:
    assert {path.name: roots(path) & FOREIGN_TO_APP for path in (ROOT / "app").rglob("*.py")
            if roots(path) & FOREIGN_TO_APP} == {}  # fmt: skip


def test_the_client_knows_only_httpx_and_numpy() -> None:
    known = {"httpx", "numpy", "pvt_client", "PIL"} | sys.stdlib_module_names

    assert {path.name: roots(path) - known for path in (ROOT / "pvt_client").rglob("*.py") if roots(path) - known} == {}
