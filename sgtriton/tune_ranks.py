"""Several processes that tune together: one searches, all take what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sgtriton_kernels.lookup import full_key

from .products import Work


def in_group() -> bool:
    """Whether a process group exists."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def agreed(collect: Callable[[], list[Work]]) -> list[Work]:
    """This rank's work, which is that of all ranks; called by all of them.

    Args:
        collect: gives it. An error of one rank is raised on it and told to the others, so that
            none waits for a rank that is gone.

    Raises:
        ValueError: on all ranks, where one of them cannot tune, or would tune something else.
    """
    error, work, mine = None, [], ""
    try:
        work = collect()
        # a name is good for the keys that it was found for
        mine = [full_key(item.cell, item.device) for item in work]
    except Exception as failure:
        error, mine = failure, f"{type(failure).__name__}: {failure}"
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, mine)
    if error is not None:
        raise error
    for rank, theirs in enumerate(ranks):
        if isinstance(theirs, str):
            raise ValueError(f"rank {rank} cannot tune: {theirs}")
        if theirs != ranks[0]:
            raise ValueError(
                "all ranks must tune the same products on the same kind of device: "
                f"{_difference(ranks[0], rank, theirs)}"
            )
    return work


def _difference(first: list[dict[str, Any]], rank: int, theirs: list[dict[str, Any]]) -> str:
    if len(first) != len(theirs):
        return f"rank 0 has {len(first)} products, rank {rank} has {len(theirs)}"
    i = next(i for i, pair in enumerate(zip(first, theirs, strict=True)) if pair[0] != pair[1])
    name = next(name for name, value in first[i].items() if theirs[i].get(name) != value)
    return f"of product {i}, {name} is {first[i][name]} on rank 0, {theirs[i][name]} on rank {rank}"


def send_outcomes(outcomes: Sequence[tuple[str, str | None]]) -> None:
    """Tell the other ranks what rank 0 found.

    Args:
        outcomes: by product: its status to them, and what rank 0 takes; ``None`` where it decided
            nothing.
    """
    torch.distributed.broadcast_object_list([list(outcomes)], src=0)


def receive_outcomes() -> list[tuple[str, str | None]]:
    """What :func:`send_outcomes` was given; waits for it."""
    box: list[Any] = [None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
