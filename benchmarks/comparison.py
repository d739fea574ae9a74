"""One comparison as one row: ours and the peers on the same weights and inputs; parity first, then timing."""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastmbconv
from benchmarks import timing
from benchmarks.launches import counted
from benchmarks.poison import poisoned
from benchmarks.subjects import TRAINING_FORWARD, Subject, settle
from fastmbconv import parity
from fastmbconv.graphs import Recording, uncached_autocast

OURS = "fastmbconv"
GRAPHED = "fastmbconv-graph"  # the same as a CUDA graph
EAGER_GRAPHED = "eager-graph"  # eager's faster memory format as one
GRAPHS = (GRAPHED, EAGER_GRAPHED)
EAGER = {"eager-nchw": torch.contiguous_format, "eager-nhwc": torch.channels_last}
COMPILE = {"compile": None, "max-autotune": "max-autotune"}
PEERS = (*EAGER, *COMPILE)
TRAINING = ("fwd_bwd", TRAINING_FORWARD)
LATENCY = {"reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}  # with CUDA graphs: for whole models
COMPILE_SECONDS = {
    "compile": 20.0,
    "reduce-overhead": 20.0,
    "max-autotune": 45.0,
}  # what a block is expected to take; a model takes a multiple
CLOSING_SECONDS = 1.0  # of a comparison: its last samples and its row
LEAST_SECONDS = 8.0  # that another candidate of a whole model is worth beginning with
WARMUP = 4  # CUDA graphs are recorded by the third call


@dataclass
class Plan:
    """How a comparison runs: where, in which dtype, against whom, and until when (`time.monotonic`)."""

    device: str
    dtype: torch.dtype
    peers: tuple[str, ...] = PEERS
    rounds: int = 30
    deadline: float = float("inf")
    bandwidth: float | None = None
    compile_scale: float = 1.0
    interpreted: bool = False
    graphed: bool = False
    alive: Callable[[], object] = lambda: None  # called on the way, by whoever waits for a sign of life
    tf32: bool = False  # float32 whose products may take TF32; else no float32 product does, ours or eager's

    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def label(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    def limit(self, eager_error: float) -> float:
        """The largest error that parity allows; TF32's products have float16's digits, and eager may take none."""
        return parity.limit(eager_error, torch.float16 if self.tf32 else self.dtype)


@dataclass
class Candidate:
    """One way to run a subject: `outputs` gives every result by name, `step` is what is timed."""

    module: nn.Module
    x: Tensor
    run: Callable[[Tensor], Tensor]
    mode: str
    plan: Plan
    grad: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def forward(self) -> Tensor:
        enabled = self.plan.dtype != torch.float32 and self.x.dtype == self.plan.dtype
        with torch.autocast(self.x.device.type, self.plan.dtype, enabled=enabled):
            return self.run(self.x)

    def outputs(self) -> dict[str, Tensor]:
        if self.mode != "fwd_bwd":
            with torch.no_grad():
                return {"y": self.forward()}
        y = self.forward()
        if self.grad is None:
            self.grad = _random(y.shape, self.plan, seed=2).to(y.dtype)
            self.grad = self.grad.contiguous(memory_format=_format(self.x)) if y.dim() == 4 else self.grad
        named = {"dx": self.x, **self.parameters} if self.x.requires_grad else self.parameters
        grads = dict(zip(named, torch.autograd.grad(y, list(named.values()), self.grad), strict=True))
        if y.dim() == 2:  # a whole model: single small gradients are mostly rounding noise
            grads = {"gradient": torch.cat([g.flatten().float() for g in grads.values()])}
        return {"y": y.detach(), **grads}

    def buffers(self) -> dict[str, Tensor]:
        return {name: b for name, b in self.module.named_buffers() if b.is_floating_point() and self.mode in TRAINING}

    def step(self) -> None:
        if "torch._inductor" in sys.modules:  # seconds to import, and only torch.compile's graphs need the mark
            torch.compiler.cudagraph_mark_step_begin()
        if self.optimizer is None:
            self.outputs()
            return
        y = self.forward()
        nn.functional.cross_entropy(y.float(), torch.zeros(len(y), dtype=torch.long, device=y.device)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _random(size: Sequence[int], plan: Plan, seed: int) -> Tensor:
    """Normal values that the plan's dtype holds exactly, so that the reference starts from the same ones."""
    generator = torch.Generator(plan.device).manual_seed(seed)
    return torch.randn(*size, generator=generator, device=plan.device).to(plan.dtype)


def _format(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


class Comparison:
    """Builds candidates of one subject in one mode, gates and times them; `row()` is the record."""

    def __init__(self, subject: Subject, mode: str, plan: Plan) -> None:
        self.subject, self.mode, self.plan = subject, mode, plan
        self.is_model = subject.elements == 0
        torch.manual_seed(0)
        self.base = settle(subject.make()).to(plan.device).train(mode in TRAINING)
        self.x = _random(subject.size, plan, seed=3)
        self.candidates: dict[str, Candidate] = {}
        self.problems: dict[str, str] = {}
        self.kernels: dict[str, int] = {}

    def candidate(
        self,
        layout: torch.memory_format,
        way: Callable[[nn.Module], Callable[[Tensor], Tensor]],
        exact: torch.dtype | None = None,
    ) -> Candidate:
        """One way to run it; `exact` is the dtype of all its tensors, else the plan's rule autocast."""
        module = copy.deepcopy(self.base).to(exact, memory_format=layout)
        x = self.x.to(exact or self.x.dtype).contiguous(memory_format=layout)
        x = x.clone(memory_format=torch.preserve_format)
        x.requires_grad_(self.mode == "fwd_bwd" and not self.is_model)
        made = Candidate(module, x, way(module), self.mode, self.plan)
        made.parameters = dict(module.named_parameters()) if self.mode == "fwd_bwd" else {}
        return made

    def truth(self) -> dict[str, Tensor]:
        """fp32 without TF32 for half types, fp64 for fp32: far more exact than what it judges, and it fits the GPU."""
        exact = torch.float64 if self.plan.dtype == torch.float32 else torch.float32
        with _exact_convolutions():
            made = self.candidate(torch.contiguous_format, lambda m: m.forward_eager, exact)
            return {**made.outputs(), **made.buffers()}

    def errors(self, made: Candidate, truth: dict[str, Tensor]) -> dict[str, float]:
        outputs = made.outputs()
        return {name: parity.relative_error(t, truth[name]) for name, t in {**outputs, **made.buffers()}.items()}

    def admit(
        self, name: str, build: Callable[[], Candidate], truth: dict[str, Tensor], yardstick: dict[str, float]
    ) -> dict[str, float]:
        """Build, check parity, warm up; whoever fails is reported and not timed. The errors."""
        self.plan.alive()
        try:
            made = build()
            errors = self.errors(made, truth)
            self.require_parity(errors, yardstick)
            self.train(made)
            for _ in range(1 if self.plan.interpreted else WARMUP):
                made.step()
            timing.synchronize()
            self.candidates[name] = made
            return errors
        except Exception as error:  # a peer that fails must not lose the others
            self.problems[name] = f"{type(error).__name__}: {error}"[:400]
            return {}

    def require_parity(self, errors: dict[str, float], yardstick: dict[str, float]) -> None:
        for what, limit in ((w, self.plan.limit(e)) for w, e in yardstick.items()):
            if not errors[what] <= limit:
                raise AssertionError(f"parity: {what} is off by {errors[what]:.2e}, limit {limit:.2e}")

    def train(self, made: Candidate) -> None:
        """A whole model's training step has an optimiser."""
        if self.is_model and self.mode == "fwd_bwd":
            made.optimizer = torch.optim.SGD(made.module.parameters(), 1e-4, momentum=0.9)

    def ours(self) -> Candidate:
        made = self.candidate(torch.channels_last, lambda m: m)
        with counted() as self.kernels:
            made.outputs()
        if not self.kernels:
            raise AssertionError("no kernel was launched: this would time eager under our name")
        return self.candidate(torch.channels_last, lambda m: m)

    def replayed(self) -> Candidate:
        """Ours through `fastmbconv.graph`."""
        made = self.candidate(torch.channels_last, lambda m: m)
        with torch.autocast(self.plan.device, self.plan.dtype, enabled=self.plan.dtype != torch.float32):
            made.run = fastmbconv.graph(made.module, made.x)
        return made

    def capture(self, name: str, build: Callable[[], Candidate]) -> None:
        """A candidate's step, which is admitted already in another form, as one CUDA graph."""
        self.plan.alive()
        try:
            made = build()
            self.train(made)
            with uncached_autocast():
                recording = Recording(made.step, made.x.device)
            made.step = recording.replay  # type: ignore[method-assign]
            timing.synchronize()
            self.candidates[name] = made
        except Exception as error:
            self.problems[name] = f"{type(error).__name__}: {error}"[:400]

    def capture_both(self, truth: dict[str, Tensor], yardstick: dict[str, float]) -> None:
        """Ours and eager as CUDA graphs."""
        if self.mode == "fwd_no_grad":
            self.admit(GRAPHED, self.replayed, truth, yardstick)
        else:
            self.capture(GRAPHED, lambda: self.candidate(torch.channels_last, lambda m: m))
        layout = self.faster_layout()
        self.capture(EAGER_GRAPHED, lambda: self.candidate(layout, _eager))

    def faster_layout(self) -> torch.memory_format:
        """The memory format that eager is faster in."""
        times = timing.interleaved({n: self.candidates[n].step for n in EAGER if n in self.candidates}, 3)
        return EAGER[min(times, key=lambda n: timing.quantiles(times[n])["p50"])] if times else torch.channels_last

    def compiled(self, name: str) -> Callable[[], Candidate]:
        """In eager's faster memory format; CUDA graphs only for models, since a block's timing leaves launches out."""
        mode = {**COMPILE, **LATENCY}[name]
        if mode and not self.is_model:
            mode = f"{mode}-no-cudagraphs"
        layout = self.faster_layout()
        torch._dynamo.reset()
        return lambda: self.candidate(layout, lambda m: torch.compile(m.forward_eager, mode=mode, dynamic=False))

    def late(self, name: str) -> bool:
        """Whether a further candidate would cost the ones that are there: their row is worth more."""
        if name == "eager-nhwc" or self.plan.left() > (LEAST_SECONDS if self.is_model else 0.0) + CLOSING_SECONDS:
            return False
        self.problems[name] = "skipped: its time is up"
        return True

    def named(self) -> dict[str, Any]:
        """What says which comparison this is."""
        record: dict[str, Any] = {
            "what": self.subject.name,
            "model": self.subject.model,
            "count": self.subject.count,
            "mode": self.mode,
            "dtype": self.plan.label,
        }
        return record | ({"note": "interpreted, not a measurement"} if self.plan.interpreted else {})

    def checked(self) -> dict[str, Any]:
        """Errors of ours and of eager against fp32 on NaN-filled memory, and whether a second run gives the same bits.

        No timing. With `error` where parity is broken or the bits differ.
        """
        with fastmbconv.backend("triton"), _products(tf32=self.plan.tf32):
            truth = self.truth()
            yardstick = self.errors(self.candidate(torch.channels_last, _eager), truth)
            with poisoned():
                made, again = (self.candidate(torch.channels_last, lambda m: m) for _ in range(2))
                first, second = ({**one.outputs(), **one.buffers()} for one in (made, again))
            errors = {name: parity.relative_error(t, truth[name]) for name, t in first.items()}
            differ = [name for name, t in first.items() if not torch.equal(t, second[name])]
        record = self.named() | {"errors": {OURS: errors, "eager-nhwc": yardstick}, "bitwise": not differ}
        try:
            self.require_parity(errors, yardstick)
        except AssertionError as error:
            return record | {"error": str(error)}
        return record | ({"error": f"another run gives other bits: {', '.join(differ)}"} if differ else {})

    def row(self) -> dict[str, Any]:
        """Names the subject; then either `error` and no figure at all, or a figure per candidate that passed."""
        record = self.named()
        with fastmbconv.backend("triton"), _products(tf32=self.plan.tf32):
            truth = self.truth()
            yardstick = self.admit("eager-nhwc", lambda: self.candidate(torch.channels_last, _eager), truth, {})
            record["errors"] = {OURS: self.admit(OURS, self.ours, truth, yardstick), "eager-nhwc": yardstick}
            if OURS not in self.candidates or not yardstick:
                return record | {"error": self.problems.get(OURS, "no eager yardstick"), "problems": self.problems}
            record["kernels"] = self.kernels
            for name in self.plan.peers:
                if self.late(name):
                    continue
                if name in COMPILE_SECONDS:
                    expected = COMPILE_SECONDS[name] * self.plan.compile_scale
                    if self.plan.left() < expected:
                        self.problems[name] = (
                            f"skipped: needs about {expected:.0f} s, {max(self.plan.left(), 0):.0f} left"
                        )
                        continue
                    self.admit(name, self.compiled(name), truth, yardstick)
                elif name != "eager-nhwc":
                    layout = EAGER[name]
                    self.admit(name, lambda layout=layout: self.candidate(layout, _eager), truth, yardstick)
            if self.plan.graphed and not self.late(GRAPHED):
                self.capture_both(truth, yardstick)
            del truth
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return record | self.measured()

    def measured(self) -> dict[str, Any]:
        self.plan.alive()
        steps = {name: made.step for name, made in self.candidates.items()}
        samples = timing.interleaved(
            steps,
            self.plan.rounds,
            isolate=not self.is_model,
            inner=3 if self.is_model else 1,
            deadline=self.plan.deadline - CLOSING_SECONDS,
        )
        results: dict[str, dict[str, Any]] = {}
        for name, values in samples.items():
            peak = None if name in GRAPHS else timing.peak_bytes(steps[name])  # a graph's memory is there before
            result: dict[str, Any] = {**timing.quantiles(values), "peak_bytes": peak}
            if self.is_model:
                result["images_s"] = self.subject.size[0] / result["p50"] * 1e3
            elif self.plan.bandwidth:
                item = torch.finfo(self.plan.dtype).bits // 8
                result["passes"] = result["p50"] * 1e-3 * self.plan.bandwidth / (self.subject.elements * item)
            results[name] = result
        best = min((n for n in results if n != OURS and n not in GRAPHS), key=lambda n: results[n]["p50"])
        peers = [results[n]["p50"] for n in results if n not in (OURS, GRAPHED)]
        graphed = {"speedup_graph": min(peers) / results[GRAPHED]["p50"]} if GRAPHED in results else {}
        return graphed | {
            "results": results,
            "best_peer": best,
            "speedup": results[best]["p50"] / results[OURS]["p50"],
            "problems": self.problems,
            "samples": samples,
        }


@contextmanager
def _products(*, tf32: bool) -> Iterator[None]:
    """Whether float32 products take TF32, eager's and ours alike: cuDNN's flag is the one that our kernels read."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = tf32, tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """No TF32; and no autotuning, since this runs once."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = False, False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def _eager(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return module.forward_eager


def compare(subject: Subject, mode: str, plan: Plan) -> dict[str, Any]:
    """The row of one comparison; memory and compiled code are released afterwards."""
    return _released(lambda: Comparison(subject, mode, plan).row())


def check(subject: Subject, plan: Plan) -> dict[str, Any]:
    """The row of one training step whose values alone are looked at."""
    return _released(lambda: Comparison(subject, "fwd_bwd", plan).checked())


def _released(row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return row()
    finally:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
