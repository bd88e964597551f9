"""Settings: `PVT_*` environment variables, read once."""

import os
import re
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.remote_images.addresses import HostRule, Reach
from service.store.default import default_store, writable_default_store
from service.store.urls import RemoteOptions, is_url, objection

PREFIX = "PVT_"
# What Kubernetes sets in every pod for a service named pvt-serve, or pvt-anything.
_SERVICE_LINK = re.compile(r"PVT_\w+_(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)")
Names = Annotated[tuple[str, ...], NoDecode]


class SettingsInvalid(Exception):
    """A `PVT_*` variable is no setting, or its value is out of bounds; the message says which and why."""


class Settings(BaseSettings):
    """Every setting, its default and its bounds; `PVT_PORT` is `port` and so on. Lists are separated by commas."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that share the port; each has its own models and its part of cores and instances."""
    model_store: Path | str = Path("model_store")
    """Model store: a folder, or a URL: s3://, gs://, hf://, https://; for the default see docs/stores.md."""
    store_cache_dir: Path = Path("~/.cache/pvt-serve-stores")
    """Folder for copies of what is used of a model store that is a URL."""
    store_cache_mb: Annotated[float, Field(gt=0)] = 10_000
    """Bytes of weights in `PVT_STORE_CACHE_DIR`, in units of 10^6; the least recently loaded ones go first."""
    store_poll_seconds: Annotated[float, Field(ge=1, le=86_400)] = 30
    """How often a model store that is a URL is looked at for changes."""
    pull: Literal["off", "on_demand"] = "off"
    """`on_demand`: the first request for published weights that are not in the store fetches them into it."""
    mirror: Annotated[str, Field(pattern=r"^(https?://[^/]+.*)?$")] = ""
    """Base URL that takes the place of `https://huggingface.co` and `https://github.com` when weights are fetched."""
    default_model: Annotated[str, Field(min_length=1)] = "pvt_v2_b0.digits"
    """Model that answers when a request names none."""
    preload: Names = ()
    """Models to load at start; the service is ready when they are. Others are loaded by their first request."""
    pinned: Names = ()
    """Models to load at start, too, and never to evict."""
    memory_budget_mb: Annotated[float, Field(ge=0)] = 0
    """Memory that loaded models may take, in units of 10^6 bytes; the least valuable leave. 0: no limit."""
    min_residency_seconds: Annotated[float, Field(ge=0)] = 10
    """How long a model that was loaded stays before it may be evicted."""
    cold: Literal["wait", "refuse"] = "wait"
    """What a request for a model that is not loaded does: wait, or be refused with `Retry-After` while it is loaded."""
    reload_seconds: Annotated[float, Field(ge=0, le=86_400)] = 10
    """How often to look for new versions and aliases, besides watching a local store; 0: never."""
    backend: Literal["auto", "openvino", "torch"] = "auto"
    """What executes the models; auto is openvino, and torch for a model that fails there; on a GPU it is torch."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+(,cuda:\d+)*)$")] = "auto"
    """Where: `cpu`, `cuda` for all GPUs, or some, as `cuda:0,cuda:1`; auto is cuda where torch can use one."""
    compile: bool = True
    """On a GPU: let `torch.compile` make faster graphs in the background; it needs a C compiler and `PVT_CACHE_DIR`."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic; auto is a 16-bit one where that is faster and its answers are as good, float32 elsewhere."""
    cache_dir: Path | None = Path("~/.cache/pvt-serve")
    """Folder in which measured batch plans and compiled graphs are kept; empty: nowhere."""
    instances: Annotated[int, Field(ge=0, le=1024)] = 0
    """Batches that run at the same time; 0: one for each core that affinity and quota allow, or two for each GPU."""
    max_batch_size: Annotated[int, Field(ge=0, le=1024)] = 0
    """Images per batch at the most, 0 is 8, and 256 on a GPU; the measured batch plan may stay below."""
    max_batch_delay_ms: Annotated[float, Field(ge=0, le=60_000)] = 0
    """How long an idle instance may wait for a fuller batch; 0 never waits."""
    queue_size: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Images per model, waiting or running; more are refused with 429."""
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 30_000
    """Time a request may take when it names no `timeout_ms` of its own."""
    max_body_mb: Annotated[float, Field(gt=0, le=4096)] = 32
    """Bytes of a request body, in units of 10^6."""
    max_images: Annotated[int, Field(ge=1, le=4096)] = 64
    """Images in one request."""
    max_image_megapixels: Annotated[float, Field(gt=0, le=178)] = 50
    """Pixels of one image, in units of 10^6; decoding one may take 9 bytes of memory for each."""
    scaled_jpeg: bool = True
    """Decode a JPEG four times the model's input or more at 1/2 to 1/8 of its sides; false: every JPEG in full."""
    max_input_side: Annotated[int, Field(ge=32, le=4096)] = 1024
    """Longest side, in pixels, of an input size that a request may ask for with `size`."""
    sizes_per_model: Annotated[int, Field(ge=1, le=256)] = 4
    """Input sizes besides its own for which a model is kept compiled; the least recently used one goes first."""
    max_maps_mb: Annotated[float, Field(gt=0, le=65_536)] = 128
    """Memory of the stage maps that one request may ask for, in units of 10^6 bytes, four for each number."""
    stall_seconds: Annotated[float, Field(gt=0)] = 30
    """A decode or inference thread that is at one job for longer makes the service unhealthy."""
    shutdown_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    """How long requests under way may take to finish after SIGTERM."""
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys of which a request for predictions or models must carry one: `Authorization: Bearer <key>`; none: open."""
    management_keys: Annotated[tuple[SecretStr, ...], NoDecode] = ()
    """Keys, other than `PVT_API_KEYS`, of which a request for management or `/debug` must carry one."""
    management_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port that alone answers these, without a key if none is set; 0: none, and without keys they are off."""
    management_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address of that port."""
    url_hosts: Names = ()
    """Hosts from which images may come by URL: `example.org`, `example.org:8443`, `*.example.org`, `*`; none: off."""
    url_private_networks: Annotated[tuple[IPvAnyNetwork, ...], NoDecode] = ()
    """Networks, such as 10.0.0.0/8, in which a host that `PVT_URL_HOSTS` names may lie; else public addresses only."""
    url_timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 10_000
    """Time that fetching one image by its URL may take."""
    log_format: Literal["json", "console"] = "json"
    """`json`: one object a line; `console`: text for people."""

    @field_validator(
        "preload", "pinned", "api_keys", "management_keys", "url_hosts", "url_private_networks", mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        if value.strip() and not any(parts):
            raise ValueError("a list with nothing in it; leave the variable out for an empty one")
        return tuple(part for part in parts if part)

    @field_validator("model_store", mode="before")
    @classmethod
    def _folder_or_url(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if not is_url(value):
            return Path(value)
        if reason := objection(value):
            raise ValueError(reason)
        return value

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("url_hosts", mode="after")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            HostRule.parse(entry)
        return value

    @field_validator("management_keys", mode="after")
    @classmethod
    def _distinct(cls, value: tuple[SecretStr, ...], info: ValidationInfo) -> tuple[SecretStr, ...]:
        if {*value} & {*info.data.get("api_keys", ())}:
            raise ValueError("one of these is in PVT_API_KEYS too; who may ask for predictions is not who manages")
        return value

    @model_validator(mode="after")
    def _one_manager(self) -> Self:
        if self.management_port and self.workers > 1:
            raise ValueError("PVT_MANAGEMENT_PORT is for one process, whose models it manages; PVT_WORKERS is above 1")
        if self.management_port and self.management_port == self.port:
            raise ValueError("PVT_MANAGEMENT_PORT is PVT_PORT; it must be another one")
        return self

    @model_validator(mode="after")
    def _runs_there(self) -> Self:
        if self.backend == "openvino" and self.device.startswith("cuda"):
            raise ValueError(f"PVT_BACKEND=openvino runs on the CPU, and PVT_DEVICE={self.device} asks for a GPU")
        return self

    @model_validator(mode="after")
    def _pulls_into_a_folder(self) -> Self:
        if self.pull == "on_demand" and self.remote_store:
            raise ValueError("PVT_PULL=on_demand puts weights into a folder, and PVT_MODEL_STORE is a URL")
        return self

    @classmethod
    def from_environment(cls) -> Self:
        """The settings of this process.

        Raises:
            SettingsInvalid: a `PVT_*` variable is none, with the nearest one, or a value is out of bounds.
        """
        known = {f"{PREFIX}{name.upper()}" for name in cls.model_fields}
        for name in os.environ:
            if name.upper().startswith(PREFIX) and name.upper() not in known and not _SERVICE_LINK.fullmatch(name):
                near = get_close_matches(name.upper(), known, n=1, cutoff=0)[0]
                raise SettingsInvalid(f"{name} is not a setting; the nearest one is {near}")
        try:
            return cls()
        except ValidationError as error:
            raise SettingsInvalid("; ".join(map(_reason, error.errors()))) from error

    @property
    def url_reach(self) -> Reach:
        """From where images by URL may come."""
        return Reach([HostRule.parse(entry) for entry in self.url_hosts], self.url_private_networks)

    @cached_property
    def max_body_bytes(self) -> int:
        """The limit on a request body, in bytes."""
        return int(self.max_body_mb * 1e6)

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the plan cache; None when there is to be none, or it lies in a home that the user has not."""
        try:
            return self.cache_dir.expanduser() if self.cache_dir else None
        except RuntimeError:  # an arbitrary user id in a container has no home
            return None

    @property
    def remote_store(self) -> RemoteOptions | None:
        """The model store, where that is a URL."""
        if isinstance(self.model_store, Path):
            return None
        try:
            cache = self.store_cache_dir.expanduser()
        except RuntimeError:  # no home; what then can't be made says the setting's name
            cache = self.store_cache_dir
        return RemoteOptions(
            url=self.model_store,
            cache=cache.absolute(),
            cache_bytes=int(self.store_cache_mb * 1e6),
            poll_seconds=self.store_poll_seconds,
        )

    @property
    def store_folder(self) -> Path:
        """The model store's folder, or that of its copy."""
        if remote := self.remote_store:
            return remote.folder
        return Path(self.model_store) if "model_store" in self.model_fields_set else default_store()

    def writable_store(self) -> tuple[Path, bool]:
        """The folder to put models into, and whether it has just been made, by default in the user's home.

        Raises:
            StoreNotWritable: it can't be made.
        """
        named = "model_store" in self.model_fields_set
        return (self.store_folder, False) if named else writable_default_store()


def _reason(error: ErrorDetails) -> str:
    """One mistake in words, with the setting's name and, unless it is a key, its value."""
    reason = error["msg"]
    if not error["loc"]:  # two settings contradict each other
        return reason.removeprefix("Value error, ")
    name = str(error["loc"][0])
    shown = "" if name.endswith("_keys") else f"={error['input']}"
    return f"{PREFIX}{name.upper()}{shown}: {reason}"
