"""A folder of compiled kernels that was made elsewhere: what it holds for, and whether that is here."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "fastmbconv-cache.json"
KEPT = (".cubin", ".json", ".so")  # what a launch reads; the compiler's other stages are for people
GROUP = "__grp__"  # Triton's lists of a kernel's files, by absolute path


def compiler_hash(arch: int | None = None) -> str:
    """Of what Triton's cache keys are made of beside a kernel: its own files, ptxas, the GPU's architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        from triton.compiler.compiler import triton_key
    target = GPUTarget("cuda", arch, 32) if arch else triton.runtime.driver.active.get_current_target()
    return hashlib.sha256(f"{triton_key()} {make_backend(target).hash()}".encode()).hexdigest()[:16]


def kernels_hash() -> str:
    """Of the kernels' source."""
    sources = sorted((ROOT / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def hashes(arch: int | None = None) -> dict[str, str]:
    return {"compiler": compiler_hash(arch), "kernels": kernels_hash()}


def folder() -> Path | None:
    """Where Triton keeps its kernels, if somebody said so."""
    given = os.environ.get("TRITON_CACHE_DIR")
    return Path(given) if given else None


def seal(place: Path, arch: int) -> dict[str, Any]:
    """Drop from a cache what no launch reads, and write down what it holds for."""
    for path in place.rglob("*"):
        if path.is_file() and path.suffix not in KEPT:
            path.unlink()
    for path in sorted(place.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    kept = [path for path in place.rglob("*") if path.is_file()]
    manifest = {
        "root": str(place.resolve()),
        "hash": hashes(arch),
        "kernels": sum(path.suffix == ".cubin" for path in kept),
        "bytes": sum(path.stat().st_size for path in kept),
    }
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def settle(place: Path) -> None:
    """A cache that was moved: Triton's lists of files get the folder that it lies in now."""
    manifest = read(place)
    here = str(place.resolve())
    if manifest is None or manifest["root"] == here:
        return
    for path in place.glob(f"*/{GROUP}*.json"):
        path.write_text(
            path.read_text().replace(json.dumps(manifest["root"])[1:-1] + "/", json.dumps(here)[1:-1] + "/")
        )
    (place / MANIFEST).write_text(json.dumps(manifest | {"root": here}, indent=1) + "\n")


def read(place: Path) -> dict[str, Any] | None:
    """The manifest of a cache, None where there is none."""
    try:
        return json.loads((place / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def verdict() -> str:
    """Whether the cache of this process holds for the compiler and the kernels that are here, in words."""
    place = folder()
    manifest = None if place is None else read(place)
    if manifest is None:
        return "none was brought: kernels compile here"
    here = hashes()
    differ = [f"{name} {manifest['hash'].get(name)}, here {value}" for name, value in here.items()
              if manifest["hash"].get(name) != value]  # fmt: skip
    if differ:
        return f"does not match, kernels compile here: made for {'; '.join(differ)}"
    return f"matches: {manifest['kernels']} kernels"
