"""What every launcher does before it launches: check its tensors, know its GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..capability import FLOAT8, LEAST, TMA, spelt
from .problem import ConvProblem
from .tiles import H200, Gpu


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, *dtypes: torch.dtype) -> None:
    """ValueError unless `tensor`, where there is one, is contiguous, has `shape`, one of `dtypes` (default: like's)
    and lives where `like` does."""
    if tensor is None:
        return
    accepted = dtypes or (like.dtype,)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in accepted:
        raise ValueError(f"{name} must be {' or '.join(map(str, accepted))}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other tensors, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous in the order {list(shape)}, got strides {list(tensor.stride())}")


def check_device(x: Tensor, *dtypes: torch.dtype) -> None:
    """ValueError unless kernels on tensors of `dtypes` can run where x lives."""
    if x.is_cuda:
        needed = FLOAT8 if torch.float8_e4m3fn in dtypes else LEAST
        if (found := torch.cuda.get_device_capability(x.device)) < needed:
            names = " and ".join(sorted({str(dtype) for dtype in dtypes}))
            raise ValueError(f"{names} needs compute capability {spelt(needed)}, {x.device} has {spelt(found)}")
    elif x.device.type != "meta" and not triton.knobs.runtime.interpret:
        raise ValueError(f"x must be on a CUDA device, got {x.device}; only Triton's interpreter takes CPU tensors")


def check_vectors(K: int, like: Tensor, *dtypes: torch.dtype, **vectors: Tensor | None) -> None:
    """ValueError unless every vector that is given is a [K] of one of `dtypes` (float32) where `like` lives."""
    for name, vector in vectors.items():
        check_tensor(name, vector, (K,), like, *(dtypes or (torch.float32,)))


def check_product(x: Tensor, precision: str = "ieee") -> None:
    """ValueError for an unknown precision of fp32 products, and where Triton's interpreter would run a kernel that
    multiplies by x and get it wrong."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    if triton.knobs.runtime.interpret and x.dtype == torch.bfloat16 and x.device.type != "meta":
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; it takes float16 and float32")


def tma_refusal(problem: ConvProblem, *tensors: Tensor | None) -> str | None:
    """Why the tensor memory accelerator can't carry boxes of these tensors, or None where it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    if present[0].is_cuda and torch.cuda.get_device_capability(present[0].device) < TMA:
        return f"it needs compute capability {spelt(TMA)}"
    if problem.groups > 1:
        return f"groups={problem.groups}"
    if problem.pixels >= 2**31:
        return "coordinates past 2**31"
    for tensor in present:
        for name in ("C", "K"):
            if getattr(problem, name) * tensor.element_size() % 16:
                return f"{name}={getattr(problem, name)} channels of {tensor.dtype} are no multiple of 16 bytes"
        if tensor.device.type != "meta" and tensor.data_ptr() % 16:
            return "a tensor doesn't start at a multiple of 16 bytes"
    return None


INTERPRETER = H200._replace(name="interpreter", sms=1)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind `device`. An H200 stands in for the meta device, and one with a single multiprocessor for the
    interpreter's CPU, which runs programs one after the other: the fewer the better."""
    if device.type != "cuda":
        return INTERPRETER if device.type == "cpu" else H200
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(
        properties.name,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        (properties.major, properties.minor),
    )
