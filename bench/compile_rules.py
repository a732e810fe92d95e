"""What the code of every kernel that ships must hold, on every card.

How deep a pipeline is shows in the buffers of the tiles that it keeps in shared memory: of S stages
S - 1, since one step's tiles are in registers while it is computed, and S where the matrix units
themselves read the tile there (wgmma, tcgen05). Tiles that wait in registers (AMD's, of a weight
that is multiplied by gates) show in no buffer, nor do elements that are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sgtriton.cross_compile import SHARED_LIMITS, Compiled, shallow_pipeline

from .variant import Product, Variant

# the widest matrix instruction of 16-bit values, and the one for left operands under 64 rows
INSTRUCTIONS = {
    "sm_80": ("mma.sync", "mma.sync"), "sm_86": ("mma.sync", "mma.sync"),
    "sm_89": ("mma.sync", "mma.sync"), "sm_90": ("wgmma", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"), "sm_120": ("mma.sync", "mma.sync"),
    "gfx942": ("v_mfma", "v_mfma"), "gfx1100": ("v_wmma", "v_wmma"),
}  # fmt: skip
LEFT_DIRECT = {"sm_90": "registers", "sm_100": "tensor memory"}
# passes whose weight goes through registers, to be multiplied by its gates
_GATED = ("fused fwd", "fused dx", "skip fwd", "skip dx")


def violations(variant: Variant, target: str, code: Compiled) -> Iterator[str]:
    """What the code of a variant breaks, in words."""
    if code.spills:
        unit = "bytes" if target.startswith("sm_") else "registers"
        yield f"{code.spills} {unit} spilled"
    if code.shared > SHARED_LIMITS[target]:
        yield f"{code.shared} bytes of shared memory, the card has {SHARED_LIMITS[target]}"
    if (product := variant.product) is not None:
        yield from _of_product(product, variant.launch.num_warps, target, code)
    yield from _of_pipeline(variant, target, code)
    if variant.wide is not None and target.startswith("sm_"):
        wide = sum(size == 16 for size in code.accesses)
        narrow = len(code.accesses) - wide
        if wide < variant.wide or narrow > variant.narrow:
            yield (
                f"{wide} accesses of 16 bytes and {narrow} narrower ones instead of at least "
                f"{variant.wide} and at most {variant.narrow}"
            )


def _of_product(product: Product, num_warps: int, target: str, code: Compiled) -> Iterator[str]:
    if product.half:
        widest, other = INSTRUCTIONS[target]
        expected = widest if product.left_rows >= 64 else other
        if code.matrix_instruction not in (expected, widest):
            yield f"{code.matrix_instruction or 'no matrix instruction'} instead of {expected}"
        left = LEFT_DIRECT.get(target)
        if product.left_direct and left and code.left_operand != left:
            yield f"left operand in {code.left_operand or 'an unknown place'} instead of {left}"
    if product.bulk:
        if not code.bulk_copy or code.async_copies:
            yield "tiles that the copy engine does not bring in"
    elif product.copies and target.startswith("sm_") and not code.bulk_copy:
        yield from _narrow_copies(product, num_warps * 32, code)


def _of_pipeline(variant: Variant, target: str, code: Compiled) -> Iterator[str]:
    """A pipeline that holds fewer steps than the launch asked for, where that can be read."""
    num_stages = variant.launch.num_stages
    if num_stages is None or num_stages < 2:
        return
    if not code.buffers:
        must = variant.product and variant.product.ahead and target.startswith("sm_")
        if not must:
            return
    gated = variant.op in _GATED or code.left_operand in ("registers", "tensor memory")
    fault = shallow_pipeline(num_stages, code.matrix_instruction, code.buffers, 1 if gated else 2)
    if fault:
        yield fault


def _narrow_copies(product: Product, threads: int, code: Compiled) -> Iterator[str]:
    expected = {min(16, tile // threads) for tile in product.copies}
    if set(code.async_copies) != expected:
        yield (
            f"tiles copied in pieces of {sizes(code.async_copies) or 'no'} bytes instead of "
            f"{sizes(expected)}"
        )


def sizes(found: Iterable[int]) -> str:
    """Different sizes, the largest first."""
    return " ".join(map(str, sorted(set(found), reverse=True)))
