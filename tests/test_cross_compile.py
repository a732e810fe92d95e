"""What is compiled for a card is what a launch there would compile, and finds in Triton's cache."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from sgtriton_kernels import gate_bits
from sgtriton_kernels.conv_geometry import ConvGeometry
from sgtriton_kernels.tiles import BsrTile, GatedTile

from sgtriton import launches
from sgtriton.compilers import compile_launch
from sgtriton.cross_compile import TARGETS

BF16 = torch.bfloat16
SIDES = ((64, 64), 128, 1024, 1024)  # block, M, N, K
CONV = ConvGeometry(64, 64, (3, 3), before=(1, 1), after=(1, 1))


def pass_of(which, **change):
    tile = BsrTile(
        **{"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_K": 32, "num_stages": 3, "num_warps": 4} | change
    )
    return lambda: launches.bsr_linear_launches(which, BF16, *SIDES, 100, tile)


LAUNCHERS = {
    "bsr_linear": pass_of("fwd"),
    "bsr_linear, bulk": pass_of("fwd", bulk=True),
    "bsr_linear, sums": pass_of("fwd", split=4),
    "bsr_linear dx": pass_of("dx"),
    "bsr_linear dvalues": pass_of("dvalues", split=4),
    "bsr_conv": lambda: launches.bsr_conv_launches(
        "fwd", BF16, (64, 64), CONV, 8, (14, 14), 9, BsrTile(64, 64, 32, 3, 4)
    ),
    "fused": lambda: launches.gated_linear_launches(
        "fwd", False, BF16, torch.float32, *SIDES, GatedTile(64, 64, 32, 2, 4)
    ),
    "pack_gates": lambda: launches.launches_of(
        lambda: gate_bits.pack_gates(
            launches.empty(64, 64), "bernoulli", launches.empty(1, dtype=torch.int64)
        )
    ),
}  # fmt: skip
_devices = itertools.count(1000)  # what a kernel compiles for a device is kept by its number


def launched(prepare, target, monkeypatch):
    """The kernels of what ``prepare`` launches, compiled as for a card that is there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    device = next(_devices)
    card = SimpleNamespace(
        get_current_target=lambda: GPUTarget(*TARGETS[target]),
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(driver, "_active", card)
    run, found = JITFunction.run, []

    def compiled(kernel, *args, grid, warmup, **options):
        found.append(run(kernel, *args, grid=grid, warmup=True, **options))

    def really(prepared):
        with mock.patch.object(JITFunction, "run", compiled):
            prepared()
        return found

    with mock.patch.object(launches, "launches_of", really):
        prepare()
    return found


@pytest.mark.compiles
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launch_finds_what_was_compiled_for_its_card(name, target, tmp_path, monkeypatch):
    """A search compiled ahead, and its candidates were compiled a second time as it timed them."""
    if "bulk" in name and target != "sm_90":
        pytest.skip("this card has no copy engine")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # which PyTorch for AMD's cards never asks for
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ahead = LAUNCHERS[name]()
    for launch in ahead:
        compile_launch(target, launch)
    kept = sorted(path.name for path in tmp_path.iterdir())
    kernels = launched(LAUNCHERS[name], target, monkeypatch)
    assert len(kernels) == len(ahead) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    if target == "gfx942":  # through buffer instructions, which take 32 bits of an address
        assert "buffer_load" in kernels[0].asm["amdgcn"]
