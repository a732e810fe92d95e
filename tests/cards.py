"""Cross-compile a kernel for every card, without one, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# (backend, architecture, warp size): every target of the package
CARDS = [
    ("cuda", 80, 32), ("cuda", 86, 32), ("cuda", 89, 32), ("cuda", 90, 32),
    ("cuda", 100, 32), ("cuda", 120, 32), ("hip", "gfx942", 64), ("hip", "gfx1100", 32),
]  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one card."""

    assembly: str  # PTX or AMDGCN
    shared: int  # bytes of shared memory
    spills: int  # bytes of registers spilled per thread
    registers: int  # per thread

    @property
    def matrix_instruction(self) -> str | None:
        """The matrix instruction in the code, if there is one."""
        found = re.search(r"wgmma|tcgen05\.mma|mma\.sync|v_mfma|v_wmma", self.assembly)
        return found.group() if found else None


def compile_for(
    card, kernel, signature, constexprs, num_warps: int = 4, num_stages: int = 2
) -> Compiled:
    """Compile ``kernel`` for ``card`` (an element of :data:`CARDS`).

    Args:
        signature: argument name -> Triton type (``"*fp16"``, ``"i32"``, ``"constexpr"``).
        constexprs: argument name -> value.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in order}
    # as at launch: base pointers are 16-byte aligned
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(order)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
    out = triton.compile(
        source,
        target=GPUTarget(*card),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    if card[0] == "hip":
        text = out.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        return Compiled(text, out.metadata.shared, spills, registers)
    usage = _resource_usage(out.asm["cubin"])
    return Compiled(
        out.asm["ptx"], out.metadata.shared, usage["LOCAL"] + usage["STACK"], usage["REG"]
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
