"""`fastmbconv info`: versions, the GPU, and which path a call takes on this machine."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from typing import Any

from fastmbconv._version import __version__

PACKAGES = ("torch", "triton", "numpy", "timm", "torchvision", "transformers", "efficientnet_pytorch")
VARIABLES = ("FASTMBCONV_BACKEND", "FASTMBCONV_PLANS", "TRITON_INTERPRET")


def add_to(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, GPU, and which path will run", description=__doc__)
    parser.set_defaults(run=run)


def version_of(package: str) -> str:
    """The installed version, without importing the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run(options: argparse.Namespace) -> int:
    rows = [("fastmbconv", __version__), ("Python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(package, version_of(package)) for package in PACKAGES]
    rows += [("GPU", gpu) for gpu in gpus()]
    rows += [(name, os.environ.get(name, "not set")) for name in VARIABLES]
    rows += [*paths(), ("launches", launches())]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def gpus() -> list[str]:
    """A line for each GPU that torch sees, or one line that says there is none."""
    import torch

    if not torch.cuda.is_available():
        return [f"none that torch sees (torch is built for {cuda_build()})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        lines.append(f"{properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB")
    return lines


def cuda_build() -> str:
    """What torch was built for: "CUDA 13.0", "ROCm 7.1" or "the CPU only"."""
    import torch

    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU only"


def paths() -> list[tuple[str, str]]:
    """Which path a supported block takes, by device and dtype."""
    import torch

    from fastmbconv import dispatch

    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            reason = dispatch.device_reason(torch.empty(1, device=device, dtype=dtype))
            if dispatch.get_backend() == "eager":
                reason = "the backend is set to eager"
            kernels = "Triton kernels, interpreted" if dispatch.interpreted() else "Triton kernels"
            name = f"{device}, {str(dtype).removeprefix('torch.')}"
            rows.append((name, kernels if reason is None else f"eager: {reason}"))
    return rows


def launches() -> str:
    """Whether kernels are launched by plans, or by their launchers at each call."""
    from fastmbconv import dispatch

    if not dispatch.HAS_TRITON:
        return "none: Triton is not installed"
    from fastmbconv import plans

    return plans.state()
