"""Convolution with a block-sparse weight in library calls: the ``torch`` implementation.

The pixels of some images are laid in one line, zeros between them, the channels of a block side by
side. Under one tap every output then meets the pixel a constant number of places further on (with
a stride: within one of its remainders), so a stored block is one product of two views, added to the
outputs of its block row: nothing is gathered. What outputs there are at the zeros between images is
dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from ._scratch import scratch_parts
from .conv_geometry import ConvGeometry, Pair

_PLACES = 1 << 14  # of images that are computed together; bounds the memory kept between calls
_LOOP = 512  # outputs from which a call for each block pays
_TRANSPOSED = 1 << 11  # outputs of a block that are transposed at a time
_GATHERED = 1 << 20  # elements that a batch gathers and writes
# What costs time beside the products, in multiply-adds of the dense layer.
_CALL = 12_000_000  # a call
_COPY = 12  # an element that is copied to the line or from it
_VISIT = 600  # an output that a block meets
_FEW = 8  # channels of which, unless they lie side by side, the dense layer makes a quarter as many

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


class _Blocks:
    """The stored blocks of a weight, in a layer of some geometry.

    Attributes:
        rows, cols: block rows of a group, block columns of a tap.
        starts: where each block row starts.
        values: 0 beyond a ragged edge.
        overhangs: whether blocks reach beyond the channels of a group.
    """

    def __init__(self, values: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, geometry):
        self.nnz, self.bn, self.bk = values.shape
        self.geometry: ConvGeometry = geometry
        self.rows, self.cols = geometry.blocks((self.bn, self.bk))
        self.starts, self.col, self.crow = crow.tolist(), col[: self.nnz], crow
        last_n = geometry.out_per_group - (self.rows - 1) * self.bn
        last_k = geometry.in_per_group - (self.cols - 1) * self.bk
        self.overhangs = last_k < self.bk
        if last_n < self.bn or self.overhangs:  # beyond the edge anything may be stored
            row, col = self.row % self.rows, self.col % self.cols
            n = torch.arange(self.bn, device=col.device)[:, None]
            k = torch.arange(self.bk, device=col.device)
            outside = ((row == self.rows - 1)[:, None, None] & (n >= last_n)) | (
                (col == self.cols - 1)[:, None, None] & (k >= last_k)
            )
            values = values.masked_fill(outside, 0)
        self.values = values

    @cached_property
    def row(self) -> torch.Tensor:
        """``[nnz]``, the block row of each block."""
        return torch.repeat_interleave(self.crow.diff(), output_size=self.nnz)


class _Lines:
    """Memory for what blocks read: ``[phases, groups, blocks, places, bk]`` of some images."""

    def __init__(self, memory: torch.Tensor, blocks: _Blocks, line: _Line):
        self.memory, self.blocks, self.line = memory, blocks, line

    def met(self) -> list[torch.Tensor]:
        """What each block meets: ``[outputs, bk]``, a view."""
        blocks, line, found = self.blocks, self.line, []
        columns = blocks.col.tolist()
        for group in range(blocks.geometry.groups):
            first, end = (blocks.starts[(group + i) * blocks.rows] for i in (0, 1))
            views = {}
            for column in columns[first:end]:
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
    crow: torch.Tensor,
    col: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    memory_format: torch.memory_format,
) -> torch.Tensor:
    """The same in library calls, for any block, on ``x [B, C, H, W]`` with any strides."""
    wide = _wide(x.dtype)
    blocks = _Blocks(values.to(wide), crow, col, geometry)
    bias = None if bias is None else bias.to(wide)
    shape = (len(x), geometry.out_channels, *geometry.out_size(x.shape[2:]))
    if _is_dense_faster(blocks, x, shape):
        return _dense(x, blocks, bias, activation, memory_format)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    for part, line in _bands(geometry, x):
        in_batches = line.outputs < _LOOP
        step = _batch(blocks, line) if in_batches else 0
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
            _in_batches(lines, sums, gathered, products)
        else:
            _by_block(lines, sums)
        _finish(sums, line, bias, activation, out[part], geometry.groups)
    return out


def _is_dense_faster(blocks: _Blocks, x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the dense layer is: measured on two AVX2 cores, with 1x1 to 64x64 blocks."""
    geometry, (images, channels, height, width) = blocks.geometry, shape
    outputs = images * height * width
    dense = outputs * geometry.in_per_group * geometry.taps * channels
    if geometry.in_per_group < _FEW and not _is_channels_last(x):
        dense *= 4
    copied = x.numel() + outputs * channels
    products = blocks.nnz * outputs * (blocks.bn * blocks.bk + _VISIT)
    return _CALL + _COPY * copied + products > dense


def _dense(x: torch.Tensor, blocks: _Blocks, bias, activation: str, memory_format) -> torch.Tensor:
    """The dense layer, zeros filled in."""
    geometry, weight = blocks.geometry, _dense_weight(blocks, memory_format)
    padded, padding = _padded(x.to(weight.dtype), geometry)
    out = F.conv2d(
        padded, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups
    )
    if activation != "none":
        out = _IN_PLACE[activation](out)
    return out.to(x.dtype).contiguous(memory_format=memory_format)


def _dense_bwd(dout, x, blocks: _Blocks, dx, dvalues) -> None:
    geometry, (bn, bk) = blocks.geometry, (blocks.bn, blocks.bk)
    weight = _dense_weight(blocks, torch.contiguous_format)
    padded, padding = _padded(x.to(weight.dtype), geometry)
    needs = [dx is not None, dvalues is not None, False]
    dpadded, dw, _ = torch.ops.aten.convolution_backward(
        dout.to(weight.dtype), padded, weight, None, geometry.stride, padding, geometry.dilation,
        False, (0, 0), geometry.groups, needs,
    )  # fmt: skip
    if dx is not None:
        top, left = geometry.before if padded.shape != x.shape else (0, 0)
        dx.copy_(dpadded[:, :, top : top + x.shape[2], left : left + x.shape[3]])
    if dvalues is not None:
        groups, rows, cols, taps = geometry.groups, blocks.rows, blocks.cols, geometry.taps
        dw = dw.reshape(groups, geometry.out_per_group, geometry.in_per_group, taps)
        beyond = (cols * bk - geometry.in_per_group, rows * bn - geometry.out_per_group)
        dw = F.pad(dw, (0, 0, 0, beyond[0], 0, beyond[1]))
        dw = dw.view(groups, rows, bn, cols, bk, taps).permute(0, 1, 5, 3, 2, 4)
        dvalues.copy_(dw.reshape(groups * rows, taps * cols, bn, bk)[blocks.row, blocks.col])


def _dense_weight(blocks: _Blocks, memory_format: torch.memory_format) -> torch.Tensor:
    """``[O, C / groups, *kernel]``, zeros filled in."""
    geometry, (bn, bk) = blocks.geometry, (blocks.bn, blocks.bk)
    groups, rows, cols, taps = geometry.groups, blocks.rows, blocks.cols, geometry.taps
    weight = blocks.values.new_zeros(groups * rows, taps * cols, bn, bk)
    weight[blocks.row, blocks.col] = blocks.values
    weight = weight.view(groups, rows, taps, cols, bn, bk).permute(0, 1, 4, 3, 5, 2)
    weight = weight.reshape(groups, rows * bn, cols * bk, *geometry.kernel)
    weight = weight[:, : geometry.out_per_group, : geometry.in_per_group].flatten(0, 1)
    return weight.contiguous(memory_format=memory_format)


def _padded(x: torch.Tensor, geometry: ConvGeometry) -> tuple[torch.Tensor, Pair]:
    """The images, and how many zeros are still missing on either side."""
    if geometry.before == geometry.after:
        return x, geometry.before
    (top, left), (bottom, right) = geometry.before, geometry.after
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def _by_block(lines: _Lines, sums: torch.Tensor) -> None:
    """One product per block, added to the sums of its block row."""
    blocks, outputs = lines.blocks, lines.line.outputs
    targets = sums.flatten(0, 1)[:, :outputs].unbind(0)
    met, factors = lines.met(), blocks.values.transpose(1, 2).unbind(0)
    for target, (first, end) in zip(targets, itertools.pairwise(blocks.starts), strict=True):
        if first == end:
            target.zero_()
            continue
        torch.mm(met[first], factors[first], out=target)
        for i in range(first + 1, end):
            torch.addmm(target, met[i], factors[i], out=target)


def _in_batches(
    lines: _Lines, sums: torch.Tensor, gathered: torch.Tensor, products: torch.Tensor
) -> None:
    """Batches of products: for small ones a call for each costs more than gathering."""
    blocks, outputs = lines.blocks, lines.line.outputs
    factors, step = blocks.values.transpose(1, 2), max(1, len(gathered))
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
    crow: torch.Tensor,
    col: torch.Tensor,
    geometry: ConvGeometry,
    dx: torch.Tensor | None,
    dvalues: torch.Tensor | None,
) -> None:
    """Fill ``dx [B, C, H, W]``, any strides, and ``dvalues [nnz, bn, bk]``; or one of them."""
    wide = _wide(x.dtype)
    blocks = _Blocks(values.to(wide), crow, col, geometry)
    if _is_dense_faster(blocks, x, tuple(dout.shape)):
        return _dense_bwd(dout, x, blocks, dx, dvalues)
    gradients = None
    if dvalues is not None:
        gradients = torch.zeros(values.shape, dtype=wide, device=x.device)
    for part, line in _bands(geometry, x):
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
        lines, factors = _Lines(x_lines, blocks, line), blocks.values.unbind(0)
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
    if dvalues is not None:
        dvalues.copy_(gradients)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Sums run in it."""
    return torch.promote_types(dtype, torch.float32)


def _is_channels_last(t: torch.Tensor) -> bool:
    return t.stride(1) == 1


def _bands(geometry: ConvGeometry, x: torch.Tensor) -> Iterator[tuple[slice, _Line]]:
    """Images that are computed together, and their line."""
    images, _, *size = x.shape
    one = _Line(geometry, (size[0], size[1]), 1)
    step = min(images, max(1, _PLACES // one.count))
    line = None
    for start in range(0, images, max(1, step)):
        count = min(step, images - start)
        if line is None or line.images != count:
            line = _Line(geometry, (size[0], size[1]), count)
        yield slice(start, start + count), line


def _batch(blocks: _Blocks, line: _Line) -> int:
    """How many blocks are gathered at a time."""
    return min(blocks.nnz, max(1, _GATHERED // (line.outputs * (blocks.bn + blocks.bk))))


def _scratch_lines(sizes, by_place: list[bool], dtype, device) -> list[torch.Tensor]:
    """Tensors ``[..., places, side]``; without ``by_place`` the places lie side by side."""
    shapes = [
        (*lead, places, side) if whole else (*lead, side, places)
        for (*lead, places, side), whole in zip(sizes, by_place, strict=True)
    ]
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


def _lay(x: torch.Tensor, lines: torch.Tensor, line: _Line, blocks: _Blocks) -> None:
    """Copy pixels to their places, and zeros around them."""
    if blocks.overhangs:
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
