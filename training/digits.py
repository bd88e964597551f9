"""Trains `pvt_v2_b0.digits`, the model that a fresh checkout serves, on scikit-learn's handwritten digits.

    python -m training.digits [--out model_store] [--epochs 25] [--seed 0] [--samples docs/digits]

The data are 1,797 images of 8 x 8 pixels (the test part of UCI's "Optical Recognition of Handwritten Digits"). A
fixed, stratified fifth is held out; the card's accuracy is measured on it, through images rendered as a caller would
post them. Runs with the same seed on the same machine give the same bytes.
"""

import argparse
import time
from collections.abc import Iterator
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
from service.backends.base import Served, plain_logits
from service.execution.reference import Reference, packed
from service.store.cards import Accuracy, ModelCard, Preprocessing
from service.store.folder import weights_file, write_model

SIDE = 64
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VARIANT = "pvt_v2_b0"
MODEL_ID = f"{VARIANT}.digits"
PREPROCESSING = Preprocessing(height=SIDE, width=SIDE)
MAX_DEGREES, MAX_SCALE, MAX_SHIFT = 12, 0.15, 0.12  # of augmentation; shift in half sides
BATCH, PEAK_RATE, WEIGHT_DECAY, SMOOTHING = 64, 1e-3, 0.05, 0.05


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


def batches(count: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one epoch in random order."""
    yield from torch.split(torch.randperm(count, generator=generator), BATCH)


def train(model: nn.Module, grey: Tensor, labels: Tensor, *, epochs: int, seed: int) -> list[float]:
    """Train in place with AdamW on a cosine schedule.

    Args:
        model: classifies inputs (N, 3, H, W).
        grey: uint8 (N, 1, H, W).
        labels: int64 (N,).
        epochs: passes over the data.
        seed: of order and augmentation, and of the model's stochastic depth.

    Returns:
        The loss of every step.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(grey) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    losses = []
    model.train()
    with tqdm(total=steps, unit="step", mininterval=1) as bar:
        for _ in range(epochs):
            for batch in batches(len(grey), generator):
                inputs = normalised(augmented(grey[batch] / 255, generator))
                loss = F.cross_entropy(model(inputs), labels[batch], label_smoothing=SMOOTHING)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
    return losses


@torch.inference_mode()
def predicted(model: nn.Module, grey: Tensor) -> Tensor:
    """The top class (N,) of uint8 images (N, 1, H, W)."""
    model.eval()
    return torch.cat([model(normalised(part / 255)).argmax(1) for part in torch.split(grey, BATCH)])


def share(right: Tensor) -> float:
    """The share of true values, to four digits."""
    return round(right.double().mean().item(), 4)


def halved(model: nn.Module, grey: Tensor) -> bool:
    """Round the weights to float16 where that leaves every one of `predicted` as it was; whether it did."""
    exact, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, predicted(model, grey)
    model.load_state_dict({name: tensor.half() for name, tensor in exact.items()})
    if torch.equal(before, predicted(model, grey)):
        return True
    model.load_state_dict(exact)
    return False


def publish(model: PVT_V2, store: Path, held_out: Digits, how: str) -> ModelCard:
    """Write weights and card into `store`; `how` is the start of the card's account of the training."""
    grey, labels = rendered(held_out), torch.from_numpy(held_out.labels)
    kind = torch.float16 if halved(model, grey) else torch.float32
    right, right_inverted = predicted(model, grey) == labels, predicted(model, 255 - grey) == labels
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
        accuracy=Accuracy(dataset="scikit-learn load_digits, held-out fifth", top1=share(right), images=len(right)),
        training=f"{how} Of the held-out pictures inverted, dark on light, {share(right_inverted):.1%} are right."
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


def main() -> None:
    """Train, measure and write the model."""
    parser = argparse.ArgumentParser(prog="python -m training.digits", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("model_store"), help="the model store to write to")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path, help="folder for one held-out image of each digit")
    options = parser.parse_args()

    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(options.seed)
    data = split()
    model = create(VARIANT, img_size=SIDE, num_classes=10, drop_path_rate=0.05)
    started = time.process_time()
    labels = torch.from_numpy(data.train.labels)
    train(model, rendered(data.train), labels, epochs=options.epochs, seed=options.seed)
    how = (
        f"{options.epochs} epochs of AdamW (cosine, peak {PEAK_RATE}, weight decay {WEIGHT_DECAY}, batches of {BATCH}, "
        f"label smoothing {SMOOTHING}, drop path 0.05, seed {options.seed}) over {len(labels)} pictures of "
        f"scikit-learn's load_digits, a stratified fifth held out; each turned up to {MAX_DEGREES} degrees, scaled and "
        f"shifted (in half sides) up to {MAX_SCALE:.0%} and {MAX_SHIFT:.0%}, and inverted half the time. "
        f"It took {time.process_time() - started:.0f} seconds of CPU time."
    )
    card = publish(model, options.out, data.held_out, how)
    if options.samples:
        write_samples(options.samples, data.held_out)
    print(card.accuracy, card.training, sep="\n")  # noqa: T201 - a command's answer


if __name__ == "__main__":
    main()
