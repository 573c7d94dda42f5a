"""Checks of a launcher's tensors and GPU before it launches."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..capability import FLOAT8, LEAST, TMA, spelt
from .problem import ConvProblem
from .tiles import H200, Gpu


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `tensor` is contiguous, has `shape` and one of `dtypes`, and is on the device of `like`.

    dtypes: by default the dtype of `like`. name: names the tensor in the message. A tensor of None passes.
    """
    if tensor is None:
        return
    accepted = dtypes or (like.dtype,)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in accepted:
        raise ValueError(f"{name} must be {' or '.join(map(str, accepted))}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the other tensors, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous with shape {list(shape)}, got strides {list(tensor.stride())}")


def check_device(x: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless kernels on tensors of `dtypes` can run on the device of x.

    That is a GPU of sufficient compute capability, the meta device, or the CPU in Triton's interpreter.
    """
    if x.is_cuda:
        needed = FLOAT8 if torch.float8_e4m3fn in dtypes else LEAST
        if (found := torch.cuda.get_device_capability(x.device)) < needed:
            names = " and ".join(sorted({str(dtype) for dtype in dtypes}))
            raise ValueError(f"{names} needs compute capability {spelt(needed)}, but {x.device} has {spelt(found)}")
    elif x.device.type != "meta" and not triton.knobs.runtime.interpret:
        raise ValueError(f"x must be on a CUDA device, got {x.device}; CPU tensors need Triton's interpreter")


def check_vectors(K: int, like: Tensor, *dtypes: torch.dtype, **vectors: Tensor | None) -> None:
    """Raise ValueError unless each of `vectors` is None or a contiguous [K] on the device of `like`.

    dtypes: the accepted dtypes, by default float32. The names of `vectors` appear in the message.
    """
    for name, vector in vectors.items():
        check_tensor(name, vector, (K,), like, *(dtypes or (torch.float32,)))


def check_product(x: Tensor, precision: str = "ieee") -> None:
    """Raise ValueError if `precision` is neither "ieee" nor "tf32", or if x is bfloat16 in Triton's interpreter.

    The interpreter's `tl.dot` multiplies the bits of bfloat16 values as if they were integers.
    """
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision must be 'ieee' or 'tf32', got {precision!r}")
    if triton.knobs.runtime.interpret and x.dtype == torch.bfloat16 and x.device.type != "meta":
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32")


def tma_refusal(problem: ConvProblem, *tensors: Tensor | None) -> str | None:
    """Return why TMA (the tensor memory accelerator) can't load or store boxes of these tensors, or None if it can."""
    present = [tensor for tensor in tensors if tensor is not None]
    if present[0].is_cuda and torch.cuda.get_device_capability(present[0].device) < TMA:
        return f"TMA needs compute capability {spelt(TMA)}"
    if problem.groups > 1:
        return f"groups={problem.groups}, but only groups=1 is supported"
    if problem.pixels >= 2**31:
        return "the number of pixels exceeds 2**31 - 1"
    for tensor in present:
        for name in ("C", "K"):
            if getattr(problem, name) * tensor.element_size() % 16:
                return f"{name}={getattr(problem, name)} channels of {tensor.dtype} are not a multiple of 16 bytes"
        if tensor.device.type != "meta" and tensor.data_ptr() % 16:
            return "the address of a tensor is not a multiple of 16 bytes"
    return None


INTERPRETER = H200._replace(name="interpreter", sms=1)


def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU for which tiles are chosen on `device`.

    The meta device counts as an H200. The CPU, where Triton's interpreter runs programs one after another, counts as a
    GPU with one multiprocessor, so that the choice prefers few programs.
    """
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
