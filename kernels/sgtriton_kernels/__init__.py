"""Gate and block-sparse kernels as plain functions on tensors: Triton, and fast PyTorch code."""

from ._impl import use_impl
from .blocks import (
    GateLayout,
    coverage,
    expand_gates,
    gate_layout,
    matrix_to_weight,
    sum_blocks,
    weight_to_matrix,
)
from .bsr import BlockSparse
from .bsr_conv import bsr_conv1d, bsr_conv2d, bsr_conv2d_ref
from .bsr_convert import gated_to_bsr, gated_to_bsr_ref
from .bsr_matmul import bsr_linear, bsr_linear_ref
from .gate import gate_weight, gate_weight_ref
from .gated_matmul import gated_linear, gated_linear_ref
from .kinds import GATE_KINDS
from .penalty import GatePenalties, gate_penalties, gate_penalties_ref

__all__ = [
    "GATE_KINDS",
    "BlockSparse",
    "GateLayout",
    "GatePenalties",
    "bsr_conv1d",
    "bsr_conv2d",
    "bsr_conv2d_ref",
    "bsr_linear",
    "bsr_linear_ref",
    "coverage",
    "expand_gates",
    "gate_layout",
    "gate_penalties",
    "gate_penalties_ref",
    "gate_weight",
    "gate_weight_ref",
    "gated_linear",
    "gated_linear_ref",
    "gated_to_bsr",
    "gated_to_bsr_ref",
    "matrix_to_weight",
    "sum_blocks",
    "use_impl",
    "weight_to_matrix",
]
