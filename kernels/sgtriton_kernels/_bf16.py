"""bf16 by hand, where the compiler does not do it right.

Triton's interpreter and its CPU compiler truncate when they cast fp32 to bf16, and the interpreter
multiplies the bit patterns of bf16 operands: tiles are converted to fp32 right after the load, and
rounded here before the store.
"""

from __future__ import annotations

import torch

from ._triton import INTERPRETED, tl, triton


def soft_bf16(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels on ``device`` must treat ``dtype`` by hand."""
    return dtype == torch.bfloat16 and (INTERPRETED or device.type == "cpu")


@triton.jit
def round_to_bf16(y):
    # fp32 to the nearest bf16, ties to even
    bits = y.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = tl.where(y == y, bits, 0x7FC0)
    return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded(y, DTYPE: tl.constexpr, SOFT_BF16: tl.constexpr):
    # what a kernel stores of sums in fp32
    if SOFT_BF16:
        return round_to_bf16(y)
    else:
        return y.to(DTYPE)
