"""Two processes on the CPU (gloo): what ranks share and what they do not."""

import os
import warnings

import torch
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

import sgtriton
from sgtriton.layers import gated_layers

RANKS = 2


def make_model(gate: str = "threshold", sync_noise: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
    return sgtriton.patch(model, (4, 4), gate, init=0.6, sync_noise=sync_noise)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 12, generator=generator), torch.randint(3, (16,), generator=generator)


def train(model: nn.Module, gates: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """A few steps of SGD under control; the gates are those of ``gates``."""
    optimizer = torch.optim.SGD(sgtriton.param_groups(gates, 0.1, optimizer=torch.optim.SGD))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the largest gate block")
        controller = sgtriton.SparsityController(gates, target=0.5, steps=40, ramp=(0.0, 0.5))
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), y) + controller.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.step()


def all_equal(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the same on all ranks."""
    others = [torch.empty_like(tensor) for _ in range(RANKS)]
    distributed.all_gather(others, tensor)
    return all(torch.equal(other, tensor) for other in others)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    x, y = batch()
    half = slice(rank * 8, rank * 8 + 8)

    model = make_model()
    # once frozen, gates take part in no backward pass
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    train(wrapped, model, x[half], y[half])
    alone = make_model()
    train(alone, alone, x, y)
    for ours, single in zip(gated_layers(model), gated_layers(alone), strict=True):
        assert all_equal(ours.gate.detach()), "gates differ between ranks"
        assert torch.equal(ours.gate, single.gate), "ranks land elsewhere than one process"
        torch.testing.assert_close(ours.weight, single.weight, rtol=1e-4, atol=1e-5)

    for sync_noise in (False, True):
        model = make_model("bernoulli", sync_noise)
        torch.manual_seed(10)  # ranks often share a seed
        layer = next(gated_layers(model))
        assert all_equal((layer.gated_weight() != 0).float()) == sync_noise

    del wrapped
    distributed.barrier()
    distributed.destroy_process_group()


def test_ranks_agree_on_gates_and_draw_their_own_noise(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn(worker, (str(tmp_path),), nprocs=RANKS)
