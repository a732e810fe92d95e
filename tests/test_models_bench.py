import functools

import pytest
import torch

from bench import models, networks, rows

SMALL = {
    "VGG-16": (functools.partial(networks.vgg16, width=4, side=32, hidden=32), 32),
    "MLP-Mixer-B/16": (
        functools.partial(
            networks.Mixer, depth=2, channels=32, side=32, patch=8, token_hidden=16,
            channel_hidden=64,
        ),
        32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", networks.MODELS)
def test_models_go_from_patch_to_serving_with_equal_outputs(name, tmp_path):
    make, side = SMALL[name]
    served = models.serve(make, torch.randn(2, 3, side, side), block=(4, 4))
    measured = [
        row for batch in (1, 2) for row in models.measure(name, served, batch, 0.0, block=(4, 4))
    ]
    rows.write(tmp_path / "models.csv", measured)
    assert rows.read(tmp_path / "models.csv", models.Row) == measured
    assert {row.status for row in measured} == {rows.MEASURED}
    assert 0.08 < measured[0].density < 0.15
    assert measured[0].file_bytes < 0.5 * measured[0].dense_bytes
    assert name in models.markdown(measured)


def test_a_wrong_model_is_listed_and_not_timed(monkeypatch):
    make, side = SMALL["MLP-Mixer-B/16"]
    load = models.sgtriton.load

    def planted(model, path):
        model = load(model, path)
        with torch.no_grad():
            model.norm.weight[0] += 1e-3
        return model

    monkeypatch.setattr(models.sgtriton, "load", planted)
    images = torch.randn(1, 3, side, side)
    served = models.serve(make, images, block=(4, 4), form="lookup")
    dense, loaded = models.measure("x", served, 1, 0.0)
    assert dense.is_measured
    assert loaded.status.startswith("wrong: loaded and served outputs differ")
    assert models.pairs([dense, loaded]) == []


def test_models_have_the_sizes_of_the_papers():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in make().parameters())
            for name, make in networks.MODELS.items()
        }
    assert sizes == {"VGG-16": 138_357_544, "MLP-Mixer-B/16": 59_880_472}
