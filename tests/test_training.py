"""Training stays training: what people do between forward and step gives through the kernels what it gives eager."""

import copy
import io

import pytest
import torch
from blocks import INTERPRETED, PRECISE, launches, normal
from parity import assert_parity
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastmbconv
from fastmbconv.mbconv import MBConv

# A GPU's own curve, in its dtypes, is benchmarks/training.py's.
float64 = pytest.mark.skipif(not INTERPRETED, reason="float64 kernels run interpreted only")
KINDS = {
    "no-expansion": dict(in_channels=4, out_channels=4, expand_ratio=1),
    "k5-strided": dict(in_channels=4, out_channels=4, kernel_size=5, stride=2, expand_ratio=2),
    "drop-path": dict(in_channels=4, out_channels=4, expand_ratio=2, drop_path=0.3),
}


class Tiny(nn.Module):
    """A stem, a block of each of `kinds`, a classifier."""

    def __init__(self, *kinds):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1, bias=False)
        self.blocks = nn.Sequential(*(MBConv(**KINDS[kind]) for kind in kinds))
        self.linear = nn.Linear(4, 10)

    def forward(self, x):
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))


class Pair:
    """The same model twice, fused and eager; `both` runs the same code on each from the same seed."""

    def __init__(self, model, dtype, device):
        self.models = {"triton": model.to(device, dtype).train()}
        self.models["eager"] = copy.deepcopy(model)

    def both(self, run):
        results = []
        for backend, model in self.models.items():
            torch.manual_seed(4)
            with fastmbconv.backend(backend):
                results.append(run(model))
        return results

    def assert_same_states(self):
        ours, theirs = (vectors(model) for model in self.models.values())
        for name, value in theirs.items():
            close(name, ours[name], value)


def vectors(model):
    """Weights, gradients, statistics, a vector each: a bias before a BatchNorm has a gradient of rounding alone."""
    parts = {
        "weights": model.parameters(),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "statistics": model.buffers(),
    }
    return {name: torch.cat([t.detach().flatten().double() for t in part]) for name, part in parts.items()}


def close(name, ours, theirs, dtype=PRECISE):
    """The parity rule where eager in the same dtype is the truth: nothing but the dtype's own atol is allowed."""
    assert_parity(name, ours.to(dtype), theirs.to(dtype), theirs)


def batches(count, device, dtype=PRECISE):
    """Digits: scikit-learn's where it is, which is all but the barest GPU machine."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16
    for i in range(count):
        part = slice(6 * i, 6 * i + 6)
        yield images[part].to(device, dtype), torch.from_numpy(labels[part]).long().to(device)


def step(model, optimizer, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@float64
def test_the_loss_curve_is_eagers(device):
    """Losses, weights, momentum's effect and statistics; the last batch is smaller, as a loader's last one is."""
    pair = Pair(Tiny(*KINDS), PRECISE, device)

    def run(model):
        optimizer = sgd(model)
        losses = [step(model, optimizer, x, y) for x, y in batches(3, device)]
        ((x, y),) = batches(1, device)
        return torch.stack([*losses, step(model, optimizer, x[:4], y[:4])])

    ours, theirs = pair.both(run)
    assert theirs.unique().numel() == 4
    close("losses", ours, theirs)
    pair.assert_same_states()


def test_grad_scaler_skips_the_step_that_overflows(device):
    """fp16: a poisoned batch leaves the weights and halves the scale, fused as eager; the next step is taken again."""
    pair = Pair(Tiny("drop-path"), torch.float32, device)

    def run(model):
        optimizer, scaler = sgd(model), torch.amp.GradScaler(device.type, 256.0)
        moved, scales = [], []
        for factor, (x, y) in zip((1.0, torch.inf, 1.0), batches(3, device, torch.float32), strict=True):
            before = model.blocks[0].project_conv.weight.detach().clone()
            with torch.autocast(device.type, torch.float16):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            moved.append(not torch.equal(before, model.blocks[0].project_conv.weight))
            scales.append(scaler.get_scale())
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
        return moved, scales, loss.item()

    ours, theirs = pair.both(run)
    assert ours[:2] == theirs[:2] == ([True, False, True], [256.0, 128.0, 128.0])
    assert_parity("loss", *(torch.tensor(v[2], dtype=torch.float16) for v in (ours, theirs, theirs)))


@float64
def test_gradients_accumulate_over_micro_batches(device):
    """Into what is there: nothing after zero_grad(), zeros after zero_grad(set_to_none=False)."""
    pair = Pair(MBConv(**KINDS["drop-path"]), PRECISE, device)

    def run(block):
        x = normal(6, 4, 3, 3, dtype=PRECISE, device=device)
        block(x).square().mean().backward()
        first = {p: p.grad for p in block.parameters()}
        block(x.flip(0)).square().mean().backward()
        assert all(p.grad is grad for p, grad in first.items())
        twice = vectors(block)["gradients"]
        block.zero_grad(set_to_none=False)
        block(x).square().mean().backward()
        assert all(p.grad is grad for p, grad in first.items())
        return twice

    ours, theirs = pair.both(run)
    close("two micro-batches", ours, theirs)
    pair.assert_same_states()


@float64
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_train_as_eager_does(reentrant, device):
    """The second forward draws the same stochastic depth, and moves the statistics once more, as torch's does."""
    pair = Pair(MBConv(**KINDS["drop-path"]), PRECISE, device)
    plain = copy.deepcopy(pair.models["eager"])

    def run(block):
        x = normal(6, 4, 3, 3, dtype=PRECISE, device=device).requires_grad_()
        checkpoint(block, x, use_reentrant=reentrant).square().mean().backward()
        return x.grad

    ours, theirs = pair.both(run)
    close("dx", ours, theirs)
    pair.assert_same_states()
    torch.manual_seed(4)
    x = normal(6, 4, 3, 3, dtype=PRECISE, device=device).requires_grad_()
    with fastmbconv.backend("eager"):
        plain(x).square().mean().backward()
    close("dx without checkpointing", ours, x.grad)
    assert pair.models["triton"].project_bn.num_batches_tracked == 2


def test_training_resumes_where_it_stopped(device, triton_backend):
    """Weights, statistics and momentum through a file: bitwise the run that was not interrupted."""
    whole = MBConv(4, 4, expand_ratio=2).to(device)
    optimizer = sgd(whole)
    x = normal(4, 4, 2, 2, dtype=torch.float32, device=device)

    def advance(block, optimizer):
        optimizer.zero_grad()
        block(x).square().mean().backward()
        optimizer.step()

    advance(whole, optimizer)
    file = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    advance(whole, optimizer)
    file.seek(0)
    stored = torch.load(file, map_location=device)
    resumed = MBConv(4, 4, expand_ratio=2).to(device)
    resumed.load_state_dict(stored["model"])
    again = sgd(resumed)
    again.load_state_dict(stored["optimizer"])
    advance(resumed, again)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def test_an_averaged_model_runs_through_the_kernels_too(device, triton_backend):
    """deepcopy keeps a fused block fused; the average follows as eager's does."""
    block = MBConv(4, 4, expand_ratio=2).to(device)
    average = torch.optim.swa_utils.AveragedModel(
        block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    average.update_parameters(block)  # the first one copies
    with torch.no_grad():
        for p in block.parameters():
            p.add_(1.0)
    average.update_parameters(block)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.5)
    x = normal(2, 4, 3, 3, dtype=torch.float32, device=device)
    with launches() as seen, torch.no_grad():
        y = average.eval()(x)
    assert seen
    theirs = copy.deepcopy(average.module).forward_eager(x)
    close("y", y, theirs, torch.float32)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.bfloat16, id="bf16")])
def test_parameters_of_low_precision_take_steps(dtype, device, triton_backend):
    """model.half() or .bfloat16(), BatchNorm included: gradients and weights stay in that dtype and move."""
    block = MBConv(4, 4, expand_ratio=2).to(device, dtype)
    optimizer = sgd(block)
    before = block.expand_conv.weight.detach().clone()
    block(normal(4, 4, 3, 3, dtype=dtype, device=device)).square().mean().backward()
    assert {p.grad.dtype for p in block.parameters()} == {dtype}
    optimizer.step()
    assert not torch.equal(before, block.expand_conv.weight)
    assert all(torch.isfinite(value).all() for value in block.state_dict().values())
