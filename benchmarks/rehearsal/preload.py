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
    sources = "".join(path.read_text() for path in (DRIVER, HOOKS, GUARD))
    place = folder / hashlib.sha256(f"{sources} {version('torch')} {sys.version}".encode()).hexdigest()[:16]
    torch, options = torch_folder(), ["-shared", "-fPIC", "-O1"]
    linked = [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    commands = {
        place / "libcuda.so.1": ["gcc", *options, "-Wl,-soname,libcuda.so.1", str(DRIVER)],
        place / "hooks.so": ["g++", "-std=c++20", *options, str(HOOKS), *linked],
        place / "guard.so": ["g++", "-std=c++20", *options, str(GUARD), *linked],
    }
    place.mkdir(parents=True, exist_ok=True)
    for path, command in commands.items():
        if not path.exists():
            descriptor, made = tempfile.mkstemp(dir=place)
            os.close(descriptor)
            try:
                done = subprocess.run([*command, "-o", made], capture_output=True, text=True, check=False)
            except OSError as error:
                raise RuntimeError(f"a rehearsal builds its device with {command[0]}: {error}") from error
            if done.returncode:
                raise RuntimeError(f"the rehearsal's device does not compile: {done.stderr[-1000:]}")
            os.replace(made, path)  # another process may have built it meanwhile
    driver, hooks, guard = commands
    return driver, hooks, guard


def load(folder: Path) -> ctypes.CDLL:
    """The driver, after PyTorch was imported with the device in its place."""
    if "torch" in sys.modules:
        raise RuntimeError("PyTorch was imported before the rehearsal's device was there")
    driver, hooks, guard = build(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(driver.parent)
    os.environ.pop("TRITON_INTERPRET", None)
    library = ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)
    for path in (torch_folder() / "lib" / "libtorch_cpu.so", hooks):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401

    ctypes.CDLL(str(guard), mode=ctypes.RTLD_GLOBAL)
    return library
