"""Write README_BENCH.md from the CSVs in ``bench/results``, and draw their charts."""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sgtriton_kernels.cards import CARD_NAMES, card

from . import (
    accuracy,
    bandwidth,
    charts,
    native,
    overhead,
    readme,
    roofline,
    tuning,
)
from .rows import RESULTS, details, read
from .sweep import SWEEPS

PAGE = Path(__file__).parents[1] / "README_BENCH.md"

_HEAD = """# Measurements

Written by `python -m bench report` from the CSVs in `bench/results`; edit neither by hand. Every
figure was measured, beside what it is compared with, unless its section says *predicted*; what is
not here was not measured. At each timed call the second-level cache is cold, on a CPU too, and
larger ones hold what the candidate left there in a call just before, unless a section says
otherwise. Records of a user's own tuner are neither read nor written.

`python -m bench sweep train|serve|conv|model` measures a grid again, with `--device cuda` on a
card, with `--quick --out FILE` a small one; a run that was stopped goes on where it was. Then
`python -m bench report` writes this page and its charts. A point marked as slower is shown like
any other.

"""

_ROOFLINE = """
## Serving on cards: predicted, not measured

From data sheets, assumptions and the tiles that the package takes, by the formulas of
`sgtriton/roofline.py`; bf16, N = K = 4096, 90 % of the blocks closed: speed-up over the dense
product for blocks of 32 / 64 / 128, in brackets the sparsity from which the product over blocks is
faster. A first run on a card will show what the model leaves out. Rerun:
`python -m bench roofline`.

"""

_COMPILED = """
## What the compilers make of the kernels

Every kernel, variant and tile that ships, compiled for every card without one: kernels compiled,
and in brackets those that spill registers, lack their matrix instructions or copy more narrowly
or with fewer stages than asked for. All rows: `bench/results/compile_report.csv`.

"""


def sections() -> str:
    """The sections that have rows, the CPU's before the cards'."""
    order = ("train", "serve", "conv", "model")
    text = ""
    if rows := read(RESULTS / "accuracy.csv", accuracy.Row):
        text += accuracy.section(rows)
    for name in order:
        text += _sweep(name, RESULTS)
        if name == "serve" and (calls := read(RESULTS / "overhead.csv", overhead.Row)):
            text += overhead.section(calls)
    for module, file in (
        (tuning, "tuning.csv"), (native, "native.csv"), (bandwidth, "bandwidth.csv"),
    ):  # fmt: skip
        if rows := read(RESULTS / file, module.Row):
            text += module.section(rows)
    for folder in _cards_folders():
        for name in order:
            text += _sweep(name, folder)
    if predicted := read(RESULTS / "roofline.csv", roofline.Row):
        text += _ROOFLINE + roofline.roofline_table(predicted) + "\n"
    if (compiled := RESULTS / "compile_report.csv").exists():
        text += _compiled(_lines(compiled))
    return text


def _sweep(name: str, folder: Path) -> str:
    sweep = SWEEPS[name]
    file = folder / f"{sweep.file}.csv"
    rows = read(file, sweep.row)
    on = "" if folder == RESULTS or not rows else f" on {rows[0].device}"
    shown = f"bench/{file.relative_to(RESULTS.parent).as_posix()}"
    return sweep.section(rows, on, shown) + charts.markdown(_charts(name, folder))


def _charts(name: str, folder: Path) -> list[charts.Chart]:
    sweep = SWEEPS[name]
    prefix = "" if folder == RESULTS else f"{folder.name}_"
    return charts.of(sweep.file, read(folder / f"{sweep.file}.csv", sweep.row), prefix)


def _cards_folders() -> list[Path]:
    return sorted(path for path in RESULTS.iterdir() if path.is_dir())


def all_charts() -> list[charts.Chart]:
    """The charts of all results."""
    return [
        chart
        for folder in (RESULTS, *_cards_folders())
        for name in SWEEPS
        for chart in _charts(name, folder)
    ]


def _compiled(rows: list[dict[str, str]]) -> str:
    wrong = [row for row in rows if row["violations"] not in ("", "-")]
    listed = [
        f"- Triton {r['triton']}, {r['target']}: {r['op']} ({r['variant']}), tile {r['tile']}: "
        f"{r['violations']}\n"
        for r in wrong
    ]
    text = _COMPILED + compiled_table(rows) + "\n"
    return text + ("\n" + details(f"Kernels in brackets: {len(wrong)}", "".join(listed))) * bool(
        wrong
    )


def _lines(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def origins() -> str:
    """A Markdown table of what ran where, one row a CSV of timings or trainings."""
    lines = [
        "| results | rows | device | dtype | PyTorch | Triton | Python | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("**/*.csv")):
        rows = _lines(path)
        if not rows or "commit" not in rows[0]:
            continue  # predictions and what compilers say
        columns = (("device", "cpu"), ("dtype",), ("torch",), ("triton",), ("python",), ("commit",))
        cells = [_values(rows, names) for names in columns]
        name = path.relative_to(RESULTS).as_posix()
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _values(rows: list[dict[str, str]], names: tuple[str, ...]) -> str:
    found = (next((row[name] for name in names if name in row), "-") for row in rows)
    return ", ".join(dict.fromkeys(found))


def not_measured(devices: Iterable[str]) -> list[str]:
    """The cards of ``cards.json`` of which no device is one, by its driver's name for it."""
    found = {device.strip() for device in devices}
    return [name for name in CARD_NAMES if not found.intersection(card(name).device_names)]


def compiled_table(rows: list[dict[str, str]]) -> str:
    """Kernels by target and Triton, in brackets those with violations."""
    tritons = list(dict.fromkeys(row.get("triton", "-") for row in rows))
    compiled = Counter((row["target"], row.get("triton", "-")) for row in rows)
    wrong = Counter(
        (row["target"], row.get("triton", "-"))
        for row in rows
        if row["violations"] not in ("", "-")
    )
    lines = [f"| target | {' | '.join(f'Triton {t}' for t in tritons)} |"]
    lines.append("|---" * (len(tritons) + 1) + "|")
    for target in dict.fromkeys(row["target"] for row in rows):
        cells = [
            f"{compiled[target, t]} ({wrong[target, t]})" if compiled[target, t] else "-"
            for t in tritons
        ]
        lines.append(f"| {target} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page, from what the results folder holds."""
    devices = {
        row.get("device", "")
        for folder in _cards_folders()
        for path in folder.glob("*.csv")
        for row in _lines(path)
    }
    cards = not_measured(devices)
    text = _HEAD + f"**Not measured yet:** {', '.join(cards)}.\n\n" * bool(cards)
    return text + "## What ran where\n\n" + origins() + "\n" + sections()


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``report`` to the command line."""
    command = commands.add_parser(
        "report", help="write README_BENCH.md, its charts and README.md's figures from the CSVs"
    )
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    path = readme.README
    text = readme.with_results(path.read_text(encoding="utf-8"))
    PAGE.write_text(page(), encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.name} and what {path.name} says of results")
    try:
        written = charts.write(all_charts())
    except ImportError as error:
        raise ValueError(f"charts are as they were: {error} (pip install matplotlib)") from error
    print(f"drew {len(written) // 2} charts into {charts.FOLDER}")
    return 0
