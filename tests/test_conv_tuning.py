"""Tuning of convolutions: what a model's layers meet, what is checked, what is remembered."""

import time

import pytest
import torch
from sgtriton_kernels import lookup
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.conv_choice import conv_cell_of
from sgtriton_kernels.lookup import analytic
from test_bsr_conv import GEOMETRIES, Case, identifier
from test_conv_candidates import geometry_of_case
from torch import nn

import sgtriton
from sgtriton import cold, conv_problem, problem
from sgtriton.conv_problem import ConvProblem
from sgtriton.conv_products import ConvProduct, images_met
from sgtriton.products import products_of, work_of
from sgtriton.search import search
from sgtriton.tuning import tune


class Net(nn.Module):
    """Convolutions of both kinds, one of them called with two sizes, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(32, 48, 3, padding=1)
        self.second = nn.Conv2d(48, 48, 3, stride=2, padding=1, padding_mode="circular")
        self.line = nn.Conv1d(48, 32, 3, padding="same")
        self.head, self.last = nn.Linear(32, 48), nn.Linear(48, 5)

    def forward(self, x):
        x = self.second(self.first(x).relu())
        x = self.second(x)
        return self.last(self.head(self.line(x.flatten(2)).mean(2)))


@pytest.fixture
def model():
    return pruned(Net(), exclude=["last"])


def pruned(net, **options):
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and len(layer.weight) > 5:
                keep = torch.rand(layer.weight.shape[0] // 16, layer.weight.shape[1] // 16) < 0.5
                keep[0, 0], keep[-1, -1] = True, False
                mask = keep.repeat_interleave(16, 0).repeat_interleave(16, 1).float()
                layer.weight.mul_(mask.view(*mask.shape, *[1] * (layer.weight.dim() - 2)))
    return sgtriton.sparsify(net.eval(), block=(16, 16), form="sparse", **options)


@pytest.fixture
def timings(monkeypatch):
    """Collects a 1 for each call that is timed."""
    calls, real = [], cold.ColdTimer.ms
    monkeypatch.setattr(cold.ColdTimer, "ms", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_products_are_the_images_that_layers_meet(model, last):
    x = torch.randn(2, 32, 12, 10)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    cells = {}
    for item in work_of(products_of(model, x)):
        cells.setdefault(item.name, []).append(item.cell)
    first, (second, again), line = cells["first"][0], cells["second"], cells["line"][0]
    assert (first.images, first.size, first.M) == (2, (12, 10), 240)
    assert first.geometry.before == first.geometry.after == (1, 1)
    assert first.channels_last == last
    # what is added around an image by another rule is part of it
    assert (second.size, second.geometry.before, second.M) == ((14, 12), (0, 0), 60)
    assert (again.size, again.M) == ((8, 7), 18)
    assert (line.size, line.geometry.kernel, line.M) == ((1, 9), (1, 3), 18)
    assert line.geometry.before == (0, 1)
    assert cells["head"][0].op == "bsr_linear fwd"


def test_calls_look_up_what_is_tuned(model, monkeypatch):
    """A record of another product would never be found."""
    from sgtriton_kernels import bsr_conv
    from sgtriton_kernels.conv_choice import conv_choice as real

    met = []
    monkeypatch.setattr(
        bsr_conv, "conv_choice", lambda *a: met.append(conv_cell_of(*a)) or real(*a)
    )
    for x in (torch.randn(2, 32, 12, 10), torch.randn(32, 12, 10)):
        tuned = [i.cell for i in work_of(products_of(model.first, x))]
        met.clear()
        model.first(x)
        assert met == tuned
    x = torch.randn(2, 32, 12, 10).contiguous(memory_format=torch.channels_last)
    tuned = {i.cell for i in work_of(products_of(model, x)) if "conv" in i.cell.op}
    met.clear()
    model(x)
    assert set(met) == tuned


def test_gradients_are_products_of_layers_that_train(device):
    net = pruned(nn.Sequential(nn.Conv2d(32, 48, 3)), trainable=True)
    found = [item.cell.op for item in work_of(products_of(net, torch.randn(2, 32, 9, 9)))]
    assert found == ["bsr_conv fwd", "bsr_conv dx", "bsr_conv dvalues"]


def test_second_run_times_nothing(model, cache, timings):
    x = torch.randn(2, 32, 12, 10)
    before = model(x)
    report = tune(model, x, seconds=60)
    assert {row.status for row in report.rows} <= {"kept", "changed", "no choice"}
    assert report.timed == len(report.rows) == 5
    assert timings
    timings.clear()
    lookup.forget()
    again = tune(model, x, seconds=60)
    assert [row.status for row in again.rows] == ["cached"] * 5
    assert not timings
    takes = [row.choice.candidate for row in report.rows]
    assert [row.choice.candidate for row in again.rows] == takes
    torch.testing.assert_close(model(x), before)


def test_table_shows_the_weights_of_convolutions(model, cache):
    text = str(tune(model, torch.randn(1, 32, 12, 10), seconds=1e-3))
    (line,) = [line for line in text.splitlines() if line.startswith("first")]
    assert line.split()[1:4] == ["120", "48x32x3x3", "16x16"]


def problem_of(case, which, impl, device):
    cell = conv_cell_of(which, case.w, geometry_of_case(case), impl, case.x)
    return ConvProblem(cell, case.w, torch.Generator(device).manual_seed(0))


@pytest.fixture
def rates(monkeypatch):
    """As if a convolution in fp64 took a second, and products took no time."""
    conv_problem._fp64_rate.cache_clear()
    monkeypatch.setattr(conv_problem, "least_time", lambda device, call: call() is None or 1.0)
    monkeypatch.setattr(problem, "_fp64_rate", lambda device: float("inf"))
    yield
    conv_problem._fp64_rate.cache_clear()


@pytest.mark.parametrize("which", ["fwd", "dx", "dvalues"])
def test_time_of_the_convolution_that_is_compared_with_is_not_reckoned_as_that_of_a_product(
    which, rates, device
):
    """A library's convolution in fp64 is far slower: searches were begun that ended in nothing."""
    found = problem_of(Case(device=device), which, "torch", device)
    dense, _ = found.check_work()
    assert dense > 0
    assert found.least_seconds(5) == pytest.approx(2 * dense / (64 * 64 * 9 * 16 * 16))


@pytest.mark.parametrize("which", ["fwd", "dx", "dvalues"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=identifier)
def test_what_is_right_passes(geometry, which, device):
    case = Case(device=device, **geometry)
    problem = problem_of(case, which, "torch", device)
    assert analytic(problem.cell).candidate in candidates(problem.cell)
    for candidate in candidates(problem.cell):
        assert problem.wrong(candidate) is None, candidate.name


def test_kernel_that_is_right_passes(impl, device):
    case = Case((20, 20), (1, 2), (2, 3), 1, device=device, padding=1)
    for which in ("fwd", "dx", "dvalues"):
        problem = problem_of(case, which, impl, device)
        assert problem.wrong(analytic(problem.cell).candidate) is None
        assert problem.wrong(candidates(problem.cell)[-1]) is None


@pytest.mark.parametrize("which", ["fwd", "dx", "dvalues"])
@pytest.mark.parametrize("wrong", ["one element", "memory that nobody wrote", "layout"])
def test_wrong_candidate_is_refused(wrong, which, device, cache, monkeypatch):
    """It is the fastest of all, since it computes nothing."""
    case = Case(device=device, padding=1)
    problem = problem_of(case, which, "torch", device)
    planted, lines = Candidate("planted", way="planted"), []
    like = {"fwd": case.torch_out(torch.float32), "dx": case.x, "dvalues": case.w.values}[which]

    def plant(real, is_first):
        def run(*arguments):
            by = [a for a in arguments if isinstance(a, Candidate)]
            if by != [planted]:
                return real(*arguments)
            out = torch.empty(like.shape[::-1] if wrong == "layout" else like.shape)
            if wrong == "one element":
                right = [analytic(problem.cell).candidate if a is planted else a for a in arguments]
                found = real(*right)
                several = found if isinstance(found, tuple) else (found,)
                out = next(t for t in several if t is not None)
                out.view(-1)[-1] += 1
            return out if is_first else (out, out)

        return run

    for name in ("conv_fwd", "conv_bwd"):
        real = getattr(conv_problem, name)
        monkeypatch.setattr(conv_problem, name, plant(real, name == "conv_fwd"))
    present = analytic(problem.cell).candidate
    found = search(problem, present, [planted, present], time.perf_counter() + 60, lines.append)
    assert found.candidate == present
    assert list(found.skipped) == ["planted"]
    assert lines[0].startswith(("planted is skipped: wrong in ", "planted is skipped: gives "))


def test_library_on_a_card_may_take_fractions_of_whole_numbers(device, monkeypatch):
    """As Winograd's transforms do; a card's own convolution would have been refused for it."""
    problem = problem_of(Case(device=device), "fwd", "torch", device)
    dense = next(c for c in candidates(problem.cell) if c.name == "dense")
    real = conv_problem.conv_fwd
    monkeypatch.setattr(conv_problem, "conv_fwd", lambda *a: real(*a) + 1e-3)
    assert problem.wrong(dense).startswith("wrong in")
    whole = problem.whole_inputs()
    problem.device = torch.device("cuda")
    assert torch.equal(problem.compute(dense, *whole), real(*_arguments(problem, dense, whole)))


def _arguments(problem, candidate, inputs):
    x, _, w, _ = inputs
    return x, w.values, None, w, problem.cell.geometry, "none", problem.cell.impl, candidate


def test_images_of_one_channel_are_looked_up_as_they_are_met():
    """Their strides tell channels-last from contiguous, which converting one to the other kept."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3))
    with torch.no_grad():
        model[0].weight[:, :, 0, 0] = 0
    layer = sgtriton.sparsify(model, block=(16, 16), form="sparse")[0]
    x = torch.empty(2, 1, 9, 9, memory_format=torch.channels_last)
    images = images_met(layer, x)
    assert images.channels_last
    (cell,) = ConvProduct("", layer.matrix, (images,)).cells("torch")
    assert cell.channels_last
    problem = ConvProblem(cell, layer.matrix, torch.Generator().manual_seed(0))
    assert problem.inputs()[0].stride(1) == 1
