"""What commands take from the environment: settings, the folder of the model store, the address of the service."""

from pathlib import Path

from app.settings import Settings
from cli import KEY_VARIABLE, URL_VARIABLE
from cli.terminal import USAGE, CommandError, print_note
from service.store.location import without_secrets

TIMEOUT_SECONDS = 600.0
"""How long a service may take to answer a command."""
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  what to connect to where a service listens on all


def settings() -> Settings:
    """The settings of this process, whose environment may name a service too.

    Raises:
        SettingsInvalid: a variable is wrong.
    """
    return Settings.from_environment(but={URL_VARIABLE, KEY_VARIABLE})


def store_folder(option: str | None, *, write: bool = False) -> Path:
    """The folder that --store names, or else PVT_MODEL_STORE.

    By default that may be the store of the package, which is read only. `write` then returns the user's own store, and
    makes it first.

    Raises:
        CommandError: it is a URL.
        StoreNotWritable: the user's own store can't be made.
    """
    if option:
        return _checked(option)
    found = settings()
    if found.remote_store:
        return _checked(found.remote_store.url)
    if not write:
        return found.store_folder
    root, is_new = found.writable_store()
    if is_new:
        print_note(f"pvt-serve: {root} is new, with a copy of the embedded model")
    return root


def _checked(store: str) -> Path:
    if "://" in store:
        raise CommandError(
            f"{without_secrets(store)}: this command works on a store in a folder; name one with --store", USAGE
        )
    return Path(store)


def service_url(url: str | None, *, management: bool = False) -> str:
    """`url`, or where the settings put a service on this machine; `management` may have a port of its own."""
    if url is not None:
        return url
    found = settings()
    host, port = found.host, found.port
    if management and found.management_port:
        host, port = found.management_host, found.management_port
    host = _ANY.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
