"""The two networks of the pruning literature, as the demo trains them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

import sgtriton

__all__ = ["MODELS", "lenet5", "lenet300", "make_model"]


def lenet300() -> nn.Sequential:
    """LeNet-300-100: 784-300-100-10 with ReLU, 266,610 parameters.

    Takes ``[n, 1, 28, 28]``, gives logits ``[n, 10]``.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, 10),
        )
    )


def lenet5() -> nn.Sequential:
    """Caffe's LeNet-5, the one that pruning papers mean: 20-50-500-10, 431,080 parameters.

    Two 5x5 convolutions without padding, each followed by a 2x2 max-pool, then two linear layers.
    As in Caffe the only ReLU comes after ``fc1``; the pools are the nonlinearity before it.
    Takes ``[n, 1, 28, 28]``, gives logits ``[n, 10]``.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu1=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )


MODELS: dict[str, Callable[[], nn.Sequential]] = {"lenet300": lenet300, "lenet5": lenet5}


def make_model(name: str, seed: int) -> nn.Sequential:
    """Build a model of :data:`MODELS`; one seed gives the same weights each time.

    Raises:
        ValueError: No such model.
    """
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()


def add_gates(model: nn.Module, block: tuple[int | None, int | None], gate: str) -> None:
    """Gate all layers by ``block`` but the last: it is small and every weight of it counts.

    Args:
        model: Made by :func:`make_model`; patched in place.
        block: Sides of a gate block, outputs then inputs; None is the whole dimension.
        gate: ``threshold`` or ``bernoulli``.

    Raises:
        ValueError: A block or gate that is not allowed.
    """
    last = [name for name, module in model.named_children() if hasattr(module, "weight")][-1]
    sgtriton.patch(model, block=block, gate=gate, exclude=last)
    sgtriton.patch(model, block=(1, 1), gate=gate, include=last)
