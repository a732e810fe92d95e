"""Two processes (gloo) that tune together: rank 0 searches, the other takes its word."""

import os

import pytest
import torch
from sgtriton_kernels import lookup
from sgtriton_kernels.records import cache_folder
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

import sgtriton
from sgtriton import tuning
from sgtriton.search import NoneRight
from sgtriton.tune_report import TuneInterrupted

X = torch.zeros(9, 64)


def make_model(layers: int = 2, outputs: int = 64) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers - 1)), nn.Linear(64, outputs))
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight[: 16 * (i + 1)] = 0  # another number of blocks, so another product
    return sgtriton.sparsify(model.eval(), block=(16, 16), form="sparse")


def finds_unpack(problem, present, others, until, say, reasoned):
    """As if multiplying with the zeros filled in were the fastest."""
    unpack = next(candidate for candidate in others if candidate.name == "unpack")
    return tuning.Found(unpack, 1.0, 2.0, 2.0, 3, {})


def finds_nothing_right(problem, present, others, until, say, reasoned):
    return NoneRight({candidate.name: "wrong" for candidate in others})


def never(*args):
    raise AssertionError("this rank must not search")


def stops(error: type[BaseException]):
    """Finds something for one product, then ends."""
    found = []

    def search(*args):
        if found:
            raise error("planted")
        found.append(1)
        return finds_unpack(*args)

    return search


def fresh(folder: str, rank: int, name: str, search) -> None:
    """A cache of this rank's own with nothing in it; ``search`` is that of rank 0."""
    os.environ["SGTRITON_CACHE_DIR"] = f"{folder}/{name}{rank}"
    lookup._told.clear()
    lookup.forget()
    tuning.search = search if rank == 0 else never


def tune(model: nn.Module, **options) -> sgtriton.tuning.TuneReport:
    return sgtriton.tune(model, X, 30, distributed=True, **options)


def check_others_take_what_rank_0_found(folder: str, rank: int) -> None:
    fresh(folder, rank, "found", finds_unpack)
    model = make_model()
    report = tune(model)
    assert [row.choice.candidate.name for row in report.rows] == ["unpack"] * 2
    assert [row.status for row in report.rows] == ["changed" if rank == 0 else "cached"] * 2
    found = cache_folder()
    assert found is not None
    assert len(list(found.glob("*.json"))) == 2
    # the files alone say it, too
    fresh(folder, rank, "found", never)
    assert [row.status for row in tune(model).rows] == ["cached"] * 2
    assert {row.choice.source for row in tune(model).rows} == {"cache"}


def check_a_stop_of_rank_0_leaves_nobody_waiting(folder: str, rank: int) -> None:
    for error, raised in ((KeyboardInterrupt, TuneInterrupted), (KeyError, KeyError)):
        fresh(folder, rank, error.__name__, stops(error))
        if rank == 0:
            with pytest.raises(raised):
                tune(make_model())
        else:
            rows = tune(make_model()).rows
            assert [row.status for row in rows] == ["cached", "not reached"]
            assert rows[0].choice.candidate.name == "unpack"


def check_others_hear_that_nothing_is_right(folder: str, rank: int) -> None:
    fresh(folder, rank, "wrong", finds_nothing_right)
    assert [row.status for row in tune(make_model()).rows] == ["none right"] * 2


def check_ranks_that_differ_all_raise(folder: str, rank: int) -> None:
    fresh(folder, rank, "differ", never)
    with pytest.raises(ValueError, match="rank 0 has 2 products, rank 1 has 3"):
        tune(make_model(layers=2 + rank))
    with pytest.raises(ValueError, match="of product 1, N is 64 on rank 0, 48 on rank 1"):
        tune(make_model(outputs=64 - 16 * rank))
    # what one of them cannot do
    dense = nn.Linear(64, 64)
    message = "no block-sparse layer" if rank else "rank 1 cannot tune: .*no block-sparse"
    with pytest.raises(ValueError, match=message):
        tune(dense if rank else make_model())
    broken = make_model()
    if rank == 0:
        broken[1].register_forward_pre_hook(lambda *unused: 1 / 0)
    with pytest.raises(ValueError if rank else ZeroDivisionError, match="division by zero"):
        tune(broken)
    assert not os.path.exists(os.environ["SGTRITON_CACHE_DIR"])


def check_nothing_is_tuned_unasked(folder: str, rank: int) -> None:
    fresh(folder, rank, "unasked", never)
    with pytest.raises(ValueError, match="pass distributed=True on all ranks"):
        sgtriton.tune(make_model(), X)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    check_nothing_is_tuned_unasked(folder, rank)
    check_others_take_what_rank_0_found(folder, rank)
    check_a_stop_of_rank_0_leaves_nobody_waiting(folder, rank)
    check_others_hear_that_nothing_is_right(folder, rank)
    check_ranks_that_differ_all_raise(folder, rank)
    distributed.barrier()
    distributed.destroy_process_group()


def test_one_rank_searches_and_all_take_what_it_found(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn(worker, (str(tmp_path),), nprocs=2)


def test_without_a_group_distributed_changes_nothing(cache, monkeypatch):
    monkeypatch.setattr(tuning, "search", finds_unpack)
    assert {row.status for row in tune(make_model()).rows} == {"changed"}
