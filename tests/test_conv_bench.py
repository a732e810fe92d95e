import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bench import conv, rows


def test_rows_of_every_candidate_survive_the_csv(tmp_path):
    path = tmp_path / "conv.csv"
    measured = conv.measure((64, 64, 6, 2), 1, torch.float32, seconds=0.01)
    rows.write(path, measured)
    assert rows.read(path, conv.Row) == measured
    assert [row.provider for row in measured][:2] == list(conv.DENSE)
    assert min(row.ratio for row in measured[:2]) == 1
    assert {row.status for row in measured} == {rows.MEASURED}
    assert [row.provider for row in measured if row.form != "-"] == list(conv.LAYER)
    text = conv.table(measured)
    *_, total = text.splitlines()
    assert total.split()[2] == "all"
    assert f"{2 * measured[0].ms_p50:.2f}" in total


def test_all_candidates_compute_the_same():
    matrix, weight = conv.pruned_weight(64, 96, conv.CLOSED, torch.float32)
    blocks = F.max_pool2d(weight.abs().amax((2, 3))[None], 32)
    assert blocks.shape == (1, 3, 2)
    assert matrix.nnz == round(0.1 * 3 * 2 * 9)
    x, bias = torch.randn(2, 64, 5, 5), torch.randn(96)
    layer = conv.served_layer(weight, bias)
    outs = [call() for call in conv.candidates(layer, matrix, weight, bias, x).values()]
    assert len(outs) == 6
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_the_first_layer_is_measured_too():
    (channels, out_channels, *_), *_ = conv.LAYERS
    measured = conv.measure((channels, out_channels, 6, 1), 1, torch.float32, seconds=0.0)
    assert {row.provider for row in measured} >= set(conv.LAYER)


def test_slower_layers_are_named():
    template = conv.measure((64, 64, 6, 1), 1, torch.float32, seconds=0.0)
    ms = dict(zip([*conv.DENSE, *conv.LAYER], (2.0, 1.0, 1.0, 1.25), strict=True))
    found = [
        dataclasses.replace(row, ms_p50=ms.get(row.provider, 9.0), form=f"form of {i}")
        for i, row in enumerate(template)
    ]
    said = conv.remark(found)
    assert "1 of 2 layers are slower" in said.replace("\n", " ")
    assert "0.80 at batch 1, 64 to 64 channels, size 6, channels-last (form of 3)" in said
    found = [dataclasses.replace(row, ms_p50=1.0) for row in found]
    assert conv.remark(found).endswith("0 of 2 layers are\nslower than 0.97 of dense.")


@pytest.mark.parametrize("missing", conv.DENSE)
def test_a_dense_layer_without_a_time_hides_no_other(missing):
    """Where the first of two had none the best was NaN, and so were all factors."""
    rows = conv.measure((64, 64, 6, 1), 1, torch.float32, seconds=0.0)
    other = [dataclasses.replace(row, size=7) for row in rows if row.provider != missing]
    (layers,) = conv._layers([*rows, *other]).values()
    assert all(ms["best"] > 0 for ms in layers.values())
    assert len(layers) == 2
    for ms in layers.values():
        assert ms["best"] == min(t for name in conv.DENSE if (t := ms[name]) == t)
