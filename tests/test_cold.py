"""The timer of single calls on a card that the tests put in its place."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from sgtriton import cold, timing

CARD = torch.device("cuda", 0)


class Card:
    """Notes what is asked of it, in turn; each call of ``x`` takes 2 ms."""

    def __init__(self, monkeypatch, l2: int, sleeps: bool = True):
        self.log, self.bytes = [], 0
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Event", self.event)
        monkeypatch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(
            cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=l2)
        )
        if sleeps:
            monkeypatch.setattr(cuda, "_sleep", lambda cycles: self.log.append("sleep"))
        else:
            monkeypatch.delattr(cuda, "_sleep")
        monkeypatch.setattr(cold.torch, "empty", self.empty)

    def empty(self, count, dtype, device):
        assert device == CARD
        self.bytes = count * dtype.itemsize
        return SimpleNamespace(fill_=lambda value: self.log.append("fill"))

    def event(self, enable_timing):
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.log.append("record"),
            synchronize=lambda: self.log.append("wait"),
            elapsed_time=lambda end: 2.0,
        )

    def call(self):
        self.log.append("call")


def test_card_is_still_busy_when_the_call_is_launched(monkeypatch):
    """Where filling took less than a launch, the launch was timed."""
    card = Card(monkeypatch, 50 << 20)
    timer = cold.ColdTimer(CARD)
    assert timer.ms(card.call) == 2.0
    assert card.log == ["fill", "sleep", "record", "call", "record", "wait"]


def test_filling_alone_keeps_a_card_busy_where_it_cannot_be_told_to_wait(monkeypatch):
    card = Card(monkeypatch, 50 << 20, sleeps=False)
    assert cold.ColdTimer(CARD).ms(card.call) == 2.0
    assert card.log == ["fill", "record", "call", "record", "wait"]


@pytest.mark.parametrize(
    ("l2", "expected"), [(6 << 20, 1 << 28), (50 << 20, 1 << 28), (96 << 20, 4 * (96 << 20))]
)
def test_more_is_written_than_the_cache_of_a_card_holds(l2, expected, monkeypatch):
    card = Card(monkeypatch, l2)
    cold.ColdTimer(CARD)
    assert card.bytes == expected


def test_calls_in_turns_are_timed_cold_on_a_card_too(monkeypatch):
    card = Card(monkeypatch, 50 << 20)
    taken = timing.samples_ms([card.call, card.call], CARD, seconds=0.0, rounds=3)
    assert taken == [[2.0] * 3] * 2
    one = ["fill", "sleep", "record", "call", "record", "wait"]
    first = ["call", *one]
    assert card.log == [*first * 2, *first * 6]
