"""What a call of a convolution asks for, as its geometry; wrong arguments are refused."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .conv_geometry import ConvGeometry


def geometry_of(
    channels: int,
    out_channels: int,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    axes: int,
) -> ConvGeometry:
    """The geometry that a call's arguments ask for.

    Args:
        channels: of ``x``.
        axes: 1 or 2; of one, images are of one line.

    Raises:
        ValueError: an argument that is no such number, or too small.
    """
    for name, size in (("groups", groups), ("out_channels", out_channels)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an int >= 1, got {size!r}")
    taps = _numbers("kernel_size", kernel_size, axes, 1)
    steps = _numbers("stride", stride, axes, 1)
    apart = _numbers("dilation", dilation, axes, 1)
    if isinstance(padding, str):
        before, after = _named_padding(padding, taps, steps, apart)
    else:
        before = after = _numbers("padding", padding, axes, 0)
    # sizes that a tracer follows are no keys
    traced = torch.compiler.is_compiling() or type(channels) is not int
    make = _made_geometry if traced else _kept_geometry
    return make(channels, out_channels, taps, steps, before, after, apart, groups)


def _made_geometry(
    channels: int, out_channels: int, taps: tuple[int, ...], steps: tuple[int, ...],
    before: tuple[int, ...], after: tuple[int, ...], apart: tuple[int, ...], groups: int,
) -> ConvGeometry:  # fmt: skip
    """With a vertical axis of one line where there is none."""
    kernel, stride, dilation = (_pair(t, 1) for t in (taps, steps, apart))
    padding = _pair(before, 0), _pair(after, 0)
    return ConvGeometry(channels, out_channels, kernel, stride, *padding, dilation, groups)


_kept_geometry = functools.lru_cache(maxsize=1024)(_made_geometry)


def _numbers(name: str, given: Any, count: int, least: int) -> tuple[int, ...]:
    """``given`` as ``count`` ints; one stands for all of them."""
    if type(given) is int and given >= least:
        return (given,) * count
    if type(given) is tuple and len(given) == count == 2:
        first, second = given
        if type(first) is type(second) is int and first >= least <= second:
            return given
    found = tuple(given) if isinstance(given, Sequence) else (given,)
    if len(found) == 1:
        found *= count
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in found)
    if len(found) != count or not whole or min(found) < least:
        kind = "an int" if count == 1 else f"an int or {count} ints"
        raise ValueError(f"{name} must be {kind} >= {least}, got {given!r}")
    return found


def _pair(numbers: tuple[int, ...], vertical: int) -> tuple[int, int]:
    return numbers if len(numbers) == 2 else (vertical, numbers[0])


def _named_padding(
    padding: str, taps: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Zeros before and after the image, along each axis."""
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
    if padding == "same" and max(stride) > 1:
        raise ValueError(f"padding 'same' needs a stride of 1, got {stride}")
    reach = [d * (n - 1) if padding == "same" else 0 for n, d in zip(taps, dilation, strict=True)]
    before = tuple(n // 2 for n in reach)
    return before, tuple(n - b for n, b in zip(reach, before, strict=True))
