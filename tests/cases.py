"""What tests share: one table of tolerances, one way to hold a result against a reference."""

from __future__ import annotations

import torch
from torch import Tensor

# Per dtype, the error allowed over and above PyTorch's own, relative to the reference's largest value: the result's
# last rounding, which a baseline that happens to be exact doesn't show; in float64 what reordered sums cost a deep net.
TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
    torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).eps,
}


def cut_off(summed: int, operands: Tensor) -> float:
    """What a GPU's tensor cores may lose of an fp32 sum of `summed` products of 16-bit operands, relative to its
    largest value: 16 products at a time are aligned to the sum so far and cut off, not rounded (Fasi et al. 2021,
    "Numerical behavior of NVIDIA tensor cores"). PyTorch's own sums in the operands' dtype lose as much, but their last
    rounding hides it."""
    if not operands.is_cuda or operands.itemsize != 2:
        return 0.0
    return -(-summed // 16) * torch.finfo(torch.float32).eps


def relative_error(actual: Tensor, ref64: Tensor) -> float:
    """max |actual - ref64| / max |ref64|; NaN where actual has one that ref64 hasn't."""
    if actual.numel() == 0:
        return 0.0
    reference = ref64.detach().to(actual.device, torch.float64)
    difference = (actual.detach().double() - reference).abs().max()
    scale = reference.abs().max()
    return float(difference / scale) if scale else float(difference)


def assert_close_to_reference(
    actual: Tensor,
    ref64: Tensor,
    baseline: Tensor | None = None,
    factor: float = 2.0,
    what: str = "result",
    lost: float = 0.0,
) -> None:
    """Holds `actual` against `ref64`, the same computation in float64.

    Allowed is `factor` x the error that `baseline`, PyTorch's result in actual's dtype, has itself, plus the dtype's
    entry in `TOLERANCES` plus `lost`. Without a baseline only these: for results meant to be exact to rounding.
    """
    assert actual.shape == ref64.shape, f"{what}: shape {tuple(actual.shape)}, reference {tuple(ref64.shape)}"
    allowed = TOLERANCES[actual.dtype] + lost
    if baseline is not None:
        assert actual.dtype == baseline.dtype, f"{what}: {actual.dtype}, baseline {baseline.dtype}"
        allowed += factor * relative_error(baseline, ref64)
    error = relative_error(actual, ref64)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"  # a NaN fails too
