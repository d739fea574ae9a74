"""Started by test_compiled.py, without the interpreter: the PTX instructions that kernels are compiled to, as JSON."""

import json
import re
import sys
from collections import Counter
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from benchmarks import static
from benchmarks.registry import Shape
from fastmbconv import reference
from fastmbconv.kernels import squeeze_excite, tables
from fastmbconv.kernels.math import activate, activate_grad, stored

ARCH = 90
# What decides about a kernel's arithmetic; the rest moves data.
TRAITS = ("ACT", "IN_ACT", "HAS_NORM", "HAS_MOMENTS", "BATCH", "EXPAND")


@triton.jit
def _scalar_kernel(v_ptr, a_ptr, both_ptr, slope_ptr, out_ptr, ACT: tl.constexpr, FAST: tl.constexpr):
    o = tl.arange(0, 128)
    v = tl.load(v_ptr + o)
    both, slope = activate_grad(v, ACT, FAST)
    tl.store(a_ptr + o, activate(v, ACT, FAST))
    tl.store(both_ptr + o, both)
    tl.store(slope_ptr + o, slope)
    tl.store(out_ptr + o, stored(v, out_ptr.dtype.element_ty))


def few_rows(question):
    """The default tiles with the shortest columns: a walk is unrolled over its rows, and takes as long to compile."""
    rows = question.sizes["stride"] if question.kernel == "depthwise_bwd" else 1
    return question.default | ({"R": rows} if "R" in question.default else {})


def launches(activation):
    """The kernels of all blocks, single ops and ends."""
    with tables.answered_by(few_rows):
        shape = Shape("small", 0, 16, 8, 16, 80, 2, 3, 1, activation=activation)
        found = static.launches(shape, torch.bfloat16, [ARCH], ops=True)
        with patch.object(squeeze_excite, "WHOLE_WEIGHT", 0):
            others = static.launches(shape, torch.bfloat16, [ARCH])
    return found + [one for one in others if one.kernel.__name__ in ("_excite_reduce_kernel", "_excite_expand_kernel")]


def instructions(source, options=None):
    ptx = triton.compile(source, target=GPUTarget("cuda", ARCH, 32), options=options).asm["ptx"]
    return Counter(re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s[^;\n]*;", ptx, re.M))


def scalar_rows():
    for activation in reference.ACTIVATIONS:
        for fast, dtype in ((False, "fp16"), (True, "bf16")):
            signature = dict.fromkeys(("v_ptr", "a_ptr", "both_ptr", "slope_ptr"), "*fp32") | {"out_ptr": f"*{dtype}"}
            signature |= {"ACT": "constexpr", "FAST": "constexpr"}
            traits = {"ACT": activation, "FAST": fast}
            source = ASTSource(_scalar_kernel, signature, constexprs=traits)
            yield dict(kernel="_scalar_kernel", traits=traits, counts=instructions(source))


def kernel_rows():
    """Every kernel once for each of its traits; relu is relu6 without the min, and is among the scalar ones."""
    found = {}
    for activation in ("silu", "relu6"):
        for one in launches(activation):
            given = {one.kernel.arg_names[path[0]]: value for path, value in one.constexprs.items()}
            traits = {name: given[name] for name in TRAITS if name in given}
            found.setdefault((one.kernel.__name__, *traits.items()), (one, traits))
    for one, traits in found.values():
        source = ASTSource(one.kernel, one.signature, one.constexprs, one.attrs)
        counts = instructions(source, one.options.__dict__)
        yield dict(kernel=one.kernel.__name__, traits=traits, counts=counts)


if __name__ == "__main__":
    CUDABackend.make_cubin = lambda *args, **kwargs: b""  # what follows PTX takes longest
    path, what = sys.argv[1:]
    rows = list({"scalars": scalar_rows, "kernels": kernel_rows}[what]())
    with open(path, "w") as file:
        json.dump(rows, file)
