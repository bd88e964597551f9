"""What models, their versions and their aliases are called.

pvt_v2_b2.mine      a model, `<variant>.<tag>`: its newest good version
pvt_v2_b2.mine@2    this version of it
pvt_v2_b2           a variant alone: its published weights, or its only model
production          an alias, which has no dot, so that it is never a model's name
"""

import errno
import re
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from service.architecture.variants import VARIANTS
from service.errors import InvalidRequest, ModelNotFound

DEFAULT_TAG = "in1k"  # the tag of the published ImageNet-1k weights
MODEL_ID = re.compile(r"(?P<variant>[a-z0-9_]+)\.(?P<tag>[A-Za-z0-9_-]+)")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
ALIASES_FILE, INDEX_FILE = "aliases.json", "index.json"  # beside the models, and with the form of their names
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class ModelName(NamedTuple):
    """A model's id, or a variant's name, and the version asked for; None is the newest good one."""

    id: str
    version: str | None = None

    def __str__(self) -> str:
        return self.id if self.version is None else f"{self.id}@{self.version}"

    @property
    def is_variant(self) -> bool:
        """Whether it is a variant alone, which the store has yet to find a model for."""
        return self.id in VARIANTS


def may_be_alias(name: str) -> bool:
    """Whether `name` could be an alias: it is neither a variant's name nor has it a model's form."""
    return ALIAS.fullmatch(name) is not None and name not in VARIANTS


def parse(name: str) -> ModelName:
    """`<id>` or `<id>@<version>` in its parts; the id is not looked at.

    Raises:
        ModelNotFound: what follows the @ is no version.
    """
    id_, at, version = name.partition("@")
    if at and not VERSION.fullmatch(version):
        raise ModelNotFound(f"no model {name!r}: what follows the @ must be a version's number, such as {id_ + '@1'!r}")
    return ModelName(id_, version if at else None)


def may_be_model(path: Path) -> bool:
    """Whether it is a folder with a model's name, or nearly: lost+found and the like are nobody's mistake.

    So is what can't be looked at, or a link that leads nowhere: reading its versions tells what is wrong with it.
    """
    name = path.name
    if (MODEL_ID.fullmatch(name) is None and name not in VARIANTS) or name in {ALIASES_FILE, INDEX_FILE}:
        return False
    try:
        return S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return path.is_symlink()
        return error.errno not in {errno.ENOTDIR, errno.ENAMETOOLONG}


def alias_name(name: str) -> str:
    """`name`, if an alias may be called so.

    Raises:
        InvalidRequest: it may not.
    """
    if name in VARIANTS:
        raise InvalidRequest(f"alias {name!r}: that is a variant's name, which means a model already")
    if not ALIAS.fullmatch(name):
        raise InvalidRequest(
            f"alias {name!r}: an alias has 1 to 64 letters, digits, '-' and '_', no dot and no @, and begins with a "
            "letter or digit"
        )
    return name


def alias_target(target: str) -> ModelName:
    """What an alias may stand for: a model, or a version of one.

    Raises:
        InvalidRequest: it is neither.
    """
    id_, at, version = target.partition("@")
    if not MODEL_ID.fullmatch(id_) or (at and not VERSION.fullmatch(version)):
        raise InvalidRequest(f"alias target {target!r}: it must be <variant>.<tag>, or <variant>.<tag>@<version>")
    return ModelName(id_, version if at else None)
