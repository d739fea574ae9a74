"""The path of one warp through a kernel's machine code, and the tensor that each access on it goes to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cached_property

from benchmarks.sass import Assigned, Code, Cycle, Loop
from benchmarks.sass import Path as Route
from benchmarks.simulator.decode import REGISTER, Listing, Operation

SLACK = 10  # rounds beyond twice a loop's trips, before its path counts as endless
FIRST_ARGUMENT = 0x210  # in constant bank 0 of sm_90
CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
STACK = re.compile(r"\[R1(?:\+0x([0-9a-f]+))?\]")
ROUNDS_FOLLOWED = 3  # of a loop, until its pointers are known

Names = dict[tuple[str, int], str]  # the argument that a register, by bank and number, was computed from


class Endless(RuntimeError):
    """A path that finds no way out of a loop."""


def find_paths(code: Listing, routes: tuple[Route, ...]) -> tuple[list[list[int]], bool]:
    """For each of the source's routes the blocks that a warp runs, and whether the loops of source and code fit."""
    assigned, fits = assign_loops(code, tuple(loop for route in routes for loop in route.loops))
    everything = set(code.dominators)
    if len(routes) == 1:
        return [Walk(code, assigned, everything).run()], fits
    heads = [{c.head for c, loop, _ in assigned if any(loop is mine for mine in route.loops)} for route in routes]
    found = []
    for mine in heads:
        others = frozenset(set().union(*heads) - mine)
        seeds = mine or {0}
        near = code.reach(seeds, code.before, others) | code.reach(seeds, code.after, others)
        found.append(Walk(code, assigned, (near | {0}) & everything).run())
    return found, fits


def assign_loops(code: Code, loops: tuple[Loop, ...]) -> tuple[Assigned, bool]:
    """The source's loop for each loop of the code; where the two don't fit, in order, and False."""
    found = code.align(code.nested(None), loops)
    if found is not None:
        return found, True
    flat = [loop for loop in _flatten(loops) if loop.trips > 1] or [Loop(1)]
    guessed = [flat[min(i, len(flat) - 1)] for i in range(len(code.cycles))]
    return [(c, loop, loop.trips) for c, loop in zip(code.cycles, guessed, strict=True)], False


def _flatten(loops: tuple[Loop, ...]) -> list[Loop]:
    return [one for loop in loops for one in (loop, *_flatten(loop.inner))]


class Walk:
    """One warp's way through the blocks in `allowed`.

    A loop runs its trips; where the compiler unrolled it, its parts share them: `left` is what is still to be done of
    each source loop, and a part runs if it holds no more than that. A branch inside a loop that can skip a block does
    so in 1 - `guarded` of the rounds, evenly spread; outside of loops nothing is skipped, and of two sides the longer
    one is taken. Predicated instructions run.
    """

    def __init__(self, code: Listing, assigned: Assigned, allowed: set[int]) -> None:
        self.code, self.allowed = code, allowed
        self.trips = {c: trips for c, _, trips in assigned}
        self.guarded = {c: loop.guarded for c, loop, _ in assigned}
        self.around = {
            b: sorted((c for c in code.cycles if b in c.blocks), key=lambda c: len(c.blocks)) for b in allowed
        }
        self.parts: dict[Cycle | int, tuple[Loop, int]] = {}  # of unrolled loops: which, and how many of its rounds
        for loop in {id(loop): loop for _, loop, _ in assigned}.values():
            cycles = [c for c, other, _ in assigned if other is loop]
            self.parts |= {key: (loop, n) for key, n in code.count_rounds(cycles).items()}
        self.left = {id(loop): loop.trips for loop, _ in self.parts.values()}
        self.rounds: Counter[Cycle] = Counter()
        self.owed: dict[int, float] = defaultdict(float)
        self._ahead: dict[int, frozenset[int]] = {}

    def run(self) -> list[int]:
        sequence, block = [], 0
        while True:
            sequence.append(block)
            for c in self.around[block]:
                self.rounds[c] += c.head == block
                if self.rounds[c] > 2 * self.trips.get(c, 1) + SLACK:
                    raise Endless(f"no way out of the loop at address {self.code.blocks[c.head][0].address:#x}")
                self._count(c if c.head == block else None)
            self._count(block)
            options = sorted(self.code.after[block] & self.allowed)
            if not options or self._exits(block):
                return sequence
            step = options[0] if len(options) == 1 else self._choose(block, options)
            for c in self.around[block]:
                if step not in c.blocks:
                    self.rounds[c] = 0
            block = step

    def _count(self, key: Cycle | int | None) -> None:
        """What is left of an unrolled loop when this part of it is reached; a round of a loop around it starts anew."""
        if key in self.parts:
            loop, rounds = self.parts[key]
            self.left[id(loop)] -= rounds
        elif isinstance(key, Cycle):
            for part, (loop, _) in self.parts.items():
                if isinstance(part, Cycle) and part.blocks < key.blocks:
                    self.left[id(loop)] = loop.trips

    def _runs(self, key: Cycle | int) -> bool:
        """Whether a loop, or a part of an unrolled one, is to be entered."""
        if key not in self.parts:
            return self.trips.get(key, 1) >= 1
        loop, rounds = self.parts[key]
        return self.left[id(loop)] >= rounds

    def _exits(self, block: int) -> bool:
        """Whether the program ends at this block: by a predicated EXIT that is its loop's only way out."""
        last, cycles = self.code.blocks[block][-1], self.around[block]
        if last.kind != "EXIT":
            return False
        if cycles and not any(self.code.after[b] - cycles[0].blocks for b in cycles[0].blocks):
            return not self._stays(block, cycles[0])
        ahead = [c for c in self.trips if c in self.parts and c.head in self._reach(block) and block not in c.blocks]
        return bool(ahead) and not any(self._runs(c) for c in ahead)

    def _stays(self, block: int, cycle: Cycle) -> bool:
        """Whether the loop has another round, at a block that can leave it."""
        if cycle in self.parts:
            return self._runs(cycle)
        before = block == cycle.head and 2 * len(self.code.blocks[block]) < len(self.code.body(cycle))
        return self.rounds[cycle] + (0 if before else 1) <= self.trips.get(cycle, 1)

    def _choose(self, block: int, options: list[int]) -> int:
        for c in self.around[block]:
            inside = [o for o in options if o in c.blocks]
            if len(inside) == 1 or (len(inside) == 2 and c.head in inside):
                stay = c.head if c.head in inside else inside[0]
                return stay if self._stays(block, c) else next(o for o in options if o != stay)
        first, second = options
        own = {
            first: self._reach(first) - self._reach(second),
            second: self._reach(second) - self._reach(first),
        }
        looping = {o: [c for c in self.trips if c.head in own[o]] for o in options}
        if bool(looping[first]) != bool(looping[second]):  # one side goes around a loop, for no trips
            into, past = (first, second) if looping[first] else (second, first)
            return into if any(self._runs(c) for c in looping[into]) else past
        beside = [(o, b) for o in options for b in own[o] if b in self.parts]
        if beside:
            into, part = beside[0]
            return into if self._runs(part) else next(o for o in options if o != into)
        size = {o: sum(len(self.code.blocks[b]) for b in own[o]) for o in options}
        longer, shorter = (first, second) if size[first] >= size[second] else (second, first)
        cycles = self.around[block]
        if cycles and not all(longer in self.code.dominators[latch] for latch in cycles[0].latches):
            self.owed[block] += self.guarded.get(cycles[0], 1.0)
            if self.owed[block] < 0.999:
                return shorter
            self.owed[block] -= 1
        return longer

    @cached_property
    def _forward(self) -> list[set[int]]:
        code = self.code
        return [code.after[i] - {c.head for c in code.cycles if i in c.latches} for i in range(len(code.blocks))]

    def _reach(self, block: int) -> frozenset[int]:
        if block not in self._ahead:
            self._ahead[block] = frozenset(self.code.reach({block}, self._forward))
        return self._ahead[block]


def find_tensors(code: Listing, blocks: list[int], signature: dict[str, str]) -> dict[int, str]:
    """The argument that each access's address comes from, by the instruction's number.

    Arguments lie in constant bank 0; what is computed from one carries its name from register to register.
    """
    offsets = _find_arguments(signature)
    names: Names = {}
    found: dict[int, str] = {}
    seen: Counter[int] = Counter()
    for b in blocks:
        seen[b] += 1
        if seen[b] > ROUNDS_FOLLOWED:
            continue
        for number in range(code.firsts[b], code.firsts[b + 1]):
            one = code.operations[number]
            if one.kind in ("LDG", "STG", "LDGSTS"):
                address = re.findall(r"\[([^\]]*)\]", one.text)[-1]
                owners = (names.get((bank, int(n))) for bank, n in REGISTER.findall(address))
                if owner := next((o for o in owners if o), None):
                    found.setdefault(number, owner)
                if one.kind != "LDG":
                    continue
            slot = _find_slot(one)
            if one.kind == "STL":
                _rename(names, *slot, {names[r] for r in one.reads[-1:] if r in names}, one.predicated)
            if one.writes is None:
                continue
            bank, low, wide = one.writes
            if one.kind == "LDL":  # a spilled register comes back with its name
                for i in range(wide):
                    kept = names.get((slot[0], slot[1] + i))
                    _rename(names, bank, low + i, 1, {kept} if kept else set(), one.predicated)
                continue
            loaded = one.kind in ("LDG", "LDS", "LDSM")
            sources = set() if loaded else {names[r] for r in one.reads if r in names}
            sources |= {offsets[o] for o in (int(c, 16) & ~7 for c in CONSTANT.findall(one.text)) if o in offsets}
            _rename(names, bank, low, wide, sources, one.predicated)
    return found


def _rename(names: Names, bank: str, low: int, wide: int, sources: set[str], predicated: bool) -> None:
    """What `wide` registers from `low` on come from now."""
    for register in range(low, low + wide):
        if sources:
            names[bank, register] = min(sources)
        elif not predicated:
            names.pop((bank, register), None)


def _find_slot(one: Operation) -> tuple[str, int, int]:
    """The words of the stack that a spill goes to, as a bank of registers: their first and their number."""
    found = STACK.search(one.text)
    return "stack", int(found[1] or "0", 16) // 4 if found else -1, max(1, one.bits // 32)


def _find_arguments(signature: dict[str, str]) -> dict[int, str]:
    """Pointers by their place in the constant bank."""
    offsets, at = {}, FIRST_ARGUMENT
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        size = 8 if kind.startswith("*") or kind.endswith("64") else 4
        at = -(-at // size) * size
        if kind.startswith("*"):
            offsets[at] = name
        at += size
    return offsets
