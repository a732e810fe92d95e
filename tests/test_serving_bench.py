import dataclasses
import math

import pytest
import torch
from sgtriton_kernels import BlockSparse
from torch import nn

import sgtriton
from bench import native, rows, serving, serving_tables


def made(dtype=torch.float32):
    torch.manual_seed(0)
    dense = serving.pruned_layer(64, 96, 16, 0.5, dtype)
    weight = dense.weight.detach()
    matrix = BlockSparse.from_dense(weight, (16, 16))
    model = sgtriton.sparsify(nn.Sequential(dense), form="sparse", block=(16, 16))
    return serving.Served(model[0], weight, matrix)


def cell_rows(m=5):
    return serving.measure(made(), m, 0.5, seconds=0.01)


def test_pruned_layers_have_the_sparsity_asked_for():
    layer = serving.pruned_layer(64, 96, 16, 0.75, torch.bfloat16)
    assert BlockSparse.from_dense(layer.weight.detach(), (16, 16)).nnz == 6
    assert layer.weight.dtype == torch.bfloat16


def test_rows_survive_the_csv(tmp_path):
    measured = cell_rows()
    for row in measured:
        rows.append(tmp_path / "serving.csv", row)
    assert rows.read(tmp_path / "serving.csv", serving.Row) == measured
    names = [row.provider for row in measured]
    assert {row.status for row in measured} == {rows.MEASURED}
    assert names[0] == "dense"
    assert {"sgtriton", "sgtriton, product over blocks", "torch.sparse BSR"} <= set(names)
    assert min(row.ratio for row in measured if row.provider in serving.DENSE) == 1
    assert "float32, block 16" in serving_tables.table(measured)


def test_cells_say_who_was_faster():
    template = cell_rows()[0]

    def row(provider, ms, ratio):
        return dataclasses.replace(
            template, provider=provider, ms_p50=ms, ratio=ratio, density=0.5, form="sparse"
        )

    (cell,) = serving_tables.cells(
        [row("dense", 2.0, 1.0), row("sgtriton", 1.25, 0.625), row("torch.sparse BSR", 1.0, 0.5),
         row("scipy BSR", 3.0, 1.5)]
    )  # fmt: skip
    assert cell.dense_ms == pytest.approx(2.0)
    assert cell.speedup == pytest.approx(1.6)
    assert cell.share == pytest.approx(0.8)
    assert (cell.best_peer, cell.ahead) == ("torch.sparse BSR", pytest.approx(0.25))
    assert "ahead by 25%" in serving_tables.losses([cell])
    assert "of dense" not in serving_tables.losses([cell])
    assert serving_tables.losses([dataclasses.replace(cell, ahead=0.0)]) == "- none"
    assert "0.90 of dense" in serving_tables.losses([dataclasses.replace(cell, speedup=0.9)])
    short = dataclasses.replace(cell, dense_ms=0.1, share=0.2)
    assert serving_tables.mean_share([cell, short]) == pytest.approx(0.4)  # however short it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_wrong_result_is_not_timed(dtype, monkeypatch):
    of, candidates = made(dtype), serving.candidates
    for name in candidates(of, torch.randn(5, 96, dtype=dtype), 1):
        calls = []

        def planted(*arguments, name=name, calls=calls):
            found = candidates(*arguments)
            call = found[name].call
            off = 1.001 if dtype == torch.float32 else 1.03

            def wrong():
                calls.append(name)
                return off * torch.as_tensor(call())

            return found | {name: dataclasses.replace(found[name], call=wrong)}

        monkeypatch.setattr(serving, "candidates", planted)
        by_name = {row.provider: row for row in serving.measure(of, 5, 0.5, 0.0)}
        assert by_name[name].status.startswith("wrong: relative error")
        assert math.isnan(by_name[name].ms_p50)
        assert len(calls) == 2  # to look at it, and no more than once beside
        others = [row.status for row in by_name.values() if row.provider != name]
        assert set(others) == {rows.MEASURED}


def test_rates_are_those_of_what_is_kept():
    by_name = {row.provider: row for row in cell_rows()}
    for name, share in (("dense", 1), (serving.BLOCKS_ONLY, 0.5), ("onnxruntime dense", 1)):
        if name not in by_name:
            continue  # onnxruntime is optional
        row = by_name[name]
        rounding = 1e-3 + 1e-4 / row.ms_p50  # of rates to four digits, of times to 0.1 us
        operations = 2 * 5 * 64 * 96 * share
        moved = 4 * (64 * 96 * share + 5 * 96 + 5 * 64)
        assert row.tflops * row.ms_p50 == pytest.approx(operations / 1e9, rel=rounding)
        assert row.gb_s * row.ms_p50 == pytest.approx(moved / 1e6, rel=rounding)


def cell(**changed):
    plain = serving_tables.Cell(
        "float32", 16, 0.9, 16, 1024, 4096, "sparse", 0.1, dense_ms=1.0, speedup=2.0, share=0.2,
        best_peer="scipy BSR", ahead=-0.5,
    )  # fmt: skip
    return dataclasses.replace(plain, **changed)


def test_cells_that_are_behind_twice_are_counted_once():
    both = cell(speedup=0.5, ahead=0.3)
    text = serving_tables.losses([both, cell()])
    assert text.count("- ") == 2

    template = cell_rows()[0]
    ms = {"dense": 1.0, "sgtriton": 2.0, "torch.sparse BSR": 1.0}
    rows_of_two = [
        dataclasses.replace(
            template, provider=provider, M=m, ms_p50=taken if m == 1 else 1.0,
            ratio=taken if m == 1 else 1.0, form="sparse",
        )
        for m in (1, 2)
        for provider, taken in ms.items()
    ]  # fmt: skip
    page = serving_tables.section(rows_of_two, "", "serving.csv")
    assert "Cells behind dense, or behind a peer by more than 5%: 1<" in page
    even = [row for row in rows_of_two if row.M == 2]
    assert "more than 5%: none<" in serving_tables.section(even, "", "serving.csv")


def test_losses_are_counted_by_block():
    half = cell(dtype="bfloat16", best_peer="-", ahead=0.0, speedup=0.73)
    lines = serving_tables.losses_in_short(
        [
            cell(),
            cell(M=1, ahead=0.06, sparsity=0.5),
            cell(M=1, ahead=0.7, sparsity=0.95, best_peer="torch.sparse BSR"),
            cell(M=64, ahead=0.2),
            cell(block=32, ahead=0.05, speedup=0.97),
            half,
        ]
    )
    dense, small, large = " ".join(lines.split()).split(" - ")
    assert dense == (
        "- slower than 0.97 of dense: 1 of 6 cells (1 of bfloat16, 16x16); by most, 0.73, "
        "bfloat16, block 16 at M = 16 and 90%, (N, K) = (1024, 4096)"
    )
    assert small == (
        "blocks of 16x16, float32: a peer ahead by more than 5% in 3 of 4 cells (2 at M = 1, 1 at "
        "M = 64); by most, 70%, torch.sparse BSR at M = 1 and 95%, (N, K) = (1024, 4096)"
    )
    assert large == "blocks of 32x32, float32: a peer ahead by more than 5% in 0 of 1 cells"
    assert max(map(len, lines.splitlines())) <= 100
    assert "0 of 1 cells\n" in serving_tables.losses_in_short([cell()]) + "\n"


def test_kernel_is_measured_beside_the_dense_layer(tmp_path, impl):
    if impl != "triton":
        pytest.skip("it measures Triton's kernel")
    row = native.measure(3, 0.5, seconds=0.0, shape=(128, 128))
    rows.write(tmp_path / "native.csv", [row])
    assert rows.read(tmp_path / "native.csv", native.Row) == [row]
    assert row.share == pytest.approx(0.5 * row.speedup, abs=2e-3)
    assert "50%" in native.markdown([row])
