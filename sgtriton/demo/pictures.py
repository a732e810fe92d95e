"""The demo's picture: the curves of both trainings, and which weights each layer kept."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from .training import History

__all__ = ["draw"]

_DENSE, _GATED, _OPEN = "#5b6770", "#c2410c", "#12355b"


def draw(
    path: str | os.PathLike[str],
    title: str,
    dense: History,
    gated: History,
    target: float,
    patterns: dict[str, torch.Tensor],
) -> None:
    """Write the picture as PNG.

    Args:
        path: Where to.
        title: Above everything.
        dense, gated: The curves of the two trainings.
        target: Sparsity that the controller was given; drawn as the share left open.
        patterns: ``[N, K]`` bool for each layer, in order: which weights are open. A first layer
            of 784 inputs is also shown as the image of how often each pixel is read.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # never opens a window
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(12, 10.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title} (patterns: a dark point is an open weight)", fontsize=14)
    curves, large, small = figure.subfigures(3, 1, height_ratios=(1.05, 1.25, 0.9))
    _draw_curves(curves, dense, gated, target)

    # the largest layer has a row of its own, beside the pixels that it reads
    names = sorted(patterns, key=lambda name: patterns[name].numel())
    largest, others = names[-1], [name for name in patterns if name != names[-1]]
    first = next(iter(patterns.values()))
    if first.shape[1] == 784:
        axes = large.subplots(1, 2, width_ratios=(2.6, 1))
        _draw_pattern(axes[0], largest, patterns[largest])
        _draw_pixels(large, axes[1], first)
    else:
        _draw_pattern(large.subplots(), largest, patterns[largest])
    if others:
        for axis, name in zip(
            small.subplots(1, len(others), squeeze=False)[0], others, strict=True
        ):
            _draw_pattern(axis, name, patterns[name])
    figure.savefig(path)


def _draw_curves(figure: Any, dense: History, gated: History, target: float) -> None:
    left, right = figure.subplots(1, 2)
    for history, color, label in ((dense, _DENSE, "dense"), (gated, _GATED, "gated")):
        last = f"{label}, at the end {100 * history.accuracy[-1]:.1f} %"
        left.plot(history.steps, np.multiply(100, history.accuracy), color=color, label=last)
    # the first tests are far below; the interesting part is where both curves come to rest
    low = 100 * min(min(h.accuracy[len(h.accuracy) // 4 :]) for h in (dense, gated))
    left.set_ylim(max(0.0, low - 3), 100.5)
    left.set(title="accuracy on the test images", xlabel="step", ylabel="%")
    left.legend(loc="best")  # a gated curve may dip anywhere
    left.grid(alpha=0.3)

    right.plot(gated.steps, np.multiply(100, gated.open_share), color=_GATED, label="open weights")
    goal = 100 * (1 - target)
    right.axhline(goal, color=_DENSE, linestyle="--", label=f"target {goal:g} %")
    right.set_ylim(0, 103)
    right.set(title="share of open weights", xlabel="step", ylabel="%")
    right.legend(loc="upper right")
    right.grid(alpha=0.3)


def _draw_pattern(axis: Any, name: str, pattern: torch.Tensor) -> None:
    from matplotlib.colors import ListedColormap

    n, k = pattern.shape
    axis.imshow(
        pattern.numpy(),
        cmap=ListedColormap(["#f1efe9", _OPEN]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    closed = 100 * (1 - pattern.double().mean().item())
    axis.set_title(f"{name}: {n} x {k}, {closed:.1f} % closed")
    axis.set(xlabel="input", ylabel="output")


def _draw_pixels(figure: Any, axis: Any, pattern: torch.Tensor) -> None:
    image = axis.imshow(pattern.sum(0).reshape(28, 28).numpy(), cmap="magma")
    axis.set_title("open weights per input pixel")
    axis.set(xticks=[], yticks=[])
    figure.colorbar(image, ax=axis, shrink=0.85)
