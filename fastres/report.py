"""`fastres.status`: what runs fused on this machine, and why the rest does not. Also `python -m fastres status`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from fastres.capability import LEAST, spelt
from fastres.models.resnet import BasicBlock
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
    """The result of `status`; `str()` formats it as text.

    training, inference and the values of blocks are paths. A path is `FUSED`, `PLAIN` followed by a colon and the
    reason, or "refused: " and the reason if a forced backend can't run the block.
    """

    summary: str  # what runs fused on this machine, in one or two sentences
    gpu: str  # name and compute capability, or why there is none
    versions: Mapping[str, str]  # package -> version, or "not installed"
    triton: str  # "usable", possibly with a note, or why not
    table: str  # the table of measurements that chooses kernels on this GPU, or why there is none
    extension: extension.Status  # the C++ and CUDA extension
    training: str  # path of a drop-in `BasicBlock` in fp32 and train mode, on the GPU if there is one
    inference: str  # the same in eval mode
    optimize: str  # the dtypes in which `fastres.optimize` is fused on this CPU, and why not in the others
    next_step: str  # a command to try
    blocks: Mapping[str, str] | None = None  # name -> path of the blocks and stems of the model passed to `status`

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
    """Report what runs fused on this machine and, for a model, which of its blocks and stems run fused.

    model: a net with fastres's blocks. The report is for its current device, dtype and mode (train or eval). Its blocks
    are not run.

    Returns a `Status`: `print(fastres.status(model))` shows all of it. Nothing is built or compiled, but CUDA is
    initialised if there is a GPU. Raises TypeError if `model` is not an `nn.Module`.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"status() takes an nn.Module, got {type(model).__name__}")
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
    """Return a summary for a machine with a GPU, and a command to try."""
    name = torch.cuda.get_device_name()
    if (capability := torch.cuda.get_device_capability()) < LEAST:
        lead = f"Models run as plain PyTorch on this machine's {name}."
        return (
            f"{lead}\nThe fused kernels need compute capability {spelt(LEAST)}, this GPU has {spelt(capability)}.",
            TRAIN,
        )
    if not dispatch.has_triton():
        lead = f"Models run as plain PyTorch on this machine's {name}."
        return f"{lead}\nThe fused kernels need Triton, which is not installed.", INSTALL_TRITON
    lead = f"ResNets run on fused Triton kernels on this machine's {name}, in training and inference."
    table = dispatch.table_in_force(device)
    if table.startswith("none"):
        return f"{lead}\nNo kernels have been measured on such a GPU, so heuristics choose them.", TUNE
    if table.startswith("broken"):
        return f"{lead}\nIts table of measured kernels can't be read.", TUNE
    return f"{lead}\nMeasurements choose the kernels: {table}.", TRAIN


def _on_cpu(training: str) -> str:
    """Return a summary for a machine without a usable GPU."""
    lead = "This machine has no GPU." if torch.version.cuda else "This PyTorch is built without CUDA and uses no GPU."
    trains = "training runs as plain PyTorch" if training != FUSED else "the forced backend runs the blocks"
    served = [name for name, dtype in _ON_CPUS.items() if dispatch.why_no_onednn(dtype) is None]
    if not served:
        return f"{lead}\nModels run as plain PyTorch on the CPU."
    names = ", ".join(served[:-1]) + " and " * (len(served) > 1) + served[-1]
    return f"{lead}\nfastres.optimize serves ResNets on the CPU with oneDNN in {names}; {trains}."


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
    """Return name -> path, as in `Status`, of fastres's blocks and stems in the model."""
    return {name: _path(module) for name, module in model.named_modules() if _parts(module) is not None}


def _parts(module: nn.Module) -> eligibility.Parts | None:
    ask = getattr(module, "parts", None)
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
    except RuntimeError as error:  # raised by a forced backend that can't run this call
        return f"refused: {error}"
    return FUSED if reason is None else f"{PLAIN}: {reason}"
