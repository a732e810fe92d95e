"""Curves of speed-up against sparsity, and where they break even."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from . import serving
from .drawing import COLORS, GREY, MARKERS, TICKS, new_figure, plain_ticks, title_of
from .serving_tables import side

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def means_of(rows: Iterable[serving.Row], provider: str) -> dict[tuple[int, int, float], float]:
    """Mean speed-up by block, M and sparsity."""
    groups: dict[tuple[int, int, float], list[float]] = {}
    for r in rows:
        if r.provider == provider:
            groups.setdefault((side(r.block), r.M, r.sparsity), []).append(1 / r.ratio)
    return {key: statistics.geometric_mean(values) for key, values in groups.items()}


def speedups(rows: list[serving.Row], dtype: str) -> Figure:
    """Speed-up against sparsity by block, a panel for each M."""
    means = means_of(rows, serving.BLOCKS_ONLY)
    ms = sorted({m for _, m, _ in means}) or [0]
    title = title_of(
        "Speed-up of the product over blocks over dense, geometric means over weights", rows, dtype
    )
    columns = 2 if len(ms) > 1 else 1
    lines = -(-len(ms) // columns)
    figure, axes = new_figure(lines, columns, 0.9 + 2.7 * lines, title, sharey=True, sharex=True)
    sparsities = sorted({s for _, _, s in means})
    blocks = sorted({b for b, _, _ in means})
    for axis, m in zip(axes.flat, ms, strict=False):
        axis.axhline(1, color="black", linewidth=1)
        ideal = [1 / (1 - s) for s in sparsities]
        axis.plot(ideal, ideal, "--", color=GREY, label="ideal")
        for i, block in enumerate(blocks):
            points = [(s, means[block, m, s]) for s in sparsities if (block, m, s) in means]
            _curve(axis, points, COLORS[i], MARKERS[i], f"{block}x{block}")
        axis.set(xscale="log", yscale="log", title=f"M = {m}")
        plain_ticks(axis.yaxis, TICKS)
        axis.set_xticks(ideal, [f"{s:.0%}" for s in sparsities])
        axis.set_xticks([], minor=True)
    for axis in axes.flat[len(ms) :]:
        axis.set_visible(False)
    for axis in axes.flat[max(0, len(ms) - columns) : len(ms)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("sparsity")
    for axis in axes[:, 0]:
        axis.set_ylabel("times dense")
    handles = [*axes.flat[0].get_legend_handles_labels()[0], *marks()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _curve(
    axis: Axes, points: list[tuple[float, float]], color: str, marker: str, label: str
) -> None:
    """A line over its points: those below 1 hollow, and a star where it crosses 1."""
    places = [(1 / (1 - sparsity), speedup) for sparsity, speedup in points]
    axis.plot([x for x, _ in places], [y for _, y in places], color=color, label=label)
    for x, y in places:
        face = color if y >= 1 else "white"
        axis.plot(x, y, marker, color=color, markerfacecolor=face, markersize=6)
    if (crossing := break_even(points)) is not None:
        at = 1 / (1 - crossing)
        axis.plot(at, 1, "*", color=color, markersize=13, markeredgecolor="black", zorder=5)


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The sparsity from which on a curve stays at 1 or above, between the points on either side.

    Args:
        points: sparsity and speed-up, by sparsity. Between two, the speed-up's logarithm is taken
            as linear in that of the density.

    Returns:
        ``None`` where all points are at 1 or above, or the last is below.
    """
    below = [i for i, (_, speedup) in enumerate(points) if speedup < 1]
    if not below or below[-1] == len(points) - 1:
        return None
    (s0, y0), (s1, y1) = points[below[-1]], points[below[-1] + 1]
    share = math.log(y0) / (math.log(y0) - math.log(y1))
    return 1 - math.exp((1 - share) * math.log(1 - s0) + share * math.log(1 - s1))


def marks() -> list[Any]:
    from matplotlib.lines import Line2D

    look: dict[str, Any] = {"linestyle": "none", "color": "black"}
    return [
        Line2D([], [], marker="o", markerfacecolor="white", label="slower than dense", **look),
        Line2D([], [], marker="*", markersize=12, label="breaks even", **look),
    ]
