"""Settings: `PVT_*` environment variables, read once."""

import os
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from unicodedata import category

from pydantic import (
    AfterValidator,
    BeforeValidator,
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

from app.addresses import HostRule, Reach
from service.store.folder import default_store, writable_default_store
from service.store.location import RemoteOptions, is_url, objection, secrets_of, without_secrets

PREFIX = "PVT_"
# What Kubernetes sets in every pod for a service named pvt, or pvt-anything, and the value of those that end in PORT:
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_SERVICE_LINK = re.compile(r"PVT_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_\w+)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://\S+:\d+")


GRPC_MODULES = "grpc", "grpc_health", "grpc_reflection"  # of the extra
# What SageMaker and Vertex AI set in their containers. It says where they connect, so it wins over PVT_*.
PLATFORM_VARIABLES = {
    "AIP_HTTP_PORT": "port",
    "AIP_PREDICT_ROUTE": "predict_route",
    "AIP_HEALTH_ROUTE": "health_route",
    "AIP_STORAGE_URI": "model_store",
    "SAGEMAKER_BIND_TO_PORT": "port",
}
UNIX = "unix"  # among networks: whoever connects to a Unix socket
UNIX_PREFIX = "unix:"  # before the path of one
PREFIX_PATH = re.compile(r"(?=.{0,256}\Z)(/(?!\.{1,2}(/|\Z))[A-Za-z0-9._~@+-]+)*")
_ORIGIN = re.compile(
    r"((?P<scheme>[a-z][a-z0-9+.-]*)://([a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\]))(?P<port>:[1-9][0-9]{0,4})?"
)
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Zs"}


class SettingsInvalid(Exception):
    """A `PVT_*` variable is no setting, or its value is out of bounds; the message says which and why."""


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    if value.strip() and not any(parts):
        raise ValueError("a list with nothing in it; leave the variable out for an empty one")
    return tuple(part for part in parts if part)


def _folder_or_url(value: object) -> object:
    if not isinstance(value, str) or not is_url(value):
        return Path(value) if isinstance(value, str) else value
    if reason := objection(value):
        raise ValueError(reason)
    return value


def encodings(key: str) -> set[bytes]:
    """The bytes that clients send for `key` in a header: UTF-8, as curl does, or Latin-1."""
    given = key.encode("utf-8", "surrogateescape")  # the environment's own bytes, whatever they are
    try:
        given.decode()
    except UnicodeDecodeError:
        return {given, given.decode("latin-1").encode()}
    try:
        return {given, key.encode("latin-1")}
    except UnicodeEncodeError:
        return {given}


def _keys(value: object) -> object:
    """A list of keys, none of which may be blank: who sets a variable means to lock the door."""
    if not isinstance(value, str):
        return value
    keys = [part.strip() for part in value.split(",")]
    for number, key in enumerate(keys, 1):
        if all(character.isspace() or category(character) in _INVISIBLE for character in key):
            which = f"key {number} of {len(keys)} is blank" if len(keys) > 1 else "the key is blank"
            raise ValueError(f"{which}; leave the variable out where no key is to be required")
    return tuple(keys)


def _network_or_unix(value: object) -> object:
    try:
        return value if value == UNIX else ip_network(str(value))
    except ValueError as error:
        raise ValueError(f"{error}; name addresses, networks such as 10.0.0.0/8, or {UNIX}") from error


def _address(value: object) -> object:
    """An address, without the brackets that an IPv6 one has in URLs."""
    if not isinstance(value, str):
        return value
    if value.strip() == UNIX_PREFIX:
        raise ValueError(f"name the socket's file: {UNIX_PREFIX}/run/pvt-serve.sock")
    if "://" in value:
        raise ValueError(f"an address without a scheme, such as 127.0.0.1, ::, or {UNIX_PREFIX}/run/pvt-serve.sock")
    return value[1:-1] if value.startswith("[") and value.endswith("]") else value


def _prefix(value: str) -> str:
    value = value.rstrip("/")
    if not PREFIX_PATH.fullmatch(value):
        raise ValueError("a path such as /images or /team/images, of letters, digits and . _ ~ @ + -")
    return value


def _origin(value: str) -> str:
    """As browsers write it: in lower case, without the port that belongs to the scheme."""
    if value == "*":
        return value
    match = _ORIGIN.fullmatch(value.lower())
    if not match:
        raise ValueError(
            f"{value!r} is no origin; write https://example.org, with :port if it has one, without a path; or *"
        )
    return match[1] if match["port"] == {"http": ":80", "https": ":443"}.get(match["scheme"]) else match[0]


def _mode(value: str) -> str:
    if not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError("three octal digits, as chmod takes them, such as 660 or 666")
    return value


T = TypeVar("T")
Host = Annotated[str, BeforeValidator(_address), Field(min_length=1)]
Proxy = Annotated[IPv4Network | IPv6Network | Literal["unix"], BeforeValidator(_network_or_unix)]
Route = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._~:@!$&'()*+,;=-]+)*$")]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_keys)]
Items = Annotated[tuple[T, ...], NoDecode, BeforeValidator(_split)]


class Settings(BaseSettings):
    """Every setting, its default and its bounds; `PVT_PORT` is `port` and so on. Commas separate the items of lists."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: Host = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of IPv4, `::` for all; or `unix:/path` for a Unix socket."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    socket_mode: Annotated[str, AfterValidator(_mode)] = "660"
    """Permissions of a Unix socket, as `chmod` takes them; who may write to it may send requests."""
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port for the Open Inference Protocol over gRPC, on `PVT_HOST`; needs the extra `grpc`. 0: off."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that share the port; each has its own models and its share of cores and instances."""
    model_store: Annotated[Path | str, BeforeValidator(_folder_or_url)] = Path("model_store")
    """Where the models are: a folder, or a URL: s3://, gs://, hf://, https:// (docs/stores.md)."""
    store_cache_dir: Path = Path("~/.cache/pvt-serve-stores")
    """Folder for local copies from a model store that is a URL."""
    store_cache_mb: Annotated[float, Field(gt=0)] = 10_000
    """Size limit of `PVT_STORE_CACHE_DIR`, in units of 10^6 bytes; removes the least recently loaded weights first."""
    store_poll_seconds: Annotated[float, Field(ge=1, le=86_400)] = 30
    """How often to check a model store that is a URL for changes."""
    pull: Literal["off", "on_demand"] = "off"
    """`on_demand`: the first request for published weights that are not in the store fetches them into it."""
    mirror: Annotated[str, Field(pattern=r"^(https?://[^/]+.*)?$")] = ""
    """Base URL that replaces `https://huggingface.co` and `https://github.com` when weights are fetched."""
    default_model: Annotated[str, Field(min_length=1)] = "pvt_v2_b0.digits"
    """Model for requests that name none."""
    preload: Items[str] = ()
    """Models to load at start; the service is ready when they are. The first request for another model loads it."""
    pinned: Items[str] = ()
    """Models to load at start and never to evict."""
    memory_mb: Annotated[float, Field(ge=0)] = 0
    """Memory that the service may take in all, in units of 10^6 bytes; requests and loads beyond it get 503.
    0: the limit of the container, or what the machine has."""
    memory_budget_mb: Annotated[float, Field(ge=0)] = 0
    """Memory limit for all loaded models, in units of 10^6 bytes; others are evicted to make room. 0: no limit."""
    cache_mb: Annotated[float, Field(ge=0)] = 0
    """Memory for results of images that were answered before, in units of 10^6 bytes, shared out among workers; equal
    images get them again. 0: no cache."""
    min_residency_seconds: Annotated[float, Field(ge=0)] = 10
    """How long a model stays in memory after its load before it may be evicted."""
    cold: Literal["wait", "refuse"] = "wait"
    """A request for a model that is not loaded waits, or is refused with 503 and `Retry-After` while it loads."""
    reload_seconds: Annotated[float, Field(ge=0, le=86_400)] = 10
    """How often to check for new versions and aliases, besides watching a local store; 0: never."""
    backend: Literal["auto", "openvino", "torch"] = "auto"
    """What executes the models. auto: openvino, and torch for a model that fails with it; on a GPU torch."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+(,cuda:\d+)*)$")] = "auto"
    """Where models run: on the CPU, all GPUs, or some GPUs. auto: cuda if torch can use a GPU, else cpu."""
    compile: bool = True
    """On a GPU: `torch.compile` makes faster graphs in the background; needs a C compiler and `PVT_CACHE_DIR`."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic. auto: 16 bits if that is faster and keeps the reference logits, else float32; replicas may differ
    (docs/operations.md)."""
    cache_dir: Annotated[Path | None, BeforeValidator(lambda value: value or None)] = Path("~/.cache/pvt-serve")
    """Folder for measured batch plans and compiled graphs; empty: keep none."""
    instances: Annotated[int, Field(ge=0, le=1024)] = 0
    """Batches that run at the same time. 0: one for each core that affinity and quota allow, or two for each GPU."""
    max_batch_size: Annotated[int, Field(ge=0, le=1024)] = 0
    """Largest batch, in images; the measured batch plan may stay below. 0: 8, and 256 on a GPU."""
    max_batch_delay_ms: Annotated[float, Field(ge=0, le=60_000)] = 0
    """How long an idle instance waits for a fuller batch; 0: it never waits."""
    queue_size: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Images of each model, waiting or running, a quarter of them large; more are refused with 429."""
    timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 30_000
    """Time limit for requests without `timeout_ms`."""
    max_body_mb: Annotated[float, Field(gt=0, le=4096)] = 32
    """Size limit of a request body, in units of 10^6 bytes."""
    max_images: Annotated[int, Field(ge=1, le=4096)] = 64
    """Most images in one request."""
    max_image_megapixels: Annotated[float, Field(gt=0, le=178)] = 50
    """Most pixels of one image that are decoded, in units of 10^6, at 9 bytes of memory each at most. A baseline JPEG
    that is read at 1/2 to 1/8 of its sides counts as it is read, but as an eighth of its pixels at least."""
    scaled_jpeg: bool = True
    """Decode a JPEG that is at least 4 times the model's input at 1/2 to 1/8 of its size; false: always in full."""
    max_input_side: Annotated[int, Field(ge=32, le=4096)] = 1024
    """Longest side, in pixels, of the input size that a request sets with `size`."""
    sizes_per_model: Annotated[int, Field(ge=1, le=256)] = 4
    """Input sizes, besides its own, for which each model stays compiled; the least recently used is removed first."""
    max_maps_mb: Annotated[float, Field(gt=0, le=65_536)] = 128
    """Memory limit for the stage maps of one request, in units of 10^6 bytes; a number takes 4 bytes."""
    stall_seconds: Annotated[float, Field(gt=0)] = 30
    """A decode or inference thread that spends longer on one job makes the service unhealthy, and the process end."""
    canary_seconds: Annotated[float, Field(ge=0, le=86_400)] = 60
    """How often each loaded model must still give the right logits for a reference image; 0: never."""
    shutdown_seconds: Annotated[int, Field(ge=1, le=3600)] = 25
    """How long requests under way may take after SIGTERM, and their responses to be sent; the exit takes 3 more."""
    drain_delay_seconds: Annotated[int, Field(ge=0, le=3600)] = 0
    """How long it serves on after SIGTERM, reporting that it is not ready, so that load balancers notice; then
    `PVT_SHUTDOWN_SECONDS` begin."""
    client_timeout_seconds: Annotated[float, Field(ge=1, le=3600)] = 20
    """How long a client may take to send a request's head, to send less than 1000 bytes/s of a body, or to read none
    of its response."""
    keep_alive_seconds: Annotated[int, Field(ge=1, le=3600)] = 75
    """How long a connection without a request stays open; longer than a proxy in front keeps it: nginx and AWS have 60.
    """
    api_keys: Keys = ()
    """Requests for predictions or models need one of these keys: `Authorization: Bearer <key>`; unset: no key."""
    management_keys: Keys = ()
    """Requests for management and `/debug` need one of these keys; none may be in `PVT_API_KEYS`."""
    management_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Only this port serves management, without a key if none is set. 0: the public port, and off without keys."""
    management_host: Host = "127.0.0.1"
    """Address of that port; or `unix:/path`, which needs no port."""
    trusted_proxies: Items[Proxy] = ()
    """Networks of proxies whose `Forwarded` and `X-Forwarded-*` headers count; `unix`: those on a Unix socket."""
    root_path: Annotated[str, AfterValidator(_prefix)] = ""
    """Path below which a proxy serves it, such as /images, whether the proxy removes that or not; X-Forwarded-Prefix of
    a trusted proxy wins."""
    cors_origins: Items[str] = ()
    """Web pages of these origins, such as https://example.org, may send requests from a browser; `*`: of any."""
    client_rate: Annotated[float, Field(ge=0, le=1e6)] = 0
    """Images a second that each client may send, by its key, else its address; more are refused. 0: no limit."""
    client_burst: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Images that a client may send at once within `PVT_CLIENT_RATE`; 0: those of one second."""
    client_concurrency: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Requests that each client may have under way; more are refused with 429. 0: no limit."""
    url_hosts: Items[str] = ()
    """Hosts of images by URL: `example.org`, `example.org:8443`, `*.example.org`, `*`; empty: images by URL are off."""
    url_private_networks: Items[IPvAnyNetwork] = ()
    """Private networks, such as 10.0.0.0/8, for hosts that `PVT_URL_HOSTS` names; else public addresses only."""
    url_timeout_ms: Annotated[int, Field(ge=1, le=3_600_000)] = 10_000
    """Time limit for fetching one image by its URL."""
    predict_route: Route = ""
    """One more path for `POST /invocations`; on Vertex AI that of `AIP_PREDICT_ROUTE`."""
    health_route: Route = ""
    """One more path for `GET /ping`; on Vertex AI that of `AIP_HEALTH_ROUTE`."""
    ui: bool = True
    """The page at `/`, and `/docs`; off: neither, and the endpoints as ever."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """`json`: one object on each line; `console`: text for people; `auto`: text on a terminal, else JSON."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Leave out log lines below this level; requests that succeed in time are `info`."""
    slow_ms: Annotated[float, Field(ge=0, le=3_600_000)] = 5000
    """Log requests that take at least so long as warnings; 0: none for their time."""

    @field_validator("url_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            HostRule.parse(entry)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_origin, value))

    @field_validator("management_keys")
    @classmethod
    def _distinct(cls, value: tuple[SecretStr, ...], info: ValidationInfo) -> tuple[SecretStr, ...]:
        both = [
            {form for key in keys for form in encodings(key.get_secret_value())}
            for keys in (value, info.data.get("api_keys", ()))
        ]
        if set.intersection(*both):
            raise ValueError("one of these is in PVT_API_KEYS too; who may ask for predictions is not who manages")
        return value

    @field_validator("cache_mb")
    @classmethod
    def _holds_some(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("1 or more, since a result takes some kilobytes, with stage maps a thousand; 0: no cache")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.manages_apart and self.workers > 1:
            raise ValueError("PVT_MANAGEMENT_PORT is for one process, whose models it manages; PVT_WORKERS is above 1")
        on_unix = [each.startswith(UNIX_PREFIX) for each in (self.host, self.management_host)]
        if not any(on_unix) and self.management_port and self.management_port == self.port:
            raise ValueError("PVT_MANAGEMENT_PORT is PVT_PORT; it must be another one")
        if all(on_unix) and self.host == self.management_host:
            raise ValueError("PVT_MANAGEMENT_HOST is PVT_HOST; it must be another socket")
        if self.grpc_port and self.grpc_port in {self.port, self.management_port}:
            raise ValueError("PVT_GRPC_PORT is the port of HTTP or of management; it must be another one")
        if self.grpc_port and not all(map(find_spec, GRPC_MODULES)):
            raise ValueError("PVT_GRPC_PORT needs the extra grpc: pip install 'pvt-serve[grpc]', or leave it out")
        if self.grpc_port and on_unix[0]:
            raise ValueError("PVT_GRPC_PORT needs an address in PVT_HOST, which is a Unix socket")
        if self.backend == "openvino" and self.device.startswith("cuda"):
            raise ValueError(f"PVT_BACKEND=openvino runs on the CPU, and PVT_DEVICE={self.device} asks for a GPU")
        if self.pull == "on_demand" and self.remote_store:
            raise ValueError("PVT_PULL=on_demand puts weights into a folder, and PVT_MODEL_STORE is a URL")
        return self

    @classmethod
    def from_environment(cls, *, but: AbstractSet[str] = frozenset()) -> Self:
        """The settings of this process; the variables `but` are of somebody else.

        Raises:
            SettingsInvalid: a `PVT_*` variable is none, with the nearest one, or a value is out of bounds.
        """
        known = {f"{PREFIX}{name.upper()}" for name in cls.model_fields}
        for name in {*os.environ} - but:
            if name.upper().startswith(PREFIX) and name.upper() not in known and not _is_service_link(name):
                near = get_close_matches(name.upper(), known, n=1, cutoff=0)[0]
                raise SettingsInvalid(f"{name} is not a setting; the nearest one is {near}")
        platform = {field: name for name, field in PLATFORM_VARIABLES.items() if os.environ.get(name)}
        links = (name for name in cls.model_fields if _is_service_link(f"{PREFIX}{name.upper()}"))
        given: dict[str, Any] = {name: cls.model_fields[name].default for name in links}
        given |= {field: os.environ[name] for field, name in platform.items()}
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsInvalid("; ".join(_reason(each, platform) for each in error.errors())) from error

    @property
    def manages_apart(self) -> bool:
        """Whether management has a port, or a Unix socket, of its own."""
        return self.management_port != 0 or self.management_host.startswith(UNIX_PREFIX)

    def is_for_management(self, server: tuple[str, int | None] | None) -> bool:
        """Whether `server`, of an ASGI scope, is that port or socket."""
        if server is None or not self.manages_apart:
            return False
        if self.management_host.startswith(UNIX_PREFIX):
            return server[0] == self.management_host.removeprefix(UNIX_PREFIX)
        return server[1] == self.management_port

    @property
    def url_reach(self) -> Reach:
        """From where images by URL may come."""
        return Reach([HostRule.parse(entry) for entry in self.url_hosts], self.url_private_networks)

    @property
    def exit_seconds(self) -> int:
        """How long requests may go on after SIGTERM."""
        return self.drain_delay_seconds + self.shutdown_seconds

    @property
    def secrets(self) -> list[str]:
        """What no log line may show: passwords, tokens and signatures in URLs."""
        return [secret for url in (str(self.model_store), self.mirror) if is_url(url) for secret in secrets_of(url)]

    @cached_property
    def max_body_bytes(self) -> int:
        """The limit on a request body, in bytes."""
        return int(self.max_body_mb * 1e6)

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the plan cache; None when there is to be none, or it lies in a home that the user has not."""
        return self.cache_dir and _expanded(self.cache_dir)

    @property
    def remote_store(self) -> RemoteOptions | None:
        """The model store, where that is a URL."""
        if isinstance(self.model_store, Path):
            return None
        # Where there is no home, the error about a folder that can't be made names the setting.
        cache = _expanded(self.store_cache_dir) or self.store_cache_dir
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


def _is_service_link(variable: str) -> bool:
    """Whether the variable is one of those of Kubernetes."""
    if variable.endswith("_PORT") and _SERVICE_URL.fullmatch(os.environ.get(variable, "")):
        return True
    return _SERVICE_LINK.fullmatch(variable) is not None


def _reason(error: ErrorDetails, variables: Mapping[str, str]) -> str:
    """One mistake in words, with the variable and, unless it is a key, its value; `variables` are those not ours."""
    if not error["loc"]:  # two settings contradict each other
        return error["msg"].removeprefix("Value error, ")
    name = str(error["loc"][0])
    given = str(error["input"])
    shown = "" if name.endswith("_keys") else f"={without_secrets(given) if '://' in given else given}"
    return f"{variables.get(name, PREFIX + name.upper())}{shown}: {error['msg']}"


def _expanded(folder: Path) -> Path | None:
    """`folder` with the user's home for `~`; None without a home, as for an arbitrary user id in a container."""
    try:
        return folder.expanduser()
    except RuntimeError:
        return None
