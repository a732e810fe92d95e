"""How this suite compares tensors and makes hostile inputs; the one place with tolerances."""

from __future__ import annotations

import torch

# error of a result next to its fp32 reference, relative to the reference's RMS
TOL = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_exact(name: str, out: torch.Tensor, ref: torch.Tensor) -> None:
    """Equal in every element; for integer-valued inputs, whose sums no dtype rounds."""
    assert out.shape == ref.shape, f"{name}: {tuple(out.shape)} != {tuple(ref.shape)}"
    wrong = ~(out.double() == ref.double())  # NaN differs from everything
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ"


def assert_within_twice(
    name: str, out: torch.Tensor, ref64: torch.Tensor, torch_out: torch.Tensor
) -> None:
    """At most twice the error that PyTorch makes in the same dtype, against fp64.

    ``max|out - ref64| <= 2 max|torch_out - ref64| + u max|ref64|``; the rounding unit ``u`` covers
    a PyTorch result that is exact by luck.
    """
    assert out.shape == ref64.shape, f"{name}: {tuple(out.shape)} != {tuple(ref64.shape)}"
    assert out.dtype == torch_out.dtype, f"{name}: {out.dtype} != {torch_out.dtype}"
    if out.numel() == 0:
        return
    assert torch.isfinite(out).all(), f"{name}: not finite"
    error = (out.double() - ref64).abs().max().item()
    torch_error = (torch_out.double() - ref64).abs().max().item()
    unit = torch.finfo(out.dtype).eps / 2
    bound = 2 * torch_error + unit * ref64.abs().max().item()
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (PyTorch's: {torch_error:.3e})"


def assert_close(name: str, out: torch.Tensor, ref: torch.Tensor) -> None:
    """Plumbing: the same values up to the dtype's usual error."""
    assert (out.shape, out.dtype) == (ref.shape, ref.dtype), f"{name}: {out.shape} {out.dtype}"
    if ref.numel() == 0:
        return
    assert torch.isfinite(out).all(), f"{name}: not finite"
    err = (out.float() - ref.float()).abs()
    rms = ref.float().square().mean().sqrt().clamp_min(1e-12)
    worst = (err / torch.maximum(ref.float().abs(), rms)).max().item()
    assert worst <= TOL[out.dtype], f"{name}: {worst:.2e} > {TOL[out.dtype]:.1e}"


def integers(*shape: int, dtype: torch.dtype = torch.float32, device="cpu") -> torch.Tensor:
    """Values from {-1, 0, 1}: sums of up to 256 products are exact in every dtype."""
    return torch.randint(-1, 2, shape, device=device).to(dtype)


def poisoned(t: torch.Tensor) -> torch.Tensor:
    """The same values as a view into a larger buffer of NaN: a stray read shows at once."""
    if t.dim() == 0:
        return t
    buffer = torch.full([n + 6 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[tuple(slice(3, 3 + n) for n in t.shape)]
    view.copy_(t)
    return view


def layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in the memory layouts that users hand over."""
    out = {"contiguous": t.contiguous(), "sliced": poisoned(t)}
    if t.dim() >= 2:
        out["transposed"] = t.transpose(0, 1).contiguous().transpose(0, 1)
    if t.dim() == 4:
        out["channels_last"] = t.contiguous(memory_format=torch.channels_last)
    if t.shape[-1] > 0:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        strided = wide.to(t.device)[..., ::2]
        strided.copy_(t)
        out["strided"] = strided
    return out
