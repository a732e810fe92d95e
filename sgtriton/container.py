"""The file itself: a safetensors container with a JSON description, whole or not at all.

Beside plain arrays it holds one JSON text in its metadata: format version, a description of each
sparse layer, which arrays have a second name, a checksum of each array and of the text. Reading
runs no code, trusts no length and checks all sums; what the arrays mean is the caller's to check.
"""

from __future__ import annotations

import json
import os
import reprlib
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_container
from safetensors.torch import save as write_container

from .files import replace_file

FORMAT = 1
_KEY, _KEY_SUM = "sgtriton", "sgtriton_crc32"
_LARGEST_HEADER = 64 << 20
_LONGEST_SHOWN = 500  # characters


def printable(text: object) -> str:
    """Text out of a file as an error shows it: what a terminal would obey is escaped."""
    found = str(text)
    if len(found) > _LONGEST_SHOWN:
        found = found[: _LONGEST_SHOWN - 3] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in found)


def write_file(path: Path, layers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors and the layers' descriptions.

    Args:
        path: file to write; it always holds a whole file, the old or the new.
        layers: what a reader must know of each sparse layer, JSON types.
        tensors: any device and strides; those that share memory are stored once.

    Raises:
        ValueError: the file cannot be written.
    """
    tensors, same_as = _store_once(tensors)
    description = {
        "format": FORMAT,
        "layers": layers,
        "same_as": same_as,
        "checksums": {name: _checksum(t) for name, t in tensors.items()},
    }
    text = json.dumps(description, sort_keys=True)
    metadata = {_KEY: text, _KEY_SUM: str(zlib.crc32(text.encode()))}
    try:
        data = write_container(tensors, metadata)
    except KeyError as error:  # the container does not know a dtype
        raise ValueError(f"{path}: tensors of {error} cannot be stored") from error
    try:
        replace_file(Path(os.path.realpath(path)), data)  # a link stays one
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error}") from error


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what :func:`write_file` wrote, its container and checksums checked.

    Returns:
        The description, and the tensors on the CPU, under all their names.

    Raises:
        ValueError: a file that is missing, truncated, damaged, not ours or of an unknown version.
    """
    try:
        if not path.is_file():
            raise ValueError(
                f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}"
            )
        data = path.read_bytes()  # a copy: the file may change while it is checked
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    text, text_sum = _metadata(path, data)
    if text_sum != str(zlib.crc32(text.encode())):
        raise ValueError(f"{path}: damaged: its description has another checksum than it states")
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: its description is no JSON ({error})") from None
    _check_description(path, description)
    try:
        tensors = read_container(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: truncated or damaged: {printable(error)}") from None
    checksums = description["checksums"]
    if set(tensors) != set(checksums):
        names = sorted(set(tensors) ^ set(checksums))
        raise ValueError(f"{path}: damaged: tensors {names[:5]} are missing or not described")
    for name, tensor in tensors.items():
        if _checksum(tensor) != checksums[name]:
            raise ValueError(
                f"{path}: damaged: {printable(name)} has another checksum than the file states"
            )
    aliases = {}
    for alias, name in description["same_as"].items():
        if not isinstance(name, str) or name not in tensors or alias in tensors:
            raise ValueError(
                f"{path}: damaged: {printable(alias)} is stored as {reprlib.repr(name)}, which the "
                "file does not hold"
            )
        aliases[alias] = tensors[name]
    tensors |= aliases
    return description, tensors


def _metadata(path: Path, data: bytes) -> tuple[str, str]:
    """Our two metadata texts, read without trusting a length in the file."""
    not_ours = ValueError(f"{path}: not a file written by sgtriton.save")
    if len(data) < 8:
        raise not_ours
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, _LARGEST_HEADER):
        raise ValueError(f"{path}: truncated, or not a file written by sgtriton.save")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        text, text_sum = metadata[_KEY], metadata[_KEY_SUM]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise not_ours from None
    if not isinstance(text, str) or not isinstance(text_sum, str):
        raise not_ours
    return text, text_sum


def _check_description(path: Path, description: Any) -> None:
    if not isinstance(description, dict) or "format" not in description:
        raise ValueError(f"{path}: not a file written by sgtriton.save")
    version = description["format"]
    if version != FORMAT or isinstance(version, (bool, float)):
        raise ValueError(
            f"{path}: format {reprlib.repr(version)}, this version of sgtriton reads {FORMAT}"
        )
    for field, kind in (("layers", dict), ("same_as", dict), ("checksums", dict)):
        if not isinstance(description.get(field), kind):
            raise ValueError(f"{path}: damaged: field {field!r} is missing")


def _store_once(
    tensors: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors as the container wants them: on the CPU, contiguous, tied ones once."""
    first: dict[Any, str] = {}
    kept: dict[str, torch.Tensor] = {}
    same_as: dict[str, str] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and memory in first:
            same_as[name] = first[memory]
        else:
            first[memory] = name
            # a copy of its own: views of one storage are refused by the container
            kept[name] = tensor.detach().cpu().contiguous().clone()
    return kept, same_as


def _checksum(tensor: torch.Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    data = memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]
    return zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), zlib.crc32(data))
