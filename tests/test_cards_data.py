"""Figures of cards: complete or explained, and free of slips where one follows from others."""

import dataclasses

import pytest
from sgtriton_kernels.cards import CARD_NAMES, card, card_of, named_card

from sgtriton.cross_compile import CARDS

CARDS_BY_NAME = {name: card(name) for name in CARD_NAMES}
# what a note must speak of where a figure is missing
EXPLAINED = {
    "l2_bytes_per_clock": "L2 read bandwidth",
    "tflops_fp32": "fp32",
    "tflops_tf32": "TF32",
}
# multiply-adds in fp32 that a multiprocessor does in a clock
LANES = {"sm_80": 64}


@pytest.mark.parametrize("name", CARD_NAMES)
def test_every_figure_is_given_or_its_absence_explained(name):
    found = CARDS_BY_NAME[name]
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if value is None and field.name != "last_level_mb":  # most cards have no such cache
            assert EXPLAINED[field.name] in found.note, field.name
        if isinstance(value, int | float):
            assert value > 0, field.name
        if field.type in ("int", "int | None") and value is not None:
            assert type(value) is int, field.name
    assert found.source
    assert found.name == name


@pytest.mark.parametrize("name", CARD_NAMES)
def test_peaks_follow_from_the_clock(name):
    found = CARDS_BY_NAME[name]
    lanes = LANES.get(found.arch, 128)
    computed = 2 * lanes * found.multiprocessors * found.boost_mhz / 1e6
    if found.tflops_fp32 is not None:
        assert found.tflops_fp32 == pytest.approx(computed, rel=0.005)
    if found.tflops_tf32 is not None:
        assert found.tflops_tf32 == pytest.approx(found.tflops_16bit / 2, rel=0.03)
    assert found.tflops_16bit > computed


def test_programs_take_no_more_shared_memory_than_there_is():
    for found in CARDS_BY_NAME.values():
        reserved = 1 if found.arch.startswith("sm_") else 0
        assert found.shared_program_kib == found.shared_kib - reserved


def test_cards_are_those_that_kernels_are_compiled_for():
    archs = {f"sm_{arch}" if backend == "cuda" else arch for backend, arch, _ in CARDS}
    assert {found.arch for found in CARDS_BY_NAME.values()} == archs


def test_an_unknown_card_is_refused():
    with pytest.raises(ValueError, match="no card is named 'H300', only A100 SXM 80GB, "):
        card("H300")


@pytest.mark.parametrize(
    ("device_name", "arch", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "sm_80", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", None),
        ("NVIDIA A100 80GB PCIe", "sm_80", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", "sm_80", None),
        ("NVIDIA A10", "sm_86", "A10"),
        ("NVIDIA A10G", "sm_86", None),
        ("NVIDIA L40S", "sm_89", "L40S"),
        ("NVIDIA L40", "sm_89", None),
        ("NVIDIA GeForce RTX 4090", "sm_89", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", "sm_89", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89", None),
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100 SXM"),
        ("NVIDIA H100 PCIe", "sm_90", None),
        ("NVIDIA H100 NVL", "sm_90", None),
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA H200 NVL", "sm_90", None),
        ("NVIDIA GH200 480GB", "sm_90", None),
        ("NVIDIA B200", "sm_100", "B200"),
        ("NVIDIA GB200", "sm_100", None),
        ("NVIDIA GeForce RTX 5090", "sm_120", "RTX 5090"),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", "sm_120", None),
        ("AMD Instinct MI300X", "gfx942", "MI300X"),
        ("AMD Instinct MI300X OAM", "gfx942", "MI300X"),
        ("AMD Instinct MI300A", "gfx942", None),
        ("AMD Instinct MI308X", "gfx942", None),
        ("AMD Radeon RX 7900 XTX", "gfx1100", "RX 7900 XTX"),
        ("AMD Radeon RX 7900 XT", "gfx1100", None),
        ("AMD Radeon Graphics", "gfx1100", None),
        ("NVIDIA H200", "sm_80", None),  # a name alone is not enough
        ("", "sm_90", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(device_name, arch, expected):
    assert card_of(device_name, arch) == expected


def test_no_two_cards_have_a_name_in_common():
    names = [name for found in CARDS_BY_NAME.values() for name in found.device_names]
    assert len(set(names)) == len(names)
    assert all(found.device_names for found in CARDS_BY_NAME.values())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, name) for name in CARD_NAMES),
        ("H100", "H100 SXM"),
        ("h100sxm", "H100 SXM"),
        ("h100_sxm", "H100 SXM"),
        ("a100", "A100 SXM 80GB"),
        ("A100-SXM", "A100 SXM 80GB"),
        ("a10", "A10"),
        ("4090", "RTX 4090"),
        ("7900 xtx", "RX 7900 XTX"),
        (" mi300x ", "MI300X"),
    ],
)
def test_short_names_of_cards_are_understood(name, meant):
    assert named_card(name) == meant
    assert named_card(name, "cpu") == meant


@pytest.mark.parametrize("name", ["H20", "L40", "A1", "H300", "", " ", "SXM H100", None, ["H200"]])
def test_other_cards_are_not_taken_for_those_that_are_known(name):
    with pytest.raises(ValueError, match=r"card must be one of A100 SXM 80GB, .*, got "):
        named_card(name)
    assert named_card("CPU", "cpu") == "cpu"


@pytest.mark.parametrize(
    ("name", "several"), [("rtx", "RTX 4090, RTX 5090"), ("sxm", "A100 SXM 80GB, H100 SXM")]
)
def test_a_name_of_several_cards_lists_them(name, several):
    with pytest.raises(ValueError, match=f"card must be one of {several}: '{name}' may be"):
        named_card(name)
