"""Models out of the store."""

import shutil
from pathlib import Path
from tempfile import mkdtemp

from service.errors import InvalidRequest
from service.store.names import VERSION, parse
from service.store.store import Store
from service.store.stored import StoredModel
from service.store.writes import writing


def removable(root: Path, name: str) -> list[StoredModel]:
    """The versions that `name`, `<variant>.<tag>` or `<variant>.<tag>@<version>`, means.

    Raises:
        InvalidRequest: an alias stands for them.
        ModelNotFound, WeightsUnavailable, AliasesInvalid: there are none, or nobody knows whether an alias does.
    """
    store = Store(root)
    wanted = parse(name)
    versions = store.versions(wanted.id)
    found = [each for each in versions if wanted.version in {None, each.version}] or store.candidates(name)
    rest = len(versions) > len(found)
    keys = {each.key for each in found} | (set() if rest else {wanted.id})
    if aliases := [alias for alias, target in store.aliases().items() if target in keys]:
        raise InvalidRequest(
            f"{name} is what {', '.join(map(repr, aliases))} stands for; point the alias elsewhere or remove it first"
        )
    return found


def remove(root: Path, found: list[StoredModel]) -> None:
    """Take versions out of the store at `root`: each is gone at once, then its files go.

    Raises:
        StoreNotWritable: the store can't be written.
    """
    with writing(root):
        for id_ in {stored.id for stored in found}:
            model = root / id_
            gone = {stored.version for stored in found if stored.version and stored.id == id_}
            rest = {path.name for path in model.iterdir() if VERSION.fullmatch(path.name)} - gone
            grave = Path(mkdtemp(prefix=".gone-", dir=root))
            for folder in [model / version for version in gone] if rest else [model]:
                folder.rename(grave / folder.name)
            shutil.rmtree(grave)
