"""Cross-compile a kernel for every card, without one, and read what the compiler made of it."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgtriton_kernels._triton import version

# (backend, architecture, warp size): every target of the package
CARDS = [
    ("cuda", 80, 32), ("cuda", 86, 32), ("cuda", 89, 32), ("cuda", 90, 32),
    ("cuda", 100, 32), ("cuda", 120, 32), ("hip", "gfx942", 64), ("hip", "gfx1100", 32),
]  # fmt: skip
TARGETS: dict[str, tuple[str, Any, int]] = {
    f"sm_{card[1]}" if card[0] == "cuda" else str(card[1]): card for card in CARDS
}
COPY_ENGINES = ("sm_90", "sm_100", "sm_120")  # which bring tiles in by themselves
# bytes of shared memory that a program can have
SHARED_LIMITS = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024,
    "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024, "gfx1100": 64 * 1024,
}  # fmt: skip
# instructions that read operands from shared memory while the next steps' tiles arrive there; for
# others the step that is multiplied lies in registers
_FROM_BUFFERS = ("wgmma", "tcgen05.mma")

_PTX = {"load": "ld", "store": "st"}
_CP_ASYNC = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)"
# bytes a lane; AMD names widths in double words before RDNA 3, in bits from it on
_AMD_BYTES = {
    "ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1, "b8": 1,
    "ushort": 2, "sshort": 2, "u16": 2, "i16": 2, "b16": 2,
    "dword": 4, "b32": 4, "dwordx2": 8, "b64": 8,
    "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one card."""

    assembly: str  # PTX or AMDGCN
    shared: int  # bytes of shared memory
    spills: int  # bytes of registers spilled per thread; AMD: registers
    registers: int  # per thread
    ttgir: str = ""  # Triton's code for GPUs, where layouts and buffers are visible

    @property
    def matrix_instruction(self) -> str | None:
        """The matrix instruction in the code, if there is one."""
        found = re.search(r"wgmma|tcgen05\.mma|mma\.sync|v_mfma|v_wmma", self.assembly)
        return found.group() if found else None

    @property
    def left_operand(self) -> str | None:
        """Where Hopper's and Blackwell's matrix units read the left operand from.

        ``"registers"`` | ``"tensor memory"`` | ``"shared memory"``; ``None`` for other
        instructions, and where several products of one kernel differ.
        """
        products = re.findall(r"ttng\.(?:warp_group_dot|tc_gen5_mma) .*? : (.*)", self.ttgir)
        found = {_place(types) for types in products}
        return found.pop() if len(found) == 1 else None

    @functools.cached_property
    def async_copies(self) -> tuple[int, ...]:
        """Bytes a thread of each ``cp.async``, in the code's order."""
        return tuple(int(size, 0) for size in re.findall(_CP_ASYNC, self.assembly))

    @functools.cached_property
    def bulk_copy(self) -> bool:
        """Whether the copy engine brings tiles in."""
        return "cp.async.bulk" in self.assembly

    @functools.cached_property
    def loads(self) -> tuple[int, ...]:
        """Bytes a thread of each load from global memory into registers."""
        return self._global("load")

    @functools.cached_property
    def accesses(self) -> tuple[int, ...]:
        """Bytes a thread of each of these loads, and of each store to global memory."""
        return self.loads + self._global("store")

    def _global(self, what: str) -> tuple[int, ...]:
        nvidia = rf"\b{_PTX[what]}\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+) "
        found = re.findall(nvidia, self.assembly)
        sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in found]
        amd = rf"\b(?:global|buffer)_{what}_(?:d16_)?(?:hi_)?([a-z]+\d*(?:x\d)?)"
        widths = re.findall(amd, self.assembly)
        return tuple(sizes) + tuple(_AMD_BYTES[w] for w in widths if w in _AMD_BYTES)

    @functools.cached_property
    def buffers(self) -> tuple[int, ...]:
        """How many stages each tile that the pipeline keeps in shared memory has."""
        return tuple(
            int(stages)
            for stages in re.findall(
                r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x\w+, #shared", self.ttgir
            )
        )


def _place(types: str) -> str | None:
    """Where the first of some types lies."""
    if types.startswith("tensor<"):
        return "registers"
    first = re.match(r"!ttg\.memdesc<[^>]*>", types)
    if first is None:
        return None
    return "tensor memory" if "tensor_memory" in first.group() else "shared memory"


def shallow_pipeline(
    num_stages: int, instruction: str | None, buffers: Sequence[int], direct: int = 2
) -> str | None:
    """How a pipeline is shallower than its launch asks for, in words; ``None`` where it is not.

    A tile takes a buffer for each stage but the one that is multiplied, and for that one as well
    where matrix units read the tile from there.

    Args:
        num_stages: of the launch.
        instruction: the matrix instruction, if there is one.
        buffers: stages of each tile that is kept in shared memory.
        direct: operands that are multiplied as they arrive; the others pass through registers.
    """
    found = sorted(buffers, reverse=True) or [0]
    if instruction in _FROM_BUFFERS and direct:
        fewest = found[:direct][-1]
        if fewest < num_stages:
            return f"tiles get {fewest} buffers, {num_stages} stages take {num_stages}"
    if found[-1] < num_stages - 1:
        return f"tiles get {found[-1]} buffers, {num_stages} stages take {num_stages - 1}"
    return None


def why_not() -> str | None:
    """Why kernels cannot be compiled for cards here; ``None`` where they can."""
    from sgtriton_kernels import _triton

    if _triton._MISSING is not None:
        return _triton._MISSING
    if _triton.INTERPRETED:
        return "the interpreter replaces the compiler: set TRITON_INTERPRET=0"
    from triton.backends import backends

    if "cpu" in backends:
        return "this Triton is the fork that compiles for the CPU: take the stock one"
    if missing := {"nvidia", "amd"} - set(backends):
        return f"this Triton has no compiler for {' and '.join(sorted(missing))}"
    return None


def compile_for(
    card,
    kernel,
    signature,
    constexprs,
    num_warps: int = 4,
    num_stages: int | None = 2,
    max_registers: int | None = None,
) -> Compiled:
    """Compile ``kernel`` for ``card`` (an element of :data:`CARDS`), to what a launch there takes.

    Triton keeps the result in its cache, where a launch with the same arguments finds it.

    Args:
        signature: argument name -> Triton type (``"*fp16"``, ``"i32"``, ``"constexpr"``).
        constexprs: argument name -> value.
        num_stages: ``None`` for the compiler's own choice.
        max_registers: of a thread on an NVIDIA card; likewise.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in order}
    if card[0] == "hip" and constexprs.get("PRECISION") == "tf32":
        constexprs = constexprs | {"PRECISION": "ieee"}  # as at launch: AMD's cards have no TF32
    attributes = _attributes(card[0], signature, constexprs)
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": num_warps}
    if num_stages is not None:
        options["num_stages"] = num_stages
    if max_registers is not None and card[0] == "cuda":
        options["maxnreg"] = max_registers
    out = triton.compile(source, target=GPUTarget(*card), options=options)
    ttgir = out.asm["ttgir"]
    if card[0] == "hip":
        text = out.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        return Compiled(text, out.metadata.shared, spills, registers, ttgir)
    usage = _resource_usage(out.asm["cubin"])
    return Compiled(
        out.asm["ptx"], out.metadata.shared, usage["LOCAL"] + usage["STACK"], usage["REG"], ttgir
    )


def _attributes(
    backend: str, signature: Mapping[str, str], constexprs: Mapping[str, Any]
) -> dict[tuple[int], list[list[Any]]]:
    """What a launch says of arguments, by their place and word for word: the cache's key has it.

    Base pointers are aligned to 16 bytes; AMD's compiler is told as well that 32 bits reach all of
    a tensor, which lets it read through buffer instructions.
    """
    from triton import knobs

    pointer: list[list[Any]] = [["tt.divisibility", 16]]
    if backend == "hip" and knobs.amd.use_buffer_ops:
        pointer.append(["tt.pointer_range", 32])
    of_text_only = version() == "3.6"  # later ones have an empty entry for every constant
    found = {}
    for i, (name, kind) in enumerate(signature.items()):
        if kind.startswith("*"):
            found[i,] = pointer
        elif kind == "constexpr" and not (of_text_only and not isinstance(constexprs[name], str)):
            found[i,] = []
    return found


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
