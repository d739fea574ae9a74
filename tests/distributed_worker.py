"""One of two processes of tests/test_distributed.py: the blocks that both know, and what each rank computes of them.

Started as `distributed_worker.py RANK FOLDER`; its results go to FOLDER/RANK.pt.
"""

import copy
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # a test that imports this may have a GPU
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import pytest
import torch
from blocks import launches, normal, randomise
from libraries import library
from rerun import make_graphed_callables
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastmbconv
from benchmarks.poison import poisoned
from fastmbconv import functional, reference
from fastmbconv.block import BatchNorm, DenseBlock
from fastmbconv.graphs_training import GraphedTraining
from fastmbconv.mbconv import MBConv
from fastmbconv.swap.fused import fusible

timm = library("timm")
timm_blocks = library("timm.models._efficientnet_blocks")
timm_converter = library("timm.layers").convert_sync_batchnorm
SIZES = (3, 1)  # samples of each rank
torch_converter = nn.SyncBatchNorm.convert_sync_batchnorm


def lean(module):
    return fastmbconv.fuse(module, memory="lean")


def mbconv(*args, **kwargs):
    return lambda: MBConv(*args, **{"expand_ratio": 2, "se_ratio": 0.7, **kwargs})


class DepthwiseBNAct(nn.Module):
    def __init__(self, bias=None):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.BatchNorm2d(3)
        self.register_buffer("bias", bias)  # a constant: its gradient would be nothing but rounding

    def forward(self, x):
        return functional.depthwise_bn_act(x, self.conv.weight, BatchNorm.of(self.bn, self.bias), 1, 1)


# name -> (how the plain block is made, what makes it a synchronised and fused one, mean of its input)
BLOCKS = {
    "k3 SE residual": (mbconv(3, 3), lambda m: fastmbconv.fuse(torch_converter(m)), 0.0),
    "k5 stride 2": (mbconv(3, 2, 5, 2, se_ratio=0), lambda m: torch_converter(fastmbconv.fuse(m)), 0.0),
    "no expansion": (mbconv(3, 2, expand_ratio=1, padding="same"), torch_converter, 0.0),
    "lean": (mbconv(3, 3), lambda m: lean(torch_converter(m)), 0.0),
    "lean k5": (mbconv(3, 2, 5), lambda m: torch_converter(lean(m)), 0.0),
    "large mean, cumulative": (mbconv(3, 3, momentum=None), torch_converter, 30.0),
    "timm InvertedResidual": (
        lambda: timm_blocks.InvertedResidual(3, 3, exp_ratio=2.0), lambda m: fastmbconv.fuse(timm_converter(m)), 0.0,
    ),
    "timm EdgeResidual": (
        lambda: timm_blocks.EdgeResidual(3, 3, exp_ratio=2.0), lambda m: timm_converter(fastmbconv.fuse(m)), 0.0,
    ),
    "depthwise_bn_act": (DepthwiseBNAct, torch_converter, 0.0),
    "biased depthwise_bn_act": (lambda: DepthwiseBNAct(torch.tensor([2.0, -1.0, 0.5])), torch_converter, 0.0),
}  # fmt: skip
PRECISIONS = ("k3 SE residual", "lean", "large mean, cumulative")  # these run in fp32 too


def block(name, dtype):
    """(plain block in training, x, dy): the same in every process, for the whole batch."""
    torch.manual_seed(0)
    make, _, mean = BLOCKS[name]
    module = randomise(make().double()).to(dtype).train()
    x = normal(sum(SIZES), 3, 4, 5, mean=mean).to(dtype)
    shape = copy.deepcopy(module)(x).shape
    return module, x, normal(*shape).to(dtype)


def mine(tensor, rank, sizes=SIZES):
    return tensor.split(sizes)[rank].clone()


def described(module):
    """The block's description through plain PyTorch, its statistics taken over all ranks."""
    if isinstance(module, DepthwiseBNAct):
        return module
    found = fusible(module)
    run = reference.dense_mbconv if isinstance(found, DenseBlock) else reference.mbconv
    return lambda x: run(x, found)


def outcome(module, forward, x, dy):
    """Output, gradients and buffers of one call."""
    x = x.detach().requires_grad_()
    y = forward(x)
    y.backward(dy)
    grads = {f"d {name}": p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads, **dict(module.named_buffers())}


def fused_and_reference(name, rank):
    """Outcomes by dtype, of the synchronised block through the kernels and of its description in plain PyTorch."""
    results = {}
    for dtype in (torch.float64, torch.float32) if name in PRECISIONS else (torch.float64,):
        plain, x, dy = block(name, dtype)
        make = timm_converter if name.startswith("timm") else torch_converter
        ours, theirs = BLOCKS[name][1](copy.deepcopy(plain)), make(plain)
        with fastmbconv.backend("triton"):
            fused = outcome(ours, ours, mine(x, rank), mine(dy, rank))
        with fastmbconv.backend("eager"):
            eager = outcome(theirs, described(theirs), mine(x, rank), mine(dy, rank))
        results[dtype] = (fused, eager)
    return results


def compiled(name, rank):
    """One graph, collectives and all."""
    plain, x, dy = block(name, torch.float32)
    module = torch_converter(plain)
    with fastmbconv.backend("triton"):
        return outcome(
            module, torch.compile(module, fullgraph=True, backend="aot_eager"), mine(x, rank), mine(dy, rank)
        )


class Model(nn.Module):
    """A classifier of fused blocks, whose stem has no BatchNorm: torch's SyncBatchNorm refuses CPU tensors."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.Sequential(mbconv(4, 4)())
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def model(kind, dtype=torch.float64):
    """(model, images, labels): the same in every process; "synchronised", "local" or "frozen" BatchNorms."""
    torch.manual_seed(1)
    net = randomise(Model().double()).to(dtype)
    x, labels = normal(4, 3, 5, 5).to(dtype), torch.tensor([0, 3, 1, 4])
    if kind == "synchronised":
        net.blocks = torch_converter(net.blocks)
    if kind == "frozen":
        for bn in net.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eval()
    return net, x, labels


def step(net, x, labels, wrapped=None):
    """One step of SGD; returns the loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy((wrapped or net)(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(net, loss):
    """The loss before the step, parameters and buffers after it."""
    return {"loss": loss, **{name: whole(t.detach()).clone() for name, t in net.state_dict().items()}}


def distributed_data_parallel(kind, rank):
    net, x, labels = model("frozen" if kind == "frozen" else "local")
    wrapped = DistributedDataParallel(net)
    if kind == "synchronised":  # behind the back of DDP, which refuses a SyncBatchNorm on a CPU
        net.blocks = torch_converter(net.blocks)
    with fastmbconv.backend("triton"):
        loss = step(net, mine(x, rank, (2, 2)), mine(labels, rank, (2, 2)), wrapped)
    return trained(net, loss)


def fully_sharded(wrap, rank):
    """FSDP2 around a fused model: around the whole, around its block too, or around a convolution inside the block."""
    net, x, labels = model("frozen" if wrap == "a leaf" else "synchronised")
    mesh = init_device_mesh("cpu", (2,))
    part = {"whole": None, "each block": net.blocks[0], "a leaf": net.blocks[0].project_conv}[wrap]
    for module in (part, net):
        if module is not None:
            fully_shard(module, mesh=mesh)
    with launches() as seen, fastmbconv.backend("auto" if wrap == "a leaf" else "triton"):
        loss = step(net, mine(x, rank, (2, 2)), mine(labels, rank, (2, 2)))
    return {"after": trained(net, loss), "launches": len(seen), "reason": fastmbconv.explain(net).rows[0].reason}


def described_while_sharded(rank):
    """(path, what a call runs, may a shape be asked for) of a timm block whose weights FSDP holds in shards."""
    net = nn.Sequential(timm_blocks.InvertedResidual(4, 4))
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    with fastmbconv.backend("triton"):
        row = fastmbconv.explain(fastmbconv.fuse(net)).rows[0]
    try:
        fastmbconv.explain(net, (1, 4, 5, 5))
    except ValueError as error:
        return row.path, row.runs, str(error)


def absent():
    try:
        model("synchronised")[0].blocks(torch.empty(0, 4, 3, 3, dtype=torch.float64))
    except ValueError as error:
        return str(error)


def explained():
    net, _, _ = model("synchronised")
    other = timm_converter(fastmbconv.fuse(timm_blocks.InvertedResidual(3, 3)))
    wrong = torch_converter(fastmbconv.fuse(timm_blocks.InvertedResidual(3, 3)))
    explanations = (net, None), (net, (2, 3, 5, 5)), (other, None), (wrong, None)
    return [(e.fused, e.rows[0].reason) for e in (fastmbconv.explain(*arguments) for arguments in explanations)]


def training_steps(rank):
    """Of `fastmbconv train --sync-bn`, by backend; None where a library that it needs is not installed."""
    try:
        from short_runs import World, steps
    except pytest.skip.Exception:
        return None
    found = {}
    for name in ("triton", "eager"):
        with fastmbconv.backend(name), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Grad strides do not match")
            found[name] = steps(World(torch.device("cpu"), rank, 2), sync_bn=True)
    return found


def training_graphs(rank):
    """The same without and with `--graph`, in accumulated parts; None where a needed library is not installed."""
    try:
        from short_runs import World, steps
    except pytest.skip.Exception:
        return None
    here = World(torch.device("cpu"), rank, 2)
    with (
        fastmbconv.backend("eager"),
        mock.patch.object(torch.cuda, "make_graphed_callables", make_graphed_callables),
        mock.patch.object(fastmbconv, "graph", lambda model, example: GraphedTraining(model, example, True)),
    ):
        return [steps(here, graph=graph, accumulate=2, drop_path=0.5) for graph in (False, True)]


def main(rank, folder):
    poisoned().__enter__()  # to the end of this process
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    results = {
        "blocks": {name: fused_and_reference(name, rank) for name in BLOCKS},
        "compiled": compiled("k3 SE residual", rank),
        "DDP": {kind: distributed_data_parallel(kind, rank) for kind in ("synchronised", "local", "frozen")},
        "FSDP2": {wrap: fully_sharded(wrap, rank) for wrap in ("whole", "each block", "a leaf")},
        "explain": explained(),
        "sharded": described_while_sharded(rank),
        "absent": absent(),
        "training": training_steps(rank),
        "graphs": training_graphs(rank),
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
