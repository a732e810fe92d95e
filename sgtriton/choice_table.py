"""Tables of choices for a card: what ``kernels/sgtriton_kernels/configs`` holds.

An entry names a candidate for a product and says how much faster it is than what reasoning gives,
as it was measured on the card or predicted for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgtriton_kernels._triton import version
from sgtriton_kernels.candidate import ANALYTIC
from sgtriton_kernels.lookup import analytic
from sgtriton_kernels.records import key_text, read_json, source

from .files import replace_file
from .tune_report import Tuned

_MOST_BYTES = 1 << 24  # of a table; a longer file is none
_MOST_GAIN = 1e3  # infinite where reasoning is wrong, which no JSON holds


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
    computed = sorted({(e["key"]["op"].split(" ")[0], e["key"]["impl"]) for e in entries})
    return {
        "card": name,
        "architecture": architecture,
        "status": status,
        **facts,
        "triton": version(),
        "sources": {f"{op} {impl}": source(op, impl) for op, impl in computed},
        "entries": list(entries),
    }


def measured_entries(rows: Iterable[Tuned]) -> list[dict[str, Any]]:
    """An entry for each product that was timed and that something computes faster than reasoning.

    And for those near them that nothing does, see :func:`with_stops`. Steps with gates whose open
    share nobody counts have none: what is the fastest near a target is not at the start.
    """
    entries, reasoned = {}, []
    for row in rows:
        key, gain = row.cell.key(), round(min(row.over_reasoned, _MOST_GAIN), 2)
        if row.status not in ("kept", "changed") or key["density"] == "unknown":
            continue
        if row.choice.candidate == analytic(row.cell).candidate or not gain > 1:
            entries.pop(key_text(key), None)
            reasoned.append(key)
        else:
            name = row.choice.candidate.name
            entries[key_text(key)] = {"key": key, "candidate": name, "gain": gain}
    return with_stops([*entries.values()], reasoned)


def with_stops(
    entries: Sequence[Mapping[str, Any]], reasoned: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The entries, and those that keep a lookup from taking the entry of other numbers of rows.

    A lookup asks the neighbouring buckets of rows where a product's own is not in the table, so
    that a product which reasoning serves best needs an entry that says so where they have one.

    Args:
        reasoned: keys of the products that nothing else serves faster.
    """
    taken = {key_text(entry["key"]) for entry in entries}
    stops = {
        key_text(key): {"key": dict(key), "candidate": ANALYTIC, "gain": 1.0}
        for key in reasoned
        if key_text(key) not in taken and any(key_text(near) in taken for near in _neighbours(key))
    }
    return [*map(dict, entries), *stops.values()]


def _neighbours(key: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The keys that a lookup may take instead."""
    return (dict(key) | {"rows": rows} for rows in (key["rows"] // 2, 2 * key["rows"]))


def entry_of(key: Mapping[str, Any]) -> str:
    """Which entries of a table a key has: those of even and of uneven patterns."""
    return key_text(dict(key) | {"balance": ""})


@dataclass(frozen=True)
class Held:
    """What the predicted table of a file is of.

    Args:
        products: how many were ranked for it.
        entries: :func:`entry_of` its keys; products that reasoning serves best may have none.
    """

    products: int = 0
    entries: frozenset[str] = frozenset()


def products_held(path: Path, name: str) -> Held:
    """What the predicted table of a card that a file holds was ranked for; nothing without a file.

    Raises:
        ValueError: the file holds something else, which nobody wants to lose.
    """
    if not os.path.lexists(path):
        return Held()
    table = read_json(path, _MOST_BYTES)
    if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
        raise ValueError(f"out must be a new file or a table of choices, got {str(path)!r}")
    is_of, ranked = (table.get("card"), table.get("status")), table.get("ranked")
    if is_of != (name, "predicted") or type(ranked) is not int:
        raise ValueError(
            f"out must be a new file or a predicted table of {name}, got {str(path)!r}, which is "
            f"the table of {is_of[0]!r}, {is_of[1]!r}"
        )
    keys = [entry.get("key") for entry in table["entries"] if isinstance(entry, dict)]
    return Held(ranked, frozenset(entry_of(key) for key in keys if isinstance(key, dict)))


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table, an entry a line.

    Raises:
        OSError: it cannot be written.
    """
    head = {name: value for name, value in table.items() if name != "entries"}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    *most, last = [f"  {json.dumps(entry)}" for entry in table["entries"]] or [""]
    entries = [*(f"{entry}," for entry in most), *filter(None, [last])]
    text = "\n".join(["{", *lines, ' "entries": [', *entries, " ]", "}"]) + "\n"
    replace_file(path, text.encode())


def file_name(name: str) -> str:
    """The name of a device's table: that of ``"H100 SXM"`` is ``h100_sxm.json``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") + ".json"
