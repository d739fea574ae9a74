"""What a run says at its end: what is wrong, what is slow, then every comparison."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.record import OURS, Row

MOST_SLOW = 8  # lines about kernels
MOST_WRONG, MOST_CHARACTERS = 20, 240  # whoever runs this may see no more than the last screens of it


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row per comparison: the one with most peers, the later of equals."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if "results" in row:
            key = (row["what"], row["mode"], row["dtype"])
            if key not in best or len(row["results"]) >= len(best[key]["results"]):
                best[key] = row
    return list(best.values())


def trunks(rows: Iterable[Row]) -> list[str]:
    """Each model's blocks added up, per mode: ours against the peer that is best over the whole trunk."""
    lines = []
    blocks = [row for row in latest(rows) if row["what"].startswith("mbconv ")]
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


def wrong(rows: Iterable[Row], disk: str | None = None) -> list[str]:
    """What must be looked at before any figure is believed: errors, sections that did not end, a cache of no use."""
    found = [] if disk is None else [disk]
    for row in rows:
        if "error" in row:
            found.append(f"{row['section']}: {row['what']}: {row['error']}")
        elif row["section"] == "sections" and row["status"] != "done":
            found.append(f"{row['what']}: {row['status']} (after {row['seconds']} s of {row['limit_s']:.0f})")
        elif row["section"] == "versions" and row.get("cache", "").startswith("does not match"):
            found.append(f"the cache of kernels {row['cache']}")
        elif row["section"] == "profile" and row.get("unmatched"):
            found.append(f"profile: {row['unmatched']} launches have no time, or no statement")
    return found


def slow(rows: Iterable[Row]) -> list[str]:
    """Comparisons that are lost, and the kernels that lose most time to their floor."""
    rows = list(rows)
    lost = [row for row in latest(rows) if row["speedup"] < 1]
    lines = [f"{row['what']} {row['mode']}: {row['speedup']:.2f}x of {row['best_peer']}" for row in lost]
    kernels: dict[str, list[Row]] = {}
    for row in rows:
        if row["section"] == "profile" and "floor_us" in row:
            kernels.setdefault(row["what"], []).append(row)
    sums = {
        name: (sum(r["us"] for r in mine), sum(r["floor_us"] for r in mine), len(mine))
        for name, mine in kernels.items()
    }
    worst = sorted(sums, key=lambda name: sums[name][1] - sums[name][0])
    for name in worst[:MOST_SLOW]:
        us, floor, launches = sums[name]
        lines.append(f"{name}: {us:.0f} us in {launches} launches, {floor:.0f} at the copy's speed ({floor / us:.0%})")
    return lines


def summarise(head: Row, rows: list[Row], place: str, disk: str | None = None) -> str:
    """The whole text. Its first line is the verdict."""
    problems, losses, compared = wrong(rows, disk), slow(rows), latest(rows)
    gpu = next((row["gpu"] for row in rows if row["section"] == "versions" and "gpu" in row), "no GPU answered")
    kind = "" if head["measured"] else ", NO MEASUREMENT"
    verdict = f"{len(problems)} things are wrong" if problems else "nothing is wrong"
    lines = ["", f"== {verdict}; {head['command']} command, {gpu}, commit {head['commit']}{kind}"]
    lines += [f"  WRONG  {text[:MOST_CHARACTERS]}" for text in problems[:MOST_WRONG]]
    if len(problems) > MOST_WRONG:
        lines.append(f"  WRONG  and {len(problems) - MOST_WRONG} more, in the file")
    lines += [f"  SLOW   {text}" for text in losses]
    hits, compiled = (sum(row.get(key, 0) for row in rows if row["section"] == "sections") for key in
                      ("cache_hits", "compiled"))  # fmt: skip
    lines.append(f"== kernels: {hits} came out of the cache, {compiled} were compiled here")
    lines.append("== speedup over the best peer that ran, plain; as CUDA graphs")
    for row in compared:
        graph = f"{row['speedup_graph']:5.2f}x" if "speedup_graph" in row else "      "
        lines.append(f"  {row['speedup']:5.2f}x {graph} of {row['best_peer']:13} {row['what']} {row['mode']}")
    lines += [f"  trunk {text}" for text in trunks(rows)]
    skipped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if isinstance(row.get("skipped"), str):
            skipped.setdefault((row["section"], row["skipped"]), []).append(row["what"])
    for (section, why), names in skipped.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"  skipped: {section}: {names[0]}{more}: {why}")
    return "\n".join([*lines, place])
