"""``sgtriton tune --card`` and ``--blocks``: predictions, and what is refused before any."""

import json
import re

import pytest
import torch
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.candidate import UNPACK, Candidate
from sgtriton_kernels.cell import OPS, Cell
from sgtriton_kernels.lookup import analytic
from test_cli_tune import Net, save
from torch import nn

import sgtriton
from sgtriton import cli_absent, predicted
from sgtriton.cli import main
from sgtriton.demo.models import make_model
from sgtriton.offline import Ranked


@pytest.fixture
def ranked(monkeypatch):
    """As if what comes first but one were a third faster, and filling in the zeros failed."""

    def rank(name, cell, candidates, compilers, deadline):
        second: Candidate = candidates[1]
        return [
            Ranked(second, 3e-6, "memory"),
            Ranked(analytic(cell).candidate, 4e-6, "waves"),
            Ranked(UNPACK, dropped="ptxas: too much"),
        ]

    monkeypatch.setattr(predicted, "rank", rank)


def test_table_of_a_card_that_is_absent(ranked, tmp_path, capsys):
    out = tmp_path / "mine.json"
    shapes = "16x4096x4096,128x4096x4096"
    code = main(["tune", "--card", "H100 SXM", "--shapes", shapes, "--out", str(out)])
    assert code == 0
    text = capsys.readouterr().out
    assert text.startswith("H100 SXM: predicted, not measured")
    assert "1.33x" in text
    assert "unpack is skipped: ptxas: too much" in text
    assert "2 of 2 products gain 10% or more" in " ".join(text.split())
    table = json.loads(out.read_text())
    assert (table["card"], table["status"], table["ranked"]) == ("H100 SXM", "predicted", 2)
    assert [entry["key"]["rows"] for entry in table["entries"]] == [16, 16, 128, 128]
    assert table["entries"][0]["key"]["dtype"] == "bfloat16"


def test_gradients_are_ranked_where_the_model_trains(ranked, tmp_path, capsys):
    out = tmp_path / "t.json"
    arguments = ["--card", "h100", "--shapes", "16x256x128,128x64x64", "--out", str(out)]
    assert main(["tune", *arguments, "--train"]) == 0
    text = capsys.readouterr().out
    table = json.loads(out.read_text())
    assert table["ranked"] == 6
    ops = [entry["key"]["op"] for entry in table["entries"]]
    assert {*ops} == {*OPS}
    assert all(ops.count(op) == 4 for op in OPS)
    lines = [line.split() for line in text.splitlines()]
    assert [line[:2] for line in lines if line[:1] in (["fwd"], ["dx"], ["dvalues"])] == [
        [which, m] for m in ("16", "128") for which in ("fwd", "dx", "dvalues")
    ]
    assert "unpack is skipped: ptxas: too much" in text
    assert "unpack is skipped for dx: ptxas: too much" in text


def test_layers_of_a_file_are_ranked(ranked, tmp_path, capsys):
    path = save(Net(), tmp_path / "net", {"conv": (16, 16), "blocks": (16, 16), "single": (1, 1)})
    w = sgtriton.load(Net(), path).blocks.matrix
    out = tmp_path / "t.json"
    arguments = ["tune", "--card", "h100", "--checkpoint", path, "--out", str(out)]
    assert main([*arguments, "--rows", "5,16,16"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "left out: conv (convolutions); single (a gate for each weight)" in text
    assert "a file says no image size, on which the choice for a convolution depends" in text
    assert "layer pass M N, K" in text
    assert "blocks fwd 5 48, 64 16x16" in text
    table = json.loads(out.read_text())
    assert table["ranked"] == 2
    keys = [e["key"] for e in table["entries"] if e["key"]["balance"] == "even"]
    assert [(key["rows"], key["dtype"]) for key in keys] == [(8, "float32"), (16, "float32")]
    for m, key in zip((5, 16), keys, strict=True):
        looked_up = cell_of("fwd", w, "triton", torch.empty(m, 64)).key()
        assert key == looked_up | {"balance": "even"}

    out.unlink()
    assert main([*arguments, "--rows", "16", "--dtype", "float16", "--train"]) == 0
    keys = [e["key"] for e in json.loads(out.read_text())["entries"]]
    assert {(key["op"], key["dtype"]) for key in keys} == {(op, "float16") for op in OPS}


def test_layers_that_ask_for_the_same_entry_are_ranked_once(ranked, tmp_path, capsys):
    """A stack of equal layers would be compiled for one by one, and the last one's entry found."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 32))
    sgtriton.patch(model, (32, 32))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.gate[0, i % 2] = 0.0
    sgtriton.save(sgtriton.sparsify(model.eval(), form="sparse"), tmp_path / "net")
    path, out = str(tmp_path / "net"), tmp_path / "t.json"
    arguments = ["--checkpoint", path, "--rows", "16", "--out", str(out)]
    assert main(["tune", "--card", "h100", *arguments]) == 0
    table = json.loads(out.read_text())
    assert table["ranked"] == 2
    assert len({json.dumps(entry["key"]) for entry in table["entries"]}) == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if "32x32" in line]
    assert [line.split(" fwd ")[0].strip() for line in lines] == ["0, 1, 2", "3"]


def test_blocks_that_no_kernel_takes_are_ranked_as_they_are_served(ranked, tmp_path, capsys):
    """The model of the demo: of 4x4 the merged blocks count."""
    path = save(make_model("lenet300", 0), tmp_path / "x", {"fc1": (4, 4), "fc2": (16, 48)})
    out = tmp_path / "t.json"
    arguments = ["tune", "--card", "h100", "--checkpoint", path, "--rows", "3", "--out", str(out)]
    assert main([*arguments, "--train"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "left out: fc2 (blocks of 16x48 in float32, which no kernel takes)" in text
    entries = json.loads(out.read_text())["entries"]
    # what is merged serves only
    assert {(e["key"]["op"], e["key"]["block"]) for e in entries} == {("bsr_linear fwd", "16x16")}
    path = save(make_model("lenet300", 0), tmp_path / "x", {"fc2": (16, 48)})
    assert main(arguments) == 2
    assert "no linear layer in blocks to tune; it stores fc2 (blocks of 16x48" in (
        capsys.readouterr().err
    )


def test_nearly_nothing_open_leaves_a_block(ranked, tmp_path):
    """There was none, and a table for products that are never looked up."""
    out = tmp_path / "t.json"
    arguments = ["--shapes", "16x64x64", "--block", "16x16", "--sparsity", "0.99"]
    assert main(["tune", "--card", "A10", *arguments, "--out", str(out)]) == 0
    (key, *_) = [entry["key"] for entry in json.loads(out.read_text())["entries"]]
    cell = predicted.open_at_random(
        Cell("bsr_linear fwd", "triton", 16, 64, 64, (16, 16), 0, torch.bfloat16), 0.99
    )
    assert (cell.nnz, cell.longest) == (1, 1)
    assert cell.key()["density"] == key["density"]


def test_default_file_is_named_for_the_card(ranked, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--card", "RX 7900 XTX", "--shapes", "1x64x64"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["rx_7900_xtx.json"]


def test_usual_layers_are_ranked_where_no_shapes_are_given(ranked, tmp_path, capsys):
    out = tmp_path / "t.json"
    assert main(["tune", "--card", "A10", "--out", str(out)]) == 0
    table = json.loads(out.read_text())
    usual = list(predicted.usual_cells())
    assert (table["ranked"], len(table["entries"])) == (len(usual), 2 * len(usual))


def test_blocks_that_pay(capsys):
    shapes = "1x4096x4096,64x4096x4096,16x20x784"
    arguments = ["tune", "--blocks", "--shapes", shapes, "--target", "0.9"]
    assert main([*arguments, "--card", "A100 SXM 80GB"]) == 0
    text = capsys.readouterr().out
    assert "A100 SXM 80GB: predicted, not measured; 90% closed" in text
    last = next(line for line in text.splitlines() if line.startswith("20, 784 ")).split()
    assert last[-1] == "16x16"
    assert "-: blocks too large for the weight" in text
    assert "-" in last  # 20 outputs have no block of 32
    assert main([*arguments, "--card", "a100"]) == 0
    assert capsys.readouterr().out == text
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("cpu: expected by the cost model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--card H300 --shapes 1x64x64", "card must be one of A100.*H100 SXM.*, got 'H300'"),
        ("--card RTX --shapes 1x64x64", "card must be one of RTX 4090, RTX 5090: 'RTX' may be"),
        ("--blocks --card H300 --shapes 1x64x64", "card must be one of cpu, A100.*, got 'H300'"),
        ("--card cpu --shapes 1x64x64", "card must be one of A100 SXM 80GB, .*, got 'cpu'"),
        ("--card A10 --block 32x32", "block does not go with --card: give --shapes"),
        ("--blocks", "--blocks needs --shapes"),
        ("--blocks --shapes 1x64x64", "--blocks needs --target"),
        ("--blocks --shapes 1x64x64 --target 1", r"target must be in \[0, 1\), got 1.0"),
        ("--blocks --shapes 1x64x64 --target .5 --block 32x32", "block does not go with --blocks"),
        ("--blocks --shapes 1x64x64 --target .5 --sparsity .9", "sparsity does not go with"),
        ("--blocks --shapes 1x64x64 --target .5 --out f", "out does not go with --blocks"),
        ("--card A10 --shapes 1x64x64 --block 3x3", "powers of two >= 16, got '3x3'"),
        ("--card A10 --shapes 1x64x64 --block 16xfull", "powers of two >= 16, got '16xfull'"),
        ("--card A10 --shapes 1x64x64 --block 128x128", "block must fit into the weight 64x64"),
        ("--card A10 --shapes 1x64x64 --target .5", "target does not go with --card"),
        ("--card A10 --shapes 1x64x64 --out /nowhere/f", "out must be a file in a folder"),
        ("--card A10 --shapes 1x64x64 --dtype fp8", "dtype must be one of .*, got 'fp8'"),
        ("--card A10 --explain", "explain does not go with --card: nothing is timed"),
        ("--blocks --train", "train does not go with --blocks: it is asked of forward"),
        ("--blocks --again", "again does not go with --blocks: nothing is timed$"),
        ("--blocks --device cpu", "device does not go with --blocks: --card names it; got 'cpu'"),
        ("--blocks --checkpoint f", "checkpoint does not go with --blocks: give --shapes"),
        ("--card A10 --checkpoint f", "f: no such file"),
        ("--card A10 --checkpoint f --shapes 1x64x64", "--shapes and --checkpoint is needed"),
        ("--card A10 --checkpoint f --block 32x32", "block does not go with --checkpoint"),
        ("--card A10 --checkpoint f --rows 0", "rows must be whole numbers of 1 or more"),
        ("--card A10 --checkpoint f --dtype fp8", "dtype must be one of .*, got 'fp8'"),
        ("--card A10 --shapes 1x64x64 --rows 3", "rows does not go with --card"),
        ("--card A10 --shapes 1x64x64 --device cpu", "device does not go with --card"),
        ("--shapes 1x64x64 --target .5", "target does not go with --shapes or --checkpoint"),
        ("--shapes 1x64x64 --out f", "out does not go with --shapes or --checkpoint"),
    ],
)
def test_bad_options_are_said_in_a_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_absent, "predict_cells", None)
    assert main(["tune", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert re.search(message, printed.err), printed.err
    assert len(printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_too_small_for_blocks_has_no_speedups(capsys):
    """It was 1.00x, break-even at 50 %: what rounding to no block at all gives."""
    arguments = ["tune", "--blocks", "--card", "A10", "--shapes", "16x8x8", "--target", "0.9"]
    assert main(arguments) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("8, 8")]
    assert line.split() == ["8,", "8", "16", *"-----", "16x16"]


def test_weights_for_which_no_block_pays_are_said(capsys):
    """The table's last column says what is taken, which a reader took for what pays."""
    arguments = ["tune", "--blocks", "--card", "A10", "--target", "0"]
    assert main([*arguments, "--shapes", "16x4096x4096,16x64x64"]) == 0
    text = capsys.readouterr().out
    assert "64, 64: no block pays at 0%, dense is faster" in text.splitlines()


SHAPES = "16x4096x4096,128x4096x4096"


def tabulate(out, *more, shapes=SHAPES, card="h100"):
    return main(["tune", "--card", card, "--shapes", shapes, "--out", str(out), *more])


def test_a_ranking_that_reached_nothing_writes_nothing(tmp_path, capsys, monkeypatch):
    """It replaced the table that was there with an empty one, and ended well."""
    monkeypatch.setattr(cli_absent, "predict_cells", lambda *a: [])
    out = tmp_path / "t.json"
    assert tabulate(out, "--seconds", "3") == 2
    printed = capsys.readouterr()
    assert "none of 2 products was ranked in 3 s, so that nothing is written" in printed.err
    assert not [*tmp_path.iterdir()]
    assert not printed.out


def test_a_table_of_more_products_is_not_replaced(ranked, tmp_path, capsys, monkeypatch):
    out = tmp_path / "t.json"
    assert tabulate(out) == 0
    before = out.read_bytes()
    assert tabulate(out) == 0  # as many are
    assert tabulate(out, shapes="1x4096x4096") == 2  # nothing is compiled in vain
    assert "another file: the table" in capsys.readouterr().err
    real = predicted.predict_cells
    monkeypatch.setattr(cli_absent, "predict_cells", lambda on, cells, *a: real(on, cells[:1]))
    assert tabulate(out, "--seconds", "9") == 2
    printed = capsys.readouterr()
    assert "is of 2 products, these are 1 and lack some of them" in printed.err
    assert "1.33x" in printed.out  # what was ranked is shown
    assert out.read_bytes() == before
    assert tabulate(out, shapes="16x1024x4096,128x1024x4096") == 2  # as many, but others
    assert "these are 2 and lack some of them" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert tabulate(tmp_path / "other.json", "--seconds", "9") == 0
    assert "1 of 2 products were ranked in 9 s" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "my notes", "[]", '{"entries": []}'])
def test_a_file_that_is_no_table_is_never_overwritten(text, ranked, tmp_path, capsys):
    out = tmp_path / "notes"
    out.write_text(text)
    assert tabulate(out) == 2
    assert "out must be a new file or a" in capsys.readouterr().err
    assert out.read_text() == text


def test_a_table_of_another_card_is_not_overwritten(ranked, tmp_path, capsys):
    out = tmp_path / "t.json"
    assert tabulate(out) == 0
    before = out.read_bytes()
    assert tabulate(out, card="a10") == 2
    assert "a predicted table of A10" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_an_interrupted_ranking_writes_what_it_has(ranked, tmp_path, capsys, monkeypatch):
    plain = predicted.rank

    def rank(name, cell, *more):
        if cell.M == 128:
            raise KeyboardInterrupt
        return plain(name, cell, *more)

    monkeypatch.setattr(predicted, "rank", rank)
    out = tmp_path / "t.json"
    assert tabulate(out) == 130
    assert json.loads(out.read_text())["ranked"] == 1
    assert "interrupted" in capsys.readouterr().err
    out.unlink()
    assert tabulate(out, shapes="128x4096x4096") == 130
    assert not out.exists()
