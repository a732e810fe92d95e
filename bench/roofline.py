"""What a card should do with block-sparse serving, by :mod:`sgtriton.roofline`: tables of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sgtriton_kernels.bsr_candidates import BSR_LINEAR_CANDIDATES
from sgtriton_kernels.cards import CARD_NAMES, card
from sgtriton_kernels.cell import Cell

from sgtriton.card_rates import fill_bandwidth, tile_reach
from sgtriton.roofline import (
    at_sparsity,
    break_even,
    dense_seconds,
    ideal_speedup,
    predict,
    predicted_speedup,
)

from . import timed
from .rows import write

MS = (1, 16, 64, 512, 4096)
BLOCKS = (16, 32, 64, 128)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SHAPES = ((4096, 4096), (14336, 4096))  # N, K
PREDICTED = "predicted, not measured"


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a product on a card; times in microseconds, ``fill`` in TB/s.

    ``break_even`` is the least sparsity, in hundredths, from which on the prediction is not below
    dense; 1 where there is none.
    """

    card: str
    dtype: str
    M: int
    N: int
    K: int
    block: int
    sparsity: float
    ideal: float
    predicted: float
    bound: str
    break_even: float
    dense_us: float
    sparse_us: float
    fill: float
    fill_from: str
    tile: str
    status: str


def predict_rows(
    cards: Sequence[str] = CARD_NAMES,
    ms: Sequence[int] = MS,
    blocks: Sequence[int] = BLOCKS,
    sparsities: Sequence[float] = SPARSITIES,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> list[Row]:
    """Every combination."""
    rows = []
    for name in cards:
        on = card(name)
        bandwidth, origin = fill_bandwidth(on)
        for N, K in shapes:
            for M in ms:
                for block in blocks:
                    sizes = M, N, K, (block, block), 0, torch.bfloat16
                    cell = Cell("bsr_linear fwd", "triton", *sizes)
                    dense = dense_seconds(on, cell)
                    even = break_even(
                        lambda s, on=on, cell=cell: predicted_speedup(on, at_sparsity(cell, s))
                    )
                    for sparsity in sparsities:
                        found = predict(on, at_sparsity(cell, sparsity))
                        rows.append(
                            Row(
                                card=name, dtype="bfloat16", M=M, N=N, K=K, block=block,
                                sparsity=sparsity,
                                ideal=round(ideal_speedup(on, cell, sparsity), 2),
                                predicted=round(dense / found.seconds, 2),
                                bound=found.bound, break_even=even,
                                dense_us=round(dense * 1e6, 1),
                                sparse_us=round(found.seconds * 1e6, 1),
                                fill=round(bandwidth / 1e12, 1), fill_from=origin,
                                tile=found.tile.name, status=PREDICTED,
                            )
                        )  # fmt: skip
    return rows


def roofline_table(rows: Sequence[Row]) -> str:
    """A Markdown table, one row a card: speed-up at 90 % for three blocks, and the break-even.

    Args:
        rows: of :func:`predict_rows`; those of 4096 x 4096 are shown.
    """
    ms, blocks = (1, 64, 4096), (32, 64, 128)
    found = {
        (r.card, r.M, r.block): r
        for r in rows
        if SHAPES[0] == (r.N, r.K) and r.sparsity == 0.9 and r.M in ms and r.block in blocks
    }
    lines = [
        f"| {PREDICTED} | " + " | ".join(f"M = {m}" for m in ms) + " |",
        "|---" * (1 + len(ms)) + "|",
    ]
    for name in dict.fromkeys(r.card for r in rows):
        cells = []
        for m in ms:
            group = [found[name, m, block] for block in blocks]
            speedups = " / ".join(f"{r.predicted:.1f}" for r in group)
            evens = ["-" if r.break_even == 1 else f"{r.break_even:.0%}" for r in group]
            cells.append(f"{speedups} ({' / '.join(evens if len(set(evens)) > 1 else evens[:1])})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reach_table(cards: Sequence[str] = CARD_NAMES, block: int = 128) -> str:
    """A Markdown table: what share of each card's peak the shapes among the candidates can reach.

    Bounds are the matrix instruction and what fills shared memory; rows of ``x`` fill the tile.
    """
    shapes = {}
    for tile in (c.tile for c in BSR_LINEAR_CANDIDATES):
        assert tile is not None
        if tile.form != "vector":
            out = 2 * block if tile.form == "pairs" else min(tile.BLOCK_N, block)
            shapes.setdefault((tile.form, out, tile.BLOCK_M), replace(tile, BLOCK_N=out))
    lines = [
        f"| {PREDICTED}: form, outputs x rows | " + " | ".join(cards) + " |",
        "|---" * (1 + len(cards)) + "|",
    ]
    for (form, out, rows), tile in shapes.items():
        cells = [f"{tile_reach(card(name), tile):.0%}" for name in cards]
        lines.append(f"| {form}, {out} x {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``roofline`` to the command line."""
    command = commands.add_parser("roofline", help="what each card should reach, on paper")
    command.add_argument("--cards", nargs="+", choices=CARD_NAMES, default=CARD_NAMES)
    timed.add_out(command, "roofline")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    timed.settle_out(arguments, tuple(arguments.cards) == tuple(CARD_NAMES))
    rows = predict_rows(arguments.cards)
    write(arguments.out, rows)
    print(
        f"Speed-up at 90 % sparsity (break-even); blocks 32 / 64 / 128, N = K = 4096: {PREDICTED}"
    )
    print()
    print(roofline_table(rows))
    print(f"\nShare of the peak that a tile can reach, block 128: {PREDICTED}\n")
    print(reach_table(arguments.cards))
    return 0
