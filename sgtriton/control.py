"""Drive gates to a stated sparsity while the network trains, or penalise them by fixed lambdas.

The controller keeps one multiplier ``mu`` for the whole model. Its penalty is ``mu`` times the sum
of all gates, weighted by the weights they cover. ``mu`` is a proportional and an integral part of
the density's excess over the schedule: dual ascent, which starts from 0 again when the density
crosses the schedule (Gallego-Posada et al., arXiv:2208.04425), damped as in nuPI (Sohrabi et al.,
arXiv:2406.04558), and below 0 while the density is clearly too low. The schedule is a cubic ramp
(Zhu & Gupta, arXiv:1710.01878). The unit of ``mu`` is what makes the penalty's gradient as large as
the gates' own, measured before the ramp starts, so that it depends neither on the loss's scale nor
on that of the weights, nor on how flat the chance of a ``hard_concrete`` gate starts.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sgtriton_kernels import GatePenalties, coverage, gate_penalties
from sgtriton_kernels.kinds import open_chance
from sgtriton_kernels.penalty import mask_size
from torch import nn

from . import clipping
from .layers import GatedModule, check_numbers, named_gated_layers
from .projection import TOLERANCE, choose_open, largest_block_share, lowest_density

log = logging.getLogger(__name__)

_CHECK_EVERY = 100  # steps between looks at the statistics, which wait for the device
_FIRST_CHECK = 10

# Of the multiplier, whose unit balances the gates' own gradient; found on small trainings.
_RATE = 50.0  # units that dual ascent gains in a whole training at an excess of 1
_DAMPING = 20.0  # units at an excess of 1, at once
_CAP = 20.0  # units; beyond it the penalty drowns what the network says of its gates
_BELOW = 0.3  # closed gates are pushed up more gently than open ones down
_SLACK = 0.1  # of the target density: so far below it is good enough


@dataclass(frozen=True)
class GateStatistics:
    """What the gates looked like at the last ``penalty()``.

    Attributes:
        density: the density under control: share of open weights (``threshold``), mean gate
            weighted by coverage (``bernoulli``), expected share of weights whose gate is not 0
            (``hard_concrete``).
        open_share: share of weights whose gate is open in eval.
        undecided_share: share of weights whose gate, or the chance that it is not 0, lies in
            (0.1, 0.9).
        flips: gates that opened or closed since the last ``step()``; -1 before the first.
        target_density: where the schedule wants ``density`` to be now.
        multiplier: of the gates' sum in the penalty.
    """

    density: float
    open_share: float
    undecided_share: float
    flips: int
    target_density: float
    multiplier: float


def gate_penalty(model: nn.Module, bimodal: float = 0.0, l1: float = 0.0) -> torch.Tensor:
    """The paper's penalty with fixed lambdas, to add to the loss.

    ``bimodal * sum g (1 - g) + l1 * sum g`` over the gates of all layers, each weighted by the
    number of weights that it covers; for ``hard_concrete`` gates ``l1`` times the expected number
    of weights that are not 0.

    Args:
        model: patched model.
        bimodal: pushes gates to 0 or 1.
        l1: closes gates.

    Returns:
        ``[]`` fp32, differentiable in the gates.

    Raises:
        ValueError: a model without gates, or a lambda that is negative or not finite.
    """
    for name, value in (("bimodal", bimodal), ("l1", l1)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
    layers = list(_layers_of(model).values())
    lambdas = torch.tensor([bimodal, l1], dtype=torch.float32, device=layers[0].gate.device)
    return gate_penalties(
        [layer.gate for layer in layers],
        _coverages(layers),
        lambdas,
        kinds=[layer.gate_kind for layer in layers],
        hold_closed=[not layer.reopens for layer in layers],
    ).penalty


class SparsityController:
    """Lands a patched model on a stated sparsity.

    Add :meth:`penalty` to the loss and call :meth:`step` after the optimizer's, once per optimizer
    step, as for a learning-rate scheduler::

        controller = SparsityController(model, target=0.9, steps=epochs * len(loader))
        for x, y in loader:
            loss = criterion(model(x), y) + controller.penalty()
            loss.backward()
            optimizer.step()
            controller.step()
            optimizer.zero_grad()

    Phases, as shares of ``steps``: until ``ramp[0]`` the network trains without penalty; until
    ``ramp[1]`` the density follows a cubic ramp to the target; from there a bi-modal term decides
    the gates; at ``freeze_at`` one exact projection over all layers lands on the target and freezes
    the gates, and the rest trains what is left.

    With gradient accumulation, add ``penalty()`` to each micro-batch's loss and scale it like that
    loss. A step that a ``GradScaler`` skips may be followed by ``step()`` like any other. Under
    ``DistributedDataParallel`` pass ``find_unused_parameters=True``: frozen gates take part in no
    backward pass.

    Args:
        model: patched model, on one device.
        target: sparsity to land on, in [0, 1): share of the gated layers' weights that is dropped.
        steps: optimizer steps of the whole training.
        ramp: shares of ``steps`` at which the ramp starts and ends.
        freeze_at: share of ``steps`` at which the gates are projected and frozen.
        allow_empty: let layers lose all their blocks.

    Raises:
        ValueError: arguments out of range; a model without gates; a target that the blocks cannot
            reach, with the nearest one that they can.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float = 0.9,
        steps: int = 0,
        ramp: tuple[float, float] = (0.05, 0.5),
        freeze_at: float = 0.7,
        allow_empty: bool = False,
    ) -> None:
        if not isinstance(target, (int, float)) or not 0 <= target < 1:
            raise ValueError(f"target must be a sparsity in [0, 1), got {target}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be the number of optimizer steps, >= 1, got {steps!r}")
        try:
            start, end = ramp
            in_order = 0 <= start < end <= freeze_at <= 1
        except (TypeError, ValueError):  # no pair, or no numbers
            in_order = False
        if not in_order:
            raise ValueError(
                f"0 <= ramp[0] < ramp[1] <= freeze_at <= 1 must hold, got ramp={ramp}, "
                f"freeze_at={freeze_at}"
            )
        self.target, self.steps = float(target), steps
        self.ramp, self.freeze_at, self.allow_empty = tuple(ramp), float(freeze_at), allow_empty
        self._layers = _layers_of(model)
        layers = list(self._layers.values())
        self._check_gates()
        _check_reachable(layers, target, allow_empty)

        self._cover = _coverages(layers)
        device = self._cover.device
        self._count = 0  # steps done
        self._thawed = False  # freezes no more by itself
        self._multiplier = torch.zeros((), device=device, dtype=torch.float32)
        self._ascent = torch.zeros_like(self._multiplier)  # its part from dual ascent
        self._highest = torch.zeros_like(self._multiplier)  # multiplier so far
        self._bimodal = torch.zeros_like(self._multiplier)  # weight of the bi-modal term
        # the loss's gradient over the penalty's at mu = 1: the sum of those measured, and how many
        self._unit = torch.zeros(2, device=device, dtype=torch.float32)
        self._unit_measured = False
        self._mask: torch.Tensor | None = None  # open gates at the last step, bit-packed
        self._last: GatePenalties | None = None
        self._first_mean: torch.Tensor | None = None
        self._start_density: float | None = None
        self._penalties_since_step = 0
        self._warned = False
        clipping.watch(self)

    @property
    def frozen(self) -> bool:
        """Whether the gates are frozen."""
        return all(layer.frozen for layer in self._gated())

    @property
    def target_density(self) -> float:
        """Where the schedule wants the density to be now."""
        start, end = (share * self.steps for share in self.ramp)
        progress = min(max((self._count - start) / max(end - start, 1), 0.0), 1.0)
        first = 1.0 if self._start_density is None else self._start_density
        final = 1 - self.target
        return final + (first - final) * (1 - progress) ** 3

    @property
    def density(self) -> float:
        """The density under control at the last ``penalty()``; waits for the device."""
        return self.statistics.density

    @property
    def statistics(self) -> GateStatistics:
        """The gates at the last ``penalty()``, or now if there was none; waits for the device."""
        last = self._last or self._measure()
        return GateStatistics(
            density=self._controlled(last).item(),
            open_share=last.density.item(),
            undecided_share=last.undecided.item(),
            flips=int(last.flips),
            target_density=self.target_density,
            multiplier=self._multiplier.item(),
        )

    def penalty(self) -> torch.Tensor:
        """The penalty of this step, to add to the loss.

        Returns:
            ``[]`` fp32, differentiable in the gates; 0 once they are frozen.

        Raises:
            ValueError: the model's gates are gone (``unpatch``, ``sparsify``).
        """
        self._penalties_since_step += 1
        if self._penalties_since_step == _CHECK_EVERY + 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"penalty() was called {_CHECK_EVERY} times without step(): the controller does "
                "not advance; call controller.step() after optimizer.step()",
                stacklevel=2,
            )
        measured = self._measure()
        self._last = measured._replace(penalty=measured.penalty.detach())
        if self._first_mean is None:
            self._first_mean = measured.mean.clone()
        return self._last.penalty * 0 if self.frozen else measured.penalty

    @torch.no_grad()
    def step(self) -> None:
        """Advance the schedule, update the multiplier, freeze when it is time.

        Raises:
            ValueError: a gate is NaN (looked for every 100 steps), or the gates are gone.
        """
        self._gated()
        self._penalties_since_step = 0
        last = self._last or self._measure()
        self._count += 1
        freezes = not self._thawed and self._count >= self.freeze_at * self.steps
        short = freezes and 3 <= self._count < _FIRST_CHECK  # it ends before the first look
        if short or self._count == _FIRST_CHECK or self._count % _CHECK_EVERY == 0:
            self._check(last)
        if self.frozen:
            return
        if self._start_density is None:
            self._start_density = min(1.0, self._controlled(last).item())
        self._mask = last.mask
        self._update_multiplier(last)
        if freezes:
            self.freeze()

    @torch.no_grad()
    def optimizer_stepped(self, parameters: set[int]) -> None:
        """Average the gates' gradient next to the penalty's, while no penalty is in it.

        Called after each optimizer step, with the ids of the optimizer's parameters.
        """
        if self._count >= self.ramp[0] * self.steps and self._unit_measured:
            return
        layers = [layer for layer in self._layers.values() if isinstance(layer, GatedModule)]
        own = [layer for layer in layers if id(layer.gate) in parameters]
        grads = [layer.gate.grad for layer in own if layer.gate.grad is not None]
        if not grads or len(grads) < len(own):
            return
        push = sum(_push(layer) for layer in own)
        gradient = torch.stack([g.abs().sum() for g in grads]).sum() / push
        measured = torch.stack([gradient, torch.ones_like(gradient)])
        # a GradScaler's overflow is no measurement
        self._unit = self._unit + torch.where(gradient.isfinite(), measured, 0.0)
        self._unit_measured = True

    @torch.no_grad()
    def freeze(self) -> None:
        """Project the gates onto the target density and freeze them, whatever the schedule says.

        Afterwards each gate is exactly 0 or 1 and needs no gradient, the weights of closed blocks
        are set to 0, and neither optimizer state nor weight decay can touch the output through
        them: momentum that an optimizer still has may move a closed weight, its gate drops it.
        """
        self._check_gates()
        layers = self._gated()
        masks = choose_open(layers, 1 - self.target, self.allow_empty)
        opened = closed = 0
        for layer, mask in zip(layers, masks, strict=True):
            was_open = layer.open_gates()
            opened += int((mask & ~was_open).sum())
            closed += int((was_open & ~mask).sum())
            layer.freeze(mask)
        self._last = None
        sparsity = 1 - self._measure().density.item()
        said = (
            f"gates frozen at sparsity {sparsity:.4f}, target {self.target}: {closed} that were "
            f"open are closed, {opened} that were closed are open"
        )
        log.info(said)
        if abs(sparsity - self.target) > TOLERANCE:
            warnings.warn(f"{said}; smaller blocks land closer", stacklevel=3)

    def thaw(self) -> None:
        """Let frozen gates train again; they freeze again by :meth:`freeze` only.

        A closed gate's gradient is a sum over its weights, which freezing set to 0: blocks that
        were closed reopen only as far as the optimizer's momentum or the penalty moves them.
        """
        self._thawed = True
        for layer in self._gated():
            layer.thaw()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs, beside the model's and optimizer's states."""
        return {
            **self._schedule(),
            "count": self._count,
            "thawed": self._thawed,
            "frozen": self.frozen,
            "start_density": self._start_density,
            "multiplier": self._multiplier.item(),
            "ascent": self._ascent.item(),
            "highest": self._highest.item(),
            "bimodal": self._bimodal.item(),
            "unit": self._unit.tolist(),
            "unit_measured": self._unit_measured,
            "first_mean": None if self._first_mean is None else self._first_mean.item(),
            "mask": None if self._mask is None else self._mask.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state written by :meth:`state_dict`; load the model's state first.

        Raises:
            ValueError: fields are missing, or the state is another target's, schedule's or model's.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"the controller's state lacks {sorted(missing)}")
        for name, own in self._schedule().items():
            given = state[name]
            if (list(given) if isinstance(given, tuple) else given) != own:
                raise ValueError(
                    f"the state was written for {name}={given}, this controller has {own}"
                )
        for name, allowed in _STATE_RULES.items():
            if not allowed(state[name]):
                raise ValueError(f"the controller's state holds {name}={state[name]!r}")
        layers = self._gated()
        mask, size = state["mask"], mask_size([layer.gate for layer in layers])
        if mask is not None and mask.shape != (size,):
            raise ValueError(
                f"the state's mask has shape {tuple(mask.shape)}, this model's gates need ({size},)"
            )
        if state["frozen"]:
            for name, layer in self._layers.items():
                if not layer.decided(layer.gate):
                    raise ValueError(
                        f"{name}: the state is of frozen gates, the model's are not all decided; "
                        "load the model's state first"
                    )
        device = self._cover.device
        self._count, self._thawed = state["count"], state["thawed"]
        self._start_density, self._unit_measured = state["start_density"], state["unit_measured"]
        for name in ("multiplier", "ascent", "highest", "bimodal", "unit"):
            value = torch.tensor(state[name], device=device, dtype=torch.float32)
            setattr(self, f"_{name}", value)
        mean = state["first_mean"]
        self._first_mean = (
            None if mean is None else torch.tensor(mean, device=device, dtype=torch.float64)
        )
        self._mask = None if mask is None else mask.to(device)
        self._last = None
        for layer in layers:
            if state["frozen"] and not layer.frozen:
                layer.freeze()
            elif layer.frozen and not state["frozen"]:
                layer.thaw()

    def _schedule(self) -> dict[str, Any]:
        """What a state and a controller must share."""
        return {
            "target": self.target,
            "steps": self.steps,
            "ramp": list(self.ramp),
            "freeze_at": self.freeze_at,
            "allow_empty": self.allow_empty,
        }

    def _gated(self) -> list[GatedModule]:
        """The layers under control.

        Raises:
            ValueError: they have no gates any more.
        """
        layers = list(self._layers.values())
        if not all(isinstance(layer, GatedModule) for layer in layers):
            raise ValueError(
                "the model's gates are gone (unpatch or sparsify); the control is over"
            )
        return layers

    def _measure(self) -> GatePenalties:
        layers = self._gated()
        if layers[0].gate.device != self._cover.device:
            device = layers[0].gate.device
            self._cover, self._multiplier = self._cover.to(device), self._multiplier.to(device)
            self._highest, self._unit = self._highest.to(device), self._unit.to(device)
            self._bimodal, self._ascent = self._bimodal.to(device), self._ascent.to(device)
            self._mask = None if self._mask is None else self._mask.to(device)
        lambdas = torch.stack([self._bimodal, self._multiplier])
        return gate_penalties(
            [layer.gate for layer in layers],
            self._cover,
            lambdas,
            self._mask,
            kinds=[layer.gate_kind for layer in layers],
            hold_closed=[not layer.reopens for layer in layers],
        )

    def _controlled(self, measured: GatePenalties) -> torch.Tensor:
        """Density under control; in a model of mixed kinds the open share, which has no jumps."""
        kinds = {layer.gate_kind for layer in self._layers.values()}
        return measured.density if "threshold" in kinds else measured.mean

    def _update_multiplier(self, last: GatePenalties) -> None:
        if self._count <= self.ramp[0] * self.steps:
            return
        total, samples = self._unit.unbind()
        unit = torch.where(total > 0, total / samples, 1e-6)
        excess = (self._controlled(last) - self.target_density).float()
        slack = _SLACK * (1 - self.target)
        if self._count > self.ramp[1] * self.steps:
            window = max((self.freeze_at - self.ramp[1]) * self.steps, 1)
            met = excess.abs() <= slack
            self._bimodal = self._bimodal + met * self._highest / window
        # a little below is met: the projection opens the best of the closed gates
        push = torch.where(excess < 0, _BELOW * (excess + slack).clamp(max=0), excess)
        ascent = torch.where(self._ascent * push <= 0, 0.0, self._ascent)  # restart
        # from one unit on it also grows in proportion, to cross orders of magnitude in time; under
        # the cap it cannot wind up while the gates are still on their way
        cap = _CAP * unit
        ascent = ascent + _RATE / self.steps * push * (unit + ascent.abs())
        self._ascent = ascent.clamp(-cap, cap)
        self._multiplier = (self._ascent + _DAMPING * push * unit).clamp(-cap, cap)
        self._highest = torch.maximum(self._highest, self._multiplier)

    def _check(self, last: GatePenalties) -> None:
        mean = last.mean.item()
        if math.isnan(mean):
            self._check_gates()
        first = self._first_mean
        if self._count > _FIRST_CHECK or first is None or self.frozen:
            return
        if mean == first.item():
            warnings.warn(
                f"no gate has moved in {self._count} steps; is `gate` in the optimizer? "
                "Make it after patch(), for instance from sgtriton.param_groups(model, lr)",
                stacklevel=4,
            )

    def _check_gates(self) -> None:
        self._gated()
        for name, layer in self._layers.items():
            check_numbers(name, layer)


def unfinished(layers: Iterable[nn.Module]) -> SparsityController | None:
    """A controller that is alive, controls one of ``layers`` and has not frozen its gates."""
    ids = set(map(id, layers))
    for observer in clipping.observers():
        if isinstance(observer, SparsityController):
            own = observer._layers.values()
            ours = any(id(layer) in ids for layer in own)
            if ours and not all(layer.frozen for layer in own if isinstance(layer, GatedModule)):
                return observer
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


_STATE_RULES: dict[str, Callable[[Any], bool]] = {
    "count": lambda v: isinstance(v, int) and v >= 0,
    **dict.fromkeys(("thawed", "frozen", "unit_measured"), lambda v: isinstance(v, bool)),
    **dict.fromkeys(("start_density", "first_mean"), lambda v: v is None or _is_number(v)),
    **dict.fromkeys(("multiplier", "ascent", "highest", "bimodal"), _is_number),
    "unit": lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)),
    "mask": lambda v: v is None or (isinstance(v, torch.Tensor) and v.dtype == torch.uint8),
}


def _layers_of(model: nn.Module) -> dict[str, GatedModule]:
    layers = dict(named_gated_layers(model))
    if not layers:
        raise ValueError("the model has no gated layer; call sgtriton.patch(model) first")
    devices = sorted({str(layer.gate.device) for layer in layers.values()})
    if len(devices) > 1:
        raise ValueError(f"the gates must lie on one device, got {devices}")
    return layers


def _coverages(layers: list[GatedModule]) -> torch.Tensor:
    return torch.cat([coverage(layer.layout, layer.gate.device).reshape(-1) for layer in layers])


def _push(layer: GatedModule) -> torch.Tensor | int:
    """Sum of the gradient that a multiplier of 1 gives the gates of a layer."""
    if layer.gate_kind != "hard_concrete":
        return layer.weight.numel()
    chance = open_chance(layer.gate, layer.gate_kind)
    return (coverage(layer.layout, layer.gate.device) * chance * (1 - chance)).sum()


def _check_reachable(layers: list[GatedModule], target: float, allow_empty: bool) -> None:
    lowest = lowest_density(layers, allow_empty)
    if 1 - target < lowest - TOLERANCE:
        nearest = math.floor((1 - lowest) * 1e4) / 1e4
        raise ValueError(
            f"target={target} cannot be reached: if every layer keeps its smallest block, "
            f"{lowest:.2%} of the weights stay. The nearest sparsity that can be reached is "
            f"{nearest}; for more take smaller blocks or allow_empty=True"
        )
    error = largest_block_share(layers) / 2
    if error > TOLERANCE:
        warnings.warn(
            f"the largest gate block covers {2 * error:.1%} of the weights, so the landing can "
            f"miss target={target} by up to {100 * error:.1f} points; smaller blocks land closer",
            stacklevel=3,
        )
