"""The parts of README.md that say what was measured, written from the CSVs between marks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from . import conv, models, overhead, serving, serving_tables, training
from .rows import RESULTS, measured, paragraphs, read

README = Path(__file__).parents[1] / "README.md"


def marks(part: str) -> tuple[str, str]:
    """What stands before a part of the README, and behind it."""
    return (
        f"<!-- {part}: written by `python -m bench report` -->\n",
        f"<!-- end of {part} -->\n",
    )


def with_results(text: str) -> str:
    """README.md with its parts as the results give them.

    Raises:
        ValueError: the marks of a part are missing, there several times, or in the wrong order.
    """
    for part, write in PARTS.items():
        begin, end = marks(part)
        whole = text.count(begin) == text.count(end) == 1
        if not whole or text.index(begin) > text.index(end):
            raise ValueError(f"README.md must hold the marks of its part {part!r} once")
        before, rest = text.split(begin)
        text = f"{before}{begin}{write()}\n{end}{rest.split(end)[1]}"
    return text


def training_part(folder: Path = RESULTS) -> str:
    """A table of training steps over the dense one's time, a row a layer."""
    rows = measured(read(folder / "training.csv", training.Row))
    names = [n for n in dict.fromkeys(r.provider for r in rows) if n != "dense"]
    lines = [
        f"| M, N, K | gates | closed | {' | '.join(names)} |",
        "|---" * (len(names) + 3) + "|",
    ]
    for cell in dict.fromkeys((r.M, r.N, r.K, r.gate, r.block) for r in rows):
        of = {r.provider: r for r in rows if (r.M, r.N, r.K, r.gate, r.block) == cell}
        m, n, k, gate, block = cell
        closed = 1 - min(r.density for r in of.values())
        figures = [f"{of[name].ratio:.2f}" if name in of else "-" for name in names]
        lines.append(f"| {m}, {n}, {k} | {gate} {block} | {closed:.0%} | {' | '.join(figures)} |")
    return "\n".join(lines)


def serving_part(folder: Path = RESULTS) -> str:
    """The means of served layers, and what is lost."""
    found = serving_tables.cells(read(folder / "serving.csv", serving.Row))
    table = serving_tables.speedups_table(found, "float32")
    return f"{table}\n\n{serving_tables.losses_in_short(found)}"


def models_part(folder: Path = RESULTS) -> str:
    """Sentences about convolutions, whole models, and what a call costs."""
    said = [
        *_of_convolutions(read(folder / "conv.csv", conv.Row)),
        *_of_models(read(folder / "models.csv", models.Row)),
        *_of_calls(read(folder / "overhead.csv", overhead.Row)),
    ]
    return paragraphs(" ".join(said)).strip()


def _of_convolutions(rows: list[conv.Row]) -> list[str]:
    sums = conv.sums(rows)
    if not sums:
        return []
    speedups = [
        f"{ms['best'] / ms[conv.LAYER[1]]:.2f} at batch {batch}"
        for (_, batch), ms in sums.items()
        if not math.isnan(ms[conv.LAYER[1]])
    ]
    return [
        f"VGG-16's convolutions with {conv.CLOSED:.0%} of their {conv.BLOCK}x{conv.BLOCK} blocks "
        f"closed, images channels-last, over the dense ones: {', '.join(speedups)} (slower than "
        f"dense on the same images: {'; '.join(conv.slower_layers(rows)) or 'none'})."
    ]


def _of_models(rows: list[models.Row]) -> list[str]:
    speedups: dict[str, list[str]] = {}
    for _, ours in models.pairs(measured(rows)):
        at = f"{1 / ours.ratio:.2f} at batch {ours.batch}"
        speedups.setdefault(ours.model, []).append(at)
    if not speedups:
        return []
    of_each = [f"{name} {', '.join(several)}" for name, several in speedups.items()]
    return [f"Whole models: {'; '.join(of_each)}."]


def _of_calls(rows: list[overhead.Row]) -> list[str]:
    over = {row.mode: row.over for row in rows if row.call == "bsr_linear"}
    if not over:
        return []
    modes = ", ".join(f"{us:.0f} ({mode})" for mode, us in over.items())
    return [f"A call of `bsr_linear` costs more than `F.linear`, in microseconds: {modes}."]


PARTS: dict[str, Callable[[], str]] = {
    "training": training_part,
    "serving": serving_part,
    "models": models_part,
}
