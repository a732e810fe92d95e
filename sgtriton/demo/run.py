"""The whole job: train dense, train gated, prune, save, load into a fresh model, serve, compare."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from sgtriton_kernels.kinds import GATE_KINDS
from torch import nn

import sgtriton
from sgtriton.files import replace_file
from sgtriton.progress import Progress
from sgtriton.timing import interleaved_ms

from .data import Digits, load_digits
from .models import MODELS, add_gates, make_model
from .pictures import draw
from .training import History, predict, steps_for, train

__all__ = ["Layer", "Result", "Settings", "run"]

_BATCHES = (1, 128)
# Layers this small gain nothing from a second thread and lose much where another program holds the
# core it waits for; with one thread a seed also gives the same numbers whatever the machine.
_THREADS = 1


@dataclass(frozen=True)
class Settings:
    """What to run; checked when made.

    Attributes:
        model: ``lenet300`` or ``lenet5``.
        block: Gate block of all layers but the last, which is gated per weight: it is small and
            every weight of it counts. None is the whole dimension.
        gate: ``threshold``, ``bernoulli`` or ``hard_concrete``.
        target: Share of the gated weights to close, in [0, 1).
        epochs: Of each of the two trainings; None takes as many as the data need.
        seed: Of the initial weights, the batches and the gates' draws.
        data: Folder with the four IDX files; None takes what is installed.
        out: Folder for the files that the run writes.

    Raises:
        ValueError: A value out of its range.
    """

    model: str = "lenet300"
    block: tuple[int | None, int | None] = (4, 4)
    gate: str = "threshold"
    target: float = 0.9
    epochs: int | None = None
    seed: int = 0
    data: str | os.PathLike[str] | None = None
    out: str | os.PathLike[str] = "sgtriton-demo"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if self.gate not in GATE_KINDS:
            raise ValueError(f"gate must be one of {', '.join(GATE_KINDS)}, got {self.gate!r}")
        if len(self.block) != 2 or any(side is not None and side < 1 for side in self.block):
            raise ValueError(f"block must be two sides of 1 or more (or None), got {self.block}")
        if not 0 <= self.target < 1:
            raise ValueError(f"target must be in [0, 1), got {self.target}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs must be 1 or more, got {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")


@dataclass(frozen=True)
class Layer:
    """One gated layer as it is served."""

    name: str
    kind: str
    shape: tuple[int, ...]
    block: tuple[int | None, ...]
    sparsity: float
    form: str
    reason: str


@dataclass(frozen=True)
class Result:
    """What came out.

    Times are medians in ms by batch size; ``files`` are names inside the folder of the run.
    """

    dataset: str
    source: str
    images: int
    model: str
    gate: str
    epochs: int
    seed: int
    dense_accuracy: float
    gated_accuracy: float
    served_accuracy: float
    predictions_equal: bool
    largest_difference: float
    target_sparsity: float
    sparsity: float
    bytes_dense: int
    bytes_served: int
    ms_dense: dict[str, float]
    ms_served: dict[str, float]
    seconds: float
    threads: int
    layers: tuple[Layer, ...]
    dense_curve: History
    gated_curve: History
    files: tuple[str, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]

    def as_dict(self, curves: bool = False) -> dict[str, object]:
        """The result in plain types, ready for JSON, with or without the training curves."""
        values = asdict(self)
        if not curves:
            del values["dense_curve"], values["gated_curve"]
        return values


def run(settings: Settings, say: Callable[[str], None] = lambda text: None) -> Result:
    """Do the whole job and write its files into ``settings.out``.

    Writes ``dense.safetensors`` (the dense network's state), ``served.safetensors``,
    ``picture.png`` (where matplotlib is installed) and ``report.json``.

    Args:
        settings: What to run.
        say: Called with a line of text as each stage begins.

    Returns:
        The figures. ``predictions_equal`` False means that the served model is not what was
        trained: the caller must treat that as a failure.

    Raises:
        ValueError: No usable data, a folder that cannot be written, a target that the layers
            cannot reach in these blocks. All before the first training begins.
    """
    start = time.perf_counter()
    out = _writable(settings.out)
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        return _run(settings, out, say, start)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings, out: Path, say: Callable[[str], None], start: float) -> Result:
    digits = load_digits(settings.data)
    say(f"data    {digits.source}")
    epochs = settings.epochs or _epochs(settings.model, digits)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        # a target that cannot be reached, or not closely, is said before the wait
        gated, controller = _gated(settings, digits, epochs)
    for warning in warned:
        say(f"note    {warning.message}")

    say(f"train   {settings.model} dense, then gated; epochs each: {epochs}; threads: {_THREADS}")
    dense = make_model(settings.model, settings.seed)
    with Progress("dense", steps_for(digits, epochs)) as progress:
        dense_curve = train(dense, digits, epochs, settings.seed, on_step=progress.step)
    with Progress("gated", steps_for(digits, epochs)) as progress:
        gated_curve = train(gated, digits, epochs, settings.seed, controller, progress.step)
    gated_logits = predict(gated, digits.test_x)
    patterns = _patterns(gated)

    say("serve   prune, save, load into a fresh model, compare")
    dense_file, served_file = out / "dense.safetensors", out / "served.safetensors"
    replace_file(dense_file, save(dense.state_dict()))
    sgtriton.save(sgtriton.sparsify(gated), served_file)
    # the file records the forms that were chosen, not why
    reasons = {layer.name: layer.reason for layer in sgtriton.summary(gated).layers}
    # another seed: what the file does not bring cannot be right by luck
    served = sgtriton.load(make_model(settings.model, settings.seed + 1), served_file)
    served_logits = predict(served, digits.test_x)
    summary = sgtriton.summary(served)
    ms_dense, ms_served = _milliseconds(dense, served, digits.test_x)

    labels = digits.test_y
    gated_best, served_best = gated_logits.argmax(1), served_logits.argmax(1)
    files, notes = [dense_file.name, served_file.name], []
    try:
        draw(
            out / "picture.png",
            f"{settings.model} on {digits.dataset}",
            dense_curve,
            gated_curve,
            settings.target,
            patterns,
        )
        files.append("picture.png")
    except ImportError as error:
        notes.append(f"no picture: {error}; pip install 'sgtriton[plot]'")
    result = Result(
        dataset=digits.dataset,
        source=digits.source,
        images=digits.images,
        model=settings.model,
        gate=settings.gate,
        epochs=epochs,
        seed=settings.seed,
        dense_accuracy=_share(predict(dense, digits.test_x).argmax(1) == labels),
        gated_accuracy=_share(gated_best == labels),
        served_accuracy=_share(served_best == labels),
        predictions_equal=bool((gated_best == served_best).all()),
        largest_difference=(gated_logits - served_logits).abs().max().item(),
        target_sparsity=settings.target,
        sparsity=float(summary.sparsity),
        bytes_dense=dense_file.stat().st_size,
        bytes_served=served_file.stat().st_size,
        ms_dense=ms_dense,
        ms_served=ms_served,
        seconds=round(time.perf_counter() - start, 2),
        threads=_THREADS,
        layers=tuple(
            Layer(
                name=layer.name,
                kind=layer.kind,
                shape=tuple(layer.shape),
                block=tuple(layer.block),
                sparsity=float(layer.sparsity),
                form=str(layer.form),
                reason=str(reasons[layer.name]),
            )
            for layer in summary.layers
        ),
        dense_curve=dense_curve,
        gated_curve=gated_curve,
        files=(*files, "report.json"),
        notes=tuple(notes),
        versions={
            "sgtriton": sgtriton.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    )
    text = json.dumps(result.as_dict(curves=True), indent=2)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    return result


def _gated(
    settings: Settings, digits: Digits, epochs: int
) -> tuple[nn.Module, sgtriton.SparsityController]:
    """The gated twin, as initialised, and its controller."""
    model = make_model(settings.model, settings.seed)
    add_gates(model, settings.block, settings.gate)
    controller = sgtriton.SparsityController(
        model, target=settings.target, steps=steps_for(digits, epochs)
    )
    return model, controller


def _epochs(model: str, digits: Digits) -> int:
    """Enough to train on 4,000 images, and on 60,000 in a few minutes."""
    large = len(digits.train_x) > 20_000
    if model == "lenet5":
        return 2 if large else 12
    return 10 if large else 40


def _patterns(gated: nn.Module) -> dict[str, torch.Tensor]:
    """Which weights are open: ``[N, K]`` bool per layer (a conv's columns tap by tap)."""
    return {
        name: (module.eval_weight() != 0).movedim(1, -1).flatten(1)
        for name, module in gated.named_modules()
        if isinstance(module, sgtriton.GatedLinear | sgtriton.GatedConv2d)
    }


@torch.inference_mode()
def _milliseconds(
    dense: nn.Module, served: nn.Module, x: torch.Tensor, seconds: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Median time of a forward pass at each batch size, the two models taking turns."""
    ms_dense, ms_served = {}, {}
    for batch in _BATCHES:
        part = x[:batch] if len(x) >= batch else x.repeat(batch, 1, 1, 1)[:batch]
        times = interleaved_ms(
            [lambda part=part: dense(part), lambda part=part: served(part)],
            x.device,
            seconds,
            rounds=15,
        )
        ms_dense[str(batch)], ms_served[str(batch)] = (round(ms, 4) for ms in times)
    return ms_dense, ms_served


def _share(hits: torch.Tensor) -> float:
    return round(hits.double().mean().item(), 6)


def _writable(folder: str | os.PathLike[str]) -> Path:
    """Make the folder and try it, before minutes of training are spent."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the way" if is_file else error.strerror or str(error)
        raise ValueError(f"out: cannot write into the folder {path}: {reason}") from error
    return path
