"""`pvt-serve import`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ValidationError

from cli import options
from cli.terminal import USAGE, CommandError, logs_on_stderr, print_line
from service.acquisition.labels import IMAGENET
from service.architecture.variants import VARIANTS
from service.invalid import reasons
from service.store.cards import Preprocessing

_DEFAULT = Preprocessing(height=224, width=224, crop=0.9)
_Triple = tuple[float, float, float]
Interpolation = Literal["bicubic", "bilinear"]


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
    size: Annotated[str, typer.Option(metavar="PIXELS", help="Input, 224 or 256x384 (height x width).")] = "224",
    crop: Annotated[
        float, typer.Option(help="Share of the shorter side that the centre crop keeps; 1 keeps all.")
    ] = _DEFAULT.crop,
    interpolation: Annotated[Interpolation, typer.Option(help="How images are resized.")] = "bicubic",
    mean: Annotated[
        _Triple, typer.Option(metavar="R G B", help="Mean of each channel in training, of pixels scaled to 0..1.")
    ] = _DEFAULT.mean,
    std: Annotated[_Triple, typer.Option(metavar="R G B", help="Standard deviation, likewise.")] = _DEFAULT.std,
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
    trained with; the defaults are those of the public checkpoints.

    pvt-serve import best.pth --variant b2 --tag birds --labels birds.txt
    """
    from service.acquisition.importing import Import, import_model  # noqa: PLC0415  imports torch, which --help does not need

    requested = Import(
        file=file,
        variant=variant,
        tag=tag,
        labels=labels,
        preprocessing=_preprocessing(size, crop, interpolation, mean, std),
        licence=licence,
        source=source,
        version=version,
    )
    root = options.store_folder(store, write=True)
    with logs_on_stderr():
        stored = import_model(root, requested)
    card = stored.require_card()
    print_line(
        f"{stored.key}: {len(card.labels)} classes, {card.parameters:,} parameters, "
        f"input {card.preprocessing.height}x{card.preprocessing.width}"
    )


def _preprocessing(size: str, crop: float, interpolation: Interpolation, mean: _Triple, std: _Triple) -> Preprocessing:
    height, by, width = size.partition("x")
    try:
        return Preprocessing.model_validate(
            {
                "height": height,
                "width": width if by else height,
                "crop": crop,
                "interpolation": interpolation,
                "mean": mean,
                "std": std,
            }
        )
    except ValidationError as error:
        raise CommandError(reasons(error), USAGE) from error
