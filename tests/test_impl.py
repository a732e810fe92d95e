import asyncio
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from helpers import assert_exact
from sgtriton_kernels import _impl, gate_weight, use_impl
from sgtriton_kernels._impl import resolve_impl

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.delenv("SGTRITON_IMPL", raising=False)
    monkeypatch.delenv("SGTRITON_STRICT", raising=False)
    monkeypatch.setattr(_impl, "_warned", set())


@pytest.fixture
def triton_runs(monkeypatch):
    monkeypatch.setattr(_impl, "why_not_triton", lambda device: None)


@pytest.fixture
def triton_is_missing(monkeypatch):
    monkeypatch.setattr(_impl, "why_not_triton", lambda device: "no Triton here")


@pytest.mark.usefixtures("triton_runs")
def test_device_chooses_where_nobody_else_does():
    assert resolve_impl(None, CPU, "op") == "torch"
    assert resolve_impl(None, CUDA, "op") == "triton"
    assert resolve_impl(None, torch.device("xpu"), "op") == "triton"


@pytest.mark.usefixtures("triton_runs")
def test_variable_beats_device(monkeypatch):
    monkeypatch.setenv("SGTRITON_IMPL", "triton")
    assert resolve_impl(None, CPU, "op") == "triton"
    monkeypatch.setenv("SGTRITON_IMPL", "torch")
    assert resolve_impl(None, CUDA, "op") == "torch"
    monkeypatch.setenv("SGTRITON_IMPL", "")  # set to nothing is unset
    assert resolve_impl(None, CUDA, "op") == "triton"


@pytest.mark.usefixtures("triton_runs")
def test_use_impl_beats_variable_and_ends_with_its_block(monkeypatch):
    monkeypatch.setenv("SGTRITON_IMPL", "triton")
    with use_impl("torch"):
        assert resolve_impl(None, CPU, "op") == "torch"
        with use_impl("triton"):
            assert resolve_impl(None, CPU, "op") == "triton"
        assert resolve_impl(None, CPU, "op") == "torch"
    assert resolve_impl(None, CPU, "op") == "triton"


@pytest.mark.usefixtures("triton_runs")
def test_argument_beats_use_impl():
    with use_impl("triton"):
        assert resolve_impl("torch", CUDA, "op") == "torch"
    with use_impl("torch"):
        assert resolve_impl("triton", CPU, "op") == "triton"


@pytest.mark.usefixtures("triton_runs")
def test_use_impl_ends_when_its_block_raises():
    with pytest.raises(KeyError), use_impl("triton"):
        raise KeyError
    assert resolve_impl(None, CPU, "op") == "torch"


@pytest.mark.usefixtures("triton_is_missing")
def test_triton_by_argument_raises_with_the_reason():
    with pytest.raises(ValueError, match=r"op: .*impl=.* cannot run: no Triton here"):
        resolve_impl("triton", CPU, "op")
    with pytest.raises(ValueError, match="no Triton here"):
        gate_weight(torch.ones(2, 2), torch.ones(2, 2), impl="triton")


@pytest.mark.usefixtures("triton_is_missing")
def test_fallback_warns_once_and_names_who_chose(monkeypatch):
    with use_impl("triton"):
        with pytest.warns(UserWarning, match=r"use_impl .*no Triton here; using the torch"):
            assert resolve_impl(None, CPU, "op") == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert resolve_impl(None, CPU, "op") == "torch"
    monkeypatch.setenv("SGTRITON_IMPL", "triton")
    with pytest.warns(UserWarning, match="SGTRITON_IMPL"):
        assert resolve_impl(None, CPU, "op") == "torch"
    monkeypatch.delenv("SGTRITON_IMPL")
    with pytest.warns(UserWarning, match="the device"):
        assert resolve_impl(None, CUDA, "op") == "torch"


@pytest.mark.usefixtures("triton_is_missing")
def test_strict_turns_a_fallback_into_an_error(monkeypatch):
    monkeypatch.setenv("SGTRITON_STRICT", "1")
    assert resolve_impl(None, CPU, "op") == "torch"  # no fallback
    with pytest.raises(ValueError, match=r"the device.*no Triton here"):
        resolve_impl(None, CUDA, "op")
    with use_impl("triton"), pytest.raises(ValueError, match=r"use_impl.*no Triton here"):
        resolve_impl(None, CPU, "op")
    monkeypatch.setenv("SGTRITON_IMPL", "triton")
    with pytest.raises(ValueError, match=r"SGTRITON_IMPL.*no Triton here"):
        resolve_impl(None, CPU, "op")


@pytest.mark.usefixtures("triton_runs")
def test_call_that_the_kernel_cannot_serve_falls_back_or_raises(monkeypatch):
    with use_impl("triton"), pytest.warns(UserWarning, match="fp64 is for the torch"):
        out = gate_weight(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2))
    assert out.dtype == torch.float64
    with pytest.raises(ValueError, match="fp64"):
        gate_weight(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2), impl="triton")
    monkeypatch.setenv("SGTRITON_STRICT", "1")
    with use_impl("triton"), pytest.raises(ValueError, match="fp64"):
        gate_weight(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2))


@pytest.mark.parametrize("name", ["cuda", "Triton", "", "none"])
def test_unknown_names_are_refused(name, monkeypatch):
    with pytest.raises(ValueError, match=r"impl=.*must be one of \('triton', 'torch'\), got"):
        resolve_impl(name, CPU, "op")
    with pytest.raises(ValueError, match=r"use_impl.*must be one of"), use_impl(name):
        pass
    if name:
        monkeypatch.setenv("SGTRITON_IMPL", name)
        with pytest.raises(ValueError, match=r"SGTRITON_IMPL.*must be one of"):
            resolve_impl(None, CPU, "op")


@pytest.mark.usefixtures("triton_runs")
def test_use_impl_of_one_thread_does_not_leak_into_another():
    inside, done, seen = threading.Event(), threading.Event(), []

    def choose():
        with use_impl("triton"):
            inside.set()
            done.wait(10)
            seen.append(resolve_impl(None, CPU, "op"))

    thread = threading.Thread(target=choose)
    thread.start()
    assert inside.wait(10)
    assert resolve_impl(None, CPU, "op") == "torch"
    with use_impl("torch"):
        done.set()
        thread.join()
    assert seen == ["triton"]


@pytest.mark.usefixtures("triton_runs")
def test_use_impl_of_one_task_does_not_leak_into_another():
    async def ask(impl, first, second):
        with use_impl(impl):
            first.set()
            await second.wait()  # both tasks are inside their blocks now
            return resolve_impl(None, CUDA, "op")

    async def main():
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(ask("triton", a, b), ask("torch", b, a))

    assert asyncio.run(main()) == ["triton", "torch"]


TRAINS = """
import torch, sgtriton
from sgtriton_kernels import gate_weight

model = sgtriton.patch(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)), (2, 2))
optimizer = torch.optim.SGD(sgtriton.param_groups(model, 0.1), 0.1)
for _ in range(2):
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
assert model[0].gate.grad.abs().sum() > 0
try:
    gate_weight(model[0].weight, model[0].gate, (2, 2), impl="triton")
except ValueError as error:
    print("refused:", error)
"""
NO_DRIVER = """
import triton
assert triton.runtime.driver._default is None, "a GPU driver was started"
assert triton.runtime.driver._active is None, "a GPU driver was started"
"""
BLOCKED = "import sys\nsys.modules['triton'] = None\n"


def run_clean(code):
    """Run in a process without our variables, as on a machine that just installed the package."""
    unset = ("TRITON_INTERPRET", "SGTRITON_IMPL", "SGTRITON_STRICT")
    env = {key: value for key, value in os.environ.items() if key not in unset}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:sgtriton", "-c", code],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_training_start_no_driver_without_the_interpreter():
    """O34: the check for drivers comes before anybody asks for Triton."""
    backends = pytest.importorskip("triton.backends").backends
    code = TRAINS.replace("try:", NO_DRIVER + "try:", 1)
    out = run_clean(code)
    if not torch.cuda.is_available() and "cpu" not in backends:
        assert "refused: gate_weight" in out
        assert "TRITON_INTERPRET=1" in out


LAUNCH = """
from sgtriton_kernels import gate
try:
    gate._gate_weight_fwd_kernel[(1,)]()
except RuntimeError as error:
    print(error)
"""


def test_package_trains_where_triton_is_missing():
    out = run_clean(BLOCKED + TRAINS + LAUNCH)
    assert "refused: gate_weight" in out
    assert "cannot launch _gate_weight_fwd_kernel: Triton cannot be imported" in out


def test_both_implementations_agree_under_use_impl(impl, device):
    w, gate = torch.randn(6, 8, device=device), torch.rand(6, 8, device=device)
    with use_impl(impl):
        assert_exact("out", gate_weight(w, gate), torch.where(gate > 0.5, w, 0.0))


def test_import_does_not_wait_for_the_compiler():
    assert run_clean("import sys, sgtriton; print('torch._dynamo' in sys.modules)") == "False\n"
