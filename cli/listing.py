"""`pvt-serve ls` and `show`: models of the store on this machine, or of a service, in the form of `GET /models`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from typer import Option

from cli import options
from cli.environment import TIMEOUT_SECONDS, settings, store_folder
from cli.table import Column, print_fields, print_table
from cli.terminal import USAGE, CommandError, print_line, print_note, spinner, thousands
from service.acquisition.catalogue import CATALOGUE, Published
from service.errors import ServiceError
from service.store.cards import ModelCard
from service.store.store import Contents, Store, StoredModel

Details = Mapping[str, Any]
"""What `GET /models` says of a model, of a version, or what the store knows of it in the same words."""
_LABELS = 10  # that `show` names
_PLAN_FILE = "plan.json"  # of the plan cache


def ls(
    store: options.Store = None,
    every: Annotated[bool, Option("--all", help="Also the public models that 'pvt-serve pull' fetches.")] = False,
    as_json: options.Json = False,
    url: options.Url = None,
    key: options.Key = None,
) -> None:
    """List the models of the store, or of a service, with their versions.

    A version with the state `failed` can't be loaded; the reason is given. `pvt-serve verify` checks the weights, too.
    Only a service, with --url, can say which models are in memory and how they run; `pvt-serve ps` lists those alone.
    """
    models = _of_service(url, key) if _is_remote(url, store) else _of_store(store)
    models = [model for model in models if every or model["state"] != "remote"]
    if as_json:
        print_line(json.dumps({"models": models}, indent=2))
    elif not models:
        print_note("no models; 'pvt-serve pull' and 'pvt-serve import' put some into the store")
    else:
        rows = [row for model in models for row in version_rows(model)]
        print_table(_COLUMNS, rows, hide_empty=True, note=lambda row: row.get("reason") or "")


def show(
    model: options.Name,
    labels: Annotated[bool, Option("--labels", help="Its classes instead: number and label, one a line.")] = False,
    store: options.Store = None,
    as_json: options.Json = False,
    url: options.Url = None,
    key: options.Key = None,
) -> None:
    """Show what is known of a model.

    That is what its card says: classes, preprocessing, accuracy, licence, weights and their digest; its aliases and
    versions; and its batch plan, which a service with --url has measured, or else an earlier run on this machine.

    Examples: `pvt-serve show pvt_v2_b2`, `pvt-serve show production --url http://localhost:8000 --json`
    """
    if labels and as_json:
        raise CommandError("--json has the labels already; give it or --labels", USAGE)
    if _is_remote(url, store):
        from pvt_client import Client

        assert url is not None  # noqa: S101
        with spinner("waiting for the service"), Client(url, api_key=key, timeout=TIMEOUT_SECONDS) as client:
            found = client.model(model).details
    else:
        found = _in_full(store, model)
    if as_json:
        print_line(json.dumps(found, indent=2))
    elif labels:
        for number, label in enumerate(found.get("labels") or ()):
            print_line(f"{number}\t{label}")
    else:
        print_fields(_fields(found))


def _is_remote(url: str | None, store: str | None) -> bool:
    if url is not None and store is not None:
        raise CommandError("--store is a folder of this machine, --url (or PVT_URL) a service: give one of them", USAGE)
    return url is not None


def version_rows(model: Details) -> Iterator[Details]:
    """A row for each version: what is said of the model holds for the version that its name stands for."""
    versions: Sequence[Details] = model.get("versions") or ({},)
    for version in versions:
        own = version.get("version") in {None, model["version"]}
        named = {name: model[name] for name in ("id", "default")}
        yield {**(model if own else {}), **named, **version, "default": own and model["default"]}


def runs_on(model: Details) -> str:
    """The backend and the precision of a model that is loaded."""
    device = model.get("device") if model.get("device") != "cpu" else None
    return " ".join(filter(None, (model.get("backend"), device, model.get("precision"))))


def megabytes(count: int | None) -> str:
    """Bytes as units of 10^6 of them."""
    return "" if count is None else f"{count / 1e6:,.1f}"


def _top1(model: Details) -> str:
    return f"{model['accuracy']['top1']:.1%}" if model.get("accuracy") else ""


_COLUMNS: Sequence[Column[Details]] = (
    Column("model", lambda row: row["id"] + (" (default)" if row["default"] else "")),
    Column("version", lambda row: row["version"], right=True),
    Column("state", lambda row: row["state"]),
    Column("aliases", lambda row: ", ".join(row.get("aliases") or ()), drop=1),
    Column("classes", lambda row: thousands(row.get("num_classes")), drop=2, right=True),
    Column("input", lambda row: "x".join(map(str, row.get("input_size") or ())), drop=3, right=True),
    Column("top-1", _top1, drop=4, right=True),
    Column("runs on", runs_on, drop=5),
    Column("MB", lambda row: megabytes(row.get("bytes")), drop=6, right=True),
    Column("parameters", lambda row: thousands(row.get("parameters")), drop=7, right=True),
    Column("from", lambda row: row.get("source") or "", drop=8),
)


def _of_service(url: str | None, key: str | None) -> list[Details]:
    from pvt_client import Client

    assert url is not None  # noqa: S101  `_is_remote` has said so
    with spinner("waiting for the service"), Client(url, api_key=key, timeout=TIMEOUT_SECONDS) as client:
        return [model.details for model in client.models()]


def _of_store(option: str | None) -> list[Details]:
    store = Store(store_folder(option))
    contents, default = store.contents(), _default(store)
    models = [_model(contents, id_, default) for id_ in contents.versions]
    return models + [_published(row, default) for row in CATALOGUE.values() if row.id not in contents.versions]


def _default(store: Store) -> str:
    """The id of the default model, which need not be in the store."""
    name = settings().default_model
    try:
        return store.find(name).id
    except ServiceError:
        return name


def _model(contents: Contents, id_: str, default: str, version: str | None = None) -> dict[str, Any]:
    """What the store knows of a model, in `version` or the newest that is not broken."""
    versions = contents.versions[id_]
    own = next((each for each in versions if each.version == version or (not version and each.card)), versions[0])
    standing = [_version(each, contents.aliases_of(each.key)) for each in versions]
    aliases = contents.aliases_of(id_) + contents.aliases_of(own.key)
    shown = {**standing[versions.index(own)], "aliases": aliases, "versions": standing}
    return {"id": id_, "variant": own.variant, "default": id_ == default, **shown}


def _version(stored: StoredModel, aliases: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"version": stored.version, "state": "available", "aliases": aliases}
    if stored.card is None:
        return found | {"state": "failed", "reason": str(stored.failure)}
    card = stored.card
    return found | _said(card) | {"source": card.source, "bytes": card.weights.bytes}


def _said(card: ModelCard) -> dict[str, Any]:
    return {
        "num_classes": len(card.labels),
        "input_size": [card.preprocessing.height, card.preprocessing.width],
        "parameters": card.parameters,
        "accuracy": card.accuracy and card.accuracy.model_dump(mode="json", exclude_none=True),
        "licence": card.licence,
    }


def _published(row: Published, default: str) -> dict[str, Any]:
    standing = {"version": "", "state": "remote", "aliases": [], "default": row.id == default}
    said = {
        "num_classes": row.num_classes, "input_size": [*row.input_size], "parameters": row.parameters,
        "accuracy": row.accuracy.model_dump(mode="json", exclude_none=True), "licence": row.licence,
    }  # fmt: skip
    return {"id": row.id, "variant": row.variant, **standing, **said, "source": row.files["timm"].urls[0]}


def _in_full(option: str | None, name: str) -> dict[str, Any]:
    """What the store knows of the model `name`, all of its card included."""
    store = Store(store_folder(option))
    stored = store.find(name)
    found = _model(store.contents(), stored.id, _default(store), stored.version)
    card = stored.require_card()
    answers = {"activation": card.activation, "temperature": card.temperature, "unknown_below": card.unknown_below}
    fields = {"preprocessing", "explain_size", "weights", "training", "origin"}
    said = card.model_dump(mode="json", exclude_none=True, include=fields)
    found |= (answers if card.labels else {}) | said
    return {**found, "thresholds": card.least_scores, "labels": list(card.labels), **_cached_plan(stored)}


def _cached_plan(stored: StoredModel) -> dict[str, Any]:
    """The batch plan that an earlier run has kept; it holds where machine and settings are the same."""
    folder = settings().cache_folder
    try:
        plan = json.loads((folder / stored.id / stored.version / _PLAN_FILE).read_bytes()) if folder else None
        if plan is None:
            return {}
        sizes = [{"size": int(size), "ms": round(seconds * 1000, 3)} for size, seconds in plan["seconds"].items()]
        return {"batch_plan": sizes, "precision": plan["precision"], "plan_cached": True}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _fields(model: Details) -> dict[str, str]:
    """What `show` prints, by its name."""
    versions = (f"{each['version']} {each['state']}" for each in model.get("versions") or ())
    pixels = model.get("preprocessing") or {}
    weights, large = model.get("weights") or {}, model.get("explain_size")
    plan = ", ".join(f"{each['size']}: {each['ms']:g} ms" for each in model.get("batch_plan") or ())
    return {
        "model": f"{model['id']}@{model['version']}".rstrip("@") + (" (default)" if model["default"] else ""),
        "state": model["state"],
        "reason": model.get("reason") or "",
        "aliases": ", ".join(model.get("aliases") or ()),
        "versions": ", ".join(versions),
        "classes": _classes(model),
        "scores": _scores(model),
        "input": _sides(model.get("input_size")) + (f", to explain {_sides(large)}" if large else ""),
        "preprocessing": ", ".join(f"{name} {_short(value)}" for name, value in pixels.items()),
        "accuracy": ", ".join(f"{name} {_short(value)}" for name, value in (model.get("accuracy") or {}).items()),
        "parameters": thousands(model.get("parameters")),
        "weights": f"{weights['file']}, {megabytes(weights['bytes'])} MB" if weights else "",
        "sha256": weights.get("sha256", ""),
        "licence": model.get("licence") or "",
        "source": model.get("source") or "",
        "training": model.get("training") or "",
        "runs on": runs_on(model) if model.get("backend") else "",
        "batch plan": f"{plan} ({model['precision']}, of an earlier run)" if plan and "weights" in model else plan,
        "memory": f"{megabytes(model['memory_bytes'])} MB" if model.get("memory_bytes") else "",
    }


def _sides(size: Sequence[int] | None) -> str:
    return "x".join(map(str, size or ()))


def _classes(model: Details) -> str:
    count = model.get("num_classes")
    if not count:
        return "" if count is None else "none: embeddings only"
    labels = model.get("labels") or ()
    more = f", and {count - _LABELS:,} more: --labels" if count > _LABELS else ""
    return f"{count:,}: {', '.join(labels[:_LABELS])}{more}" if labels else f"{count:,}"


def _scores(model: Details) -> str:
    words = [str(model.get("activation") or "")]
    numbers = [name for name in ("temperature", "unknown_below") if model.get(name) not in {None, 1.0}]
    words += [f"{name.replace('_', ' ')} {model[name]:g}" for name in numbers]
    thresholds = model.get("thresholds")
    if isinstance(thresholds, (int, float)) and thresholds:
        words.append(f"threshold {thresholds:g}")
    elif thresholds:
        words.append("a threshold for each class")
    return ", ".join(filter(None, words))


def _short(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
