"""Name of this package's torch.ops namespace (a Hub build swaps in a unique one)."""

_NAMESPACE = "sgtriton_kernels"


def add_op_namespace_prefix(name: str) -> str:
    return f"{_NAMESPACE}::{name}"
