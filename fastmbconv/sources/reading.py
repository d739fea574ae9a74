"""Files and folders of weights, by what is in them: torch's format, safetensors, sharded folders, and what is neither.

Nothing that a file names is imported or run: torch's restricted unpickler reads it, with stand-ins for what it doesn't
know (a training script's options, numpy's numbers), and only tensors and plain values are used.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
RUNS = ("best.pt", "last.pt")  # of `fastmbconv train`, the better one first
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
MOST_STANDINS = 64
HEADER = 8  # bytes of the number that begins a .safetensors file


class CheckpointError(ValueError):
    """A checkpoint can't be read or does not fit a model; the message names the first fault. The model is as it was."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file or folder holds: `content` as it was stored, and what lies beside it."""

    content: Any
    path: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a .safetensors file
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by the names of the files
    notes: tuple[str, ...] = ()


def read_stored(path: str | os.PathLike[str]) -> Stored:
    """The content of a file, or of a folder as Hugging Face, timm or `fastmbconv train` writes it; on the CPU.

    A file is read as what it is, whatever its name ends in.

    Raises:
        CheckpointError: if there is none, or it is no checkpoint, damaged, cut off, or written by other software.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    content, metadata = _read_file(path)
    configs = _configs(path.parent) if path.name in WHOLE else {}
    return Stored(content, path, metadata, configs)


def _read_folder(path: Path) -> Stored:
    for name in INDICES:
        if (path / name).is_file():
            return Stored(_read_shards(path, name), path, {}, _configs(path))
    for name in (*WHOLE, *RUNS):
        if (path / name).is_file():
            content, metadata = _read_file(path / name)
            return Stored(content, path / name, metadata, _configs(path), (f"{path}: {name} is taken",))
    if (path / ".metadata").is_file():
        raise CheckpointError(
            f"{path} is a distributed checkpoint: torch.distributed.checkpoint.format_utils.dcp_to_torch_save writes "
            "it into one file"
        )
    found = sorted(each.name for each in path.iterdir() if each.name.endswith(SUFFIXES) and each.is_file())
    if len(found) == 1:
        content, metadata = _read_file(path / found[0])
        return Stored(content, path / found[0], metadata, _configs(path), (f"{path}: {found[0]} is taken",))
    listed = f"it holds {', '.join(found[:8])}: name one of them" if found else "it holds no checkpoint"
    raise CheckpointError(f"{path} is a folder, and {listed} (expected {', '.join((*WHOLE, *RUNS))})")


def _read_shards(folder: Path, index: str) -> dict[str, Any]:
    """A model in several files, and the index that says which entry is where."""
    table = _read_json(folder / index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{folder / index} has no weight_map")
    content: dict[str, Any] = {}
    for name in sorted(set(table.values())):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / index} names {name}, and there is no such file")
        part, _ = _read_file(folder / name)
        if not isinstance(part, Mapping):
            raise CheckpointError(f"{folder / name} holds a {type(part).__name__}: expected a state dict")
        content.update(part)
    if missing := sorted(set(table) - set(content)):
        raise CheckpointError(f"{folder / index} names {missing[0]}, and no file has it ({len(missing)} in all)")
    return content


def _configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What Hugging Face and timm write beside weights."""
    names = [name for name in ("config.json", "preprocessor_config.json") if (folder / name).is_file()]
    return {name: _read_json(folder / name) for name in names}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}: expected an object")
    return content


def _read_file(path: Path) -> tuple[Any, Mapping[str, str]]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    if (told := _foreign(start)) is not None:
        raise CheckpointError(f"{path} is {told}")
    if (length := _safetensors_length(start, size)) is not None:
        return _read_safetensors(path, length, size)
    if path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80")):
        raise CheckpointError(f"{path} is no .safetensors file, or is cut off or damaged ({size} bytes)")
    return _read_torch(path, size), {}


def _foreign(start: bytes) -> str | None:
    """What a file is that can't be a checkpoint, by its first bytes."""
    text = start.lstrip().lower()
    if not start:
        return "empty (0 bytes): fetch it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not a checkpoint: open its address in a browser, and fetch the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: git lfs pull fetches it"
    known = {
        b"\x89HDF": "an HDF5 file (Keras): expected PyTorch's weights",
        b"\x89PNG": "a picture",
        b"\xff\xd8\xff": "a picture",
        b"\x1f\x8b": "packed with gzip: unpack it first",
        b"BZh": "packed with bzip2: unpack it first",
        b"\xfd7zXZ": "packed with xz: unpack it first",
        b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it first",
        b"\x93NUMPY": "an array of NumPy: expected a state dict",
        b"%PDF": "a PDF",
        b"GGUF": "a GGUF file: expected PyTorch's weights",
    }
    if (told := next((what for magic, what in known.items() if start.startswith(magic)), None)) is not None:
        return told
    return "text (JSON), not a checkpoint" if text.startswith((b'{"', b"{\n", b"[")) else None


def _safetensors_length(start: bytes, size: int) -> int | None:
    """The length of a .safetensors file's header, or None where it is no such file."""
    if len(start) <= HEADER or start[HEADER : HEADER + 1] != b"{":
        return None
    (length,) = struct.unpack("<Q", start[:HEADER])
    return length if 2 <= length < max(size, 100_000_000) else None


def _read_safetensors(path: Path, length: int, size: int) -> tuple[Any, Mapping[str, str]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path} is in the format safetensors: pip install safetensors reads it") from error
    if HEADER + length > size:
        raise CheckpointError(f"{path} is cut off: it has {size} bytes, and its header alone takes {HEADER + length}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is cut off or damaged ({size} bytes): {_first_line(error)}") from error


def _check_sums(path: Path) -> None:
    """CheckpointError for an archive whose bytes have changed: torch's own reader is built not to look."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, ValueError, EOFError, zlib.error) as error:
        if "central directory" in str(error) or not zipfile.is_zipfile(path):
            return  # torch says what is wrong with it
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}") from error
    if name is not None:
        raise CheckpointError(
            f"{path} is damaged: the check sum of {name} is wrong; fetch it again, or if it was stored without sums "
            "(torch.serialization.set_crc32_options(False)), store it with them"
        )


def _read_torch(path: Path, size: int) -> Any:
    _check_sums(path)
    standins: dict[str, Any] = {}
    for _ in range(MOST_STANDINS):
        try:
            # A file object, because torch goes by what a path ends in.
            with path.open("rb") as file, warnings.catch_warnings(), _allowing(standins):
                warnings.simplefilter("ignore")  # torch's remarks on archives of TorchScript, which are refused below
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not _allow(str(error), standins):
                raise CheckpointError(_why_not(path, size, error)) from error
        except Exception as error:  # torch.load raises much: RuntimeError, EOFError, OSError, KeyError, ...
            raise CheckpointError(_why_not(path, size, error)) from error
    raise CheckpointError(f"{path} is no state dict: it names {', '.join(list(standins)[:4])}, ...")


def _allowing(standins: Mapping[str, Any]) -> AbstractContextManager[None]:
    return torch.serialization.safe_globals([(standin, name) for name, standin in standins.items()])


def _why_not(path: Path, size: int, error: Exception) -> str:
    """What is wrong with a file that torch can't load, without torch's advice to switch its protection off."""
    told = str(error)
    if "blocked" in told or "Unsupported global" in told:
        named = re.search(r"GLOBAL ([\w.]+)", told)
        return f"{path} is not read: it wants {named[1] if named else 'code'} to be run, which no weights need"
    if "torch.distributed.tensor" in told:
        return f"{path} holds DTensors of a sharded model: store its full state dict"
    if "TorchScript" in told or "torchscript" in told:
        return f"{path} is a TorchScript archive: store model.state_dict() of the model that it was made from"
    if isinstance(error, PermissionError):
        return f"{path} can't be read: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"{path} can't be read: it needs more memory than there is"
    if "persistent_load of storage" in told:
        return f"{path} holds a whole model in an old format: store model.state_dict()"
    if "central directory" in told or isinstance(error, EOFError):
        return f"{path} is cut off: its end is missing ({size} bytes)"
    return f"{path} is no checkpoint, or is cut off or damaged ({size} bytes)"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Standin:
    """In the place of a class or function that a file names: it takes everything, and does nothing."""

    name: str

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # Attributes may be called as methods are (a Namespace has them from a command line): they are kept apart.
        self.__dict__["attributes"] = dict(state) if isinstance(state, Mapping) else {}


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of an object that a stand-in was read for, {} for everything else."""
    return dict(vars(value).get("attributes", {})) if isinstance(value, Standin) else {}


def name_of(value: Any) -> str:
    """What a value is called: its own type, or the one that its file names."""
    return type(value).name if isinstance(value, Standin) else type(value).__name__


def _allow(told: str, standins: dict[str, Any]) -> bool:
    """Put a stand-in in the place of what the unpickler refused; False where it is none of these cases."""
    if (named := re.search(r"add_safe_globals\(\[([\w.]+)\]\)", told)) is not None:
        names = [named[1], f"builtins.{named[1]}"]
        if names[0] in standins:
            return False
        standins.update({name: _standin(name, Standin.__new__) for name in names})
        return True
    # A subclass of dict or list is filled entry by entry, which torch allows for the plain types only.
    if (filled := re.search(r"Can only (SETITEM|APPEND|extend|append).*<class '(standin [\w.]+)'>", told)) is not None:
        name = filled[2].removeprefix("standin ")
        plain = OrderedDict if filled[1] == "SETITEM" else list
        standins[name] = _standin(name, lambda cls, *_: plain())
        return True
    return False


def _standin(name: str, new: Callable[..., Any]) -> type[Standin]:
    module, _, last = f"standin {name}".rpartition(".")
    return type(last, (Standin,), {"__new__": new, "__module__": module, "__qualname__": last, "name": name})
