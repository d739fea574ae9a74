"""One comparison as one row: ours and the peers on the same weights and inputs; parity first, then timing."""

from __future__ import annotations

import copy
import gc
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
from benchmarks.subjects import Subject, settle
from fastmbconv import parity

OURS = "fastmbconv"
GRAPHED = "fastmbconv-graph"  # the same through `fastmbconv.graph`
EAGER = {"eager-nchw": torch.contiguous_format, "eager-nhwc": torch.channels_last}
COMPILE = {"compile": None, "max-autotune": "max-autotune"}
PEERS = (*EAGER, *COMPILE)
LATENCY = {"reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune"}  # with CUDA graphs: for whole models
COMPILE_SECONDS = {
    "compile": 20.0,
    "reduce-overhead": 20.0,
    "max-autotune": 45.0,
}  # what a block is expected to take; a model takes a multiple
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

    def left(self) -> float:
        return self.deadline - time.monotonic()


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
        if self.mode == "fwd_no_grad":
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
        return {name: b for name, b in self.module.named_buffers() if b.is_floating_point() and self.mode == "fwd_bwd"}

    def step(self) -> None:
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
        self.base = settle(subject.make()).to(plan.device).train(mode == "fwd_bwd")
        self.x = _random(subject.size, plan, seed=3)
        self.candidates: dict[str, Candidate] = {}
        self.problems: dict[str, str] = {}
        self.kernels: dict[str, int] = {}

    def candidate(
        self, layout: torch.memory_format, way: Callable[[nn.Module], Callable[[Tensor], Tensor]]
    ) -> Candidate:
        module = copy.deepcopy(self.base).to(memory_format=layout)
        x = self.x.contiguous(memory_format=layout).clone(memory_format=torch.preserve_format)
        x.requires_grad_(self.mode == "fwd_bwd" and not self.is_model)
        made = Candidate(module, x, way(module), self.mode, self.plan)
        made.parameters = dict(module.named_parameters()) if self.mode == "fwd_bwd" else {}
        return made

    def truth(self) -> dict[str, Tensor]:
        """fp32 without TF32 for half types, fp64 for fp32: far more exact than what it judges, and it fits the GPU."""
        exact = torch.float64 if self.plan.dtype == torch.float32 else torch.float32
        with _exact_convolutions():
            made = self.candidate(torch.contiguous_format, lambda m: m.forward_eager)
            made.module.to(exact)
            made.x = made.x.detach().to(exact).requires_grad_(made.x.requires_grad)
            return {**made.outputs(), **made.buffers()}

    def errors(self, made: Candidate, truth: dict[str, Tensor]) -> dict[str, float]:
        outputs = made.outputs()
        return {name: parity.relative_error(t, truth[name]) for name, t in {**outputs, **made.buffers()}.items()}

    def admit(
        self, name: str, build: Callable[[], Candidate], truth: dict[str, Tensor], yardstick: dict[str, float]
    ) -> dict[str, float]:
        """Build, check parity, warm up; whoever fails is reported and not timed. The errors."""
        try:
            made = build()
            errors = self.errors(made, truth)
            for what, limit in ((w, parity.limit(e, self.plan.dtype)) for w, e in yardstick.items()):
                if not errors[what] <= limit:
                    raise AssertionError(f"parity: {what} is off by {errors[what]:.2e}, limit {limit:.2e}")
            if self.is_model and self.mode == "fwd_bwd":
                made.optimizer = torch.optim.SGD(made.module.parameters(), 1e-4, momentum=0.9)
            for _ in range(1 if self.plan.interpreted else WARMUP):
                made.step()
            timing.synchronize()
            self.candidates[name] = made
            return errors
        except Exception as error:  # a peer that fails must not lose the others
            self.problems[name] = f"{type(error).__name__}: {error}"[:400]
            return {}

    def ours(self) -> Candidate:
        made = self.candidate(torch.channels_last, lambda m: m)
        with counted() as self.kernels:
            made.outputs()
        if not self.kernels:
            raise AssertionError("no kernel was launched: this would time eager under our name")
        return self.candidate(torch.channels_last, lambda m: m)

    def replayed(self) -> Candidate:
        made = self.candidate(torch.channels_last, lambda m: m)
        with torch.autocast(self.plan.device, self.plan.dtype, enabled=self.plan.dtype != torch.float32):
            made.run = fastmbconv.graph(made.module, made.x)
        return made

    def compiled(self, name: str) -> Callable[[], Candidate]:
        """In eager's faster memory format; CUDA graphs only for models, since a block's timing leaves launches out."""
        mode = {**COMPILE, **LATENCY}[name]
        if mode and not self.is_model:
            mode = f"{mode}-no-cudagraphs"
        times = timing.interleaved({n: self.candidates[n].step for n in EAGER if n in self.candidates}, 3)
        layout = EAGER[min(times, key=lambda n: timing.quantiles(times[n])["p50"])] if times else torch.channels_last
        torch._dynamo.reset()
        return lambda: self.candidate(layout, lambda m: torch.compile(m.forward_eager, mode=mode, dynamic=False))

    def row(self) -> dict[str, Any]:
        """Names the subject; then either `error` and no figure at all, or a figure per candidate that passed."""
        record: dict[str, Any] = {
            "what": self.subject.name,
            "model": self.subject.model,
            "count": self.subject.count,
            "mode": self.mode,
            "dtype": str(self.plan.dtype).removeprefix("torch."),
        }
        if self.plan.interpreted:
            record["note"] = "interpreted, not a measurement"
        with fastmbconv.backend("triton"):
            truth = self.truth()
            yardstick = self.admit("eager-nhwc", lambda: self.candidate(torch.channels_last, _eager), truth, {})
            record["errors"] = {OURS: self.admit(OURS, self.ours, truth, yardstick), "eager-nhwc": yardstick}
            if OURS not in self.candidates or not yardstick:
                return record | {"error": self.problems.get(OURS, "no eager yardstick"), "problems": self.problems}
            record["kernels"] = self.kernels
            if self.plan.graphed:
                self.admit(GRAPHED, self.replayed, truth, yardstick)
            for name in self.plan.peers:
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
            del truth
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return record | self.measured()

    def measured(self) -> dict[str, Any]:
        steps = {name: made.step for name, made in self.candidates.items()}
        samples = timing.interleaved(
            steps, self.plan.rounds, isolate=not self.is_model, inner=3 if self.is_model else 1
        )
        results: dict[str, dict[str, Any]] = {}
        for name, values in samples.items():
            result: dict[str, Any] = {**timing.quantiles(values), "peak_bytes": timing.peak_bytes(steps[name])}
            if self.is_model:
                result["images_s"] = self.subject.size[0] / result["p50"] * 1e3
            elif self.plan.bandwidth:
                item = torch.finfo(self.plan.dtype).bits // 8
                result["passes"] = result["p50"] * 1e-3 * self.plan.bandwidth / (self.subject.elements * item)
            results[name] = result
        best = min((n for n in results if n not in (OURS, GRAPHED)), key=lambda n: results[n]["p50"])
        graphed = {"speedup_graph": results[best]["p50"] / results[GRAPHED]["p50"]} if GRAPHED in results else {}
        return graphed | {
            "results": results,
            "best_peer": best,
            "speedup": results[best]["p50"] / results[OURS]["p50"],
            "problems": self.problems,
            "samples": samples,
        }


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
    try:
        return Comparison(subject, mode, plan).row()
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
