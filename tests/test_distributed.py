"""Two processes over gloo: synchronised statistics, DistributedDataParallel and FSDP2 do what one process does."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_worker import BLOCKS, block, mine, model, outcome, step, trained
from parity import assert_parity
from torch import distributed as dist
from torch import nn

import fastmbconv
from fastmbconv import call, functional, ops
from fastmbconv import ranks as ranks_module
from fastmbconv.block import BatchNorm
from fastmbconv.fused import mbconv
from fastmbconv.kernels.launching import written
from fastmbconv.mbconv import MBConv

TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    pytest.mark.interpreter,
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes computed."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join((str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(TESTS / "distributed_worker.py")]
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(2)]
    running = [
        subprocess.Popen([*command, str(rank), str(folder)], env=env, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join(Path(log.name).read_text()[-3000:] for log in logs)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def together(outcomes):
    """The ranks' outcomes as one: images side by side, parameters' gradients added."""
    return {
        name: torch.cat([o[name] for o in outcomes])
        if name in ("y", "dx")
        else sum(o[name] for o in outcomes)
        if name.startswith("d ")
        else value
        for name, value in outcomes[0].items()
    }


def assert_all_parity(ours, eager, truth):
    assert ours.keys() == eager.keys() == truth.keys()
    for name, value in ours.items():
        if value.is_floating_point():
            assert_parity(name, value, eager[name], truth[name])
        else:
            assert torch.equal(value, truth[name]), name


def one_process(name, dtype):
    plain, x, dy = block(name, dtype)
    with fastmbconv.backend("eager"):
        return outcome(plain, plain, x, dy)


@pytest.mark.parametrize("name", BLOCKS)
def test_two_ranks_do_what_one_does_with_the_whole_batch(name, ranks):
    """Batches of 3 and 1 samples: outputs, gradients added up, and every rank's running statistics."""
    truth = one_process(name, torch.float64)
    for dtype in ranks[0]["blocks"][name]:
        fused, _ = zip(*(rank["blocks"][name][dtype] for rank in ranks), strict=True)
        assert_all_parity(together(fused), one_process(name, dtype), truth)
        for key, value in fused[0].items():
            if "running" in key or "tracked" in key:
                assert torch.equal(value, fused[1][key]), key


@pytest.mark.parametrize("name", BLOCKS)
def test_each_rank_keeps_its_own_gradients(name, ranks):
    """As torch's SyncBatchNorm does, for DistributedDataParallel to average; against plain PyTorch that talks."""
    for rank in ranks:
        truth = rank["blocks"][name][torch.float64][1]
        for fused, eager in rank["blocks"][name].values():
            assert_all_parity(fused, eager, truth)


def test_plain_pytorch_that_talks_is_one_process_too(ranks):
    for name in BLOCKS:
        truth = one_process(name, torch.float64)
        reference = together([rank["blocks"][name][torch.float64][1] for rank in ranks])
        assert_all_parity(reference, truth, truth)


def test_compiled_is_one_graph_with_the_same_numbers(ranks):
    for rank in ranks:
        (expected, _), ours = rank["blocks"]["k3 SE residual"][torch.float32], rank["compiled"]
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-6)


def stepped(kind):
    """One step of one process with the whole batch."""
    net, x, labels = model("local" if kind == "synchronised" else kind)
    with fastmbconv.backend("eager"):
        return trained(net, step(net, x, labels))


def stepped_apart():
    """Local BatchNorms: each half by itself, gradients averaged."""
    nets, x, labels = [], *model("local")[1:]
    losses = []
    for rank in range(2):
        net = model("local")[0]
        with fastmbconv.backend("eager"):
            losses.append(nn.functional.cross_entropy(net(mine(x, rank, (2, 2))), mine(labels, rank, (2, 2))))
        losses[-1].backward()
        nets.append(net)
    with torch.no_grad():
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            p -= 0.1 * (p.grad + q.grad) / 2
    return trained(nets[0], torch.stack(losses).mean().detach())


@pytest.mark.parametrize("kind", ["synchronised", "local", "frozen"])
def test_data_parallel_is_one_process(kind, ranks):
    expected = stepped_apart() if kind == "local" else stepped(kind)
    ours = dict(ranks[0]["DDP"][kind])
    assert all(torch.equal(ours[n], ranks[1]["DDP"][kind][n]) for n, _ in model(kind)[0].named_parameters())
    ours["loss"] = (ours["loss"] + ranks[1]["DDP"][kind]["loss"]) / 2
    assert_all_parity(ours, expected, expected)


@pytest.mark.parametrize("wrap", ["whole", "each block", "a leaf"])
def test_fully_sharded_is_one_process(wrap, ranks):
    """A shard inside a block is a hook inside it: that block runs eager and says so."""
    expected = stepped("frozen" if wrap == "a leaf" else "synchronised")
    for rank in ranks:
        ours = dict(rank["FSDP2"][wrap]["after"])
        ours["loss"] = sum(r["FSDP2"][wrap]["after"]["loss"] for r in ranks) / 2
        assert_all_parity(ours, expected, expected)
        assert (rank["FSDP2"][wrap]["launches"] == 0) == (wrap == "a leaf")
        assert rank["FSDP2"][wrap]["reason"] == ("a hook on project_conv" if wrap == "a leaf" else "")


def test_training_with_graphs_is_the_same(ranks):
    """DistributedDataParallel around them: bitwise, on both processes; gradients add up before they are sent."""
    if any(rank["graphs"] is None for rank in ranks):
        pytest.skip("a library of the train extra is not installed")
    for without, graphed in (rank["graphs"] for rank in ranks):
        assert all(torch.equal(graphed[name], value) for name, value in without.items())
    first, second = (rank["graphs"][1] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"]) and not torch.equal(first["buffers"], second["buffers"])


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_training_with_synchronised_norms_is_one_process(backend, ranks):
    """Losses, weights and statistics after two steps of `fastmbconv train`, fused or not, against one eager process."""
    from short_runs import World, steps

    with fastmbconv.backend("eager"):
        expected = steps(World(torch.device("cpu")))
    for rank in ranks:
        for name, value in rank["training"][backend].items():
            assert_parity(name, value, expected[name], expected[name])


def test_explain_among_processes(ranks):
    """Fused, with a shape too; but not timm's norms after torch's converter, which forgets their activation."""
    for rank in ranks:
        *fused, (count, reason) = rank["explain"]
        assert fused == [(1, "")] * 3
        assert (
            count == 0 and reason == "the norm after the expansion is a SyncBatchNorm with a drop that it does not call"
        )


def test_explain_while_weights_are_sharded(ranks):
    path, runs, error = ranks[0]["sharded"]
    assert path == "fused" and runs == "eager: a weight is a DTensor (FSDP: outside of its forward)"
    assert "0.conv_pw.weight is sharded: explain the model before FSDP" in error


def test_an_empty_batch_among_others_is_refused(ranks):
    """The other ranks would wait for it."""
    assert ranks[1]["absent"] == "x has shape (0, 4, 3, 3): synchronised BatchNorms want a sample on every rank"


@pytest.fixture
def alone(tmp_path, device):
    """A process group of this process, over what a GPU would use if there is one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_is_a_plain_batch_norm(alone, device, triton_backend):
    """Nothing is sent."""
    module = MBConv(3, 3, expand_ratio=2).to(device)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    x = torch.randn(2, 3, 4, 3, device=device)
    assert BatchNorm.of(shared.project_bn).process_group is None
    assert torch.equal(shared(x), module(x))


@pytest.fixture
def sent(monkeypatch):
    """The sizes of this process's messages."""
    sizes = []
    for name in ("gathered", "total"):
        real = getattr(ranks_module, name)
        monkeypatch.setattr(ranks_module, name, lambda t, group, real=real: sizes.append(t.numel()) or real(t, group))
    return sizes


def talking(module, group):
    """The block's description, its statistics taken over the group even if that is this process alone."""
    block = module.describe()
    return replace(
        block, **{name: replace(getattr(block, name), process_group=group) for name in ("bn1", "bn2", "bn3")}
    )


def test_launches_written_down_send_nothing(alone, device, sent, triton_backend):
    """Kernels that compile ahead are written down on each rank at its own time."""
    module, x = MBConv(3, 3, expand_ratio=2).to(device), torch.randn(2, 3, 4, 3, device=device)
    with written() as launches:
        functional.mbconv(x, talking(module, alone)).sum().backward()
    names = [launch.function.__name__ for launch in launches]
    assert not sent and names.count("_bn_coef_kernel") == 3


def test_one_small_message_per_batch_norm_and_direction(alone, device, sent, triton_backend):
    """Count, mean and squares forward, two sums and the count backward; in eval mode none."""
    module, x = MBConv(3, 3, expand_ratio=2).to(device), torch.randn(2, 3, 4, 3, device=device)
    for training, expected in ((True, ([18, 18, 9], [7, 13, 13])), (False, ([], []))):
        y = functional.mbconv(x, talking(module.train(training), alone))
        forward = sent[:]
        y.sum().backward()
        assert (forward, sent[len(forward) :]) == expected
        sent.clear()


def test_without_processes_a_synchronised_norm_is_a_plain_one(device, triton_backend):
    module = MBConv(3, 3, expand_ratio=2).to(device)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    x = torch.randn(2, 3, 4, 3, device=device)
    assert torch.equal(shared(x), module(x)) and fastmbconv.explain(shared).fused == 1


def test_operators_that_talk_pass_opcheck(alone, device):
    """Their fake implementations say nothing to anybody, and have the kernels' shapes."""
    module = MBConv(3, 3, expand_ratio=2).to(device).requires_grad_(False)
    x = torch.randn(2, 4, 3, 3, device=device)
    weights, statistics, settings = mbconv.describe(talking(module, alone), True, False)
    lists = [
        list(weights),
        call.list_moved(settings, statistics),
        call.list_read(settings, statistics),
        *call.pack(settings),
    ]
    y, saved = mbconv.forward(x, None, None, weights, statistics, settings)
    kept = [tensor for tensor in saved if tensor is not None]
    dy = torch.randn_like(y).permute(0, 2, 3, 1)
    needs = [True, *(weight is not None for weight in weights)]
    for name, arguments in (
        ("mbconv_forward", (x, None, None, *lists)),
        ("mbconv_backward", (dy, x, None, kept, list(weights), needs, *call.pack(settings))),
    ):
        torch.library.opcheck(ops.OPERATORS[name], arguments, test_utils=("test_schema", "test_faketensor"))
