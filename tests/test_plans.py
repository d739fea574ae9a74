"""Launch plans: replayed calls give what launchers give, bit for bit, and step aside where they can't stand in."""

import copy
import gc
import re
import weakref
from dataclasses import dataclass, field

import pytest
import torch
from blocks import batch_norms, make_block, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastmbconv
from fastmbconv import functional, plans, replay
from fastmbconv.block import BatchNorm, SqueezeExcite
from fastmbconv.kernels import launching, pointwise, tables
from fastmbconv.kernels.traffic import recorded

pytestmark = pytest.mark.usefixtures("triton_backend")


@dataclass(frozen=True)
class Row:
    """A block (arguments of MBConv), and how it is called."""

    block: dict
    memory: str = "fast"
    dtype: torch.dtype = torch.float32
    training: bool = True
    autocast: bool = False
    frozen: tuple = ()
    form: dict = field(default_factory=dict)


def block(out=4, kernel_size=3, stride=1, **options):
    return dict(out_channels=out, kernel_size=kernel_size, stride=stride) | dict(expand_ratio=2) | options


ROWS = {
    "residual": Row(block()),
    "lean-k3": Row(block(), "lean"),
    "k5-same-strided": Row(block(6, 5, 2, padding="same")),
    "no-expansion": Row(block(expand_ratio=1)),
    "no-se-relu6": Row(block(se_ratio=0, activation="relu6")),
    "bf16": Row(block(), dtype=torch.bfloat16),
    "autocast": Row(block(), autocast=True),
    "frozen-norm": Row(block(), frozen=("depthwise_bn",)),
    "frozen-front": Row(block(), frozen=("expand_conv", "expand_bn", "depthwise_conv")),
    "product-by-the-library": Row(block(), autocast=True, form=dict(LIBRARY=1)),
    "eval": Row(block(), training=False),
    "eval-autocast": Row(block(6, 5, 2), training=False, autocast=True),
}


def build(row, device):
    module = make_block(4, dtype=row.dtype, device=device, **row.block).train(row.training)
    for name in row.frozen:
        part = getattr(module, name)
        part.eval() if isinstance(part, nn.BatchNorm2d) else part.requires_grad_(False)
    return fastmbconv.fuse(module, memory=row.memory)


def call(module, x, row):
    """Output, gradients and statistics of one call."""
    for parameter in module.parameters():
        parameter.grad = None
    x = x.clone().requires_grad_(row.training)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=row.autocast), torch.set_grad_enabled(row.training):
        y = module(x)
    if row.training:
        y.backward(torch.linspace(-1, 1, y.numel(), device=x.device).reshape(y.shape).to(y.dtype))
    found = {"y": y, "dx": x.grad, **{n: p.grad for n, p in module.named_parameters()}, **dict(module.named_buffers())}
    return {name: value if value is None else value.detach().clone() for name, value in found.items()}


def assert_equal(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert value is ours[name] is None or torch.equal(value, ours[name]), name
        assert value is None or value.stride() == ours[name].stride(), name


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_replay_is_what_launchers_do(row, device, monkeypatch):
    """The third call, on another image: statistics have moved."""
    if row.form:
        monkeypatch.setattr(pointwise, "form_tiles", lambda *_: row.form)
    plans.forget()
    module = build(row, device)
    first, second, third = (normal(2, 4, 3, 2, dtype=row.dtype, device=device) for _ in range(3))
    call(module, first, row)
    call(module, second, row)
    other = copy.deepcopy(module)
    ours = call(module, third, row)
    with launching.watching():
        assert_equal(ours, call(other, third, row))
    assert len(plans.made()) == (2 if row.training else 1)


def test_parts_of_their_own_are_replayed_too(device):
    plans.forget()
    taps, bn = normal(4, 1, 3, 3, dtype=torch.float32, device=device).requires_grad_(), nn.BatchNorm2d(4).to(device)
    weights = [normal(*s, dtype=torch.float32, device=device) for s in ((2, 4, 1, 1), (2,), (4, 2, 1, 1), (4,))]

    def both(x):
        y = functional.depthwise_bn_act(x, taps, BatchNorm.of(bn), 1, 1)
        z = functional.squeeze_excite(y, SqueezeExcite(*weights))
        return z, *torch.autograd.grad(z.square().sum(), (taps, x))

    for _ in range(3):
        x = normal(2, 4, 4, 3, dtype=torch.float32, device=device).requires_grad_()
        ours = both(x)
        with launching.watching():
            assert all(map(torch.equal, ours, both(x)))
    assert len(plans.made()) == 4


def test_blocks_of_one_shape_share_their_plans(device):
    plans.forget()
    row = ROWS["residual"]
    for _ in range(2):
        call(build(row, device), normal(2, 4, 3, 3, dtype=torch.float32, device=device), row)
    assert len(plans._plans) == len(plans.made()) == 2


def test_a_pointer_of_another_alignment_takes_the_launchers(device):
    """Kernels are compiled for pointers that 16 divides."""
    row, module = ROWS["eval"], build(ROWS["eval"], device)
    images = normal(3, 4, 3, 3, dtype=torch.float32, device=device).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        expected = call(module, images, row)["y"]
    memory = torch.empty(images.numel() + 1, device=device)[1:]
    shifted = memory.as_strided(images.shape, images.stride()).copy_(images)
    assert shifted.data_ptr() % 16
    with torch.no_grad():
        assert torch.equal(module(shifted), expected)


def test_who_watches_launches_sees_all_of_them(device):
    row, module = ROWS["residual"], build(ROWS["residual"], device)
    x = normal(2, 4, 3, 3, dtype=torch.float32, device=device)
    for _ in range(2):
        call(module, x, row)
    with recorded() as launches:
        call(module, x, row)
    assert len(launches) > 15


def test_plans_can_be_switched_off(device, monkeypatch):
    plans.forget()
    monkeypatch.setattr(plans, "ENABLED", False)
    row, module = ROWS["eval"], build(ROWS["eval"], device)
    x = normal(2, 4, 3, 3, dtype=torch.float32, device=device)
    assert torch.equal(call(module, x, row)["y"], call(module, x, row)["y"]) and not plans._plans
    assert plans.state() == "each anew: FASTMBCONV_PLANS is 0"


def test_new_tiles_are_asked_for(device):
    """A tuned table that is there now, another GPU: plans of before say nothing any more."""
    row, module = ROWS["residual"], build(ROWS["residual"], device)
    x, asked = normal(2, 4, 3, 3, dtype=torch.float32, device=device), []
    for _ in range(2):
        call(module, x, row)
    before = launching.epoch()
    tables.forget()
    assert launching.epoch() > before
    with tables.answered_by(lambda question: asked.append(question) or question.default):
        call(module, x, row)
    assert asked


def test_a_plan_can_be_read(device):
    """Its source is the launches in their order, with what is let go between them."""
    plans.forget()
    row, module = ROWS["residual"], build(ROWS["residual"], device)
    x = normal(2, 4, 3, 3, dtype=torch.float32, device=device)
    for _ in range(2):
        call(module, x, row)
    forward, backward = (plan.source for plan in plans.made())
    launched = re.compile(r"^ +(_[a-z_]+_kernel)(?:_\d+)?[\[(]", re.MULTILINE)
    with launching.written() as launches:
        module(x)
    names = [launch.function.__name__ for launch in launches]
    assert launched.findall(forward) == names and len(names) > 6
    assert launched.findall(backward)[0] == "_bn_act_bwd_reduce_kernel" and " = None\n" in backward


def test_a_plan_keeps_nothing_of_a_call(device):
    module, seen = build(ROWS["residual"], device), []
    for _ in range(4):
        x = normal(2, 4, 3, 3, dtype=torch.float32, device=device).requires_grad_()
        y = module(x)
        seen += [weakref.ref(x), weakref.ref(y), weakref.ref(y.grad_fn)]
        y.sum().backward()
        del x, y
    module.zero_grad()
    gc.collect()
    assert not [one for one in seen if one() is not None]


def test_an_error_in_a_recorded_call_leaves_no_plan(device, monkeypatch):
    plans.forget()
    row, module = ROWS["eval"], build(ROWS["eval"], device)
    x = normal(2, 4, 3, 3, dtype=torch.float32, device=device)
    expected = call(module, x, row)["y"]

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(pointwise, "pointwise_inference", fail)
        call(module, x, row)
    for _ in range(3):
        assert torch.equal(call(module, x, row)["y"], expected)


def test_a_cumulative_average_counts(device):
    """It reads the counter that moved before the launches."""
    module = make_block(4, **block(), device=device)
    for bn in batch_norms(module):
        bn.momentum = None
    x, row = normal(2, 4, 3, 3, dtype=torch.float32, device=device), ROWS["residual"]
    for _ in range(2):
        call(module, x, row)
    other = copy.deepcopy(module)
    ours = call(module, x, row)
    with launching.watching():
        assert_equal(ours, call(other, x, row))
    assert module.project_bn.num_batches_tracked == 3


CHANGES = {
    "another-weight": lambda m: setattr(m.project_conv, "weight", nn.Parameter(m.project_conv.weight.detach() * 2)),
    "other-values": lambda m: m.expand_conv.weight.data.mul_(2),
    "other-data": lambda m: setattr(m.depthwise_conv.weight, "data", m.depthwise_conv.weight.detach() + 1),
    "other-statistics": lambda m: m.depthwise_bn.running_mean.add_(1),
    "eps": lambda m: setattr(m.expand_bn, "eps", 0.5),
    "training-norm": lambda m: m.expand_bn.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_replay_reads_what_is_there_now(change, device):
    module, row = build(ROWS["eval"], device), ROWS["eval"]
    x = normal(2, 4, 3, 2, dtype=torch.float32, device=device)
    for _ in range(2):
        call(module, x, row)
    change(module)
    other = copy.deepcopy(module)
    ours = call(module, x, row)
    with launching.watching():
        assert_equal(ours, call(other, x, row))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 12)), max_size=20))
def test_buffers_in_use_at_the_same_time_do_not_overlap(buffers):
    """Each (bytes, how many steps it lives); one begins at each step."""
    spans = [(size, i, i + life) for i, (size, life) in enumerate(buffers)]
    room, begins = replay.lay_out(spans)
    for i, (size, first, _) in enumerate(spans):
        assert begins[i] % replay.LINE == 0 and begins[i] + size <= room
        for j in range(i):
            other, _, end = spans[j]
            assert end < first or begins[j] + other <= begins[i] or begins[i] + size <= begins[j], (i, j)
    assert room <= sum(size + replay.LINE for size, *_ in spans)
