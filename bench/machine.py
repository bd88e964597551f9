"""What a measurement ran on."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from service.machine import usable_cores

_TELLING_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
)
_PACKAGES = (
    "torch",
    "openvino",
    "onnxruntime",
    "transformers",
    "pillow",
    "numpy",
    "fastapi",
    "uvicorn",
    "litserve",
    "mosec",
    "ray",
)


def machine(cpuinfo: str | None = None) -> dict[str, str]:
    """The processor with those of its flags that matter here, cores, memory and system; `cpuinfo` for tests."""
    fields = _fields(Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo)
    flags = fields.get("flags", fields.get("Features", "")).split()
    family = (
        f"family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else "of unknown family"
    )
    return {
        "processor": f"{fields.get('model name', platform.machine())} ({family})",
        "instructions": " ".join(flag for flag in _TELLING_FLAGS if flag in flags) or "none of note",
        "bfloat16": "native" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "not native",
        "cores": str(usable_cores()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def versions() -> dict[str, str]:
    """Of the packages that are measured, where installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _fields(cpuinfo: str) -> dict[str, str]:
    """Of the first processor in it."""
    lines = cpuinfo.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}
