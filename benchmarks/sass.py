"""Machine code of a compiled kernel: its instructions, its loops, and how many instructions a program issues.

Loops are found in the control flow graph (an edge back to a block that dominates it) and laid beside the loops that the
source has, in order and by nesting; the source's trip counts weigh them. A block counts once per round of the loops
around it, a predicated instruction counts as issued, and a block that not every round reaches counts by the share of
rounds that its loop states. What the compiler peels, duplicates or unrolls is therefore counted, never overlooked: of a
loop that it unrolled four times, with another one behind it for the remainder, each gets its part of the trips.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.M)
GUARD = re.compile(r"\bU?P[0-9T]")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
MOST_UNROLLED = 16
GLOBAL = ("LDG", "STG", "LDGSTS")
ALIKE = 2.5  # between the lengths of two parts of a loop, per round


@dataclass(frozen=True)
class Instruction:
    """One line of disassembly; `target` is the address that a branch goes to."""

    address: int
    opcode: str
    target: int | None
    conditional: bool

    @property
    def kind(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def falls_through(self) -> bool:
        return self.conditional or self.kind not in ("EXIT", "RET", "BRA")

    @property
    def bits(self) -> int:
        """Width of a memory access."""
        parts = self.opcode.split(".")
        narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
        wide = [int(p) for p in parts if p in ("64", "128", "256")]
        return max(wide, default=min((narrow[p] for p in parts if p in narrow), default=32))


@dataclass(frozen=True)
class Loop:
    """A loop in a kernel's source.

    `guarded`: the share of rounds that run a block which a branch inside the loop can skip. `fixed`: the compiler knows
    the trips, so it may have unrolled the loop away.
    """

    trips: float
    inner: tuple[Loop, ...] = ()
    guarded: float = 1.0
    fixed: bool = False


@dataclass(frozen=True)
class Path:
    """The loops that a `share` of the programs goes through, in order."""

    share: float
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Cycle:
    """A loop in the machine code, by the numbers of its blocks."""

    head: int
    blocks: frozenset[int]
    latches: frozenset[int]


Assigned = list[tuple[Cycle, Loop, float]]  # with the trips that the cycle has of its source loop


class Code:
    """The reachable machine code of one kernel."""

    def __init__(self, sass: str) -> None:
        self.instructions = [
            Instruction(int(at, 16), opcode, find_target(opcode, rest), bool(predicate or GUARD.search(rest)))
            for at, predicate, opcode, rest in LINE.findall(sass)
            if opcode != "NOP"
        ]

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        starts = {i.target for i in self.instructions if i.target is not None}
        blocks: list[list[Instruction]] = []
        ended = True
        for one in self.instructions:
            if ended or one.address in starts:
                blocks.append([])
            blocks[-1].append(one)
            ended = one.target is not None or not one.falls_through or one.kind == "EXIT"
        return blocks

    @cached_property
    def after(self) -> list[set[int]]:
        """The blocks that each block can go to."""
        number = {block[0].address: i for i, block in enumerate(self.blocks)}
        after: list[set[int]] = []
        for i, block in enumerate(self.blocks):
            follow = {i + 1} if block[-1].falls_through and i + 1 < len(self.blocks) else set()
            target = block[-1].target
            after.append(follow | ({number[target]} if target in number else set()))
        return after

    @cached_property
    def before(self) -> list[set[int]]:
        reached = self.reach({0}, self.after)
        before: list[set[int]] = [set() for _ in self.after]
        for i in reached:
            for j in self.after[i]:
                before[j].add(i)
        return before

    @staticmethod
    def reach(first: set[int], edges: list[set[int]], closed: frozenset[int] = frozenset()) -> set[int]:
        """The blocks on the way from `first` along `edges`, not through `closed`."""
        seen, todo = set(first), list(first)
        while todo:
            for j in edges[todo.pop()] - seen - closed:
                seen.add(j)
                todo.append(j)
        return seen

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        order = sorted(self.reach({0}, self.after))
        dominators = {i: set(order) for i in order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for i in order[1:]:
                now = set.intersection(*(dominators[j] for j in self.before[i])) | {i}
                changed |= now != dominators[i]
                dominators[i] = now
        return dominators

    @cached_property
    def cycles(self) -> list[Cycle]:
        """Loops in the order of the code, outer before inner."""
        latches: dict[int, set[int]] = {}
        for i, above in self.dominators.items():
            for head in self.after[i] & above:
                latches.setdefault(head, set()).add(i)
        found = []
        for head, ends in latches.items():
            body = self.reach(ends - {head}, self.before, frozenset({head})) | {head}
            found.append(Cycle(head, frozenset(body), frozenset(ends)))
        return sorted(found, key=lambda c: (c.head, -len(c.blocks)))

    @property
    def innermost(self) -> list[Cycle]:
        return [c for c in self.cycles if not self.nested(c)]

    def body(self, cycle: Cycle) -> list[Instruction]:
        return [one for i in cycle.blocks for one in self.blocks[i]]

    def nested(self, cycle: Cycle | None) -> list[Cycle]:
        """The loops right inside one, or those that are in none."""
        within = [c for c in self.cycles if c != cycle and (cycle is None or c.blocks < cycle.blocks)]
        return [c for c in within if not any(c.blocks < other.blocks for other in within)]

    def align(self, cycles: list[Cycle], loops: tuple[Loop, ...]) -> Assigned | None:
        """Each machine loop with its source loop, or None where the two don't fit."""
        if not loops:
            return None if cycles else []
        first, rest = loops[0], loops[1:]

        def matched() -> Assigned | None:
            if not cycles:
                return None
            inner = self.align(self.nested(cycles[0]), first.inner)
            others = self.align(cycles[1:], rest)
            if inner is None or others is None:
                return None
            trips = first.trips / self.count_rounds(cycles[:1]).get(cycles[0], 1)
            return [(cycles[0], first, trips), *inner, *others]

        def unrolled() -> Assigned | None:
            gone = first.trips <= 1 or (first.fixed and first.trips <= MOST_UNROLLED)
            return self.align(cycles, first.inner + rest) if gone else None

        def shared() -> Assigned | None:
            for most in range(2, len(cycles) + 1):
                parts, rounds = cycles[:most], self.count_rounds(cycles[:most])
                others = self.align(cycles[most:], rest) if rounds and not first.inner else None
                if others is not None:
                    left, found = first.trips, []
                    for c in parts:
                        found.append((c, first, left // rounds[c]))
                        left %= rounds[c]
                    return [*found, *others]
            return None

        ways = (unrolled, matched, shared) if first.trips <= 1 else (matched, shared, unrolled)
        return next((found for way in ways if (found := way()) is not None), None)

    def count_rounds(self, cycles: list[Cycle]) -> dict[Cycle | int, int]:
        """How many rounds of one source loop the compiler put into each cycle, and into blocks beside them, by number.

        A loop of few instructions becomes one of 4 rounds, say, a straight block of 2 and a loop for the remainder.
        Their global loads and stores tell, beside their lengths; empty where nothing was unrolled, or nothing fits.
        """
        parts: dict[Cycle | int, list[Instruction]] = {c: self.body(c) for c in cycles}
        if any(self.nested(c) for c in cycles):
            return {}
        parts |= {b: self.blocks[b] for b in self._beside(cycles)}
        moved = {key: Counter(i.opcode for i in body if i.kind in GLOBAL) for key, body in parts.items()}
        unit = min(parts, key=lambda key: (moved[key].total(), key not in cycles))
        rounds: dict[Cycle | int, int] = {}
        for key, body in parts.items():
            times = moved[key].total() // max(moved[unit].total(), 1)
            alike = moved[key] == Counter({opcode: n * times for opcode, n in moved[unit].items()})
            if times and alike and 1 / ALIKE < len(body) / times / len(parts[unit]) < ALIKE:
                rounds[key] = times
            elif key in cycles:
                return {}
        return rounds if max(rounds.values(), default=1) > 1 else {}

    def _beside(self, cycles: list[Cycle]) -> Iterator[int]:
        """Blocks that may hold rounds of these cycles' loop: they access memory, can be skipped, and are next to it."""
        inside = set().union(*(c.blocks for c in cycles))
        first, last = min(inside), max(inside)
        around = [c for c in self.cycles if c.blocks > inside]
        others = set().union(*(c.blocks for c in self.cycles if c not in cycles and c not in around))
        low = max((b for b in others if b < first), default=-1)
        high = min((b for b in others if b > last), default=len(self.blocks)) if len(cycles) == 1 else last
        for b in range(low + 1, high):
            if b in inside or b not in self.dominators or any(b not in c.blocks for c in around):
                continue
            later = self.reach({b}, self.after, frozenset({c.head for c in around}))
            skipped = any(b not in self.dominators[x] for x in later)
            if skipped and any(i.kind in GLOBAL for i in self.blocks[b]):
                yield b

    def issued(self, paths: tuple[Path, ...]) -> float | None:
        """Instructions that one warp issues, on average over the programs; None where loops and source don't fit."""
        assigned = self.align(self.nested(None), tuple(loop for path in paths for loop in path.loops))
        if assigned is None:
            return None
        return sum(
            share * self._rounds(i, assigned) * len(self.blocks[i]) for i, share in self._shares(paths, assigned)
        )

    def _rounds(self, block: int, assigned: Assigned) -> float:
        rounds, around = 1.0, [a for a in assigned if block in a[0].blocks]
        for cycle, loop, trips in around:
            rounds *= trips
            innermost = all(cycle.blocks <= other.blocks for other, _, _ in around)
            if innermost and not all(block in self.dominators[latch] for latch in cycle.latches):
                rounds *= loop.guarded
        return rounds

    def _shares(self, paths: tuple[Path, ...], assigned: Assigned) -> Iterator[tuple[int, float]]:
        """Each path's blocks, those that lead to its loops or come from them, with its share of the programs."""
        everything = set(self.dominators)
        if len(paths) == 1:
            yield from ((i, paths[0].share) for i in everything)
            return
        heads = [{c.head for c, loop, _ in assigned if any(loop is mine for mine in path.loops)} for path in paths]
        for path, mine in zip(paths, heads, strict=True):
            others = frozenset(set().union(*heads) - mine)
            if not mine:  # unrolled away: nothing to know its part of the code by
                mine, others = everything, frozenset()
            near = self.reach(mine, self.before, others) | self.reach(mine, self.after, others)
            yield from ((i, path.share) for i in near & everything)


def find_target(opcode: str, rest: str) -> int | None:
    found = TARGET.search(rest) if opcode.startswith("BRA") else None
    return int(found[1], 16) if found else None


def disassemble(cubin: bytes) -> tuple[dict[str, int], Code]:
    """(REG, STACK, ... as the assembler reports them; the code)."""
    used, text = dump(cubin)
    return used, Code(text)


def dump(cubin: bytes) -> tuple[dict[str, int], str]:
    """As `disassemble`, with the listing as text, which has the instructions' words too."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def tool(option: str) -> str:
            command = [BIN / "cuobjdump", option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, text = tool("--dump-resource-usage"), tool("-sass")
    return {k: int(v) for k, v in re.findall(r"\b([A-Z]+):(\d+)", usage)}, text
