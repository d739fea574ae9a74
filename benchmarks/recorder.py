"""One run's record: lines of JSON, each on disk before the next one is made; a head first, then rows by section."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUIET_REASONS = ("its time is up",)  # of many rows at once
QUIET = ("profile",)  # sections of hundreds of rows: on disk, and summed up in the summary


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def head(command: str, limit_s: float, measured: bool) -> dict[str, Any]:
    """When, from which commit, in which time. A copied tree has no git: FASTMBCONV_COMMIT names its commit then."""
    from fastmbconv._version import __version__

    commit = os.environ.get("FASTMBCONV_COMMIT") or _output("git", "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "command": command,
        "commit": commit or "unknown",
        "dirty": None if changes is None else bool(changes),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "fastmbconv": __version__,
        "measured": measured,
        "limit_s": round(limit_s, 1),
    }


def gpu_name() -> str | None:
    """The first GPU's name by its driver, if that answers; asking PyTorch would make this process a user of it."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return names.splitlines()[0].strip() if names else None


def versions(dry: bool) -> dict[str, Any]:
    """The GPU and what runs on it."""
    import torch
    import triton

    properties = None if dry else torch.cuda.get_device_properties(0)
    driver = None if dry else _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": f"none: {platform.machine()} CPU" if properties is None else properties.name,
        "gpu_memory_bytes": properties and properties.total_memory,
        "l2_bytes": properties and properties.L2_cache_size,
        "sms": properties and properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


class Recorder:
    """Writes a run's rows; what a full disk refuses stays in memory, is tried again, and is printed at the end."""

    def __init__(self, out: Path, head: dict[str, Any], gpu: str) -> None:
        self.start = time.monotonic()
        self.head = head
        self.rows: list[dict[str, Any]] = []
        self.waiting: list[bytes] = []
        self.problem: str | None = None
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")
        stem = f"{head['date'][:10]}-{name}-{head['commit']}-{head['command']}"
        out.mkdir(parents=True, exist_ok=True)
        taken = sum(1 for _ in out.glob(f"{stem}*.jsonl"))
        self.path = out / f"{stem}{f'-{taken + 1}' if taken else ''}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._size = 0
        self._write({"head": head})

    def add(self, section: str, row: dict[str, Any]) -> None:
        row = {"section": section, **row}
        self.rows.append(row)
        self._write(row)
        if (section not in QUIET or "error" in row) and row.get("skipped") not in QUIET_REASONS:
            print(f"[{time.monotonic() - self.start:4.0f} s] {section}: {line(row)}", flush=True)

    def _write(self, value: dict[str, Any]) -> None:
        self.waiting.append(json.dumps(value).encode() + b"\n")
        while self.waiting:
            try:
                self._append(self.waiting[0])
            except OSError as error:
                self.problem = f"{self.path.name} could not be written: {error.strerror}"
                return
            self.waiting.pop(0)

    def _append(self, text: bytes) -> None:
        """All of it or nothing: half a line would hide the next one."""
        try:
            written = os.pwrite(self._file, text, self._size)
            while written < len(text):
                written += os.pwrite(self._file, text[written:], self._size + written)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(text)

    def close(self) -> None:
        """Try once more what could not be written, and print what still can't."""
        if self.waiting:
            self._write({"section": "record", "what": "disk", "error": self.problem})
        if not self.waiting:
            return
        print(f"--- {len(self.waiting)} rows that are not on disk", flush=True)
        for text in self.waiting:
            sys.stdout.write(text.decode())
        print("---", flush=True)


def line(row: dict[str, Any]) -> str:
    """A row for people: the medians side by side, or why there are none."""
    name = " ".join(str(row[k]) for k in ("what", "mode") if k in row)
    if "error" in row:
        return f"{name}: NO FIGURE, {row['error']}"
    if "results" not in row:
        return f"{name}: " + ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in _shown(row).items()
        )
    medians = ", ".join(f"{n} {r['p50']:.3f}" for n, r in row["results"].items())
    missing = "".join(f"; {n}: {why[:60]}" for n, why in row["problems"].items())
    note = f" ({row['note']})" if "note" in row else ""
    return f"{name}: {row['speedup']:.2f}x of {row['best_peer']} [ms: {medians}]{missing}{note}"


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    hidden = ("what", "mode", "section", "losses", "model", "count")
    shown = {k: v for k, v in row.items() if k not in hidden}
    if "errors" in shown:  # the largest, ours and eager's
        shown["errors"] = " ".join(f"{name} {max(e.values()):.1e}" for name, e in shown["errors"].items() if e)
    return shown
