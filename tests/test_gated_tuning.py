"""sgtriton.tune on gated layers: their steps are measured as a whole, and the model stays."""

import copy
import os

import pytest
import torch
from helpers import assert_close
from sgtriton_kernels import gate_layout, gated_torch, lookup, records, skip_torch
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.gated_choice import cell_of, method_for
from torch import nn

import sgtriton
from sgtriton import cold, tuning
from sgtriton.gated_problem import GatedProblem
from sgtriton.products import products_of, work_of
from sgtriton.search import Found
from sgtriton.tuning import tune


class Net(nn.Module):
    """Two gated layers with a dropout between them, and a norm that counts batches."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(64, 96), nn.BatchNorm1d(96)
        self.drop, self.second = nn.Dropout(0.5), nn.Linear(96, 32)

    def forward(self, x):
        return self.second(self.drop(self.norm(self.first(x)).relu()))


def patched(block=(16, 16), **options):
    model = sgtriton.patch(Net(), block=block, **options)
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.gate.copy_(torch.where(torch.rand_like(layer.gate) < 0.5, 0.9, 0.2))
    return model.train()


@pytest.fixture
def timings(monkeypatch):
    """Collects a 1 for each call that is timed."""
    calls, real = [], cold.ColdTimer.ms
    monkeypatch.setattr(cold.ColdTimer, "ms", lambda *a: calls.append(1) or real(*a))
    return calls


def always(monkeypatch, name):
    """As if one method were the fastest wherever it is offered."""

    def search(problem, present, others, until, say, reasoned):
        found = next((c for c in others if c.name == name), present)
        return Found(found, 1.0, 2.0, 2.0, len(others), {})

    monkeypatch.setattr(tuning, "search", search)


def work_for(model, x):
    return {(item.name, item.cell.reopen): item.cell for item in work_of(products_of(model, x))}


def test_steps_are_those_of_the_layers_as_they_are():
    model, x = patched(), torch.randn(7, 64)
    cells = work_for(model, x)
    assert [name for name, _ in cells] == ["first", "second"]
    first = cells["first", True]
    assert (first.op, first.M, first.N, first.K) == ("gated_linear step", 7, 96, 64)
    assert first.nnz == int((model.first.get_parameter("gate") > 0.5).sum())
    assert (first.block, first.kind, first.dgate, first.counted) == ((16, 16), "threshold", 1, 1)
    assert work_for(model.eval(), x)["first", True].op == "gated_linear fwd"
    model.train()
    model.first.freeze()
    assert not work_for(model, x)["first", True].dgate


def test_kinds_of_gates_and_modes_are_met():
    x = torch.randn(7, 64)
    drawn = patched(gate="bernoulli")
    assert {cell.kind for cell in work_for(drawn, x).values()} == {"bernoulli"}
    assert {cell.kind for cell in work_for(drawn.eval(), x).values()} == {"threshold"}
    drawn.train().first.freeze()
    assert work_for(drawn, x)["first", True].kind == "threshold"
    rarely = work_for(patched(reopen_every=3), x)
    assert [reopen for _, reopen in rarely] == [True, False] * 2
    with torch.autocast("cpu", torch.bfloat16):
        cells = work_for(patched(), x).values()
    assert {(cell.dtype, cell.w_dtype) for cell in cells} == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("options", [{}, {"gate": "bernoulli"}, {"reopen_every": 2}], ids=str)
def test_what_is_found_is_what_calls_take(options, cache, monkeypatch):
    always(monkeypatch, "skip")
    model, x = patched(**options), torch.randn(9, 64)
    report = tune(model, x, seconds=10)
    assert {row.status for row in report.rows} == {"changed"}
    taken, real = [], gated_torch.choose
    monkeypatch.setattr(gated_torch, "choose", lambda *args: taken.append(real(*args)) or taken[-1])
    for reopens in (True, False) if options.get("reopen_every") else (True,):
        for layer in (model.first, model.second):
            layer.reopens = reopens
        model(x).sum().backward()
    assert set(taken) == {"skip"}
    taken.clear()
    with torch.no_grad():  # a forward pass alone is another product
        model(x)
    assert set(taken) == {"multiply"}


def test_records_are_kept_and_a_second_run_times_nothing(cache, timings):
    model, x = patched(), torch.randn(9, 64)
    report = tune(model, x, seconds=60)
    assert report.timed == len(report.rows) == 2
    assert timings
    found = [records.read_json(path, 1 << 14) for path in cache.glob("*.json")]
    assert {record["key"]["op"] for record in found} == {"gated_linear step"}
    assert all(record["ms"] > 0 for record in found)
    timings.clear()
    lookup.forget()
    again = tune(model, x, seconds=60)
    assert [row.status for row in again.rows] == ["cached"] * 2
    assert not timings
    text = str(report)
    assert "step" in text
    assert "16x16" in text
    assert max(map(len, text.splitlines())) <= 100


def test_model_stays_as_it_was(cache):
    model, x = patched(gate="bernoulli"), torch.randn(9, 64)
    model.drop.eval()
    model(x).sum().backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    drawn = torch.get_rng_state()
    tune(model, x, seconds=10)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, grads[name])
        assert p.requires_grad
    assert not model.first._forward_pre_hooks


def test_training_is_the_same_with_records(cache, monkeypatch):
    """But for rounding: other methods add up in another order."""
    model, x = patched(), torch.randn(9, 64)
    for layer in (model.drop, model.norm):
        layer.eval()
    other = copy.deepcopy(model)
    model(x).square().sum().backward()
    always(monkeypatch, "skip")
    tune(other, x, seconds=10)
    other(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert_close(name, q.grad, p.grad)


def test_gated_and_sparse_layers_of_one_model_are_tuned(cache):
    sparse = nn.Linear(64, 96)
    with torch.no_grad():
        sparse.weight[:48] = 0
    model = nn.Sequential(sparse, nn.Linear(96, 64)).eval()
    sgtriton.sparsify(model, block=(16, 16), exclude=["1"], form="sparse")
    sgtriton.patch(model, block=(16, 16), include=["1"]).train()
    report = tune(model, torch.randn(5, 64), seconds=30)
    assert [(row.name, row.cell.op) for row in report.rows] == [
        ("0", "bsr_linear fwd"), ("1", "gated_linear step"),
    ]  # fmt: skip
    assert report.timed == 2
    assert "step" in str(report)


@pytest.mark.parametrize("options", [{"block": (1, 1)}, {"gate": "hard_concrete"}], ids=str)
def test_layers_with_one_method_have_no_choice(options, cache, timings):
    report = tune(patched(**options), torch.randn(5, 64), seconds=10)
    assert {row.status for row in report.rows} == {"no choice"}
    assert {row.choice.candidate.name for row in report.rows} == {"multiply"}
    assert not timings
    assert not cache.exists()


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="for the interpreter")
def test_interpreted_kernels_are_not_tuned(monkeypatch):
    monkeypatch.setenv("SGTRITON_IMPL", "triton")
    with pytest.raises(ValueError, match="interpreted kernels are not tuned"):
        tune(patched(), torch.randn(5, 64))


def problem(
    impl="torch", kind="threshold", reopen=True, trains=True, dgate=True, dtype=torch.float32,
    w_dtype=torch.float32, share=0.5, block=(16, 16), device="cpu",
):  # fmt: skip
    layout = gate_layout((50, 64) if impl == "torch" else (48, 64), block)
    gate = torch.where(torch.rand(layout.gate_shape, device=device) < share, 0.9, 0.2)
    like = torch.empty(0, dtype=dtype, device=device)
    cell = cell_of(20, like, w_dtype, layout, kind, reopen, trains, dgate, impl, 5)
    return GatedProblem(cell, layout, gate, torch.Generator(device).manual_seed(0))


FP32, MIXED, FP16 = (torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2
STEPS = [
    ("threshold", True, True, True, FP32), ("threshold", True, True, True, MIXED),
    ("bernoulli", True, True, True, FP16), ("bernoulli", True, True, False, FP32),
    ("threshold", False, True, True, MIXED), ("threshold", True, False, False, FP32),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "reopen", "trains", "dgate", "dtypes"), STEPS)
def test_every_method_passes_the_check(kind, reopen, trains, dgate, dtypes, impl, device):
    p = problem(impl, kind, reopen, trains, dgate, *dtypes, device=device)
    found = candidates(p.cell)
    assert {c.name for c in found} >= {"multiply", "skip"}
    for candidate in found:
        assert p.wrong(candidate) is None, candidate.name
        outs = p.call(candidate)
        assert len(outs) == (3 + dgate if trains else 1)  # pyright: ignore


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_check_meets_open_and_closed_gates_whatever_the_gates_are(share):
    p = problem(share=share)
    for _ in range(3):
        gate = p.whole_inputs()[2]
        assert 0 < gate.sum() < gate.numel()


def planted(monkeypatch, name, change):
    """``skip`` computes something else; the check must see it."""
    real = getattr(skip_torch, name)
    monkeypatch.setattr(gated_torch, name, lambda *args: change(real(*args), *args))
    return next(c for c in candidates(problem().cell) if c.name == "skip")


def zero_first(t):
    t = t.clone()
    t.view(-1)[:1] += 1
    return t


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("skip_fwd", lambda y, *_: zero_first(y)),
        ("skip_fwd", lambda y, *_: torch.empty_like(y)),  # which may hold what was right before
        ("skip_bwd", lambda found, *_: (zero_first(found[0]), *found[1:])),
        ("exact_dw", lambda found, *_: (zero_first(found[0]), found[1])),
        ("exact_dw", lambda found, *args: (found[0], found[1] * (args[3] > 0.5))),
    ],
    ids=["y", "y unwritten", "dx", "dw", "dgate of closed gates"],
)
def test_planted_fault_of_any_pass_is_refused(name, change, monkeypatch):
    wrong = problem().wrong(planted(monkeypatch, name, change))
    assert wrong is not None
    assert "wrong in" in wrong


def test_planted_wrong_method_is_not_taken(cache, monkeypatch):
    planted(monkeypatch, "exact_dw", lambda found, *_: (zero_first(found[0]), found[1]))
    model, x = patched(), torch.randn(9, 64)
    report = tune(model, x, seconds=30)
    for row in report.rows:
        assert row.choice.candidate.name == "multiply"
        assert "wrong in" in row.skipped["skip"]
    layer = model.first
    how = layer.layout, "threshold", True, "torch"
    assert method_for(x, layer.weight, layer.gate, *how) == "multiply"
