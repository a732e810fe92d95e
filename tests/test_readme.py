"""The README's example runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_readme_example_trains_prunes_saves_and_loads(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    load = (
        "network = torch.nn.Sequential(torch.nn.Linear(37, 53), torch.nn.ReLU(), "
        "torch.nn.Linear(53, 11))\n"
        "sgtriton.load(network, 'pruned.safetensors')\n"
        "assert torch.equal(network(x), model(x))\n"
        "assert abs(sgtriton.summary(network).sparsity - 0.8) <= 0.02\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", example + load],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "BlockSparseLinear" in done.stdout
