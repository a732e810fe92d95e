"""The linear layers that a file stores in blocks, as products to choose candidates for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from sgtriton_kernels import BlockSparse

from .file_layers import stored_layers
from .options import check_memory
from .products import Product


def file_products(
    path: str,
    rows: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device,
    trains: bool,
    of_convolutions: str,
    why_not: Callable[[BlockSparse], str | None] = lambda matrix: None,
) -> tuple[list[Product], list[str]]:
    """The products of a file's linear layers: of its blocks, and of those that it serves merged.

    Args:
        path: file written by :func:`.save`.
        rows: numbers of rows of x.
        dtype: of the products; the file's own if ``None``.
        device: where they are computed.
        trains: whether gradients are computed as well; of what is merged they never are.
        of_convolutions: what to say of convolutions, of which a file knows no image.
        why_not: of a weight why there is nothing to choose; ``None`` where there is.

    Returns:
        The products, and lines that say which layers are left out, and why.

    Raises:
        ValueError: a file that is not ours or damaged, too many rows, nothing to choose for.
    """
    products: list[Product] = []
    others: dict[str, list[str]] = {}
    for name, (part, wide) in stored_layers(path).items():
        # the file may come from anywhere, and a name goes to a terminal
        name = "".join(filter(str.isprintable, name)) or "the model"
        shape = part.layout.weight_shape
        if len(shape) != 2:
            others.setdefault("convolutions", []).append(name)
            continue
        if part.matrix is None:
            others.setdefault("a gate for each weight", []).append(name)
            continue
        if part.matrix.nnz == 0:
            others.setdefault("no open block", []).append(name)
            continue
        check_memory("rows", max(rows), shape[0], shape[1], f"{max(rows)} of {name}")
        weights = [(part.matrix.to(device, dtype), trains)]
        if wide is not None:
            merged = part.merged(wide).matrix
            assert merged is not None
            weights.append((merged.to(device, dtype), False))
        reasons = [why_not(matrix) for matrix, _ in weights]
        if None not in reasons:
            others.setdefault(str(reasons[-1]), []).append(name)
        products += [
            Product(name, matrix, tuple(rows), both)
            for (matrix, both), reason in zip(weights, reasons, strict=True)
            if reason is None
        ]
    left_out = "; ".join(f"{', '.join(names)} ({why})" for why, names in others.items())
    hint = of_convolutions if "convolutions" in others else ""
    if not products:
        found = f"it stores {left_out}" if left_out else "it stores no sparse layer"
        raise ValueError(
            f"checkpoint {path}: no linear layer in blocks to tune; {found}"
            + (f"; {hint}" if hint else "")
        )
    return products, [*([f"left out: {left_out}"] if left_out else []), *([hint] if hint else [])]
