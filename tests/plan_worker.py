"""Plans of compiled kernels against their launchers, for test_plans_compiled.py: `plan_worker.py LIBRARIES [CASE ...]`.

On the device that is not there (benchmarks/rehearsal): tensors have memory, kernels go through Triton's front end, and
Triton's own launcher hands pointers to a driver that computes nothing. What a plan starts is held, argument by
argument, against what the launchers start: a call whose every tensor stays alive, so that no address means two things.
Prints JSON: how many arguments of each kind agreed.
"""

import ctypes
import functools
import gc
import itertools
import json
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.rehearsal import preload

library = preload.load(Path(sys.argv[1]), operators=True)

import torch  # noqa: E402
import triton  # noqa: E402
from libraries import library as imported  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from benchmarks.rehearsal import cuda  # noqa: E402

cuda.install(cuda.Device(library))
cuda.pass_through()

import fastmbconv  # noqa: E402
from fastmbconv import plans  # noqa: E402
from fastmbconv.kernels import batch_norm, depthwise, depthwise_inference, launching, tuning  # noqa: E402
from fastmbconv.mbconv import MBConv  # noqa: E402
from fastmbconv.recording import MAKERS  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
NOTHING = dict(shared=0, tmem_size=0, cluster_dims=(1, 1, 1)) | {
    f"{kind}_scratch_{what}": value for kind in ("global", "profile") for what, value in (("size", 0), ("align", 1))
}
launcher = triton.runtime.driver.active.launcher_cls
start, plans_run, walk_tiles = launcher.__call__, plans.run, tuning.walk_tiles


def compile_nothing(self, module, metadata, *args):
    """In the place of what follows Triton's front end, which takes minutes: what a kernel is given is settled there."""
    metadata.update(NOTHING, name=module.get_entry_func_name())
    return module


@functools.wraps(walk_tiles)
def short_walks(images, height, channels, kernel_size, stride, dtype, backward, expand=0):
    """A walk is unrolled over its rows, and takes as long to compile."""
    tiles = walk_tiles(images, height, channels, kernel_size, stride, dtype, backward, expand)
    return tiles | dict(R=stride if backward else 1)


class Pointer(NamedTuple):
    """A tensor that somebody was given: its address, its storage's address and bytes, and what kind it is."""

    address: int
    base: int
    bytes: int
    kind: tuple


class Call(NamedTuple):
    """A kernel's launch or an operation of PyTorch's; `fixed` is a launch's grid, stream, function and metadata."""

    name: str
    fixed: tuple
    arguments: list


class Watch(TorchDispatchMode):
    """Notes what is launched and computed while a part's function or plan runs.

    Attributes:
        keep: hold each tensor, so that no memory is used twice.
        places: by name (address, bytes) of tensors that live until the end of the call.
        plans: how often a plan was there.
        about: what each launch tells a hook.
    """

    sees_fastmbconv = True

    def __init__(self, keep=False):
        super().__init__()
        self.keep, self.calls, self.kept, self.places, self.plans, self.about = keep, [], [], {}, 0, []

    def name(self, name, tensor):
        if tensor is not None:
            self.places[name] = (tensor.data_ptr(), tensor.numel() * tensor.itemsize)
            self.kept.append(tensor)

    def named(self, address):
        """Which tensors an address lies in, and where."""
        return {(name, address - at) for name, (at, size) in self.places.items() if at <= address < at + size}

    def add(self, name, fixed, arguments):
        self.calls.append(Call(name, fixed, [described(one) for one in flat(arguments)]))
        if self.keep:
            self.kept += [one for one in flat(arguments) if isinstance(one, Tensor)]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view and function._schema.name not in MAKERS:
            self.add(str(function), (), [args, sorted((kwargs or {}).items()), out])
        return out

    def names(self):
        return [one.name for one in self.calls]

    def pointers(self):
        """For each launch whether it was given tensors, which a plan's are not."""
        return [any(isinstance(one, Pointer) for one in call.arguments) for call in self.calls if call.fixed]


watch = Watch()


def flat(arguments):
    for one in arguments:
        if isinstance(one, (list, tuple)):
            yield from flat(one)
        else:
            yield one


def described(one):
    if not isinstance(one, Tensor):
        return one
    storage = one.untyped_storage()
    kind = (one.dtype, tuple(one.shape), one.stride())
    return Pointer(one.data_ptr(), storage.data_ptr(), storage.nbytes(), kind)


@functools.wraps(start)  # plans look at its signature
def started(self, x, y, z, stream, function, metadata, about, enter, leave, *args):
    name = ctypes.string_at(function).decode()  # this driver's function is its name
    watch.add(name, (x, y, z, stream, function, metadata), args)
    watch.about.append(about)
    return start(self, x, y, z, stream, function, metadata, about, enter, leave, *args)


def followed(key, function, tensors):
    """`plans.run`, whose tensors get names."""
    watch.plans += isinstance(plans._plans.get((key, launching.epoch())), plans.Plan)
    for i, tensor in enumerate(tensors):
        watch.name(f"{key[0]}, given {i}", tensor)
    with watch:
        found = plans_run(key, function, tensors)
    for i, tensor in enumerate(found):
        watch.name(f"{key[0]}, found {i}", tensor)
    return found


class Subject:
    """A block's training step or inference, on its own tensors."""

    def __init__(self, module, shape, dtype, training, wide=False, aligned=True):
        self.module, self.training, self.narrow = module, training, dtype == BF16
        self.x = image(shape, FP32 if wide else dtype, aligned).requires_grad_(training)
        if training:
            y = self.forward()
            self.dy = image(y.shape, y.dtype)

    def forward(self):
        with torch.autocast("cuda", BF16, enabled=self.narrow), torch.set_grad_enabled(self.training):
            return self.module(self.x)

    def __call__(self):
        """Every tensor of a call, by name."""
        own = {"x": self.x, **dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        y = self.forward()
        if not self.training:
            return {**own, "found y": y}
        learned = {name: tensor for name, tensor in own.items() if tensor.requires_grad}
        gradients = torch.autograd.grad(y, list(learned.values()), self.dy)
        found = {f"found gradient of {name}": one for name, one in zip(learned, gradients, strict=True)}
        return {**own, "dy": self.dy, "found y": y, **found}


class Slices:
    """Launches that read parts of tensors, of a given one and of one that they share; a block's have none such."""

    training = False

    def __init__(self):
        self.u = image(SMALL, FP32).permute(0, 2, 3, 1)

    def __call__(self):
        def function():
            norms = torch.empty(2, 4, self.u.shape[3], device="cuda")
            v = batch_norm.bn_act_fwd(self.u[1:], norms[0], None, None, None, None, "silu")
            return [batch_norm.bn_act_fwd(v, norms[1], None, None, None, None, "silu")]

        (y,) = plans.run(("slices",), function, (self.u,))
        return {"u": self.u, "found y": y}


def image(shape, dtype, aligned=True):
    """[N, C, H, W] in channels_last; its memory begins where 16 bytes do, or one value behind."""
    n, c, h, w = shape
    values = torch.empty(n * c * h * w + 1, dtype=dtype, device="cuda")
    return values[not aligned :][: n * c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)


def watched(subject, keep=False):
    """One call of a subject, written down: by its launchers with nothing let go, or as it comes."""
    global watch
    watch = Watch(keep)
    # A device's backward has a thread of its own, which knows no mode of this one.
    with launching.watching() if keep else nullcontext(), torch.autograd.set_multithreading_enabled(False):
        for name, tensor in subject().items():
            watch.name(name, tensor)
    return watch


class Storage:
    """Memory of the launchers' call: the calls that use it first and last, and where it lies in the plan's."""

    def __init__(self, size, first):
        self.size, self.first, self.last, self.base = size, first, first, None

    def put(self, base, last):
        """False where it lay elsewhere before."""
        before, self.base, self.last = self.base, base, max(self.last, last)
        return before in (None, base)

    def overlaps(self, other):
        return self.base < other.base + other.size and other.base < self.base + self.size

    def meets(self, other):
        """Whether both are in use at once."""
        return self.first <= other.last and other.first <= self.last


def compare(launchers, plan):
    """Hold a plan's calls against its launchers' own; how many arguments there were of each kind."""
    assert plan.names() == launchers.names()
    assert not any(plan.pointers()) and all(launchers.pointers())
    counts, storages = Counter(), {}
    for i, (theirs, ours) in enumerate(zip(launchers.calls, plan.calls, strict=True)):
        assert ours.fixed == theirs.fixed, (i, theirs.name)
        counts["launches" if theirs.fixed else "operations"] += 1
        for j, (expected, found) in enumerate(zip(theirs.arguments, ours.arguments, strict=True)):
            where = f"argument {j} of {theirs.name}, call {i}: {found} for {expected}"
            if isinstance(expected, Pointer):
                assert theirs.fixed or found.kind == expected.kind, where
                address = found if theirs.fixed else found.address
                counts[compare_pointers(launchers, plan, i, expected, address, storages, where)] += 1
            else:
                assert type(found) is type(expected) and (found is expected or found == expected), where
                counts["constants"] += 1
    return counts + compare_storages(list(storages.values()))


def compare_pointers(launchers, plan, i, expected, address, storages, where):
    """Whether the i-th call's pointer is the right one; "named" or "inner", by whose it is."""
    assert type(address) is int, where
    names = launchers.named(expected.address)
    assert names <= plan.named(address), where  # what is found may lie where something inner lay before
    given = names and not any("found" in name for name, _ in names)
    storage = storages.setdefault(expected.base, Storage(expected.bytes, 0 if given else i))
    assert storage.put(address - (expected.address - expected.base), len(plan.calls) if names else i), where
    return "named" if names else "inner"


def compare_storages(storages):
    """No two overlap while both are in use; how many there are, and how many pairs overlap at other times."""
    counts = Counter(storages=len(storages), shared=0)
    for i, one in enumerate(storages):
        for other in storages[:i]:
            if one.overlaps(other):
                assert not one.meets(other), (vars(one), vars(other))
                counts["shared"] += 1
    return counts


def frozen():
    block = MBConv(16, 16)
    for norm in (block.expand_bn, block.project_bn):
        norm.requires_grad_(False).train = lambda mode=True, norm=norm: nn.Module.train(norm, False)
    return block


def lean():
    block = MBConv(16, 16)
    block.memory = "lean"
    return block


def dense():
    """timm's EdgeResidual."""
    imported("timm")
    from timm.models import _efficientnet_blocks as timm_blocks

    options = dict(exp_ratio=4, act_layer=nn.SiLU, se_layer=timm_blocks.SqueezeExcite)
    return fastmbconv.fuse(timm_blocks.EdgeResidual(16, 16, **options))


SMALL = (4, 16, 8, 8)
CASES = {  # how a block is made, and its images
    "k3": (lambda: MBConv(16, 16), SMALL),
    "k5, stride 2, same": (lambda: MBConv(16, 24, 5, 2, padding="same"), (4, 16, 9, 9)),
    "relu6 without se": (lambda: MBConv(16, 16, se_ratio=0, activation="relu6"), (1, 16, 24, 24)),
    "no expansion": (lambda: MBConv(16, 16, expand_ratio=1, se_ratio=0.5), SMALL),
    "lean": (lean, SMALL),
    "frozen": (frozen, SMALL),
    "drop_path": (lambda: MBConv(16, 16, drop_path=0.5), SMALL),
    "library": (lambda: MBConv(400, 400), (16, 400, 12, 12)),
    "dense": (dense, SMALL),
}


def agree(make):
    """Counts of a case: its plan on the tensors that it was recorded with, and on those of another subject like it."""
    first, twin = make(), make()
    for _ in range(2):
        first()
    counts = Counter()
    for subject in (first, twin):
        launchers, plan = watched(subject, keep=True), watched(subject)
        assert launchers.plans == plan.plans == 1 + subject.training, "there is no plan"
        counts += compare(launchers, plan)
    return counts


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def chain(hook):
    """A hook as profilers add theirs."""
    hooks = type(triton.knobs.runtime.launch_enter_hook)()
    hooks.add(hook)
    return hooks


def unplanned(watch, like):
    """Whether launchers ran, and started the same kernels as another call."""
    return watch.names() == like.names() and all(watch.pointers())


def fallbacks():
    """Where a plan steps back: images off their alignment, a profiler's hook, a Triton that is not known."""
    module = MBConv(16, 16).to("cuda").eval()
    subject, odd = (Subject(module, SMALL, FP32, False, aligned=aligned) for aligned in (True, False))
    for _ in range(2):
        subject()
    plan = watched(subject)
    assert plan.plans == 1 and plan.calls and not any(plan.pointers())
    found = {"unaligned": unplanned(watched(odd), plan)}
    for name in ("launch_enter_hook", "launch_exit_hook"):
        for kind in (chain, lambda hook: hook):
            seen = []
            hook = kind(lambda metadata, seen=seen: seen.append(metadata.get()["name"]))
            with replaced(triton.knobs.runtime, name, hook):
                told = unplanned(watched(subject), plan) and seen == plan.names()
            found[name] = found.get(name, True) and told
    found["afterwards"] = not any(watched(subject).pointers()) and watch.about == [None] * len(plan.calls)
    return found | unknown(subject, plan) | {"keeps its kernels": keeps_kernels(subject)}


def unknown(subject, plan):
    """Under a Triton that nobody has seen there are no plans."""
    plans.forget()
    plans.known_form.cache_clear()
    with replaced(plans, "TRITON", (3, 10)):
        every = [unplanned(watched(subject), plan) and not watch.plans for _ in range(4)]
        found = {"unknown": all(every), "its state": plans.state()}
    plans.forget()
    plans.known_form.cache_clear()
    return found


def keeps_kernels(subject):
    """Whether kernels that Triton forgets live as long as a plan starts them: from 3.9 on they are unloaded."""
    for _ in range(3):
        plan = watched(subject)
    assert plan.plans == 1
    for function in [one for one in gc.get_objects() if type(one) is triton.JITFunction]:
        function.device_caches.clear()
    gc.collect()
    alive = {one.function for one in gc.get_objects() if type(one) is CompiledKernel}
    return {call.fixed[4] for call in plan.calls} <= alive


def install():
    """What follows stands in other modules' places until the end of the process."""
    CUDABackend.make_ttgir = lambda self, module, *args: module
    CUDABackend.make_llir = compile_nothing
    CUDABackend.make_ptx = lambda *args: ""
    CUDABackend.make_cubin = lambda *args: b""
    depthwise.walk_tiles = depthwise_inference.walk_tiles = short_walks
    launcher.__call__, plans.run = started, followed


def main():
    install()
    found = {"slices": agree(Slices)}
    there = [name for name in CASES if name != "dense" or find_spec("timm")]
    for name in sys.argv[2:] or there:
        make, shape = CASES[name]
        for dtype, training in itertools.product((BF16, FP32), (True, False)):

            def subject(make=make, shape=shape, dtype=dtype, training=training, wide=name == "drop_path"):
                return Subject(make().to("cuda").train(training), shape, dtype, training, wide)

            found[f"{name}, {dtype}, {'training' if training else 'inference'}"] = agree(subject)
    print(json.dumps(dict(triton=triton.__version__, state=plans.state(), cases=found, fallbacks=fallbacks())))


if __name__ == "__main__":
    main()
