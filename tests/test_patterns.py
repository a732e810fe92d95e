"""Random patterns of blocks."""

import pytest
import torch

from sgtriton.patterns import random_pattern


@pytest.mark.parametrize("closed", [0, 1, 13, 24])
@pytest.mark.parametrize("grid", [(4, 6), (2, 3, 2, 2), torch.Size((24, 1))], ids=str)
def test_as_many_blocks_are_closed_as_asked(grid, closed):
    found = random_pattern(grid, closed)
    assert (found.shape, found.dtype) == (torch.Size(grid), torch.bool)
    assert int((~found).sum()) == closed


def test_the_same_seed_gives_the_same_places_and_another_one_others():
    first, same, other = (
        random_pattern((8, 8), 30, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_patterns_lie_on_the_cpu_whatever_the_default_device():
    """A generator of the CPU was refused there."""
    with torch.device("meta"):
        found = random_pattern((8, 8), 30, torch.Generator("cpu").manual_seed(0))
    assert torch.equal(found, random_pattern((8, 8), 30, torch.Generator().manual_seed(0)))
