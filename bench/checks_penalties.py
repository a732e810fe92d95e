"""Checks of the ops that read gates alone: penalties with their statistics, packed bits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sgtriton_kernels import gate_layout, gate_penalties, gate_penalties_ref
from sgtriton_kernels.gate_bits import pack_gates, unpack_gates
from sgtriton_kernels.kinds import gate_bounds, open_chance, open_gates

from .checks_gates import KINDS, draw_seed, multipliers, some_gates
from .judge import Case, Check, Place, Results, SkippedError, judged


def gate_penalties_checks(place: Place) -> Iterator[Check]:
    """``gate_penalties``: value, gradients and statistics of each kind and of all together."""
    shapes = [(3, 5), (7,), (0,), (1,), (1, 2, 3, 2), (9,), (1025,), (2, 130)]
    each = ["threshold", "hard_concrete", "bernoulli", "hard_concrete"] * 2
    for kinds in (each, ["bernoulli"], ["threshold"], ["hard_concrete"]):
        name = kinds[0] if len(kinds) == 1 else "mixed, held, flips"
        kinds = kinds if len(kinds) > 1 else kinds * len(shapes)
        yield Check(
            "gate_penalties", name, "float32", f"{len(shapes)} tensors",
            functools.partial(judged, _gate_penalties, place, shapes, kinds),
        )  # fmt: skip


def pack_gates_checks(place: Place) -> Iterator[Check]:
    """``pack_gates``: the bits of every gate, and none beyond."""
    for (kind, drawn), shape in itertools.product(KINDS[:2], [(70, 130), (1, 31), (0, 5), (5, 1)]):
        yield Check(
            "pack_gates", kind + " drawn" * drawn, "float32", "x".join(map(str, shape)),
            functools.partial(judged, _pack_gates, place, shape, kind, drawn),
        )  # fmt: skip


def _gate_penalties(place: Place, shapes: list[tuple[int, ...]], kinds: list[str]) -> Case:
    device = place.device
    layouts = [gate_layout(shape if len(shape) > 1 else (1, *shape), (1, 1)) for shape in shapes]
    gates = [
        some_gates(layout, kind, device).view(shape)
        for layout, kind, shape in zip(layouts, kinds, shapes, strict=True)
    ]
    count = sum(gate.numel() for gate in gates)
    cover = torch.randint(1, 9, (count,)).float().to(device)
    lambdas = torch.tensor([0.3, 0.7], device=device)
    holds = [i % 3 == 1 for i in range(len(gates))] if len(set(kinds)) > 1 else False
    options = {"kinds": kinds, "hold_closed": holds}
    others = [gate.flip(0) for gate in gates]
    previous = gate_penalties(others, cover, lambdas, kinds=kinds, impl=place.impl).mask
    exact, rounded = ("density", "undecided", "flips", "mask"), ("penalty", "mean")

    def run() -> Results:
        leaves = [gate.clone().requires_grad_() for gate in gates]
        out = gate_penalties(leaves, cover, lambdas, previous, impl=place.impl, **options)
        grads = torch.autograd.grad(out.penalty, leaves)
        found = {name: getattr(out, name) for name in exact}
        found |= {name: getattr(out, name).detach().float() for name in rounded}
        return found | {"dgates": torch.cat([grad.view(-1) for grad in grads])}

    def wanted() -> Results:
        leaves = [gate.cpu().double().requires_grad_() for gate in gates]
        bimodal, l1 = lambdas.double().tolist()
        out = gate_penalties_ref(leaves, cover.cpu(), bimodal, l1, previous.cpu(), **options)
        grads = torch.autograd.grad(out.penalty, leaves, allow_unused=True)
        found = {name: getattr(out, name).detach().to(device) for name in (*exact, *rounded)}
        flat = [
            (torch.zeros(gate.shape) if grad is None else grad).double().view(-1)
            for gate, grad in zip(gates, grads, strict=True)
        ]
        return found | {"dgates": torch.cat(flat).to(device)}

    def plain() -> Results:
        leaves = [gate.clone().requires_grad_() for gate in gates]
        total, mean, covers = torch.zeros((), device=device), torch.zeros((), device=device), 0
        parts = cover.split([gate.numel() for gate in gates])
        hold = holds if isinstance(holds, list) else [holds] * len(gates)
        for gate, c, kind, held in zip(leaves, parts, kinds, hold, strict=True):
            flat = gate.reshape(-1)
            if held:
                flat = torch.where(open_gates(flat, kind), flat, flat.detach())
            low, high = gate_bounds(kind)
            g = open_chance(flat + (flat.clamp(low, high) - flat).detach(), kind)
            if kind != "hard_concrete":
                g = flat + (flat.clamp(low, high) - flat).detach()
                total = total + lambdas[0] * (c * g * (1 - g)).sum()
            total, mean = total + lambdas[1] * (c * g).sum(), mean + (c * g).sum()
            covers += c.sum()
        grads = torch.autograd.grad(total, leaves)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        return {"penalty": total.detach(), "mean": mean.detach() / covers, "dgates": flat}

    return Case(run, wanted, plain, (*gates, cover, lambdas, previous))


def _pack_gates(place: Place, shape: tuple[int, int], kind: str, drawn: bool) -> Case:
    if place.impl == "torch":
        raise SkippedError("a Triton kernel only")
    layout = gate_layout(shape, (1, 1))
    gate, seed = some_gates(layout, kind, place.device), draw_seed(drawn, place.device)

    def wanted() -> Results:
        z, _ = multipliers(layout, gate, kind, seed, place.impl)
        columns = 32 * -(-shape[1] // 32)
        return {"open": F.pad(z > 0, (0, columns - shape[1]))}

    def run() -> Results:
        bits = pack_gates(gate, kind, seed)
        return {"open": unpack_gates(bits, 32 * bits.shape[1])}

    return Case(run, wanted, dict, (gate,))
