"""What the assembler decided for each instruction of sm_90: stall cycles, barriers, the pipe that runs it.

An instruction has 128 bits. Bits 105 to 125 are its control field (as the open assemblers maxas and CuAssembler have
it): stall count 4 bits, yield 1, write barrier 3, read barrier 3, barriers to wait for 6, register reuse 4. A load sets
its write barrier until its registers are there, and the first instruction that reads them waits for that barrier.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from benchmarks.sass import GUARD, Code, Instruction, find_target

NO_BARRIER = 7
# What core.c tells apart, in its order.
PLAIN, LDG, STG, LDGSTS, COMMIT, DEPBAR, BAR, SHARED, HGMMA, WGWAIT, LOCAL = range(11)
FMA, HEAVY, ALU, XU, LSU, UNIFORM, TENSOR, BRANCH = range(8)
GLOBAL = (LDG, STG, LDGSTS)
ROW = np.dtype(
    [(name, "u1") for name in ("stall", "write_barrier", "read_barrier", "wait", "kind", "pipe", "depth", "in_l1")]
    + [(name, "i4") for name in ("occupy", "latency", "bytes")]
    + [(name, "f4") for name in ("l2", "dram")]
)
L1_LATENCY = 41
# Cycles to the result, by opcode.
XU_LATENCY = {"MUFU": 23} | dict.fromkeys(("I2F", "F2I", "F2F", "I2I", "FRND", "POPC", "FLO", "BREV"), 18)
SHARED_LATENCY = {"LDS": 29, "LDSM": 33, "STS": 20, "STSM": 20, "SHFL": 24, "ATOMS": 60, "REDUX": 20, "VOTE": 15}
UNIFORM_LATENCY = {"LDC": 35, "S2R": 30, "CS2R": 15, "S2UR": 30, "R2UR": 12}
ON_FMA = ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FFMA32I", "FADD32I", "FMUL32I")
ON_BRANCH = (
    "BRA", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "NOP", "BREAK", "CALL", "RET", "WARPGROUP", "ERRBAR", "CCTL", "MEMBAR",
)  # fmt: skip

LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);\s*/\* 0x[0-9a-f]{16} \*/\s*\n"
    r"\s*/\* 0x([0-9a-f]{16}) \*/",
    re.M,
)
REGISTER = re.compile(r"\b(U?R)(\d+)\b")


@dataclass(frozen=True)
class Operation:
    """One instruction: its opcode, operands and control field."""

    opcode: str
    text: str
    predicated: bool
    stall: int
    write_barrier: int
    read_barrier: int
    wait: int

    @cached_property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bits(self) -> int:
        """Of one lane's access."""
        return Instruction(0, self.opcode, None, False).bits

    @cached_property
    def operands(self) -> list[str]:
        return [o.strip() for o in re.split(r",(?![^\[]*\])", self.text)] if self.text.strip() else []

    @cached_property
    def reads(self) -> list[tuple[str, int]]:
        """Registers: bank, number."""
        stores = self.kind.startswith(("ST", "RED", "LDGSTS"))
        return [(bank, int(n)) for o in self.operands[0 if stores else 1 :] for bank, n in REGISTER.findall(o)]

    @cached_property
    def writes(self) -> tuple[str, int, int] | None:
        """The bank, the first and the number of the registers that get its result."""
        if not self.operands or self.kind.startswith(("ST", "RED", "BRA", "LDGSTS", "BAR")):
            return None
        found = REGISTER.match(self.operands[0])
        wide = 4 if ".128" in self.opcode else 2 if ".64" in self.opcode or "WIDE" in self.opcode else 1
        return (found[1], int(found[2]), wide) if found else None


class Listing(Code):
    """sass.Code with the control fields of its instructions, in `operations`."""

    def __init__(self, text: str) -> None:
        self.instructions: list[Instruction] = []
        self.operations: list[Operation] = []
        for at, predicate, opcode, rest, high in LINE.findall(text):
            if opcode == "NOP":
                continue
            control = int(high, 16) >> 41 & 0x1FFFFF
            fields = (control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63)
            self.operations.append(Operation(opcode, rest, bool(predicate), *fields))
            conditional = bool(predicate or GUARD.search(rest))
            self.instructions.append(Instruction(int(at, 16), opcode, find_target(opcode, rest), conditional))

    @cached_property
    def firsts(self) -> list[int]:
        """The number of each block's first instruction, and that of all instructions."""
        return [0, *accumulate(len(block) for block in self.blocks)]

    def rows(self) -> np.ndarray:
        """The instructions as core.c takes them; `l2` and `dram` are filled in by what a launch loads."""
        return np.array([encode(one) for one in self.operations], dtype=ROW)


def encode(one: Operation) -> tuple[float, ...]:
    """A row of `ROW`."""
    kind, pipe, depth, occupy, latency, size = PLAIN, ALU, 0, 2, 0, 0
    name, opcode = one.kind, one.opcode
    if name in ON_FMA:
        pipe, occupy = FMA, 1
    elif name.startswith("IMAD") or name == "IDP":
        pipe, latency = HEAVY, 6
    elif name in XU_LATENCY:
        pipe, occupy, latency = XU, 8, XU_LATENCY[name]
    elif name in ("LDG", "STG", "LDGSTS"):
        kind, pipe = {"LDG": LDG, "STG": STG, "LDGSTS": LDGSTS}[name], LSU
        occupy, latency, size = 4, L1_LATENCY, one.bits * 4
    elif name in ("LDL", "STL"):
        kind, pipe, occupy, size, latency = LOCAL, LSU, 4, one.bits * 4, L1_LATENCY if name == "LDL" else 20
    elif name == "LDGDEPBAR":
        kind, pipe = COMMIT, BRANCH
    elif name == "DEPBAR":
        kind, pipe, depth = DEPBAR, BRANCH, int(one.operands[-1], 16) if len(one.operands) > 1 else 0
    elif name == "BAR":
        kind, pipe = BAR, BRANCH
    elif name in SHARED_LATENCY:
        kind, pipe, occupy, latency = SHARED, LSU, 4, SHARED_LATENCY[name]
        matrices = opcode.split(".")[-1]  # .4 or .2 of 8 x 8; LDSM.16.M88 is of one
        many = int(matrices) if matrices.isdigit() else 1
        size = 128 * many if name in ("LDSM", "STSM") else 0 if name == "VOTE" else one.bits * 4
    elif name in UNIFORM_LATENCY:
        pipe, occupy, latency = UNIFORM, 4, UNIFORM_LATENCY[name]
    elif name == "HGMMA":
        columns = re.search(r"64x(\d+)x", opcode)
        occupy = max(int(columns[1]) // 2 if columns else 0, 16 if REGISTER.match(one.operands[1]) else 32)
        kind, pipe, latency, depth = HGMMA, TENSOR, occupy + 18, int("gsb0" in one.text)
    elif name == "WARPGROUP":
        pipe = BRANCH
        if "DEPBAR" in opcode:
            kind, depth = WGWAIT, int(one.operands[-1], 16)
    elif name == "HMMA":
        pipe, occupy, latency = TENSOR, 6 if "16816" in opcode else 4, 33
    elif name in ON_BRANCH:
        pipe, occupy = BRANCH, 1
    elif name.startswith("U") and name not in ("UTMALDG", "UTMASTG"):
        pipe, latency = UNIFORM, 10
    return (one.stall, one.write_barrier, one.read_barrier, one.wait, kind, pipe, depth, 0, occupy, latency, size, 0, 0)


def count_awaited(code: Listing) -> tuple[int, int]:
    """Of the results behind a write barrier that their block reads: those that are waited for by then, and all of them.

    The two are equal if the control fields are read right.
    """
    good = every = 0
    for first, end in pairwise(code.firsts):
        for i in range(first, end):
            made = code.operations[i]
            if made.write_barrier == NO_BARRIER or made.writes is None:
                continue
            bank, low, wide = made.writes
            waited = False
            for later in code.operations[i + 1 : end]:
                waited |= bool(later.wait >> made.write_barrier & 1)
                if any(b == bank and low <= n < low + wide for b, n in later.reads):
                    good, every = good + waited, every + 1
                    break
                if later.writes and later.writes[:2] == (bank, low):
                    break
    return good, every
