import pytest
import torch
import torch.nn.functional as F

from bench import peers, timed

CPU = torch.device("cpu")


def problem(m=5, n=64, k=96, block=16):
    blocks = torch.rand(n // block, k // block) < 0.5
    mask = blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return peers.Problem(torch.randn(n, k) * mask, block, torch.randn(m, k), threads=1)


def test_every_peer_is_tried_or_named():
    made = {peer.name for peer, _ in peers.candidates(problem())}
    absent = peers.missing(CPU, torch.float32)
    assert made | set(absent) == {peer.name for peer in peers.PEERS}
    assert not made & set(absent)
    assert all(status.startswith("missing: ") for status in absent.values())


def test_peers_that_run_here_compute_the_product():
    given = problem()
    expected = F.linear(given.x.double(), given.weight.double())
    for peer, call in peers.candidates(given):
        assert not isinstance(call, str), f"{peer.name}: {call}"
        assert timed.difference(call(), expected) is None, peer.name


@pytest.mark.parametrize("module", ["scipy", "onnxruntime", "torchao", "blksprs"])
def test_what_is_not_installed_is_named(module, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    device = torch.device("cuda" if module in ("torchao", "blksprs") else "cpu")
    name = next(peer.name for peer in peers.PEERS if peer.name.startswith(module))
    reason = peers.missing(device, torch.float32)[name]
    assert module in reason
    assert reason.endswith("not installed")


def test_a_peer_that_raises_is_listed_and_the_others_go_on(monkeypatch):
    def broken(_):
        raise RuntimeError("an illegal memory access\nand more")

    peer = peers.Peer("broken", lambda *_: None, broken)
    monkeypatch.setattr(peers, "PEERS", (peer, *peers.PEERS))
    (first, status), *others = peers.candidates(problem())
    assert (first.name, status) == ("broken", "failed: RuntimeError: an illegal memory access")
    assert others

    def late():
        raise ValueError("shapes")

    calls = {"dense": lambda: torch.zeros(1), "broken": late, "absent": status}
    taken = timed.take_turns(calls, lambda *_: None, CPU, 0.0)
    assert taken["dense"].ms
    assert taken["broken"].status == "failed: ValueError: shapes"
    assert taken["absent"].status == status


def test_half_of_each_four_is_kept():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.0]])
    assert peers.two_of_four(weight).tolist() == [[0, -4, 3, 0, 0, 0, 5, 0]]
    random = peers.two_of_four(torch.randn(8, 64))
    assert (random.view(8, 16, 4) != 0).sum(2).eq(2).all()
