"""`pvt-serve import`."""

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.terminal import USAGE, CommandError, logs_on_stderr, print_line, print_note
from service.acquisition.catalogue import IMAGENET
from service.acquisition.preprocessing import PreprocessingOptions
from service.architecture.variants import VARIANTS
from service.architecture.variants import Weights as Kind
from service.images.geometry import Interpolation, Resize

_Triple = tuple[float, float, float]


def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors file, or .pth as torch.save writes it.")],
    variant: Annotated[str, typer.Option(help=f"Its architecture: {', '.join(VARIANTS)}; b0, b1, ... for short.")],
    tag: Annotated[str, typer.Option(help="Its own name: the model is called VARIANT.TAG, such as pvt_v2_b2.birds.")],
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Names of the classes: one a line, a JSON list, or JSON by number such as id2label; "
            f"'{IMAGENET}' for those of ImageNet-1k. By default 'class 0', 'class 1', ...",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="PIXELS", help="Input, 224 or 256x384 (height x width); 224 by default.")
    ] = None,
    resize: Annotated[
        Resize | None,
        typer.Option(help="How images come to that size. By default as the library does whose names FILE has."),
    ] = None,
    crop: Annotated[
        float | None, typer.Option(help="Share of the resized shorter side that the centre crop keeps; 1 keeps all.")
    ] = None,
    shorter_side: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="In place of --crop: what the shorter side is resized to.")
    ] = None,
    interpolation: Annotated[Interpolation | None, typer.Option(help="How images are resized.")] = None,
    mean: Annotated[
        _Triple | None,
        typer.Option(metavar="R G B", help="Mean of each channel in training, of pixels from 0 to 1 or from 0 to 255."),
    ] = None,
    std: Annotated[_Triple | None, typer.Option(metavar="R G B", help="Standard deviation, in the same scale.")] = None,
    weights: Annotated[
        Kind | None,
        typer.Option(help="Which to take where FILE holds plain weights and EMA ones; EMA by default, as timm does."),
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence of the weights, for the card.")] = "unknown",
    source: Annotated[
        str | None, typer.Option(help="Where it comes from, for the card; FILE's name by default.")
    ] = None,
    version: Annotated[str | None, typer.Option(metavar="N", help="Its number; the next free one by default.")] = None,
    store: options.Store = None,
) -> None:
    """Put a checkpoint of your own into the model store.

    It may have the tensor names of the official repository, timm, Hugging Face transformers or lucid, and any number of
    classes, which is read from its head. Code in a .pth is never run. Geometry and normalisation must be those it was
    trained with; the defaults are those of the library whose names it has.

    pvt-serve import best.pth --variant b2 --tag birds --labels birds.txt
    """
    from service.acquisition.publishing import ImportOptions, import_model  # noqa: PLC0415  imports torch, which --help does not need

    height, width = _size(size)
    requested = ImportOptions(
        file=file,
        variant=variant,
        tag=tag,
        labels=labels,
        preprocessing=PreprocessingOptions(
            height=height,
            width=width,
            resize=resize,
            crop=crop,
            shorter_side=shorter_side,
            interpolation=interpolation,
            mean=mean,
            std=std,
        ),
        weights=weights,
        licence=licence,
        source=source,
        version=version,
    )
    root = options.store_folder(store, write=True)
    with logs_on_stderr():
        stored = import_model(root, requested, print_note)
    card = stored.require_card()
    print_line(
        f"{stored.key}: {len(card.labels)} classes, {card.parameters:,} parameters, "
        f"input {card.preprocessing.height}x{card.preprocessing.width}"
    )


def _size(size: str | None) -> tuple[int | None, int | None]:
    """Height and width."""
    if size is None:
        return None, None
    height, by, width = size.partition("x")
    try:
        return int(height), int(width if by else height)
    except ValueError as error:
        raise CommandError(f"--size {size}: it must be a number of pixels, or two such as 256x384", USAGE) from error
