"""What all charts have in common: their look, their titles, and what a chart is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .rows import Timing, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by all kinds of eyes
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, GREY = "#56B4E9", "#D55E00", "#7F7F7F"
COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
MARKERS = "osD^vP"
WIDTH = 9.0  # inches, at 100 dots an inch what a page on GitHub shows without shrinking

TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
LEGIBLE: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}

STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E5E5E5", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 9, "svg.hashsalt": "sgtriton",
    "figure.dpi": 100, "figure.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A chart that some rows give: the stem of its files, words for it, and what draws it."""

    name: str
    alt: str
    draw: Callable[[], Figure]


def title_of(what: str, rows: Sequence[Timing], dtype: str) -> str:
    on = summary(rows)
    return (
        f"{what}\n{on['device']} ({on['threads']} threads), {dtype}, PyTorch {on['torch']}, "
        f"sgtriton {on['sgtriton']}, commit {on['commit']}"
    )


def new_figure(rows: int, columns: int, height: float, title: str, **kwargs: Any):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **kwargs
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, axes


def plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Ticks of a logarithmic axis as plain numbers, those within what it shows."""
    low, high = axis.get_view_interval()
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_ticks([], minor=True)
