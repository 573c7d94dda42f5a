"""What would run here, and why: `fastres.status()`, `fastres.status(model)`, `python -m fastres status`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from fastres.models.resnet import BasicBlock, ResNet
from fastres.ops import dispatch, extension

PLAIN = "plain PyTorch, module by module"
FUSED = "fused"
_ON_CPUS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Status:
    """`str()` of it says all of it in words. A path is `FUSED`, or `PLAIN` with the reason behind a colon."""

    gpu: str  # name and compute capability, or why there is none
    versions: Mapping[str, str]
    triton: str  # "usable", or why not
    table: str  # whose measurements choose kernels on this GPU, or why none do
    extension: extension.Status
    training: str  # the path of a residual block of the drop-in family, on the GPU if there is one
    inference: str
    optimize: str  # in which dtypes `fastres.optimize` is fused on this CPU, and why not in others
    blocks: Mapping[str, str] | None = None  # of the model asked about: name -> path, in its present mode

    def __str__(self) -> str:
        lines = [
            f"GPU:        {self.gpu}",
            "versions:   " + ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            f"Triton:     {self.triton}",
            f"table:      {self.table}",
            f"extension:  CPU {_yes(self.extension.cpu)}, CUDA {_yes(self.extension.cuda)}: {self.extension.reason}",
            f"training:   {self.training}",
            f"inference:  {self.inference}",
            f"optimize:   {self.optimize}",
        ]
        if self.blocks is not None:
            fused = sum(path == FUSED for path in self.blocks.values())
            lines.append(f"model:      {fused} of {len(self.blocks)} blocks and stems run fused")
            lines += [f"  {name or 'stem'}: {path}" for name, path in self.blocks.items()]
        return "\n".join(lines)


def status(model: nn.Module | None = None) -> Status:
    """What would run on this machine and, of `model`, on which path each of fastres's blocks and stems.

    Builds and compiles nothing; starts CUDA where there is a GPU. The model is asked as it stands, for its present
    device, dtype and mode. Raises TypeError if `model` is no `nn.Module`.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"status takes an nn.Module, not {type(model).__name__}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]), torch.device(device):
        block = BasicBlock(64, 64)
    training = _path(block.train())
    if device.type == "cpu" and training != FUSED and dispatch.why_no_onednn(torch.float32) is None:
        training += "; its convolutions, most of the work, are oneDNN's already"
    return Status(
        gpu=_gpu(),
        versions={name: _version(name) for name in ("fastres", "torch", "torchvision", "triton")},
        triton=_triton(),
        table=dispatch.table_in_force(device) if _triton() == "usable" else "none: no GPU runs kernels here",
        extension=extension.status(),
        training=training,
        inference=_path(block.eval()),
        optimize=_on_cpus(),
        blocks=None if model is None else _blocks(model),
    )


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none: " + (
            "no NVIDIA GPU or driver found" if torch.version.cuda else "this PyTorch is built without CUDA"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not usable: it is not installed"
    if dispatch.interpreting():
        return "usable: its interpreter runs the kernels, slowly (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "not usable: there is no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "not usable: the GPU is older than compute capability 8.0"
    return "usable"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _on_cpus() -> str:
    reasons = {name: dispatch.why_no_onednn(dtype) for name, dtype in _ON_CPUS.items()}
    if reasons["fp32"] is not None:
        return f"plain PyTorch, layer by layer, on this CPU: {reasons['fp32']}"
    served = ", ".join(name for name, reason in reasons.items() if reason is None)
    refused: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            refused.setdefault(reason, []).append(name)
    without = "".join(f"; not in {', '.join(names)}: {reason}" for reason, names in refused.items())
    return f"oneDNN's fused convolutions on this CPU in {served}{without}"


def _yes(usable: bool) -> str:
    return "yes" if usable else "no"


def _blocks(model: nn.Module) -> dict[str, str]:
    """Every module of the model that asks dispatch for a fused path."""
    return {name: _path(module) for name, module in model.named_modules() if _parts(module) is not None}


def _parts(module: nn.Module) -> dispatch.Parts | None:
    ask = module.stem_parts if isinstance(module, ResNet) else getattr(module, "parts", None)
    parts = ask() if callable(ask) else None
    return parts if isinstance(parts, dispatch.Parts) else None


def _path(module: nn.Module) -> str:
    parts = _parts(module)
    assert parts is not None
    conv = parts.units[0][0]
    weight = next(module.parameters())
    channels = getattr(conv, "in_channels", weight.shape[1] if weight.dim() > 1 else 1)
    x = torch.empty(1, channels, 56, 56, device=weight.device, dtype=weight.dtype)
    reason = dispatch.why_plain(x, parts)
    return FUSED if reason is None else f"{PLAIN}: {reason}"
