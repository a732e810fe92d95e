"""``sgtriton tune``: what it takes, shows, keeps; nothing here asks how long it took."""

import io
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from helpers import assert_exact, integers
from sgtriton_kernels import bsr_linear, lookup
from torch import nn

import sgtriton
from sgtriton import cli_tune, cold, problem, search, tuning
from sgtriton.cli import main
from sgtriton.demo.models import make_model

SHAPES = ["--shapes", "4x64x64,9x64x64,4x48x96", "--block", "16x16", "--sparsity", "0.5"]


@pytest.fixture
def timings(monkeypatch):
    """Collects a 1 for each call that is timed."""
    calls, real = [], cold.ColdTimer.ms
    monkeypatch.setattr(cold.ColdTimer, "ms", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.fixture
def quick(monkeypatch):
    """Finds at once that filling in the zeros is the fastest; collects what it was asked."""
    asked = []

    def found(problem, present, others, until, say, reasoned):
        asked.append(problem.cell)
        unpack = next(candidate for candidate in others if candidate.name == "unpack")
        return search.Found(unpack, 0.25, 0.5, 2.0, 3, {})

    monkeypatch.setattr(tuning, "search", found)
    return asked


class Net(nn.Module):
    """A convolution, a layer in blocks, one whose weights have a gate each, one without gates."""

    def __init__(self):
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(16, 16, 3), nn.Linear(64, 48)
        self.single, self.head = nn.Linear(48, 8), nn.Linear(8, 3)


@torch.no_grad()
def save(model: nn.Module, path, blocks: dict[str, tuple[int, int]]) -> str:
    for name, block in blocks.items():
        sgtriton.patch(model, block, include=name)
        gate = model.get_submodule(name).gate
        gate.copy_((torch.rand_like(gate) < 0.5).float())
    sgtriton.save(sgtriton.sparsify(model.eval(), form="sparse"), path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    blocks = {"conv": (16, 16), "blocks": (16, 16), "single": (1, 1)}
    return save(Net(), tmp_path / "net.safetensors", blocks)


def table(out: str) -> list[list[str]]:
    """The cells of a printed table, its head first."""
    lines = out.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("--") or " --" in line)
    end = lines.index("", rule)
    return [line.split() for line in [lines[rule - 1], *lines[rule + 1 : end]]]


def test_shapes_are_tuned_kept_and_not_timed_again(cache, timings, capsys):
    assert main(["tune", *SHAPES, "--seconds", "60"]) == 0
    out = capsys.readouterr().out
    head, *rows = table(out)
    assert head == ["M", "weight", "block", "density", "takes", "result", "ms"]
    assert [row[:4] for row in rows] == [
        ["4", "64x64", "16x16", "0.500"],
        ["9", "64x64", "16x16", "0.500"],
        ["4", "48x96", "16x16", "0.500"],
    ]
    assert "3 of 3 products timed" in out
    assert f"records: {cache}" in out
    assert "sgtriton.sparsify chooses" in out
    assert len(list(cache.glob("*.json"))) == 3
    assert timings

    timings.clear()
    lookup._told.clear()  # another process would read the files
    lookup.forget()
    assert main(["tune", *SHAPES, "--seconds", "60"]) == 0
    out = capsys.readouterr().out
    _, *again = table(out)
    assert not timings
    assert [row[:5] for row in again] == [row[:5] for row in rows]
    assert {row[5] for row in again} == {"cached"}
    assert "0 of 3 products timed" in out
    assert "sgtriton.sparsify" not in out

    assert main(["tune", *SHAPES, "--seconds", "60", "--again"]) == 0
    assert timings
    assert "3 of 3 products timed" in capsys.readouterr().out


def test_linear_layers_of_a_file_are_tuned(cache, quick, checkpoint, capsys):
    assert main(["tune", "--checkpoint", checkpoint, "--rows", "1,16,16,5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("left out: conv (convolutions); single (a gate for each weight)\n")
    assert "sgtriton.tune(model, example_input) chooses for convolutions" in " ".join(out.split())
    _, *rows = table(out)
    assert [row[:4] for row in rows] == [["blocks", m, "48x64", "16x16"] for m in ("1", "16", "5")]
    assert [(cell.M, cell.N, cell.K) for cell in quick] == [(1, 48, 64), (16, 48, 64), (5, 48, 64)]
    assert {cell.dtype for cell in quick} == {torch.float32}
    # the pattern is that of the file
    model = sgtriton.load(Net(), checkpoint)
    assert {cell.nnz for cell in quick} == {model.blocks.matrix.nnz}
    assert all("2.00x faster" in " ".join(row) for row in rows)
    assert main(["tune", "--checkpoint", checkpoint, "--dtype", "bfloat16", "--rows", "7"]) == 0
    assert quick[-1].dtype == torch.bfloat16


def test_small_blocks_of_a_file_are_tuned_merged_as_well(cache, quick, tmp_path, capsys):
    """The model of the demo."""
    path = save(make_model("lenet300", 0), tmp_path / "x", {"fc1": (4, 4), "fc3": (1, 1)})
    assert main(["tune", "--checkpoint", path, "--rows", "3"]) == 0
    _, *rows = table(capsys.readouterr().out)
    assert [row[:4] for row in rows] == [
        ["fc1", "3", "300x784", "4x4"],
        ["fc1", "3", "300x784", "16x16"],
    ]


def test_merged_products_of_a_file_are_those_of_its_own_served_block(
    cache, quick, tmp_path, capsys
):
    """They were those of the block that sparsify takes unasked."""
    model = sgtriton.patch(nn.Sequential(nn.Linear(96, 64)), (4, 4))
    with torch.no_grad():
        model[0].gate.copy_((torch.rand_like(model[0].gate) < 0.1).float())
    sgtriton.sparsify(model.eval(), form="merged", serve_block=(8, 32))
    sgtriton.save(model, tmp_path / "x")
    assert main(["tune", "--checkpoint", str(tmp_path / "x"), "--rows", "3"]) == 0
    assert [cell.block for cell in quick] == [(4, 4), (8, 32)]
    assert quick[1].nnz == model[0]._matrix_of("merged").nnz


def test_products_that_nothing_computes_rightly_end_the_command_with_1(cache, monkeypatch, capsys):
    monkeypatch.setattr(search.Problem, "wrong", lambda *a: "wrong in 3 of 4 elements")
    assert main(["tune", *SHAPES, "--seconds", "60"]) == 1
    out, err = capsys.readouterr()
    assert {" ".join(row[5:7]) for row in table(out)[1:]} == {"none right"}
    assert "3 that nothing computes rightly" in out
    assert "is skipped: wrong in 3 of 4 elements" in err
    assert "calls take these from now on" not in out


def test_model_of_the_demo_is_tuned_and_read_back(cache, timings, tmp_path, capsys):
    blocks = {"fc1": (4, 4), "fc2": (4, 4), "fc3": (1, 1)}
    path = save(make_model("lenet300", 0), tmp_path / "served.safetensors", blocks)
    assert main(["tune", "--checkpoint", path, "--rows", "16", "--seconds", "60"]) == 0
    assert "4 of 4 products timed" in capsys.readouterr().out
    timings.clear()
    lookup._told.clear()
    lookup.forget()
    assert main(["tune", "--checkpoint", path, "--rows", "16", "--seconds", "60"]) == 0
    assert not timings
    model = sgtriton.load(make_model("lenet300", 0), path)
    found = sgtriton.tune(model, torch.zeros(16, 784), 60)
    assert {row.status for row in found.rows} == {"cached"}
    assert not timings


def test_explain_times_nothing_and_says_why(cache, timings, capsys):
    assert main(["tune", *SHAPES, "--explain"]) == 0
    out = capsys.readouterr().out
    assert not timings
    assert not cache.exists()
    assert out.count("  takes ") == 3
    assert "bsr_linear fwd, M 4, weight 64x64, blocks 16x16, density 0.500\n" in out
    choice = lookup.choose(tuning.choices_of(random_products())[0].cell, torch.device("cpu"))
    assert f"takes {choice.candidate.name} (analytic): {choice.reasons[:20]}" in out


def test_explain_names_a_record_where_one_is_taken(cache, quick, capsys):
    assert main(["tune", *SHAPES]) == 0
    capsys.readouterr()
    assert main(["tune", *SHAPES, "--explain"]) == 0
    assert capsys.readouterr().out.count("takes unpack (cache): this user's record") == 3


def random_products():
    return cli_tune._random_products(
        [(4, 64, 64)], (16, 16), 0.5, torch.float32, torch.device("cpu"), False
    )


def test_patterns_are_the_same_in_each_run():
    (first,), (second,) = random_products(), random_products()
    assert_exact("weight", first.matrix.to_dense(), second.matrix.to_dense())
    assert first.matrix.nnz == 8


@pytest.mark.parametrize(
    ("block", "sparsity", "nnz", "sides"),
    [
        ("16x16", "0", 4 * 6, (16, 16)),
        ("16x16", "0.999", 1, (16, 16)),
        ("fullx16", "0.5", 3, (50, 16)),
        ("1xfull", "0.5", 25, (1, 90)),
    ],
)
def test_blocks_and_sparsity_are_as_asked(block, sparsity, nnz, sides, cache, quick):
    options = ["--block", block, "--sparsity", sparsity, "--dtype", "float16", "--device", "cpu"]
    assert main(["tune", "--shapes", " 2X50x90 ", *options]) == 0
    (cell,) = quick
    assert (cell.M, cell.N, cell.K, cell.block) == (2, 50, 90, sides)
    assert cell.nnz == nnz
    assert cell.dtype == torch.float16


def test_gradients_that_are_computed_in_one_way_are_said(cache, quick, capsys):
    if torch.cuda.is_available():
        pytest.skip("a card computes gradients in several ways")
    assert main(["tune", *SHAPES, "--train"]) == 0
    assert "gradients are computed in one way on this device" in capsys.readouterr().out
    assert main(["tune", *SHAPES]) == 0
    assert "gradients are" not in capsys.readouterr().out


def test_no_time_decides_nothing(cache, capsys):
    assert main(["tune", *SHAPES, "--seconds", "1e-6"]) == 0
    out = capsys.readouterr().out
    assert "0 of 3 products timed" in out
    assert "3 not reached: run again, or with more seconds" in out
    assert not list(cache.glob("*.json"))


def test_product_that_takes_longer_than_the_time_is_not_begun(
    cache, quick, timings, monkeypatch, capsys
):
    """As if the device computed 3 M multiply-adds a second in fp64."""
    monkeypatch.setattr(problem, "_fp64_rate", lambda device: 3e6)
    assert main(["tune", "--shapes", "1x64x64,999x64x96", "--seconds", "3"]) == 0
    _, *rows = table(capsys.readouterr().out)
    assert [" ".join(row[5:7]) for row in rows] == ["2.00x faster", "not reached"]
    assert [cell.M for cell in quick] == [1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "one of --shapes and --checkpoint is needed, got neither"),
        (["--shapes", "1x64x64", "--checkpoint", "x"], "is needed, got both"),
        (["--shapes", ""], "shapes must be MxNxK, sizes of 1 or more"),
        (["--shapes", "16x64"], "got '16x64'"),
        (["--shapes", "16x64x64,"], "got ''"),
        (["--shapes", "16x64x64x2"], "got '16x64x64x2'"),
        (["--shapes", "0x64x64"], "got '0x64x64'"),
        (["--shapes", "1x64x64,16x0x64"], "got '16x0x64'"),
        (["--shapes", "-1x64x64"], "--shapes"),
        (["--shapes", "1.5x64x64"], "got '1.5x64x64'"),
        (["--shapes", "1x64x" + "9" * 30], "shapes must be MxNxK"),
        (["--shapes", "1x99999x99999"], "up to 2147483648 elements each; got 1x99999x99999"),
        (["--shapes", "99999999x64x64"], "shapes must be of matrices of up to"),
        (["--shapes", "1x64x64", "--block", "32"], "block must be two sides"),
        (["--shapes", "1x64x64", "--block", ""], "block must be two sides"),
        (["--shapes", "1x64x64", "--block", "0x32"], "block must be two sides"),
        (["--shapes", "1x64x64,1x16x64"], "block must fit into the weight 16x64, got 32x32"),
        (["--shapes", "1x64x16"], "block must fit into the weight 64x16, got 32x32"),
        (["--shapes", "1x64x64", "--sparsity", "1"], "sparsity must be in [0, 1), got 1.0"),
        (["--shapes", "1x64x64", "--sparsity=-0.1"], "sparsity must be in [0, 1), got -0.1"),
        (["--shapes", "1x64x64", "--sparsity", "nan"], "sparsity must be in [0, 1), got nan"),
        (["--shapes", "1x64x64", "--sparsity", "much"], "sparsity must be a number, got 'much'"),
        (["--shapes", "1x64x64", "--dtype", "float8"], "dtype must be one of float32, float16"),
        (["--shapes", "1x64x64", "--device", "tpu"], "device must be one of cpu, cuda, got 'tpu'"),
        (["--shapes", "1x64x64", "--seconds", "0"], "seconds must be positive, got 0.0"),
        (["--shapes", "1x64x64", "--seconds=-1"], "seconds must be positive, got -1.0"),
        (["--shapes", "1x64x64", "--seconds", "nan"], "seconds must be positive, got nan"),
        (["--shapes", "1x64x64", "--seconds", "long"], "seconds must be a number, got 'long'"),
        (["--shapes", "1x64x64", "--rows", "4"], "rows does not go with --shapes"),
        (["--shapes", "1x64x64", "--again", "--explain"], "not allowed with argument"),
        (["--checkpoint", "FILE", "--rows", "0"], "rows must be whole numbers of 1 or more"),
        (["--checkpoint", "FILE", "--rows", ""], "rows must be whole numbers of 1 or more"),
        (["--checkpoint", "FILE", "--rows", "1,,2"], "rows must be whole numbers of 1 or more"),
        (["--checkpoint", "FILE", "--rows", "99999999"], "got 99999999 of blocks"),
        (["--checkpoint", "FILE", "--block", "4x4"], "block does not go with --checkpoint"),
        (["--checkpoint", "FILE", "--sparsity", "0"], "sparsity does not go with --checkpoint"),
        (["--checkpoint", "nowhere"], "nowhere: no such file"),
        (["--checkpoint", "."], "a folder, not a file"),
        (["--checkpoint", __file__], "not a file written by sgtriton.save"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_timed(
    arguments, text, cache, timings, checkpoint, capsys
):
    arguments = [checkpoint if word == "FILE" else word for word in arguments]
    assert main(["tune", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("sgtriton: error: ")
    assert text in err
    assert err.count("\n") == 1
    assert out == ""
    assert not timings
    assert not cache.exists()


def test_card_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *SHAPES, "--device", "cuda"]) == 2
    assert "device must be cpu, since PyTorch sees no card here; got 'cuda'" in (
        capsys.readouterr().err
    )


def test_file_without_a_layer_to_tune_says_what_it_stores(tmp_path, capsys):
    path = save(Net(), tmp_path / "x", {"conv": (16, 16), "single": (1, 1)})
    assert main(["tune", "--checkpoint", path]) == 2
    err = capsys.readouterr().err
    assert "no linear layer in blocks to tune" in err
    assert "it stores conv (convolutions); single (a gate for each weight)" in err
    assert err.rstrip().endswith("sgtriton.tune(model, example_input) chooses for convolutions")


def test_layer_without_an_open_block_is_left_out(cache, quick, tmp_path, capsys):
    model = sgtriton.patch(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), (16, 16))
    with torch.no_grad():
        model[0].gate.zero_()
    with pytest.warns(UserWarning, match="all weights of 0 are closed"):
        sgtriton.sparsify(model.eval(), form="sparse")
    sgtriton.save(model, tmp_path / "x")
    assert main(["tune", "--checkpoint", str(tmp_path / "x"), "--rows", "4"]) == 0
    assert "left out: 0 (no open block)" in capsys.readouterr().out
    assert len(quick) == 1


def test_name_of_a_layer_cannot_write_to_the_terminal(cache, quick, tmp_path, capsys):
    model = nn.Module()
    model.add_module("a\x1b[2Jb\n", nn.Linear(32, 32))
    sgtriton.save(sgtriton.patch(model, (16, 16)), tmp_path / "x")
    assert main(["tune", "--checkpoint", str(tmp_path / "x"), "--rows", "4"]) == 0
    out, err = capsys.readouterr()
    assert "a[2Jb" in out
    assert "\x1b" not in out + err


def _damage(kind: str, data: bytes) -> bytes:
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "empty":
        return b""
    if kind == "corrupted":
        seed = random.Random(0)
        return bytes(byte ^ (seed.random() < 0.05) * seed.randrange(256) for byte in data)
    record = json.loads(data)
    if kind == "foreign":
        record["key"]["device"] = "another card"
    elif kind == "another type":
        record["candidate"] = [10**9, -1]
    else:  # hostile: a tile that would read beyond the weight
        record["candidate"] = "weight_left_n1048576_m1048576_k1048576_s99_w99"
        record["tile"] = [1 << 30] * 8
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "corrupted", "foreign", "another type", "hostile"]
)
def test_damaged_records_change_nothing_but_speed(kind, cache, quick, capsys):
    assert main(["tune", *SHAPES]) == 0
    (product,) = random_products()
    x = integers(4, 64)
    matrix = type(product.matrix)._from_index(
        integers(*product.matrix.values.shape), product.matrix.index_tensors, product.matrix.shape
    )
    expected = x @ matrix.to_dense().T
    for path in cache.glob("*.json"):
        path.write_bytes(_damage(kind, path.read_bytes()))
    lookup._told.clear()
    lookup.forget()
    quick.clear()
    capsys.readouterr()
    assert_exact(kind, bsr_linear(x, matrix), expected)
    assert main(["tune", *SHAPES, "--explain"]) == 0
    assert capsys.readouterr().out.count("(analytic)") == 3
    # searched anew, and written whole
    assert main(["tune", *SHAPES]) == 0
    assert len(quick) == 3
    lookup._told.clear()
    lookup.forget()
    assert main(["tune", *SHAPES]) == 0
    assert len(quick) == 3


def test_nothing_is_timed_that_could_not_be_kept(cache, timings, capsys):
    """It was timed, and then a line said that calls take it from now on."""
    cache.write_text("a file where the folder should be")
    assert main(["tune", *SHAPES]) == 2
    told = capsys.readouterr()
    assert f"could not be kept: {cache}: cannot be written: " in told.err
    assert "SGTRITON_CACHE_DIR" in told.err
    assert not told.out
    assert not timings


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def wrong_loop(monkeypatch):
    """A candidate whose results are wrong."""
    real = problem.Problem.wrong
    monkeypatch.setattr(
        problem.Problem, "wrong",
        lambda self, c: "wrong in 3 of 9 elements" if c.name == "loop" else real(self, c),
    )  # fmt: skip


@pytest.mark.parametrize("tqdm", [True, False])
def test_bar_on_a_terminal_stays_whole(tqdm, cache, wrong_loop, monkeypatch):
    if tqdm:
        pytest.importorskip("tqdm", reason="tqdm is not installed")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = _Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["tune", *SHAPES, "--seconds", "60"]) == 0
    shown = stream.getvalue()
    assert "tune" in shown
    assert "48x96, M 4" in shown
    assert "100" in shown
    # the line stands alone: the bar before it was taken away
    line = "64x64, M 4: loop is skipped: wrong in 3 of 9 elements"
    (before,) = [part for part in shown.split("\n") if line in part]
    assert before.split("\r")[-1].removeprefix("\x1b[K") == line
    assert ("it/s" in shown or "s/it" in shown) == tqdm


def test_log_gets_plain_lines(cache, wrong_loop, capsys):
    assert main(["tune", *SHAPES, "--seconds", "60"]) == 0
    out, err = capsys.readouterr()
    assert "\r" not in err + out
    lines = err.splitlines()
    assert "64x64, M 4: loop is skipped: wrong in 3 of 9 elements" in lines
    assert "tune 100 %  done" in lines


@pytest.mark.parametrize("columns", [80, 100])
def test_table_fits_the_terminal(columns, cache, quick, checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    for what in (["--checkpoint", checkpoint], ["--shapes", "1000x4096x16384", "--explain"]):
        assert main(["tune", *what]) == 0
        lines = capsys.readouterr().out.splitlines()
        # a path is printed whole
        assert max(len(line) for line in lines if not line.startswith("records:")) <= columns


def test_interrupt_keeps_and_prints_what_was_found(cache, quick, monkeypatch, capsys):
    real = tuning.search

    def interrupted(problem, *others):
        if len(quick) == 1:
            raise KeyboardInterrupt
        return real(problem, *others)

    monkeypatch.setattr(tuning, "search", interrupted)
    assert main(["tune", *SHAPES]) == 130
    out, err = capsys.readouterr()
    _, *rows = table(out)
    assert [row[0] for row in rows] == ["4"]
    assert "1 of 1 products timed" in out
    assert "interrupted: 2 of 3 products not looked at" in out
    assert "sgtriton: interrupted" in err
    assert "Traceback" not in err
    assert len(list(cache.glob("*.json"))) == 1
    # another run goes on
    monkeypatch.setattr(tuning, "search", real)
    lookup._told.clear()
    lookup.forget()
    assert main(["tune", *SHAPES]) == 0
    _, *rows = table(capsys.readouterr().out)
    assert [row[5] for row in rows] == ["cached", "2.00x", "2.00x"]


def test_interrupt_of_the_function_is_one_that_carries_the_report(cache, monkeypatch):
    def stops(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "search", stops)
    with pytest.raises(KeyboardInterrupt) as stop:
        tuning.tune_products(random_products(), 60)
    assert stop.value.report.rows == ()
    assert "interrupted: 1 of 1" in str(stop.value.report)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child process")
def test_ctrl_c_while_tuning_prints_what_was_found(cache):
    shapes = "4x64x64,512x2048x2048,513x2048x2048,514x2048x2048"
    process = subprocess.Popen(
        [sys.executable, "-m", "sgtriton", "tune", "--shapes", shapes, "--seconds", "900"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # a test run in the background ignores the signal, and its children with it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("tune  25 %"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "sgtriton: interrupted" in err
    assert [row[1] for row in table(out)[1:]] == ["64x64"]
    assert len(list(cache.glob("*.json"))) == 1
