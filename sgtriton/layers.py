"""Gated layers: PyTorch's own layers whose weight is multiplied by trainable binary gates.

A gated layer *is* the layer it was made from: same module object, same ``weight`` and ``bias``
Parameters, same hooks; its class is exchanged and a Parameter ``gate`` added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sgtriton_kernels import GateLayout, expand_gates, gate_layout, gate_weight, gated_linear
from sgtriton_kernels.blocks import Block
from sgtriton_kernels.kinds import (
    check_gate_kind,
    gate_bounds,
    initial_gate,
    open_chance,
    open_gates,
)
from torch import distributed, nn

from . import clipping

_RANK_STRIDE = 0x1E3779B97F4A7C15  # odd, so that no two ranks draw from seeds that meet


class GatedModule(nn.Module):
    """What gated layers share: the gates, their state, and the gated weight.

    Attributes:
        gate: shape as :func:`sgtriton_kernels.gate_layout` gives it, fp32 whatever the model is
            cast to. Trainable gates; everything that reads them reads ``clip(gate, 0, 1)``. Of
            ``hard_concrete`` gates it holds log alpha, within +-log 100.
        gate_kind: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``; kept with the state,
            loading another is an error.
        gate_block: ``(bn, bk)`` as asked for; ``None`` is the whole dimension.
        gate_init: value of the gates after ``patch`` and after loading a dense checkpoint.
        frozen: gates are exactly 0 or 1 and no longer train.
        sync_noise: gates are drawn alike on all ranks of the default process group. By default
            each rank draws its own, which averages more samples.
        reopen_every: closed ``threshold`` gates get a gradient on each ``reopen_every``-th
            optimizer step only; on the others neither the loss nor the penalty moves them, and
            their blocks cost nothing in a linear layer's backward.
        reopens: whether they get it in this step.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    gate: nn.Parameter
    gate_kind: str
    gate_block: Block
    gate_init: float
    frozen: bool
    sync_noise: bool = False
    reopen_every: int = 1
    reopens: bool = True  # a bool of its own: compiled code depends on it, not on the count
    _steps_done: int = 0  # optimizer steps

    dense_type: type[nn.Module]  # the layer that this one gates

    def init_gates(self, block: Block, kind: str, init: float) -> None:
        """Add the gates to a layer that has its weight."""
        check_gate_options(block, kind, init)
        self.gate_kind, self.gate_block, self.gate_init = kind, (block[0], block[1]), float(init)
        self.frozen = False
        gate = torch.full(
            self.layout.gate_shape,
            initial_gate(init, kind),
            dtype=torch.float32,
            device=self.weight.device,
        )
        self.register_parameter("gate", nn.Parameter(gate))
        clipping.track(self)

    @property
    def layout(self) -> GateLayout:
        """How the gates lie over the weight."""
        groups = getattr(self, "groups", 1)
        return gate_layout(tuple(self.weight.shape), self.gate_block, groups)

    def gated_weight(self) -> torch.Tensor:
        """The weight times its binarised gates, as the next forward pass uses it.

        Returns:
            Shape of ``weight``; its dtype, or autocast's where that is on. Differentiable in
            ``weight`` and ``gate`` (straight-through). Bernoulli gates are drawn anew in training;
            in eval, and once frozen, a gate is open if it is above 0.5. The draw's seed comes from
            PyTorch's generator: a checkpointed layer recomputes the same mask, unless
            ``preserve_rng_state=False`` has it draw another.
        """
        weight, dtype = self.weight, self.weight.dtype
        if _autocast(weight.device.type) and dtype != torch.float64:  # it leaves fp64 alone
            dtype = torch.get_autocast_dtype(weight.device.type)
        kind, seed = self._draw()
        gate = self.gate.detach() if self.frozen else self.gate
        if not self.reopens:  # gradient to open gates only
            gate = torch.where(gate > 0.5, gate, gate.detach())
        return gate_weight(
            weight,
            gate,
            self.gate_block,
            groups=getattr(self, "groups", 1),
            kind=kind,
            seed=seed,
            dtype=dtype,
        )

    def _draw(self) -> tuple[str, torch.Tensor | None]:
        """What kind of gates the next forward pass reads, and the seed with which it draws them."""
        if self.frozen or self.gate_kind == "threshold":
            return "threshold", None  # frozen gates are on either side of it, whatever their kind
        if not self.training:
            return "threshold" if self.gate_kind == "bernoulli" else self.gate_kind, None
        seed = torch.randint(0, 2**62, (1,), device=self.weight.device)
        if distributed.is_available() and distributed.is_initialized():
            if self.sync_noise:
                distributed.broadcast(seed, 0)
            else:  # ranks often share a seed
                seed += distributed.get_rank() * _RANK_STRIDE % 2**62
        return self.gate_kind, seed

    def optimizer_stepped(self) -> None:
        """Called after each step of the optimizer that holds the gates."""
        self.gate.clamp_(*gate_bounds(self.gate_kind))
        if self.reopen_every > 1:
            self._steps_done += 1
            self.reopens = self._steps_done % self.reopen_every == 0

    def check_input(self, input: torch.Tensor) -> None:
        """Raise ``ValueError`` where dtypes of input and weight differ, outside autocast."""
        if input.dtype != self.weight.dtype and not _autocast(input.device.type):
            raise ValueError(
                f"{self!r}: the input is {input.dtype}, the weight {self.weight.dtype}; cast one "
                "of them, or use torch.autocast"
            )

    @torch.no_grad()
    def eval_weight(self) -> torch.Tensor:
        """The weight times its gates as eval reads them: in ``weight``'s dtype, detached."""
        kind = "hard_concrete" if self.gate_kind == "hard_concrete" else "threshold"
        groups = self.layout.groups
        return gate_weight(self.weight, self.gate, self.gate_block, groups=groups, kind=kind)

    @torch.no_grad()
    def open_gates(self) -> torch.Tensor:
        """Which gates are open in eval, as bool in the gates' shape."""
        return open_gates(self.gate, self.gate_kind)

    @torch.no_grad()
    def freeze(self, is_open: torch.Tensor | None = None) -> None:
        """Fix each gate at fully open or closed and set closed weights to 0; gates train no more.

        What a ``hard_concrete`` gate multiplied its weights with in eval goes into the weights;
        where ``is_open`` opens one that eval closes, its chance of not being 0.

        Args:
            is_open: ``gate``'s shape bool; those that eval sees open if ``None``.
        """
        is_open = self.open_gates() if is_open is None else is_open
        if self.gate_kind == "hard_concrete":
            folded = self.eval_weight()
            # what eval closes and `is_open` opens would be 0 for good: it keeps its chance's share
            forced = is_open & ~self.open_gates()
            share = torch.where(forced, open_chance(self.gate, self.gate_kind), 0.0)
            share, forced = (expand_gates(t, self.layout) for t in (share, forced))
            self.weight.copy_(torch.where(forced, self.weight * share, folded))
        low, high = gate_bounds(self.gate_kind)
        self.gate.copy_(torch.where(is_open, high, low))
        self.weight.copy_(self.eval_weight())
        self._set_frozen(True)

    def thaw(self) -> None:
        """Let frozen gates train again."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen = frozen
        self.gate.requires_grad_(not frozen)
        if frozen:
            self.gate.grad = None

    def reset_parameters(self) -> None:
        """Initialise the weight as the dense layer does; thaw the gates, set them to ``init``."""
        super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue]
        if "gate" in self._parameters:
            nn.init.constant_(self.gate, initial_gate(self.gate_init, self.gate_kind))
            self.thaw()

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.frozen else ""
        block = "x".join("full" if side is None else str(side) for side in self.gate_block)
        return f"{super().extra_repr()}, block={block}, gate={self.gate_kind}{frozen}"

    def check_state(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        """Raise ``ValueError`` where a state dict holds gates that do not fit the layer."""
        name = prefix[:-1] or "the model"
        kind = metadata.get("gate_kind", self.gate_kind)
        if kind != self.gate_kind:
            raise ValueError(
                f"{name}: the state holds gates of kind {kind!r}, the layer's are "
                f"{self.gate_kind!r}"
            )
        gate = state_dict.get(f"{prefix}gate")
        if gate is None:
            if f"{prefix}values" in state_dict:
                raise ValueError(
                    f"{name}: the state is that of a sparse layer, the layer is gated; call "
                    "sgtriton.sparsify first, or sgtriton.load with a file"
                )
            return
        block = tuple(metadata.get("gate_block", self.layout.block))
        if block != self.layout.block:  # other blocks can give a gate of the same shape
            raise ValueError(
                f"{name}: the state holds gates of block {block}, the layer's is "
                f"{self.layout.block}"
            )
        if gate.shape != self.gate.shape:
            raise ValueError(
                f"{name}: the state's gate has shape {tuple(gate.shape)}, the layer's (block "
                f"{self.gate_block}) {tuple(self.gate.shape)}"
            )
        if gate.device.type != "meta" and torch.isnan(gate).any():
            raise ValueError(f"{name}: gates must be numbers, the state's gate holds NaN")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # The clipped value is what every reader sees, so that writing it changes no result; `.data`
        # leaves the version counter alone, which a backward pass in between would trip over.
        self.gate.data.clamp_(*gate_bounds(self.gate_kind))
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            own = destination._metadata.setdefault(prefix[:-1], {})
            own.update(
                gate_kind=self.gate_kind, gate_block=self.layout.block, gate_frozen=self.frozen
            )

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.check_state(state_dict, prefix, local_metadata)
        key, frozen = f"{prefix}gate", self.frozen
        if key in state_dict:
            gate = state_dict[key] = state_dict[key].float()
            # a plain dict does not say; frozen gates stay so if those that come are decided too
            frozen = local_metadata.get("gate_frozen", frozen and self.decided(gate))
        elif f"{prefix}weight" in state_dict:  # a dense checkpoint
            device = state_dict[f"{prefix}weight"].device
            first = initial_gate(self.gate_init, self.gate_kind)
            state_dict[key] = torch.full_like(self.gate, first, device=device)
            frozen = False
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._set_frozen(frozen)

    def decided(self, gate: torch.Tensor) -> bool:
        """Whether each of these values is one that frozen gates have; waits for the device."""
        low, high = gate_bounds(self.gate_kind)
        bounds = [torch.full_like(gate, bound) for bound in (low, high)]
        # a file may hold a bound rounded otherwise
        at_one = torch.stack([torch.isclose(gate, b, rtol=1e-6, atol=0.0) for b in bounds])
        return bool(at_one.any(0).all())

    def _apply(self, fn, recurse=True):
        gate = self.gate

        def keep_gates_fp32(t):
            out = fn(t)
            if (t is gate or t is gate.grad) and out.dtype != torch.float32:
                return t.to(device=out.device)
            return out

        return super()._apply(keep_gates_fp32, recurse)

    def __setstate__(self, state):
        super().__setstate__(state)
        clipping.track(self)  # a copy, or a module that came out of a pickle


class GatedLinear(GatedModule, nn.Linear):
    """``x @ (weight * b(gate))^T + bias``.

    Args:
        in_features, out_features, bias, device, dtype: as for ``torch.nn.Linear``.
        block: ``(bn, bk)`` weights (out, in) that one gate covers; ``None`` is the whole dimension.
        gate: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        init: first value of the gates, in (0.5, 1]; of ``hard_concrete`` gates the chance that one
            is drawn as exactly 1, in [0.7, 1].

    Raises:
        ValueError: a block, gate kind or ``init`` that is not allowed.
    """

    dense_type = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block: Block = (32, 32),
        gate: str = "threshold",
        init: float = 0.9,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        check_gate_options(block, gate, init)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.init_gates(block, gate, init)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check_input(input)
        kind, seed = self._draw()
        return gated_linear(
            input,
            self.weight,
            self.gate.detach() if self.frozen else self.gate,
            self.bias,
            self.gate_block,
            kind=kind,
            seed=seed,
            reopen=self.reopens,
        )


class _GatedConv(GatedModule):
    def __init__(
        self,
        *args: Any,
        block: Block = (32, 32),
        gate: str = "threshold",
        init: float = 0.9,
        **kwargs: Any,
    ) -> None:
        check_gate_options(block, gate, init)
        super().__init__(*args, **kwargs)
        self.init_gates(block, gate, init)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.check_input(input)
        return self._conv_forward(input, self.gated_weight(), self.bias)  # pyright: ignore


class GatedConv1d(_GatedConv, nn.Conv1d):
    """``torch.nn.Conv1d`` with a gated weight; see :class:`GatedConv2d`."""

    dense_type = nn.Conv1d


class GatedConv2d(_GatedConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with a gated weight.

    Args:
        *args, **kwargs: as for ``torch.nn.Conv2d``.
        block: ``(bn, bk)`` output and input channels that one gate covers, tap by tap and group by
            group; ``(1, None)`` is one gate per filter, ``(None, 1)`` one per input channel and
            group.
        gate: ``"threshold"`` | ``"bernoulli"`` | ``"hard_concrete"``.
        init: first value of the gates, in (0.5, 1]; of ``hard_concrete`` gates the chance that one
            is drawn as exactly 1, in [0.7, 1].

    Raises:
        ValueError: a block, gate kind or ``init`` that is not allowed.
    """

    dense_type = nn.Conv2d


_OWN_NAMES = (
    "gate_kind", "gate_block", "gate_init", "frozen", "sync_noise", "reopen_every", "reopens",
    "_steps_done",
)  # fmt: skip

# What a gated or sparse layer adds to a layer; one that has such an attribute cannot become ours.
ADDED_NAMES = (
    "gate", *_OWN_NAMES,
    "values", "crow", "col", "ccol", "row", "perm", "row_order", "bits",
    "merged_values", "merged_crow", "merged_col", "merged_ccol", "merged_row", "merged_perm",
    "merged_row_order", "compact_weight", "compact_cols", "compact_rows",
    "dense_weight", "wide_weight",
    "weight_shape", "serve_block", "trainable", "forms", "reason", "expected", "measured",
    "_dense_copy", "_steps", "_one_form", "_matrices", "_shapes",
)  # fmt: skip

GATED_TYPES: dict[type[nn.Module], type[GatedModule]] = {
    gated.dense_type: gated for gated in (GatedLinear, GatedConv1d, GatedConv2d)
}


def _autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def check_gate_options(block: Block, kind: str, init: float) -> None:
    """Raise ``ValueError`` where a gated layer cannot be made of these."""
    gate_layout((1, 1), block)
    check_gate_kind(kind)
    initial_gate(init, kind)


def check_reopen_every(steps: int, kind: str) -> None:
    """Raise ``ValueError`` unless gates of ``kind`` can reopen once in so many steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"reopen_every must be a number of steps >= 1, got {steps!r}")
    if steps > 1 and kind != "threshold":
        raise ValueError(f"reopen_every > 1 is for threshold gates, got {kind!r}: drawn ones open")


def gate_layer(
    layer: nn.Module,
    block: Block,
    kind: str,
    init: float,
    sync_noise: bool = False,
    reopen_every: int = 1,
) -> None:
    """Turn a dense layer into the gated layer of its type, in place."""
    layer.__class__ = GATED_TYPES[type(layer)]
    assert isinstance(layer, GatedModule)
    layer.init_gates(block, kind, init)
    layer.sync_noise, layer.reopen_every = sync_noise, reopen_every


@torch.no_grad()
def ungate_layer(layer: GatedModule, fold: bool) -> None:
    """Turn a gated layer back into the dense layer it was, in place; a frozen one folds anyway."""
    if fold or layer.frozen:  # what momentum did to closed weights since freezing is no training
        layer.weight.copy_(layer.eval_weight())
    clipping.untrack(layer)
    del layer.gate
    for name in _OWN_NAMES:
        layer.__dict__.pop(name, None)
    layer.__class__ = layer.dense_type  # pyright: ignore[reportAttributeAccessIssue]


def check_numbers(name: str, layer: GatedModule) -> None:
    """Raise ``ValueError`` if a gate of the layer called ``name`` is NaN; waits for the device."""
    if layer.gate.device.type == "meta" or not torch.isnan(layer.gate).any():
        return
    first = torch.isnan(layer.gate).nonzero()[0].tolist()
    raise ValueError(f"{name or 'the model'}: gates must be numbers, got NaN at gate{first}")


def gated_layers(model: nn.Module) -> Iterator[GatedModule]:
    """The gated layers of ``model``, each once."""
    for _, layer in named_gated_layers(model):
        yield layer


def named_gated_layers(model: nn.Module) -> Iterator[tuple[str, GatedModule]]:
    """``(qualified name, layer)`` of the gated layers of ``model``, each once."""
    for name, module in model.named_modules():
        if isinstance(module, GatedModule):
            yield name, module
