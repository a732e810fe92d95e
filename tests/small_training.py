"""A training of seconds under control, as a user writes it; for the tests of the controller."""

import warnings

import torch
from sgtriton_kernels import coverage
from torch import nn

import sgtriton
from sgtriton import SparsityController
from sgtriton.layers import gated_layers

OPTIMIZERS = {
    "Adam": (torch.optim.Adam, 0.03, {}),
    "SGD momentum": (torch.optim.SGD, 0.05, {"momentum": 0.9}),
}


def problem(conv: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs, and what a teacher that looks at a few of them answers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 16, generator=generator)
    y = torch.stack([x[:, :4].sum(1), x[:, 2:6].prod(1), x[:, 0] * x[:, 1]], 1)
    return (x.reshape(-1, 1, 4, 4) if conv else x), y


def make_model(conv: bool = False) -> nn.Sequential:
    first = nn.Conv2d(1, 8, 3, padding=1) if conv else nn.Linear(16, 32)
    inner = [nn.Conv2d(8, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten()] if conv else []
    second, third = nn.Linear(64 if conv else 32, 24), nn.Linear(24, 3)
    return nn.Sequential(first, nn.ReLU(), *inner, second, nn.Tanh(), third)


class Training:
    """Model, optimizer and controller of one training; the same start for the same arguments."""

    def __init__(
        self, optimizer="Adam", block=(1, 1), gate="threshold", conv=False, steps=100,
        target=0.8, scale=1.0, **options,
    ):  # fmt: skip
        torch.manual_seed(3)
        self.x, self.y = problem(conv)
        self.model = sgtriton.patch(make_model(conv), block, gate)
        self.steps, self.scale = steps, scale
        make, lr, own = OPTIMIZERS[optimizer]
        if make is torch.optim.SGD:
            lr /= scale  # so that the weights move alike
        groups = sgtriton.param_groups(self.model, lr, optimizer=make)
        self.optimizer = make(groups, **own)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the largest gate block")
            self.controller = SparsityController(self.model, target, steps, **options)

    def step(self) -> float:
        loss = (self.model(self.x) - self.y).square().mean() * self.scale
        (loss + self.controller.penalty()).backward()
        self.optimizer.step()
        self.controller.step()
        self.optimizer.zero_grad()
        return loss.item()

    def run(self, steps: int) -> float:
        """The last loss of ``steps`` steps."""
        return [self.step() for _ in range(steps)][-1]

    def run_until_freeze(self) -> float:
        """The density under control at the last step before the projection."""
        density = 1.0
        while not self.controller.frozen:
            density = self.controller.density
            self.step()
        return density


def allowed_error(model: nn.Module) -> float:
    """What a landing may miss: half a point, or half the largest block."""
    layers = [*gated_layers(model)]
    largest = max(coverage(layer.layout).max().item() for layer in layers)
    return max(0.005, largest / sum(layer.weight.numel() for layer in layers) / 2) + 1e-9


def sparsity(model: nn.Module) -> float:
    """Share of exact zeros in the effective weights of gated layers."""
    weights = [layer.eval_weight() for layer in gated_layers(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
