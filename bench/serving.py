"""Serving a pruned linear layer: this package beside the dense layer and other libraries, on a CPU.

A layer whose weight holds zero blocks at random is made sparse by ``sgtriton.sparsify``, which
chooses a form for each bucket of M, and called as a model would call it. Beside it run, in turns in
one process: ``F.linear`` on the dense weight (for bf16 in bf16, and on a copy of the weight in
fp32), this package's product over blocks whatever the layer chose, PyTorch's BSR product, scipy's,
and onnxruntime's dense one. Peers have no bf16 on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sgtriton_kernels import BlockSparse, bsr_linear
from torch import nn

import sgtriton
from sgtriton.tables import format_table
from sgtriton.timing import samples_ms

from . import timed
from .rows import circumstances, write
from .timed import DTYPES, SLOWER, Call, quantiles

ROWS = (1, 16, 64, 512)
BLOCKS = (16, 32, 64)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096))  # N, K
COUNTED_MS = 0.3  # dense times from which a cell counts in means
AHEAD = 0.05  # of a peer's time, by which ours must be longer for the peer to be called ahead
SLOW = 8  # times dense, from which a peer is timed by one call and takes no turns
DENSE = ("dense", "dense, fp32 copy")  # of which the faster is 1


@dataclass(frozen=True)
class Row:
    """One row of the CSV: a candidate in a cell; ``ratio`` is to the faster dense product."""

    candidate: str
    form: str
    dtype: str
    block: int
    sparsity: float
    density: float
    M: int
    N: int
    K: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio: float
    threads: int
    samples: int
    cpu: str
    sgtriton: str
    torch: str
    python: str
    commit: str


def pruned_layer(n: int, k: int, block: int, sparsity: float, dtype: torch.dtype) -> nn.Linear:
    """A dense layer without bias, of whose blocks that share is 0, at random."""
    layer = nn.Linear(k, n, bias=False)
    shape = (n // block, k // block)
    order = torch.randperm(math.prod(shape))
    is_open = torch.ones(shape, dtype=torch.bool)
    is_open.view(-1)[order[: round(sparsity * len(order))]] = False
    with torch.no_grad():
        mask = is_open.repeat_interleave(block, 0).repeat_interleave(block, 1)
        layer.weight.mul_(mask)
    return layer.to(dtype).eval()


def peers(weight: torch.Tensor, block: int, x: torch.Tensor, threads: int) -> dict[str, Call]:
    """What other libraries call, by name, where they are installed."""
    calls: dict[str, Call] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        bsr = weight.to_sparse_bsr((block, block))
    calls["torch.sparse BSR"] = lambda: torch.mm(bsr, x.T).T
    rows = x.numpy()
    try:
        from scipy import sparse  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        matrix = sparse.bsr_matrix(weight.numpy(), blocksize=(block, block))
        calls["scipy BSR"] = lambda: (matrix @ rows.T).T
    session = _onnx_session(weight, len(x), threads)
    if session is not None:
        calls["onnxruntime dense"] = lambda: session.run(None, {"x": rows})
    return calls


def _onnx_session(weight: torch.Tensor, m: int, threads: int):
    """A model of one product, or ``None`` where onnxruntime is missing."""
    try:
        import onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    n, k = weight.shape
    of = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [of("x", onnx.TensorProto.FLOAT, [m, k])],
        [of("y", onnx.TensorProto.FLOAT, [m, n])],
        [onnx.numpy_helper.from_array(weight.T.contiguous().numpy(), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its threads would go on waiting for work on the cores where the others are measured
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def candidates(
    layer: nn.Module, weight: torch.Tensor, matrix: BlockSparse, x: torch.Tensor, threads: int
) -> dict[str, Call]:
    """What is compared in a cell, by name; the dense products come first."""
    calls: dict[str, Call] = {"dense": lambda: F.linear(x, weight)}
    if x.dtype != torch.float32:
        wide = weight.float()
        calls["dense, fp32 copy"] = lambda: F.linear(x.float(), wide).to(x.dtype)
    calls["sgtriton"] = lambda: layer(x)
    calls["sgtriton, product over blocks"] = lambda: bsr_linear(x, matrix)
    if x.dtype == torch.float32:
        calls |= peers(weight, matrix.block[0], x, threads)
    return calls


@torch.inference_mode()
def measure(
    layer: nn.Module, weight: torch.Tensor, matrix: BlockSparse, m: int, sparsity: float,
    seconds: float,
) -> list[Row]:  # fmt: skip
    """Time the candidates of one cell in turns."""
    n, k = weight.shape
    threads = torch.get_num_threads()
    x = torch.randn(m, k).to(weight.dtype)
    calls = candidates(layer, weight, matrix, x, threads)
    reference = F.linear(x.float(), weight.float())
    slow: dict[str, float] = {}
    once = _once_ms(calls["dense"])
    for name, call in list(calls.items()):
        _check(name, call(), reference)
        if name not in DENSE and (took := _once_ms(call)) > max(SLOW * once, 20):
            slow[name] = took
            del calls[name]
    samples = samples_ms(list(calls.values()), torch.device("cpu"), seconds, rounds=7)
    taken = dict(zip(calls, samples, strict=True)) | {name: [ms] for name, ms in slow.items()}
    dense = min(statistics.median(taken[name]) for name in DENSE if name in taken)
    rows = []
    for name, ms in taken.items():
        p20, p50, p80 = quantiles(ms)
        form = layer.form_of(m) if name == "sgtriton" else "-"  # pyright: ignore
        rows.append(
            Row(
                candidate=name, form=form,
                dtype=str(weight.dtype).removeprefix("torch."),
                block=matrix.block[0], sparsity=sparsity, density=round(matrix.density, 4),
                M=m, N=n, K=k,
                ms_p20=round(p20, 4), ms_p50=round(p50, 4), ms_p80=round(p80, 4),
                ratio=round(p50 / dense, 4),
                samples=len(ms),
                **circumstances(),
            )
        )  # fmt: skip
    return rows


def _once_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _check(name: str, out, reference: torch.Tensor) -> None:
    """Nothing is timed that is wrong."""
    out = torch.as_tensor(out[0] if isinstance(out, list) else out)
    most = 2e-2 if out.dtype.itemsize == 2 else 1e-4
    error = (out.float() - reference).abs().max() / reference.abs().max()
    if not error <= most:
        raise ValueError(f"{name} is wrong: relative error {error:.1e}")


@dataclass(frozen=True)
class Cell:
    """What one cell of the grid says of this package."""

    dtype: str
    block: int
    sparsity: float
    M: int
    N: int
    K: int
    form: str
    dense_ms: float
    speedup: float
    share: float  # of the ideal, which is 1 / density
    best_peer: str
    ahead: float  # our time over the best peer's, less 1


def cells(rows: Iterable[Row]) -> list[Cell]:
    """The rows by cell."""
    found = []

    def key(r: Row):
        return (r.dtype, r.block, r.sparsity, r.N, r.K, r.M)

    for _, group in itertools.groupby(rows, key):
        by_name = {r.candidate: r for r in group}
        ours = by_name["sgtriton"]
        others = [r for name, r in by_name.items() if not name.startswith(("sgtriton", "dense"))]
        best = min(others, key=lambda r: r.ms_p50, default=None)
        found.append(
            Cell(
                ours.dtype, ours.block, ours.sparsity, ours.M, ours.N, ours.K, ours.form,
                dense_ms=ours.ms_p50 / ours.ratio,
                speedup=1 / ours.ratio,
                share=ours.density / ours.ratio,
                best_peer=best.candidate if best else "-",
                ahead=ours.ms_p50 / best.ms_p50 - 1 if best else 0.0,
            )
        )  # fmt: skip
    return found


def mean_share(found: Iterable[Cell]) -> float:
    """Geometric mean of the shares of the ideal, of cells that take long enough."""
    shares = [c.share for c in found if c.dense_ms >= COUNTED_MS]
    return statistics.geometric_mean(shares) if shares else math.nan


def speedups_table(found: Iterable[Cell], dtype: str) -> str:
    """A Markdown table for readers: geometric means over the shapes, by block and sparsity."""
    found = [c for c in found if c.dtype == dtype]
    lines = [
        "| block | sparsity | " + " | ".join(f"M = {m}" for m in ROWS) + " | of the ideal |",
        "|---" * (len(ROWS) + 3) + "|",
    ]
    for block, sparsity in itertools.product(BLOCKS, SPARSITIES):
        group = [c for c in found if (c.block, c.sparsity) == (block, sparsity)]
        if not group:
            continue
        means = []
        for m in ROWS:
            speedups = [c.speedup for c in group if m == c.M and c.dense_ms >= COUNTED_MS]
            means.append(f"{statistics.geometric_mean(speedups):.2f}" if speedups else "-")
        share = mean_share(group)
        lines.append(f"| {block}x{block} | {sparsity:.0%} | {' | '.join(means)} | {share:.2f} |")
    return "\n".join(lines)


def losses(found: Iterable[Cell]) -> str:
    """A Markdown list of the cells that are behind: dense, or a peer by more than 5 %."""
    lines = []
    for c in found:
        cell = f"{c.dtype}, block {c.block}, {c.sparsity:.0%}, (M, N, K) = ({c.M}, {c.N}, {c.K})"
        if c.speedup < SLOWER:
            lines.append(f"- {cell}: {c.speedup:.2f} of dense ({c.dense_ms:.2f} ms)")
        if c.ahead > AHEAD:
            lines.append(
                f"- {cell}: {c.best_peer} ahead by {c.ahead:.0%} "
                f"({c.dense_ms / c.speedup:.3f} ms against dense {c.dense_ms:.3f} ms)"
            )
    return "\n".join(lines) or "- none"


def losses_in_short(found: Iterable[Cell]) -> str:
    """A Markdown list for the README: the cells behind dense, and by block those behind peers."""
    found = list(found)
    slower = [
        f"{c.speedup:.4f} ({c.dtype}, block {c.block}, {c.sparsity:.0%}, (M, N, K) = "
        f"({c.M}, {c.N}, {c.K}))"
        for c in found
        if c.speedup < SLOWER
    ]
    lines = [
        f"- slower than {SLOWER} of dense: {len(slower)} of {len(found)} cells"
        f"{': ' * bool(slower)}{', '.join(slower)}"
    ]
    with_peers = [c for c in found if c.best_peer != "-"]
    for block in dict.fromkeys(c.block for c in with_peers):
        group = [c for c in with_peers if c.block == block]
        behind = [c for c in group if c.ahead > AHEAD]
        dtypes = ", ".join(dict.fromkeys(c.dtype for c in group))
        line = (
            f"- blocks of {block}x{block}, {dtypes}: a peer ahead by more than {AHEAD:.0%} in "
            f"{len(behind)} of {len(group)} cells"
        )
        if behind:
            by_m = [
                f"{count} at M = {m}" for m, count in sorted(Counter(c.M for c in behind).items())
            ]
            worst = max(behind, key=lambda c: c.ahead)
            line += (
                f" ({', '.join(by_m)}); by most, {worst.ahead:.0%}, {worst.best_peer} at "
                f"M = {worst.M} and {worst.sparsity:.0%}, (N, K) = ({worst.N}, {worst.K})"
            )
        lines.append(line)
    return "\n".join(
        textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines
    )


def table(rows: list[Row]) -> str:
    """The cells for a terminal, and what they say in all."""
    found = cells(rows)
    headers = [
        "dtype", "block", "sparsity", "N, K", "M", "dense ms", "form", "speed-up", "of ideal",
        "best peer", "peer ahead",
    ]  # fmt: skip
    lines = [
        [
            c.dtype, str(c.block), f"{c.sparsity:.0%}", f"{c.N}, {c.K}", str(c.M),
            f"{c.dense_ms:.2f}", c.form, f"{c.speedup:.2f}", f"{c.share:.2f}", c.best_peer,
            f"{c.ahead:.0%}" if c.ahead > 0 else "",
        ]
        for c in found
    ]  # fmt: skip
    text = format_table(headers, lines, align="lrrlrrlrrlr")
    for dtype, block in sorted({(c.dtype, c.block) for c in found}):
        group = [c for c in found if (c.dtype, c.block) == (dtype, block)]
        worst = min(group, key=lambda c: c.speedup)
        behind = [c for c in group if c.ahead > AHEAD]
        text += (
            f"\n{dtype}, block {block}: {mean_share(group):.2f} of the ideal; slowest "
            f"{worst.speedup:.2f} of dense; a peer ahead by more than 5 % in {len(behind)} of "
            f"{len(group)} cells"
        )
    return text


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``serving`` to the command line."""
    command = commands.add_parser("serving", help="a pruned layer served, beside dense and peers")
    timed.add_arguments(command, "serving", 0.6, "for each cell")
    for name, choices, kind in (
        ("rows", ROWS, int), ("blocks", BLOCKS, int), ("sparsities", SPARSITIES, float),
        ("dtypes", tuple(DTYPES), str),
    ):  # fmt: skip
        command.add_argument(f"--{name}", type=kind, nargs="+", default=choices)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    asked = (arguments.rows, arguments.blocks, arguments.sparsities, arguments.dtypes)
    timed.prepare(arguments, [*map(tuple, asked)] == [ROWS, BLOCKS, SPARSITIES, tuple(DTYPES)])
    print(table(write(arguments.out, _measured(arguments))))
    return 0


def _measured(arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of the grid, as they come."""
    grid = itertools.product(arguments.dtypes, arguments.blocks, arguments.sparsities, SHAPES)
    for dtype, block, sparsity, (n, k) in grid:
        dense = pruned_layer(n, k, block, sparsity, DTYPES[dtype])
        weight = dense.weight.detach()
        matrix = BlockSparse.from_dense(weight, (block, block))
        model = sgtriton.sparsify(nn.Sequential(dense), block=(block, block))
        for m in arguments.rows:
            yield from measure(model[0], weight, matrix, m, sparsity, arguments.seconds)
