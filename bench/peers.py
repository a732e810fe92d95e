"""Other libraries that serve a pruned linear layer, each where it is installed and can run.

A peer takes and gives dense tensors as a model would; what it needs beside (padding, conversion of
the input) is timed with it. Made once for a cell, called many times.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sgtriton.tables import in_a_line

from .timed import Call


@dataclass(frozen=True)
class Problem:
    """A product ``x[M, K] @ weight[N, K]^T``, the weight's zeros in square blocks."""

    weight: torch.Tensor
    block: int
    x: torch.Tensor
    threads: int


@dataclass(frozen=True)
class Peer:
    """A library's product.

    Args:
        name: as in tables.
        why_not: on a device in a dtype; ``None`` where it can be tried.
        make: the call for a problem; may raise, which is shown.
        share: of the weights that it keeps; ``None`` for what lies in open blocks.
        keeps: the weight that it computes with.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype], str | None]
    make: Callable[[Problem], Call]
    share: float | None = None
    keeps: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight


def candidates(problem: Problem) -> Iterator[tuple[Peer, Call | str]]:
    """The peers for the problem's device and dtype: a call, or why there is none here."""
    for peer in PEERS:
        if peer.why_not(problem.x.device, problem.x.dtype) is None:
            try:
                yield peer, peer.make(problem)
            except Exception as error:  # foreign code: what it raises is its own affair
                yield peer, f"failed: {in_a_line(error)}"


def missing(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The peers that cannot be tried there, and why."""
    found = {peer.name: peer.why_not(device, dtype) for peer in PEERS}
    return {name: f"missing: {reason}" for name, reason in found.items() if reason}


def why_not_compile(device: torch.device) -> str | None:
    """Why ``torch.compile`` has no code for that device; ``None`` where it can be tried."""
    if device.type != "cpu":
        return _not_installed("triton")
    compilers = [os.environ.get("CXX", "g++"), "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler ({' or '.join(compilers)})"
    return None


def _not_installed(*modules: str) -> str | None:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def _on_cpu(*modules: str) -> Callable[[torch.device, torch.dtype], str | None]:
    """For a library that multiplies on CPUs, in fp32."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return "for CPUs only"
        if dtype != torch.float32:
            return f"no {str(dtype).removeprefix('torch.')} on a CPU"
        return _not_installed(*modules)

    return why_not


def _on_gpu(*modules: str) -> Callable[[torch.device, torch.dtype], str | None]:
    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return "for GPUs only" if device.type == "cpu" else _not_installed(*modules)

    return why_not


def _torch_bsr_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return _on_cpu()(device, dtype) if device.type == "cpu" else _not_installed("triton")


def _torch_bsr(problem: Problem) -> Call:
    bsr, x = _bsr(problem), problem.x
    if x.device.type == "cpu":
        return lambda: torch.mm(bsr, x.T).T
    from torch.sparse._triton_ops import bsr_dense_addmm

    n, m = len(problem.weight), len(x)

    def call() -> torch.Tensor:
        columns = _padded(x, max(16, problem.block)).T
        out = columns.new_empty(n, columns.shape[1])
        bsr_dense_addmm(out, bsr, columns, beta=0, out=out)
        return out.T[:m]

    return call


def _bsr(problem: Problem) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse tensors are in beta
        return problem.weight.to_sparse_bsr((problem.block, problem.block))


def _padded(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """With rows of zeros up to a multiple."""
    return F.pad(x, (0, 0, 0, -len(x) % multiple))


def _scipy_bsr(problem: Problem) -> Call:
    from scipy import sparse  # pyright: ignore[reportMissingImports]

    sides = (problem.block, problem.block)
    matrix, rows = sparse.bsr_matrix(problem.weight.numpy(), blocksize=sides), problem.x.numpy()
    return lambda: (matrix @ rows.T).T


def _onnxruntime(problem: Problem) -> Call:
    """A model of one product."""
    import onnx  # pyright: ignore[reportMissingImports]
    import onnxruntime  # pyright: ignore[reportMissingImports]

    (n, k), m = problem.weight.shape, len(problem.x)
    of = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [of("x", onnx.TensorProto.FLOAT, [m, k])],
        [of("y", onnx.TensorProto.FLOAT, [m, n])],
        [onnx.numpy_helper.from_array(problem.weight.T.contiguous().numpy(), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = problem.threads
    # its threads would go on waiting for work on the cores where the others are measured
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rows = problem.x.numpy()
    return lambda: session.run(None, {"x": rows})[0]


def _torchao_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _on_gpu("torchao", "triton")(device, dtype)
    if reason or importlib.util.find_spec("torchao.sparsity") is not None:
        return reason
    return f"torchao {importlib.metadata.version('torchao')} has no sparsity; 0.18.0 is the last"


def _torchao(problem: Problem) -> Call:
    from torchao.sparsity import (  # pyright: ignore[reportMissingImports]
        block_sparse_weight,
        sparsify_,
    )

    n, k = problem.weight.shape
    layer = nn.Linear(k, n, bias=False, device=problem.x.device, dtype=problem.x.dtype)
    with torch.no_grad():
        layer.weight.copy_(problem.weight)
    model = nn.Sequential(layer)
    sparsify_(model, block_sparse_weight(blocksize=problem.block))
    return lambda: model(problem.x)


def _blksprs(problem: Problem) -> Call:
    """Its product takes and gives blocks: those of input and output are all stored."""
    import blksprs  # pyright: ignore[reportMissingImports]

    side, x, m = problem.block, problem.x, len(problem.x)
    columns = problem.weight.T.contiguous()[None]
    pattern = blksprs.layouting.build_sparsity_layout(columns, side)
    stored = blksprs.ops.to_sparse(columns, pattern, side)
    rows, (_, depth, width) = -(-m // side), pattern.shape
    of_x, of_y = (pattern.new_ones(1, rows, count) for count in (depth, width))
    caches: list[dict] = [{}, {}, {}]

    def call() -> torch.Tensor:
        blocks = blksprs.ops.to_sparse(_padded(x, side)[None], of_x, side, caches[0])
        out = blksprs.ops.matmul(blocks, of_x, stored, pattern, of_y, side, caches[1])
        return blksprs.ops.to_dense(out, of_y, side, layout_cache=caches[2])[0, :m]

    return call


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The weight with the smaller two of each four neighbours in a row as 0."""
    fours = weight.unflatten(1, (-1, 4))
    kept = torch.zeros_like(fours, dtype=torch.bool)
    kept.scatter_(2, fours.abs().topk(2, dim=2).indices, True)
    return torch.where(kept, fours, torch.zeros_like(fours)).flatten(1)


def _two_of_four_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":
        return "for GPUs only"
    return None if dtype.itemsize == 2 else "16 bits only"


def _two_of_four(problem: Problem) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        weight = torch.sparse.to_sparse_semi_structured(two_of_four(problem.weight).contiguous())
    return lambda: F.linear(problem.x, weight)


PEERS = (
    Peer("torch.sparse BSR", _torch_bsr_why_not, _torch_bsr),
    Peer("scipy BSR", _on_cpu("scipy"), _scipy_bsr),
    Peer("onnxruntime dense", _on_cpu("onnx", "onnxruntime"), _onnxruntime, share=1.0),
    Peer("torchao block sparse", _torchao_why_not, _torchao),
    Peer("blksprs", _on_gpu("blksprs", "triton"), _blksprs),
    Peer("torch.sparse 2:4", _two_of_four_why_not, _two_of_four, share=0.5, keeps=two_of_four),
)
