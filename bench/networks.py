"""The networks that are served whole, with random weights, and small ones of the same kinds.

VGG-16 (Simonyan, Zisserman, arXiv:1409.1556) and MLP-Mixer-B/16 (Tolstikhin et al.,
arXiv:2105.01601).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

SIDE, QUICK_SIDE = 224, 32  # of images
OUTPUTS = 1000


def vgg16(width: int = 64, side: int = 224, hidden: int = 4096) -> nn.Module:
    """VGG-16; ``width`` channels in the first stage."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        out = width * min(2**stage, 8)
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
    flat = channels * (side // 32) ** 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
        nn.ReLU(), nn.Linear(hidden, OUTPUTS),
    )  # fmt: skip


class MixerBlock(nn.Module):
    """One layer of MLP-Mixer: tokens are mixed, then channels."""

    def __init__(self, tokens: int, channels: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels) for _ in range(2)])
        self.mix_tokens = _mlp(tokens, token_hidden)
        self.mix_channels = _mlp(channels, channel_hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix_tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norms[1](x))


def _mlp(size: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))


class Mixer(nn.Module):
    """MLP-Mixer; the sizes of B/16 by default."""

    def __init__(
        self, depth: int = 12, channels: int = 768, side: int = 224, patch: int = 16,
        token_hidden: int = 384, channel_hidden: int = 3072,
    ) -> None:  # fmt: skip
        super().__init__()
        tokens = (side // patch) ** 2
        self.stem = nn.Conv2d(3, channels, patch, stride=patch)
        self.blocks = nn.Sequential(
            *(MixerBlock(tokens, channels, token_hidden, channel_hidden) for _ in range(depth))
        )
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, OUTPUTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {"VGG-16": vgg16, "MLP-Mixer-B/16": Mixer}
QUICK: dict[str, Callable[[], nn.Module]] = {
    "VGG-16, small": functools.partial(vgg16, width=16, side=QUICK_SIDE, hidden=128),
    "MLP-Mixer, small": functools.partial(
        Mixer, depth=2, channels=128, side=QUICK_SIDE, patch=8, token_hidden=32, channel_hidden=256
    ),
}
