"""A card of round figures."""

import dataclasses

from sgtriton_kernels.cards import Card

# 1 GB/s, 1 TFLOP/s on matrix units, 0.1 without; from the cache 10 multiprocessors read 16 GB/s
TOY = Card(
    name="toy", arch="sm_80", multiprocessors=10, boost_mhz=1000, bandwidth_gbs=1, memory_gb=1,
    l2_mb=1, last_level_mb=None, l2_bytes_per_clock=16, shared_kib=100, shared_program_kib=99,
    tflops_16bit=1, tflops_tf32=None, tflops_fp32=0.1, source="", note="",
)  # fmt: skip
FAST = dataclasses.replace(TOY, bandwidth_gbs=1e9, l2_bytes_per_clock=10**9)
