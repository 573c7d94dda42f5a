"""`optimize`: what it accepts, and the way from a model to an `Optimized`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastres import capability
from fastres.inference.optimized import Optimized, batch_inputs
from fastres.inference.plan import Conv, Step, convs, fuse, fuse_chains, quantise
from fastres.inference.ranges import Ranges
from fastres.inference.trace import trace
from fastres.models.wrappers import refuse_wrapper
from fastres.ops import dispatch, eligibility
from fastres.ops.quantised import FLOAT8

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_QUANTISED = {FLOAT8: torch.bfloat16, torch.int8: torch.float32}  # of convolutions -> of all else and of the answer


@torch.inference_mode(False)
def optimize(
    model: nn.Module,
    example: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool = True,
    torchscript: bool = True,
    calibration: Iterable[Any] | None = None,
    percentile: float | None = None,
) -> Optimized:
    """Freeze `model`, a ResNet in eval mode, for inference. The model itself stays untouched.

    Accepts fastres's nets, torchvision's and timm's ResNets, and what else consists of the operations that the error
    for an unknown one lists. The result is called as the model is and answers as `model.to(dtype)` would, in `dtype`,
    for input [N, C, H, W] of any floating dtype in any memory format; no gradient flows. The input is never changed,
    even where the model would work in it in place. Returned tensors are the caller's own: no later call, thread or
    stream changes them.

    example: input whose shape is made ready now, not at the first call, as by `ready`: engines are chosen, kernels
    compiled, a graph is captured. dtype: bfloat16, float16, float32 or float64; float8_e4m3fn on GPUs of compute
    capability 8.9 and above; int8 on CPUs with AVX512-VNNI. The default is that of the model's convolutions.
    cuda_graph: on a GPU, replay a CUDA graph per input shape (the last 8 shapes are kept).

    On an x86-64 CPU the convolutions are oneDNN's, each with its bias, addition and ReLU in one call: in float32, in
    int8 and, where the CPU has the instructions, in bfloat16 and float16. An image with NaN or infinity is answered as
    by PyTorch, in int8 by NaN. One difference remains in float32 and bfloat16: where an activation overflows inside
    the net, a NaN may follow, and oneDNN's ReLU makes 0 of it.

    torchscript: on a CPU, have TorchScript compile the plan for an input shape after ten calls with it, or at once for
    `example` and `ready`. The result is used where it is faster than the steps one by one. In float32 and bfloat16 it
    is a oneDNN graph, whose answers may differ from those of the steps in the last bits; in int8 it has the same steps
    and answers. Where `torch.use_deterministic_algorithms` is on, nothing is compiled.

    calibration: for float8 and int8 only, batches (or (batch, ...) tuples) that represent the real input. Their numbers
    set the range of each activation; what lies beyond it later is clamped. percentile: above 0 and up to 100, the
    default. This share of an activation's numbers, in percent, lies below the upper end of its range, and as many above
    the lower end; 100 is the extremes. Weights have one scale per output channel. In float8 the first convolution,
    grouped ones and the classifier stay in bfloat16, and the result is in it. In int8 weights are whole numbers from
    -127 to 127, activations from 0 to 255 with a zero point; max pools between convolutions work in 8 bits. The
    classifier, all else and the result are in float32. Under `backend("reference")` either dtype is simulated on any
    device.

    Raises TypeError or ValueError, saying what is accepted, for a model in training mode or with hooks, for an
    operation without a step, for one in place whose effect may show under another name, for folded weights that aren't
    finite, for a dtype or device that can't be served. The first call (here, where `example` is given) takes longer: it
    also holds plan and model against each other, both in float64 on the CPU, on random images of its size, and raises
    ValueError if they differ, as where the model's code asks `type(x)`, which a trace can't see. What `torch.autocast`
    does inside a model is left out.
    """
    refuse_wrapper(model, "optimize")
    if any(isinstance(module, Optimized) for module in model.modules()):
        raise TypeError("this net is optimized already, or a part of it is; optimize() takes the original")
    if dtype is not None and dtype not in (*_DTYPES, *_QUANTISED):
        raise ValueError(f"dtype={dtype} isn't served; accepted: {', '.join(map(str, (*_DTYPES, *_QUANTISED)))}")
    if (dtype in _QUANTISED) != (calibration is not None):
        raise ValueError(
            "float8_e4m3fn and int8 need calibration=, an iterable of input batches, and no other dtype takes it"
        )
    if percentile is not None and calibration is None:
        raise ValueError("percentile= says how calibration sets ranges; give it with float8_e4m3fn or int8")
    ranges = Ranges(100.0 if percentile is None else percentile)
    model = _with_traceable_normalize(model)
    steps, output = trace(copy.deepcopy(model))
    steps = fuse(steps, output, absorb=dtype != torch.int8)
    if not any(isinstance(step, Conv) for step in steps):
        raise ValueError(f"{type(model).__name__} has no convolution: there is nothing to optimize")
    device = _device(model)
    model = copy.deepcopy(model)
    if calibration is not None:
        assert dtype is not None
        _require_engine(dtype, device)
        # This net is compared with the model; one of 8 bits is too coarse to be.
        wide = Optimized(model, steps, output, _QUANTISED[dtype], cuda_graph=False, compared=True)
        for x in batch_inputs(calibration):
            wide.observed(x, ranges.include)
        steps, output = quantise(steps, output, ranges.ends(), dtype)
        dtype = wide.dtype
    steps, dtype = fuse_chains(steps, output), dtype or _dtype(model, steps)
    net = Optimized(model, steps, output, dtype, cuda_graph, torchscript, compared=calibration is None)
    if example is not None:
        net.ready(example)
    return net


class _Normalize(nn.Module):
    """torchvision's Normalize as arithmetic that a trace can read: x [N, C, H, W] -> (x - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _with_traceable_normalize(model: nn.Module) -> nn.Module:
    """A copy of `model` with `_Normalize` for torchvision's Normalize layers; the model itself where it has none."""
    layers = {path: module for path, module in model.named_modules() if path and _is_normalize(module)}
    if not layers:
        return model
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    model = copy.deepcopy(model)
    for path, module in layers.items():
        mean, std = (torch.as_tensor(v, dtype=torch.float64, device=device) for v in (module.mean, module.std))
        layer = _Normalize(mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1))
        model.set_submodule(path, layer.train(module.training))
    return model


def _is_normalize(module: nn.Module) -> bool:
    """Whether it is one, of transforms or transforms.v2, whose call does no more than the arithmetic."""
    kind = type(module)
    named = kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision.transforms.")
    return named and not module.inplace and not eligibility.has_hooks(module) and 0 not in module.std  # type: ignore


def _device(model: nn.Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or torch.device("meta") in devices:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"optimize() takes a model whose parameters and buffers lie on one device, got {names}")
    return devices.pop()


def _dtype(model: nn.Module, steps: Iterable[Step]) -> torch.dtype:
    dtypes = {model.get_submodule(conv.name).weight.dtype for step in steps for conv in convs(step)}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise ValueError(f"the model's convolutions are in {', '.join(sorted(map(str, dtypes)))}; give one dtype")
    return dtypes.pop()  # type: ignore[return-value]


def _require_engine(dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError where nothing computes convolutions in `dtype`, float8_e4m3fn or int8, on `device`."""
    if dispatch.wants_reference():
        return
    reason = None
    if dtype == FLOAT8 and device.type != "cuda":
        reason = f"float8_e4m3fn needs a CUDA GPU, the model is on {device}"
    elif dtype == FLOAT8 and (found := torch.cuda.get_device_capability(device)) < capability.FLOAT8:
        needed, name = capability.spelt(capability.FLOAT8), torch.cuda.get_device_name(device)
        reason = f"float8_e4m3fn needs compute capability {needed} or above, {name} has {capability.spelt(found)}"
    elif dtype == torch.int8 and device.type != "cpu":
        reason = f"int8 needs a CPU, the model is on {device}; there is float8_e4m3fn for GPUs"
    elif dtype == torch.int8 and (why := dispatch.why_no_int8(device)) is not None:
        reason = f"int8 isn't served: {why}"
    if reason is not None:
        raise ValueError(f"{reason}; backend('reference') simulates {str(dtype).removeprefix('torch.')}")
