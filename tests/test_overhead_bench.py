import pytest
from helpers import assert_close

from bench import overhead, rows


def test_rows_of_every_call_survive_the_csv(tmp_path):
    path = tmp_path / "overhead.csv"
    measured = [row for mode in overhead.MODES for row in overhead.measure(mode, seconds=0.01)]
    rows.write(path, measured)
    assert rows.read(path, overhead.Row) == measured
    dense = [row for row in measured if row.call in ("F.linear", "nn.Linear", "F.conv2d")]
    assert len(dense) == 3 * len(overhead.MODES)
    assert all(row.over == 0 for row in dense)
    head, _, *lines = overhead.markdown(measured).splitlines()
    assert all(mode in head for mode in overhead.MODES)
    assert len(lines) == len({row.call for row in measured})


@pytest.mark.parametrize("mode", overhead.MODES)
def test_every_call_is_timed_in_its_mode(mode, monkeypatch):
    outs = []

    def called_once(calls, *_, **__):
        outs.extend(call() for call in calls)
        return [[1.0]] * len(calls)

    monkeypatch.setattr(overhead, "back_to_back_ms", called_once)
    measured = overhead.measure(mode, seconds=0.0)
    assert {"served layer, dense", "served layer, sparse"} <= {row.call for row in measured}
    for row, out in zip(measured, outs, strict=True):
        assert out.is_inference() == (mode == "inference_mode"), row.call
        assert out.requires_grad == (mode == "gradients"), row.call


@pytest.mark.parametrize("requires_grad", [False, True])
def test_calls_of_a_group_compute_the_same(requires_grad):
    groups = overhead.candidates(requires_grad)
    assert_close("linear", *(call().detach() for call in groups["linear"].values()))
    assert_close("convolution", *(call().detach() for call in groups["convolution"].values()))
