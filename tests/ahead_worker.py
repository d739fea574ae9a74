"""Which thread compiles what in a training step and an inference of B0 after `fuse`; JSON, for test_ahead.py.

The device is the rehearsal's. The compiler is left out: its place is taken by who called it, since a B0 step's kernels
take minutes of a core.
"""

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from benchmarks.rehearsal import preload

library = preload.load(Path(sys.argv[1]))
from benchmarks.rehearsal import gpu  # noqa: E402

gpu.install(library)

import torch  # noqa: E402
import triton  # noqa: E402

import fastmbconv  # noqa: E402
from fastmbconv.efficientnet import EfficientNet  # noqa: E402
from fastmbconv.scaling import COEFFICIENTS  # noqa: E402

compiled, launchers, launched = [], [], []


def compile_nothing(src, **options):
    compiled.append((threading.current_thread().name, src.name))
    return SimpleNamespace(
        src=src,
        metadata=None,
        function=0,
        packed_metadata=None,
        launch_metadata=lambda *args: None,
        run=lambda *args: launched.append(src.name),
    )


def launcher(src, metadata):
    launchers.append((threading.current_thread().name, src.name))


triton.compiler.compile = compile_nothing
triton.runtime.driver.active.launcher_cls = launcher


def counts():
    """How many kernels and launchers were made in the pool and elsewhere, how many were launched; then anew."""
    found = {
        "compiled": len(compiled),
        "elsewhere": sorted({name for thread, name in compiled if not thread.startswith("fastmbconv")}),
        "launchers": len(launchers),
        "launchers_elsewhere": sum(not thread.startswith("fastmbconv") for thread, _ in launchers),
        "launched": len(launched),
    }
    for each in (compiled, launchers, launched):
        each.clear()
    return found


model = fastmbconv.fuse(EfficientNet(COEFFICIENTS["b0"])).to("cuda", memory_format=torch.channels_last)
images = torch.randn(128, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
with torch.autocast("cuda", torch.bfloat16):
    model(images).float().sum().backward()
training = counts()
with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
    model.eval()(images)
print(json.dumps({"triton": triton.__version__, "training": training, "inference": counts()}))
