"""A checkpoint that somebody trained, or a folder with one -> a model in the store, and a summary of what was taken."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from service.acquisition.answers import activation_of, read_labels, read_thresholds, repeated
from service.acquisition.catalogue import IMAGENET, PREPROCESSOR_FILE, variant_named
from service.acquisition.configs import CONFIG_FILE, Config
from service.acquisition.folders import INDEX_SUFFIX, ModelFolder, described, is_folder, read_folder, read_shards
from service.acquisition.preprocessing import (
    LIKE,
    PRESETS,
    Like,
    PreprocessingOptions,
    describe,
    preprocessing,
    read_preprocessor,
)
from service.acquisition.publishing import Description, labels_for, publish
from service.architecture.variants import VARIANTS, Weights
from service.architecture.weights import Checkpoint, State, checkpoint_of, open_checkpoint
from service.errors import InvalidRequest, reasons
from service.store.cards import Activation, Answers, Origin, Preprocessing
from service.store.folder import writing
from service.store.store import MODEL_ID, VERSION, StoredModel

_NAMES = 3  # of classes, in a summary


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """The checkpoint `file`, or a folder with one, and its description; `labels` is as for `read_labels`.

    What is None is as the files in the folder say, else as the checkpoint's library does it. `like` is the library
    whose preprocessing `preprocessing` changes, in place of those. `thresholds` is as for `read_thresholds`. `weights`
    says which of several in the file to take: see `service.architecture.weights.open_checkpoint`.
    """

    file: Path
    tag: str
    variant: str | None = None
    like: Like | None = None
    preprocessing: PreprocessingOptions = field(default_factory=PreprocessingOptions)
    weights: Weights | None = None
    labels: str | None = None
    activation: Activation | None = None
    temperature: float | None = None
    thresholds: str | None = None
    unknown_below: float | None = None
    licence: str | None = None
    source: str | None = None
    version: str | None = None
    origin: Origin | None = None


def import_model(root: Path, options: ImportOptions, on_note: Callable[[str], None] = lambda _: None) -> StoredModel:
    """Put a checkpoint in any dialect into the store at `root`, with a card and reference outputs.

    `on_note` is called with each line of a summary: what was found, which of it was taken, and the proof.

    Raises:
        InvalidRequest: variant, tag, version, labels or preprocessing are wrong; the message says which.
        WeightsInvalid, WeightsUnavailable: the file is not a model of that variant; the message says why.
        StoreNotWritable: the store can't be written.
    """
    file, folder = options.file, read_folder(options.file) if is_folder(options.file) else None
    config = folder.config if folder else None
    wanted = _checked_variant(options, config)
    labels, answers = _read_answers(options, config, on_note)
    checkpoint = _opened(options, folder, wanted)
    id_ = f"{checkpoint.variant}.{options.tag}"
    with writing(root):
        if options.version is not None and os.path.lexists(root / id_ / options.version):
            raise InvalidRequest(f"{id_}@{options.version} is there already; leave --version out for the next one")
    pixels, about_images = _pixels(options, checkpoint, folder)
    if labels is None and config:
        labels = _configured_labels(config, checkpoint.state, file)
    about = Description(
        id=id_,
        variant=checkpoint.variant,
        preprocessing=pixels,
        licence=options.licence or (config and config.licence) or (folder and folder.licence) or "unknown",
        source=options.source or (config and config.source) or file.absolute().name,
        labels=labels,
        answers=answers,
        origin=options.origin,
    )
    for line in _summary(options, about, checkpoint, folder):
        on_note(line)
    on_note(f"tensor names of {checkpoint.dialect}; images: {describe(pixels)} ({about_images})")
    return publish(root, checkpoint.state, about, options.version, checkpoint=checkpoint, on_note=on_note)


def _summary(
    options: ImportOptions, about: Description, checkpoint: Checkpoint, folder: ModelFolder | None
) -> Iterator[str]:
    """What was found, which of it is taken, and what is left aside."""
    config, count = folder.config if folder else None, len(labels_for(checkpoint.state, about))
    names = "without names: --labels FILE gives them"
    if about.labels:
        more = ", ..." if count > _NAMES else ""
        names = f"{', '.join(about.labels[:_NAMES])}{more} (from {options.labels or CONFIG_FILE})"
    with_config = f" with the {CONFIG_FILE} of {config.library}" if config else ""
    yield f"found {described(folder.weights) if folder else options.file.name}{with_config}: {about.variant}"
    yield f"weights: {checkpoint.note or f'{checkpoint.weights}, the only ones'}"
    head = f" ({checkpoint.head})" if checkpoint.head not in {None, "head", "classifier"} else ""
    yield f"head{head}: {count} classes, {names}" if count else "head: none, so that the model computes embeddings only"
    if config and config.problem_type:
        yield f"problem_type of {CONFIG_FILE}: {config.problem_type}"
    if about.answers:
        yield f"activation: {about.answers.activation}"
    if left_aside := (*(folder.left_aside if folder else ()), *checkpoint.left_aside):
        yield f"left aside: {', '.join(left_aside)}"


def _checked_variant(options: ImportOptions, config: Config | None) -> str | None:
    """The variant that the options or the folder's config name; raises InvalidRequest where an option is wrong."""
    wanted = None if options.variant is None else variant_named(options.variant)
    if wanted is not None and wanted not in VARIANTS:
        raise InvalidRequest(f"variant {options.variant!r}: it must be one of {', '.join(VARIANTS)}, or b0, b1, ...")
    if not MODEL_ID.fullmatch(f"{wanted or next(iter(VARIANTS))}.{options.tag}"):
        raise InvalidRequest(f"tag {options.tag!r}: it has letters, digits, '-' and '_'")
    if options.version is not None and not VERSION.fullmatch(options.version):
        raise InvalidRequest(f"version {options.version!r}: it is a number from 1")
    if config and wanted and config.variant != wanted:
        raise InvalidRequest(f"variant {wanted}: {CONFIG_FILE} says {config.variant}; leave --variant out")
    return wanted or (config.variant if config else None)


def _opened(options: ImportOptions, folder: ModelFolder | None, variant: str | None) -> Checkpoint:
    file = folder.weights if folder else options.file
    if file.name.endswith(INDEX_SUFFIX):
        state, size = read_shards(file)
        return checkpoint_of(state, str(file), variant=variant, weights=options.weights, limit=size)
    return open_checkpoint(file, variant=variant, weights=options.weights)


def _pixels(options: ImportOptions, checkpoint: Checkpoint, folder: ModelFolder | None) -> tuple[Preprocessing, str]:
    """The preprocessing, and whose it is."""
    config, library = folder.config if folder else None, checkpoint.dialect
    preset, whose = PRESETS[library], f"as {library} does"
    if options.like:
        preset, whose = LIKE[options.like], f"as {options.like} does"
    elif config:
        preset, whose = config.preprocessing, config.about_images
    preprocessor = folder.preprocessor if folder else options.file.parent / PREPROCESSOR_FILE
    ours = config.library == "transformers" if config else library == "transformers"
    if not options.like and ours and preprocessor and os.path.lexists(preprocessor):
        preset, whose = read_preprocessor(preprocessor), PREPROCESSOR_FILE
    changed = "" if options.preprocessing == PreprocessingOptions() else ", changed by options"
    return preprocessing(options.preprocessing, preset), whose + changed


def _configured_labels(config: Config, state: State, file: Path) -> tuple[str, ...] | None:
    """The labels of a folder's config; raises InvalidRequest where it has not one for each class of the head."""
    weight = state.get("head.weight")
    classes = None if weight is None or not weight.ndim else weight.shape[0]
    for count in (config.num_labels, len(config.labels) if config.labels else None):
        if classes is not None and count is not None and count != classes:
            raise InvalidRequest(
                f"{file}: {CONFIG_FILE} names {count} classes, and the head has {classes}; --labels FILE names them"
            )
    return config.labels


def _read_answers(
    options: ImportOptions, config: Config | None, on_note: Callable[[str], None]
) -> tuple[tuple[str, ...] | None, Answers | None]:
    """The labels, and what else options and config say of answers; None where they say nothing."""
    labels = None if options.labels is None else read_labels(options.labels)
    if labels and options.labels != IMAGENET and (note := repeated(labels)):
        on_note(note)
    given = {name: getattr(options, name) for name in Answers.model_fields if getattr(options, name) is not None}
    if options.thresholds is not None:
        given["thresholds"] = read_thresholds(options.thresholds, labels)
    if config and config.problem_type and "activation" not in given:
        given["activation"] = activation_of(config.problem_type, config.num_labels or 0)
    try:
        return labels, Answers.model_validate(given) if given else None
    except ValidationError as error:
        raise InvalidRequest(reasons(error, "answers")) from error
