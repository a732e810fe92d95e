"""What the rows of the serving sweep say: cells, means, losses, and their section of the page."""

from __future__ import annotations

import itertools
import math
import statistics
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sgtriton.tables import format_table

from .rows import Timing, details, measured, notes, paragraphs, summary
from .timed import SLOWER

AHEAD = 0.05  # of a peer's time, by which ours must be longer for the peer to be called ahead

_TEXT = """
## Serving a pruned linear layer{on}

A layer without bias, blocks of its weight 0 at random, made sparse by `sgtriton.sparsify` (which
chooses a form for each bucket of M by timing) and called under `torch.inference_mode`, each call
with a cold second-level cache; {threads} threads of {device}, PyTorch {torch}, commit {commit}.
Speed-up over the dense layer: `F.linear`, on a CPU for 16 bits the faster of these and of a copy of
the weight in fp32. Geometric means over (N, K) = {shapes}; the ideal is 1 / density.
Peers, in the same turns: {peers} (onnxruntime's threads do not spin between calls). Rerun:
`{rerun}`. All cells: `{file}`.

"""


@dataclass(frozen=True, kw_only=True)
class Row(Timing):
    """One row of the CSV; ``form`` is the one that the layer chose, ``sparsity`` what was asked."""

    form: str
    sparsity: float


@dataclass(frozen=True)
class Cell:
    """What one cell of the grid says of this package."""

    dtype: str
    block: int
    sparsity: float
    M: int
    N: int
    K: int
    form: str
    density: float
    dense_ms: float
    speedup: float
    share: float  # of the ideal, which is 1 / density
    best_peer: str
    ahead: float  # our time over the best peer's, less 1


def cells(rows: Iterable[Row]) -> list[Cell]:
    """The measured rows by cell; a cell without this package's layer says nothing."""
    found = []

    def key(r: Row):
        return (r.dtype, r.block, r.sparsity, r.N, r.K, r.M)

    of_cells = [row for row in measured(rows) if row.op == "bsr_linear"]
    for _, group in itertools.groupby(of_cells, key):
        by_name = {r.provider: r for r in group}
        ours = by_name.get("sgtriton")
        if ours is None or math.isnan(ours.ratio):
            continue
        others = [r for name, r in by_name.items() if not name.startswith(("sgtriton", "dense"))]
        best = min(others, key=lambda r: r.ms_p50, default=None)
        found.append(
            Cell(
                ours.dtype, side(ours.block), ours.sparsity, ours.M, ours.N, ours.K, ours.form,
                ours.density,
                dense_ms=ours.ms_p50 / ours.ratio,
                speedup=1 / ours.ratio,
                share=ours.density / ours.ratio,
                best_peer=best.provider if best else "-",
                ahead=ours.ms_p50 / best.ms_p50 - 1 if best else 0.0,
            )
        )  # fmt: skip
    return found


def side(block: str) -> int:
    """Of a square block."""
    return int(block.split("x")[0])


def mean_share(found: Iterable[Cell]) -> float:
    """Geometric mean of the shares of the ideal; NaN where there is no cell."""
    shares = [c.share for c in found]
    return statistics.geometric_mean(shares) if shares else math.nan


def mean_speedup(found: Iterable[Cell]) -> float:
    """Geometric mean of the speed-ups; NaN where there is no cell."""
    speedups = [c.speedup for c in found]
    return statistics.geometric_mean(speedups) if speedups else math.nan


def speedups_table(found: Iterable[Cell], dtype: str) -> str:
    """A Markdown table for readers: geometric means over the shapes, by block and sparsity."""
    found = [c for c in found if c.dtype == dtype]
    rows = sorted({c.M for c in found})
    lines = [
        "| block | sparsity | " + " | ".join(f"M = {m}" for m in rows) + " | of the ideal |",
        "|---" * (len(rows) + 3) + "|",
    ]
    for block, sparsity in sorted({(c.block, c.sparsity) for c in found}):
        group = [c for c in found if (c.block, c.sparsity) == (block, sparsity)]
        means = [_figure(mean_speedup(c for c in group if m == c.M)) for m in rows]
        share = _figure(mean_share(group))
        lines.append(f"| {block}x{block} | {sparsity:.0%} | {' | '.join(means)} | {share} |")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def losses(found: Iterable[Cell]) -> str:
    """A Markdown list of the cells that are behind: dense, or a peer by more than 5 %."""
    lines = []
    for c in found:
        cell = f"{c.dtype}, block {c.block}, {c.sparsity:.0%}, (M, N, K) = ({c.M}, {c.N}, {c.K})"
        if c.speedup < SLOWER:
            lines.append(f"- {cell}: {c.speedup:.2f} of dense ({c.dense_ms:.2f} ms)")
        if c.ahead > AHEAD:
            lines.append(
                f"- {cell}: {c.best_peer} ahead by {c.ahead:.0%} "
                f"({c.dense_ms / c.speedup:.3f} ms against dense {c.dense_ms:.3f} ms)"
            )
    return "\n".join(lines) or "- none"


def losses_in_short(found: Iterable[Cell]) -> str:
    """A Markdown list for the README: the cells behind dense, and by block those behind peers."""
    found = list(found)
    slower = [c for c in found if c.speedup < SLOWER]
    line = f"- slower than {SLOWER} of dense: {len(slower)} of {len(found)} cells"
    if slower:
        counts = Counter((c.dtype, c.block) for c in slower).items()
        by_block = [f"{count} of {dtype}, {side}x{side}" for (dtype, side), count in counts]
        worst = min(slower, key=lambda c: c.speedup)
        line += (
            f" ({'; '.join(by_block)}); by most, {worst.speedup:.2f}, {worst.dtype}, block "
            f"{worst.block} at M = {worst.M} and {worst.sparsity:.0%}, (N, K) = ({worst.N}, "
            f"{worst.K})"
        )
    lines = [line]
    with_peers = [c for c in found if c.best_peer != "-"]
    for block in dict.fromkeys(c.block for c in with_peers):
        group = [c for c in with_peers if c.block == block]
        behind = [c for c in group if c.ahead > AHEAD]
        dtypes = ", ".join(dict.fromkeys(c.dtype for c in group))
        line = (
            f"- blocks of {block}x{block}, {dtypes}: a peer ahead by more than {AHEAD:.0%} in "
            f"{len(behind)} of {len(group)} cells"
        )
        if behind:
            by_m = [
                f"{count} at M = {m}" for m, count in sorted(Counter(c.M for c in behind).items())
            ]
            worst = max(behind, key=lambda c: c.ahead)
            line += (
                f" ({', '.join(by_m)}); by most, {worst.ahead:.0%}, {worst.best_peer} at "
                f"M = {worst.M} and {worst.sparsity:.0%}, (N, K) = ({worst.N}, {worst.K})"
            )
        lines.append(line)
    return "\n".join(
        textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines
    )


def table(rows: list[Row]) -> str:
    """The cells for a terminal, and what they say in all."""
    found = cells(rows)
    headers = [
        "dtype", "block", "sparsity", "N, K", "M", "dense ms", "form", "speed-up", "of ideal",
        "best peer", "peer ahead",
    ]  # fmt: skip
    lines = [
        [
            c.dtype, str(c.block), f"{c.sparsity:.0%}", f"{c.N}, {c.K}", str(c.M),
            f"{c.dense_ms:.2f}", c.form, f"{c.speedup:.2f}", f"{c.share:.2f}", c.best_peer,
            f"{c.ahead:.0%}" if c.ahead > 0 else "",
        ]
        for c in found
    ]  # fmt: skip
    text = format_table(headers, lines, align="lrrlrrlrrlr")
    for dtype, block in sorted({(c.dtype, c.block) for c in found}):
        group = [c for c in found if (c.dtype, c.block) == (dtype, block)]
        worst = min(group, key=lambda c: c.speedup)
        behind = [c for c in group if c.ahead > AHEAD]
        share = mean_share(group)
        of_ideal = "" if math.isnan(share) else f"{share:.2f} of the ideal; "
        text += (
            f"\n{dtype}, block {block}: {of_ideal}slowest {worst.speedup:.2f} of dense; a peer "
            f"ahead by more than {AHEAD:.0%} in {len(behind)} of {len(group)} cells"
        )
    return text


def section(rows: list[Row], on: str, file: str) -> str:
    """The page's section."""
    found = cells(rows)
    if not found:
        return ""
    tried = measured(rows)
    others = [r.provider for r in tried if not r.provider.startswith(("sgtriton", "dense", "roof"))]
    text = paragraphs(_TEXT.format(
        on=on, file=file, peers=", ".join(dict.fromkeys(others)) or "none",
        shapes=", ".join(map(str, dict.fromkeys((c.N, c.K) for c in found))),
        rerun="python -m bench sweep serve" + " --device cuda" * bool(on),
        **summary(tried),
    ))  # fmt: skip
    for dtype in dict.fromkeys(c.dtype for c in found):
        text += f"{dtype}:\n\n{speedups_table(found, dtype)}\n\n"
        for block in sorted({c.block for c in found if c.dtype == dtype}):
            group = [c for c in found if (c.dtype, c.block) == (dtype, block)]
            worst = min(c.speedup for c in group)
            text += (
                f"Block {block}: {mean_share(group):.2f} of the ideal; slowest cell "
                f"{worst:.2f} of dense.\n"
            )
        text += "\n"
    if lines := notes(rows):
        text += "Not measured:\n\n" + "".join(f"- {line}\n" for line in lines) + "\n"
    if reached := [r for r in tried if r.provider == "roof"]:
        text += "Measured roofs: " + ", ".join(map(_roof, reached)) + ".\n\n"
    behind = sum(c.speedup < SLOWER or c.ahead > AHEAD for c in found)
    return text + details(
        f"Cells behind dense, or behind a peer by more than {AHEAD:.0%}: {behind or 'none'}",
        losses(found),
    )


def _roof(row: Row) -> str:
    if row.op == "copy":
        return f"{row.dtype} copy {row.gb_s:.1f} GB/s"
    return f"{row.dtype} dense product {row.tflops:.3g} TFLOP/s"
