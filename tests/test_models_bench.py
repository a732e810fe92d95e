import functools

import pytest
import torch

from bench import models, rows

SMALL = {
    "VGG-16": (functools.partial(models.vgg16, width=4, side=32, hidden=32), 32),
    "MLP-Mixer-B/16": (
        functools.partial(
            models.Mixer, depth=2, channels=32, side=32, patch=8, token_hidden=16, channel_hidden=64
        ),
        32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", models.MODELS)
def test_models_go_from_patch_to_serving_with_equal_outputs(name, tmp_path):
    make, side = SMALL[name]
    measured = models.measure(name, make, side, seconds=0.0, block=(4, 4), batches=(1, 2))
    rows.write(tmp_path / "models.csv", measured)
    assert rows.read(tmp_path / "models.csv", models.Row) == measured
    assert 0.85 < measured[0].sparsity < 0.92
    assert measured[0].file_bytes < 0.5 * measured[0].dense_bytes
    assert name in models.markdown(measured)


def test_models_have_the_sizes_of_the_papers():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in make().parameters())
            for name, make in models.MODELS.items()
        }
    assert sizes == {"VGG-16": 138_357_544, "MLP-Mixer-B/16": 59_880_472}
