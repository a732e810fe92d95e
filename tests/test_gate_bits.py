"""Packed gates and lists of open blocks: every bit, every entry."""

import pytest
import torch
from helpers import layouts
from sgtriton_kernels import gate_bits, gate_weight
from sgtriton_kernels._triton import why_not_triton
from sgtriton_kernels.gate_bits import open_lists, pack_gates, unpack_gates

from sgtriton.cross_compile import CARDS, compile_for

# rows, columns: one word, a ragged word, one bit, many words, nothing
SHAPES = [(3, 32), (7, 33), (1, 1), (5, 100), (40, 64), (0, 5), (5, 0)]


@pytest.fixture(autouse=True)
def _needs_triton(device, request):
    compiles = request.node.get_closest_marker("compiles")
    if not compiles and (reason := why_not_triton(device)):
        pytest.skip(reason)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_the_open_gates(shape, device):
    gate = torch.rand(shape, device=device)
    bits = pack_gates(gate)
    assert bits.shape == (shape[0], -(-shape[1] // 32))
    assert bits.dtype == torch.int32
    assert torch.equal(unpack_gates(bits, shape[1]), gate > 0.5)
    spare = unpack_gates(bits, 32 * bits.shape[1])[:, shape[1] :]
    assert not spare.any()


def test_a_gate_is_where_the_docstring_says(device):
    gate = torch.zeros(2, 40, device=device)
    gate[1, 0] = gate[1, 31] = gate[0, 33] = 1
    assert pack_gates(gate).tolist() == [[0, 2], [1 - 2**31, 0]]


def test_the_border_and_nan_are_closed(device):
    gate = torch.tensor([[0.5, 0.5000001, float("nan"), float("inf"), -1.0]], device=device)
    assert unpack_gates(pack_gates(gate), 5).tolist() == [[False, True, False, True, False]]


def test_memory_layouts_do_not_matter(device):
    gate = torch.rand(9, 70, device=device)
    for name, view in layouts(gate).items():
        assert torch.equal(pack_gates(view), pack_gates(gate)), name


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (20, 64)], ids=str)
def test_draws_are_those_of_gate_weight(shape, device):
    gate = torch.rand(shape, device=device)
    gate.view(-1)[0] = 1
    for number in (0, 1 << 40):
        seed = torch.tensor([number], device=device)
        bits = unpack_gates(pack_gates(gate, "bernoulli", seed), shape[1])
        ones = torch.ones(shape, device=device)
        out = gate_weight(ones, gate, kind="bernoulli", seed=seed, impl="triton")
        assert torch.equal(bits, out == 1)


def test_other_kinds_are_refused(device):
    with pytest.raises(ValueError, match=r"of a kind in .* got 'hard_concrete'"):
        pack_gates(torch.ones(2, 2, device=device), "hard_concrete")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_lists_hold_the_open_blocks_in_order(shape, share, device):
    rows, cols = shape
    mask = torch.rand(shape, device=device) < share
    if rows > 2 and 0 < share < 1:
        mask[0], mask[1] = False, True
    lists = open_lists(pack_gates(mask.float()), cols)
    assert lists.index.shape == (rows, cols + 1)
    assert lists.row_index.shape == (cols, rows + 1)
    for lines, count, index in (
        (mask, lists.count, lists.index),
        (mask.T, lists.row_count, lists.row_index),
    ):
        assert count.dtype == index.dtype == torch.int32
        assert index.is_contiguous()
        for line, n, entries in zip(lines, count.tolist(), index.tolist(), strict=True):
            expected = line.nonzero()[:, 0].tolist()
            assert n == len(expected)
            assert entries == expected + [0] * (len(line) + 1 - n)


@pytest.mark.compiles
@pytest.mark.parametrize("card", CARDS, ids=lambda card: str(card[1]))
def test_kernel_compiles_for_every_card(card):
    signature = {"gate_ptr": "*fp32", "seed_ptr": "*i64", "bits_ptr": "*i32"}
    signature |= dict.fromkeys(("C", "WORDS", "total"), "i32")
    for bernoulli in (False, True):
        constexprs = {"BERNOULLI": bernoulli, "BLOCK": 16}
        code = compile_for(card, gate_bits._pack_gates_kernel, signature, constexprs)
        assert code.spills == 0
