"""The commands that put models into the store: `pvt-serve pull` and `import`."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from cli import completion, options, terminal
from cli.terminal import USAGE, CommandError, logs_on_stderr, print_line, print_note, print_problem
from service.acquisition.catalogue import CATALOGUE, DEFAULT_SOURCE, IMAGENET, SourceName, published
from service.acquisition.preprocessing import Like, PreprocessingOptions
from service.architecture.variants import VARIANTS
from service.architecture.variants import Weights as Kind
from service.errors import ServiceError
from service.images.geometry import Interpolation, Kernel, Resize
from service.store.cards import Activation, Colours

if TYPE_CHECKING:
    from service.acquisition.pulling import Pulled, PullOptions
    from service.store.store import StoredModel

_Triple = tuple[float, float, float]


_Models = Annotated[
    list[str] | None,
    Argument(
        metavar="MODELS...",
        help=f"Variants: {', '.join(CATALOGUE)}; b0, b1, ... for short. Or a repository of the hub: OWNER/NAME, or "
        "OWNER/NAME@REVISION.",
        autocompletion=completion.published,
    ),
]
_Every = Annotated[bool, Option("--all", help="Pull all seven, about 1 GB.")]
_From = Annotated[SourceName, Option(help="Whose copy of the public weights to fetch.")]
_HubTag = Annotated[
    str | None, Option(help="Of OWNER/NAME: the model is called VARIANT.TAG. By default NAME without its variant.")
]
_Mirror = Annotated[
    str | None, Option(metavar="URL", help="In place of https://huggingface.co and https://github.com; PVT_MIRROR.")
]
_Again = Annotated[bool, Option("--again", help="Fetch as a new version what is there already.")]


def pull(
    models: _Models = None, every: _Every = False, source: _From = DEFAULT_SOURCE, tag: _HubTag = None,
    store: options.Store = None, mirror: _Mirror = None, again: _Again = False,
) -> None:  # fmt: skip
    """Fetch public ImageNet-1k weights, or anybody's model from the hub.

    Each file is checked against its SHA-256, converted, and written into the model store as `<variant>.in1k` with its
    labels, licence and reference outputs. A pull that was broken off goes on where it ended; what is in the store
    already is not fetched again. A repository of the hub is imported as the folder that it is; private ones need
    HF_TOKEN. Then
    `pvt-serve predict --model pvt_v2_b2 ...`.
    """
    if every == bool(models):
        raise CommandError("name the models to pull, such as 'pvt-serve pull b2', or give --all", USAGE)
    if tag and not any("/" in name for name in models or ()):
        raise CommandError("--tag names a model of the hub, OWNER/NAME; published weights have the tag in1k", USAGE)
    from cli.environment import settings, store_folder

    mirror = mirror or settings().mirror or None
    requested = list(dict.fromkeys(map(_requested, CATALOGUE if every else models or ())))
    root, failed = store_folder(store, write=True), 0
    from service.acquisition.pulling import PullOptions  # imports torch

    pull_options = PullOptions(source=source, mirror=mirror)
    with logs_on_stderr():
        for model in requested:
            try:
                pulled = _pulled(root, model, pull_options, tag, again=again)
                if pulled.fresh:
                    _note_next(pulled.stored, store)
                print_line(_described(pulled, source))
            except ServiceError as error:
                if len(requested) == 1:
                    raise
                failed += 1
                print_problem(f"pvt-serve: {model}: {terminal.reason(error)}")
    if failed:
        raise Exit(terminal.FAILED if failed == len(requested) else terminal.SOME_FAILED)


def _requested(name: str) -> str:
    """The variant of published weights, or the repository; raises a ServiceError where it is neither."""
    if "/" not in name:
        return published(name).variant
    from service.acquisition.repositories import repository  # imports torch

    repository(name)
    return name


def _pulled(root: Path, name: str, options: "PullOptions", tag: str | None, *, again: bool) -> "Pulled":
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    from service.acquisition.pulling import pull as pull_model  # imports torch
    from service.acquisition.repositories import pull_repository, repository  # likewise

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with terminal.progress_bar(*columns, transient=True) as progress:
        bar = progress.add_task(name, total=None)

        def on_progress(done: int, total: int | None) -> None:
            progress.update(bar, completed=done, total=total)

        if name in CATALOGUE:
            return pull_model(root, CATALOGUE[name], options, again=again, on_progress=on_progress)
        return pull_repository(
            root, repository(name), options, tag=tag, again=again, on_progress=on_progress, on_note=print_note
        )


def _described(pulled: "Pulled", source: SourceName) -> str:
    key, card = pulled.stored.key, pulled.stored.require_card()
    if not pulled.fresh:
        return f"{key} is in the store already; --again fetches it as a new version"
    if card.origin is None:
        return key
    checks = {
        "publisher": "SHA-256 as its publisher gave it",
        "hub": "SHA-256 as the hub gives it",
        "nobody": f"SHA-256 {card.origin.sha256}, which nobody has published: the first file fetched is trusted",
    }
    whose = source if any(each.id == pulled.stored.id for each in CATALOGUE.values()) else card.source
    return f"{key}: {card.origin.bytes / 1e6:.1f} MB from {whose}, {checks[card.origin.digest_from]}"


_Weights = Annotated[
    Path,
    Argument(metavar="FILE|FOLDER", help="A checkpoint, the index of its shards, or the folder of a model with both."),
]
_Tag = Annotated[str, Option(help="Its own name: the model is called VARIANT.TAG, such as pvt_v2_b2.birds.")]
_Variant = Annotated[
    str | None,
    Option(
        help=f"Its architecture, as a check: {', '.join(VARIANTS)}; b0, b1, ... for short.",
        autocompletion=completion.variants,
    ),
]
_Labels = Annotated[
    str | None,
    Option(
        metavar="FILE|DIR",
        help="Names of the classes: a .txt (one a line), .json (a list, id2label, class_to_idx) or .csv; a folder "
        f"with a folder for each class, as ImageFolder has; '{IMAGENET}' for those of ImageNet-1k. By default those of "
        "FOLDER's config.json, else 'class 0', 'class 1', ...",
    ),
]
_Activation = Annotated[
    Activation | None,
    Option(
        help="What makes scores of logits: softmax for one class of several, the default; sigmoid for several "
        "classes at once, or one logit; none for the logits themselves."
    ),
]
_Temperature = Annotated[
    float | None, Option(metavar="T", help="Divide logits by it before the activation, to calibrate scores.")
]
_Thresholds = Annotated[
    str | None,
    Option(
        metavar="FILE|NUMBER",
        help="Scores that classes must have to be in an answer: a number for all, or a file with one for each. "
        "With sigmoid 0.5 by default.",
    ),
]
_UnknownBelow = Annotated[
    float | None, Option(metavar="X", help="Call an image unknown where no class has at least this score.")
]
_Pixels = Annotated[
    str | None, Option("--size", metavar="PIXELS", help="Input, 224 or 256x384 (height x width); 224 by default.")
]
_Like = Annotated[
    Like | None, Option(help="Preprocessing as this library has it by default; the options below change it.")
]
_Resize = Annotated[
    Resize | None,
    Option(help="How images come to that size. By default as FOLDER's files say, else as the library of FILE's names."),
]
_Crop = Annotated[
    float | None, Option(help="Share of the resized shorter side that the centre crop keeps; 1 keeps all.")
]
_ShorterSide = Annotated[
    int | None, Option(metavar="PIXELS", help="In place of --crop: what the shorter side is resized to.")
]
_Interpolation = Annotated[Interpolation | None, Option(help="How images are resized.")]
_Kernel = Annotated[
    Kernel | None, Option(help="Whose way of resizing: torchvision's, which on images is Pillow's, or OpenCV's.")
]
_Antialias = Annotated[
    bool | None,
    Option(
        "--antialias/--no-antialias",
        help="Off: as torchvision on tensors with antialias=False. OpenCV never does it.",
    ),
]
_Fill = Annotated[
    tuple[int, int, int] | None, Option(metavar="R G B", help="Colour around a letterbox, from 0 to 255.")
]
_Colours = Annotated[
    Colours | None,
    Option(help="Order of the model's channels: bgr if cv2.imread read them and nothing swapped them."),
]
_Mean = Annotated[
    _Triple | None,
    Option(metavar="R G B", help="Mean of each channel in training, of pixels from 0 to 1 or from 0 to 255."),
]
_Std = Annotated[_Triple | None, Option(metavar="R G B", help="Standard deviation, in the same scale.")]
_Kind = Annotated[
    Kind | None,
    Option(help="Which to take where FILE holds plain weights and EMA ones; EMA by default, as timm does."),
]
_Licence = Annotated[
    str | None, Option(help="Licence of the weights, for the card. By default as FOLDER says, else 'unknown'.")
]
_Source = Annotated[str | None, Option(help="Where it comes from, for the card; FILE's name by default.")]
_Version = Annotated[str | None, Option(metavar="N", help="Its number; the next free one by default.")]


def import_(
    file: _Weights, tag: _Tag, variant: _Variant = None, labels: _Labels = None, activation: _Activation = None,
    temperature: _Temperature = None, thresholds: _Thresholds = None, unknown_below: _UnknownBelow = None,
    size: _Pixels = None, like: _Like = None, resize: _Resize = None, crop: _Crop = None,
    shorter_side: _ShorterSide = None, interpolation: _Interpolation = None, kernel: _Kernel = None,
    antialias: _Antialias = None, fill: _Fill = None, colours: _Colours = None, mean: _Mean = None, std: _Std = None,
    weights: _Kind = None,
    licence: _Licence = None, source: _Source = None, version: _Version = None, store: options.Store = None,
) -> None:  # fmt: skip
    """Put a checkpoint of your own into the model store.

    It may have the tensor names of the official repository, timm, Hugging Face transformers, lucid or mmdetection, and
    any number of classes, which is read from its head; without one the model computes embeddings. Code in a .pth is
    never run. A folder that transformers or timm wrote says by itself what its classes are and how images are prepared.
    For a file alone geometry and normalisation must be those it was trained with; the defaults are those of the library
    whose names it has.

    pvt-serve import best.pth --tag birds --labels birds.txt
    """
    from cli.checks import sides
    from cli.environment import store_folder

    if not file.exists():
        raise CommandError(f"{file}: no such file", USAGE)
    if labels not in {None, IMAGENET} and not Path(labels or "").exists():
        raise CommandError(f"labels {labels!r}: No such file or directory", USAGE)
    height, width = (None, None) if size is None else sides(size)
    root = store_folder(store, write=True)
    from service.acquisition.importing import ImportOptions, import_model  # imports torch

    preprocessing = PreprocessingOptions(
        height=height, width=width, resize=resize, crop=crop, shorter_side=shorter_side, interpolation=interpolation,
        kernel=kernel, antialias=antialias, fill=fill, colours=colours, mean=mean, std=std,
    )  # fmt: skip
    requested = ImportOptions(
        file=file, variant=variant, tag=tag, labels=labels, activation=activation, temperature=temperature,
        thresholds=thresholds, unknown_below=unknown_below, like=like, preprocessing=preprocessing, weights=weights,
        licence=licence, source=source, version=version,
    )  # fmt: skip
    with logs_on_stderr():
        with terminal.spinner(f"importing {file}"):
            stored = import_model(root, requested, print_note)
        _note_next(stored, store)
        print_line(_in_short(stored))


def _note_next(stored: "StoredModel", store: str | None) -> None:
    """Say what to type next; commands that answer images find a store by its setting."""
    command = "predict" if stored.require_card().labels else "embed -o embeddings.npz"
    setting = f"PVT_MODEL_STORE={quote(store)} " if store else ""
    print_note(f"next: {setting}pvt-serve {command} --model {stored.key} IMAGE")


def _in_short(stored: "StoredModel") -> str:
    card = stored.require_card()
    pixels = f"{card.preprocessing.height}x{card.preprocessing.width}"
    classes = f"{len(card.labels)} classes" if card.labels else "no head: embeddings only"
    return f"{stored.key}: {classes}, {card.parameters:,} parameters, input {pixels}"
