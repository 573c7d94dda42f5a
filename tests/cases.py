"""What tests share: one table of tolerances, one way to hold a result against a reference."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

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


def lost_in_sums(summed: int, operands: Tensor) -> float:
    """What a sum of `summed` products may lose on a GPU beyond the baseline's error, relative to its largest value.

    float32: the products are added one after the other and each sum is rounded, a walk that takes the worst of some
    thousand results about sqrt(summed) / 4 epsilons away (simulated); a library may add in blocks, and so round less.
    16 bits: tensor cores align 16 products at a time to the sum so far and cut them off in fp32, without rounding (Fasi
    et al. 2021, "Numerical behavior of NVIDIA tensor cores"). PyTorch's own sums in the operands' dtype lose as much,
    but their last rounding hides it.
    8 bits: on Hopper they are cut off 13 bits below the largest, 32 at a time (DeepSeek-V3's report, section 3.3.2):
    each by less than 2^-13, of deviation 2^-13 / sqrt(3); four deviations, and half a step of the sum each time.
    """
    if not operands.is_cuda:
        return 0.0
    eps = torch.finfo(torch.float32).eps
    if operands.itemsize == 4:
        return summed**0.5 / 4 * eps
    if operands.itemsize == 2:
        return -(-summed // 16) * eps
    if operands.itemsize == 1:
        return (4 * (summed / 3) ** 0.5 + -(-summed // 32) / 2) * 2.0**-13
    return 0.0


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


def preload_children() -> None:
    """Processes of multiprocessing's start method "forkserver" begin with what takes long to import: the first one
    says it for all."""
    slow = ["torch._dynamo", "torchvision", "fastres.train.loop", "sklearn.datasets", "matplotlib.backends.backend_agg"]
    multiprocessing.get_context("forkserver").set_forkserver_preload([*slow, "pytest"])


def by_library(convolve: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """convolve(*args, **kwargs), by PyTorch's own loops where cuDNN has no engine for it (float64 with groups, a
    padding wider than the filter, ...)."""
    try:
        return convolve(*args, **kwargs)
    except RuntimeError as error:
        if not any(said in str(error) for said in ("unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED")):
            raise
    with torch.backends.cudnn.flags(enabled=False):
        return convolve(*args, **kwargs)
