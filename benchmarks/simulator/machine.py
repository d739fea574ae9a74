"""One multiprocessor of a Hopper GPU and its share of the programs and of memory: the time of a launch.

How: each warp runs its path (warp.py) in order, an instruction a cycle from each of four schedulers, with the stall
counts and barriers of the code (a wait is for all earlier users of that barrier), pipes, cp.async and wgmma groups.
Memory is a queue at this multiprocessor's share of the bandwidth. The longest multiprocessor has ceil(programs / 132)
of them. A tensor's share from memory is its size over all bytes that the programs ask of it; the rest comes from L2.

Where the constants come from
* Bandwidth: what a copy reaches. Latency of memory, 445 ns + 515 ns * use^2: fitted to BabelStream on an H200
  (NVIDIA/cccl issue 1673; 4 figures within 0-10 %) and to Triton kernels that wait for one step of memory (FlagGems'
  pull requests 5080 and 5727). 150 ns between programs: with it.
* L2 265 cycles, LDS 29, L1 41: arXiv 2402.13499. L2's 32 bytes a cycle: so that a matrix product of 4096 has its public
  550-620 TFLOP/s. SHFL 24, MUFU 23: assumed.
* MUFU and conversions 8 cycles a warp and scheduler, IMAD and ALU 2, FFMA 1, LSU 4: CUDA programming guide, throughput
  table for 9.0. wgmma: peak rate, 18 cycles more to its result. mma.sync: 63 % of that (arXiv 2402.13499).
* Spilled registers: L1 keeps `SPILLS_IN_L1` of what shared memory leaves of its 256 KB (40 %: 100 KB, a guess), L2 its
  size for all of them, and every LDL and STL moves the rest to L2 and to memory. Kernels with the arithmetic of three
  published ones, 2500-4000 spill instructions and 7-11 MB of spills a multiprocessor, take 0.94, 1.03 and 0.94 of the
  time that was measured then; as if spills cost nothing it was 0.07-0.25. Between 100 KB and 7 MB nothing is known.
* 1.5 us between two kernels: assumed. A CUDA graph may have 0.5.

How good it is: against 30 published times of Triton kernels (LinkedIn's Liger-Kernel on an H100, FlagGems on an H20),
simulated over measured is 0.96 in the median, 0.80-1.09 for 80 % and 0.72-1.20 for all of them, before memory's latency
was 445 ns. At memory's speed 1.01; bound by latency 6-28 % too fast; kernels under 10 us take about 1 us more than
it says; matrix products from L2 10 % too slow.

What it leaves out: instruction cache (loops of 30-55 KB may be slower), bank conflicts, TLB and DRAM rows, which lanes
read the same place (vectors and gates: a third of the bytes, by rule), L2 hits between two kernels (all tensors above
`warm` bytes come from memory), clocks below the one given, the host. Torch's launches are assumed (assumed.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import ceil, prod

import numpy as np

from benchmarks import issue, roofline
from benchmarks.sass import Path as Route
from benchmarks.simulator import core
from benchmarks.simulator.assumed import assume_seconds
from benchmarks.simulator.decode import ALU, FMA, GLOBAL, HEAVY, LOCAL, LSU, STG, TENSOR, XU
from benchmarks.simulator.kernels import Compiled, Work
from benchmarks.simulator.warp import find_paths, find_tensors

WARM = 4 << 20  # tensors up to so many bytes are taken to be in L2
IN_L1 = 32 << 10  # and these in L1 from a multiprocessor's second turn of programs on
REPLICATED = 1 << 20  # vectors and gates: lanes read the same places, so a third of the bytes is asked of L2
NOT_REPLICATED = ("w_ptr", "we_ptr", "wr_ptr", "wx_ptr", "act_sums_ptr", "sums_ptr", "partials_ptr", "parts_ptr")
L1, SPILLS_IN_L1 = 256 << 10, 0.4
MOST_RATE = 56.0  # bytes a cycle that one multiprocessor gets, however few of them work
LSU_RATE = 128.0  # bytes a cycle
BARRIER = 20.0  # cycles
SAMPLED = 20000  # programs whose roles are counted
WAITS = {
    "memory": "latency",
    "short": "short latency",
    "barrier": "barriers",
    "async": "wgmma latency",
    "pipe": "pipe",
}


@dataclass(frozen=True)
class Gpu:
    """A Hopper GPU; seconds, bytes and bytes a second, cycles where that is said."""

    name: str
    bandwidth: float
    clock: float = 1.755e9
    multiprocessors: int = 132
    dram_latency: float = 445e-9  # of an idle memory
    dram_loaded: float = 515e-9  # added, times the square of the share of its bandwidth that is in use
    l2_rate: float = 32.0  # per cycle and multiprocessor, about 7.4 TB/s
    l2_latency: float = 265.0  # cycles
    l2_size: float = 50e6
    credit: float = 1500.0  # cycles of unused bandwidth that may be taken at once
    start: float = 150e-9  # from the end of a program to its successor's first instruction
    gap: float = 1.5e-6  # from the end of a kernel to the start of the next


GPUS = {key: Gpu(roofline.GPUS[key].name, roofline.GPUS[key].bandwidth) for key in ("h100", "h200")}


@dataclass
class Time:
    """What the simulator says of one launch. `us` has the gap to the next kernel; shares are of the simulated time.

    `fits`: the loops of the source were found in the code. `asked`: how often the programs ask for each tensor.
    """

    kernel: str
    us: float
    floor_us: float
    bound: str
    assumed: bool = False
    fits: bool = True
    registers: int = 0
    resident: int = 0
    warps: int = 0
    programs: int = 0
    busy: dict[str, float] = field(default_factory=dict)
    waits: dict[str, float] = field(default_factory=dict)
    in_flight_kb: float = 0
    spilled_kb: float = 0
    issued: float = 0
    asked: dict[str, float] = field(default_factory=dict)


def assume(work: Work, gpu: Gpu) -> Time:
    """The time of a launch of torch's."""
    assert work.launch is not None
    seconds = assume_seconds(work.launch, work.stated, gpu.bandwidth, gpu.gap)
    return Time(work.name, seconds * 1e6, work.stated / gpu.bandwidth * 1e6, "assumed", assumed=True)


def simulate(
    work: Work, compiled: Compiled, gpu: Gpu, warm: int = WARM, routes: tuple[Route, ...] | None = None
) -> Time:
    """The time of one launch; `routes` instead of what benchmarks/issue.py says of the kernel."""
    known = routes is not None or work.name in issue.MODELS
    routes = routes or find_routes(work)
    code, programs = compiled.code, prod(work.grid)
    paths, fits = find_paths(code, routes)
    spans = [[np.arange(code.firsts[b], code.firsts[b + 1]) for b in path] for path in paths]
    traces = [np.concatenate(span).astype(np.int32) for span in spans]
    tensors: dict[int, str] = {}
    for path in paths:
        tensors = find_tensors(code, path, compiled.signature) | tensors
    longest = ceil(programs / gpu.multiprocessors)
    weights = Counter(find_roles(work, min(programs, SAMPLED), routes))
    shares = [weights[role] / weights.total() for role in range(len(traces))]
    rows = code.rows()
    asked = _count_asked(rows, traces, shares, tensors, compiled.warps * programs)
    turns = longest > compiled.resident
    _fill_shares(rows, compiled, work, tensors, asked, warm, turns)
    _fill_spills(rows, compiled, gpu, min(longest, compiled.resident))
    # The longest of the multiprocessors has `longest` programs; together they have memory's bandwidth.
    busy = min(1.0, programs / gpu.multiprocessors) if longest == 1 else programs / (longest * gpu.multiprocessors)
    rates = core.Rates(
        dram_rate=min(gpu.bandwidth / gpu.clock / gpu.multiprocessors / busy, MOST_RATE),
        l2_rate=min(gpu.l2_rate / busy, MOST_RATE),
        lsu_rate=LSU_RATE,
        dram_latency=gpu.dram_latency * gpu.clock,
        dram_loaded=gpu.dram_loaded * gpu.clock,
        l2_latency=gpu.l2_latency,
        credit=gpu.credit,
        barrier=BARRIER,
        start=gpu.start * gpu.clock,
    )
    out = core.run(rows, traces, find_roles(work, longest, routes), compiled.resident, compiled.warps, rates)
    us = out.cycles / gpu.clock * 1e6
    time = Time(
        work.name,
        us + gpu.gap * 1e6,
        work.stated / gpu.bandwidth * 1e6,
        "",
        fits=fits and known,
        registers=compiled.registers,
        resident=compiled.resident,
        warps=compiled.warps,
        programs=programs,
        busy=_find_busy(out, rates),
        waits={n: v / max(out.warp_cycles, 1) for n, v in zip(core.REASONS, out.waits, strict=True)},
        in_flight_kb=out.in_flight / out.cycles / 1024,
        spilled_kb=compiled.spilled / 1024 if (rows["kind"] == LOCAL).any() else 0,
        issued=out.issued * 32 * programs / longest,
        asked={
            name: n / work.tensors[name] for (name, store), n in asked.items() if name in work.tensors and not store
        },
    )
    return replace(time, bound=_name_bound(time, us, longest))


def find_routes(work: Work) -> tuple[Route, ...]:
    """The loops of a launch's source; none where nobody has described them."""
    if work.name not in issue.MODELS:
        return (Route(1.0),)
    try:
        return issue.MODELS[work.name](work.arguments)[1]
    except KeyError as error:
        message = f"benchmarks/issue.py asks for {error} of {work.name}, which has no such argument"
        raise RuntimeError(message) from error


def find_roles(work: Work, count: int, routes: tuple[Route, ...]) -> list[int]:
    """The route of each of `count` programs in the order in which they start, by the routes' shares, evenly mixed."""
    if len(routes) == 1:
        return [0] * count
    found: list[int] = []
    owed = [0.0] * len(routes)
    for _ in range(count):
        owed = [o + route.share for o, route in zip(owed, routes, strict=True)]
        found.append(max(range(len(routes)), key=owed.__getitem__))
        owed[found[-1]] -= 1
    return found


Asked = Counter[tuple[str, bool]]


def _count_asked(
    rows: np.ndarray, traces: list[np.ndarray], shares: list[float], tensors: dict[int, str], warps: int
) -> Asked:
    """Bytes that a launch's warps ask for, by tensor, loads and stores (True) apart."""
    asked: Asked = Counter()
    for trace, share in zip(traces, shares, strict=True):
        for number, times in zip(*np.unique(trace, return_counts=True), strict=True):
            if rows["kind"][number] in GLOBAL:
                key = (tensors.get(int(number), "?"), bool(rows["kind"][number] == STG))
                asked[key] += float(times) * int(rows["bytes"][number]) * warps * share
    return asked


def _fill_shares(
    rows: np.ndarray, compiled: Compiled, work: Work, tensors: dict[int, str], asked: Asked, warm: int, turns: bool
) -> None:
    """Where each global access is served: the shares of its bytes from L2 and from memory."""
    for number in np.flatnonzero(np.isin(rows["kind"], GLOBAL)):
        name, store = tensors.get(int(number), "?"), bool(rows["kind"][number] == STG)
        size = work.tensors.get(name, 0)
        rows["l2"][number] = 1
        rows["dram"][number] = 0 if size <= warm else min(1.0, size / max(asked[name, store], 1))
        if store or (name in NOT_REPLICATED and size > IN_L1):
            continue
        if size <= IN_L1 and "BYPASS" not in compiled.code.operations[number].opcode:
            rows["l2"][number], rows["in_l1"][number] = 0, turns
        elif size <= REPLICATED and name not in NOT_REPLICATED:
            rows["l2"][number] = 1 / 3


def _fill_spills(rows: np.ndarray, compiled: Compiled, gpu: Gpu, resident: int) -> None:
    """Where spilled registers are: what L1 can't hold is asked of L2, and of memory what L2 can't."""
    spilled = compiled.spilled / compiled.resident * resident
    kept = SPILLS_IN_L1 * max(0, L1 - compiled.shared_in_use)
    local = rows["kind"] == LOCAL
    rows["l2"][local] = missed = max(0.0, 1 - kept / max(spilled, 1))
    rows["dram"][local] = missed * max(0.0, 1 - gpu.l2_size / max(spilled * gpu.multiprocessors, 1))


def _find_busy(out: core.Outcome, rates: core.Rates) -> dict[str, float]:
    """Shares of the time that each part of the machine works."""
    cycles, slots = out.cycles, 4 * out.cycles
    return {
        "issue": out.issued / slots,
        "memory": out.dram_bytes / rates.dram_rate / cycles,
        "L2": out.l2_bytes / rates.l2_rate / cycles,
        "LSU": max(out.lsu / cycles, out.pipe[LSU] / slots),
        "XU": out.pipe[XU] / slots,
        "tensor": out.pipe[TENSOR] / slots,
        "ALU": out.pipe[ALU] / slots,
        "FMA": (out.pipe[FMA] + out.pipe[HEAVY]) / slots,
    }


def _name_bound(time: Time, us: float, longest: int) -> str:
    """What a launch's time is due to."""
    if us < 4:
        return "small"
    name, most = max(time.busy.items(), key=lambda item: item[1])
    if most >= 0.8:
        return name
    worst = max(WAITS, key=lambda reason: time.waits[reason])
    kind = WAITS[worst] if time.waits[worst] >= 0.25 else "dependent issue"
    return f"{'few programs, ' if longest < time.resident else ''}{kind} ({name} {most:.0%})"
