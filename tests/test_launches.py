"""What the launchers ask for, recorded without a card."""

import pytest
import torch
from sgtriton_kernels.conv_geometry import ConvGeometry
from sgtriton_kernels.tiles import BsrTile, GatedTile

from sgtriton.launches import (
    bsr_conv_launches,
    bsr_linear_launches,
    empty,
    gated_linear_launches,
    launch_of,
)

pytestmark = pytest.mark.compiles  # the interpreter's kernels cannot be recorded
TILE = BsrTile(BLOCK_N=32, BLOCK_M=16, BLOCK_K=64, num_stages=3, num_warps=2)


@pytest.mark.parametrize("which", ["fwd", "dx", "dvalues"])
def test_a_launch_has_the_tile_cut_to_the_block(which):
    (launch,) = bsr_linear_launches(which, torch.float16, (64, 32), 100, 640, 320, 20, TILE)
    flags = launch.constexprs
    assert (flags["BN"], flags["BK"]) == (64, 32)
    assert (flags["BLOCK_N"], flags["BLOCK_M"], flags["BLOCK_K"]) == (32, 16, 32)
    assert (launch.num_stages, launch.num_warps) == (3, 2)
    assert "*fp16" in launch.signature.values()
    assert launch.function().arg_names == list(launch.signature)


def test_split_programs_launch_the_sum_too():
    tile = BsrTile(32, 16, 64, 3, 2, split=4)
    launches = bsr_linear_launches("fwd", torch.bfloat16, (64, 64), 16, 640, 640, 20, tile)
    assert [launch.kernel for launch in launches] == ["_bsr_product_kernel", "_bsr_add_up_kernel"]


@pytest.mark.parametrize(
    ("sizes", "aligned", "read"),
    [((640, 640), True, "rows"), ((640, 640), False, "any"), ((640, 636), True, "any")],
)
def test_rows_that_do_not_lie_for_it_are_not_read_in_wide_pieces(sizes, aligned, read):
    (launch,) = bsr_linear_launches(
        "fwd", torch.float16, (64, 64), 16, *sizes, 20, TILE, aligned=aligned
    )
    assert launch.constexprs["READ"] == read


@pytest.mark.parametrize("which", ["fwd", "dx", "dvalues"])
def test_a_convolution_is_launched_with_its_geometry(which):
    geometry = ConvGeometry(64, 128, (3, 3), stride=(2, 2), before=(1, 1), after=(1, 1), groups=2)
    (launch,) = bsr_conv_launches(
        which, torch.float32, (32, 32), geometry, 2, (14, 14), 12, BsrTile(32, 32, 32, 2, 4)
    )
    assert launch.kernel == f"_bsr_conv_{which}_kernel"
    assert "*fp32" in launch.signature.values()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("which", ["fwd", "dx", "dw"])
def test_a_gated_product_is_launched_with_both_dtypes(which, skip):
    tile = GatedTile(64, 32, 32, 2, 4, max_registers=168)
    (launch,) = gated_linear_launches(
        which, skip, torch.bfloat16, torch.float32, (64, 64), 100, 640, 320, tile
    )
    assert {"*bf16", "*fp32"} <= set(launch.signature.values())
    assert launch.max_registers == 168


def test_what_launches_nothing_or_twice_is_not_one_launch():
    with pytest.raises(ValueError, match="unpack"):
        launch_of(lambda: empty(3))
