"""Which implementation an op uses: ``triton`` or ``torch``.

Order of authority: the argument ``impl=``, :func:`use_impl`, ``SGTRITON_IMPL``, the tensor's
device. ``SGTRITON_STRICT=1`` turns a fallback into an error. Under ``torch.compile`` the choice is
made when a function is traced and stays with the compiled code.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import warnings
from collections.abc import Iterator

import torch

from ._triton import why_not_triton

IMPLS = ("triton", "torch")

_VARIABLE = "SGTRITON_IMPL"

_override: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "sgtriton_impl", default=None
)
_warned: set[str] = set()


@contextlib.contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Choose the implementation of every op called inside the ``with`` block.

    Args:
        impl: ``"triton"`` | ``"torch"``.

    Raises:
        ValueError: another name.
    """
    token = _override.set(_check(impl, "use_impl"))
    try:
        yield
    finally:
        _override.reset(token)


def resolve_impl(
    impl: str | None, device: torch.device, op: str, unsupported: str | None = None
) -> str:
    """Name of the implementation that ``op`` uses on ``device``.

    Args:
        impl: the caller's argument.
        device: device of the op's inputs.
        op: the op's name, for messages.
        unsupported: why the op's Triton kernel cannot serve this call, or ``None``.

    Raises:
        ValueError: an unknown name; Triton asked for by argument (or at all, under
            ``SGTRITON_STRICT=1``) where it cannot run.
    """
    if impl is not None:
        asked_by = "impl="
    elif (impl := _override.get()) is not None:
        asked_by = "use_impl"
    elif impl := _from_environment():
        asked_by = _VARIABLE
    else:
        impl = "triton" if device.type in ("cuda", "xpu") else "torch"
        asked_by = "the device"
    if _check(impl, asked_by) == "torch":
        return "torch"
    reason = why_not_triton(device) or unsupported
    if reason is None:
        return "triton"
    message = f"{op}: the Triton kernel chosen by {asked_by} cannot run: {reason}"
    if asked_by == "impl=" or os.environ.get("SGTRITON_STRICT") == "1":
        raise ValueError(message)
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"{message}; using the torch implementation", stacklevel=3)
    return "torch"


# A traced function keeps the choice: contextvars cannot be traced, and dispatch is ahead of a call.
# This is the mark that torch.compiler.assume_constant_result sets; the decorator itself would
# import the compiler, which takes longer than everything else here.
setattr(resolve_impl, "_dynamo_marked_constant", True)  # noqa: B010


def _from_environment() -> str | None:
    """``SGTRITON_IMPL``.

    ``os.environ.get`` raises and catches two exceptions where a variable is missing, which took a
    fifth of a small product's call (measured: 6 of 30 us), so its dictionary is asked.
    """
    environ = os.environ
    if type(environ) is not os._Environ:
        return environ.get(_VARIABLE)
    value = environ._data.get(environ.encodekey(_VARIABLE))  # pyright: ignore
    return None if value is None else environ.decodevalue(value)


def _check(impl: str, asked_by: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"{asked_by}: implementation must be one of {IMPLS}, got {impl!r}")
    return impl
