"""Interleaved timing, on a clock that the tests turn."""

import pytest
import torch

from sgtriton import timing

CPU = torch.device("cpu")


class Clock:
    """Stands still unless a call takes its time."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def call(self, name, *durations):
        """A candidate whose calls take these seconds in turn, the last one from there on."""
        left = list(durations)

        def candidate():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return candidate


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_candidates_take_turns(clock):
    a, b, c = (clock.call(name, 0.001) for name in "abc")
    timing.interleaved_ms([a, b, c], CPU, seconds=0.0, rounds=4)
    # first call, its cost; in each round a call unmeasured and one measured
    assert "".join(clock.calls) == "aa" + "bb" + "cc" + "aabbcc" * 4


def test_times_are_medians_in_milliseconds(clock):
    # first call and cost, then five with one hiccup, each after a call that is not measured
    slow = clock.call("slow", 9, 0.002, *(7, 0.002) * 2, *(7, 0.9), *(7, 0.002) * 2)
    fast = clock.call("fast", 9, 0.001, *(7, 0.001) * 3, *(7, 0.9), *(7, 0.001))
    times = timing.interleaved_ms([slow, fast], CPU, seconds=0.0, rounds=5)
    assert times == pytest.approx([2.0, 1.0])


def test_delays_by_other_work_do_not_decide(clock):
    """Two thirds of the calls of one candidate were delayed: medians would take the other."""
    delayed = clock.call("a", 9, 0.001, *(7, 0.001), *(7, 0.9) * 5, *(7, 0.001))
    other = clock.call("b", 9, 0.002)
    times = timing.undisturbed_ms([delayed, other], CPU, seconds=0.0)
    assert times == pytest.approx([1.0, 2.0])


def test_first_call_is_not_measured(clock):
    """It compiles and allocates."""
    call = clock.call("x", 30.0, 0.004)
    assert timing.interleaved_ms([call], CPU, seconds=0.0, rounds=1) == pytest.approx([4.0])


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_slow_candidates_get_the_fewest_rounds(clock, rounds):
    calls = [clock.call("a", 1.0), clock.call("b", 1.0)]
    timing.interleaved_ms(calls, CPU, seconds=0.1, rounds=rounds)
    assert clock.calls.count("a") == clock.calls.count("b") == 2 + rounds


def test_measuring_goes_on_until_the_time_is_up(clock):
    calls = [clock.call("a", 0.01), clock.call("b", 0.01)]
    timing.interleaved_ms(calls, CPU, seconds=0.995, rounds=2)
    assert clock.calls.count("a") == 2 + 2 * 25  # rounds of 0.04 s


def test_what_another_candidate_leaves_behind_is_not_measured(clock):
    """The first call after another candidate finds larger caches full of other data."""
    first = {"a": True}

    def a():
        clock.now += 0.009 if first["a"] else 0.003
        first["a"] = False

    def b():
        clock.now += 0.002
        first["a"] = True

    assert timing.interleaved_ms([a, b], CPU, seconds=0.0, rounds=3) == pytest.approx([3.0, 2.0])


def test_the_second_level_is_filled_with_other_data_before_each_timed_call(clock, monkeypatch):
    order = clock.calls
    fill = torch.Tensor.fill_
    monkeypatch.setattr(
        torch.Tensor, "fill_", lambda t, value: (order.append("."), fill(t, value))[1]
    )
    timing.interleaved_ms([clock.call("a", 0.01), clock.call("b", 0.01)], CPU, 0.0, rounds=2)
    assert "".join(order) == "a.ab.b" + "a.ab.b" * 2


def test_each_timed_call_waits_for_the_device(clock, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(device))
    device = torch.device("meta")
    timing.interleaved_ms([clock.call("a", 0.001)], device, seconds=0.0, rounds=3)
    assert waited == [device] * 2 * (1 + 3)  # before and after each
    waited.clear()
    timing.interleaved_ms([clock.call("a", 0.001)], CPU, seconds=0.0, rounds=3)
    assert waited == []


def test_real_clock_ranks_a_tenfold_difference():
    small, large = torch.randn(1 << 14), torch.randn(1 << 19)
    times = timing.interleaved_ms([small.sum, large.sum], CPU, seconds=0.05)
    assert 0 < times[0] < times[1]
