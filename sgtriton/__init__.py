"""Train neural networks through gates on their weights; serve what is left block-sparse."""

from .checkpoint import load, save
from .control import SparsityController, gate_penalty
from .layers import GatedConv1d, GatedConv2d, GatedLinear
from .optim import param_groups
from .patching import patch, unpatch
from .report import summary
from .serving import sparsify
from .sparse_layers import BlockSparseConv1d, BlockSparseConv2d, BlockSparseLinear
from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "BlockSparseConv1d",
    "BlockSparseConv2d",
    "BlockSparseLinear",
    "GatedConv1d",
    "GatedConv2d",
    "GatedLinear",
    "SparsityController",
    "gate_penalty",
    "load",
    "param_groups",
    "patch",
    "save",
    "sparsify",
    "summary",
    "tune",
    "unpatch",
]
