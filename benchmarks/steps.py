"""The steps of `python -m benchmarks.gpu`: each adds rows to the session and leaves when its time is up."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import subjects, timing, training
from benchmarks.comparison import COMPILE, EAGER, LATENCY, Plan, compare
from benchmarks.gpu import GRACE
from benchmarks.registry import BATCHES, Shape, by_weight
from benchmarks.session import ROOT, Session
from benchmarks.subjects import MODES, Subject
from fastmbconv import ahead, functional

MODEL_COMPILE_SCALE = 4.0  # a whole model's graph against one block's
INFERENCE_BATCHES = (1, 32, 256)
TESTS_SECONDS, MEMCHECK_SECONDS, START_SECONDS, KERNELS_SECONDS = 110.0, 40.0, 70.0, 80.0
FAREWELL_SECONDS = 8.0  # for pytest to say what failed before its time was up


def _captured(
    session: Session, name: str, command: list[str], seconds: float, env: dict[str, str]
) -> tuple[int | None, str]:
    """Exit status (None: ended for time) and output, which is also saved beside the result file."""
    log = session.path.with_name(f"{session.path.stem}-{name}.txt")
    with open(log, "w") as file:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | env,
            start_new_session=True,
        )
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            child.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(FAREWELL_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # its own group: test workers end with it
            child.wait()
    return status, log.read_text(errors="replace")


def tests(session: Session) -> None:
    """The test suite on the device, its verdict in the header; each comparison has its own parity gate besides."""
    if find_spec("pytest") is None:
        session.add("tests", {"what": "pytest", "skipped": "pytest is not installed"})
        return
    chosen = ["tests/test_static.py", "--collect-only"] if session.dry else ["tests", "-m", "not slow"]
    workers = ["-n", "6"] if find_spec("xdist") and not session.dry else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *workers]
    status, output = _captured(session, "tests", command, min(TESTS_SECONDS, session.left()), {})
    verdict = "ended for time" if status is None else "passed" if status == 0 else f"exit status {status}"
    last = next((text for text in reversed(output.splitlines()) if text.strip()), "")
    session.head["tests"] = f"{verdict}: {last.strip('= ')}"
    session.add("tests", {"what": "pytest", "verdict": verdict, "last": last.strip("= ")})


def memcheck(session: Session) -> None:
    """compute-sanitizer over small odd blocks; PyTorch's caching allocator would hide a stray access, so it is off."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        session.add("memcheck", {"what": "memcheck", "skipped": "compute-sanitizer is not on PATH"})
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.memcheck"]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, output = _captured(session, "memcheck", command, min(MEMCHECK_SECONDS, session.left()), env)
    found = re.findall(r"ERROR SUMMARY: (\d+) error", output)
    verdict = "ended for time" if status is None else f"exit status {status}"
    session.add("memcheck", {"what": "memcheck", "verdict": verdict, "errors": int(found[-1]) if found else None})


def ceilings(session: Session) -> None:
    """What this device reaches: a copy, counting bytes read and written, and a matrix product on random data."""
    device, dtype = ("cpu", torch.float32) if session.dry else ("cuda", torch.bfloat16)
    x = torch.randn(1 << 12 if session.dry else 1 << 30, device=device, dtype=dtype)
    y = torch.empty_like(x)
    side = 64 if session.dry else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    steps: dict[str, Callable[[], object]] = {"copy": lambda: y.copy_(x), "matmul": lambda: a @ b}
    for step in steps.values():
        step()
    medians = {n: timing.quantiles(s)["p50"] for n, s in timing.interleaved(steps, 10).items()}
    copy, matmul = 2 * x.nbytes / medians["copy"] / 1e6, 2 * side**3 / medians["matmul"] / 1e9
    session.head["copy_gb_s"], session.head["matmul_tflop_s"] = round(copy, 1), round(matmul, 1)
    session.add("ceilings", {"what": f"copy and matmul {side}", "copy_gb_s": copy, "matmul_tflop_s": matmul})


def _plan(session: Session, dtype: torch.dtype, share: float, **more: Any) -> Plan:
    """Until this share of the comparisons' time has gone; peers that need compiling are named by the caller."""
    deadline = session.share(share)
    copy = session.head.get("copy_gb_s")
    if session.dry:
        return Plan("cpu", torch.float32, tuple(EAGER), 1, session.deadline, interpreted=True)
    return Plan("cuda", dtype, bandwidth=copy and copy * 1e9, deadline=deadline, **more)


def _run(session: Session, section: str, work: Iterable[tuple[Subject, str, Plan]]) -> None:
    for subject, mode, plan in work:
        row: dict[str, Any] = {"what": subject.name, "mode": mode}
        if plan.left() <= 0:
            session.add(section, row | {"skipped": "its time is up"})
            return
        try:
            row = compare(subject, mode, plan)
        except Exception as error:  # one comparison that fails must not lose the others
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        session.add(section, row)
        if "error" in row and _device_is_lost():
            return


def _device_is_lost() -> bool:
    """Whether this process can't use its GPU any more: an access outside memory ends it for all later launches."""
    try:
        timing.synchronize()
    except RuntimeError:
        return True
    return False


def _shapes(session: Session) -> list[Shape]:
    if session.dry:
        return [next(s for s in by_weight() if (s.kernel_size, s.stride) == kind).tiny() for kind in ((3, 1), (5, 2))]
    return by_weight()


def kernels(session: Session, dtype: torch.dtype) -> None:
    """The blocks' training kernels compile side by side, so that no comparison waits for a 5x5 walk alone."""
    if session.dry:
        session.add("kernels", {"what": "kernels", "skipped": "nothing compiles in a dry run"})
        return
    began, deadline = time.monotonic(), time.monotonic() + min(KERNELS_SECONDS, session.left())
    launches = []
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        for shape in _shapes(session):
            size = (shape.batch, shape.in_channels, shape.size, shape.size)
            x = torch.empty(size, device="cuda", dtype=dtype, memory_format=torch.channels_last)
            block = shape.block().cuda().train().describe()
            launches += ahead.model_launches(x, block, "fast", functional._train_ahead)
    under_way = [kernel.future for kernel in ahead.submit(launches)]
    done = len(wait(under_way, max(0.0, deadline - time.monotonic())).done)
    for future in under_way:
        future.cancel()  # the launch compiles what has not begun
    session.add("kernels", {"what": "kernels", "of": len(under_way), "done": done, "s": time.monotonic() - began})


def blocks(session: Session, dtype: torch.dtype) -> None:
    """Every block shape against eager in both memory formats; training first."""
    plan = _plan(session, dtype, 0.45, peers=tuple(EAGER))
    _run(session, "blocks", ((subjects.mbconv(s), m, plan) for m in reversed(MODES) for s in _shapes(session)))


def models(session: Session, dtype: torch.dtype) -> None:
    """Whole models: a training step with its optimiser, and inference; images per second and peak memory."""
    plan = _plan(session, dtype, 0.62, peers=tuple(EAGER), rounds=8)
    chosen = [subjects.tiny_model()] if session.dry else [subjects.whole(name) for name in BATCHES]
    _run(session, "models", ((subject, m, plan) for m in reversed(MODES) for subject in chosen))


def ops(session: Session, dtype: torch.dtype) -> None:
    """The single ops at the shapes that weigh most."""
    plan = _plan(session, dtype, 0.68, peers=tuple(EAGER), rounds=20)
    makers = (subjects.depthwise, subjects.squeeze_excite)
    shapes = _shapes(session)[: 1 if session.dry else 8]
    _run(session, "ops", ((make(s), m, plan) for s in shapes for m in reversed(MODES) for make in makers))


def inference(session: Session, dtype: torch.dtype) -> None:
    """Whole models without gradients, by themselves and as a CUDA graph: latency of one image, then throughput."""
    plan = _plan(session, dtype, 0.74, peers=tuple(EAGER), rounds=8, graphed=True)
    chosen = [subjects.whole(name, batch) for batch in INFERENCE_BATCHES for name in BATCHES]
    chosen = [subjects.tiny_model()] if session.dry else chosen
    _run(session, "inference", ((subject, "fwd_no_grad", plan) for subject in chosen))


def learning(session: Session, dtype: torch.dtype) -> None:
    """200 steps on digits, fused and eager: the same loss curve? The given dtype first, others as time allows."""
    if session.dry:
        setting, dtypes = training.DRY, [torch.float32]
    else:
        setting = replace(training.LARGE, device="cuda")
        dtypes = [dtype, *(d for d in (torch.float16, torch.bfloat16, torch.float32) if d != dtype)]
    rows = []
    for row in training.compare(setting, dtypes, training.digits(setting.size)):
        rows.append(row)
        session.add("training", row)
        if time.monotonic() > session.share(0.85):
            break
    if find_spec("matplotlib"):
        title = f"{rows[0]['data']}; {session.head['gpu']}, commit {session.head['commit']}"
        training.draw(session.path.with_name(f"{session.path.stem}-training.png"), rows, title)


def start(session: Session) -> None:
    """From `fuse` to the end of B0's first step in a fresh process: with an empty cache of kernels, then a full one."""
    command = [sys.executable, "-m", "benchmarks.start", *(["--dry"] if session.dry else [])]
    with tempfile.TemporaryDirectory() as cache:
        for mode in ("cold", "warm"):
            seconds = min(START_SECONDS, session.left())
            status, output = _captured(session, f"start-{mode}", command, seconds, {"TRITON_CACHE_DIR": cache})
            found = re.findall(r"^\{.*\}$", output, re.M)
            row = json.loads(found[-1]) if found else {"what": "start", "error": f"exit status {status}, see the log"}
            session.add("start", row | {"mode": mode})


def compiled(session: Session, dtype: torch.dtype) -> None:
    """The comparisons again with torch.compile's peers beside ours and eager, the weightiest first, as time allows."""
    if session.dry:
        session.add("blocks-compiled", {"what": "torch.compile", "skipped": "not in a dry run"})
        return
    _run_labelled(session, _compiled_work(session, dtype))


def _compiled_work(session: Session, dtype: torch.dtype) -> Iterator[tuple[str, Subject, str, Plan]]:
    everything = (*EAGER, *COMPILE)
    block = _plan(session, dtype, 1.0, peers=everything)
    model = _plan(session, dtype, 1.0, peers=everything, rounds=8, compile_scale=MODEL_COMPILE_SCALE)
    latency = replace(model, peers=(*EAGER, *LATENCY), graphed=True)
    for name in BATCHES:
        yield "inference-compiled", subjects.whole(name, 1), "fwd_no_grad", latency
    train = [("models-compiled", subjects.whole(n), "fwd_bwd", model) for n in BATCHES]
    infer = [("models-compiled", subjects.whole(n), "fwd_no_grad", model) for n in BATCHES]
    for i, shape in enumerate(by_weight()):
        yield "blocks-compiled", subjects.mbconv(shape), "fwd_bwd", block
        if i % 2 == 1 and i // 2 < len(BATCHES):
            yield train[i // 2]
    yield from infer
    for shape in by_weight():
        yield "blocks-compiled", subjects.mbconv(shape), "fwd_no_grad", block
        for make in (subjects.depthwise, subjects.squeeze_excite):
            yield "ops-compiled", make(shape), "fwd_bwd", block


def _run_labelled(session: Session, work: Iterator[tuple[str, Subject, str, Plan]]) -> None:
    for section, subject, mode, plan in work:
        if plan.left() < 30:  # not enough for one compiled peer
            session.add(
                section, {"what": subject.name, "mode": mode, "skipped": "its time is up, and the ones after it"}
            )
            return
        _run(session, section, [(subject, mode, plan)])


SECTIONS: dict[str, Callable[..., None]] = {
    "tests": tests,
    "memcheck": memcheck,
    "ceilings": ceilings,
    "start": start,
    "kernels": kernels,
    "blocks": blocks,
    "models": models,
    "ops": ops,
    "inference": inference,
    "training": learning,
    "compiled": compiled,
}

WITHOUT_DTYPE = ("tests", "memcheck", "ceilings", "start")


def run(session: Session, sections: list[str], dtype: torch.dtype) -> None:
    for place, name in enumerate(sections):
        began = time.monotonic()
        if name not in (*WITHOUT_DTYPE, "kernels") and session.beginning == session.start:
            session.beginning = began
        try:
            SECTIONS[name](*((session,) if name in WITHOUT_DTYPE else (session, dtype)))
        except Exception as error:  # a step that fails must not lose the ones after it
            session.add(name, {"what": name, "error": f"{type(error).__name__}: {error}"[:400]})
        session.head.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        session.write()
        if _device_is_lost():
            session.add(name, {"what": "device", "error": "this process lost its GPU; another one goes on"})
            _go_on(session, sections[place + 1 :], dtype)
            return


def _go_on(session: Session, sections: list[str], dtype: torch.dtype) -> None:
    """What is left, in a new process, with a result file of its own."""
    if sections and session.left() > 0:
        minutes = f"{(session.left() + 2 * GRACE) / 60:.3f}"
        kind = str(dtype).removeprefix("torch.")
        command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", minutes, "--out", str(session.path.parent)]
        subprocess.run([*command, "--dtype", kind, "--sections", *sections], cwd=ROOT, check=False)
