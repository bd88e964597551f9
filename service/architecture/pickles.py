"""The bytes of a checkpoint's file -> the objects in it. Nothing in a pickle ever runs.

torch's `weights_only` unpickler makes tensors and plain data. Data of other classes that training scripts save beside
weights becomes `Inert`; anything else is refused by its name.
"""

import io
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from threading import Lock
from typing import Self

import safetensors.torch
import torch

from service.errors import WeightsCorrupt, WeightsUnsafe

SAVE_AGAIN = "where it was made, write torch.save(model.state_dict(), 'weights.pth') and import that"
FETCH_AGAIN = "fetch it again from its source"
MAX_MADE_BYTES = 1_000_000_000  # of texts that a pickle may make of its own
# What torch allows although it makes more of less: a long text encoded many times, and zeros by their number.
_ENCODE, _ZEROS = "_codecs encode", frozenset({"builtins bytearray", "__builtin__ bytearray"})
_OTHER_KINDS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file; fetch that with 'git lfs pull'",
    b"<!DOCTYPE": "a web page, not a checkpoint; download the file itself",
    b"<html": "a web page, not a checkpoint; download the file itself",
    b"GGUF": "a GGUF file, which holds no PVT-v2; import torch's or safetensors'",
    b"\x89HDF": "an HDF5 file, as Keras writes; import torch's or safetensors'",
    b"\x1f\x8b": "compressed with gzip; unpack it with gunzip first",
}
_CLASS = re.compile(r"(?:GLOBAL|unrecognized function) (\S+)")
_LOADING = Lock()  # torch's allow-list is the process's


class Inert:
    """Stands for data of another class in a pickle: it takes any arguments and any state, and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *_: object) -> Self:
        """Any arguments make the same."""
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _mapping(*_: object) -> dict[object, object]:
    return {}


def _sequence(*_: object) -> list[object]:
    return []


# Names in pickles that are read as data; none of those classes is ever looked up.
INERT = (
    *((Inert, name) for name in (
        "argparse.Namespace", "types.SimpleNamespace", "datetime.datetime", "datetime.date", "datetime.timedelta",
        *(f"pathlib{m}.{n}" for m in ("", "._local") for n in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
        *(f"numpy.{core}.multiarray.{n}" for core in ("core", "_core") for n in ("scalar", "_reconstruct")),
        "numpy.ndarray", "numpy.dtype",
        *(f"numpy.dtypes.{n}DType"
          for n in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool", "UInt8", "Str")),
        *(f"builtins.{n}" for n in ("int", "float", "str", "bool", "list", "dict", "tuple")),
        # Its statistics are functions of its class, which pickle names by `getattr`.
        "mmengine.logging.history_buffer.HistoryBuffer", "builtins.getattr", "typing.Any",
        "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode", "omegaconf.nodes.StringNode",
    )),
    (_mapping, "collections.defaultdict"),
    (_sequence, "collections.deque"),
)  # fmt: skip
UNSAFE = ("GLOBAL", "unrecognized function", "allowlisted")  # in torch's words for a pickle that asks for code


def parse(path: Path, data: bytes) -> object:
    """The objects in the file's bytes; code inside never runs. Raises WeightsUnsafe or WeightsCorrupt."""
    try:
        if data[8:9] == b"{" and len(data) >= int.from_bytes(data[:8], "little"):  # the length of its JSON header
            return safetensors.torch.load(data)
        _check_kind(path, data)
        if data[:2] == b"PK":
            _check_archive(path, data)
        else:
            _check_work(path, io.BytesIO(data))
        with _LOADING, torch.serialization.safe_globals(list(INERT)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (WeightsCorrupt, WeightsUnsafe):
        raise
    except Exception as error:  # broken bytes make the parsers raise almost anything
        if isinstance(error, UnpicklingError) and any(words in str(error) for words in UNSAFE):
            wanted = _CLASS.search(str(error))
            what = f"asks for {wanted[1]}" if wanted else "asks for code"
            raise WeightsUnsafe(
                f"{path}: the pickle {what}, not only tensors, and was not run; {SAVE_AGAIN}"
            ) from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsCorrupt(
            f"{path}: truncated, or neither a safetensors file nor one of torch.save ({reason}); {FETCH_AGAIN}"
        ) from error


def _check_archive(path: Path, data: bytes) -> None:
    """Refuse an archive that unpacks to more than it is: torch.save compresses nothing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        size = sum(each.file_size for each in archive.infolist())
        if size > 2 * len(data):
            raise WeightsCorrupt(
                f"{path}: a zip of {len(data)} bytes that unpacks to {size}, which torch.save never writes"
            )
        names = archive.namelist()
        if any("/code/" in name for name in names):
            raise WeightsUnsafe(f"{path}: a TorchScript archive, which is a program and was not run; {SAVE_AGAIN}")
        if not (pickles := [name for name in names if name.endswith("data.pkl")]):
            raise WeightsCorrupt(f"{path}: a zip without data.pkl, which torch.save writes; it has {names[:3]}")
        _check_work(path, io.BytesIO(archive.read(pickles[0])))


def _check_kind(path: Path, data: bytes) -> None:
    """Refuse other kinds of files by their names."""
    for start, what in _OTHER_KINDS.items():
        if data.startswith(start):
            raise WeightsCorrupt(f"{path}: {what}")


def _check_work(path: Path, file: io.BytesIO) -> None:
    """Refuse pickles that make far more of their bytes, such as by encoding one long text again and again."""
    calls, longest, amplifies, zeros = 0, 0, False, False
    with suppress(ValueError):  # a legacy file goes on with tensors; torch says what is wrong with a broken one
        while True:
            for operation, argument, _ in genops(file):
                if operation.name == "REDUCE":
                    calls += 1
                elif isinstance(argument, str | bytes):
                    longest = max(longest, len(argument))
                    amplifies = amplifies or argument == _ENCODE
                    zeros = zeros or argument in _ZEROS
    if zeros:
        raise WeightsUnsafe(f"{path}: the pickle asks for bytearray, which takes any memory; {SAVE_AGAIN}")
    if amplifies and calls * longest > MAX_MADE_BYTES:
        raise WeightsCorrupt(
            f"{path}: its pickle could make {calls * longest} bytes of texts, more than {MAX_MADE_BYTES}; {SAVE_AGAIN}"
        )
