"""Charts of the sweeps' results, drawn from the CSVs: a PNG and an SVG each, into ``docs/bench``.

Drawn again from the same rows a file is the same to the byte. Nothing is left out for being slow:
points below 1 are marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import serving_charts, training_charts
from .drawing import STYLE, Chart
from .rows import measured

FOLDER = Path(__file__).parents[1] / "docs" / "bench"


def of(file: str, rows: Sequence[Any], prefix: str = "") -> list[Chart]:
    """The charts of a sweep's rows.

    Args:
        file: the CSV's name without its ending.
        rows: what it holds.
        prefix: of the charts' names; of a card, whose products the cost model knows too roughly.
    """
    rows = measured(rows)
    found = []
    if file == "serving":
        found = serving_charts.charts_of(rows)
        found += [] if prefix else serving_charts.cost_model_charts(rows)
    if file == "training":
        found = training_charts.charts_of(rows)
    return [Chart(prefix + chart.name, chart.alt, chart.draw) for chart in found]


def write(charts: Iterable[Chart], folder: Path = FOLDER) -> list[Path]:
    """Draw charts into a folder.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        with plt.rc_context(STYLE):
            figure = chart.draw()
            for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = folder / f"{chart.name}.{ending}"
                figure.savefig(path, metadata=metadata)
                written.append(path)
            plt.close(figure)
    return written


def markdown(charts: Iterable[Chart]) -> str:
    """What shows the charts on the page."""
    return "".join(
        f"\n![{chart.alt}]({FOLDER.parent.name}/{FOLDER.name}/{chart.name}.svg)\n"
        for chart in charts
    )
