"""A model's tensors among all that a training script saved: found by the names and shapes of PVT-v2 itself.

Containers (`state_dict`, `model`, ...) and prefixes (`module.`, `backbone.`, ...) are one thing: what stands before a
name of PVT-v2 in the path of a tensor.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

import torch
from torch import Tensor

from service.architecture.dialects import HEADS, joined, official_name, own_name
from service.architecture.pvt_v2 import create
from service.architecture.variants import VARIANTS, Dialect, Weights
from service.errors import WeightsCorrupt, WeightsMismatch

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

MAX_DEPTH = 12  # of containers in one another; a pickle may hold itself
LISTED = 5  # names in a message, at most
INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|avg|averag(e|ed|es|ing)|polyak|shadow)([^a-z]|$)")
HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # in modelEMA, emaModel and EMAModel
AUXILIARY = re.compile(
    r"aux|decod|fpn|rpn|roi|bbox|mask|seg|metric|acc|loss|criteri|optim|queue|teacher|project|contrast|momentum"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights under official names, float32; without a head where the file has none.

    `dialect` is whose names the file had, `weights` which of those in it these are, `head` the name of its head layer,
    `left_aside` the other tensors, and `note` explains the choice of weights, where there was one. `source` has the
    same tensors under the names of that library, as its own model has them.
    """

    state: dict[str, Tensor]
    variant: str
    dialect: Dialect
    weights: Weights
    head: str | None
    left_aside: tuple[str, ...]
    note: str | None
    source: dict[str, Tensor]


def checkpoint_of(
    content: object,
    source: str,
    *,
    variant: str | None = None,
    weights: Weights | None = None,
    backbone: bool = False,
    limit: int | None = None,
) -> Checkpoint:
    """The model in `content`, which may be a state dict or hold some, however deep.

    `variant` is a check, `weights` chooses between trained and averaged ones (None: averaged, if there), `backbone`
    leaves any head aside, and no tensor may have more than `limit` elements. Messages name the `source`.

    Raises:
        WeightsCorrupt: no tensors, or some that claim more than the file holds.
        WeightsMismatch: no PVT-v2, several, another variant, or a head that is not one linear layer.
    """
    flat = _with_dots(dict(_tensors(content)))
    _check_tensors(flat, source, limit)
    trunks, dialects = _trunks(flat, source)
    _check_averages(content, weights, source)
    names, of, note = _chosen(trunks, flat, weights, source)
    state = joined({official: flat[name] for name, official in trunks[names].items()})
    found = _variant(state, source, variant, flat)
    rest = _rest(flat, trunks, names)
    _check_backbone(rest, trunks[names], source)
    head = None if backbone else _head(rest, names, state["norm4.weight"].shape[0], source)
    bias = _bias(rest, head) if head else None
    if head is not None:
        weight = rest[f"{head}.weight"]
        state |= {"head.weight": weight, "head.bias": rest[bias] if bias else weight.new_zeros(weight.shape[0])}
    taken = {*trunks[names], f"{head}.weight", bias}
    aside = _summary(name for name in flat if name not in taken)
    dialect: Dialect = "lucid" if dialects[names] == "timm" and head == f"{names}classifier" else dialects[names]
    return Checkpoint(
        {name: tensor.detach().float().contiguous() for name, tensor in state.items()},
        found, dialect, of, head, aside, note, _own(trunks[names], flat, state, dialect),
    )  # fmt: skip


def _with_dots(flat: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under names with dots: `LitEma` of latent-diffusion keeps averages of `a.b.weight` as `abweight`."""
    dotted = {}
    for name in flat:
        parts = name.split(".")
        for first in range(len(parts) - 1):
            dotted["".join(parts[first:])] = ".".join(parts[first:])
    found = {}
    for name, tensor in flat.items():
        before, _, last = name.rpartition(".")
        known = dotted.get(last) if _is_average(f"{before}.") else None
        found[f"{before}.{known}" if known and last != known else name] = tensor
    return found


def _own(names: Mapping[str, str], flat: State, state: State, dialect: Dialect) -> dict[str, Tensor]:
    """The tensors `names` of a backbone, and the head of `state`, under the names of their library's own model."""
    own = {own_name(name): flat[name].detach() for name in names}
    heads = {name: tensor.detach() for name, tensor in state.items() if name.startswith("head.")}
    return own | {name.replace("head.", f"{HEADS[dialect]}."): tensor for name, tensor in heads.items()}


def _check_tensors(flat: State, source: str, limit: int | None) -> None:
    """Raises WeightsCorrupt if there are none, or some larger than their bytes: views of one number, or sparse ones."""
    if not flat:
        raise WeightsCorrupt(f"{source}: holds no tensors; save the model's state_dict()")
    for name, tensor in flat.items():
        if tensor.is_sparse or (limit is not None and (tensor.is_meta or tensor.numel() > limit)):
            raise WeightsCorrupt(
                f"{source}: {name!r} is no dense tensor of the file, but {tuple(tensor.shape)} without so many numbers"
            )


def _tensors(content: object, where: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Each named tensor in `content`, by its path without the names that wrappers of modules add."""
    if isinstance(content, Mapping) and depth < MAX_DEPTH:
        for key, value in content.items():
            if isinstance(value, Tensor):
                yield INNER.sub("", f"{where}{key}"), value
            else:
                yield from _tensors(value, f"{where}{key}.", depth + 1)


def _check_averages(content: object, requested: Weights | None, source: str) -> None:
    """Raises WeightsMismatch where an average's tensors have no names, unless the trained weights are requested."""
    if requested != "plain" and (nameless := next(_nameless_averages(content), None)):
        raise WeightsMismatch(
            f"{source}: its EMA weights ({nameless!r}) are a list without names, which fits no model; --weights plain "
            "takes the others"
        )


def _nameless_averages(content: object, where: str = "", depth: int = 0) -> Iterator[str]:
    """The path of each average in `content` whose tensors are a list; single numbers are metrics."""
    if isinstance(content, Mapping) and depth < MAX_DEPTH:
        for key, value in content.items():
            path = f"{where}{key}"
            if isinstance(value, list | tuple):
                if _is_average(path) and any(isinstance(each, Tensor) and each.ndim for each in value):
                    yield path
            else:
                yield from _nameless_averages(value, f"{path}.", depth + 1)


def _trunks(flat: State, source: str) -> tuple[dict[str, dict[str, str]], dict[str, Dialect]]:
    """By what stands before its names: each whole backbone, as official names of the file's; and their dialects."""
    groups: dict[tuple[str, Dialect], dict[str, str]] = {}
    for name, tensor in flat.items():
        if tensor.is_floating_point() and (found := official_name(name)):
            groups.setdefault((found[0], found[2]), {})[name] = found[1]
    for kind in {(dialect, _is_average(before)) for before, dialect in groups}:  # a prefix on some of the names only
        parts = {key: groups[key] for key in groups if (key[1], _is_average(key[0])) == kind}
        merged = {name: official for names in parts.values() for name, official in names.items()}
        if len(parts) > 1 and max(Counter(merged.values()).values()) == 1:
            shared = _shared(*(before for before, _ in parts))
            groups = {key: names for key, names in groups.items() if key not in parts} | {(shared, kind[0]): merged}
    whole = {key: names for key, names in groups.items() if _is_whole(names)}
    if not whole:
        raise WeightsMismatch(
            f"{source}: no PVT-v2 was found in it; it holds {_listed(list(flat))}; models of other architectures can't "
            "be served"
        )
    return {before: names for (before, _), names in whole.items()}, dict(whole.keys())


def _shared(*paths: str) -> str:
    """The containers and modules that all paths begin with, and a dot, or nothing."""
    return "".join(
        f"{parts[0]}." for parts in takewhile(_are_same, zip(*(p.split(".")[:-1] for p in paths), strict=False))
    )


def _are_same(parts: tuple[str, ...]) -> bool:
    return len(set(parts)) == 1


def _is_whole(names: Mapping[str, str]) -> bool:
    """Whether it has an embedding, blocks and a norm for each stage; which ones, shapes say later."""
    sites = {official.split(".")[0] for official in names.values()}
    return sites >= {f"{kind}{stage}" for kind in ("patch_embed", "block", "norm") for stage in range(1, 5)}


def _chosen(
    trunks: Mapping[str, Mapping[str, str]], flat: State, requested: Weights | None, source: str
) -> tuple[str, Weights, str | None]:
    """Which of the backbones is meant, which weights those are, and an explanation of the choice."""
    swapped = any(re.search(r"(^|\.)ema_state_dict\.steps$", name) for name in flat)  # mmengine's EMAHook swaps them
    kinds: dict[Weights, list[str]] = {"plain": [], "ema": []}
    for before, names in trunks.items():
        average = _is_average(before) != swapped
        same = [o for o in kinds["ema" if average else "plain"] if _equal(names, trunks[o], flat)]
        if not same:
            kinds["ema" if average else "plain"].append(before)
    averages = ", ".join(repr(name.rstrip(".")) for name in kinds["ema"])
    if requested is not None and not kinds[requested]:
        missing = "no EMA weights" if requested == "ema" else f"only EMA weights ({averages})"
        raise WeightsMismatch(f"{source}: it holds {missing}; leave --weights out for those it has")
    of: Weights = requested or ("ema" if kinds["ema"] else "plain")
    if len(kinds[of]) > 1:
        listed = ", ".join(repr(name.rstrip(".")) for name in kinds[of])
        raise WeightsMismatch(f"{source}: it holds several models ({listed}); save the one that is meant alone")
    note = None
    if kinds["ema"] and of == "plain":
        note = f"plain weights, as requested; EMA ones ({averages}) are left aside"
    elif kinds["ema"]:
        beside = "; --weights plain takes the others" if kinds["plain"] else ""
        note = f"EMA weights ({averages}), as timm evaluates{beside}"
    return kinds[of][0], of, note


def _is_average(before: str) -> bool:
    parts = [HUMP.sub("_", part).lower() for part in before.split(".")]
    return any(map(AVERAGED.search, parts)) and not any(part.startswith("online") for part in parts)


def _equal(names: Mapping[str, str], others: Mapping[str, str], flat: State) -> bool:
    mine, theirs = ({official: flat[name] for name, official in each.items()} for each in (names, others))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@cache
def _shapes(variant: str) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in create(variant, num_classes=0).state_dict().items()}


def _variant(state: State, source: str, expected: str | None, flat: State) -> str:
    """The variant whose backbone has just these shapes; `expected` is a check."""
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    variant = next((name for name in VARIANTS if _shapes(name) == found), None)
    if variant is not None and expected not in {None, variant}:
        raise WeightsMismatch(f"{source} holds {variant}, not {expected}; leave --variant out, or give {variant}")
    if variant is not None:
        return variant
    near = sorted((expected,) if expected else VARIANTS, key=lambda name: len(_differences(found, _shapes(name))))[:2]
    lines = "; ".join(f"{name} differs in {_listed(_differences(found, _shapes(name)))}" for name in near)
    extra = [name for name in flat if official_name(name) is None]
    beside = f"; it also holds {_listed(extra)}" if extra else ""
    raise WeightsMismatch(f"{source}: its tensors fit no variant of PVT-v2; {lines}{beside}")


def _differences(found: Shapes, wanted: Shapes) -> list[str]:
    return [
        f"{name} {found.get(name, 'missing')} for {wanted.get(name, 'none')}"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]


def _rest(flat: State, trunks: Mapping[str, Mapping[str, str]], chosen: str) -> dict[str, Tensor]:
    """The tensors that belong to the chosen model, besides its backbone: none that is nearer to another one."""
    backbones = {name for names in trunks.values() for name in names}
    rest = {}
    for name, tensor in flat.items():
        near = {before: len(_shared(before, name)) for before in trunks}
        if name not in backbones and near[chosen] == max(near.values()):
            rest[name] = tensor
    return rest


def _check_backbone(rest: State, names: Mapping[str, str], source: str) -> None:
    """Refuse other weights inside the backbone's modules, such as adapters: without them it would answer otherwise."""
    modules = set()
    for name in names:
        if found := official_name(name):
            modules.add(found[0] + name.removeprefix(found[0]).split(".")[0] + ".")
    inside = [
        name
        for name, tensor in rest.items()
        if tensor.is_floating_point() and tensor.numel() != 1 and name.startswith(tuple(modules))
    ]
    if inside:
        raise WeightsMismatch(
            f"{source}: its backbone has weights that PVT-v2 has not: {_listed(inside)}; merge adapters into the "
            "model before its state_dict() is saved"
        )


def _head(rest: State, before: str, channels: int, source: str) -> str | None:
    """The path of the one linear layer that reads the embedding of `channels` numbers, or None where there is none.

    Raises WeightsMismatch where it has more layers, or several layers might be it.
    """
    layers = {
        name.rpartition(".")[0] for name, tensor in rest.items() if tensor.is_floating_point() and tensor.numel() != 1
    }
    owners: dict[str, list[str]] = defaultdict(list)
    for layer in sorted(layers):
        shared = _shared(before, layer)
        root = shared + layer[len(shared) :].partition(".")[0]
        if layer and not AUXILIARY.search(layer.removeprefix(before).lower()):
            owners[root].append(layer)
    near = {root for root, own in owners.items() if any(_reads(rest, layer, channels) for layer in own)}
    if not near:
        return None
    parts = sorted(layer for root in near for layer in owners[root])
    shapes = [tuple(rest[f"{layer}.weight"].shape) if f"{layer}.weight" in rest else () for layer in parts]
    if len(parts) > 1 and all(len(shape) == 2 and shape[0] != channels == shape[1] for shape in shapes):  # noqa: PLR2004
        raise WeightsMismatch(
            f"{source}: it has several heads, {_listed(parts)}, and a model answers with one; save it with the one "
            "that is meant, or the backbone's state_dict() for its embeddings"
        )
    if len(parts) > 1:
        raise WeightsMismatch(
            f"{source}: its head is not one linear layer but {_listed(parts)}; the embeddings alone can be served: "
            "save the backbone's state_dict()"
        )
    return parts[0]


def _bias(rest: State, head: str) -> str | None:
    """The name of the bias of `head`, which may lack the prefix that its weight has, or have one."""
    if f"{head}.bias" in rest:
        return f"{head}.bias"
    end = f".{head.rpartition('.')[2]}.bias"
    alone = (name for name in rest if f".{name}".endswith(end) and f"{name.removesuffix('bias')}weight" not in rest)
    return next(alone, None)


def _reads(rest: State, layer: str, channels: int) -> bool:
    weight = rest.get(f"{layer}.weight")
    return weight is not None and weight.ndim <= 2 and weight.shape[-1:] == (channels,)  # noqa: PLR2004  or a norm


def _summary(names: Iterator[str]) -> tuple[str, ...]:
    """The names, those under one root as one where they are many."""
    roots: dict[str, list[str]] = defaultdict(list)
    for name in names:
        roots[name.split(".")[0]].append(name)
    return tuple(
        each
        for root, own in roots.items()
        for each in (own if len(own) <= LISTED else [f"{root} ({len(own)} tensors)"])
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
