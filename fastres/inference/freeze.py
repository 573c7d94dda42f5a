"""`optimize`: check a model, trace it, and build an `Optimized` from it."""

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
from fastres.inference.trace import refuse_training, trace
from fastres.models.wrappers import refuse_wrapper
from fastres.ops import dispatch, eligibility
from fastres.ops.quantised import FLOAT8

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# dtype of the convolutions -> dtype of all other steps and of the result
_QUANTISED = {FLOAT8: torch.bfloat16, torch.int8: torch.float32}


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
    """Return a copy of `model`, a net in eval mode, that is frozen for fast inference.

    model: one of fastres's nets, a ResNet of torchvision or timm, a backbone or segmenter with one inside, or any model
    that takes one tensor, returns a tensor or (nested) dicts, lists and tuples of tensors, and consists of supported
    operations (the error for an unsupported operation lists them). It is not changed.

    The returned module takes x [N, C, H, W] of any floating dtype, in any memory format, on the device of the weights,
    and returns what the model returns: the same containers, keys and constants, with tensors in `dtype` (for float8 in
    bfloat16, for int8 in float32). Equivalent to, up to rounding and with quantisation errors in float8 and int8:

        frozen = copy.deepcopy(model).to(dtype)
        with torch.no_grad():
            y = frozen(x.to(dtype))

    It never writes into x, even if the model does. The caller owns the returned tensors: no later call, thread or
    stream changes them, and no two of them share memory. A tensor that the model returns twice is returned twice. The
    module also has the model's public attributes that are neither tensors nor callable, such as `out_channels`.
    `torch.autocast` inside the model is ignored.

    example: an input whose shape is prepared immediately, as `Optimized.ready` does: engines are chosen, kernels are
        compiled, and on a GPU a CUDA graph is captured. Other shapes are prepared in their third call on a GPU and in
        their eleventh on a CPU; until then their steps run one by one.
    dtype: bfloat16, float16, float32 or float64; float8_e4m3fn on GPUs of compute capability 8.9 and above; int8 on
        x86-64 CPUs with AVX512-VNNI. Default: the dtype of the model's convolutions.
    cuda_graph: on a GPU, replay one CUDA graph per prepared shape. The 8 that were used last are kept.
    torchscript: on a CPU, let TorchScript compile the plan for an input shape after ten calls with that shape, or
        immediately for `example` and `ready`. The compiled plan is used if it is not slower than running step by step.
        In float32 and bfloat16 it is a oneDNN graph, whose results may differ from those of the steps in the last bits.
        In int8 it consists of the same steps and gives the same results. Nothing is compiled while
        `torch.use_deterministic_algorithms` is on.
    calibration: required for float8 and int8, not accepted otherwise. Batches, or (batch, ...) tuples, that represent
        the real input. They set the range of each activation; later values outside the range are clamped.
    percentile: above 0 and at most 100, the default; only with `calibration`. This percentage of an activation's values
        is at or below the upper end of its range, and the same percentage is at or above the lower end. 100 takes the
        minimum and maximum.

    In float8 and int8, weights have one scale per output channel. In float8, the first convolution, grouped
    convolutions, the classifier and all other steps run in bfloat16, and the result is bfloat16. In int8, weights are
    integers from -127 to 127 and activations are integers from 0 to 255 with a zero point; max pools between
    convolutions run in 8 bits, and the classifier, all other steps and the result are in float32. Under
    `backend("reference")` both dtypes are simulated on any device.

    On an x86-64 CPU, oneDNN computes each convolution, with the bias, the addition of the residual and the ReLU after
    it, in one call: in float32, in int8 and, if the CPU has the instructions, in bfloat16 and float16. Images with NaN
    or infinity give the same result as in PyTorch, except that in int8 their result is NaN. In float32 and bfloat16 one
    difference remains: if an activation overflows inside the net and becomes NaN, oneDNN's ReLU turns the NaN into 0.

    The first call of the net (`optimize` itself, if `example` is given) also compares the plan with the model, both in
    float64 on the CPU, on random images of the input's size. A float8 or int8 net is compared before it is quantised.
    The comparison finds, for example, code that checks `type(x)`, which behaves differently during tracing.

    Raises TypeError for something that is not a plain `nn.Module`, such as a compiled or optimized model. Raises
    ValueError if the model is in training mode, has hooks, has no convolution, uses an unsupported operation, changes a
    tensor in place and later reads a view of it, or differs from its plan; if folded weights are not finite; if the
    dtype or the device is not supported; or if `calibration` or `percentile` is missing, superfluous, empty or out of
    range. Raises RuntimeError if `backend` forces kernels that cannot run on the device.
    """
    refuse_wrapper(model, "optimize")
    if any(isinstance(module, Optimized) for module in model.modules()):
        raise TypeError("the model is already optimized, or contains an optimized net; pass the original to optimize()")
    if dtype is not None and dtype not in (*_DTYPES, *_QUANTISED):
        raise ValueError(f"dtype={dtype} is not supported; accepted: {', '.join(map(str, (*_DTYPES, *_QUANTISED)))}")
    if (dtype in _QUANTISED) != (calibration is not None):
        raise ValueError(
            "float8_e4m3fn and int8 need calibration=, an iterable of input batches; no other dtype accepts it"
        )
    if percentile is not None and calibration is None:
        raise ValueError("percentile= is accepted only with calibration=, for float8_e4m3fn or int8")
    ranges = Ranges(100.0 if percentile is None else percentile)
    refuse_training(model)
    model = _with_traceable_normalize(model)
    steps, outputs = trace(_copied(model))
    steps = fuse(steps, outputs, absorb=dtype != torch.int8)
    if not any(isinstance(step, Conv) for step in steps):
        raise ValueError(f"{type(model).__name__} has no convolution: there is nothing to optimize")
    device = _device(model)
    model = _copied(model)
    if calibration is not None:
        assert dtype is not None
        _require_engine(dtype, device)
        # Compare this net with the model: after quantisation the two would differ too much.
        wide = Optimized(model, steps, outputs, _QUANTISED[dtype], cuda_graph=False, compared=True)
        for x in batch_inputs(calibration):
            wide.observed(x, ranges.include)
        steps, outputs = quantise(steps, outputs, ranges.ends(), dtype)
        dtype = wide.dtype
    steps, dtype = fuse_chains(steps, outputs), dtype or _dtype(model, steps)
    net = Optimized(model, steps, outputs, dtype, cuda_graph, torchscript, compared=calibration is None)
    if example is not None:
        net.ready(example)
    return net


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode. torchvision's feature extractors make copies in training mode."""
    return copy.deepcopy(model).eval()


class _Normalize(nn.Module):
    """torchvision's Normalize, rewritten so that torch.fx can trace it: x [N, C, H, W] -> (x - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def _with_traceable_normalize(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in which `_Normalize` replaces torchvision's Normalize layers.

    Returns the model itself if it has no such layer.
    """
    layers = {path: module for path, module in model.named_modules() if path and _is_normalize(module)}
    if not layers:
        return model
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    model = _copied(model)
    for path, module in layers.items():
        mean, std = (torch.as_tensor(v, dtype=torch.float64, device=device) for v in (module.mean, module.std))
        layer = _Normalize(mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1))
        model.set_submodule(path, layer.eval())
    return model


def _is_normalize(module: nn.Module) -> bool:
    """Return whether `module` is a Normalize of transforms or transforms.v2 that `_Normalize` can replace.

    A Normalize that works in place, has hooks or has a zero in std does more than (x - mean) / std.
    """
    kind = type(module)
    named = kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision.transforms.")
    return named and not module.inplace and not eligibility.has_hooks(module) and 0 not in module.std  # type: ignore


def _device(model: nn.Module) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or torch.device("meta") in devices:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"optimize() requires all parameters and buffers on one device, got {names}")
    return devices.pop()


def _dtype(model: nn.Module, steps: Iterable[Step]) -> torch.dtype:
    dtypes = {model.get_submodule(conv.name).weight.dtype for step in steps for conv in convs(step)}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise ValueError(f"the model's convolutions are in {', '.join(sorted(map(str, dtypes)))}; pass dtype=")
    return dtypes.pop()  # type: ignore[return-value]


def _require_engine(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError if no engine computes convolutions in `dtype`, float8_e4m3fn or int8, on `device`.

    Under `backend("reference")`, which simulates both dtypes on any device, nothing is raised.
    """
    if dispatch.wants_reference():
        return
    reason = None
    if dtype == FLOAT8 and device.type != "cuda":
        reason = f"float8_e4m3fn needs a CUDA GPU, but the model is on {device}"
    elif dtype == FLOAT8 and (found := torch.cuda.get_device_capability(device)) < capability.FLOAT8:
        needed, name = capability.spelt(capability.FLOAT8), torch.cuda.get_device_name(device)
        reason = f"float8_e4m3fn needs compute capability {needed} or above, but {name} has {capability.spelt(found)}"
    elif dtype == torch.int8 and device.type != "cpu":
        reason = f"int8 needs a CPU, but the model is on {device}; use float8_e4m3fn on a GPU"
    elif dtype == torch.int8 and (why := dispatch.why_no_int8(device)) is not None:
        reason = f"int8 is not supported: {why}"
    if reason is not None:
        raise ValueError(f"{reason}; backend('reference') simulates {str(dtype).removeprefix('torch.')}")
