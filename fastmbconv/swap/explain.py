"""What `explain` tells: a row for each block, with the path that it takes and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import Any, Literal

from torch import nn

from fastmbconv import dispatch
from fastmbconv.block import Block, DenseBlock
from fastmbconv.checks import check_model
from fastmbconv.swap.ends import End, ends_of
from fastmbconv.swap.fused import FusedBlock, fusible, is_fused, read
from fastmbconv.swap.registry import adapter_of
from fastmbconv.swap.runs import runs_of, shell_of
from fastmbconv.swap.saving import Saving, end_saving, input_shapes, saving
from fastmbconv.swap.table import table
from fastmbconv.swap.written import Found, find, read_written

Shapes = dict[nn.Module, tuple[int, int, int, int]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a block, or of a stem's or a head's convolution; None where they can't be told."""

    channels: tuple[int, ...] | None
    kernel_size: int | None
    stride: int | None
    squeeze_excite: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One block, or a stem or a head, which `block` then says.

    `path` is what `fuse` has made of it, `reason` says why not ("" if fused).
    `runs` is what a call runs in the present environment: "kernels", or "eager" and why. `saving` is what the kernels
    save, or would save if nothing kept the block from them; None for a block that can't be fused, and for a
    stem or a head in training.
    """

    name: str
    block: str
    geometry: Geometry
    path: Literal["fused", "eager"]
    reason: str
    runs: str
    saving: Saving | None


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """The rows of `explain`; prints as a table. `len`, iteration and `fused` (how many are) work on the blocks' rows.

    `ends` are rows too, of the model's stem and head, and of other convolutions with BatchNorm and activation outside
    of the blocks ("between" two of them): those are no blocks, and aren't counted as such.
    """

    rows: tuple[Row, ...]
    ends: tuple[Row, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def fused(self) -> int:
        return sum(row.path == "fused" for row in self.rows)

    def __repr__(self) -> str:
        return self.table(get_terminal_size((200, 0)).columns)

    def table(self, width: int = 200) -> str:
        """The rows, the reasons once each, and the sums, in lines of up to `width` characters.

        Columns that don't fit are left out, the least useful first.
        """
        return table(self.rows, width, self.ends) + (f"\n{self.summary()}" if self.rows else "")

    def summary(self) -> str:
        """One line: how many blocks are fused, and what they run here."""
        line = f"{self.fused} of {len(self.rows)} blocks fused"
        runs = {row.runs for row in self.rows if row.path == "fused"}
        if not runs:
            return line
        return f"{line}; here they run {' or '.join(sorted(runs))}"


def explain(model: nn.Module, input_shape: tuple[int, int, int, int] | None = None) -> Explanation:
    """A row for each block of a model: fused or eager, why, what the kernels save, and what a call runs here.

    Its stem and its head have rows in `ends`, and aren't counted with the blocks.

    Args:
        model: any module; a block itself too. Its mode decides: what a training step saves, or what a forward does.
        input_shape: [N, C, H, W] of the images that the model gets. With it the saving is told in bytes, in the
            model's own dtype; without it only in passes over each block's expanded tensor. The model's forward runs
            once for the shapes of its blocks, on meta tensors: nothing is computed, and nothing of the model changes.

    Raises:
        TypeError: for a model that is no nn.Module.
        ValueError: for an input_shape that the model does not run on.
    """
    check_model(model)
    found = find(model)
    ends = ends_of(model, found)
    wanted = [module for module in model.modules() if _may_begin_block(module)]
    wanted += [module for end in ends for module in (end.conv, end.norm) if module is not None]
    shapes = {} if input_shape is None else input_shapes(model, wanted, input_shape)
    names = {module: name for name, module in model.named_modules()}
    return Explanation(rows(model, shapes, found), tuple(_end_row(names[end.module], end, shapes) for end in ends))


def rows(model: nn.Module, shapes: Shapes, found: list[Found] | None = None) -> tuple[Row, ...]:
    """A row for each known block, each that is found by structure, and each module that looks like one."""
    found = find(model) if found is None else found
    written = {each.module: each for each in found if each.holder is None}
    runs = [each for each in found if each.holder is not None]
    rows = []
    for name, module in model.named_modules():
        if adapter_of(type(module)) is not None:
            rows.append(_row(name, module, shapes.get(module)))
        elif module in written:
            rows.append(_written_row(written[module], shapes.get(module)))
        for run in runs:
            if run.holder is module:
                rows.append(_run_row(run, shapes.get(next(run.module.children()))))
    return tuple(rows)


def _written_row(found: Found, shape: tuple[int, int, int, int] | None) -> Row:
    """Of what isn't fused."""
    module = found.module
    if isinstance(found.ways, str):
        return _eager(found.name, module, found.ways, _guessed_geometry(module))
    block = read_written(found.ways, module)
    if not isinstance(block, Block):
        return _eager(found.name, module, str(block), _guessed_geometry(module))
    saved = saving(block, module.training, shape)
    return _eager(found.name, module, "not fused: fastmbconv.fuse does it", _geometry(block), saved)


def _run_row(found: Found, shape: tuple[int, int, int, int] | None) -> Row:
    holder = found.holder
    assert holder is not None
    for run in runs_of(holder):
        if list(holder.children())[run.begin : run.end] == list(found.module.children()):
            return _row(found.name, shell_of(holder, run), shape)
    return _written_row(found, shape)


def _end_row(name: str, end: End, shapes: Shapes) -> Row:
    conv, norm, reason = end.conv, end.norm, end.reason()
    sized = all(hasattr(conv, each) for each in ("in_channels", "out_channels", "kernel_size", "stride", "weight"))
    geometry = Geometry(None, None, None, False)
    if sized and conv is not None:
        channels = (conv.in_channels, conv.out_channels)
        geometry = Geometry(channels, _first(conv.kernel_size), _first(conv.stride), False)
    now = reason or end.call_reason()
    pooled = end.pooled and reason is None
    saved = None
    if sized and norm is not None and reason is None and not norm.training:
        saved = end_saving(conv, norm, pooled, shapes)
    block = f"{end.role} + pool" if pooled else str(end.role)
    if now is not None or norm is None:
        return Row(name, block, geometry, "eager", str(now), f"eager: {now}", saved)
    here = dispatch.call_reason(norm.running_mean)
    return Row(name, block, geometry, "fused", "", "kernels" if here is None else f"eager: {here}", saved)


def _row(name: str, module: nn.Module, shape: tuple[int, int, int, int] | None) -> Row:
    block = fusible(module)
    saved = None if block is None or isinstance(block, str) else saving(block, module.training, shape)
    geometry = _guessed_geometry(module) if block is None or isinstance(block, str) else _geometry(block)
    adapter = adapter_of(type(module))
    if adapter is not None and is_fused(module):
        live = read(adapter, module)
        if isinstance(live, str):
            return _eager(name, module, live, geometry, saved)
    if not isinstance(block, (Block, DenseBlock)):
        return _eager(name, module, str(block), geometry)
    if not is_fused(module):
        return _eager(name, module, "not fused: fastmbconv.fuse does it", geometry, saved)
    reason = dispatch.supports(block, block.weight if isinstance(block, DenseBlock) else block.project_weight)
    runs = "kernels" if reason is None else f"eager: {reason}"
    return Row(name, _class_name(module), geometry, "fused", "", runs, saved)


def _eager(name: str, module: nn.Module, reason: str, geometry: Geometry, saved: Saving | None = None) -> Row:
    return Row(name, _class_name(module), geometry, "eager", reason, f"eager: {reason}", saved)


def _class_name(module: nn.Module) -> str:
    cls: Any = type(module)
    return cls.original.__name__ if issubclass(cls, FusedBlock) else cls.__name__


def _geometry(block: Block | DenseBlock) -> Geometry:
    if isinstance(block, DenseBlock):
        channels = (block.in_channels, block.weight.shape[0], block.out_channels)
        return Geometry(channels, block.kernel_size, block.stride, block.se is not None)
    hidden, out = block.depthwise_weight.shape[0], block.project_weight.shape[0]
    return Geometry((block.in_channels, hidden, out), block.kernel_size, block.stride, block.se is not None)


def _may_begin_block(module: nn.Module) -> bool:
    """Whether a block's input is this module's."""
    return adapter_of(type(module)) is not None or bool(module._modules) or isinstance(module, nn.Conv2d)


def _convolutions(module: nn.Module) -> list[Any]:
    """Anything that convolves, torch's or not."""
    wanted = ("in_channels", "out_channels", "kernel_size", "stride", "groups")
    return [leaf for leaf in module.modules() if all(hasattr(leaf, name) for name in wanted)]


def _guessed_geometry(module: nn.Module) -> Geometry:
    """Sizes from the convolutions in their order; the depthwise one, else the widest, tells kernel and stride.

    A block has at most two layers that mix channels; what has more has a squeeze-excite.
    """
    convs = _convolutions(module)
    mixing = [conv for conv in convs if _first(conv.kernel_size) == 1 and conv.groups == 1]
    squeeze_excite = len(mixing) + sum(isinstance(each, nn.Linear) for each in module.modules()) > 2
    if not convs:
        return Geometry(None, None, None, squeeze_excite)
    main = next(filter(_is_depthwise, convs), None) or max(convs, key=lambda conv: _first(conv.kernel_size))
    channels = (convs[0].in_channels, main.out_channels, convs[-1].out_channels)
    return Geometry(channels, _first(main.kernel_size), _first(main.stride), squeeze_excite)


def _first(size: Any) -> int:
    return size[0] if isinstance(size, (tuple, list)) else size


def _is_depthwise(conv: Any) -> bool:
    return conv.groups == conv.in_channels > 1
