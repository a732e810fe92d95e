"""Methods of a gated layer: what is reasoned, what a record changes, and that nothing else does."""

import dataclasses
import itertools

import pytest
import torch
from helpers import assert_exact, integers
from sgtriton_kernels import (
    gate_layout,
    gated_candidates,
    gated_linear,
    gated_matmul,
    gated_torch,
    lookup,
    records,
)
from sgtriton_kernels import gated_choice as module
from sgtriton_kernels.blocks import expand_gates, sum_blocks
from sgtriton_kernels.candidate import ANALYTIC
from sgtriton_kernels.candidates import candidates, named, reasoned
from sgtriton_kernels.gated_cell import GatedCell, same_density
from sgtriton_kernels.gated_choice import cell_of, count_open, method_for
from sgtriton_kernels.lookup import full_key, tell

from sgtriton.tune_cache import write_record

CPU = torch.device("cpu")
BLOCKS = [(1, 1), (4, 4), (16, 16), (32, 64), (128, 128), (1, None), (None, None)]
KINDS = ["threshold", "bernoulli", "hard_concrete"]
SKIPS, MULTIPLIES = (128, 512, 512, 3), (16, 96, 64, 9)  # rows, sizes, open blocks of 32 x 32


def layer(m, n, k, opened, block=(32, 32), dtype=torch.float32, device="cpu"):
    """Leaves ``x, w, gate`` with so many open blocks, ``dy``, and the layout."""
    layout = gate_layout((n, k), block)
    x, dy = (integers(m, size, dtype=dtype, device=device) for size in (k, n))
    w, gate = integers(n, k, device=device), torch.full(layout.gate_shape, 0.2, device=device)
    gate.view(-1)[torch.randperm(gate.numel())[:opened].to(device)] = 0.9
    return [t.requires_grad_() for t in (x, w, gate)], dy, layout


def cell_for(inputs, layout, impl="torch", kind="threshold", reopen=True):
    x, w, gate = inputs
    count = count_open(gate, kind) if impl == "torch" else None
    return cell_of(len(x), x, w.dtype, layout, kind, reopen, True, True, impl, count)


def reference(inputs, dy, layout):
    x, w, gate = (t.detach().double() for t in inputs)
    b, d = expand_gates((gate > 0.5).double(), layout), dy.double().T @ x
    return x @ (w * b).T, dy.double() @ (w * b), d * b, sum_blocks(d * w, layout)


def step(inputs, dy, block, **how):
    y = gated_linear(*inputs, None, block, **how)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def assert_step(name, found, refs):
    for part, out, ref in zip(("y", "dx", "dw", "dgate"), found, refs, strict=True):
        assert_exact(f"{name}, {part}", out, ref)


@pytest.fixture
def taken(monkeypatch):
    """Collects the method of each forward and backward pass by the ``torch`` implementation."""
    found, real = [], gated_torch.choose
    monkeypatch.setattr(gated_torch, "choose", lambda *args: found.append(real(*args)) or found[-1])
    return found


def before(kind, layout, m, dtype, fuses_long=False):
    """What a call on a card takes, written out."""
    sides = [s for s, whole in zip(layout.block, layout.weight_shape, strict=True) if s < whole]
    if kind == "hard_concrete":
        return "multiply"
    if not layout.per_weight and all(s >= 16 and s & (s - 1) == 0 for s in sides):
        return "skip"
    aligned = all(size % 16 == 0 for size in layout.weight_shape)
    most = 4096 if fuses_long else 2048
    return "fused" if aligned and m <= most and dtype != torch.float32 else "multiply"


def test_reasoning_on_a_card_is_by_shape():
    seen = set()
    for block, kind, m, size, dtype, long in itertools.product(
        BLOCKS, KINDS, (1, 2048, 2049, 4096, 4097), ((256, 512), (250, 512)),
        (torch.float32, torch.bfloat16), (False, True),
    ):  # fmt: skip
        layout = gate_layout(size, block)
        cell = GatedCell(
            "gated_linear step", "triton", m, *size, layout.block, 1, dtype,
            kind=kind, counted=False, fuses_long=long,
        )  # fmt: skip
        candidate, why = reasoned(cell)
        assert candidate.name == before(kind, layout, m, dtype, long)
        assert why
        seen.add(candidate.name)
        assert candidate in candidates(cell)
    assert seen == {"multiply", "fused", "skip"}


@pytest.mark.parametrize("kind", ["threshold", "bernoulli"])
def test_reasoning_of_the_torch_implementation_counts_open_blocks(kind):
    """It takes what the op takes when it is left to itself, for every number of blocks."""
    seen = set()
    for block, (m, n, k) in itertools.product(
        BLOCKS, ((1, 256, 256), (128, 512, 512), (512, 300, 784))
    ):
        layout = gate_layout((n, k), block)
        blocks = layout.gate_shape[0] * layout.gate_shape[1]
        for count in {0, 1, *range(0, blocks + 1, max(1, blocks // 40)), blocks}:
            gate = torch.zeros(layout.gate_shape)
            gate.view(-1)[:count] = 1.0
            cell = cell_of(
                m, torch.empty(1), torch.float32, layout, kind, True, True, True, "torch", count
            )
            expected = gated_torch.choose("auto", gate, gate > 0.5, layout, m)
            assert reasoned(cell)[0].name == expected, (block, m, count)
            x, w = torch.empty(m, k), torch.empty(n, k)
            if count:
                assert method_for(x, w, gate, layout, kind, True, "torch") == expected
            seen.add(expected)
    assert seen == {"multiply", "skip"}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_taken_is_not_offered(block, kind):
    layout = gate_layout((256, 512), block)
    for impl, counted in (("torch", True), ("torch", False), ("triton", False)):
        cell = GatedCell(
            "gated_linear step", impl, 8, 256, 512, layout.block, 4, torch.bfloat16,
            kind=kind, counted=counted,
        )  # fmt: skip
        names = [c.name for c in candidates(cell)]
        assert names[0] == "multiply"
        assert "fused" not in names or (impl == "triton" and kind != "hard_concrete")
        assert "skip" not in names or not (layout.per_weight or kind == "hard_concrete")
        for name in names:  # the op takes what is offered
            gated_matmul._check_method(name, impl, kind, layout)


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64), (None, None)])
@pytest.mark.parametrize("reopen", [True, False])
def test_every_candidate_gives_the_step(block, reopen, impl, device):
    inputs, dy, layout = layer(20, 64, 128, 2, block, device=device)
    *refs, dgate = reference(inputs, dy, layout)
    refs.append(dgate if reopen else torch.where(inputs[2] > 0.5, dgate, 0.0))
    for candidate in candidates(cell_for(inputs, layout, impl, reopen=reopen)):
        if candidate.name == "multiply" and impl == "triton" and layout.gate_shape[0] > 9:
            continue  # the interpreter takes a program for each gate
        found = step(inputs, dy, block, reopen=reopen, method=candidate.name, impl=impl)
        assert_step(candidate.name, found, refs)


def test_record_is_taken_in_both_passes(cache, taken):
    for sizes, name in ((SKIPS, "multiply"), (MULTIPLIES, "skip")):
        inputs, dy, layout = layer(*sizes)
        tell(full_key(cell_for(inputs, layout), CPU), name)
        assert_step(name, step(inputs, dy, (32, 32)), reference(inputs, dy, layout))
        assert taken == [name] * 2
        taken.clear()


def test_record_in_a_file_is_taken(cache, taken):
    inputs, _, layout = layer(*MULTIPLIES)
    key = full_key(cell_for(inputs, layout), CPU)
    assert write_record(records.cache_folder(), key, "skip", {}) is None
    lookup.forget()
    gated_linear(*inputs, None, (32, 32))
    assert taken == ["skip"]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("name", ["", "dense", "loop", "fused", "skip", ANALYTIC, "multiply "])
def test_record_that_names_what_cannot_be_taken_changes_nothing(name, impl, cache):
    """'fused' for the torch implementation, 'skip' for a gate a weight, and names of no method."""
    for block, kind in (((1, 1), "threshold"), ((4, 4), "bernoulli"), ((32, 32), "hard_concrete")):
        inputs, _, layout = layer(64, 96, 64, 3, block)
        cell = cell_for(inputs, layout, impl, kind)
        if name in {c.name for c in candidates(cell)}:
            continue
        tell(full_key(cell, CPU), name)
        expected = reasoned(cell)[0].name
        assert method_for(*inputs, layout, kind, True, impl) == expected
        lookup.forget()


@pytest.mark.parametrize(
    "change",
    [{"kind": "bernoulli"}, {"reopen": False}, {"dgate": False}, {"w_dtype": torch.bfloat16},
     {"nnz": 250}, {"counted": False}, {"op": "gated_linear fwd"}, {"M": 300}],
    ids=str,
)  # fmt: skip
def test_record_of_another_step_is_not_taken(change, cache):
    inputs, _, layout = layer(*SKIPS)
    cell = cell_for(inputs, layout)
    tell(full_key(dataclasses.replace(cell, **change), CPU), "multiply")
    assert method_for(*inputs, layout, "threshold", True, "torch") == "skip"
    tell(full_key(cell, CPU), "multiply")
    assert method_for(*inputs, layout, "threshold", True, "torch") == "multiply"


def test_record_of_closed_gates_says_nothing_of_open_ones(cache):
    """It is for the open share at which it was measured, on a CPU, where blocks are counted."""
    (x, w, gate), _, layout = layer(1024, *SKIPS[1:])
    tell(full_key(cell_for((x, w, gate), layout), CPU), "multiply")
    for opened, expected in ((3, "multiply"), (40, "skip"), (250, "multiply"), (25, "multiply")):
        with torch.no_grad():
            gate.fill_(0.2).view(-1)[:opened] = 0.9
        assert method_for(x, w, gate, layout, "threshold", True, "torch") == expected, opened


def test_forward_alone_has_a_record_of_its_own(cache):
    inputs, _, layout = layer(*SKIPS)
    tell(full_key(cell_for(inputs, layout), CPU), "multiply")
    with torch.no_grad():
        assert method_for(*inputs, layout, "threshold", True, "torch") == "skip"
    detached = [t.detach() for t in inputs]
    assert method_for(*detached, layout, "threshold", True, "torch") == "skip"


@pytest.mark.parametrize("between", [("multiply", "skip"), ("skip", "multiply")])
def test_record_that_appears_between_the_passes_changes_no_result(between, cache, taken):
    inputs, dy, layout = layer(*MULTIPLIES)
    key = full_key(cell_for(inputs, layout), CPU)
    tell(key, between[0])
    y = gated_linear(*inputs, None, (32, 32))
    tell(key, between[1])
    found = (y.detach(), *torch.autograd.grad(y, inputs, dy))
    assert_step("step", found, reference(inputs, dy, layout))
    assert taken == [between[0]] * 2


@pytest.mark.parametrize("between", [*itertools.permutations(("multiply", "fused", "skip"), 2)])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_of_both_passes_agree_whatever_is_recorded(between, compiled, cache, device):
    """*multiply* leaves no bits of the gates for backward: the others would read closed ones."""
    from sgtriton_kernels._triton import why_not_triton

    if reason := why_not_triton(device):
        pytest.skip(reason)
    inputs, dy, layout = layer(20, 32, 64, 3, (16, 16), device=device)
    cell = cell_for(inputs, layout, "triton")
    assert not cell.counted
    assert {c.name for c in candidates(cell)} == {"multiply", "fused", "skip"}

    def call(*inputs):
        return gated_linear(*inputs, None, (16, 16), impl="triton")

    torch._dynamo.reset()
    function = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    key = full_key(cell, device)
    tell(key, between[0])
    y = function(*inputs)
    tell(key, between[1])
    found = (y.detach(), *torch.autograd.grad(y, inputs, dy))
    assert_step("step", found, reference(inputs, dy, layout))
    # and once more: a compiled call, for which the other record was there before
    assert_step("again", step_of(function, inputs, dy), reference(inputs, dy, layout))


def step_of(function, inputs, dy):
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


def test_compiled_calls_look_nothing_up(cache, taken, monkeypatch):
    inputs, dy, layout = layer(*MULTIPLIES)
    tell(full_key(cell_for(inputs, layout), CPU), "skip")
    monkeypatch.setattr(gated_matmul, "method_for", None)
    torch._dynamo.reset()
    function = torch.compile(
        lambda *a: gated_linear(*a, None, (32, 32)), backend="aot_eager", fullgraph=True
    )
    assert_step("step", step_of(function, inputs, dy), reference(inputs, dy, layout))
    assert taken == ["multiply"] * 2


def test_open_blocks_are_counted_once_a_step_at_most(cache, monkeypatch):
    counts, real = [], module.count_open
    monkeypatch.setattr(module, "count_open", lambda *a: counts.append(1) or real(*a))
    ours = torch.Tensor.count_nonzero
    monkeypatch.setattr(torch.Tensor, "count_nonzero", lambda *a: counts.append(2) or ours(*a))
    for sizes, most in ((SKIPS, [1, 2]), (MULTIPLIES, [])):
        inputs, dy, _ = layer(*sizes)
        step(inputs, dy, (32, 32))
        counts.clear()
        step(inputs, dy, (32, 32))
        assert counts == most


def test_drawn_gates_count_as_is_to_be_expected():
    gate = torch.tensor([[0.25, 0.75], [-3.0, 1.5]])
    assert count_open(gate, "bernoulli") == 2
    assert count_open(gate, "threshold") == 2
    assert count_open(gate - 0.25, "threshold") == 1
    assert count_open(torch.full((2, 2), float("nan")), "bernoulli") == 0


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 10, 30, 100, 256])
def test_numbers_of_blocks_that_share_a_record(blocks):
    def density(count):
        cell = GatedCell("gated_linear step", "torch", 1, blocks, 1, (1, 1), count, torch.float32)
        return cell.key()["density"]

    found = same_density(blocks)
    counted = [count for first, last in found for count in range(last, first - 1, -1)]
    assert counted == list(range(blocks, -1, -1))
    assert [{density(c) for c in range(a, b + 1)} for a, b in found] == [
        {density(a)} for a, _ in found
    ]
    assert len({density(a) for a, _ in found}) == len(found)


def test_names_are_methods():
    for op, impl, native in itertools.product(
        ("gated_linear step", "gated_linear fwd"), ("torch", "triton"), (False, True)
    ):
        known = named(op, impl, native)
        assert all(candidate.way == name for name, candidate in known.items())
        assert set(known) == set(gated_candidates.METHODS) - (
            {"fused"} if impl == "torch" else set()
        )
