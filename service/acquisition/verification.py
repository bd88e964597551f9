"""A store looked through: every version's digest, tensors and golden outputs, computed anew by the plain module."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.acquisition.publishing import plain_outputs
from service.backends.module import build
from service.errors import ServiceError
from service.execution.reference import reference_of
from service.store.names import alias_target
from service.store.store import Store
from service.store.stored import Contents, StoredModel


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of `name`: `failure` is why it is not as it should be, `note` what else there is to say."""

    name: str
    failure: str | None = None
    note: str = ""


def verify(root: Path) -> Iterator[Verdict]:
    """A verdict for each version in the store at `root`, as each is done, then for its aliases.

    Raises:
        WeightsUnavailable: the store can't be read.
    """
    contents = Store(root).contents()
    for versions in contents.versions.values():
        yield from map(verify_model, versions)
    yield from _aliases(contents)


def verify_model(stored: StoredModel) -> Verdict:
    """Whether a version is whole and still gives the logits that its card's reference has."""
    try:
        card = stored.require_card()
        module = build(card, stored.folder)
        reference = reference_of(card, stored.folder)
    except ServiceError as error:
        return Verdict(stored.key, str(error))
    if reference is None:
        return Verdict(stored.key, note="no reference outputs")
    deviation = reference.deviation(plain_outputs(module, reference.images))
    if objection := deviation.objection("float32"):
        return Verdict(stored.key, f"plain float32 does not give its reference outputs: {objection} ({deviation})")
    return Verdict(stored.key, note=f"{len(reference.images)} reference outputs reproduced")


def _aliases(contents: Contents) -> Iterator[Verdict]:
    if contents.aliases_failure:
        yield Verdict("aliases", str(contents.aliases_failure))
    for alias, target in contents.aliases.items():
        wanted = alias_target(target)
        versions = contents.versions.get(wanted.id, ())
        if not any(wanted.version in {None, stored.version} for stored in versions):
            yield Verdict(alias, f"the alias stands for {target!r}, which is not in the store")
