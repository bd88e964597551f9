"""The commands that put models into the store: `pvt-serve pull` and `import`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from typer import Argument, Exit, Option

from app.settings import Settings
from cli import options, terminal
from cli.terminal import USAGE, CommandError, logs_on_stderr, print_line, print_note
from service.acquisition.catalogue import CATALOGUE, DEFAULT_SOURCE, IMAGENET, Published, SourceName, published
from service.acquisition.preprocessing import PreprocessingOptions
from service.architecture.variants import VARIANTS
from service.architecture.variants import Weights as Kind
from service.errors import ServiceError
from service.images.geometry import Interpolation, Resize

if TYPE_CHECKING:
    from service.acquisition.pulling import Pulled, PullOptions

_Triple = tuple[float, float, float]


def pull(
    models: Annotated[
        list[str] | None,
        Argument(metavar="MODELS...", help=f"Variants: {', '.join(CATALOGUE)}; b0, b1, ... for short."),
    ] = None,
    every: Annotated[bool, Option("--all", help="Pull all seven, about 1 GB.")] = False,
    source: Annotated[SourceName, Option(help="Whose copy of the public weights to fetch.")] = DEFAULT_SOURCE,
    store: options.Store = None,
    mirror: Annotated[
        str | None, Option(metavar="URL", help="In place of https://huggingface.co and https://github.com; PVT_MIRROR.")
    ] = None,
    again: Annotated[bool, Option("--again", help="Fetch as a new version what is there already.")] = False,
) -> None:
    """Fetch public ImageNet-1k weights into the model store.

    Each file is checked against its SHA-256, converted, and written as `<variant>.in1k` with labels, licence and
    reference outputs. A pull that was broken off goes on where it ended; what is in the store already is not fetched
    again. Then `pvt-serve predict --model pvt_v2_b2 ...`.
    """
    if every == bool(models):
        raise CommandError("name the models to pull, such as 'pvt-serve pull b2', or give --all", USAGE)
    requested = list(CATALOGUE.values()) if every else [published(name) for name in models or ()]
    from service.acquisition.pulling import PullOptions  # noqa: PLC0415  imports torch, which --help does not need

    pull_options = PullOptions(source=source, mirror=mirror or Settings.from_environment().mirror or None)
    root, failed = options.store_folder(store, write=True), 0
    with logs_on_stderr():
        for model in dict.fromkeys(each.variant for each in requested):
            try:
                print_line(_described(_pulled(root, CATALOGUE[model], pull_options, again=again), source))
            except ServiceError as error:
                if len(requested) == 1:
                    raise
                failed += 1
                print_note(f"pvt-serve: {model}: {terminal.reason(error)}")
    if failed:
        raise Exit(terminal.FAILED if failed == len(requested) else terminal.SOME_FAILED)


def _pulled(root: Path, model: Published, options: "PullOptions", *, again: bool) -> "Pulled":
    from service.acquisition.pulling import pull as pull_model  # noqa: PLC0415  imports torch, which --help does not need

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with terminal.progress_bar(*columns, transient=True) as progress:
        bar = progress.add_task(model.id, total=None)

        def on_progress(done: int, total: int | None) -> None:
            progress.update(bar, completed=done, total=total)

        return pull_model(root, model, options, again=again, on_progress=on_progress)


def _described(pulled: "Pulled", source: SourceName) -> str:
    key, origin = pulled.stored.key, pulled.stored.require_card().origin
    if not pulled.fresh:
        return f"{key} is in the store already; --again fetches it as a new version"
    if origin is None:
        return key
    checks = {
        "publisher": "SHA-256 as its publisher gave it",
        "hub": "SHA-256 as the hub gives it",
        "nobody": f"SHA-256 {origin.sha256}, which nobody has published: the first file fetched is trusted",
    }
    return f"{key}: {origin.bytes / 1e6:.1f} MB from {source}, {checks[origin.digest_from]}"


def import_(
    file: Annotated[Path, Argument(metavar="FILE", help="A file of safetensors or of torch.save, of any name.")],
    tag: Annotated[str, Option(help="Its own name: the model is called VARIANT.TAG, such as pvt_v2_b2.birds.")],
    variant: Annotated[
        str | None,
        Option(
            help=f"A check of its architecture, which the file tells: {', '.join(VARIANTS)}; b0, b1, ... for short."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="Names of the classes: one a line, a JSON list, or JSON by number such as id2label; "
            f"'{IMAGENET}' for those of ImageNet-1k. By default 'class 0', 'class 1', ...",
        ),
    ] = None,
    size: Annotated[
        str | None, Option(metavar="PIXELS", help="Input, 224 or 256x384 (height x width); 224 by default.")
    ] = None,
    resize: Annotated[
        Resize | None, Option(help="How images come to that size. By default as the library does whose names FILE has.")
    ] = None,
    crop: Annotated[
        float | None, Option(help="Share of the resized shorter side that the centre crop keeps; 1 keeps all.")
    ] = None,
    shorter_side: Annotated[
        int | None, Option(metavar="PIXELS", help="In place of --crop: what the shorter side is resized to.")
    ] = None,
    interpolation: Annotated[Interpolation | None, Option(help="How images are resized.")] = None,
    mean: Annotated[
        _Triple | None,
        Option(metavar="R G B", help="Mean of each channel in training, of pixels from 0 to 1 or from 0 to 255."),
    ] = None,
    std: Annotated[_Triple | None, Option(metavar="R G B", help="Standard deviation, in the same scale.")] = None,
    weights: Annotated[
        Kind | None,
        Option(help="Which to take where FILE holds plain weights and EMA ones; EMA by default, as timm does."),
    ] = None,
    licence: Annotated[str, Option(help="Licence of the weights, for the card.")] = "unknown",
    source: Annotated[str | None, Option(help="Where it comes from, for the card; FILE's name by default.")] = None,
    version: Annotated[str | None, Option(metavar="N", help="Its number; the next free one by default.")] = None,
    store: options.Store = None,
) -> None:
    """Put a checkpoint of your own into the model store.

    It may have the tensor names of the official repository, timm, Hugging Face transformers or lucid, and any number of
    classes, which is read from its head. Code in a .pth is never run. Geometry and normalisation must be those it was
    trained with; the defaults are those of the library whose names it has.

    pvt-serve import best.pth --tag birds --labels birds.txt
    """
    from service.acquisition.publishing import ImportOptions, import_model  # noqa: PLC0415  imports torch, which --help does not need

    height, width = _size(size)
    preprocessing = PreprocessingOptions(
        height=height, width=width, resize=resize, crop=crop, shorter_side=shorter_side, interpolation=interpolation,
        mean=mean, std=std,
    )  # fmt: skip
    requested = ImportOptions(
        file=file, variant=variant, tag=tag, labels=labels, preprocessing=preprocessing, weights=weights,
        licence=licence, source=source, version=version,
    )  # fmt: skip
    root = options.store_folder(store, write=True)
    with logs_on_stderr():
        stored = import_model(root, requested, print_note)
    card = stored.require_card()
    pixels = f"{card.preprocessing.height}x{card.preprocessing.width}"
    print_line(f"{stored.key}: {len(card.labels)} classes, {card.parameters:,} parameters, input {pixels}")


def _size(size: str | None) -> tuple[int | None, int | None]:
    """Height and width."""
    if size is None:
        return None, None
    height, by, width = size.partition("x")
    try:
        return int(height), int(width if by else height)
    except ValueError as error:
        raise CommandError(f"--size {size}: it must be a number of pixels, or two such as 256x384", USAGE) from error
