"""Processes that compile: what goes wrong in one of them stays there."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from sgtriton_kernels.tiles import BsrTile

from sgtriton import compilers
from sgtriton.compilers import NO_TIME, Built, Compilers
from sgtriton.launches import Launch, bsr_linear_launches


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(compilers, "_built", {})


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Launches of kernels whose module does what it is told when it is imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def plant(name, code):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        return "sm_80", Launch(name, "kernel", {}, {}, num_warps=4, num_stages=2)

    return plant


def test_what_fails_is_said_in_a_line_and_the_process_goes_on(planted):
    work = [
        planted("planted_loud", "print('x' * 100000)\nraise RuntimeError('first\\nthe last line')"),
        planted("planted_silent", "raise RuntimeError"),
    ]
    with Compilers(1) as found:
        assert found.build(work) == [
            "it does not compile: the last line",
            "it does not compile: RuntimeError",
        ]
        assert len(found._idle) == 1


def test_a_compiler_that_dies_takes_nothing_with_it(planted):
    work = [
        planted("planted_end", "import os\nos._exit(7)"),
        planted("planted_after", "raise RuntimeError('as ever')"),
    ]
    with Compilers(1) as found:
        assert found.build(work) == [
            "its compiler ended with status 7",
            "it does not compile: as ever",
        ]


def test_a_compiler_that_dies_costs_no_time_of_the_others(planted, monkeypatch):
    """A fresh one was started in its place, which has to import PyTorch within a search."""
    with Compilers(2) as found:
        assert found.start(time.monotonic() + 120) == 2
        found.build([planted("planted_dead", "import os\nos._exit(7)")])
        assert (found.ready, found.jobs) == (1, 1)
        monkeypatch.setattr(compilers, "_Compiler", None)  # no other is made
        work = [planted(f"planted_live{i}", "raise RuntimeError('as ever')") for i in range(3)]
        assert found.build(work) == ["it does not compile: as ever"] * 3


def test_a_compiler_for_which_there_is_no_process_is_said(planted, monkeypatch):
    """The error ended the whole search."""

    def refuse(*given, **options):
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(compilers.subprocess, "Popen", refuse)
    with Compilers(1) as found:
        assert found.build([planted("planted_none", "")]) == [
            "its compiler did not start: Resource temporarily unavailable"
        ]
        assert found.jobs == 1


def test_a_compiler_that_hangs_is_ended(planted):
    work = [
        planted("planted_hang", "import time\ntime.sleep(600)"),
        planted("planted_next", "raise RuntimeError('as ever')"),
    ]
    start = time.monotonic()
    with Compilers(1, timeout=1.5) as found:
        assert found.build(work)[0] == "compiling took longer than 1.5 s"
    assert time.monotonic() - start < 250  # far from the 600
    assert not any("planted_hang" in launch for _, launch in compilers._built)


def test_what_has_no_time_left_is_not_compiled(planted):
    work = [planted("planted_late", "import time\ntime.sleep(600)")]
    with Compilers(1) as found:
        assert found.build(work, deadline=time.monotonic() - 1) == [NO_TIME]
        assert found._idle == []  # nothing was started
        assert found.build(work, deadline=time.monotonic() + 0.01) == [NO_TIME]
    assert compilers._built == {}


def test_time_without_an_end_is_waited_for_like_any_other(planted, monkeypatch):
    """No clock holds it: the thread that ends a late process failed before it had begun."""
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with Compilers(1) as found:
        assert found.start(float("inf")) == 1
        work = [planted("planted_endless", "raise RuntimeError('as ever')")]
        assert found.build(work, deadline=float("inf")) == ["it does not compile: as ever"]
    assert failed == []


def test_what_was_started_ahead_is_there_when_it_is_asked(planted, monkeypatch):
    with Compilers(2) as found:
        assert found.start(time.monotonic() + 120) == found.ready == found.jobs == 2
        monkeypatch.setattr(compilers, "_Compiler", None)  # no other is made
        work = [planted(f"planted_{i}", f"raise RuntimeError('{i}')") for i in "abc"]
        assert found.build(work) == [f"it does not compile: {i}" for i in "abc"]
        assert found.ready == 2
        started = [compiler._process for compiler in found._idle]
    assert all(process.poll() is not None for process in started)


def test_processes_that_do_not_start_in_time_are_ended():
    with Compilers(2) as found:
        assert found.start(time.monotonic() - 1) == found.ready == 0


def test_an_interrupt_ends_the_processes(planted):
    work = [
        planted("planted_first", "raise RuntimeError('first')"),
        planted("planted_stuck", "import time\ntime.sleep(600)"),
    ]

    def interrupt(done, total):
        raise KeyboardInterrupt

    found = Compilers(2, timeout=300)
    with pytest.raises(KeyboardInterrupt):
        found.build(work, on_built=interrupt)
    stop = time.monotonic() + 100
    while found._busy and time.monotonic() < stop:
        time.sleep(0.1)
    assert not found._busy


def test_the_users_script_is_not_run_again(tmp_path):
    (tmp_path / "planted_script_kernel.py").write_text("raise RuntimeError('seen')")
    script = tmp_path / "script.py"
    script.write_text(
        "from sgtriton.compilers import Compilers\n"
        "from sgtriton.launches import Launch\n"
        "print('run')\n"
        "work = [('sm_80', Launch('planted_script_kernel', 'kernel', {}, {}, 4, 2))]\n"
        "with Compilers(1) as found:\n"
        "    print(*found.build(work))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.splitlines() == ["run", "it does not compile: seen"], done.stderr


@pytest.mark.parametrize(("change", "name"), [({"jobs": 0}, "jobs"), ({"timeout": 0}, "timeout")])
def test_bad_settings_are_refused(change, name):
    with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
        Compilers(**change)


@pytest.mark.compiles
def test_a_launch_is_compiled_once_for_a_target():
    tile = BsrTile(32, 32, 32, 3, 4)
    one, same = (
        bsr_linear_launches("fwd", torch.float16, (32, 32), m, 320, 320, 20, tile)[0]
        for m in (64, 100)
    )
    calls = []
    with Compilers(2) as found:
        built = found.build(
            [("sm_80", one), ("sm_90", one), ("sm_80", same)],
            on_built=lambda *numbers: calls.append(numbers),
        )
    assert built[0] is built[2]
    assert {type(b) for b in built} == {Built}
    assert built[0].instruction == "mma.sync"
    assert built[0].buffers == (2, 2)
    assert built[0].spills == 0 < built[0].shared
    assert len(compilers._built) == 2
    assert len(calls) == 2
    assert calls[-1] == (3, 3)
    # nothing is started for what is known
    with Compilers(1) as again:
        assert again.build([("sm_90", one)]) == [built[1]]
        assert again._idle == []
