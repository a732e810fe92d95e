"""How much faster than dense a form of a served layer is expected to be; nothing is timed."""

from __future__ import annotations

import math

import torch

# The cost model, by kind of device; for cards rough, for want of a measurement. For a CPU fitted to
# bench/results/serving.csv: two AVX2 cores, weights of 1024x1024, 4096x1024 and 1024x4096, M of 1,
# 16, 64 and 512, blocks of 16, 32 and 64, 50 to 95 % closed. What it expects of sparse is within a
# factor of 1.5 of the measured speed-up in 98 % of the cells in fp32, and in 94 % in bf16.
_RATES = {"cpu": (2.4e11, 6.6e10), "cuda": (2e14, 2e12)}  # operations, bytes, in a second
_REACHED = {  # of these, by a block's shorter side
    "cpu": {64: 0.58, 32: 0.465, 16: 0.325, 1: 0.05},
    "cuda": {64: 0.6, 32: 0.45, 16: 0.25, 1: 0.05},
}
# seconds
_CALL = {"dense": 5e-6, "dense_left": 1e-5, "compacted": 1e-5, "sparse": 7e-5, "merged": 7e-5}
# seconds for each weight that the library takes on a CPU to pack a right operand in each call, or
# loses by using one thread only for one row of x
_PACKING, _ONE_ROW = 1.77e-10, 6.3e-11
# by rows of x, how much faster dense_left is there: measured for these weights at M of 1, 2, 4, ...
# 128, it was within a factor of 1.35 of this, but at 2 (1.2x to 1.7x) and at 4 (2.3x to 2.9x)
_LEFT = {1: 1.8, 8: 1.4, 32: 1.6, 128: 1.3}
_SLOW_RATE = 3.9e10  # of the library's products of 16 bits on a CPU without instructions for them


def expected_speedup(
    form: str,
    block: tuple[int, int],
    share: float,
    weight_shape: tuple[int, ...],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """How much faster than the dense product a form is expected to be.

    Args:
        form: one of ``FORMS``.
        block: of the stored weight that it reads.
        share: of the dense weights that it reads.
        weight_shape: of the dense weight.
        rows: of x.
        dtype, device: of the weight.
    """
    size = math.prod(weight_shape)
    dense, other = (
        _expected_seconds(name, block, part * size, rows, dtype, device)
        for name, part in (("dense", 1.0), (form, share))
    )
    return dense / other


def _expected_seconds(
    form: str,
    block: tuple[int, int],
    weights: float,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Seconds of a form that reads so many weights."""
    kind = device.type if device.type in _RATES else "cuda"
    (rate, bandwidth), size, beside = _RATES[kind], dtype.itemsize, 0.0
    by_library = form in ("dense", "compacted")
    if kind == "cpu" and size < 4 and by_library and _is_slow_at_16_bits():
        rate = _SLOW_RATE
    elif kind == "cpu":
        size = max(size, 4)  # the other forms compute in fp32
        if by_library or form == "dense_left":
            beside = _ONE_ROW if rows == 1 else _PACKING
        if form == "dense_left":
            weights /= next((gain for most, gain in _LEFT.items() if rows <= most), 1.0)
    if form in ("sparse", "merged"):
        weights /= next(part for side, part in _REACHED[kind].items() if min(block) >= side)
    return _CALL[form] + weights * (max(2 * rows / rate, size / bandwidth) + beside)


def _is_slow_at_16_bits() -> bool:
    return "AVX512" not in torch.backends.cpu.get_cpu_capability()
