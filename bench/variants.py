"""Every kernel that ships, as its launcher launches it: what the compile report compiles."""

from __future__ import annotations

from dataclasses import replace

from . import variants_blocks, variants_gated
from .variant import Variant


def variants() -> list[Variant]:
    """All of them, each once; ``rows`` says for which batches a tile is taken."""
    found: dict[str, Variant] = {}
    for variant in (
        *variants_gated.elementwise(),
        *variants_gated.gated_linear(),
        *variants_blocks.bsr_linear(),
        *variants_blocks.bsr_conv(),
        *variants_blocks.gated_to_bsr(),
    ):
        key = repr((variant.op, variant.launch))
        if (first := found.get(key)) is not None:
            both = first.targets + variant.targets if first.targets and variant.targets else ()
            variant = replace(first, rows=first.rows + variant.rows, targets=both)
        found[key] = variant
    return list(found.values())
