"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def run(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_readme_example_trains_prunes_saves_and_loads(tmp_path):
    example, _ = EXAMPLES
    load = (
        "network = torch.nn.Sequential(torch.nn.Linear(37, 53), torch.nn.ReLU(), "
        "torch.nn.Linear(53, 11))\n"
        "sgtriton.load(network, 'pruned.safetensors')\n"
        "assert torch.equal(network(x), model(x))\n"
        "assert abs(sgtriton.summary(network).sparsity - 0.8) <= 0.02\n"
    )
    done = run(example + load, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "BlockSparseLinear" in done.stdout


def test_readme_example_of_the_kernels_runs(tmp_path):
    _, example = EXAMPLES
    done = run(example, tmp_path)
    assert done.returncode == 0, done.stderr
