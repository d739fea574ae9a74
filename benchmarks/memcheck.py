"""Small blocks, forward and backward, for `compute-sanitizer --tool memcheck python -m benchmarks.memcheck`."""

from __future__ import annotations

import torch

import fastmbconv
from fastmbconv.mbconv import MBConv

CASES = [  # in, out, kernel, stride, expansion, padding, batch, size: odd ones, where an unmasked lane would show
    (24, 24, 3, 1, 6, None, 3, 7),
    (24, 40, 5, 2, 6, None, 5, 9),
    (32, 16, 3, 1, 1, None, 2, 8),
    (16, 24, 3, 2, 6, "same", 2, 11),
]


def main(cases: list[tuple] = CASES) -> None:
    """Run them all in each dtype that this device has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
        for inside, outside, kernel, stride, expand, padding, batch, size in cases:
            module = MBConv(inside, outside, kernel, stride, expand, padding=padding).to(device)
            x = torch.randn(batch, inside, size, size, device=device, dtype=dtype, requires_grad=True)
            with fastmbconv.backend("triton"), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = module(x)
                y.backward(torch.randn_like(y))
                with torch.no_grad():
                    module.eval()(x)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases)} blocks ran")


if __name__ == "__main__":
    main()
