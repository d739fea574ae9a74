"""Builds the device that is not there, and loads it around PyTorch, which asks for its devices when it is imported."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
DRIVER, HOOKS, GUARD = HERE / "libcuda.c", HERE / "hooks.cpp", HERE / "guard.cpp"
OPERATORS = HERE / "operators.cpp"
OPTIONS = ["-shared", "-fPIC", "-O1"]


def torch_folder() -> Path:
    """Where PyTorch lies; it is not imported."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("a rehearsal needs PyTorch, and it is not installed")
    return Path(spec.origin).parent


def build(folder: Path) -> tuple[Path, Path, Path]:
    """The driver (libcuda.c) and PyTorch's two sides, compiled once for these sources and this PyTorch.

    Raises RuntimeError with the compiler's words where gcc or g++ is missing or refuses.
    """
    place = _place(folder, DRIVER, HOOKS, GUARD)
    driver, hooks, guard = place / "libcuda.so.1", place / "hooks.so", place / "guard.so"
    _compile(driver, ["gcc", *OPTIONS, "-Wl,-soname,libcuda.so.1", str(DRIVER)])
    for path, source in ((hooks, HOOKS), (guard, GUARD)):
        _compile(path, _against_torch(source))
    return driver, hooks, guard


def build_operators(folder: Path) -> Path:
    """PyTorch's operators that compute nothing (operators.cpp), in the same way: 20 s the first time.

    Raises RuntimeError as `build`, and where this PyTorch has operators of its own for a GPU.
    """
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        raise RuntimeError("operators that compute nothing need a PyTorch without CUDA, and this one has its own")
    path = _place(folder, OPERATORS) / "operators.so"
    _compile(path, [*_against_torch(OPERATORS), "-O2"])
    return path


def _place(folder: Path, *sources: Path) -> Path:
    text = "".join(path.read_text() for path in sources)
    place = folder / hashlib.sha256(f"{text} {version('torch')} {sys.version}".encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    return place


def _against_torch(source: Path) -> list[str]:
    torch = torch_folder()
    linked = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    return ["g++", "-std=c++20", *OPTIONS, str(source), *linked]


def _compile(path: Path, command: list[str]) -> None:
    if path.exists():
        return
    descriptor, made = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    try:
        done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"a rehearsal builds its device with {command[0]}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"the rehearsal's device does not compile: {done.stderr[-1000:]}")
    os.replace(made, path)  # another process may have built it meanwhile


def load(folder: Path, *, operators: bool = False) -> ctypes.CDLL:
    """The driver, after PyTorch was imported with the device in its place; with its operators, if that is asked."""
    if "torch" in sys.modules:
        raise RuntimeError("PyTorch was imported before the rehearsal's device was there")
    driver, hooks, guard = build(folder)
    behind = [guard, build_operators(folder)] if operators else [guard]
    os.environ["TRITON_LIBCUDA_PATH"] = str(driver.parent)
    os.environ.pop("TRITON_INTERPRET", None)
    library = ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    answers = ctypes.CDLL(str(hooks), mode=ctypes.RTLD_GLOBAL)
    ctypes.c_bool.in_dll(answers, "rehearsal_cudnn").value = operators
    import torch  # noqa: F401

    for path in behind:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return library
