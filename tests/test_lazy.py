"""`import fastmbconv` brings no torch, so that the command answers at once, to Ctrl-C too."""

import signal
import subprocess
import sys
import time

import pytest

import fastmbconv
from fastmbconv.cli import COMMANDS, main


def printed(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_what_the_package_gives():
    assert set(fastmbconv.__all__) <= set(dir(fastmbconv))
    assert all(getattr(fastmbconv, name) is not None for name in fastmbconv.__all__)
    assert callable(fastmbconv.explain) and callable(fastmbconv.graph)
    with pytest.raises(AttributeError, match="module 'fastmbconv' has no attribute 'fusion'"):
        _ = fastmbconv.fusion


def test_submodules_are_there_by_attribute():
    """Each one by its attribute alone, as if nothing had imported it yet."""
    names = ["block", "dispatch", "ends", "functional", "graphs", "mbconv", "reference", "swap"]
    code = (
        "import fastmbconv\n"
        f"for name in {names}:\n"
        "    vars(fastmbconv).pop(name, None)\n"
        "    print(getattr(fastmbconv, name).__name__)"
    )
    assert printed(code).split() == [f"fastmbconv.{name}" for name in names]


def test_star_and_names():
    code = (
        "from fastmbconv import *; from fastmbconv import functional; print(fuse.__name__, functional.mbconv.__name__)"
    )
    assert printed(code) == "fuse mbconv"


def test_importing_the_package_imports_neither_torch_nor_kernels():
    code = (
        "import sys, fastmbconv, fastmbconv.cli; print([n for n in ('torch', 'numpy', 'triton') if n in sys.modules])"
    )
    assert printed(code) == "[]"
    assert printed("import sys, fastmbconv; fastmbconv.fuse; print('fastmbconv.kernels' in sys.modules)") == "False"


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_needs_no_torch(arguments):
    code = (
        f"import sys; from fastmbconv.cli import main\ntry: main({arguments})\nfinally: print('torch' in sys.modules)"
    )
    assert printed(code).endswith("False")


# Tests may run where Ctrl-C is ignored, in the background of a shell: a command there ignores it too.
STARTED = (
    "import signal, sys; from fastmbconv.cli import main; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.parametrize("seconds", [0, 0.05, 0.2, 0.5, 0.9, 1.4, 2.0])
def test_an_interrupt_in_the_first_seconds(seconds):
    """While torch is imported, before and after."""
    arguments = [sys.executable, "-c", STARTED, "check", "efficientnet_b0"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.endswith("fastmbconv: interrupted\n") and "Traceback" not in errors
    assert process.returncode == 130


def test_an_interrupt_leaves_the_usual_handler(monkeypatch, capsys):
    """Main in a process that goes on."""
    from fastmbconv.cli import info

    def interrupted(options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(info, "run", interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["info"]) == 130 and capsys.readouterr().err == "fastmbconv: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)


def test_an_ignored_interrupt_stays_ignored(monkeypatch):
    """As in the background of a shell, and under nohup."""
    from fastmbconv.cli import info

    monkeypatch.setattr(info, "run", lambda options: signal.raise_signal(signal.SIGINT) or 0)
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["info"]) == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


def test_without_triton_a_block_as_data_runs_eager():
    """Nothing behind `dispatch` is imported for a call that eager takes."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from fastmbconv import functional; from fastmbconv.mbconv import MBConv\n"
        "module, x = MBConv(4, 4).eval(), torch.randn(2, 4, 3, 3)\n"
        "with torch.no_grad():\n"
        "    for _ in range(2): assert torch.equal(functional.mbconv(x, module.describe()), module(x))\n"
        "print([n for n in sys.modules if n.startswith('fastmbconv.kernels')])"
    )
    assert printed(script) == "[]"
