"""Records of what was tuned: whatever a file holds, it can only be slower without it."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_exact, integers
from sgtriton_kernels import BlockSparse, bsr_linear, lookup, records
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.candidates import candidates
from sgtriton_kernels.lookup import analytic, choose, full_key
from sgtriton_kernels.records import file_name, read_record

from sgtriton import tune_cache
from sgtriton.tune_cache import sweep, write_record

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def product():
    """A matrix, rows, their product, and its cell."""
    open = torch.rand(12, 14) < 0.5
    dense = integers(192, 224) * open.repeat_interleave(16, 0).repeat_interleave(16, 1)
    w, x = BlockSparse.from_dense(dense, (16, 16), open=open), integers(20, 224)
    return w, x, x @ dense.T, cell_of("fwd", w, "torch", x)


def other_than_reasoned(cell):
    return next(c.name for c in candidates(cell) if c != analytic(cell).candidate)


def test_what_is_written_is_read(cache, product):
    *_, cell = product
    key = full_key(cell, CPU)
    assert read_record(cache, key) is None
    assert write_record(cache, key, "loop", {"ms": 1.5}) is None
    found = read_record(cache, key)
    assert found is not None
    assert (found["candidate"], found["ms"]) == ("loop", 1.5)
    (file,) = cache.iterdir()
    assert file.name == file_name(key)
    assert len(file.name) < 60


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"SGTRITON_CACHE_DIR": "/a"}, "/a/tune"),
        ({"SGTRITON_CACHE_DIR": "", "XDG_CACHE_HOME": "/b"}, "/b/sgtriton/tune"),
        ({"SGTRITON_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/sgtriton/tune"),
    ],
)
def test_folder_of_the_cache(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert records.cache_folder() == Path(folder)


def damages(data: bytes, key: dict, rng: random.Random):
    """What may happen to a record, with a name for each."""
    yield from ((f"cut at {n}", data[:n]) for n in rng.sample(range(len(data)), 60))
    for i in range(120):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield f"flip {i}", bytes(flipped)
    yield "empty", b""
    yield "zeros", bytes(len(data))
    yield "noise", rng.randbytes(500)
    yield "huge", data + b" " * (1 << 20)
    yield "deep", b"[" * 10000
    yield "not utf-8", data.replace(b"torch", b"\xff\xfe")
    yield "twice", data + data
    whole = json.loads(data)
    for field in (*whole, *whole["key"]):
        for value in (None, -1, 1e308, True, "x" * 4000, [], {}, "../../etc", "\x00", float("nan")):
            changed = json.loads(data)
            place = changed if field in changed else changed["key"]
            place[field] = value
            yield f"{field} {value!r:.20}", json.dumps(changed).encode()
            del place[field]
            yield f"no {field}", json.dumps(changed).encode()
    for value in ("null", "[]", "1", '"text"', "{}", '{"format": 1}'):
        yield value, value.encode()
    yield "foreign key", json.dumps(whole | {"key": key | {"device": "another"}}).encode()
    yield "longer key", json.dumps(whole | {"key": key | {"more": 1}}).encode()


def test_damaged_and_hostile_records_change_nothing_but_speed(cache, product):
    w, x, y, cell = product
    key, name = full_key(cell, CPU), other_than_reasoned(cell)
    assert write_record(cache, key, name, {}) is None
    path = cache / file_name(key)
    data = path.read_bytes()
    allowed = {c.name for c in candidates(cell)}
    for what, damaged in damages(data, key, random.Random(0)):
        path.write_bytes(damaged)
        lookup.forget()
        assert choose(cell, CPU).candidate.name in allowed, what
        assert_exact(what, bsr_linear(x, w, impl="torch"), y)


def test_number_of_another_kind_is_another_key(cache, product):
    """1 is True and 1.0 in Python: JSON of another writer must not pass for ours."""
    *_, cell = product
    key = full_key(cell, CPU)
    write_record(cache, key, "loop", {})
    path = cache / file_name(key)
    record = json.loads(path.read_text())
    for field, value in (("aligned", 1), ("threads", float(key["threads"]))):
        path.write_text(json.dumps(record | {"key": key | {field: value}}))
        assert read_record(cache, key) is None


def make_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make",
    [
        make_pipe, Path.mkdir, lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("missing"),
    ],
    ids=["pipe", "folder", "loop", "device", "dangling"],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_what_is_no_file_is_no_record(make, cache, product):
    """Opening a pipe waited for a writer for ever."""
    w, x, y, cell = product
    cache.mkdir(parents=True)
    make(cache / file_name(full_key(cell, CPU)))
    assert choose(cell, CPU) == analytic(cell)
    assert_exact("y", bsr_linear(x, w, impl="torch"), y)


def test_folder_that_is_a_file_is_no_cache(cache, product):
    *_, cell = product
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("")
    assert choose(cell, CPU) == analytic(cell)
    assert "cannot be written" in str(write_record(cache, full_key(cell, CPU), "loop", {}))
    sweep(cache)


def test_folder_that_is_removed_meanwhile_is_made_again(cache, product, monkeypatch):
    *_, cell = product
    real, times = tune_cache.replace_file, []

    def removing(path, data):
        times.append(1)
        if len(times) == 1:
            path.parent.rmdir()
        real(path, data)

    monkeypatch.setattr(tune_cache, "replace_file", removing)
    assert write_record(cache, full_key(cell, CPU), "loop", {}) is None
    assert len(times) == 2
    assert read_record(cache, full_key(cell, CPU))


def test_writers_side_by_side_lose_no_record(cache):
    keys = [{"op": "x", "rows": i} for i in range(40)]

    def write(seed):
        for key in random.Random(seed).sample(keys, len(keys)):
            assert write_record(cache, key, f"by {seed}", {}) is None

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in keys:
        record = read_record(cache, key)
        assert record is not None
        assert record["candidate"].startswith("by ")
    assert len(list(cache.iterdir())) == len(keys)


def test_cache_is_swept(cache, monkeypatch):
    monkeypatch.setattr(tune_cache, "_MOST_FILES", 5)
    keys = [{"op": "x", "rows": i} for i in range(9)]
    for age, key in enumerate(keys):
        write_record(cache, key, "a", {})
        at = time.time() - 100 * age
        os.utime(cache / file_name(key), (at, at))
    stray = cache / ".a.json.1-2-3.tmp"
    stray.write_text("half")
    os.utime(stray, (0, 0))
    mine = cache / "note.txt"
    mine.write_text("the user's")
    sweep(cache)
    assert [bool(read_record(cache, key)) for key in keys] == [True] * 5 + [False] * 4
    assert not stray.exists()
    assert mine.exists()


def test_another_process_reads_what_this_one_wrote(cache, product, tmp_path):
    """Cold and warm process compute the same, and the warm one takes the record."""
    w, x, _, cell = product
    write_record(cache, full_key(cell, CPU), "loop", {})
    torch.save((w.values, w.crow, w.col, w.shape, x), tmp_path / "in.pt")
    code = """
import sys, torch
from sgtriton_kernels import BlockSparse, bsr_linear
from sgtriton_kernels.bsr_choice import cell_of
from sgtriton_kernels.lookup import choose
values, crow, col, shape, x = torch.load(sys.argv[1] + "/in.pt")
torch.set_num_threads(int(sys.argv[2]))
w = BlockSparse(values, crow, col, tuple(shape))
print(choose(cell_of("fwd", w, "torch", x), x.device).candidate.name)
torch.save(bsr_linear(x, w, impl="torch"), sys.argv[1] + "/out.pt")
"""
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "kernels")},
    )  # fmt: skip
    assert child.stdout.strip() == "loop", child.stderr
    lookup.forget()
    assert torch.equal(torch.load(tmp_path / "out.pt"), bsr_linear(x, w, impl="torch"))
