"""What the interpreter can't show: the instructions that kernels are compiled to, for a GPU that is not there."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blocks import INTERPRETED, fused, make_block, normal

ROOT = Path(__file__).resolve().parents[1]
compiler = pytest.mark.skipif(sys.platform != "linux" or not INTERPRETED, reason="no compiler, or a GPU to ask")


def instructions(folder, what):
    """Rows of kernel, traits, and how often each PTX instruction is there; under the Triton that this process has."""
    path = folder / "rows.json"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(p for p in (env.get("PYTHONPATH"), str(ROOT)) if p)
    env["TRITON_CACHE_DIR"] = str(folder / "cache")  # what is compiled is cut off behind the PTX
    command = [sys.executable, "tests/ptx_worker.py", str(path), what]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert path.exists(), done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def scalars(tmp_path_factory):
    return instructions(tmp_path_factory.mktemp("scalars"), "scalars")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return instructions(tmp_path_factory.mktemp("kernels"), "kernels")


def used(row, *names):
    """A row's instructions of these kinds: "max" is max.NaN.f32, max.s32, ..."""
    return {name for name in row["counts"] if name.split(".")[0] in names}


def title(row):
    return f"{row['kernel']} {row['traits']}"


def losing_nan(rows):
    """Floating-point max and min that return the operand that is a number."""
    found = [(title(row), name) for row in rows for name in used(row, "max", "min")]
    return [(owner, name) for owner, name in found if re.search(r"\.b?f\d+", name) and ".NaN" not in name]


def scalar(rows, activation, fast):
    return next(row for row in rows if row["traits"] == {"ACT": activation, "FAST": fast})


@compiler
@pytest.mark.kernels
def test_scalars_keep_nan(scalars):
    assert not losing_nan(scalars)
    for fast in (False, True):
        assert used(scalar(scalars, "relu", fast), "max", "min") == {"max.NaN.f32"}
        for clamped in ("relu6", "hardswish"):
            assert used(scalar(scalars, clamped, fast), "max", "min") == {"max.NaN.f32", "min.NaN.f32"}


@compiler
@pytest.mark.kernels
def test_scalars_are_what_contributing_says(scalars):
    """Their divisions and exponentials; stores round to nearest even."""
    exact, fast = (scalar(scalars, "silu", fast) for fast in (False, True))
    assert used(exact, "div", "ex2", "tanh") == {"div.full.f32", "ex2.approx.f32"}
    assert used(fast, "div", "ex2", "tanh") == {"tanh.approx.f32"}
    for each in (False, True):
        assert not used(scalar(scalars, "hardswish", each), "div", "ex2", "tanh")
    for smooth in ("gelu", "gelu_tanh"):
        found = used(scalar(scalars, smooth, False), "div", "ex2", "tanh")
        assert found == {"div.full.f32", "ex2.approx.f32"}
    assert used(scalar(scalars, "gelu", True), "div", "ex2", "tanh") == {"tanh.approx.f32", "ex2.approx.f32"}
    assert "tanh.approx.f32" in used(scalar(scalars, "gelu_tanh", True), "tanh")
    assert "cvt.rn.f16.f32" in used(exact, "cvt") and "cvt.rn.bf16.f32" in used(fast, "cvt")


# Each kernel that bounds a floating-point value: by a clamp of its own whatever the activation, or by relu6.
CLAMPS = {
    "_bn_finalize_kernel", "_bn_merge_kernel", "_depthwise_fwd_kernel", "_moments_kernel", "_pointwise_kernel",
}  # fmt: skip
# Of these the activation's value is not used, its derivative is.
DERIVATIVES = {"_bn_act_bwd_kernel", "_bn_act_bwd_reduce_kernel"}


@compiler
@pytest.mark.slow
def test_kernels_keep_nan(kernels):
    assert not losing_nan(kernels)
    bounded = [row for row in kernels if "relu6" in row["traits"].values()]
    others = [row for row in kernels if row not in bounded]
    assert bounded
    assert {row["kernel"] for row in others if "max.NaN.f32" in used(row, "max")} == CLAMPS
    assert {row["kernel"] for row in bounded if "min.NaN.f32" not in used(row, "min")} == DERIVATIVES


@compiler
@pytest.mark.slow
def test_every_kernel_was_compiled(kernels):
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    written = set(re.findall(r"^def (_\w+_kernel)\(", source, re.M))
    assert written
    assert written - {row["kernel"] for row in kernels} == set()


@compiler
@pytest.mark.slow
def test_kernels_are_what_contributing_says(kernels):
    every = {name for row in kernels for name in row["counts"]}
    assert {i for i in every if i.startswith("div.") and "f32" in i} == {"div.full.f32"}
    assert {i for i in every if ".ftz" in i} == {"rsqrt.approx.ftz.f32", "sqrt.approx.ftz.f32"}
    assert not {i for i in every if "tf32" in i or ".f64" in i}
    assert not {i for i in every if i.startswith("cvt.rz")}


def test_activations_are_in_one_place():
    """relu is compiled as a scalar only: no kernel may have one of its own."""
    naming = {path.name for path in (ROOT / "kernels").glob("*.py") if re.search(r'"relu6?"', path.read_text())}
    assert naming == {"math.py"}


def test_masked_loads_say_what_is_outside():
    found = []
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                found.append((path.name, node.lineno, {keyword.arg for keyword in node.keywords}))
    assert len(found) > 50
    assert not [(name, line) for name, line, given in found if "mask" in given and "other" not in given]


@pytest.mark.skipif(not INTERPRETED, reason="looks into the interpreter")
@pytest.mark.parametrize("kernel_size, stride, padding", [(3, 1, None), (5, 2, "same"), (5, 2, None)])
def test_no_negative_number_is_divided(kernel_size, stride, padding, monkeypatch):
    """-1 // 2 is 0 in a kernel and -1 in Python, which computes what is a constexpr."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = []

    def watched(original):
        def divide(self, left, right):
            seen.append(int(left.data.min()))
            return original(self, left, right)

        return divide

    for name in ("create_sdiv", "create_srem"):
        monkeypatch.setattr(InterpreterBuilder, name, watched(getattr(InterpreterBuilder, name)))
    block = make_block(4, 6, kernel_size, stride, 2, padding=padding)
    x = normal(1, 4, 4, 5, dtype=torch.float32)
    fused(block)(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        fused(block.eval())(x)
    assert seen and min(seen) >= 0
