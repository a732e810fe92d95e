import itertools
import random

import pytest
import torch
from helpers import assert_exact
from sgtriton_kernels import coverage, expand_gates
from torch import nn

import sgtriton
from sgtriton.layers import gated_layers
from sgtriton.projection import TOLERANCE, choose_open, largest_block_share, lowest_density


def gated(*shapes, block, seed=0):
    """Layers with random gates; a shape is (out, in) or (out, in, taps) of a Conv1d."""
    generator = torch.Generator().manual_seed(seed)
    dense = [nn.Linear(s[1], s[0]) if len(s) == 2 else nn.Conv1d(s[1], s[0], s[2]) for s in shapes]
    layers = [*gated_layers(sgtriton.patch(nn.Sequential(*dense), block))]
    with torch.no_grad():
        for layer in layers:
            layer.gate.copy_(torch.rand(layer.gate.shape, generator=generator))
    return layers


def reached(layers, masks):
    kept = sum(
        int((coverage(m.layout) * mask).sum()) for m, mask in zip(layers, masks, strict=True)
    )
    return kept / sum(layer.weight.numel() for layer in layers)


def kept_anyway(layers, allow_empty):
    """What each layer keeps: nothing, or its best gate."""
    if allow_empty:
        return [torch.zeros_like(layer.gate, dtype=torch.bool) for layer in layers]
    return [layer.gate == layer.gate.max() for layer in layers]


def brute_force(layers, density, allow_empty):
    """Error of the best threshold on all gates, by trying each."""
    kept = kept_anyway(layers, allow_empty)
    gates = torch.cat([layer.gate.detach().reshape(-1) for layer in layers])
    errors = []
    for cut in [*gates.tolist(), 2.0]:
        masks = [(layer.gate >= cut) | mask for layer, mask in zip(layers, kept, strict=True)]
        errors.append(abs(reached(layers, masks) - density))
    return min(errors)


@pytest.mark.parametrize("allow_empty", [False, True])
@pytest.mark.parametrize("density", [0.3, 0.45, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 4), (1, None)])
def test_choice_is_the_best_of_all_thresholds(block, density, allow_empty):
    layers = gated((5, 7), (3, 5), (4, 2, 3), block=block)
    masks = choose_open(layers, density, allow_empty)
    error, by_rank = (
        abs(reached(layers, masks) - density),
        brute_force(layers, density, allow_empty),
    )
    assert error <= by_rank + 1e-12
    if error < by_rank - 1e-12:
        assert by_rank > TOLERANCE  # only then the gap is filled out of rank
        return
    # a gate that is open is larger than each that is closed, unless its layer keeps it anyway
    kept = kept_anyway(layers, allow_empty)
    closed = [layer.gate[~mask] for layer, mask in zip(layers, masks, strict=True)]
    highest = max([0.0, *torch.cat(closed).tolist()])
    for layer, mask, own in zip(layers, masks, kept, strict=True):
        assert (layer.gate[mask & ~own] > highest).all()


@pytest.mark.parametrize("seed", range(5))
def test_error_is_no_larger_than_ranked_gates_can_reach(seed):
    """Against every subset of a small case: no ranked choice is nearer."""
    layers = gated((3, 4), (2, 3), block=(2, 2), seed=seed)
    density = 0.2 + 0.15 * seed
    gates = torch.cat([layer.gate.detach().reshape(-1) for layer in layers])
    counts = [layer.gate.numel() for layer in layers]
    best = [1.0]
    for bits in itertools.product([False, True], repeat=gates.numel()):
        mask = torch.tensor(bits)
        if mask.any() and not mask.all() and gates[mask].min() < gates[~mask].max():
            continue  # not by rank
        shaped = [
            part.reshape(layer.gate.shape)
            for part, layer in zip(mask.split(counts), layers, strict=True)
        ]
        best.append(abs(reached(layers, shaped) - density))
    error = abs(reached(layers, choose_open(layers, density, True)) - density)
    assert error <= min(best) + 1e-12


def random_layouts(count):
    rng = random.Random(0)
    for _ in range(count):
        shapes = [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(rng.randint(1, 4))]
        if rng.random() < 0.3:
            shapes.append((rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 3)))
        block = tuple(rng.choice([1, 2, 3, 4, 8, 16, None]) for _ in range(2))
        yield shapes, block, rng.random(), rng.random() < 0.5


def test_landing_error_stays_in_bounds_on_200_random_layouts():
    """max(0.5 points, half the largest block), and every layer keeps a block."""
    refused = 0
    for i, (shapes, block, target, tied) in enumerate(random_layouts(200)):
        layers = gated(*shapes, block=block, seed=i)
        if tied:  # as after long training: most gates at the bounds
            with torch.no_grad():
                for layer in layers:
                    layer.gate.round_()
        density = 1 - target
        allowed = max(TOLERANCE, largest_block_share(layers) / 2) + 1e-9
        free = choose_open(layers, density, allow_empty=True)
        assert abs(reached(layers, free) - density) <= allowed, (shapes, block, density)
        density = max(density, lowest_density(layers, allow_empty=False))
        masks = choose_open(layers, density, allow_empty=False)
        assert abs(reached(layers, masks) - density) <= allowed, (shapes, block, density)
        assert all(mask.any() for mask in masks), (shapes, block, density)
        refused += density > 1 - target
    assert 0 < refused < 200


@pytest.mark.parametrize(("block", "density"), [((1, 1), 0.1), ((4, 4), 0.25), ((1, None), 0.5)])
def test_masks_have_the_shape_and_device_of_the_gates(block, density):
    layers = gated((8, 8), (6, 4, 3), block=block)
    for layer, mask in zip(layers, choose_open(layers, density, False), strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == layer.gate.shape
        assert mask.device == layer.gate.device


def test_equal_gates_are_ranked_by_the_mean_magnitude_of_their_weights():
    (layer,) = gated((4, 10), block=(2, 4))  # the last column of blocks is ragged
    with torch.no_grad():
        layer.gate.fill_(1.0)
        scale = torch.tensor([[1.0, 3.0, 0.5], [6.0, 5.0, 4.0]])  # the sums rank 3 before 4
        layer.weight.copy_(expand_gates(scale, layer.layout) * (-1.0) ** torch.arange(10))
    for kept, expected in (
        (8, [[False, False, False], [True, False, False]]),
        (16, [[False, False, False], [True, True, False]]),
        (20, [[False, False, False], [True, True, True]]),
        (28, [[False, True, False], [True, True, True]]),
    ):
        (mask,) = choose_open([layer], kept / 40, False)
        assert mask.tolist() == expected


def test_gates_out_of_bounds_are_read_clipped():
    (layer,) = gated((1, 4), block=(1, 1))
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([[5.0, 1.0, 0.2, -3.0]]))
        layer.weight.copy_(torch.tensor([[1.0, 2.0, 9.0, 9.0]]))
    (mask,) = choose_open([layer], 0.25, False)
    assert mask.tolist() == [[False, True, False, False]]  # both are 1: the larger weight stays


def test_layer_keeps_its_best_block_or_its_smallest_where_that_is_too_much():
    large, small = gated((8, 8), (4, 4), block=(1, 1))
    with torch.no_grad():
        large.gate.uniform_(0.5, 1)
        small.gate.uniform_(0, 0.4)
        small.gate[1, 2] = 0.45
    masks = choose_open([large, small], 0.2, False)
    assert masks[1].nonzero().tolist() == [[1, 2]]
    assert not choose_open([large, small], 0.2, True)[1].any()

    (ragged,) = gated((9, 9), block=(8, 8))  # blocks of 64, 8, 8 and 1 weights
    with torch.no_grad():
        ragged.gate.copy_(torch.tensor([[1.0, 0.9], [0.8, 0.1]]))
    (mask,) = choose_open([ragged], 1 / 81, False)
    assert mask.tolist() == [[False, True], [False, False]]  # the best of those that fit


def test_freezing_does_not_exchange_learned_blocks_for_shut_ones():
    """A layer's one open block stays while the landing may be above the target by that much."""
    layers = gated((53, 37), (53, 53), (11, 53), block=(32, 32))
    patterns = [[[1, 0], [0, 0]], [[0, 0], [1, 0]], [[0, 1]]]
    with torch.no_grad():
        for layer, pattern in zip(layers, patterns, strict=True):
            layer.gate.copy_(torch.tensor(pattern) * 0.8 + 0.1)
    for density in (0.3, 0.35, 0.4):  # the three blocks are 36 % of the weights
        masks = choose_open(layers, density, False)
        for layer, mask in zip(layers, masks, strict=True):
            assert mask[layer.gate > 0.5].all(), density


def test_as_few_layers_as_possible_lose_their_learned_block():
    layers = gated((9, 9), (9, 9), (9, 9), block=(8, 8))  # blocks of 64, 8, 8 and 1 weights
    with torch.no_grad():
        for layer in layers:
            layer.gate.copy_(torch.tensor([[1.0, 0.1], [0.2, 0.3]]))
    masks = choose_open(layers, 100 / 243, False)  # at most 132 of the 192 that they opened
    kept = [mask[0, 0].item() for mask in masks]
    assert sorted(kept) == [False, True, True]
    assert reached(layers, masks) <= 132 / 243


def test_gap_is_filled_with_gates_that_had_opened():
    (layer,) = gated((9, 9), block=(8, 8))
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([[0.8, 0.7], [0.9, 0.1]]))  # 64, 8; 8, 1
    (mask,) = choose_open([layer], 18 / 81, False)
    assert mask.tolist() == [[False, True], [True, False]]


def test_lowest_density_counts_the_smallest_block_of_each_layer():
    layers = gated((9, 9), (4, 4), block=(8, 8))
    assert lowest_density(layers, allow_empty=False) == pytest.approx((1 + 16) / 97)
    assert lowest_density(layers, allow_empty=True) == 0
    assert largest_block_share(layers) == pytest.approx(64 / 97)


def test_choice_touches_neither_gates_nor_weights():
    layers = gated((8, 8), (5, 3), block=(2, 2))
    before = [(m.gate.detach().clone(), m.weight.detach().clone()) for m in layers]
    choose_open(layers, 0.3, False)
    for layer, (gate, weight) in zip(layers, before, strict=True):
        assert_exact("gate", layer.gate, gate)
        assert_exact("weight", layer.weight, weight)
