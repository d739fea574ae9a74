"""Whole fused models in what people do with models: compile, autocast, export, trace, store, copy, share, spread."""

import copy
import io
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from blocks import INTERPRETED, launches
from libraries import library
from parity import assert_parity
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastmbconv
from fastmbconv import dispatch, explain, fuse, unfuse
from fastmbconv.efficientnet import EfficientNet
from fastmbconv.ends import ConvBNAct
from fastmbconv.scaling import Coefficients

TESTS = Path(__file__).parent
IMAGES = (3, 3, 8, 8)


def ours():
    model = EfficientNet(Coefficients(width=0.25, depth=0.1, resolution=32, dropout=0.0), num_classes=3)
    model.stages = model.stages[:2]
    model.head = ConvBNAct(8, model.num_features, 1, 1, 0, "silu", model.eps, model.momentum)
    return model


def timms():
    timm = library("timm")
    blocks = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm has no _efficientnet_blocks")
    builder = pytest.importorskip("timm.models._efficientnet_builder", reason="timm has no _efficientnet_builder")
    stages = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k5_s2_e2_c12_se0.25"]]
    options = dict(num_classes=3, stem_size=8, num_features=16, se_layer=blocks.SqueezeExcite)
    return timm.models.EfficientNet(builder.decode_arch_def(stages), **options)


def torchvisions():
    efficientnet = getattr(library("torchvision").models, "efficientnet")  # noqa: B009
    config = efficientnet.MBConvConfig
    stages = [config(1, 3, 1, 8, 8, 1), config(2, 5, 2, 8, 16, 1)]
    return efficientnet.EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.0, num_classes=3)


MODELS = {"ours": ours, "timm": timms, "torchvision": torchvisions}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
foreign = pytest.mark.parametrize("make", [timms, torchvisions])
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def lively(model, device):
    """With norms as after training, so that eval mode is no special case."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(device)


@pytest.fixture
def images(device):
    return torch.randn(IMAGES, device=device)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Backend auto, where nothing but the call itself could keep it from the kernels."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    if INTERPRETED:
        monkeypatch.setattr(dispatch, "device_reason", partial(_device_reason, dispatch.device_reason))


def _device_reason(real, x):
    reason = real(x)
    return None if reason == "a cpu tensor" else reason


def step(model, forward, x):
    """Output, gradients and buffers of a training step, or the output of a forward in eval mode without gradients."""
    with nullcontext() if model.training else torch.no_grad():
        y = forward(x)
    if not model.training:
        return {"y": y}
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y, **gradients, **{name: b.clone() for name, b in model.named_buffers()}}


@every_model
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiled_is_one_graph_with_the_same_numbers(make, training, images, device, triton_backend):
    torch._dynamo.reset()
    model = fuse(lively(make(), device)).train(training)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = step(model, torch.compile(model, backend=counter, fullgraph=True), images)
    assert counter.frame_count == 1
    for name, value in step(twin, twin, images).items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(make, dtype, images, device):
    model = lively(make(), device).eval()
    fused = fuse(copy.deepcopy(model))
    with torch.no_grad():
        truth = unfuse(copy.deepcopy(model)).double()(images.double())
        with torch.autocast(device.type, dtype):
            with fastmbconv.backend("eager"):
                theirs = model(images)
            with fastmbconv.backend("triton"), launches() as seen:
                y = fused(images)
    assert seen and y.dtype == theirs.dtype == dtype
    assert_parity("y", y, theirs, truth)


@quiet
@every_model
def test_exported_is_the_eager_form(make, images, device, on_a_gpu):
    """torch.export and ONNX: the program of a fused model is that of the unfused one, and ONNX Runtime runs it."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    model = lively(make(), device).eval()
    expected = unfuse(model)(images)
    plain = torch.export.export(model, (images,))
    program = torch.export.export(fuse(model), (images,))
    targets = [[str(node.target) for node in p.graph.nodes] for p in (program, plain)]
    assert targets[0] == targets[1] and not any("fastmbconv" in target for target in targets[0])
    torch.testing.assert_close(program.module()(images), expected)
    written = io.BytesIO()
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(written)
    session = onnxruntime.InferenceSession(written.getvalue(), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected.detach().cpu(), rtol=1e-4, atol=1e-4)


@quiet
@foreign
def test_traced_as_eager(make, images, device, on_a_gpu):
    model = lively(make(), device).eval()
    expected, plain = unfuse(model)(images), torch.fx.symbolic_trace(model)
    traced = torch.fx.symbolic_trace(fuse(model))
    assert [node.target for node in traced.graph.nodes] == [node.target for node in plain.graph.nodes]
    torch.testing.assert_close(traced(images), expected)
    by_example = torch.jit.trace(model, images)
    assert "fastmbconv::" not in str(by_example.inlined_graph)
    torch.testing.assert_close(by_example(images), expected)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(images, device, process_group, triton_backend):
    model = fuse(lively(torchvisions(), device))
    twin = copy.deepcopy(model)
    with launches() as seen:
        wrapped = step(model, nn.parallel.DistributedDataParallel(model), images)
    assert seen
    for name, value in step(twin, twin, images).items():
        assert torch.equal(wrapped[name], value), name


def test_data_parallel_replicas(images, device, monkeypatch, triton_backend):
    """Replicas hold their parameters as plain attributes; torch makes them on GPUs only, so copies stand for those."""
    copied = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copied)
    model = fuse(lively(timms(), device)).eval()
    expected = model(images).detach()
    replicas = nn.parallel.replicate(model, [0, 1])
    with launches() as seen:
        outputs = [replica(images) for replica in replicas]
    assert len(seen) >= 4 and all(torch.equal(y, expected) for y in outputs)
    sum(y.square().sum() for y in outputs).backward()
    assert all(p.grad is not None for p in model.parameters())


STORED = """
import sys
class Missing:
    def find_spec(name, *_):
        if name.partition(".")[0] == "fastmbconv":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing)
import torch
sys.path.insert(0, "TESTS")
from libraries import library
timm = library("timm")
from timm.models import _efficientnet_blocks as blocks, _efficientnet_builder as builder
stages = [["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r1_k5_s2_e2_c12_se0.25"]]
options = dict(num_classes=3, stem_size=8, num_features=16, se_layer=blocks.SqueezeExcite)
model = timm.models.EfficientNet(builder.decode_arch_def(stages), **options).eval()
model.load_state_dict(torch.load("state.pt", weights_only=True))
x, y = torch.load("pair.pt", weights_only=True)
torch.testing.assert_close(model(x), y)
torch.load("unfused.pt", weights_only=False)
try:
    torch.load("fused.pt", weights_only=False)
except ModuleNotFoundError as error:
    print(error)
"""


def test_stored_models_where_fastmbconv_is_not_installed(tmp_path):
    """A state dict loads there, and so does a whole model that was unfused; a whole fused one says what it misses."""
    model, x = fuse(lively(timms(), "cpu")).eval(), torch.randn(IMAGES)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "fused.pt")
    torch.save((x, model(x).detach()), tmp_path / "pair.pt")
    torch.save(unfuse(model), tmp_path / "unfused.pt")
    script = STORED.replace("TESTS", str(TESTS))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "No module named 'fastmbconv'"


def test_shared_between_processes():
    """A fused model in shared memory stays fused on the other side, and both see the same parameters."""
    model = fuse(lively(ours(), "cpu")).eval().share_memory()
    x, y = torch.randn(IMAGES), torch.zeros(IMAGES[0], 3).share_memory_()
    expected, before = model(x).detach(), [p.detach().clone() for p in model.parameters()]
    torch.multiprocessing.spawn(_other_side, (model, x, y))
    torch.testing.assert_close(y, expected)
    assert all(torch.equal(p, b + 1) for p, b in zip(model.parameters(), before, strict=True))


def _other_side(rank, model, x, y):
    assert explain(model).fused == 2
    with torch.no_grad():
        y.copy_(model(x))
        for p in model.parameters():
            p.add_(1.0)


@pytest.fixture
def one_launch_at_a_time(monkeypatch):
    """Triton's interpreter keeps its state in globals: there, threads take turns at the launches."""
    if not INTERPRETED:
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    turn, launch = threading.Lock(), interpreter.GridExecutor.__call__

    def in_turn(*args, **kwargs):
        with turn:
            return launch(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", in_turn)


@every_model
def test_threads_share_one_model(make, device, triton_backend, one_launch_at_a_time):
    model = fuse(lively(make(), device)).eval()
    batches = [torch.randn(2, *IMAGES[1:], device=device) for _ in range(3)]
    found = {}

    def work(i):
        with torch.no_grad():
            found[i] = model(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert all(torch.equal(found[i], model(x)) for i, x in enumerate(batches))
