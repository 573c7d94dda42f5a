"""What would run here, and why: `fastres.status()`, `fastres.status(model)`, `python -m fastres status`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from fastres.capability import LEAST, spelt
from fastres.models.resnet import BasicBlock, ResNet
from fastres.ops import dispatch, eligibility, extension

TRAIN = "python -m fastres train"
TUNE = "python bench/tune.py"
INSTALL_TRITON = "python -m pip install triton"
WHAT_FOR = {
    TRAIN: "trains ResNet-20 on handwritten digits",
    TUNE: "measures this GPU's kernels, in a checkout",
    INSTALL_TRITON: "the fused kernels are written in it",
}
PLAIN = "plain PyTorch, module by module"
FUSED = "fused"
_ON_CPUS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Status:
    """`str()` of it says all of it in words. A path is `FUSED`, or `PLAIN` with the reason behind a colon."""

    summary: str  # what runs fused on this machine, in one or two sentences
    gpu: str  # name and compute capability, or why there is none
    versions: Mapping[str, str]
    triton: str  # "usable", or why not
    table: str  # whose measurements choose kernels on this GPU, or why none do
    extension: extension.Status
    training: str  # the path of a residual block of the drop-in family, on the GPU if there is one
    inference: str
    optimize: str  # in which dtypes `fastres.optimize` is fused on this CPU, and why not in others
    next_step: str  # a command to try
    blocks: Mapping[str, str] | None = None  # of the model asked about: name -> path, in its present mode

    def __str__(self) -> str:
        lines = [
            self.summary,
            "",
            f"GPU:        {self.gpu}",
            "versions:   " + ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            f"Triton:     {self.triton}",
            f"table:      {self.table}",
            f"extension:  {self.extension.reason}",
            f"training:   {self.training}",
            f"inference:  {self.inference}",
            f"optimize:   {self.optimize}",
        ]
        if self.blocks is not None:
            fused = sum(path == FUSED for path in self.blocks.values())
            lines.append(f"model:      {fused} of {len(self.blocks)} blocks and stems run fused")
            lines += [f"  {name or 'stem'}: {path}" for name, path in self.blocks.items()]
        lines += ["", f"next:       {self.next_step}   ({WHAT_FOR[self.next_step]})"]
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
    summary, next_step = _on_gpu(device) if device.type == "cuda" else (_on_cpu(training), TRAIN)
    if device.type == "cpu" and training != FUSED and dispatch.why_no_onednn(torch.float32) is None:
        training += "; its convolutions, which are most of the work, are oneDNN's"
    return Status(
        summary=summary,
        gpu=_gpu(),
        versions={name: _version(name) for name in ("fastres", "torch", "torchvision", "triton")},
        triton=_triton(),
        table=dispatch.table_in_force(device) if _triton() == "usable" else "none: no kernels run on a GPU here",
        extension=extension.status(),
        training=training,
        inference=_path(block.eval()),
        optimize=_optimize(),
        next_step=next_step,
        blocks=None if model is None else _blocks(model),
    )


def _on_gpu(device: torch.device) -> tuple[str, str]:
    """What runs fused on a machine with a GPU, and a command to try."""
    name = torch.cuda.get_device_name()
    if (capability := torch.cuda.get_device_capability()) < LEAST:
        said = f"Models run as plain PyTorch on this machine's {name}."
        return (
            f"{said}\nThe fused kernels need compute capability {spelt(LEAST)}, this GPU has {spelt(capability)}.",
            TRAIN,
        )
    if not dispatch.has_triton():
        said = f"Models run as plain PyTorch on this machine's {name}."
        return f"{said}\nThe fused kernels need Triton, which is not installed.", INSTALL_TRITON
    said = f"ResNets run on fused Triton kernels on this machine's {name}, in training and inference."
    table = dispatch.table_in_force(device)
    if table.startswith("none"):
        return f"{said}\nNo kernels have been measured on such a GPU, so heuristics choose among them.", TUNE
    if table.startswith("broken"):
        return f"{said}\nIts table of measured kernels can't be read.", TUNE
    return f"{said}\nMeasurements choose among them: {table}.", TRAIN


def _on_cpu(training: str) -> str:
    """What runs fused on a machine without a usable GPU."""
    said = "This machine has no GPU." if torch.version.cuda else "This PyTorch is built without CUDA and uses no GPU."
    trains = "training runs as plain PyTorch" if training != FUSED else "the forced backend runs the blocks"
    served = [name for name, dtype in _ON_CPUS.items() if dispatch.why_no_onednn(dtype) is None]
    if not served:
        return f"{said}\nModels run as plain PyTorch on the CPU."
    names = ", ".join(served[:-1]) + " and " * (len(served) > 1) + served[-1]
    return f"{said}\nfastres.optimize serves ResNets on the CPU with oneDNN in {names}; {trains}."


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none: " + (
            "no NVIDIA GPU or driver found" if torch.version.cuda else "this PyTorch is built without CUDA"
        )
    return f"{torch.cuda.get_device_name()}, compute capability {spelt(torch.cuda.get_device_capability())}"


def _triton() -> str:
    if not dispatch.has_triton():
        return "not usable: it is not installed"
    if dispatch.interpreting():
        return "usable: its interpreter runs the kernels, slowly, in fp32 and fp16 (TRITON_INTERPRET=1)"
    if not torch.cuda.is_available():
        return "not usable: there is no GPU"
    if torch.cuda.get_device_capability() < LEAST:
        return f"not usable: the GPU is older than compute capability {spelt(LEAST)}"
    return "usable"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _optimize() -> str:
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


def _blocks(model: nn.Module) -> dict[str, str]:
    """Every module of the model that asks dispatch for a fused path."""
    return {name: _path(module) for name, module in model.named_modules() if _parts(module) is not None}


def _parts(module: nn.Module) -> eligibility.Parts | None:
    ask = module.stem_parts if isinstance(module, ResNet) else getattr(module, "parts", None)
    parts = ask() if callable(ask) else None
    return parts if isinstance(parts, eligibility.Parts) else None


def _path(module: nn.Module) -> str:
    parts = _parts(module)
    assert parts is not None
    conv = parts.pairs[0][0]
    weight = next(module.parameters())
    channels = getattr(conv, "in_channels", weight.shape[1] if weight.dim() > 1 else 1)
    x = torch.empty(1, channels, 56, 56, device=weight.device, dtype=weight.dtype)
    try:
        reason = eligibility.why_plain(x, parts)
    except RuntimeError as error:  # of a backend that is forced and can't serve it
        return f"refused: {error}"
    return FUSED if reason is None else f"{PLAIN}: {reason}"
