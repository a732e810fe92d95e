import dataclasses
import math

import pytest
import test_serving_bench
import test_training_bench

from bench import charts, report, roofs, serving, serving_curves

plt = pytest.importorskip("matplotlib.pyplot", reason="charts need matplotlib")


def grid_of_rows():
    """Rows of a small grid with times that are told, some slower than dense."""
    template = test_serving_bench.cell_rows()[0]
    found = []
    for i, block in enumerate(("16x16", "32x32")):
        for m in (1, 64):
            for sparsity in (0.5, 0.9):
                speedup = (0.8 + i) / (1 - sparsity) / 2
                for provider in ("dense", serving.OURS, serving.BLOCKS_ONLY):
                    ratio = 1.0 if provider == "dense" else 1 / speedup
                    found.append(
                        dataclasses.replace(
                            template, provider=provider, block=block, M=m, N=4096, K=4096,
                            sparsity=sparsity, density=1 - sparsity, ms_p50=2 * ratio, ratio=ratio,
                            tflops=0.1 / ratio, gb_s=10 / ratio,
                        )
                    )  # fmt: skip
    return found


def roof_rows():
    template = grid_of_rows()[0]
    return [
        dataclasses.replace(
            template, op=op, provider=roofs.ROOF, tflops=tflops, gb_s=rate, ratio=math.nan
        )
        for op, tflops, rate in ((roofs.COPY, math.nan, 20.0), (roofs.MATMUL, 0.3, 1.0))
    ]


def test_every_chart_is_drawn_twice_the_same(tmp_path):
    found = charts.of("serving", grid_of_rows() + roof_rows())
    measured = test_training_bench.cell().values()
    found += charts.of("training", list(measured))
    names = [chart.name for chart in found]
    assert names == [
        "serving_speedup_float32", "serving_heat_float32", "serving_roofline_float32",
        "serving_predicted_float32", "training_step_float32",
    ]  # fmt: skip
    first = charts.write(found, tmp_path / "a")
    second = charts.write(found, tmp_path / "b")
    assert {path.suffix for path in first} == {".png", ".svg"}
    assert len(first) == 2 * len(found)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def texts(figure):
    return [t.get_text() for t in figure.findobj(plt.Text)]


def test_titles_say_device_dtype_and_versions():
    for chart in charts.of("serving", grid_of_rows() + roof_rows()):
        figure = chart.draw()
        row = grid_of_rows()[0]
        title = figure.get_suptitle()
        for said in (row.device, row.dtype, row.torch, row.sgtriton):
            assert said in title
        plt.close(figure)


def test_losses_are_shown():
    (speedup, heat, *_) = charts.of("serving", grid_of_rows())
    figure = speedup.draw()
    hollow = [
        line
        for axis in figure.axes
        for line in axis.lines
        if line.get_marker() == "o" and line.get_markerfacecolor() == "white"
    ]
    stars = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "*"]
    assert len(hollow) == len(stars) == 2  # blocks of 16x16 at 50 %, of either M
    assert [line.get_ydata()[0] for line in hollow] == pytest.approx([0.8, 0.8])
    figure = heat.draw()
    bold = [t.get_text() for t in figure.findobj(plt.Text) if t.get_weight() == "bold"]
    assert bold == ["0.80", "0.80"]
    assert "4.00" in texts(figure)
    plt.close("all")


def test_roofs_are_those_measured():
    *_, roofline, _ = charts.of("serving", grid_of_rows() + roof_rows())
    figure = roofline.draw()
    (line,) = figure.axes[0].lines
    assert max(line.get_ydata()) == 300
    assert line.get_xdata()[1] == pytest.approx(0.3 / 0.02)
    assert "roofs: copy 20 GB/s, dense product 300 GFLOP/s" in texts(figure)
    plt.close(figure)
    assert not any("roofline" in c.name for c in charts.of("serving", grid_of_rows()))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 0.5), (0.75, 2.0)], 1 - 0.5 / 2**0.5),  # half way, in logarithms
        ([(0.5, 1.0), (0.9, 2.0)], None),
        ([(0.5, 0.5), (0.9, 0.9)], None),
        ([(0.5, 2.0), (0.8, 0.5), (0.9, 1.0)], 0.9),
        ([], None),
    ],
)
def test_curves_break_even_between_their_points(points, expected):
    found = serving_curves.break_even(points)
    assert found == (None if expected is None else pytest.approx(expected))


def test_charts_of_nothing_are_none():
    missing = [dataclasses.replace(r, status="missing: for GPUs only") for r in grid_of_rows()]
    assert charts.of("serving", missing) == []
    assert charts.of("conv", grid_of_rows()) == []


def test_a_card_has_charts_of_its_own():
    assert [c.name for c in charts.of("serving", grid_of_rows(), "nvidia-h100_")] == [
        "nvidia-h100_serving_speedup_float32", "nvidia-h100_serving_heat_float32",
    ]  # fmt: skip


def test_the_page_shows_the_charts_that_there_are():
    text = report.page()
    shown = {line for line in text.splitlines() if line.startswith("![")}
    assert shown == {charts.markdown([chart]).strip() for chart in report.all_charts()}
    for chart in report.all_charts():
        for ending in ("png", "svg"):
            assert (charts.FOLDER / f"{chart.name}.{ending}").is_file(), (
                "run python -m bench report"
            )
    kept = {path.stem for path in charts.FOLDER.iterdir()}
    assert kept == {chart.name for chart in report.all_charts()}
