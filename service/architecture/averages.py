"""Which of the weights in a checkpoint are meant: those that were trained, or their running average.

Training scripts keep both, and evaluate the average.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from service.architecture.variants import Weights
from service.errors import WeightsMismatch

WRAPPERS = ("model", "state_dict")  # under which training scripts keep the weights
# Names under which they keep a running average of them beside, timm's `state_dict_ema` among them, and then inside.
AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|avg|averag(e|ed|es|ing)|polyak|shadow)([^a-z]|$)")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # in modelEMA, emaModel and EMAModel
AVERAGE_WRAPPERS = (*WRAPPERS, "module", "shadow")
MAX_DEPTH = 8  # of wrappers in one another; a pickle may hold itself


def _plain(content: object) -> object:
    """What lies under the names that training scripts give to the weights."""
    for _ in range(MAX_DEPTH):
        if not isinstance(content, Mapping) or not (key := next((k for k in WRAPPERS if k in content), None)):
            break
        content = content[key]
    return _without_counter(content) if isinstance(content, Mapping) else content


def _holds_tensors(content: object) -> bool:
    return isinstance(content, Mapping) and _are_weights(content.values())


def _are_weights(parts: Iterable[object]) -> bool:
    """Whether there are tensors among them other than numbers: metrics may be tensors, too."""
    return any(isinstance(part, Tensor) and part.ndim for part in parts)


def _holds_lists(content: Mapping[object, object]) -> bool:
    """Whether it holds an average whose tensors have no names."""
    return any(isinstance(part, list | tuple) and _are_weights(part) for part in content.values())


def _averages(content: object, where: str = "") -> Iterator[tuple[str, Mapping[object, object]]]:
    """Each running average of the weights in `content`, with its name, which says where it is."""
    if not isinstance(content, Mapping) or where.count(".") > MAX_DEPTH:
        return
    for key, value in content.items():
        if key in WRAPPERS:
            yield from _averages(value, f"{where}{key}.")
        elif isinstance(key, str) and AVERAGED.search(_HUMP.sub("_", key).lower()):
            found: Mapping[object, object] = _average(value) if isinstance(value, Mapping) else {key: value}
            if _holds_lists(found) or (isinstance(value, Mapping) and _holds_tensors(found)):
                yield f"{where}{key}", found


def _average(content: Mapping[object, object]) -> Mapping[object, object]:
    """The state dict in it, without the counter that torch's `AveragedModel` keeps beside."""
    for _ in range(MAX_DEPTH):
        content = next((i for k in AVERAGE_WRAPPERS if isinstance(i := content.get(k), Mapping)), content)
    return _without_counter(content)


def _without_counter(content: Mapping[object, object]) -> Mapping[object, object]:
    return {name: tensor for name, tensor in content.items() if name != "n_averaged"}


def _unswapped(content: object) -> object:
    """`content`, where the average lies beside: mmengine's `EMAHook` saves it in place of what was trained.

    That, and a counter, is then what it calls the average's.
    """
    if isinstance(content, Mapping) and isinstance(trained := content.get("ema_state_dict"), Mapping):
        counted = {name: tensor for name, tensor in trained.items() if name != "steps"}
        if len(counted) < len(trained):
            return {**content, "state_dict": counted, "ema_state_dict": content.get("state_dict")}
    return content


def chosen(path: Path, content: object, wanted: Weights | None) -> tuple[object, Weights, str]:
    """The plain weights in `content` or their average, which of the two, and what there is to say of the choice.

    Raises:
        WeightsMismatch: `wanted` is not there, or there are several averages.
    """
    content = _unswapped(content)
    plain, averages = _plain(content), dict(_averages(content))
    names = ", ".join(map(repr, averages))
    bare = not _holds_tensors(plain)
    if wanted == "plain" or not averages:
        if wanted == "ema":
            raise WeightsMismatch(f"{path}: it holds no EMA weights; leave --weights out for those it has")
        if averages and bare:
            raise WeightsMismatch(f"{path}: it holds only EMA weights ({names}); leave --weights out for those")
        return plain, "plain", f"plain weights, as asked; EMA ones ({names}) are left aside" if averages else ""
    if len(averages) > 1:
        raise WeightsMismatch(
            f"{path}: it holds several EMA weights ({names}); save the ones that are meant alone, or take the plain "
            "ones with --weights plain"
        )
    beside = "" if bare else "; --weights plain takes the others"
    average = averages.popitem()[1]
    if not _holds_tensors(average):
        raise WeightsMismatch(
            f"{path}: its EMA weights ({names}) are a list without names, which fits no model{beside}"
        )
    return average, "ema", f"EMA weights ({names}), as timm evaluates{beside}"
