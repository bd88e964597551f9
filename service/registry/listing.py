"""What there is to say of each model: what the store has of it, and what is in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.errors import ServiceError, WeightsUnavailable
from service.registry.entries import Status
from service.registry.registry import Registry
from service.registry.residents import Resident
from service.registry.supply import Supply
from service.store.stored import Contents, StoredModel

_AVAILABLE: Status[Resident] = Status("available")


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A version of a model, where it stands in memory, and the aliases that stand for exactly it."""

    stored: StoredModel
    status: Status[Resident]
    aliases: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A model, in the version that answers to its name or would, and where that stands in memory; then all versions."""

    stored: StoredModel
    default: bool
    status: Status[Resident]
    versions: Sequence[VersionStatus] = ()
    aliases: Sequence[str] = ()


class Listing:
    """Puts together what the store and the registry know."""

    def __init__(self, default_model: str, supply: Supply, registry: Registry[Resident]) -> None:
        self._default_model = default_model
        self._supply = supply
        self._registry = registry

    async def all(self) -> list[ModelStatus]:
        """Every model of the store, and every other that is loaded.

        Raises:
            WeightsUnavailable: the store can't be read, and nothing is loaded.
        """
        try:
            contents = await self._supply.contents()
        except WeightsUnavailable:
            if not self._registry.loaded():
                raise
            contents = Contents({}, {})
        default = await self._default_id()
        ids = {*contents.versions} | {stored.id for stored, status in self._registry.all() if not status.failure}
        return [self._model(id_, contents, default) for id_ in sorted(ids)]

    async def one(self, name: str) -> ModelStatus:
        """The model called `name`; by name and version, or by an alias, in that version.

        Raises:
            ModelNotFound, WeightsUnavailable: the store has none.
        """
        named = self._registry.named(name)
        candidates = [named[0]] if named else await self._supply.candidates(name)
        stored = candidates[0]
        try:
            contents = await self._supply.contents()
        except WeightsUnavailable:  # a folder in which what is named can be read, and nothing be listed
            contents = Contents({stored.id: candidates}, {})
        model = self._model(stored.id, contents, await self._default_id())
        if model.stored.key in {each.key for each in candidates}:
            return model
        status = next((each.status for each in model.versions if each.stored.version == stored.version), _AVAILABLE)
        return ModelStatus(stored, model.default, status, model.versions, model.aliases)

    async def _default_id(self) -> str | None:
        if named := self._registry.named(self._default_model):
            return named[0].id
        try:
            return (await self._supply.candidates(self._default_model))[0].id
        except ServiceError:
            return None

    def _model(self, id_: str, contents: Contents, default: str | None) -> ModelStatus:
        versions = self._versions(id_, contents)
        answering = self._answering(id_, versions)
        status = versions[answering.key].status
        return ModelStatus(
            versions[answering.key].stored, id_ == default, status, [*versions.values()], contents.aliases_of(id_)
        )

    def _versions(self, id_: str, contents: Contents) -> Mapping[str, VersionStatus]:
        """By key: what runs counts, not what has become of its folder since."""
        found = {}
        for stored in contents.versions.get(id_, ()):
            status: Status[Resident] = Status("failed", failure=stored.failure) if stored.failure else _AVAILABLE
            found[stored.key] = VersionStatus(stored, status, contents.aliases_of(stored.key))
        for stored, status in self._registry.all():
            if stored.id == id_ and not (status.failure and stored.key not in found):
                found[stored.key] = VersionStatus(stored, status, contents.aliases_of(stored.key))
        return found

    def _answering(self, id_: str, versions: Mapping[str, VersionStatus]) -> StoredModel:
        """The version that answers to the model's name; else the newest that may, else the newest."""
        if (named := self._registry.named(id_)) and named[0].key in versions:
            return named[0]
        whole = (each for each in versions.values() if each.status.failure is None)
        return next(whole, next(iter(versions.values()))).stored
