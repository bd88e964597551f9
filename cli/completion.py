"""What the shell completes beside commands and options: models, variants and aliases. Nothing here imports torch."""

from collections.abc import Iterable, Iterator


def models(incomplete: str) -> list[str]:
    """The models, variants and aliases of the store that begin so, and after an @ the versions of a model."""
    return _beginning(incomplete, _models(incomplete))


def aliases(incomplete: str) -> list[str]:
    """The aliases of the store that begin so."""
    return _beginning(incomplete, (each for each in _models("") if "." not in each and not each.startswith("pvt_v2_")))


def published(incomplete: str) -> list[str]:
    """The variants whose weights `pull` fetches, or their short forms."""
    from service.acquisition.catalogue import CATALOGUE

    return _beginning(incomplete, _with_short_forms(CATALOGUE))


def variants(incomplete: str) -> list[str]:
    """The architectures, or their short forms."""
    from service.architecture.variants import VARIANTS

    return _beginning(incomplete, _with_short_forms(VARIANTS))


def _with_short_forms(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        yield name
        yield name.removeprefix("pvt_v2_")


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _models(incomplete: str) -> Iterator[str]:
    """Every name that may stand for a model."""
    from app.settings import SettingsInvalid
    from cli.environment import settings
    from service.errors import ServiceError
    from service.store.store import Store

    try:
        store = Store(settings().store_folder)
        if "@" in incomplete:
            yield from (each.key for each in store.versions(incomplete.partition("@")[0]))
            return
        contents = store.contents()
    except (OSError, ServiceError, SettingsInvalid):
        return  # who completes wants no errors; the command will say
    yield from contents.versions
    yield from dict.fromkeys(name.partition(".")[0] for name in contents.versions)
    yield from contents.aliases
