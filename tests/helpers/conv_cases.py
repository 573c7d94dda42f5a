"""The convolutions on which kernels are tested (small ones for the interpreter, all of the nets) and their reference,
with any prologue and epilogue."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from cases import by_library
from torch import Tensor

from fastres.kernels import tables
from fastres.kernels.fprop import RunningNorm
from fastres.kernels.problem import ConvProblem, model_problems
from fastres.kernels.tables import Measurement
from fastres.kernels.tiles import H200, Gpu

# GATHERED: any shape, loaded by pointers. BOXED: loaded by TMA, which requires C to be a multiple of 16 (of 8 for a
# 1x1) and an even image for stride 2.
GATHERED = {
    "odd everything": ConvProblem(1, 9, 8, 5, 7, 3, 3, 1, 1),
    "1x1": ConvProblem(2, 5, 4, 24, 12),
    "1x1 stride 2": ConvProblem(2, 5, 7, 16, 20, 1, 1, 2),
    "stride 2, odd image": ConvProblem(2, 9, 7, 8, 20, 3, 3, 2, 1),
    "channels split into steps": ConvProblem(1, 6, 5, 40, 18, 3, 3, 1, 1),
    "groups": ConvProblem(2, 6, 5, 16, 8, 3, 3, 1, 1, groups=4),
    "wide groups, stride 2": ConvProblem(1, 7, 7, 64, 40, 3, 3, 2, 1, groups=2),
    "dilation": ConvProblem(1, 9, 8, 6, 5, 3, 3, 1, 2, dilation=2),
    "stride 3, wide pad": ConvProblem(1, 10, 11, 4, 6, 3, 3, 3, 3),
    "flat filter": ConvProblem(2, 6, 8, 16, 16, 1, 3),
    "stem": ConvProblem(1, 20, 18, 3, 16, 7, 7, 2, 3),
    "output of one pixel": ConvProblem(3, 3, 3, 8, 8, 3, 3),
}
BOXED = {
    "1x1": ConvProblem(2, 5, 4, 24, 40),
    "1x1 stride 2": ConvProblem(2, 6, 10, 16, 24, 1, 1, 2),
    "3x3": ConvProblem(2, 7, 6, 32, 24, 3, 3, 1, 1),
    "3x3, batch 1": ConvProblem(1, 9, 8, 16, 8, 3, 3, 1, 1),
    "3x3 without padding": ConvProblem(3, 6, 6, 16, 16, 3, 3),
    "3x3 stride 2": ConvProblem(2, 8, 10, 16, 24, 3, 3, 2, 1),
    "3x3 stride 2, dilation, wide pad": ConvProblem(1, 10, 8, 16, 16, 3, 3, 2, 3, dilation=2),
    "5x5 dilation": ConvProblem(1, 6, 5, 16, 16, 5, 5, 1, 4, dilation=2),
}


def traits(problem: ConvProblem) -> tuple[Hashable, ...]:
    """Return the properties for which a kernel may have a separate code path.

    They are the kind of filter (1x1, 3x3 or other), the stride, and whether the convolution is dilated, grouped, or has
    channels that don't fill vectors of 8.
    """
    filters = "1x1" if problem.R == problem.S == 1 else "3x3" if problem.R == problem.S == 3 else "other"
    return filters, problem.stride, problem.dilation > 1, problem.groups > 1, problem.C % 8 > 0


@lru_cache
def net_problems(name: str, batch: int, size: int = 224) -> tuple[ConvProblem, ...]:
    """Return the distinct convolutions of a torchvision net on images [batch, 3, size, size]."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    return tuple(model_problems(model, (batch, 3, size, size)))


def geometry(p: ConvProblem) -> dict[str, int]:
    return {"stride": p.stride, "padding": p.pad, "dilation": p.dilation, "groups": p.groups}


def reference(
    p: ConvProblem,
    x: Tensor,
    w: Tensor,
    dtype: torch.dtype = torch.float64,
    *,
    prologue: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    norm: RunningNorm | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Return [relu](scale conv([relu(s x + t)], w) + shift + residual) [N, P, Q, K], computed by PyTorch.

    prologue: (s, t). norm: an eval-mode BatchNorm in place of scale and shift. Activations and products are in `dtype`,
    everything else in float32 or wider.
    """
    wide = torch.promote_types(dtype, torch.float32)
    x, w = x.to(dtype), w.to(dtype)
    if prologue is not None:
        x = F.relu(x.to(wide) * prologue[0].to(wide) + prologue[1].to(wide)).to(dtype)
    y = by_library(F.conv2d, x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), **geometry(p))
    y = y.permute(0, 2, 3, 1).to(wide)
    y = y if scale is None else y * scale.to(wide)
    y = y if shift is None else y + shift.to(wide)
    if norm is not None:
        mean, var, weight, bias = (None if t is None else t.to(wide) for t in norm[:4])
        y = F.batch_norm(y.permute(0, 3, 1, 2), mean, var, weight, bias, eps=norm.eps).permute(0, 2, 3, 1)
    y = y if residual is None else y + residual.to(wide)
    return (F.relu(y) if relu else y).to(dtype).contiguous()


def put(entries: dict[tuple[str, ConvProblem], Measurement], gpu: Gpu = H200, folder: Path | None = None) -> None:
    """Write `entries`, which are measurements in bfloat16 by pass and problem, as the table of a GPU.

    Also clear the cache of tables, so that the next look-up reads this one. folder: None for the default one.
    """
    table = {(pass_, problem, torch.bfloat16): found for (pass_, problem), found in entries.items()}
    tables.write_table(table, tables.table_file(gpu.name, folder), gpu)  # type: ignore[arg-type]
    tables.forget_tables()
