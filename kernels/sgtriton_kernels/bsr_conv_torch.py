"""Convolution with a block-sparse weight in library calls: the ``torch`` implementation.

The pixels of some images are laid in one line, zeros between them, the channels of a block side by
side. Under one tap every output then meets the pixel a constant number of places further on (with
a stride: within one of its remainders), so a stored block is one product of two views, added to the
outputs of its block row: nothing is gathered. What outputs there are at the zeros between images is
dropped.

Forward has three ways, backward the first and the second of them:

- *dense*: the dense layer, zeros filled in. For small layers, and where few blocks are closed.
- *loop*, of backward *lines*: a product for each block, straight into the sums. Images are computed
  some at a time, so that their lines stay in the cache.
- *batches*: what the blocks meet is gathered and multiplied by one batched product. For few
  outputs, beside which a call for each block costs more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from ._scratch import scratch_parts
from .candidate import Candidate
from .conv_blocks import ConvBlocks
from .conv_geometry import ConvGeometry, Pair

PLACES = 1 << 14  # of images that are computed together; a larger image has a line of its own
GATHERED = 1 << 20  # elements that a batch gathers and writes
_KEPT = 64 << 20  # bytes of lines that are kept for the next call
_TRANSPOSED = 1 << 11  # outputs of a block that are transposed at a time

_IN_PLACE = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": lambda y: torch.ops.aten.gelu_(y, approximate="tanh"),
    "silu": lambda y: F.silu(y, inplace=True),
}


@dataclass(frozen=True)
class _Axis:
    """One axis of the images: where pixels and taps lie along it.

    Padded position ``u`` is place ``u // stride`` of phase ``u % stride``. Where the stride is 1,
    neighbouring lines share the zeros between them.

    Args:
        size, out: pixels before and after the convolution.
        stride, before, dilation: of the geometry.
        used: padded positions that some tap meets.
        period: places from one line to the next.
    """

    size: int
    out: int
    stride: int
    before: int
    dilation: int
    used: int
    period: int

    @classmethod
    def of(cls, geometry: ConvGeometry, which: int, size: int, out: int) -> _Axis:
        stride, before = geometry.stride[which], geometry.before[which]
        dilation, after = geometry.dilation[which], geometry.after[which]
        used = (out - 1) * stride + (geometry.kernel[which] - 1) * dilation + 1
        # who reads beyond a line's end meets the zeros before the next one
        period = max(size + max(before, after), out) if stride == 1 else -(-used // stride)
        return cls(size, out, stride, before, dilation, used, period)

    def meets(self, tap: int) -> Pair:
        """Phase that outputs meet under a tap, and how many places further on."""
        return tap * self.dilation % self.stride, tap * self.dilation // self.stride

    def copied(self, phase: int) -> tuple[slice, slice]:
        """Which pixels lie in a phase, and at which of its places."""
        first = (phase - self.before) % self.stride
        end = self.size if self.stride == 1 else min(self.size, self.used - self.before)
        count = len(range(first, end, self.stride))
        place = (first + self.before) // self.stride
        return slice(first, max(first, end), self.stride), slice(place, place + count)


class _Line:
    """Some images in one line.

    Attributes:
        taps: of each tap the number of its phase, and how many places on outputs meet pixels.
        phases: (vertical, horizontal), those that some tap meets.
        outputs: places from the first output to the last.
        count: places of all images.
        length: places that are read.
    """

    def __init__(self, geometry: ConvGeometry, size: Pair, images: int):
        out = geometry.out_size(size)
        self.images = images
        self.axes = height, width = (
            _Axis.of(geometry, 0, size[0], out[0]),
            _Axis.of(geometry, 1, size[1], out[1]),
        )
        self.phases: list[Pair] = []
        self.taps: list[Pair] = []
        for tap_y, tap_x in itertools.product(*map(range, geometry.kernel)):
            (phase_y, y), (phase_x, x) = height.meets(tap_y), width.meets(tap_x)
            if (phase_y, phase_x) not in self.phases:
                self.phases.append((phase_y, phase_x))
            phase = self.phases.index((phase_y, phase_x))
            self.taps.append((phase, y * width.period + x))
        lines = (images - 1) * height.period + height.out
        self.outputs = (lines - 1) * width.period + width.out
        self.count = images * height.period * width.period
        self.length = max(self.count, self.outputs + max(place for _, place in self.taps))

    def pixels(self, line: torch.Tensor) -> torch.Tensor:
        """``[..., places, side]`` as ``[..., images, height, width, side]``."""
        height, width = (axis.period for axis in self.axes)
        return line[..., : self.count, :].unflatten(-2, (self.images, height, width))

    def image(self, line: torch.Tensor) -> torch.Tensor:
        """The outputs in a line: ``[..., images, height, width, side]``."""
        height, width = (axis.out for axis in self.axes)
        return self.pixels(line)[..., :height, :width, :]


class _Lines:
    """Memory for what blocks read: ``[phases, groups, blocks, places, bk]`` of some images."""

    def __init__(self, memory: torch.Tensor, blocks: ConvBlocks, line: _Line):
        self.memory, self.blocks, self.line = memory, blocks, line

    def met(self) -> list[torch.Tensor]:
        """What each block meets: ``[outputs, bk]``, a view."""
        blocks, line, found = self.blocks, self.line, []
        for group in range(blocks.geometry.groups):
            first, end = (blocks.starts[(group + i) * blocks.rows] for i in (0, 1))
            views = {}
            for column in blocks.columns[first:end]:
                view = views.get(column)
                if view is None:
                    tap, channels = divmod(column, blocks.cols)
                    phase, place = line.taps[tap]
                    view = self.memory[phase, group, channels, place : place + line.outputs]
                    views[column] = view
                found.append(view)
        return found

    def gather(self, part: slice, into: torch.Tensor) -> None:
        """What some blocks meet, ``[blocks, outputs * bk]``; places must lie side by side."""
        blocks, line, memory = self.blocks, self.line, self.memory
        tap, channels = blocks.col[part] // blocks.cols, blocks.col[part] % blocks.cols
        taps = torch.tensor(line.taps, device=memory.device)[tap]
        group = blocks.row[part] // blocks.rows
        lead = (taps[:, 0] * blocks.geometry.groups + group) * blocks.cols + channels
        size = line.outputs * blocks.bk
        windows = memory.as_strided(
            (memory.numel() // blocks.bk - line.outputs + 1, size), (blocks.bk, 1)
        )
        torch.index_select(windows, 0, lead * line.length + taps[:, 1], out=into)


def bsr_conv_torch(
    x: torch.Tensor,
    values: torch.Tensor,
    blocks: ConvBlocks,
    bias: torch.Tensor | None,
    activation: str,
    candidate: Candidate,
) -> torch.Tensor:
    """The same in library calls, for any block, on ``x [B, C, H, W]`` with any strides."""
    geometry, memory_format = blocks.geometry, result_format(x)
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    if dtype != wide:
        values, bias = values.to(wide), None if bias is None else bias.to(wide)
    size = geometry.out_size(x.shape[2:])
    if candidate.way == "dense":
        return conv_dense(x, values, blocks, bias, activation, memory_format)
    in_batches = candidate.way == "batches"
    places = PLACES if in_batches else candidate.elements or PLACES
    values, shape = blocks.inside(values), (x.shape[0], geometry.out_channels, *size)
    out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
    for part, line in _bands(geometry, x, places):
        step = 0
        if in_batches:
            sides = blocks.bn, blocks.bk
            step = batch(blocks.nnz, line.outputs, sides, candidate.elements or GATHERED)
        lead, outputs = (geometry.groups, blocks.rows), line.outputs
        x_lines, sums, gathered, products = _scratch_lines(
            [
                (len(line.phases), geometry.groups, blocks.cols, line.length, blocks.bk),
                (*lead, line.count, blocks.bn),
                (step, outputs * blocks.bk), (step, outputs * blocks.bn),
            ],
            [in_batches or _is_channels_last(x), True, True, True], wide, x.device,
        )  # fmt: skip
        _lay(x[part], x_lines, line, blocks)
        lines = _Lines(x_lines, blocks, line)
        if in_batches:
            _in_batches(lines, values, sums, gathered, products)
        else:
            _by_block(lines, values, sums)
        _finish(sums, line, bias, activation, out[part], geometry.groups)
    return out


def conv_dense(
    x: torch.Tensor, values: torch.Tensor, blocks: ConvBlocks, bias, activation: str, memory_format
) -> torch.Tensor:
    """The dense layer, zeros filled in."""
    geometry, dtype = blocks.geometry, x.dtype
    padded, padding = _padded(x if dtype == values.dtype else x.to(values.dtype), geometry)
    out = F.conv2d(
        padded, blocks.to_weight(values, memory_format), bias, geometry.stride, padding,
        geometry.dilation, geometry.groups,
    )  # fmt: skip
    if activation != "none":
        out = _IN_PLACE[activation](out)
    out = out if dtype == values.dtype else out.to(dtype)
    return out.contiguous(memory_format=memory_format)


def conv_dense_bwd(
    dout, x: torch.Tensor, values: torch.Tensor, blocks: ConvBlocks, needs: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``dx`` and ``dvalues``, both in the dtype of ``values``."""
    geometry, wide = blocks.geometry, values.dtype
    if dout.dtype != wide:
        dout, x = dout.to(wide), x.to(wide)
    padded, padding = _padded(x, geometry)
    if needs[0]:
        weight = blocks.to_weight(values, torch.contiguous_format)
    else:  # of which its own gradient reads the size alone
        shape = geometry.out_channels, geometry.in_per_group, *geometry.kernel
        weight = values.new_empty(shape)
    dx, dw, _ = torch.ops.aten.convolution_backward.default(
        dout, padded, weight, None, geometry.stride, padding, geometry.dilation, False, (0, 0),
        geometry.groups, (*needs, False),
    )  # fmt: skip
    if dx is not None and padded is not x:
        top, left = (n - m for n, m in zip(geometry.before, padding, strict=True))
        dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return dx, None if dw is None else blocks.of_weight(dw)


def _padded(x: torch.Tensor, geometry: ConvGeometry) -> tuple[torch.Tensor, Pair]:
    """The images with what one side has more of zeros, and how many are missing on either."""
    if geometry.before == geometry.after:
        return x, geometry.before
    (top, left), (bottom, right) = geometry.before, geometry.after
    height, width = min(top, bottom), min(left, right)
    return F.pad(x, (left - width, right - width, top - height, bottom - height)), (height, width)


def _by_block(lines: _Lines, values: torch.Tensor, sums: torch.Tensor) -> None:
    """One product per block, added to the sums of its block row."""
    blocks, outputs = lines.blocks, lines.line.outputs
    targets = sums.flatten(0, 1)[:, :outputs].unbind(0)
    met, factors = lines.met(), values.transpose(1, 2).unbind(0)
    for target, (first, end) in zip(targets, itertools.pairwise(blocks.starts), strict=True):
        if first == end:
            target.zero_()
            continue
        torch.mm(met[first], factors[first], out=target)
        for i in range(first + 1, end):
            torch.addmm(target, met[i], factors[i], out=target)


def _in_batches(
    lines: _Lines,
    values: torch.Tensor,
    sums: torch.Tensor,
    gathered: torch.Tensor,
    products: torch.Tensor,
) -> None:
    """Batches of products: for small ones a call for each costs more than gathering."""
    blocks, outputs = lines.blocks, lines.line.outputs
    factors, step = values.transpose(1, 2), max(1, len(gathered))
    sums = sums.flatten(0, 1)[:, :outputs].flatten(1)
    sums.zero_()
    for first in range(0, blocks.nnz, step):
        part = slice(first, min(first + step, blocks.nnz))
        count = part.stop - first
        a, product = gathered[:count], products[:count]
        lines.gather(part, a)
        torch.bmm(
            a.view(count, outputs, blocks.bk), factors[part],
            out=product.view(count, outputs, blocks.bn),
        )  # fmt: skip
        sums.index_add_(0, blocks.row[part], product)


def bsr_conv_bwd_torch(
    dout: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    blocks: ConvBlocks,
    dx_way: str | None,
    dvalues_way: str | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``dx [B, C, H, W]``, in memory as a result of ``x``, and ``dvalues [nnz, bn, bk]``.

    Args:
        dx_way, dvalues_way: ``"dense"`` | ``"lines"``; ``None`` where nobody needs the gradient.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    wide_values = values if dtype == wide else values.to(wide)
    # In a line a product that does not exist has a factor 0, which infinity makes NaN. It shows in
    # gradients that are few beside what was multiplied for them, and the dense layer says which.
    # Not on a card, where asking waits for all that was launched: there NaN may stand for more.
    if dx_way == "lines" and x.is_cpu and not _is_finite(wide_values):
        dx_way = "dense"
        dvalues_way = dvalues_way and "dense"
    given, found = (dout, x, wide_values, blocks), {}
    for way, compute in (("dense", conv_dense_bwd), ("lines", _lines_bwd)):
        needs = dx_way == way, dvalues_way == way
        found[way] = compute(*given, needs) if any(needs) else (None, None)
    dx = found["dense"][0] if dx_way == "dense" else found["lines"][0]
    dvalues = found["dense"][1] if dvalues_way == "dense" else found["lines"][1]
    if dvalues_way == "lines" and x.is_cpu and not _is_finite(dvalues):
        _, dvalues = conv_dense_bwd(*given, (False, True))
    if dx is not None:
        dx = (dx if dtype == wide else dx.to(dtype)).contiguous(memory_format=result_format(x))
    if dvalues is not None and dtype != wide:
        dvalues = dvalues.to(dtype)
    return dx, dvalues


def _lines_bwd(
    dout, x: torch.Tensor, values: torch.Tensor, blocks: ConvBlocks, needs: tuple[bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``dx`` in its own dtype, ``dvalues`` in that of ``values``."""
    (need_dx, need_dvalues), geometry, wide = needs, blocks.geometry, values.dtype
    values = blocks.inside(values)
    dx = torch.empty_like(x, memory_format=result_format(x)) if need_dx else None
    gradients = torch.zeros_like(values) if need_dvalues else None
    for part, line in _bands(geometry, x, PLACES):
        x_lines, dy_lines = _scratch_lines(
            [
                (len(line.phases), geometry.groups, blocks.cols, line.length, blocks.bk),
                (geometry.groups, blocks.rows, line.count, blocks.bn),
            ],
            [_is_channels_last(x), _is_channels_last(dout)], wide, x.device,
        )  # fmt: skip
        dy_lines.zero_()
        for channels, which, width in _pieces(geometry.out_per_group, blocks.bn):
            into = line.image(dy_lines[:, which])[..., :width]
            into.copy_(_of_blocks(dout[part], geometry.groups, channels, width))
        lines, factors = _Lines(x_lines, blocks, line), values.unbind(0)
        rows = dy_lines.flatten(0, 1)[:, : line.outputs].unbind(0)
        met = lines.met()
        if gradients is not None:
            _lay(x[part], x_lines, line, blocks)
            of_block = gradients.unbind(0)
            for dy, (first, end) in zip(rows, itertools.pairwise(blocks.starts), strict=True):
                for i in range(first, end):
                    torch.addmm(of_block[i], dy.t(), met[i], out=of_block[i])
        if dx is not None:
            x_lines.zero_()
            for dy, (first, end) in zip(rows, itertools.pairwise(blocks.starts), strict=True):
                for i in range(first, end):
                    torch.addmm(met[i], dy, factors[i], out=met[i])
            _take(dx[part], x_lines, line, geometry.groups, blocks.bk)
    return dx, gradients


def _is_finite(t: torch.Tensor) -> bool:
    """Whether all of it is; ``False`` too where the sum passes the largest number."""
    return math.isfinite(t.sum().item())


def result_format(x: torch.Tensor) -> torch.memory_format:
    """How a convolution of PyTorch lays out its result; what its own Python rule says, quicker."""
    if x.stride(1) > x.stride(3):
        return torch.contiguous_format
    return suggest_memory_format(x)


def _is_channels_last(t: torch.Tensor) -> bool:
    return t.stride(1) == 1


@lru_cache(maxsize=256)
def _line(geometry: ConvGeometry, size: Pair, images: int) -> _Line:
    return _Line(geometry, size, images)


def _bands(geometry: ConvGeometry, x: torch.Tensor, places: int) -> Iterator[tuple[slice, _Line]]:
    """Images that are computed together, and their line."""
    images, _, height, width = x.shape
    step = images_at_once(geometry, (height, width), images, places)
    for start in range(0, images, step):
        count = min(step, images - start)
        yield slice(start, start + count), _line(geometry, (height, width), count)


def images_at_once(geometry: ConvGeometry, size: Pair, images: int, places: int = PLACES) -> int:
    """Images that are computed together: as many as fit ``places``, shared evenly."""
    most = min(images, max(1, places // _line(geometry, size, 1).count))
    return -(-images // -(-images // most)) if images else 1


def outputs_at_once(geometry: ConvGeometry, size: Pair, images: int) -> int:
    """Outputs that a product with a block makes, zeros between images among them."""
    return _line(geometry, size, images_at_once(geometry, size, images)).outputs


def batch(nnz: int, outputs: int, block: Pair, elements: int) -> int:
    """How many blocks are gathered at a time."""
    return min(nnz, max(1, elements // (outputs * sum(block))))


def _scratch_lines(sizes, by_place: list[bool], dtype, device) -> list[torch.Tensor]:
    """Tensors ``[..., places, side]``; without ``by_place`` the places lie side by side."""
    shapes = [
        (*lead, places, side) if whole else (*lead, side, places)
        for (*lead, places, side), whole in zip(sizes, by_place, strict=True)
    ]
    if sum(map(math.prod, shapes)) * dtype.itemsize > _KEPT:
        lines = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    else:
        lines = scratch_parts(shapes, dtype, device)
    return [t if whole else t.transpose(-1, -2) for t, whole in zip(lines, by_place, strict=True)]


def _pieces(channels: int, side: int) -> Iterator[tuple[slice, slice, int]]:
    """Channels of a group, their blocks, and a block's width: whole blocks, and what overhangs."""
    whole = channels // side
    if whole:
        yield slice(0, whole * side), slice(0, whole), side
    if channels % side:
        yield slice(whole * side, channels), slice(whole, whole + 1), channels % side


def _of_blocks(t: torch.Tensor, groups: int, channels: slice, width: int) -> torch.Tensor:
    """Some channels of each group of ``t [B, C, H, W]``: ``[groups, blocks, B, H, W, width]``."""
    t = t.unflatten(1, (groups, -1))[:, :, channels].unflatten(2, (-1, width))
    return t.permute(1, 2, 0, 4, 5, 3)


def _images_and_lines(t: torch.Tensor, lines: torch.Tensor, line: _Line, groups: int, side: int):
    """Pairs of views: pixels of ``t [B, C, H, W]``, and their places in ``lines``."""
    for n, (phase_y, phase_x) in enumerate(line.phases):
        (rows, to_rows), (cols, to_cols) = (
            axis.copied(phase) for axis, phase in zip(line.axes, (phase_y, phase_x), strict=True)
        )
        for channels, which, width in _pieces(t.shape[1] // groups, side):
            yield (
                _of_blocks(t, groups, channels, width)[:, :, :, rows, cols],
                line.pixels(lines[n, :, which])[:, :, :, to_rows, to_cols, :width],
            )


def _lay(x: torch.Tensor, lines: torch.Tensor, line: _Line, blocks: ConvBlocks) -> None:
    """Copy pixels to their places, and zeros around them."""
    if blocks.over_k:
        lines.zero_()
    else:
        lines[..., line.count :, :].zero_()
        for n, phases in enumerate(line.phases):
            (_, rows), (_, cols) = (
                axis.copied(phase) for axis, phase in zip(line.axes, phases, strict=True)
            )
            places = line.pixels(lines[n])
            places[:, :, :, : rows.start].zero_()
            places[:, :, :, rows.stop :].zero_()
            places[:, :, :, rows, : cols.start].zero_()
            places[:, :, :, rows, cols.stop :].zero_()
    for pixels, places in _images_and_lines(x, lines, line, blocks.geometry.groups, blocks.bk):
        places.copy_(pixels)


def _take(dx: torch.Tensor, lines: torch.Tensor, line: _Line, groups: int, side: int) -> None:
    stride = [axis.stride for axis in line.axes]
    if stride != [1, 1]:  # pixels that no tap meets
        dx.zero_()
    for pixels, places in _images_and_lines(dx, lines, line, groups, side):
        pixels.copy_(places)


def _finish(lines: torch.Tensor, line: _Line, bias, activation: str, out, groups: int) -> None:
    """Add the bias, apply the activation, and round into ``out [B, O, H', W']``."""
    side = lines.shape[-1]
    per_group, (height, width) = out.shape[1] // groups, out.shape[2:]
    # sums that are transposed are read once for each channel: few at a time, they stay in the cache
    step = height if _is_channels_last(out) else max(1, _TRANSPOSED // width)
    direct = activation == "none" or out.dtype == lines.dtype
    for channels, which, wide in _pieces(per_group, side):
        images, targets = line.image(lines[:, which]), _of_blocks(out, groups, channels, wide)
        added = None
        if bias is not None:
            added = bias.view(groups, per_group)[:, channels].unflatten(1, (-1, wide))
            added = added[:, :, None, None, None]
        for start in range(0, height, step):
            rows = slice(start, start + step)
            sums, target = images[:, :, :, rows, :, :wide], targets[:, :, :, rows]
            if added is not None:
                torch.add(sums, added, out=target if direct else sums)
            elif direct:
                target.copy_(sums)
            if not direct:
                target.copy_(_IN_PLACE[activation](sums))
    if direct and activation != "none":
        _IN_PLACE[activation](out)
