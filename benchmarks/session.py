"""One run's record: a header that says where and what, rows written as they come, a table at the end."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import triton

import fastmbconv
from benchmarks.comparison import OURS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def header(dry: bool) -> dict[str, Any]:
    """GPU, versions, date and commit. A copied tree has no git: FASTMBCONV_COMMIT names its commit then."""
    commit = os.environ.get("FASTMBCONV_COMMIT") or _output("git", "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "status", "--porcelain", "--untracked-files=no") if commit else None
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
        "python": platform.python_version(),
        "fastmbconv": fastmbconv.__version__,
        "commit": commit or "unknown",
        "dirty": None if changes is None else bool(changes),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "measured": not dry,
    }


class Session:
    """Collects rows until a deadline; each row is on disk before the next one starts."""

    def __init__(self, out: Path, seconds: float, dry: bool) -> None:
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.beginning = self.start  # of the comparisons: whatever comes before them takes its time from all alike
        self.dry = dry
        self.head = header(dry)
        self.rows: list[dict[str, Any]] = []
        gpu = re.sub(r"[^a-z0-9]+", "-", self.head["gpu"].lower().replace("nvidia", "")).strip("-")
        stem = f"{self.head['date'][:10]}-{'dry' if dry else gpu}-{self.head['commit']}"
        out.mkdir(parents=True, exist_ok=True)
        taken = sum(1 for _ in out.glob(f"{stem}*.json"))
        self.path = out / f"{stem}{f'-{taken + 1}' if taken else ''}.json"
        self.write()

    def share(self, part: float) -> float:
        """When this part of the time that `beginning` left to comparisons has gone."""
        return self.beginning + part * (self.deadline - self.beginning)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def write(self) -> None:
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps({"head": self.head, "rows": self.rows}, indent=1) + "\n")
        whole.replace(self.path)

    def add(self, section: str, row: dict[str, Any]) -> None:
        row = {"section": section, **{k: v for k, v in row.items() if k != "samples"}}
        self.rows.append(row)
        self.write()
        print(f"[{self.elapsed():4.0f} s] {section}: {line(row)}", flush=True)


def line(row: dict[str, Any]) -> str:
    """A row for people: the medians side by side, or why there are none."""
    name = " ".join(str(row[k]) for k in ("what", "mode") if k in row)
    if "error" in row:
        return f"{name}: NO FIGURE, {row['error']}"
    if "results" not in row:
        shown = {k: v for k, v in row.items() if k not in ("what", "mode", "section", "losses")}
        return f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
    medians = ", ".join(f"{n} {r['p50']:.3f}" for n, r in row["results"].items())
    missing = "".join(f"; {n}: {why[:60]}" for n, why in row["problems"].items())
    note = f" ({row['note']})" if "note" in row else ""
    return f"{name}: {row['speedup']:.2f}x of {row['best_peer']} [ms: {medians}]{missing}{note}"


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per comparison: the one with most peers, the later of equals."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        if "results" in row:
            key = (row["what"], row["mode"], row["dtype"])
            if key not in best or len(row["results"]) >= len(best[key]["results"]):
                best[key] = row
    return list(best.values())


def trunks(rows: list[dict[str, Any]]) -> list[str]:
    """Each model's blocks added up, per mode: ours against the peer that is best over the whole trunk."""
    lines = []
    blocks = [row for row in latest(rows) if row["section"].startswith("blocks")]
    for model, mode in sorted({(row["model"], row["mode"]) for row in blocks}):
        mine = [row for row in blocks if (row["model"], row["mode"]) == (model, mode)]
        shared = set.intersection(*(set(row["results"]) for row in mine))
        total = {n: sum(row["count"] * row["results"][n]["p50"] for row in mine) for n in shared}
        ours = total.pop(OURS)
        best = min(total, key=lambda n: total[n], default=None)
        if best:
            count = sum(row["count"] for row in mine)
            lines.append(
                f"{model} {mode}, {count} blocks: {ours:.2f} ms, {best} {total[best]:.2f} ms, {total[best] / ours:.2f}x"
            )
    return lines


def summary(session: Session) -> str:
    """What was measured, wins and losses alike, then what failed."""
    rows = latest(session.rows)
    rule = (
        "interpreted, not a measurement" if session.dry else f"{session.head['gpu']}, commit {session.head['commit']}"
    )
    lines = ["", f"speedup over the best peer that ran ({rule})"]
    lines += [f"  {r['speedup']:5.2f}x of {r['best_peer']:13} {r['what']} {r['mode']}" for r in rows]
    lines += [f"  trunk {text}" for text in trunks(session.rows)]
    losses = sum(r["speedup"] < 1 for r in rows)
    failed = [r for r in session.rows if "error" in r]
    lines.append(f"{len(rows)} comparisons, {losses} slower than the best peer, {len(failed)} without a figure")
    lines += [f"  no figure: {line(r)}" for r in failed]
    return "\n".join([*lines, str(session.path)])
