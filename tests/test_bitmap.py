"""Per-weight bitmaps: bit order, round trips, refusals."""

import pytest
import torch
from helpers import DTYPES
from sgtriton_kernels.bitmap import compress, expand, pack_bitmap, unpack_bitmap

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 0, 5), (13, 17), (4, 3, 3, 3), (516, 517)]


def test_bits_are_lowest_first():
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    assert pack_bitmap(mask).tolist() == [1, 6]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_masks_come_back(shape, share):
    mask = torch.rand(shape) < share
    bits = pack_bitmap(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack_bitmap(bits, shape), mask)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_come_back(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    mask = torch.rand(shape) < 0.3
    bits, nonzeros = compress(weight, mask)
    assert nonzeros.shape == (int(mask.sum()),)
    out = expand(bits, nonzeros, shape)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert torch.equal(out, torch.where(mask, weight, 0))
    assert torch.equal(expand(bits, nonzeros, shape, torch.float64), out.double())


def test_transposed_weights_come_back_in_row_major_order():
    weight, mask = torch.randn(9, 13).T, (torch.rand(9, 13) < 0.5).T
    bits, nonzeros = compress(weight, mask)
    assert torch.equal(nonzeros, weight.contiguous()[mask.contiguous()])
    assert torch.equal(expand(bits, nonzeros, (13, 9)), weight * mask)


def test_kept_zeros_and_nan_survive():
    weight = torch.tensor([0.0, float("nan"), 2.0])
    out = expand(*compress(weight, torch.tensor([True, True, False])), (3,))
    assert out[0] == 0
    assert out[1].isnan()
    assert out[2] == 0


def test_damaged_bitmaps_are_refused():
    bits, nonzeros = compress(torch.ones(11), torch.ones(11, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bits must be uint8 \[2\].*\(3,\)"):
        expand(torch.zeros(3, dtype=torch.uint8), nonzeros, (11,))
    with pytest.raises(ValueError, match=r"bits must be uint8 .* torch\.int32"):
        expand(bits.int(), nonzeros, (11,))
    with pytest.raises(ValueError, match=r"unused bits .* 0x87, 3 used"):
        expand(bits | torch.tensor([0, 128], dtype=torch.uint8), nonzeros, (11,))
    with pytest.raises(ValueError, match="one set bit per nonzero, 10, got 11"):
        expand(bits, nonzeros[:10], (11,))
    with pytest.raises(ValueError, match="nonzeros must be 1-d"):
        expand(bits, nonzeros[None], (11,))
    with pytest.raises(ValueError, match=r"shape must be ints >= 0, got \(-1, -11\)"):
        unpack_bitmap(bits, (-1, -11))
    with pytest.raises(ValueError, match="mask must be bool"):
        pack_bitmap(torch.ones(3))
    with pytest.raises(ValueError, match=r"mask must agree .* \(3,\) .* \(1,\)"):
        compress(torch.ones(3), torch.ones(1, dtype=torch.bool))
