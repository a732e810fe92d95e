"""Charts of the serving sweep: speed-ups by rows, roofs, and what was expected."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sgtriton import cost_model

from . import roofs, serving
from .drawing import COLORS, GREY, MARKERS, TICKS, Chart, new_figure, plain_ticks, title_of
from .serving_curves import marks, means_of, speedups
from .serving_tables import side

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def charts_of(rows: list[serving.Row]) -> list[Chart]:
    found = []
    for dtype, ours in _by_dtype(rows).items():
        if means_of(ours, serving.BLOCKS_ONLY):
            found.append(
                Chart(
                    f"serving_speedup_{dtype}",
                    f"Speed-up of the product over blocks against sparsity, {dtype}",
                    functools.partial(speedups, ours, dtype),
                )
            )
        if means_of(ours, serving.OURS):
            found.append(
                Chart(
                    f"serving_heat_{dtype}",
                    f"Speed-up of served layers by rows and sparsity, {dtype}",
                    functools.partial(_heat, ours, dtype),
                )
            )
        if {roofs.COPY, roofs.MATMUL, "bsr_linear"} <= {r.op for r in ours}:
            found.append(
                Chart(
                    f"serving_roofline_{dtype}",
                    f"Rates of served products under the measured roofs, {dtype}",
                    functools.partial(_roofline, ours, dtype),
                )
            )
    return found


def cost_model_charts(rows: list[serving.Row]) -> list[Chart]:
    # what is expected in 16 bits depends on the CPU that draws
    ours = _by_dtype(rows).get("float32", [])
    if not means_of(ours, serving.BLOCKS_ONLY):
        return []
    return [
        Chart(
            "serving_predicted_float32",
            "Speed-ups that the cost model expects against measured ones, float32",
            functools.partial(_predicted, ours, "float32"),
        )
    ]


def _by_dtype(rows: list[serving.Row]) -> dict[str, list[serving.Row]]:
    return {
        dtype: [r for r in rows if r.dtype == dtype]
        for dtype in dict.fromkeys(r.dtype for r in rows)
    }


def _filled(blocks: Sequence[int]) -> list[Any]:
    """What stands for the blocks in a legend, whatever their first point is like."""
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [], [], linestyle="none", marker=MARKERS[i], color=COLORS[i],
            label=f"blocks of {block}x{block}",
        )
        for i, block in enumerate(blocks)
    ]  # fmt: skip


def _heat(rows: list[serving.Row], dtype: str) -> Figure:
    """Speed-up by M and sparsity, a panel for each block; in each cell its number."""
    from matplotlib.colors import LogNorm

    means = means_of(rows, serving.OURS)
    blocks = sorted({b for b, _, _ in means}) or [0]
    ms, sparsities = sorted({m for _, m, _ in means}), sorted({s for _, _, s in means})
    title = title_of(
        "Speed-up of served layers over dense, in the form that each has chosen; geometric means",
        rows, dtype,
    )  # fmt: skip
    most = max([2.0, *(max(v, 1 / v) for v in means.values())])
    figure, axes = new_figure(1, len(blocks), 1.4 + 0.55 * len(ms), title, sharey=True)
    image = None
    for axis, block in zip(axes[0], blocks, strict=True):
        grid = [[means.get((block, m, s), math.nan) for s in sparsities] for m in ms]
        image = axis.imshow(grid, cmap="PuOr_r", norm=LogNorm(1 / most, most), aspect="auto")
        for i, line in enumerate(grid):
            for j, value in enumerate(line):
                if math.isnan(value):
                    axis.text(j, i, "-", ha="center", va="center")
                    continue
                is_dark = abs(math.log(value)) > 0.6 * math.log(most)
                weight = "bold" if value < 1 else "normal"
                axis.text(
                    j, i, f"{value:.2f}" if value < 10 else f"{value:.1f}", ha="center",
                    va="center", color="white" if is_dark else "black", weight=weight,
                )  # fmt: skip
        axis.grid(False)
        axis.set(title=f"blocks of {block}x{block}", xlabel="sparsity")
        axis.set_xticks(range(len(sparsities)), [f"{s:.0%}" for s in sparsities])
        axis.set_yticks(range(len(ms)), [str(m) for m in ms])
    axes[0, 0].set_ylabel("M (rows of the input)")
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.9, label="times dense (bold: slower)")
        plain_ticks(bar.ax.yaxis, TICKS)
    return figure


def _roofline(rows: list[serving.Row], dtype: str) -> Figure:
    """Rate against operations a byte, under what copies and dense products reach here."""
    copy = max(r.gb_s for r in rows if r.op == roofs.COPY)
    peak = max(r.tflops for r in rows if r.op == roofs.MATMUL)
    unit, scale = ("TFLOP/s", 1.0) if peak >= 1 else ("GFLOP/s", 1e3)
    products = [r for r in rows if r.op == "bsr_linear" and not math.isnan(r.tflops)]
    title = title_of(
        "Operations a second and the roofs measured in the same run (what lies in a cache is read "
        "faster than a copy)", rows, dtype,
    )  # fmt: skip
    figure, axes = new_figure(1, 1, 5.0, title)
    axis = axes[0, 0]
    groups = [("dense", [r for r in products if r.provider in serving.DENSE], GREY, "x")]
    for i, block in enumerate(sorted({side(r.block) for r in products})):
        of_block = [
            r for r in products if r.provider == serving.BLOCKS_ONLY and side(r.block) == block
        ]
        groups.append((f"product over {block}x{block}", of_block, COLORS[i], MARKERS[i]))
    for name, group, color, marker in groups:
        axis.scatter(
            [1e3 * r.tflops / r.gb_s for r in group], [scale * r.tflops for r in group],
            s=22, marker=marker, color=color, alpha=0.75, linewidths=0.8, label=name,
        )  # fmt: skip
    intensities = [1e3 * r.tflops / r.gb_s for _, group, _, _ in groups for r in group]
    ridge, top = 1e3 * peak / copy, scale * peak
    low, high = min([*intensities, ridge]) / 1.5, max([*intensities, ridge]) * 1.5
    axis.plot(
        [low, ridge, high], [top * low / ridge, top, top], color="black", linewidth=1.4,
        label=f"roofs: copy {copy:.3g} GB/s, dense product {top:.3g} {unit}",
    )  # fmt: skip
    axis.set(
        xscale="log", yscale="log", xlabel="operations a byte (open weights, input, output)",
        ylabel=f"{unit} on open weights",
    )  # fmt: skip
    figure.legend(loc="outside lower center", ncols=2 if len(groups) > 3 else 3)
    return figure


def _predicted(rows: list[serving.Row], dtype: str) -> Figure:
    """What the cost model expects of the product over blocks, against what was measured."""
    dense = {_cell(r): r.ms_p50 for r in rows if r.provider == "dense"}
    products = [r for r in rows if r.provider == serving.BLOCKS_ONLY and _cell(r) in dense]
    title = title_of(
        "Speed-up of the product over blocks: expected by the cost model, measured", rows, dtype
    )
    figure, axes = new_figure(1, 1, 5.2, title)
    axis, seen = axes[0, 0], []
    blocks = sorted({side(r.block) for r in products})
    for i, block in enumerate(blocks):
        points = [
            (dense[_cell(r)] / r.ms_p50, _expected(r, dtype))
            for r in products
            if side(r.block) == block
        ]
        seen += [value for point in points for value in point]
        faces = [COLORS[i] if found >= 1 else "white" for found, _ in points]
        axis.scatter(
            [x for x, _ in points], [y for _, y in points], s=26, marker=MARKERS[i], color=faces,
            edgecolors=COLORS[i], alpha=0.75,
        )  # fmt: skip
    low, high = min(seen) / 1.3, max(seen) * 1.3
    axis.plot(
        [low, high],
        [low, high],
        color="black",
        linewidth=1.2,
        label="expected = measured",
    )
    axis.fill_between(
        [low, high], [low / 1.5, high / 1.5], [low * 1.5, high * 1.5], color=GREY, alpha=0.15,
        linewidth=0, label="within a factor of 1.5",
    )  # fmt: skip
    axis.axvline(1, color=GREY, linewidth=0.8)
    axis.axhline(1, color=GREY, linewidth=0.8)
    axis.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(low, high),
        xlabel="measured, times dense", ylabel="expected, times dense",
    )  # fmt: skip
    for ticks in (axis.xaxis, axis.yaxis):
        plain_ticks(ticks, TICKS)
    hollow, _ = marks()
    axis.legend(handles=[*_filled(blocks), *axis.get_legend_handles_labels()[0], hollow])
    return figure


def _cell(row: serving.Row) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in serving.SWEEP.key)


def _expected(row: serving.Row, dtype: str) -> float:
    square = (side(row.block), side(row.block))
    return cost_model.expected_speedup(
        "sparse", square, row.density, (row.N, row.K), row.M, getattr(torch, dtype),
        torch.device("cpu"),
    )  # fmt: skip
