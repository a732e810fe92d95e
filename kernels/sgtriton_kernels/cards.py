"""What a card can do on paper, from its vendor's documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """A card's figures; ``None`` where its vendor gives none, or documents disagree.

    Args:
        name: as in :data:`CARD_NAMES`.
        arch: ``"sm_80"``, ``"gfx942"``, ...: what kernels are compiled for.
        multiprocessors: AMD: compute units.
        boost_mhz: boost clock.
        bandwidth_gbs: of the card's memory, 1e9 bytes a second.
        memory_gb: of the card's memory.
        l2_mb: second-level cache, all of it.
        last_level_mb: a cache behind it.
        l2_bytes_per_clock: what all multiprocessors together read from the second-level cache.
        shared_kib: shared memory of a multiprocessor.
        shared_program_kib: the most of it that one program may take.
        tflops_16bit: matrix units' peak for fp16 and bf16, dense, sums in fp32.
        tflops_tf32: likewise for TF32.
        tflops_fp32: peak without matrix units.
        source: the documents.
        note: what they lack, and where a figure is from if not from them.
        device_names: what the driver calls it. Other forms of a card (PCIe, mobile, another memory)
            have other figures and other names.
    """

    name: str
    arch: str
    multiprocessors: int
    boost_mhz: int
    bandwidth_gbs: float
    memory_gb: int
    l2_mb: int
    last_level_mb: int | None
    l2_bytes_per_clock: int | None
    shared_kib: int
    shared_program_kib: int
    tflops_16bit: float
    tflops_tf32: float | None
    tflops_fp32: float | None
    source: str
    note: str
    device_names: tuple[str, ...] = ()


_CARDS = {
    name: Card(name, **figures | {"device_names": tuple(figures["device_names"])})
    for name, figures in json.loads(
        Path(__file__).with_name("cards.json").read_text(encoding="utf-8")
    ).items()
}
CARD_NAMES = tuple(_CARDS)


def card(name: str) -> Card:
    """The figures of a card.

    Raises:
        ValueError: no card of that name is known.
    """
    if name not in _CARDS:
        raise ValueError(f"no card is named {name!r}, only {', '.join(CARD_NAMES)}")
    return _CARDS[name]


def named_card(name: str, *others: str) -> str:
    """The card that a user means: one of :data:`CARD_NAMES`, or of ``others``.

    Case, spaces and signs do not count, and words may be left out where one card remains:
    ``"H100"`` and ``"h100_sxm"`` are ``"H100 SXM"``. Parts of words are other cards: no ``"H20"``
    is an ``"H200"``.

    Raises:
        ValueError: no card is named so, or several.
    """
    wanted = _letters(name) if isinstance(name, str) else ""
    allowed = (*others, *CARD_NAMES)
    whole = [known for known in allowed if _letters(known) == wanted]
    found = whole or [known for known in CARD_NAMES if wanted and wanted in _runs(known)]
    if len(found) > 1:
        raise ValueError(f"card must be one of {', '.join(found)}: {name!r} may be each of them")
    if not found:
        raise ValueError(f"card must be one of {', '.join(allowed)}, got {name!r}")
    return found[0]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _runs(name: str) -> set[str]:
    """Every run of neighbouring words, without what is between them."""
    words = [_letters(word) for word in name.split()]
    ends = range(len(words) + 1)
    return {"".join(words[i:j]) for i in ends for j in ends if i < j}


def card_of(device_name: str, arch: str) -> str | None:
    """Which of :data:`CARD_NAMES` a device is; ``None`` if it is none of them.

    Args:
        device_name: as its driver reports it.
        arch: ``"sm_80"``, ``"gfx942"``, ...
    """
    for name, known in _CARDS.items():
        if known.arch == arch and device_name.strip() in known.device_names:
            return name
    return None
