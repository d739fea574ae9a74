"""The sections that run other programs: tests on the device, compute-sanitizer, first steps in fresh processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from benchmarks.lost_device import is_lost
from benchmarks.recorder import ROOT
from benchmarks.section import Context

TESTS = ROOT / "tests"
MOST_WORKERS = 8


class Reporter:
    """pytest's hooks: each test is an item, so that one that hangs is known by its name; failures become rows."""

    verdict = "error"

    def __init__(self, context: Context) -> None:
        self.context, self.counts = context, {"passed": 0, "failed": 0, "skipped": 0}
        self.failures: list[str] = []
        self.left_out = {*context.avoid, *context.finished}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.context.begin(nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.context.end(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            if is_lost():  # this process's GPU: no test after this one would mean anything
                self.context.lose(f"lost its GPU at {report.nodeid}")
            self.failures.append(report.nodeid)
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.context.add(
                {"what": report.nodeid, self.verdict: message.strip().splitlines()[0][:400] if message else "?"}
            )

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.left_out]


def run_pytest(context: Context, what: str, arguments: list[str]) -> None:
    """Tests in this process, or in several where pytest-xdist is: one that ends its process costs itself."""
    if find_spec("pytest") is None:
        context.add({"what": what, "skipped": "pytest is not installed"})
        return
    import pytest

    reporter = Reporter(context)
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)) // 2)
    spread = ["-n", str(workers)] if workers > 1 and find_spec("xdist") and not context.facts.get("once") else []
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-p", "benchmarks.lost_device"]
    os.chdir(ROOT)
    status = pytest.main([*options, *spread, *arguments], plugins=[reporter])
    row = {"what": what, **reporter.counts, "failures": reporter.failures, "exit_status": int(status)}
    if int(status) not in (0, 1):
        row["error"] = f"pytest ended with status {int(status)}, see the log"
    context.add(row)


def run_tests(context: Context) -> None:
    """The kernels' own tests, those that take a moment each."""
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.kernels" in path.read_text()]
    run_pytest(context, "kernel tests", [*files, "-m", "kernels and not slow"])  # others import whole libraries


def run_capture(context: Context) -> None:
    """The tests of steps and forwards as CUDA graphs."""
    run_pytest(context, "capture tests", ["tests/test_capture.py", "tests/test_graphs.py", "-m", "not slow"])


def run_memcheck(context: Context) -> None:
    """compute-sanitizer over small odd blocks; PyTorch's caching allocator would hide a stray access, so it is off."""
    tool = shutil.which("compute-sanitizer")
    with context.item("memcheck") as begun:
        if begun and tool is None:
            context.add({"what": "memcheck", "skipped": "compute-sanitizer is not on PATH"})
        elif begun:
            command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.memcheck"]
            status, output = run_apart(context, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            found = re.findall(r"ERROR SUMMARY: (\d+) error", output)
            verdict = "ended for time" if status is None else "passed" if status == 0 else f"exit status {status}"
            errors = int(found[-1]) if found else None
            problem = {"error": f"{verdict}, {errors} errors, see the log"} if errors or status else {}
            context.add({"what": "memcheck", "verdict": verdict, "errors_found": errors} | problem)


def run_memcheck_here(context: Context) -> None:
    """The same blocks in this process, unchecked: where only their kernels are wanted."""
    from benchmarks import memcheck

    with context.item("memcheck") as begun:
        if begun:
            memcheck.main()
            context.add({"what": "memcheck", "skipped": "nothing checks kernels that run nowhere"})


def run_start(context: Context) -> None:
    """From `fuse` to the end of B0's first step in a fresh process: with an empty cache of kernels, then a full one."""
    command = [sys.executable, "-m", "benchmarks.start"]
    with tempfile.TemporaryDirectory() as cache:
        for mode in ("cold", "warm"):
            with context.item(f"{mode} start") as begun:
                if begun:
                    status, output = run_apart(context, command, {"TRITON_CACHE_DIR": cache})
                    found = re.findall(r"^\{.*\}$", output, re.M)
                    row = json.loads(found[-1]) if found else {"error": f"exit status {status}, see the log"}
                    context.add(row | {"what": f"{mode} start"})


def run_apart(context: Context, command: list[str], environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status (None: ended for time) and output of another program, which the log gets as well."""
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
        start_new_session=True,
    )
    status: int | None
    try:
        output, _ = child.communicate(timeout=max(1.0, context.left() - 3.0))
        status = child.returncode
    except subprocess.TimeoutExpired:
        status = None
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
    print(output, flush=True)
    return status, output
