"""Trains `pvt_v2_b0.digits`, the model that a fresh checkout serves, on scikit-learn's handwritten digits.

    python -m training.digits [--start WEIGHTS] [--steps 750 700 160] [--rates 8e-4 8e-4 3e-4] [--seed 0]

The model learns at 64 x 64 first, where a step costs least, or starts from weights that did; then at all sizes. Its
weights are the mean of those at the ends of the last two cycles of the rate (https://arxiv.org/abs/1803.05407). The
data are 1,797 images of 8 x 8 pixels (the test part of UCI's "Optical Recognition of Handwritten Digits"). A fixed,
stratified fifth is held out; the card's accuracy is measured on it, through images rendered as a caller would post
them. Runs with the same options on the same machine give the same bytes.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its customary name
from tqdm import tqdm

from service.architecture.pvt_v2 import PVT_V2, create
from service.architecture.weights import load_weights
from service.backends.base import Served, plain_logits
from service.execution.reference import Reference, packed
from service.files import file_sha256
from service.store.cards import Accuracy, ModelCard, Preprocessing
from service.store.folder import weights_file, write_model

SIDE = 64
SIZES = tuple(range(64, 257, 32))
MEASURED = (SIDE, 128, 224)  # sizes whose accuracy the card tells
EXPLAINED = 128  # the side at which maps are explained
FIRST_STEPS, STEPS, RATES = 575, (750, 700, 160), (8e-4, 8e-4, 3e-4)  # the peak rate of each cycle
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VARIANT = "pvt_v2_b0"
MODEL_ID = f"{VARIANT}.digits"
PREPROCESSING = Preprocessing(height=SIDE, width=SIDE)
MAX_DEGREES, MAX_SCALE, MAX_SHIFT = 12, 0.15, 0.12  # of augmentation; shift in half sides
MAX_GAIN = 4  # of contrast
BATCH, MIN_BATCH, WEIGHT_DECAY, SMOOTHING = 64, 8, 0.05, 0.05


class Digits(NamedTuple):
    """Images (N, 8, 8) with ink from 0 to 16, and their labels (N,)."""

    pixels: NDArray[np.float64]
    labels: NDArray[np.int64]


class Split(NamedTuple):
    """What is trained on, and the fifth that is not."""

    train: Digits
    held_out: Digits


def split() -> Split:
    """The one split that all figures speak of."""
    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=0.2, stratify=data.target, random_state=0)
    train_pixels, held_out_pixels, train_labels, held_out_labels = parts
    return Split(Digits(train_pixels, train_labels), Digits(held_out_pixels, held_out_labels))


def render(pixels: NDArray[np.float64]) -> Image.Image:
    """Ink (8, 8) from 0 to 16 -> a grey image of 64 x 64, white ink on black, as a caller would post it."""
    grey = np.round(pixels * (255 / 16)).astype(np.uint8)
    return Image.fromarray(grey, mode="L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def rendered(digits: Digits) -> Tensor:
    """All images as the decoder would hand them over: uint8 (N, 1, 64, 64), its three channels being equal."""
    return torch.from_numpy(np.stack([np.asarray(render(pixels)) for pixels in digits.pixels])).unsqueeze(1)


def normalised(grey: Tensor) -> Tensor:
    """Grey (N, 1, H, W) from 0 to 1 -> the model's input (N, 3, H, W), normalised as in serving."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return (grey - mean) / std


def augmented(grey: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, 1, H, W) turned, scaled and shifted a little, and every other one inverted: dark on light."""
    turn, scale, across, down = (2 * torch.rand(4, len(grey), generator=generator) - 1).unbind()
    turn, scale = torch.deg2rad(turn * MAX_DEGREES), 1 + scale * MAX_SCALE
    cos, sin = turn.cos() * scale, turn.sin() * scale
    rows = [torch.stack([cos, -sin, across * MAX_SHIFT], 1), torch.stack([sin, cos, down * MAX_SHIFT], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(grey.shape), align_corners=False)
    grey = F.grid_sample(grey, grid, align_corners=False)
    inverted = torch.rand(len(grey), 1, 1, 1, generator=generator) < 0.5  # noqa: PLR2004 - half of them
    return torch.where(inverted, 1 - grey, grey)


def seen(grey: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Images (N, 1, H, W) from 0 to 1 at `side` x `side`, as serving resizes them, half of them with sharper edges.

    The digits' pixels are far larger than those of an input, so that all their edges are soft. Those of a pointer's
    strokes are not.
    """
    grey = F.interpolate(grey, (side, side), mode="bicubic").clamp(0, 1)
    gain, middle, chosen = torch.rand(3, len(grey), 1, 1, 1, generator=generator).unbind()
    sharp = ((grey - 0.35 - 0.3 * middle) * (1 + gain * (MAX_GAIN - 1)) + 0.5).clamp(0, 1)
    return torch.where(chosen < 0.5, sharp, grey)  # noqa: PLR2004 - half of them


def batches(count: int, steps: int, sizes: Sequence[int], generator: torch.Generator) -> Iterator[tuple[Tensor, int]]:
    """Indices in an order that is random in each pass over all, and the side at which to train on them.

    Each batch has about as many pixels as one of BATCH images at SIDE, and at least MIN_BATCH images.
    """
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        side = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        images = max(MIN_BATCH, BATCH * SIDE**2 // side**2)
        while len(order) < images:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:images], side
        order = order[images:]


def train(
    model: nn.Module,
    grey: Tensor,
    labels: Tensor,
    *,
    steps: int,
    seed: int,
    sizes: Sequence[int] = SIZES,
    rate: float = RATES[0],
) -> list[float]:
    """Train in place with AdamW on a cosine schedule, in bfloat16 with float32's weights.

    Args:
        model: classifies inputs (N, 3, H, W).
        grey: uint8 (N, 1, H, W).
        labels: int64 (N,).
        steps: batches to train on.
        seed: of order, sizes and augmentation, and of the model's stochastic depth.
        sizes: sides of the inputs; each batch has one of them.
        rate: the greatest learning rate.

    Returns:
        The loss of every step.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    for batch, side in tqdm(batches(len(grey), steps, sizes, generator), total=steps, unit="step", mininterval=1):
        inputs = normalised(seen(augmented(grey[batch] / 255, generator), side, generator))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def predicted(model: nn.Module, grey: Tensor, side: int = SIDE) -> Tensor:
    """The top class (N,) of uint8 images (N, 1, H, W) in an input of `side` x `side`."""
    model.eval()
    resized = F.interpolate(grey.float(), (side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
    return torch.cat([model(normalised(part / 255)).argmax(1) for part in torch.split(resized, BATCH)])


def share(right: Tensor) -> float:
    """The share of true values, to four digits."""
    return round(right.double().mean().item(), 4)


def halved(model: nn.Module, grey: Tensor) -> tuple[torch.dtype, dict[int, Tensor]]:
    """Round the weights to float16 where that changes none of `predicted`: their type now, and `predicted` by size."""
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {side: predicted(model, grey, side) for side in MEASURED}
    model.load_state_dict({name: tensor.half() for name, tensor in exact.items()})
    if all(torch.equal(classes, predicted(model, grey, side)) for side, classes in before.items()):
        return torch.float16, before
    model.load_state_dict(exact)
    return torch.float32, before


def publish(model: PVT_V2, store: Path, held_out: Digits, how: str) -> ModelCard:
    """Write weights and card into `store`; `how` is the start of the card's account of the training."""
    grey, labels = rendered(held_out), torch.from_numpy(held_out.labels)
    kind, classes = halved(model, grey)
    right = {side: share(each == labels) for side, each in classes.items()}
    inverted = share(predicted(model, 255 - grey) == labels)
    sizes = ", ".join(f"{each:.1%} at {side}x{side}" for side, each in right.items())
    state = {name: tensor.to(kind).contiguous() for name, tensor in model.state_dict().items()}
    weights = save(state)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    reference, reference_file = packed(reference_of(model, held_out))
    card = ModelCard(
        id=MODEL_ID,
        variant=VARIANT,
        labels=tuple(str(digit) for digit in range(10)),
        preprocessing=PREPROCESSING,
        weights=weights_file(weights),
        parameters=sum(tensor.numel() for tensor in state.values()),
        licence="Apache-2.0",
        source="python -m training.digits",
        reference=reference_file,
        accuracy=Accuracy(dataset="scikit-learn load_digits, held-out fifth", top1=right[SIDE], images=len(labels)),
        explain_size=(EXPLAINED, EXPLAINED),
        training=f"{how} Of the held-out images {sizes} are right; inverted, dark on light, {inverted:.1%}."
        + (" Weights are stored as float16, which changes no held-out prediction." if kind == torch.float16 else ""),
    )
    write_model(store, "1", card, weights, {reference_file.file: reference})
    return card


def firsts(digits: Digits) -> list[int]:
    """Where the first image of each class is."""
    return [int(np.argmax(digits.labels == digit)) for digit in range(len(NAMES))]


def reference_of(model: PVT_V2, held_out: Digits) -> Reference:
    """The first held-out image of each class, and what the plain module answers."""
    grey = rendered(held_out)[firsts(held_out)]
    images = grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()  # (N, 1, H, W) -> (N, H, W, 3)
    served = Served(model, PREPROCESSING.mean, PREPROCESSING.std).eval()
    return Reference(images, plain_logits(served, images))


def write_samples(folder: Path, held_out: Digits) -> None:
    """The first held-out image of each class, right or wrong, as `zero.png` to `nine.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    for first, name in zip(firsts(held_out), NAMES, strict=True):
        render(held_out.pixels[first]).save(folder / f"{name}.png")


def trained(options: argparse.Namespace, digits: Digits) -> tuple[PVT_V2, str]:
    """A model trained as `options` say, and in words how it was."""
    torch.manual_seed(options.seed)
    model = create(VARIANT, img_size=SIDE, num_classes=len(NAMES), drop_path_rate=0.05)
    started = time.process_time()
    grey, labels = rendered(digits), torch.from_numpy(digits.labels)
    if options.start:
        load_weights(model, options.start, digest := file_sha256(options.start))
        first = f"Started from the weights with SHA-256 {digest}"
    else:
        train(model, grey, labels, steps=options.first_steps, seed=options.seed, sizes=(SIDE,))
        first = f"{options.first_steps} steps at {SIDE}x{SIDE}"
    ends = []
    for cycle, (steps, rate) in enumerate(zip(options.steps, options.rates, strict=True)):
        train(model, grey, labels, steps=steps, seed=options.seed + cycle, sizes=options.sizes, rate=rate)
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    model.load_state_dict({name: sum(end[name] for end in ends[-2:]) / len(ends[-2:]) for name in ends[-1]})
    return model, (
        f"{first}, then {', '.join(map(str, options.steps))} steps at sides of {min(options.sizes)} to "
        f"{max(options.sizes)}, of AdamW (cosines, peaks {', '.join(map(str, options.rates))}, weight decay "
        f"{WEIGHT_DECAY}, batches of {BATCH} images at {SIDE}x{SIDE} and at least {MIN_BATCH}, label smoothing "
        f"{SMOOTHING}, drop path 0.05, bfloat16, seed {options.seed}) over {len(labels)} images of scikit-learn's "
        f"load_digits, a stratified fifth held out; each turned up to {MAX_DEGREES} degrees, scaled and shifted (in "
        f"half sides) up to {MAX_SCALE:.0%} and {MAX_SHIFT:.0%}, half of them with more contrast, and half inverted. "
        "The mean of the weights after the last two. "
        f"It took {time.process_time() - started:.0f} seconds of CPU time."
    )


def main() -> None:
    """Train, measure and write the model."""
    parser = argparse.ArgumentParser(prog="python -m training.digits", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("model_store"), help="the model store to write to")
    parser.add_argument("--first-steps", type=int, default=FIRST_STEPS, help=f"steps at {SIDE}x{SIDE} alone")
    parser.add_argument("--start", type=Path, help="weights to start from in place of that")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="at all sizes, of each cycle of the rate")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="the greatest learning rate of each")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of inputs, multiples of 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path, help="folder for one held-out image of each digit")
    options = parser.parse_args()
    if len(options.steps) != len(options.rates):
        parser.error(f"{len(options.steps)} --steps and {len(options.rates)} --rates; give one rate for each")

    torch.use_deterministic_algorithms(mode=True)
    data = split()
    model, how = trained(options, data.train)
    card = publish(model, options.out, data.held_out, how)
    if options.samples:
        write_samples(options.samples, data.held_out)
    print(card.accuracy, card.training, sep="\n")  # noqa: T201 - a command's answer


if __name__ == "__main__":
    main()
