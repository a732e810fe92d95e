"""Chart of the training sweep: a step's time and memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import training
from .drawing import COLORS, LEGIBLE, Chart, new_figure, title_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def charts_of(rows: list[training.Row]) -> list[Chart]:
    return [
        Chart(
            f"training_step_{dtype}",
            f"Time and memory of a gated training step beside the dense one, {dtype}",
            lambda dtype=dtype: _step([r for r in rows if r.dtype == dtype], dtype),
        )
        for dtype in dict.fromkeys(r.dtype for r in rows)
    ]


def _step(rows: list[training.Row], dtype: str) -> Figure:
    """Bars of a step's time over the dense one's, and of the memory that it takes."""
    cells = list(dict.fromkeys((r.M, r.N, r.K, r.gate, r.block) for r in rows))
    names = [n for n in dict.fromkeys(r.provider for r in rows) if n != "dense"]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    lines = [
        (cell, r)
        for cell in cells
        for r in rows
        if (r.M, r.N, r.K, r.gate, r.block) == cell and r.provider != "dense"
    ]
    has_peak = any(not math.isnan(r.peak_mib) for r in rows)
    title = title_of(
        "A gated training step, forward and backward; the dense step is 1", rows, dtype
    )
    height = 1.5 + 0.24 * len(lines) + 0.34 * len(cells)
    figure, axes = new_figure(1, 2, height, title, sharey=True, width_ratios=(3, 2))
    time, memory = axes[0]
    y, ticks, labels = 0.0, [], []
    for cell in cells:
        of_cell = [r for c, r in lines if c == cell]
        m, n, k, gate, block = cell
        ticks.append(y + (len(of_cell) - 1) / 2)
        labels.append(f"{m}, {n}, {k}\n{gate} {block}")
        for r in of_cell:
            color = colors[r.provider]
            time.barh(y, r.ratio, color=color, height=0.85)
            time.text(r.ratio + 0.01, y, f"{r.ratio:.2f}", va="center", fontsize=8, bbox=LEGIBLE)
            mib = r.peak_mib if has_peak else r.saved_bytes / 2**20
            memory.barh(y, mib, color=color, height=0.85)
            memory.text(mib, y, f" {mib:.3g}", va="center", fontsize=8)
            y += 1
        y += 1
    time.axvline(1, color="black", linewidth=1.2)
    time.set(xlabel="time, dense step = 1 (right of the line: slower)")
    time.set_yticks(ticks, labels, fontsize=8)
    time.invert_yaxis()
    time.set_ylabel("M, N, K and gates")
    memory.set(xlabel="peak, MiB" if has_peak else "saved for backward, MiB")
    for axis in (time, memory):
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.14)
    from matplotlib.patches import Patch

    handles = [Patch(color=colors[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
    return figure
