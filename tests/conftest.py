"""One device for the whole run; without a GPU the kernels run in Triton's interpreter.

``TRITON_INTERPRET=0`` runs them compiled instead: for CPU tensors that takes Triton's CPU compiler
(``make test-native``), and the tests marked ``compiles`` cross-compile for cards.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel module is imported


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    from sgtriton_kernels import _triton

    interpreted = pytest.mark.skip(reason="the interpreter replaces the compiler")
    for item in items:
        if item.get_closest_marker("compiles") and _triton.INTERPRETED:
            item.add_marker(interpreted)
    if not config.getoption("slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What this machine's user has tuned changes no test, and no test changes it."""
    os.environ["SGTRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own: nothing is remembered before it or after it."""
    from sgtriton_kernels import lookup

    monkeypatch.setenv("SGTRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(lookup, "_told", {})
    lookup.forget()
    yield tmp_path / "tune"
    lookup.forget()


@pytest.fixture(params=["torch", "triton"])
def impl(request, device) -> str:
    """Each implementation of an op that can run on the test device."""
    from sgtriton_kernels._triton import why_not_triton

    if request.param == "triton" and (reason := why_not_triton(device)):
        pytest.skip(reason)
    return request.param
