"""Seconds from `fuse` to the first finished training step in a fresh process; and the host's time per block.

    TRITON_CACHE_DIR=$(mktemp -d) python -m benchmarks.start      # cold; the same again with that folder: warm

One line of JSON. `python -m benchmarks.gpu` runs it twice, cold and warm. `--dry` is a tiny model on a CPU and measures
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import torch
from torch import Tensor, nn

import fastmbconv
from benchmarks import registry, subjects
from benchmarks.step_profile import host_microseconds
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.scaling import COEFFICIENTS

STEPS = 20


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        loss = model(images).float().square().mean()
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize()


def first_step(dry: bool) -> dict[str, float | str]:
    """Seconds to the end of the first step after `fuse`, and of the second; eager's first step has run before them."""
    name = "b0"
    model = fastmbconv.unfuse(subjects.tiny_model().make() if dry else EfficientNet(COEFFICIENTS[name]))
    device = "cpu" if dry else "cuda"
    size = (2, 3, 12, 12) if dry else (registry.BATCHES[name], 3, 224, 224)
    model = model.to(device, memory_format=torch.channels_last).train()
    images = torch.randn(size, device=device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    step(model, optimizer, images)  # CUDA's, cuBLAS's and cuDNN's own start is nobody's here
    began = time.perf_counter()
    fastmbconv.fuse(model)
    step(model, optimizer, images)
    first = time.perf_counter()
    step(model, optimizer, images)
    return {"what": "tiny" if dry else name, "first_s": first - began, "second_s": time.perf_counter() - first}


def main() -> int:
    parser = argparse.ArgumentParser(description="time the first training step after fuse, and a block's host time")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        raise SystemExit("benchmarks.start: no CUDA GPU here")
    cache = os.environ.get("TRITON_CACHE_DIR", "")
    filled = bool(cache) and os.path.isdir(cache) and bool(os.listdir(cache))
    host = host_microseconds(torch.device("cpu" if args.dry else "cuda"), 1 if args.dry else STEPS)
    print(json.dumps({"mode": "warm" if filled else "cold", **first_step(args.dry), **host}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
