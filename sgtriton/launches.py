"""What a pass launches, as its launcher launches it, to be compiled for cards that are absent.

Types, flags and tiles are not written down a second time: the launcher runs on tensors without
data, and its launches are recorded instead of made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from sgtriton_kernels import bsr_conv_product, bsr_product, gated_product
from sgtriton_kernels.blocks import gate_layout
from sgtriton_kernels.conv_blocks import ChannelLists
from sgtriton_kernels.conv_geometry import ConvGeometry
from sgtriton_kernels.gate_bits import OpenBlocks
from sgtriton_kernels.tiles import BsrTile, GatedTile

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel, and what a launch says of its arguments."""

    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int | None  # None: the compiler's own choice
    max_registers: int | None = None  # likewise

    def function(self):
        """The kernel itself."""
        return getattr(importlib.import_module(self.module), self.kernel)


def launch_of(run: Callable[[], object]) -> Launch:
    """The one launch of a kernel that ``run`` asks for; nothing runs on a device."""
    (launch,) = launches_of(run)
    return launch


def launches_of(run: Callable[[], object]) -> list[Launch]:
    """The launches of kernels that ``run`` asks for, in turn; nothing runs on a device."""
    from triton.runtime.jit import JITFunction, mangle_type
    from triton.tools.tensor_descriptor import TensorDescriptor

    launches: list[Launch] = []

    def record(kernel, *args, grid, warmup, **options):
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
        signature, constexprs = {}, {}
        for parameter in kernel.params:
            value = values[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = mangle_type(value)
            elif parameter.is_constexpr or value is None:
                signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            else:
                assert parameter.do_not_specialize, parameter.name
                signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
        warps, stages = options.pop("num_warps", 4), options.pop("num_stages", None)
        registers = options.pop("maxnreg", None)
        assert not options, options
        launches.append(
            Launch(kernel.module, kernel.__name__, signature, constexprs, warps, stages, registers)
        )

    with mock.patch.object(JITFunction, "run", record):
        run()
    return launches


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data; what the launchers ask of a device is answered as for a card."""
    return torch.empty(shape, dtype=dtype, device="meta")


def bsr_linear_launches(
    which: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    M: int,
    N: int,
    K: int,
    nnz: int,
    tile: BsrTile,
    aligned: bool = True,
    plain: bool = False,
) -> list[Launch]:
    """The launches of a pass of ``bsr_linear``.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dvalues"``.
        dtype: fp32 | fp16 | bf16, of all operands.
        block: ``(bn, bk)``, powers of two >= 16.
        M, N, K: rows of ``x``, outputs, inputs.
        nnz: number of stored blocks.
        tile: what one program computes.
        aligned: ``False`` for rows that lie so that they cannot be read in wide pieces. Sizes that
            16 does not divide cannot be either way.
        plain: whether forward multiplies only; else it adds all that it can.
    """
    rows, cols = -(-N // block[0]), -(-K // block[1])
    apart = 0 if aligned else 1  # elements between the rows of an operand
    x2 = empty(M, K + apart, dtype=dtype)[:, :K]
    dy2 = empty(M, N + apart, dtype=dtype)[:, :N]
    values = empty(nnz, *block, dtype=dtype)
    added, activation = ((None, None), "none") if plain else ((empty(N, dtype=dtype), dy2), "gelu")
    index = functools.partial(empty, dtype=torch.int32)
    crow, ccol, order = index(rows + 1), index(cols + 1), index(rows)
    col, row, perm = index(nnz + 1), index(nnz + 1), index(nnz)
    pairs = bsr_product.PairedRows(
        index(rows // 2 + 1), index(nnz + 1), index(nnz + 1, 2), index(rows // 2)
    )
    run = {
        "pairs": lambda: bsr_product.bsr_linear_fwd_pairs(
            x2, values, pairs, *added, N, activation, tile
        ),
        "fwd": lambda: bsr_product.bsr_linear_fwd(
            x2, values, crow, col, order, *added, N, activation, tile
        ),
        "dx": lambda: bsr_product.bsr_linear_dx(dy2, values, ccol, row, perm, K, tile),
        "dvalues": lambda: bsr_product.bsr_linear_dvalues(dy2, x2, values, row, col, perm, tile),
    }["pairs" if which == "fwd" and tile.form == "pairs" else which]
    return launches_of(run)


def bsr_conv_launches(
    which: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    geometry: ConvGeometry,
    images: int,
    size: tuple[int, int],
    nnz: int,
    tile: BsrTile,
    channels_last: bool = True,
    plain: bool = False,
) -> list[Launch]:
    """The launches of a pass of ``bsr_conv2d``.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dvalues"``.
        dtype: fp32 | fp16 | bf16, of all operands.
        block: ``(bn, bk)``, powers of two >= 16.
        geometry: of the convolution; channels that 16 does not divide cannot be read in wide
            pieces.
        images: how many.
        size: height and width of each.
        nnz: number of stored blocks.
        tile: what one program computes.
        channels_last: whether the channels of the result lie side by side; those of what is read
            always do, if need be of a copy.
        plain: whether forward multiplies only; else it adds all that it can.
    """

    def batch(channels: int, size: tuple[int, int], last: bool = True) -> torch.Tensor:
        found = empty(images, channels, *size, dtype=dtype)
        return found.contiguous(memory_format=torch.channels_last) if last else found

    rows, cols = geometry.blocks(block)
    of_x = geometry.in_channels, size
    of_out = geometry.out_channels, geometry.out_size(size)
    x, dx = batch(*of_x), batch(*of_x, channels_last)
    dout, out = batch(*of_out), batch(*of_out, channels_last)
    values = empty(nnz, *block, dtype=dtype)
    bias, activation = empty(geometry.out_channels, dtype=dtype), "gelu"
    if plain:
        bias, activation = None, "none"
    index = functools.partial(empty, dtype=torch.int32)
    crow, order = index(geometry.groups * rows + 1), index(geometry.groups * rows)
    starts = index(geometry.groups * cols + 1)
    col, row, perm = index(nnz + 1), index(nnz + 1), index(nnz)
    run = {
        "fwd": lambda: bsr_conv_product.bsr_conv_fwd(
            x, values, crow, col, order, bias, geometry, activation, out, tile
        ),
        "dx": lambda: bsr_conv_product.bsr_conv_dx(
            dout, values, ChannelLists(starts, row, perm), geometry, dx, tile
        ),
        "dvalues": lambda: bsr_conv_product.bsr_conv_dvalues(
            dout, x, row, col, perm, geometry, values, tile
        ),
    }[which]
    return launches_of(run)


def gated_linear_launches(
    which: str,
    skip: bool,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    block: tuple[int, int],
    M: int,
    N: int,
    K: int,
    tile: GatedTile,
) -> list[Launch]:
    """The launches of a pass of ``gated_linear``, with a bias.

    Args:
        which: ``"fwd"`` | ``"dx"`` | ``"dw"``.
        skip: whether closed blocks are skipped; else gates are applied inside the product.
        x_dtype, w_dtype: fp32 | fp16 | bf16.
        block: ``(bn, bk)`` weights that a gate covers.
        M, N, K: rows of ``x``, outputs, inputs.
        tile: what one program computes.
    """
    rows, cols = gate_layout((N, K), block).gate_shape
    x2, dy2 = empty(M, K, dtype=x_dtype), empty(M, N, dtype=x_dtype)
    w, bias = empty(N, K, dtype=w_dtype), empty(N, dtype=x_dtype)
    index = functools.partial(empty, dtype=torch.int32)
    bits = index(rows, -(-cols // 32))
    gates = bits
    if skip:
        gates = OpenBlocks(index(rows), index(rows, cols + 1), index(cols), index(cols, rows + 1))
    if which == "fwd":
        pass_ = gated_product.skip_fwd if skip else gated_product.fused_fwd
        run = functools.partial(pass_, x2, w, gates, block, bias, tile)
    elif which == "dx":
        pass_ = gated_product.skip_dx if skip else gated_product.fused_dx
        run = functools.partial(pass_, dy2, w, gates, block, tile)
    else:
        pass_ = gated_product.skip_dw if skip else gated_product.fused_dw
        run = functools.partial(pass_, dy2, x2, w, bits, block, True, tile)
    return launches_of(run)
