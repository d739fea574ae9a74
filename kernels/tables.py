"""Tuned tiles: a launcher asks for its tile sizes here, with the shape that its formula in tuning.py takes.

The user's own table (`fastmbconv tune`) answers, else the one in tuned/ for this GPU's name, else the one for its
compute capability, else the formula. Interpreted kernels and tensors that are on no GPU get the formula. A table is a
JSON file: how it came to be, tiles by bucket, and where `memory="lean"` is the faster plan. In a bucket, counts of
images and pixels are rounded up to a power of two, apart for those that 16 divides, as in Triton's own
specialisations; all else is exact.
"""

import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .._version import __version__
from ..files import replacing
from .launching import renew, watching
from .math import INTERPRETED
from .tuning import MIN_DOT, SPACE, TRITON, cdiv, precision, relieved

FORMAT = 1
SHIPPED = Path(__file__).parent / "tuned"
COUNTED = ("rows", "images", "pixels")  # rounded in a bucket; parameters in UNNAMED don't show in it
UNNAMED = ("dtype", "backward")

Tiles = dict[str, int]


@dataclass(frozen=True)
class Question:
    """What a launcher asks: its kernel, the bucket's key, the shape by name, and the formula's answer."""

    kernel: str
    key: str
    sizes: dict[str, int]
    default: Tiles


@dataclass
class Table:
    """What a file holds: `head` says how it came to be, `tiles` and `memory` ("fast" or "lean") are by bucket."""

    head: dict[str, Any]
    tiles: dict[str, Tiles] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)


Listener = Callable[[Question], Tiles]
_listener: Listener | None = None
_capability = 90
_answers: dict[tuple[Any, ...], Tiles] = {}


def tiles(kernel: str, x: Tensor, formula: Callable[..., Tiles], shape: tuple[Any, ...], **traits: object) -> Tiles:
    """The tile sizes for a launch of `kernel` on x's device and dtype; `formula(*shape)` where no table has them.

    `traits` are the settings that the kernel is compiled for beside the shape.
    """
    asked = (kernel, x.device, x.dtype, precision(x.dtype), formula, shape, *traits.values())
    if _listener is None:
        found = _answers.get(asked)
        if found is not None:
            return found
    default = formula(*shape)
    sizes = dict(zip(inspect.signature(formula).parameters, shape, strict=False))
    if not INTERPRETED:
        default = relieved(kernel, default, sizes | traits, capability(x.device))
    question = Question(kernel, _key(kernel, x.dtype, sizes, traits), sizes, default)
    if _listener is not None:
        return _listener(question)
    return _answers.setdefault(asked, answer(question, x.device))


def answer(question: Question, device: torch.device) -> Tiles:
    """The first table's tiles that fit the question, else the default."""
    for table in of(device):
        entry = table.tiles.get(question.key)
        if entry is not None and fits(question, entry):
            return question.default | entry
    return question.default


def fits(question: Question, entry: Tiles) -> bool:
    """Whether these are tiles of this kernel, and keep what its loops rely on."""
    sizes = question.sizes
    step = sizes["stride"] if question.kernel == "depthwise_bwd" else 1
    images = MIN_DOT if sizes.get("expand") else 1
    return set(entry) <= set(question.default) and entry.get("R", 0) % step == 0 and entry.get("NB", images) >= images


def lean_is_faster(device: torch.device, *block: Any) -> bool:
    """Whether a table says so for a training step of a block, described as for `memory_key`."""
    tables = of(device) if _listener is None else ()
    if not any(table.memory for table in tables):
        return False
    key = memory_key(*block)
    return next((table.memory[key] for table in tables if key in table.memory), "fast") == "lean"


def memory_key(
    dtype: torch.dtype, size: Sequence[int], hidden: int, kernel_size: int, stride: int, activation: str
) -> str:
    """The bucket of a block with an expansion; its input is [N, C, H, W] of `size`, computed in `dtype`."""
    n, c, h, w = size
    sizes = dict(images=n, height=h, width=w, channels=c, hidden=hidden, kernel_size=kernel_size, stride=stride)
    return _key("block", dtype, sizes, dict(activation=activation))


def bucket(count: int) -> str:
    """A batch or pixel count, rounded: "128" for 65..128 that 16 divides, "128-" for the others."""
    return f"{triton.next_power_of_2(count)}{'' if count % 16 == 0 else '-'}"


def _key(kernel: str, dtype: torch.dtype, sizes: dict[str, Any], traits: dict[str, object]) -> str:
    kind = str(dtype).removeprefix("torch.") + ("-tf32" if precision(dtype) == "tf32" else "")
    shape = [f"{k}={bucket(v) if k in COUNTED else v}" for k, v in sizes.items() if k not in UNNAMED]
    named = [k if v is True else f"{k}={v}" for k, v in traits.items() if v is not False]
    return " ".join([kernel, kind, *shape, *named])


@contextmanager
def answered_by(listener: Listener) -> Iterator[None]:
    """Inside the `with` block `listener` answers every launcher, interpreted ones too."""
    global _listener
    before, _listener = _listener, listener
    try:
        with watching():
            yield
    finally:
        _listener = before


@contextmanager
def compiled_for(capability: int) -> Iterator[None]:
    """Inside the `with` block tiles for tensors on no GPU are those of this compute capability, 80 for sm_80."""
    global _capability
    before, _capability = _capability, capability
    forget()
    try:
        yield
    finally:
        _capability = before
        forget()


def capability(device: torch.device) -> int:
    """A GPU's compute capability, 80 for sm_80; for what is no GPU the one that `compiled_for` says."""
    if device.type != "cuda":
        return _capability
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """A GPU's multiprocessors; for what is no GPU those of an H100 or H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def parts_of_image(pixels: int, columns: int, tile: int, device: torch.device) -> tuple[int, int]:
    """(parts of an image, pixels of a part, whole tiles): with `columns` programs each, three for a multiprocessor.

    A part has eight tiles or more where the image has: what a program does once, and the sums that it leaves, weigh
    little then.
    """
    if INTERPRETED:
        parts = 2 if pixels > tile else 1
    else:
        parts = min(cdiv(3 * processors(device), columns), cdiv(pixels, 8 * tile))
    part = tile * cdiv(cdiv(pixels, parts), tile)
    return cdiv(pixels, part), part


def forget() -> None:
    """Read the tables anew at the next launch."""
    _answers.clear()
    of.cache_clear()
    renew()


@cache
def of(device: torch.device) -> tuple[Table, ...]:
    """The tables that answer for a device, the first one first; files that can't be used are named in a warning."""
    if INTERPRETED or device.type != "cuda":
        return ()
    name, family = torch.cuda.get_device_name(device), f"sm_{capability(device)}"
    places = [user_file(name), SHIPPED / f"{slug(name)}.json", SHIPPED / f"{family}.json"]
    found = [usable(place, (name, family), own=place == places[0]) for place in places]
    return tuple(table for table in found if table is not None)


def slug(gpu: str) -> str:
    """A GPU's name as a file's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def user_file(gpu: str, folder: Path | None = None) -> Path:
    """A user's table for this GPU: in `folder`, default $XDG_CACHE_HOME/fastmbconv, or ~/.cache/fastmbconv."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return (folder or Path(cache_home) / "fastmbconv") / f"{slug(gpu)}.json"


def usable(path: Path, gpus: tuple[str, ...], own: bool) -> Table | None:
    """The table in a file, or None: quietly where there is no file, with a warning where it is of no use here."""
    try:
        return read(path, gpus, own)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        again = "; `fastmbconv tune MODEL` writes a new one" if own else ""
        warnings.warn(f"{path} is ignored, its tile sizes are not used: {error}{again}", stacklevel=2)
        return None


def read(path: Path, gpus: tuple[str, ...], own: bool) -> Table:
    """The table in a file, for one of these GPUs; a user's own counts for the version that wrote it.

    ValueError says what is wrong with the file, OSError that it can't be read.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not isinstance(content.get("head"), dict):
        raise ValueError("it is no table of tile sizes")
    head = content["head"]
    if head.get("format") != FORMAT:
        raise ValueError(f"its format is {head.get('format')!r}, and this version reads {FORMAT}")
    if head.get("gpu") not in gpus:
        raise ValueError(f"it is for {head.get('gpu')!r}, and this GPU is {gpus[0]!r}")
    version = ".".join(map(str, TRITON))
    if version not in head.get("triton", ()):
        raise ValueError(f"it holds for Triton {head.get('triton')}, and this is {version}")
    if own and head.get("fastmbconv") != __version__:
        raise ValueError(f"fastmbconv {head.get('fastmbconv')} wrote it, and this is {__version__}")
    table = Table(head, content.get("tiles", {}), content.get("memory", {}))
    _check(table)
    return table


def _check(table: Table) -> None:
    if not isinstance(table.tiles, dict) or not isinstance(table.memory, dict):
        raise ValueError("its 'tiles' and 'memory' are no tables")
    for key, entry in table.tiles.items():
        kernel = SPACE.get(key.partition(" ")[0])
        if kernel is None or not isinstance(entry, dict):
            raise ValueError(f"it has an entry {key!r}, which is no kernel's")
        for name, value in entry.items():
            if name not in kernel or type(value) is not int or value not in kernel[name].values:
                allowed = kernel[name].values if name in kernel else tuple(kernel)
                raise ValueError(f"{key!r} has {name} {value!r}: allowed are {', '.join(map(str, allowed))}")
    for key, plan in table.memory.items():
        if plan not in ("fast", "lean"):
            raise ValueError(f"{key!r} has {plan!r}: allowed are 'fast' and 'lean'")


def write(path: Path, table: Table) -> None:
    """Put a table into its file, whole or not at all; OSError where the folder can't be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"head": table.head, "tiles": table.tiles, "memory": table.memory}, indent=1) + "\n"
    with replacing(path) as part:
        part.write_text(text)
