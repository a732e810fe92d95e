"""The search: what is wrong or fails is out, what is not surely faster changes nothing."""

import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sgtriton_kernels import BlockSparse, block_products, bsr_torch
from sgtriton_kernels._scratch import scratch_parts
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.candidate import Candidate
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.lookup import analytic

from sgtriton import search as module
from sgtriton.bsr_problem import BsrLinearProblem
from sgtriton.cold import ColdTimer
from sgtriton.search import NoneRight, search

NAMES = "abcdefgh"
CANDIDATES = [Candidate(name, way=name) for name in NAMES]


class Fake:
    """Candidates whose times are told, in a problem without products."""

    device = torch.device("cpu")

    def __init__(self, ms, noise=0.0, seed=0, wrong=()):
        self.ms, self.noise, self.reasons = ms, noise, dict(wrong)
        self.random, self.called, self.calls = random.Random(seed), None, 0

    def wrong(self, candidate):
        reason = self.reasons.get(candidate.name)
        if isinstance(reason, Exception):
            raise reason
        return reason

    def call(self, candidate):
        self.called = candidate.name
        self.calls += 1

    def timer(self, device):
        fake = self

        class Timer(ColdTimer):
            def __init__(self):
                pass

            def ms(self, call):
                call()
                busy = 1 + fake.noise * fake.random.expovariate(1)
                return fake.ms[fake.called] * busy * fake.random.gauss(1, fake.noise / 3)

        return Timer()


@pytest.fixture
def run(monkeypatch):
    def run(fake, present="a", until=None, say=lambda text: None, reasoned=None):
        monkeypatch.setattr(module, "ColdTimer", fake.timer)
        own = [c for c in CANDIDATES if c.name in fake.ms]
        ends = time.perf_counter() + 60 if until is None else until
        by_reason = None if reasoned is None else own[NAMES.index(reasoned)]
        return search(fake, own[NAMES.index(present)], own, ends, say, by_reason)

    return run


def test_faster_candidate_takes_the_place(run):
    found = run(Fake({"a": 1.0, "b": 0.8, "c": 2.0}))
    assert found.candidate.name == "b"
    assert found.gain == pytest.approx(1.25)
    assert (found.ms, found.present_ms) == (0.8, 1.0)
    assert found.timed == 3


def test_gain_within_the_noise_changes_nothing(run):
    found = run(Fake({"a": 1.0, "b": 0.98, "c": 0.975}))
    assert (found.candidate.name, found.gain) == ("a", 1.0)


def test_choice_is_stable_under_noise(run):
    """Of candidates that are equally fast the present one stays, in 95 of 100 searches."""
    kept = sum(
        run(Fake(dict.fromkeys("abcd", 1.0), noise=0.1, seed=seed)).candidate.name == "a"
        for seed in range(100)
    )
    assert kept >= 95


def test_clearly_faster_candidate_is_found_under_noise(run):
    found = [
        run(Fake({"a": 1.0, "b": 1.0, "c": 0.8}, noise=0.1, seed=seed)).candidate.name
        for seed in range(100)
    ]
    assert found.count("c") >= 95


def test_wrong_but_fast_candidate_is_refused_with_a_line(run):
    lines = []
    fake = Fake({"a": 1.0, "b": 0.1}, wrong={"b": "wrong in 3 of 4 elements"})
    found = run(fake, say=lines.append)
    assert found.candidate.name == "a"
    assert found.skipped == {"b": "wrong in 3 of 4 elements"}
    assert lines == ["b is skipped: wrong in 3 of 4 elements"]


def test_candidate_that_fails_is_skipped_with_a_line(run):
    lines = []
    error = RuntimeError("out of resource: shared memory\nRequired: 300000")
    found = run(Fake({"a": 1.0, "b": 0.1}, wrong={"b": error}), say=lines.append)
    assert found.candidate.name == "a"
    assert lines == ["b is skipped: fails: RuntimeError: out of resource: shared memory"]


def test_candidate_that_fails_when_it_is_timed_is_skipped_with_a_line(run):
    """Its inputs are others than those that it was checked with; the whole search ended."""
    lines, fake = [], Fake({"a": 1.0, "b": 0.1})
    real = fake.call

    def call(candidate):
        if candidate.name == "b":
            raise RuntimeError("no memory\nfor it")
        return real(candidate)

    fake.call = call
    found = run(fake, say=lines.append)
    assert found.candidate.name == "a"
    assert lines == ["b is skipped: fails: RuntimeError: no memory"]


def test_present_choice_that_is_wrong_gives_way(run):
    found = run(Fake({"a": 1.0, "b": 3.0}, wrong={"a": "wrong in 1 of 4 elements"}))
    assert found.candidate.name == "b"


def test_search_in_which_nothing_is_right_says_so(run):
    """It ended as one for which the time did not suffice."""
    lines, why = [], {"a": "wrong in 1 of 4 elements", "b": ValueError("no such tile")}
    found = run(Fake({"a": 1.0, "b": 3.0}, wrong=why), say=lines.append)
    assert found == NoneRight({"a": why["a"], "b": "fails: ValueError: no such tile"})
    assert lines[-1] == "what is taken now, a, is skipped: wrong in 1 of 4 elements"


def test_nothing_is_decided_without_time(run):
    fake = Fake({"a": 1.0, "b": 0.5})
    assert run(fake, until=time.perf_counter() - 1) is None
    assert fake.calls == 0


def test_search_stops_in_time(run, monkeypatch):
    fake = Fake({"a": 1.0, "b": 0.9, "c": 0.95})
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(fake.calls))  # a second each
    assert run(fake, until=40.0) is not None
    assert 40 < fake.calls <= 42  # one that was begun, and the call before it


def test_what_another_candidate_leaves_behind_is_not_measured(run):
    """The first call after another candidate finds larger caches full of other data."""
    fake = Fake({"a": 1.0, "b": 0.9})
    real, order = fake.call, []

    def call(candidate):
        fake.ms["a"] = 1.0 if order[-1:] == ["a"] else 1.5
        order.append(candidate.name)
        real(candidate)

    fake.call = call
    found = run(fake)
    assert "".join(order).startswith("aabb" + "aabb" * 5)
    assert (found.candidate.name, found.ms, found.present_ms) == ("b", 0.9, 1.0)


def test_hopeless_candidates_cost_one_call(run):
    fake = Fake({"a": 1.0, "b": 50.0, "c": 0.5})
    counts = dict.fromkeys("abc", 0)
    real = fake.call

    def call(candidate):
        counts[candidate.name] += 1
        real(candidate)

    fake.call = call
    run(fake)
    assert counts["b"] == 1
    assert counts["c"] > 20


@pytest.mark.parametrize(("present", "best"), [("a", 0.5), ("b", 0.5), ("c", 0.5), ("b", 1.0)])
def test_what_is_gained_over_reasoning_is_known_whatever_was_taken_before(present, best, run):
    """Reasoning's candidate left the race where another was far ahead, or was never in it."""
    fake = Fake({"a": 1.0, "b": best, "c": 40.0})
    counts = dict.fromkeys("abc", 0)
    real = fake.call

    def call(candidate):
        counts[candidate.name] += 1
        real(candidate)

    fake.call = call
    found = run(fake, present, reasoned="c")
    assert found.candidate.name == "b"
    assert found.over_reasoned == pytest.approx(40 / best)
    assert counts["c"] > 5
    assert math.isnan(run(fake, present).over_reasoned)  # it was not asked for


def test_reasoning_that_stays_gains_nothing_over_itself(run):
    found = run(Fake({"a": 1.0, "b": 2.0}), "b", reasoned="a")
    assert (found.candidate.name, found.gain, found.over_reasoned) == ("a", 2.0, 1.0)


def test_reasoning_that_is_wrong_is_gained_over_without_end(run):
    found = run(Fake({"a": 1.0, "b": 2.0}, wrong={"a": "wrong"}), "b", reasoned="a")
    assert (found.candidate.name, found.over_reasoned) == ("b", float("inf"))


def problem(which="fwd", m=20, side=16, dtype=torch.float32):
    open = torch.rand(12, 14) < 0.5
    weight = torch.randn(12 * side, 14 * side).to(dtype)
    w = BlockSparse.from_dense(weight, (side, side), open=open)
    x, dy = torch.empty(m, 14 * side, dtype=dtype), torch.empty(m, 12 * side, dtype=dtype)
    operands = {"fwd": (x,), "dx": (dy,), "dvalues": (dy, x)}[which]
    cell = cell_of(which, w, "torch", *operands)
    return BsrLinearProblem(cell, w, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m", [1, 20])
def test_every_candidate_passes_the_check(m, dtype):
    p = problem(m=m, dtype=dtype)
    for candidate in candidates(p.cell):
        assert p.wrong(candidate) is None, candidate.name


def planted(monkeypatch, compute):
    monkeypatch.setitem(block_products._WAYS, "dense", compute)
    return Candidate("dense", way="dense")


def test_planted_candidate_that_skips_a_block_is_refused(monkeypatch):
    real = block_products._loop

    def without_last(x, weights, index, out, bias, elements):
        weights = weights.clone()
        weights[-1] = 0
        real(x, weights, index, out, bias, elements)

    monkeypatch.setattr(block_products, "_whole", lambda weights, index: weights)
    p = problem()
    assert "wrong in" in str(p.wrong(planted(monkeypatch, without_last)))


def test_planted_candidate_that_leaves_a_column_unwritten_is_refused(monkeypatch):
    """The buffer of the call before held the right result there."""
    real = block_products._loop

    def without_column(x, weights, index, out, bias, elements):
        whole = out.clone()
        real(x, weights, index, whole, bias, elements)
        out[:, 1:] = whole[:, 1:]

    monkeypatch.setattr(block_products, "_whole", lambda weights, index: weights)
    p = problem()
    p.wrong(next(c for c in candidates(p.cell) if c.name == "loop"))
    assert "wrong in 20 of" in str(p.wrong(planted(monkeypatch, without_column)))


def test_planted_candidate_that_reads_old_scratch_is_refused(monkeypatch):
    real = block_products.multiply

    def reading(*args, **kwargs):
        out = real(*args, **kwargs)
        (kept,) = scratch_parts([(1 << 20,)], out.dtype, out.device)
        return out + 0 * kept[-1]

    monkeypatch.setattr(bsr_torch, "multiply", reading)
    p = problem()
    (kept,) = scratch_parts([(1 << 20,)], torch.float32, p.device)
    kept.zero_()  # as a call before may have left it
    assert "wrong in" in str(p.wrong(Candidate("loop", way="loop")))


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("fills", [True, False])
def test_check_leaves_the_switches_as_they_were(mode, fills, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fills)
    p, before = problem(), torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        p.wrong(analytic(p.cell).candidate)
        assert torch.get_deterministic_debug_mode() == mode
        assert torch.utils.deterministic.fill_uninitialized_memory == fills
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_that_a_checked_call_takes_is_nan(dtype, monkeypatch):
    def unwritten(x, weights, index, out, bias, elements):
        assert out.isnan().all()
        assert torch.empty(5, dtype=dtype).isnan().all()
        assert torch.empty_like(x).isnan().all()
        torch.zeros(4, 2).put_(torch.zeros(3, dtype=torch.long), torch.ones(3))  # is not refused

    monkeypatch.setattr(block_products, "_whole", lambda weights, index: weights)
    p = problem(dtype=dtype)
    found = p.wrong(planted(monkeypatch, unwritten))
    rows, cols = p.cell.M, p.cell.N
    assert found == f"wrong in {rows * cols} of {rows * cols} elements"


def test_search_imports_no_compiler_inside_its_time(tmp_path):
    """PyTorch's switch to deterministic algorithms imports Inductor, for seconds."""
    script = (
        "import sys; from sgtriton.cli import main\n"
        "code = main(['tune', '--shapes', '64x512x512', '--seconds', '3'])\n"
        "print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules], code)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ
        | {"PYTHONPATH": f"{root}:{root / 'kernels'}", "SGTRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert "1 of 1 products timed" in done.stdout


def test_timing_is_of_a_call():
    timer = ColdTimer(torch.device("cpu"))
    assert timer.ms(lambda: time.sleep(0.02)) >= 20
