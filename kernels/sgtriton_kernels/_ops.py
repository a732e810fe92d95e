"""Name of this package's torch.ops namespace (a Hub build swaps in a unique one)."""

import torch

_NAMESPACE = "sgtriton_kernels"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    return f"{_NAMESPACE}::{name}"
