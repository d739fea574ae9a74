"""Which path a call takes, and the reason that it gives."""

import os
import subprocess
import sys

import pytest
import torch
from blocks import INTERPRETED, launches, make_block, normal
from torch import nn
from torch.nn.utils import parametrizations

import fastmbconv
from fastmbconv import dispatch, functional
from fastmbconv.mbconv import MBConv

interpreted = pytest.mark.skipif(not INTERPRETED, reason="about CPU tensors under the interpreter")


@pytest.fixture
def block(device):
    return make_block(4, 4, expand_ratio=2, device=device)


@pytest.fixture
def x(device):
    return normal(2, 4, 3, 3, dtype=torch.float32, device=device)


class OnGPU:
    """Stands for a CUDA tensor where there is none."""

    def __init__(self, dtype):
        self.dtype, self.device = dtype, torch.device("cuda")

    def numel(self):
        return 1


@interpreted
def test_auto_leaves_cpu_tensors_to_eager(block, x):
    assert "CPU tensor" in dispatch.supports(block.describe(), x)
    with launches() as seen:
        block(x)
    assert not seen


def test_triton_takes_the_kernels(block, x, triton_backend):
    assert dispatch.supports(block.describe(), x) is None
    with launches() as seen, torch.no_grad():
        functional.mbconv(x, block.describe())
    assert seen


def test_eager_never_takes_them(block, x):
    with fastmbconv.backend("eager"), launches() as seen:
        assert "eager" in dispatch.supports(block.describe(), x)
        block(x)
    assert not seen


@pytest.mark.parametrize(
    "dtype, reason",
    [
        pytest.param(torch.float64, "dtype torch.float64", id="float64"),
        pytest.param(torch.float32, None, id="float32"),
        pytest.param(torch.bfloat16, None, id="bfloat16"),
    ],
)
def test_dtypes_on_a_gpu(dtype, reason, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_gpu_reason", lambda device: None)
    assert dispatch.device_reason(OnGPU(dtype)) == reason


@pytest.mark.parametrize("capability, reason", [((7, 5), "a GPU of compute capability 7.5"), ((8, 0), None)])
def test_old_gpus_stay_eager(capability, reason, monkeypatch):
    """What shipped tiles need of shared memory and of matrix instructions was compiled for 8.0 and later."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dispatch._gpu_reason.cache_clear()
    given = dispatch.device_reason(OnGPU(torch.float16))
    dispatch._gpu_reason.cache_clear()
    assert given is None if reason is None else given.startswith(reason)


def transposed(weight):
    return nn.Parameter(weight.detach().transpose(0, 1).contiguous().transpose(0, 1))


WEIGHTS = {
    "expand": lambda m: setattr(m.expand_conv, "weight", transposed(m.expand_conv.weight)),
    "squeeze": lambda m: setattr(m.se.reduce, "weight", transposed(m.se.reduce.weight)),
    "norm": lambda m: setattr(m.project_bn, "weight", nn.Parameter(m.depthwise_bn.weight.detach()[::2])),
}


@pytest.mark.parametrize("scatter", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_scattered_in_memory_stay_eager(scatter, x, device):
    module = make_block(4, 4, expand_ratio=2, se_ratio=0.5, device=device)
    module.to(memory_format=torch.channels_last)
    with fastmbconv.backend("triton"):
        assert dispatch.supports(module.describe(), x) is None
        scatter(module)
        assert "strides are" in dispatch.supports(module.describe(), x)


@pytest.mark.parametrize(
    "size, reason",
    [
        pytest.param((128, 4, 300, 300), None, id="a-tensor-of-many"),
        pytest.param((1, 4, 16384, 16384), "an image of 16384 x 16384 pixels and 8 channels", id="a-large-image"),
        pytest.param((2**16, 4, 128, 128), "65536 images of 128 x 128 pixels", id="many-pixels"),
    ],
)
def test_what_32_bits_do_not_count_stays_eager(size, reason, block, triton_backend, monkeypatch):
    monkeypatch.setattr(dispatch, "device_reason", lambda x: None)
    given = dispatch.supports(block.describe(), torch.empty(size, device="meta"))
    assert given is None if reason is None else given.startswith(reason)


def test_widths_that_one_program_takes_whole_are_limited(block, x, triton_backend):
    wide = make_block(4, 4, expand_ratio=2, device=x.device)
    wide.se.reduce = nn.Conv2d(8, 1025, 1)
    assert dispatch.block_reason(wide.describe()) == "1025 reduced channels (supported: up to 1024)"
    many = MBConv(4097, 8, expand_ratio=0.002)
    assert dispatch.block_reason(many.describe()) == "4097 input channels (supported: up to 4096)"


def test_reasons_of_the_device(x, monkeypatch):
    if INTERPRETED:
        assert "CPU tensors" in dispatch.device_reason(OnGPU(torch.float32))
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    assert dispatch.device_reason(x.cpu()) == "a cpu tensor"
    assert dispatch.device_reason(x.to("meta")) == "a meta tensor"
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert dispatch.device_reason(OnGPU(torch.float32)) == "Triton is not installed"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        pytest.param((3, 1, 1, "silu"), None, id="supported"),
        pytest.param((5, 2, "same", "relu6"), None, id="same"),
        pytest.param((5, 1, 4, "relu"), None, id="widest-padding"),
        pytest.param((7, 1, 3, "silu"), "kernel size 7", id="kernel-size"),
        pytest.param((3, 4, 1, "silu"), "stride 4", id="stride"),
        pytest.param((3, 1, 3, "silu"), "padding 3", id="padding"),
        pytest.param((3, 2, (0, 1), "silu"), None, id="padding-pair"),
        pytest.param((5, 2, (1, 5), "silu"), "padding (1, 5)", id="wide-pair"),
        pytest.param((3, 1, 1, "mish"), "activation 'mish'", id="activation"),
    ],
)
def test_reasons_of_the_shape(arguments, reason):
    given = dispatch.shape_reason(*arguments)
    assert given is None if reason is None else given.startswith(reason)


def test_reason_of_an_empty_batch(block, x):
    assert dispatch.supports(block.describe(), x[:0]) == "an empty batch"


HOOKS = {
    "forward": lambda m: m.depthwise_bn.register_forward_hook(lambda *args: None),
    "forward-pre": lambda m: m.project_conv.register_forward_pre_hook(lambda *args: None),
    "backward": lambda m: m.se.expand.register_full_backward_hook(lambda *args: None),
    "backward-pre": lambda m: m.expand_bn.register_full_backward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_hook_inside_is_a_reason_until_it_is_removed(hook, block):
    handle = hook(block)
    assert "a hook on" in block.eager_reason()
    handle.remove()
    assert block.eager_reason() is None


def test_a_hook_on_the_block_itself_is_none(block, x, triton_backend):
    """nn.Module runs it around forward, kernels or not."""
    block.register_forward_hook(lambda module, args, y: y + 1)
    assert block.eager_reason() is None


def test_a_global_hook_is_a_reason(block):
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert block.eager_reason() == "a hook on every module"
    finally:
        handle.remove()


def test_a_parametrization_is_a_reason(block, x, triton_backend):
    parametrizations.weight_norm(block.project_conv)
    assert block.eager_reason() is not None
    with launches() as seen:
        block(x)
    assert not seen


@pytest.mark.parametrize(
    "name, part",
    [
        pytest.param("project_bn", nn.GroupNorm(2, 4), id="group-norm"),
        pytest.param("expand_bn", nn.Identity(), id="folded-batch-norm"),
        pytest.param("depthwise_conv", nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), id="dilated-conv"),
        pytest.param("se", nn.Identity(), id="other-attention"),
    ],
)
def test_another_part_is_a_reason(name, part, block):
    setattr(block, name, part)
    assert name in block.eager_reason()


def test_export_takes_eager(x):
    """An exported program holds PyTorch's own operators, so it runs where fastmbconv is not installed."""
    module = MBConv(4, 4, expand_ratio=2).to(x.device).eval()
    program = torch.export.export(module, (x,))
    assert not [node for node in program.graph.nodes if "fastmbconv" in str(node.target)]
    torch.testing.assert_close(program.module()(x), module.forward_eager(x))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_jit_trace_takes_eager(x):
    """And warns of nothing: no branch of ours depends on a traced size."""
    module = MBConv(4, 4, expand_ratio=2).to(x.device).eval()
    traced = torch.jit.trace(module, x)
    assert "fastmbconv::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), module.forward_eager(x))


def test_exporting_is_a_reason_before_any_device(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert dispatch.device_reason(OnGPU(torch.float32)) == "the model is being exported or traced"


def test_backend_is_restored_after_an_error():
    before = fastmbconv.get_backend()
    with pytest.raises(KeyError), fastmbconv.backend("eager"):
        raise KeyError
    assert fastmbconv.get_backend() == before


@pytest.mark.parametrize("choose", [fastmbconv.set_backend, lambda name: fastmbconv.backend(name).__enter__()])
def test_an_unknown_backend_is_refused(choose):
    before = fastmbconv.get_backend()
    with pytest.raises(ValueError, match="backend is 'cuda': allowed are auto, triton, eager"):
        choose("cuda")
    assert fastmbconv.get_backend() == before


@pytest.mark.parametrize("value, code", [pytest.param("fast", 1, id="unknown"), pytest.param("eager", 0, id="known")])
def test_the_environment_variable(value, code):
    script = "import fastmbconv; print(fastmbconv.get_backend())"
    environment = {**os.environ, "FASTMBCONV_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.strip() == "eager" if code == 0 else "FASTMBCONV_BACKEND is 'fast'" in done.stderr
