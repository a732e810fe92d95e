"""Predictions of convolutions on paper, against figures worked out by hand."""

import dataclasses
import itertools

import pytest
import torch
from conv_layers import conv_cell
from sgtriton_kernels import BlockSparse
from sgtriton_kernels.bsr_conv_passes import conv_blocks
from sgtriton_kernels.bsr_conv_torch import conv_dense_bwd
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.cards import CARD_NAMES, card
from sgtriton_kernels.cell import Cell
from sgtriton_kernels.conv_geometry import ConvGeometry
from sgtriton_kernels.lookup import analytic
from sgtriton_kernels.tiles import BsrTile
from torch.utils._python_dispatch import TorchDispatchMode
from toy_card import FAST, TOY

from sgtriton import conv_roofline, roofline

PASSES = ("fwd", "dx", "dvalues")
FAR = dataclasses.replace(TOY, l2_mb=0)


def layer(which="fwd", **more):
    """32 to 64 channels, 3x3, two images of 8x8, half of the 2 x 9 blocks stored."""
    given = {"channels": (32, 64), "size": (8, 8), "images": 2, "sparsity": 0.5} | more
    return conv_cell(which, **given)


# of that layer: pixels of x and of the result; weights
X, OUT, WEIGHTS = 2 * 8 * 8 * 32, 2 * 8 * 8 * 64, 64 * 32 * 9


@pytest.mark.parametrize(
    ("which", "indices"),
    # half of the 18 blocks: their columns and 2 rows; rows and places, 1 block of channels; all
    [("fwd", 9 + 2), ("dx", 2 * 9 + 1), ("dvalues", 3 * 9)],
)
def test_least_times_of_passes_by_hand(which, indices):
    cell = layer(which)
    assert cell.nnz == 9
    moved = 2 * (WEIGHTS // 2 + X + OUT) + 4 * indices  # x once, not once a tap
    assert conv_roofline.ideal_seconds(TOY, cell) == pytest.approx(moved * 1e-9)
    products = 2 * 128 * WEIGHTS  # 128 pixels of the result, in either direction
    assert conv_roofline.ideal_seconds(FAST, cell) == pytest.approx(products / 2 / 1e12)
    assert conv_roofline.ideal_dense_seconds(FAST, cell) == pytest.approx(products / 1e12)
    dense = 2 * (WEIGHTS + X + OUT) * 1e-9
    assert conv_roofline.ideal_dense_seconds(TOY, cell) == pytest.approx(dense)
    assert conv_roofline.dense_seconds(TOY, cell) == pytest.approx(dense + 2e-6)
    exact = dataclasses.replace(cell, dtype=torch.float32)
    assert conv_roofline.ideal_dense_seconds(FAST, exact) == pytest.approx(products / 1e11)


@pytest.mark.parametrize("which", PASSES)
def test_a_stride_makes_fewer_products_of_every_pass(which):
    cell = layer(which, stride=2)
    pixels = 128 if which == "dx" else 32
    assert pixels == cell.M
    found = conv_roofline.ideal_dense_seconds(FAST, cell)
    assert found == pytest.approx(2 * 32 * WEIGHTS / 1e12)


def test_pixels_that_no_tap_meets_are_not_read():
    """Of a stride of 2 and one tap three quarters of them."""
    cell = layer(kernel=(1, 1), padding=0, stride=2, sparsity=0.0)
    moved = 2 * (64 * 32 + X / 4 + OUT / 4) * 1e-9
    assert conv_roofline.ideal_dense_seconds(TOY, cell) == pytest.approx(moved)


def test_one_tap_is_the_linear_product():
    for which, sparsity in itertools.product(PASSES, (0.0, 0.5, 0.9)):
        cell = layer(which, channels=(256, 512), kernel=(1, 1), padding=0, sparsity=sparsity)
        linear = Cell(
            f"bsr_linear {which}", "triton", 128, 512, 256, (32, 32), cell.nnz, cell.dtype
        )
        same = conv_roofline.ideal_seconds(TOY, cell), conv_roofline.dense_seconds(TOY, cell)
        assert same == (roofline.ideal_seconds(TOY, linear), roofline.dense_seconds(TOY, linear))
        for on in (FAST, TOY, FAR, card("H100 SXM")):
            for tile in (BsrTile(32, 64, 32, 3, 4), BsrTile(16, 32, 32, 3, 4)):
                found = conv_roofline.predict(on, cell, tile)
                expected = roofline.predict(on, linear, tile)
                assert found.seconds == pytest.approx(expected.seconds)
                assert found.tile == expected.tile


def test_programs_by_hand():
    # 2 block rows of 9 blocks, 128 pixels in tiles of 64: 4 programs on 10 at once, 9 steps of 32
    found = conv_roofline.predict(FAST, layer(sparsity=0.0), BsrTile(64, 64, 32, 3, 4))
    assert found.tile == BsrTile(32, 64, 32, 3, 4)
    assert found.seconds == pytest.approx(9 * 2 * 64 * 32 * 32 * 10 / 1e12 + 2e-6)
    # of dx one list of the 18 blocks of all taps, cut into halves: 4 programs again
    found = conv_roofline.predict(FAST, layer("dx", sparsity=0.0), BsrTile(32, 64, 16, 3, 4))
    assert found.seconds == pytest.approx(18 * 2 * 64 * 16 * 32 * 10 / 1e12 + 2e-6)
    # 18 programs, two rounds of 4 steps of 32 pixels
    found = conv_roofline.predict(FAST, layer("dvalues", sparsity=0.0), BsrTile(32, 32, 32, 2, 4))
    assert found.seconds == pytest.approx(2 * 4 * 2 * 32 * 32 * 32 * 10 / 1e12 + 2e-6)


def test_dx_of_a_stride_multiplies_zeros():
    """Each pixel of x with each tap, of which a quarter met an output."""
    tile = BsrTile(32, 64, 32, 3, 4)
    times = [conv_roofline.predict(FAST, layer("dx", stride=s), tile).seconds for s in (1, 2)]
    assert times[0] == times[1]


def test_groups_have_lists_of_their_own():
    cell = layer(channels=(128, 128), groups=4, sparsity=0.0)
    assert (cell.N, cell.K, cell.nnz) == (128, 32 * 9, 4 * 9)
    for which, sides in (("fwd", (128, 288)), ("dx", (32 * 9, 128)), ("dvalues", (128, 288))):
        linear = conv_roofline.as_product(layer(which, channels=(128, 128), groups=4))
        assert sides == (linear.N, linear.K)
        assert linear.op == f"bsr_linear {which}"
    dense = conv_roofline.ideal_dense_seconds(FAST, cell)
    assert dense == pytest.approx(2 * 128 * 128 * 32 * 9 / 1e12)


def test_split_programs_leave_sums_that_are_added_and_rounded():
    cell = layer("dvalues", sparsity=0.0)
    fill = dataclasses.replace(FAST, l2_bytes_per_clock=10**3)
    found = conv_roofline.predict(fill, cell, BsrTile(32, 32, 32, 2, 4, split=4))
    # 72 programs of a step: 8 rounds; sums of four, then of all, come and go in the cache
    busy = 8 * 2 * max(32 * 32 * 32 * 10 / 1e12, (32 + 32) * 32 * 10 / 1e12)
    sums = 2 * 4 * (4 + 1) * WEIGHTS / 1e12
    assert found.seconds == pytest.approx(busy + sums + 3 * 2e-6)


def test_images_in_another_order_are_copied():
    for which, read, kernels in (("fwd", X, 1), ("dx", OUT, 1), ("dvalues", X + OUT, 2)):
        tile = BsrTile(32, 32, 32, 2, 4)
        last, first = (
            conv_roofline.predict(TOY, layer(which, channels_last=last), tile).seconds
            for last in (True, False)
        )
        assert first - last == pytest.approx(2 * 2 * read * 1e-9 + kernels * 2e-6)


def far_reads(which, tile, **more):
    """How many bytes more a card without a cache reads."""
    cell, many = layer(which, **more), dataclasses.replace(TOY, l2_mb=1000)
    held, again = (conv_roofline.predict(on, cell, tile) for on in (many, FAR))
    assert held.bound == again.bound == "memory"
    return (again.seconds - held.seconds) * 1e9


def test_what_a_cache_does_not_hold_is_read_again():
    big = {"channels": (64, 512), "images": 32, "sparsity": 0.875}
    x, out = 2 * 32 * 64 * 64, 2 * 32 * 64 * 512
    # 16 block rows, one after the other for all pixels: of a block of channels each has one of the
    # 9 taps with 1 - (7/8)^9
    again = 16 * (1 - 0.875**9)
    assert far_reads("fwd", BsrTile(32, 128, 32, 3, 4), **big) == pytest.approx(x * (again - 1))
    # two lists of 16 block rows: of each any of the taps
    again = 2 * (1 - 0.875**9)
    assert far_reads("dx", BsrTile(32, 128, 32, 3, 4), **big) == pytest.approx(out * (again - 1))
    # 18 columns of 2 blocks, so that 5 of them are in flight: more than the 2 of a tap
    together = 10 / 2
    of_x, of_out = 9 / (together / 2), 18 / together * (1 - 0.875**together)
    found = far_reads("dvalues", BsrTile(32, 32, 32, 2, 4), **big)
    assert found == pytest.approx(x * (of_x - 1) + out * (of_out - 1))


def test_groups_do_not_read_each_others_channels():
    """A list meets the channels of its group: of 4 groups a quarter of x."""
    big = {"channels": (256, 512), "images": 32, "sparsity": 0.875, "groups": 4}
    found = far_reads("fwd", BsrTile(32, 128, 32, 3, 4), **big)
    again = 16 / 4 * (1 - 0.875**9)
    assert found == pytest.approx(2 * 32 * 64 * 256 * (again - 1))


def test_unpacking_by_hand():
    # zeros, half of the weight read and written, all of it laid out anew; where 9 blocks are
    expected = 2e-9 * WEIGHTS * (1 + 2 * 0.5 + 2) + 4e-9 * 9 + 3 * 2e-6
    # a gradient of the dense weight is there already
    sampled = 2e-9 * WEIGHTS * (2 * 0.5 + 2) + 4e-9 * 9 + 2 * 2e-6
    for which, seconds in (("fwd", expected), ("dx", expected), ("dvalues", sampled)):
        found = conv_roofline.unpack_seconds(TOY, layer(which))
        assert found == pytest.approx(seconds + conv_roofline.dense_seconds(TOY, layer(which)))


class Counted(TorchDispatchMode):
    """Collects the ops that write something: those that are no views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        schema = op._schema
        is_view = any(out.alias_info for out in schema.returns) and not schema.is_mutable
        if not is_view and schema.name != "aten::_unsafe_view":
            self.names.append(schema.name)
        return op(*args, **(kwargs or {}))


def test_small_kernels_are_as_many_as_are_counted():
    geometry = ConvGeometry(64, 64, (3, 3), before=(1, 1), after=(1, 1))
    w = BlockSparse.from_dense(torch.randn(64, 576), (32, 32), torch.rand(2, 18) < 0.5)
    blocks = conv_blocks(w, geometry)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        blocks.to_weight(w.values, memory_format)  # the places of the blocks are kept
        with Counted() as counted:
            blocks.to_weight(w.values, memory_format)
        assert counted.names == ["aten::new_zeros", "aten::index_copy_", "aten::clone"]
    weight = blocks.to_weight(w.values, torch.contiguous_format)
    with Counted() as counted:
        blocks.of_weight(weight)
    assert counted.names == ["aten::clone", "aten::index_select"]
    # of the gradient of the values they are all: the weight that it needs no value of is not made
    x, dout = torch.randn(2, 64, 4, 4), torch.randn(2, 64, 4, 4)
    with Counted() as counted:
        dx, dvalues = conv_dense_bwd(dout, x, w.values, blocks, (False, True))
    assert (dx, dvalues.shape) == (None, w.values.shape)
    names = [name for name in counted.names if name != "aten::new_empty"]  # which writes nothing
    assert names == ["aten::convolution_backward", "aten::clone", "aten::index_select"]


@pytest.mark.parametrize("name", CARD_NAMES)
def test_predictions_stay_within_the_ideal_and_that_within_the_density(name):
    on = card(name)
    for which, block, s in itertools.product(PASSES, (16, 32, 128), (0.5, 0.9)):
        for channels, size in ((64, 56), (256, 28), (512, 14)):
            cell = conv_cell(which, (channels,) * 2, (size,) * 2, block=(block,) * 2, sparsity=s)
            ideal = conv_roofline.ideal_seconds(on, cell)
            dense = conv_roofline.ideal_dense_seconds(on, cell)
            assert dense * cell.density * 0.999 <= ideal <= dense + 1e-7  # the index
            assert conv_roofline.predict(on, cell).seconds > ideal
            assert conv_roofline.unpack_seconds(on, cell) > dense


@pytest.mark.parametrize("which", PASSES)
def test_fewer_blocks_never_take_longer_with_the_same_tile(which):
    tile, on = BsrTile(32, 64, 32, 3, 4), card("H100 SXM")
    times = [
        conv_roofline.predict(on, conv_cell(which, (256, 256), sparsity=s / 100), tile).seconds
        for s in range(0, 100, 3)
    ]
    assert times == sorted(times, reverse=True)


def test_the_tile_is_the_kernels_own_unless_one_is_given():
    for which, side in itertools.product(PASSES, (16, 64, 128)):
        cell = conv_cell(which, (256, 256), block=(side, side))
        own = analytic(cell).candidate.tile
        assert conv_roofline.predict(FAST, cell).tile == own


def test_tiles_that_waste_less_come_first_on_a_card():
    """A tile of 16 pixels fills the weight in eight times as often as one of 128."""
    on, cell = card("H100 SXM"), conv_cell(channels=(512, 512), size=(14, 14), images=32)
    tiles = [c.tile for c in candidates(cell) if c.tile is not None]
    best, *_, worst = sorted(tiles, key=lambda t: conv_roofline.predict(on, cell, t).seconds)
    assert (best.BLOCK_M, worst.BLOCK_M) == (128, 16)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_blocks_there_is_a_start(which, dtype):
    cell = dataclasses.replace(layer(which, dtype=dtype), nnz=0)
    found = conv_roofline.predict(FAST, cell, BsrTile(16, 16, 16, 2, 4)).seconds
    assert found == pytest.approx(2e-6, rel=1e-3)
