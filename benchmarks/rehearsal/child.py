"""One section on the device that is not there: `python -m benchmarks.rehearsal.child NAME ...`, as benchmarks.section.

FASTMBCONV_REHEARSAL is JSON: `folder` keeps the device's libraries, `launch_us` is what a launch takes, `faults` are
what goes wrong: {"section": ..., "kind": raise | hang | kill | lost | gone, "what": part of an item's name}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.rehearsal import preload

SETTING = "FASTMBCONV_REHEARSAL"


def arm(context: Any, device: Any, faults: list[dict[str, str]]) -> None:
    """Let the faults of this section happen at their items."""
    begin = context.begin
    mine = [fault for fault in faults if context.name in fault["section"].split(",")]

    def begin_or_fail(what: str) -> None:
        begin(what)
        for fault in mine:
            if fault["what"] in what:
                device.set_fault("", fault["kind"])  # whichever kernel is launched next

    if any(fault["kind"] == "raise" for fault in mine):
        context.item = raise_here
    elif any(fault["kind"] == "gone" for fault in mine):
        device.library.fake_lose()
    else:
        context.begin = begin_or_fail


def raise_here(*args: Any) -> NoReturn:
    raise RuntimeError("a fault of the section's own")


def main() -> int:
    setting = json.loads(os.environ[SETTING])
    library = preload.load(Path(setting["folder"]))
    from benchmarks.rehearsal import gpu

    device = gpu.install(library, launch_us=setting.get("launch_us", 10.0))
    from benchmarks import section, step_profile, suites

    step_profile.device_kernels = lambda step: gpu.launched(device, step)
    suites.Reporter.verdict = "failed_here"  # no value is computed, so a test's verdict says nothing
    suites.run_memcheck = suites.run_memcheck_here  # no compute-sanitizer looks at kernels that run nowhere
    args = section.arguments()
    say = None if args.pipe is None else section.say_over(args.pipe)
    context = section.Context(args.name, args.seconds, args.dtype, args.avoid, args.finished, args.facts, say)
    arm(context, device, setting.get("faults", []))
    section.run(context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
