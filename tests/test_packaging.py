"""What a user installs: the wheel alone, away from the clone."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel installs; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def test_wheel_holds_both_packages_and_nothing_else(installed):
    names = {path.name for path in installed.iterdir()}
    assert names - {p for p in names if p.endswith(".dist-info")} == {
        "sgtriton",
        "sgtriton_kernels",
    }
    for package in ("sgtriton", "sgtriton_kernels"):
        assert (installed / package / "py.typed").exists()
    assert (installed / "sgtriton_kernels" / "cards.json").exists()
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))


def test_wheel_imports_from_where_it_was_installed(installed):
    code = "import sgtriton, sgtriton_kernels as k; print(sgtriton.__file__, k.__file__)"
    done = run(installed, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(Path(path).is_relative_to(installed) for path in done.stdout.split())


def test_wheel_runs_the_demo(installed, tmp_path):
    done = run(installed, "-m", "sgtriton", "demo", "--epochs", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.json").exists()


def test_kernels_is_a_folder_and_never_a_package():
    """PyPI's `kernels` owns that import name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_version_is_stated_once_and_the_same():
    import sgtriton

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{sgtriton.__version__}"' in text


def test_core_needs_no_extra():
    needed = importlib.metadata.requires("sgtriton") or []
    core = {r.split(">")[0].split(";")[0].strip() for r in needed if "extra ==" not in r}
    assert core == {"torch", "numpy", "safetensors", "packaging", "filelock"}
