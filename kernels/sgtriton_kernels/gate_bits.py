"""Binary gates as bits, and the lists of open blocks.

    bits[r, j] = sum over i of b[r, 32 j + i] << i        b: gates, binarised

The products with a gated weight read a gate many times (once per tile of rows of ``x``), as one
bit of a word that 32 neighbours share; what the bit means, and a Bernoulli draw, is settled here,
once a step. Bits beyond the last column are 0.

Bytes moved per gate: 4 read, 1/8 written, which is the least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._triton import device_of, is_native, tl, triton
from .kinds import is_open

_KINDS = ("threshold", "bernoulli")


@dataclass(frozen=True)
class OpenBlocks:
    """Which blocks of a gated weight are open, by block row and by block column.

    A list has one spare entry, 0, so that a kernel may read one ahead; so are the entries after
    the last open one.

    Attributes:
        count: ``[R]`` int32. Open blocks of each block row.
        index: ``[R, C + 1]`` int32, contiguous. Their block columns, ascending.
        row_count: ``[C]`` int32. Open blocks of each block column.
        row_index: ``[C, R + 1]`` int32, contiguous. Their block rows, ascending.
    """

    count: torch.Tensor
    index: torch.Tensor
    row_count: torch.Tensor
    row_index: torch.Tensor


def pack_gates(
    gate: torch.Tensor, kind: str = "threshold", seed: torch.Tensor | None = None
) -> torch.Tensor:
    """Binarise gates as :func:`.gate.gate_weight` does and pack them, 32 to a word.

    Args:
        gate: ``[R, C]`` fp32, any strides. Gates; NaN is closed.
        kind: ``"threshold"`` | ``"bernoulli"``.
        seed: ``[1]`` int64 on ``gate``'s device. The draw's seed; needed for ``"bernoulli"``.

    Returns:
        ``[R, ceil(C / 32)]`` int32, contiguous: gate ``(r, c)`` is bit ``c % 32`` of word
        ``c // 32``, the lowest bit first. Not differentiable.

    Raises:
        ValueError: another kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"gates of one bit are of a kind in {_KINDS}, got {kind!r}")
    assert gate.dim() == 2
    assert gate.dtype == torch.float32
    assert seed is not None or kind == "threshold"
    gate = gate.contiguous()
    rows, cols = gate.shape
    bits = torch.empty(rows, triton.cdiv(cols, 32), dtype=torch.int32, device=gate.device)
    if not bits.numel():
        return bits
    bernoulli = kind == "bernoulli"
    words = 4 if is_native(gate.device) else 16
    with device_of(gate):
        _pack_gates_kernel[(triton.cdiv(bits.numel(), words),)](
            gate, seed if bernoulli else gate,
            bits,
            cols, bits.shape[1], bits.numel(),
            BERNOULLI=bernoulli,
            BLOCK=words,
        )  # fmt: skip
    return bits


def unpack_gates(bits: torch.Tensor, cols: int) -> torch.Tensor:
    """Undo :func:`pack_gates`.

    Args:
        bits: ``[R, ceil(cols / 32)]`` int32.
        cols: gates of a row.

    Returns:
        ``[R, cols]`` bool. Which gates are open.
    """
    lanes = torch.arange(32, dtype=torch.int32, device=bits.device)
    lanes = (bits[:, :, None] >> lanes) & 1
    return lanes.flatten(1)[:, :cols].bool()


def open_lists(bits: torch.Tensor, cols: int) -> OpenBlocks:
    """List the open blocks by row and by column, on the device and without a host sync.

    Args:
        bits: ``[R, ceil(cols / 32)]`` int32, from :func:`pack_gates`.
        cols: gates of a row.
    """
    mask = unpack_gates(bits, cols)
    return OpenBlocks(*_lists(mask), *_lists(mask.T))


def _lists(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count and columns of the true elements of each row."""
    rows, cols = mask.shape
    count = mask.sum(1, dtype=torch.int32)
    order = torch.sort(mask, dim=1, descending=True, stable=True).indices
    listed = torch.arange(cols, device=mask.device) < count[:, None]
    index = torch.zeros(rows, cols + 1, dtype=torch.int32, device=mask.device)
    index[:, :cols] = torch.where(listed, order, 0)
    return count, index


@triton.jit(do_not_specialize=["C", "WORDS", "total"])
def _pack_gates_kernel(
    gate_ptr, seed_ptr,  # [R, C], [1] in
    bits_ptr,  # [R, WORDS] out
    C, WORDS, total,
    BERNOULLI: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # one dimension up to the draw: the CPU's compiler has no other
    first = tl.program_id(0).to(tl.int64) * BLOCK  # of the words
    lanes = first * 32 + tl.arange(0, BLOCK * 32)
    word = lanes // 32
    col = word % WORDS * 32 + lanes % 32
    gate_offs = word // WORDS * C + col  # counts the draws too, as in gate_weight
    mask_gate = (word < total) & (col < C)
    gate = tl.load(gate_ptr + gate_offs, mask=mask_gate, other=0.0)
    open_ = is_open(gate, gate_offs, seed_ptr, BERNOULLI) & mask_gate
    bits = tl.where(open_, 1, 0) << (lanes % 32).to(tl.int32)
    bits = tl.sum(tl.reshape(bits, (BLOCK, 32)), 1)
    offs = first + tl.arange(0, BLOCK)
    tl.store(bits_ptr + offs, bits, mask=offs < total)
