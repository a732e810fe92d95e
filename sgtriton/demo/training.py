"""The loop that trains the demo's networks, dense and gated alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import sgtriton

from .data import Digits

__all__ = ["History", "accuracy", "predict", "steps_for", "train"]

_BATCH = 128
_LR = 2e-3  # of 1e-3 and 2e-3 the better for both twins, at 4,000 and at 60,000 images
_POINTS = 24  # points of a curve, at most
_EVERY = 16  # steps between two points, at least: a test costs as much as several steps


@dataclass(frozen=True)
class History:
    """What the curves show: one entry each time the network was tested while it trained."""

    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    open_share: tuple[float, ...]


def steps_for(digits: Digits, epochs: int) -> int:
    """Optimizer steps that ``epochs`` take; a controller wants to know."""
    return epochs * math.ceil(len(digits.train_x) / _BATCH)


def train(
    model: nn.Module,
    digits: Digits,
    epochs: int,
    seed: int,
    controller: sgtriton.SparsityController | None = None,
    on_step: Callable[[str], None] | None = None,
) -> History:
    """Train with Adam at batch 128, constant learning rate for one half, linear to 0 in the other.

    The order of the images depends on ``seed`` alone, so a dense and a gated run see the same
    batches. The test images only draw the curves: nothing is chosen by them.

    Args:
        model: Takes ``[n, 1, 28, 28]``, gives logits ``[n, 10]``; trained in place, left in eval.
        digits: What to train on.
        epochs: At least 1.
        seed: Of the batches, and of the draws of Bernoulli gates.
        controller: Of the gated ``model``; None trains as usual.
        on_step: Called after every step with a few words on how it goes.

    Returns:
        The curves over the steps, the last entry after the last step.
    """
    gated = controller is not None
    groups = sgtriton.param_groups(model, lr=_LR) if gated else model.parameters()
    optimizer = torch.optim.Adam(groups, lr=_LR)
    total = steps_for(digits, epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, 2 - 2 * s / total))
    every = max(total // _POINTS, _EVERY)
    order = torch.Generator().manual_seed(seed)
    steps, accuracies, shares = [], [], []
    step, note = 0, ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(digits.train_x), generator=order).split(_BATCH):
                logits = model(digits.train_x[rows])
                loss = nn.functional.cross_entropy(logits, digits.train_y[rows])
                if controller is not None:
                    loss = loss + controller.penalty()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if controller is not None:
                    controller.step()
                schedule.step()
                step += 1
                if step % every == 0 or step == total:
                    share = 1.0 if controller is None else controller.statistics.open_share
                    steps.append(step)
                    shares.append(float(share))
                    accuracies.append(accuracy(model, digits.test_x, digits.test_y))
                    model.train()
                    note = f"accuracy {100 * accuracies[-1]:.1f} %, open {100 * share:.1f} %"
                if on_step is not None:
                    on_step(note)
    model.eval()
    return History(tuple(steps), tuple(accuracies), tuple(shares))


@torch.inference_mode()
def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits ``[n, 10]`` fp32 for all images ``[n, 1, 28, 28]``, in eval mode (left on)."""
    model.eval()
    return torch.cat([model(part) for part in x.split(1000)])


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images whose largest logit is their label's; leaves the model in eval mode."""
    return (predict(model, x).argmax(1) == y).float().mean().item()
