import torch
import torch.nn.functional as F

from bench import conv, rows


def test_rows_of_every_candidate_survive_the_csv(tmp_path):
    path = tmp_path / "conv.csv"
    measured = conv.measure((64, 64, 6, 2), 1, torch.float32, seconds=0.01)
    rows.write(path, measured)
    assert rows.read(path, conv.Row) == measured
    assert [row.candidate for row in measured][:2] == list(conv.DENSE)
    assert min(row.ratio for row in measured[:2]) == 1
    text = conv.table(measured)
    *_, total = text.splitlines()
    assert "all thirteen" in total
    assert f"{2 * measured[0].ms_p50:.2f}" in total


def test_all_candidates_compute_the_same():
    matrix, weight = conv.pruned_weight(64, 96, conv.CLOSED, torch.float32)
    blocks = F.max_pool2d(weight.abs().amax((2, 3))[None], 32)
    assert blocks.shape == (1, 3, 2)
    assert matrix.nnz == round(0.1 * 3 * 2 * 9)
    x, bias = torch.randn(2, 64, 5, 5), torch.randn(96)
    outs = [call() for call in conv.candidates(matrix, weight, bias, x).values()]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
