"""Tables of choices for a card: what ``kernels/sgtriton_kernels/configs`` holds.

An entry names a candidate for a product and says how much faster it is than what reasoning gives,
as it was measured on the card or predicted for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgtriton_kernels._triton import version
from sgtriton_kernels.candidate import ANALYTIC
from sgtriton_kernels.lookup import analytic
from sgtriton_kernels.records import source

from .files import replace_file
from .tune_report import Tuned


def make_table(
    name: str,
    architecture: str,
    status: str,
    entries: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """A table as files hold it.

    Args:
        name: of the card; of another device what its driver calls it.
        architecture: ``"sm_90"``, ...
        status: ``"measured"`` | ``"predicted"``.
        entries: each with ``key``, ``candidate`` and ``gain``.
        facts: for a reader.
    """
    return {
        "card": name,
        "architecture": architecture,
        "status": status,
        **facts,
        "triton": version(),
        "source": source("bsr_linear", "triton"),
        "entries": list(entries),
    }


def measured_entries(rows: Iterable[Tuned]) -> list[dict[str, Any]]:
    """An entry for each product that was timed and is not computed as reasoning has it."""
    entries = {}
    for row in rows:
        by_reason = row.choice.candidate == analytic(row.cell).candidate
        if row.status in ("kept", "changed") and not by_reason:
            key, gain = row.cell.key(), min(row.gain, 1e3)  # infinite where reasoning was wrong
            name = row.choice.candidate.name
            entries[json.dumps(key)] = {"key": key, "candidate": name, "gain": round(gain, 2)}
    assert all(entry["candidate"] != ANALYTIC for entry in entries.values())
    return [*entries.values()]


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table, an entry a line.

    Raises:
        OSError: it cannot be written.
    """
    head = {name: value for name, value in table.items() if name != "entries"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    text = "\n".join(["{", *lines, ' "entries": [', entries, " ]", "}"]) + "\n"
    replace_file(path, text.encode())


def file_name(name: str) -> str:
    """The name of a device's table: that of ``"H100 SXM"`` is ``h100_sxm.json``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json"
