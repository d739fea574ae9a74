"""The simulator of kernel times: its reading of machine code, and kernels whose speed others have measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import issue
from benchmarks.sass import Loop
from benchmarks.sass import Path as Route
from benchmarks.simulator.assumed import assume_seconds, count_flops, count_repeats
from benchmarks.simulator.decode import LDG, Listing
from benchmarks.simulator.warp import Endless, find_paths, find_tensors
from fastmbconv.kernels.traffic import recorded, state

ROOT = Path(__file__).resolve().parents[1]
compiler = pytest.mark.skipif(sys.platform != "linux", reason="Triton has no compiler here")


def start(arguments, folder, **changes):
    """A process without the interpreter, its caches in a folder of the test's."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "FASTMBCONV_SIMULATOR_CACHE": str(folder), **changes}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulator")


@pytest.fixture(scope="module")
def known(folder):
    done = start(["tests/known_kernels.py", folder / "rows.json"], folder)
    assert not done.returncode, done.stdout + done.stderr
    return {row["name"]: row for row in json.loads((folder / "rows.json").read_text())}


@compiler
@pytest.mark.slow
def test_every_result_is_waited_for(known):
    """The first reader of a load waits for its barrier: else the control fields are read wrongly."""
    counts = [row["awaited"] for row in known.values()]
    assert sum(every for _, every in counts) > 1000
    assert all(good == every for good, every in counts)


@compiler
@pytest.mark.slow
def test_known_kernels_take_what_was_measured(known):
    ratios = {name: row["us"] / row["measured"] for name, row in known.items() if row["measured"]}
    assert len(ratios) > 10
    assert not {name: ratio for name, ratio in ratios.items() if not 0.85 < ratio < 1.12}
    streams = [ratio for name, ratio in ratios.items() if name.startswith("stream")]
    assert len(streams) == 4 and sorted(streams)[1:-1] == pytest.approx([1, 1], abs=0.05)


@compiler
@pytest.mark.slow
def test_products_and_copies_reach_their_ceilings(known):
    assert 500 < known["matmul 4096"]["tflops"] < 650
    assert known["copy"]["gbs"] == pytest.approx(3000, rel=0.05)


@compiler
@pytest.mark.slow
def test_loops_fit_where_they_are_described(known):
    assert {name for name, row in known.items() if not row["fits"]} == {"not described"}


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sum of 50", "sum of 51", "strided copy of 50", "strided copy of 51"])
def test_parts_of_an_unrolled_loop_share_its_trips(known, kernel):
    """Every byte is asked for once; a predicated round before the loop counts as run, so a fiftieth may come on top."""
    assert 1 <= known[kernel]["asked"]["x_ptr"] < 1.03


@compiler
@pytest.mark.slow
def test_spills_beyond_l1_are_moved(known):
    """The kernel's own 268 MB would take 75 us."""
    spilling = known["rms_norm fp16 1024 x 65536 H20"]
    assert spilling["spilled_kb"] > 1000 and spilling["bound"] == "memory"
    assert spilling["us"] == pytest.approx(477, rel=0.1)
    assert not [name for name, row in known.items() if row["spilled_kb"] and row is not spilling]


@compiler
@pytest.mark.slow
def test_total_is_on_the_last_line(folder):
    report = folder / "report.json"
    options = ["--model", "tiny", "--block", "80", "--phase", "inference", "--total", "--json", report]
    done = start(["-m", "benchmarks.simulate", *options], folder)
    assert not done.returncode, done.stdout + done.stderr
    *lines, said, total = done.stdout.splitlines()
    rows = json.loads(report.read_text())["rows"]
    assert float(total) == pytest.approx(sum(row["us"] * row["count"] for row in rows) / 1e3, abs=1e-3)
    assert "simulated" in said and all("simulated" in line for line in lines if line.startswith(("#", "| kernel")))
    assert {row["kernel"] for row in rows} >= {"_depthwise_inference_kernel", "_pointwise_kernel"}
    assert all(row["fits"] for row in rows)
    again = start(["-m", "benchmarks.simulate", *options], folder, TRITON_CACHE_DIR="/dev/null/none")
    assert again.stdout.splitlines()[-1] == total, again.stderr  # nothing was compiled


@compiler
def test_says_that_there_is_no_compiler(tmp_path):
    done = start(["-m", "benchmarks.simulate", "--model", "tiny"], tmp_path, PATH=str(tmp_path), CC="none")
    assert done.returncode == 2
    assert done.stderr == ("benchmarks.simulate: no C compiler (cc, gcc or clang): install one, or name it in $CC\n")


@compiler
def test_names_the_blocks_that_there_are(tmp_path):
    done = start(["-m", "benchmarks.simulate", "--model", "b0", "--block", "b1"], tmp_path)
    assert done.returncode == 2 and "b0.6 n128 7px 192-1152-192 k5s1" in done.stderr
    done = start(["-m", "benchmarks.simulate", "--gpu", "h100", "h200", "--total"], tmp_path)
    assert done.returncode == 2 and "--total is of one model" in done.stderr


def test_every_kernel_has_its_loops_described():
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    written = set(re.findall(r"^def (_\w+_kernel)\(", source, re.M))
    assert written and written - set(issue.MODELS) == set()


def assembled(*lines):
    """A listing: an address a line, and in each instruction's words a stall of one cycle and no barrier."""
    control = f"0x{(1 | 7 << 5 | 7 << 8) << 41:016x}"
    spaces = " " * 8
    return "\n".join(
        f"{spaces}/*{16 * i:04x}*/ {line} ; /* 0x{0:016x} */\n{spaces}/* {control} */" for i, line in enumerate(lines)
    )


def trips(listing, *loops):
    """How often a warp runs each instruction, and whether the loops fit."""
    code = Listing(listing)
    (path,), fits = find_paths(code, (Route(1.0, loops),))
    ran = [number for b in path for number in range(code.firsts[b], code.firsts[b + 1])]
    return [ran.count(number) for number in range(len(code.operations))], fits


def test_decodes_the_control_field():
    text = "/*0000*/ LDG.E.128 R4, [R2.64] ; /* 0x0000000000000000 */\n/* 0x{:016x} */"
    code = Listing(text.format((5 | 1 << 4 | 2 << 5 | 7 << 8 | 0b100001 << 11) << 41))
    (load,) = code.operations
    assert (load.stall, load.write_barrier, load.read_barrier, load.wait) == (5, 2, 7, 0b100001)
    assert load.writes == ("R", 4, 4) and load.reads == [("R", 2)]
    assert code.rows()["kind"][0] == LDG and code.rows()["bytes"][0] == 512


@pytest.mark.parametrize(
    ("opcode", "size"), [("LDSM.16.M88", 128), ("LDSM.16.M88.2", 256), ("LDSM.16.MT88.4", 512), ("STSM.16.M88.4", 512)]
)
def test_matrices_are_counted_by_their_last_digit(opcode, size):
    """M88 is a matrix of 8 x 8, not eight matrices."""
    assert Listing(assembled(f"{opcode} R4, [R2]")).rows()["bytes"][0] == size


def test_a_predicated_exit_ends_a_loop():
    """At its end, and in its middle: nothing else leads out of it."""
    listing = assembled("MOV R1, R2", "LDG.E R3, [R4]", "FADD R5, R5, R3", "@P0 EXIT", "BRA 0x10")
    assert trips(listing, Loop(10)) == ([1, 10, 10, 10, 9], True)
    tested_first = assembled("@P0 EXIT", "LDG.E R3, [R4]", "FADD R5, R5, R3", "FADD R6, R5, R3", "BRA 0x0")
    assert trips(tested_first, Loop(10)) == ([11, 10, 10, 10, 10], True)


def test_an_exit_before_the_loop_is_not_taken():
    listing = assembled("@P0 EXIT", "LDG.E R3, [R4]", "FADD R5, R5, R3", "@P1 BRA 0x10", "EXIT")
    assert trips(listing, Loop(7)) == ([1, 7, 7, 7, 1], True)


@pytest.mark.parametrize("rounds, main, rest", [(10, 2, 2), (8, 2, 0), (3, 0, 3), (1, 0, 1)])
def test_a_remainder_loop_gets_the_remainder(rounds, main, rest):
    loads = ["LDG.E R3, [R4]"] * 4
    listing = assembled(
        "@P0 BRA 0x60", *loads, "@P1 BRA 0x10", "@P2 BRA 0x90", "LDG.E R3, [R4]", "@P3 BRA 0x70", "EXIT"
    )
    counts, fits = trips(listing, Loop(rounds))
    assert (counts[1], counts[7], fits) == (main, rest, True)


def test_a_loop_that_nothing_ends_is_an_error():
    with pytest.raises(Endless, match="no way out"):
        find_paths(Listing(assembled("LDG.E R3, [R4]", "BRA 0x0")), (Route(1.0, (Loop(3),)),))


def test_pointers_keep_their_names_on_the_stack():
    listing = assembled(
        "IMAD.WIDE R4, R0, 0x4, c[0x0][0x218]",
        "STL.64 [R1+0x10], R4",
        "MOV R4, RZ",
        "LDL.64 R8, [R1+0x10]",
        "LDG.E R2, [R8.64]",
        "STG.E [R4.64], R2",
    )
    assert find_tensors(Listing(listing), [0], {"x_ptr": "*fp32", "y_ptr": "*fp32"}) == {4: "y_ptr"}


def test_what_a_launcher_states_twice_comes_from_memory_twice():
    """Tensors of one shape are not told apart: x, a residual and dx, of which two are stated twice, get 5/3 each."""
    alike = [torch.empty(4, 6) for _ in range(3)]
    weight, parts = torch.empty(6), torch.empty(2, 6)
    names = dict(zip(("x_ptr", "residual_ptr", "dx_ptr", "w_ptr", "parts_ptr"), (*alike, weight, parts), strict=True))
    tensors = {name: tensor.nbytes for name, tensor in names.items()}
    with recorded() as stated:
        state("expand_pass", (alike[0], alike[1], alike[0], weight), (alike[2], alike[2]))  # parts are not stated
    count_repeats(tensors, stated[0], {name: (tuple(t.shape), t.dtype) for name, t in names.items()})
    assert tensors == dict(x_ptr=160, residual_ptr=160, dx_ptr=160, w_ptr=24, parts_ptr=48)


def test_products_are_assumed_from_bytes_and_flops():
    a, b, y = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((4096, 512), (512, 1024), (4096, 1024)))
    with recorded() as launches:
        state("mm", (a, b), (y,))
        state("mm", (a.t(), y, b.t()), (torch.empty(512, 1024),))
        state("sum", (torch.empty(64, 1000),), (torch.empty(1000),))
    first, second, total = launches
    assert count_flops(first) == pytest.approx(2 * 4096 * 1024 * 512)
    assert count_flops(second) == pytest.approx(2 * 512 * 1024 * 4096)
    assert assume_seconds(first, 10_000_000, 3e12, 1.5e-6) == pytest.approx(2 * 4096 * 1024 * 512 / 500e12 + 3e-6)
    assert assume_seconds(first, 100_000_000, 3e12, 1.5e-6) == pytest.approx(1e8 / 2.55e12 + 3e-6)
    assert assume_seconds(total, 260_000, 3e12, 1.5e-6) == pytest.approx(3.5e-6)
    assert assume_seconds(total, 20_000_000, 3e12, 1.5e-6) == pytest.approx(2e7 / 2e12 + 1.5e-6)
