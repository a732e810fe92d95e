"""Which candidate a record names: the user's cache and the tables that ship are read here.

A record is data from outside: it can name a candidate and do nothing else. Whatever is wrong with
a file, the answer is that there is none. Files are written by ``sgtriton`` only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ._triton import INTERPRETED, version
from .cards import card_of

FORMAT = 1
MOST_BYTES = 1 << 14  # of a record; a longer file is none
_FOLDER = Path(__file__).parent
_TABLES = _FOLDER / "configs"


def cache_folder() -> Path | None:
    """Where this user's records lie; ``None`` without a home."""
    environ = os.environ
    if folder := environ.get("SGTRITON_CACHE_DIR"):
        return Path(folder) / "tune"
    if folder := environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "sgtriton" / "tune"
    home = os.path.expanduser("~")
    return None if home == "~" else Path(home) / ".cache" / "sgtriton" / "tune"


def file_name(key: Mapping[str, object]) -> str:
    """The name of the file of a record."""
    text = json.dumps(key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32] + ".json"


def read_record(folder: Path, key: Mapping[str, object]) -> dict[str, Any] | None:
    """The record of a key, or ``None`` where there is no whole one.

    Its candidate is text, which may name nothing.
    """
    found = read_json(folder / file_name(key), MOST_BYTES)
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("key") != key:
        return None
    # a number may be equal and of another kind
    kinds = {name: type(value) for name, value in key.items()}
    if {name: type(value) for name, value in found["key"].items()} != kinds:
        return None
    return found if isinstance(found.get("candidate"), str) else None


def read_json(path: Path, most: int) -> Any:
    """What a regular file of up to ``most`` bytes holds, or ``None``."""
    try:
        # not blocking: a pipe of that name would never end
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return None
            data = b""
            while len(data) <= most and (part := os.read(file, most + 1 - len(data))):
                data += part
        finally:
            os.close(file)
        return json.loads(data) if len(data) <= most else None
    except (OSError, ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Table:
    """A table that ships.

    Args:
        card: whose it is.
        architecture: of that card.
        entries: text of a key -> entry, with the table's status.
    """

    card: str
    architecture: str
    entries: dict[str, dict[str, Any]]


@functools.cache
def tables() -> tuple[Table, ...]:
    """The tables that ship, measured ones first."""
    read = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(_TABLES.glob("*.json"))]
    read.sort(key=lambda table: table["status"] != "measured")
    return tuple(
        Table(
            table["card"],
            table["architecture"],
            {key_text(e["key"]): e | {"status": table["status"]} for e in table["entries"]},
        )
        for table in read
    )


def key_text(key: Mapping[str, object]) -> str:
    """A key as text that a dictionary takes."""
    return json.dumps(key, sort_keys=True)


def table_entries(
    device: torch.device, keys: list[dict[str, object]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries under one of ``keys``: of this card's table, then of those of its architecture.

    Yields:
        The card whose table it is, and the first of its entries.
    """
    if device.type != "cuda" or not tables():
        return
    arch = architecture(device)
    own = card_of(device_name(device), arch)
    fitting = [table for table in tables() if table.card == own or table.architecture == arch]
    for table in sorted(fitting, key=lambda table: table.card != own):
        found = (table.entries.get(key_text(key)) for key in keys)
        if (entry := next(filter(None, found), None)) is not None:
            yield table.card, entry


@functools.cache
def device_name(device: torch.device) -> str:
    """What a device is called by its driver; of a CPU, by the system."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or "unknown"


@functools.cache
def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942``; of a CPU the widest instructions that PyTorch uses."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type


def place(device: torch.device, op: str, impl: str) -> dict[str, object]:
    """What a time depends on beside the product: the device, and what computes."""
    found: dict[str, object] = {
        "device": device_name(device),
        "architecture": architecture(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "library": _torch_version() if impl == "torch" else f"triton {version()}",
        "source": source(op, impl),
    }
    if impl == "triton" and INTERPRETED:
        found["library"] = "interpreter"
    return found


@functools.cache
def _torch_version() -> str:
    return "torch " + ".".join(torch.__version__.split("+")[0].split(".")[:2])


# what computes the products, by op and implementation: a change of theirs makes records stale
_SOURCES = {
    ("bsr_linear", "triton"): (
        "_bf16.py",
        "_triton.py",
        "activations.py",
        "bsr_linear_passes.py",
        "bsr_product.py",
    ),
    ("bsr_linear", "torch"): ("_scratch.py", "block_products.py", "bsr_library.py", "bsr_torch.py"),
    ("gated_linear", "triton"): (
        "_bf16.py",
        "_triton.py",
        "gate.py",
        "gate_bits.py",
        "gated_matmul.py",
        "gated_product.py",
        "kinds.py",
        "tiles.py",
    ),
    ("gated_linear", "torch"): (
        "_scratch.py",
        "bitmap.py",
        "block_products.py",
        "gate_torch.py",
        "gated_torch.py",
        "skip_torch.py",
    ),
    ("bsr_conv", "triton"): (
        "_bf16.py",
        "_triton.py",
        "activations.py",
        "bsr_conv_passes.py",
        "bsr_conv_product.py",
        "bsr_conv_torch.py",
        "conv_blocks.py",
    ),
    ("bsr_conv", "torch"): (
        "_scratch.py",
        "bsr_conv_passes.py",
        "bsr_conv_torch.py",
        "conv_blocks.py",
    ),
}


@functools.cache
def source(op: str, impl: str) -> str:
    """A hash of the code that computes the products of an op, or of its pass."""
    found = hashlib.sha256()
    for name in _SOURCES[op.split(" ")[0], impl]:
        found.update((_FOLDER / name).read_bytes())
    return found.hexdigest()[:16]
