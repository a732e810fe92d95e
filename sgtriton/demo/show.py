"""The demo's result as the tables that the terminal shows."""

from __future__ import annotations

from sgtriton.tables import print_table

from .run import Result

__all__ = ["print_result"]


def print_result(result: Result) -> None:
    """Print the figures of the three models, then those of their layers."""
    _print_models(result)
    print()
    _print_layers(result)


def _print_models(r: Result) -> None:
    rows: list[list[object]] = [
        ["accuracy", *map(_percent, (r.dense_accuracy, r.gated_accuracy, r.served_accuracy))],
        ["sparsity, target", None, _percent(r.target_sparsity), None],
        ["sparsity, reached", "0.00 %", _percent(r.sparsity), _percent(r.sparsity)],
        ["bytes on disk", f"{r.bytes_dense:,}", None, f"{r.bytes_served:,}"],
        ["  of dense", None, None, _percent(r.bytes_served / r.bytes_dense)],
    ]
    for batch, ms in r.ms_dense.items():
        rows.append([f"ms per batch of {batch}", f"{ms:.3f}", None, f"{r.ms_served[batch]:.3f}"])
    title = f"{r.model}, {r.gate} gates, {r.dataset}, {r.images:,} images, {r.epochs} epochs"
    print_table(["", "dense", "gated", "served"], rows, title, align="lrrr")


def _print_layers(r: Result) -> None:
    rows: list[list[object]] = [
        [
            layer.name,
            _sizes(layer.shape),
            _sizes(layer.block),
            _percent(layer.sparsity),
            layer.form,
            layer.reason,
        ]
        for layer in r.layers
    ]
    rows.append(
        ["all", None, None, _percent(r.sparsity), None, f"target {_percent(r.target_sparsity)}"]
    )
    print_table(
        ["layer", "shape", "gate block", "sparsity", "served", "why"],
        rows,
        title="layers (one target for all: training divides it; the last is gated per weight)",
        align="lllrll",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _sizes(sides: tuple[int | None, ...]) -> str:
    return "x".join("full" if side is None else str(side) for side in sides)
