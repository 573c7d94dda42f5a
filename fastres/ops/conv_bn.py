"""One conv-BN pair of a block: what is known of it before its tensors are, bound to what computes each of its steps.

`conv_bn` asks `dispatch` once for a shape and keeps the answer, bound; nobody behind it asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastres.ops import dispatch, reference
from fastres.ops.dispatch import Engines
from fastres.ops.layout import Geometry
from fastres.ops.library_engine import Facts, Library

if TYPE_CHECKING:
    from fastres.kernels.problem import ConvProblem


@dataclass(frozen=True, eq=False)
class ConvBN(Facts):
    """A conv-BN pair and its operations, on NHWC activations and KRSC filters w.

    prologue: (s, t) where the convolution reads relu(s a + t), else None. partials: of z's statistics, None where these
    are given. norm: running mean and variance, weight and bias. bn: where it is given, `dz` is g, and
    dz = c_g g + c_z z + c_1 is computed on load.
    """

    # (x, w, scale, shift, residual=None, relu=True): [relu](scale conv(x) + shift + residual)
    infer: Callable[..., Tensor]
    infer_live: Callable[..., Tensor]  # (x, w, norm, residual=None, relu=True): the same, by running statistics
    fprop: Callable[..., tuple[Tensor, Tensor | None]]  # (a, w, prologue): z, partials
    # (z, affine, w, **addend): x, conv(x), partials for x = relu(scale z + shift + shortcut), the end of the block
    # before; addend: `normalize`'s arguments about the shortcut
    fprop_joined: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    dgrad: Callable[..., Tensor]  # (dz, w, bn, residual=, residual_mask=): dx + residual [masked where the mask <= 0]
    # (dz, w, bn, z, mean, affine): down to the BN below, whose input is z: dy, mask still to apply, partials of sum g
    # and sum g (z - mean)
    dgrad_masked: Callable[..., tuple[Tensor, reference.Affine | None, Tensor]]
    # (dz, w, bn, out, end_below, **as dgrad): down to the end of the block before, whose output is out: (dx, None), or
    # where one kernel does it all (dx where out > 0, partials as of `backward_reduce`)
    dgrad_joined: Callable[..., tuple[Tensor, Any]]
    wgrad: Callable[..., Tensor]  # (dz, a, bn, prologue, dtype): dw KRSC, in dtype, or in dz's (library)

    @property
    def out_size(self) -> tuple[int, int]:
        """P and Q of z [N, K, P, Q]."""
        return self.problem.P, self.problem.Q

    def statistics(self, partials: Tensor | None, weight: Tensor | None, bias: Tensor | None, buffers: Buffers) -> Any:
        """(mean, rstd, scale, shift), each [K]: of the batch where there are partials, which moves the buffers; else
        the running ones."""
        if partials is None:
            return self.passes.running_statistics(buffers.mean, buffers.var, weight, bias, self.eps)
        mean, var = (buffers.mean, buffers.var) if buffers.moves else (None, None)
        moved = {"running_mean": mean, "running_var": var, "momentum": buffers.momentum, "counter": buffers.counter}
        return self.passes.finish_statistics(partials, weight, bias, self.eps, **moved)

    def fuses(self, bn: reference.BNBackward) -> bool:
        """Whether dgrad and wgrad take g with `bn` instead of dz."""
        return self.engines.fuses_bn_backward(bn.c_z is not None)


class Kept(NamedTuple):
    """What a pair's forward leaves for its backward: z [N, P, Q, K]; four vectors [K]; the filters as the convolution
    read them, KRSC, the parameter's own memory where that has the layout and dtype; and the activation before the
    convolution, where `Engines.keeps_activation`."""

    z: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    w: Tensor
    activation: Tensor | None


class Buffers(NamedTuple):
    """A BatchNorm's buffers as one forward finds them. With `moves` it moves mean and var by momentum towards the
    batch's statistics. counter [] goes up by one with them; None where the batch is counted already or not at all."""

    mean: Tensor | None
    var: Tensor | None
    moves: bool
    momentum: float
    counter: Tensor | None = None

    @staticmethod
    def of(bn: nn.BatchNorm2d, device: torch.device) -> Buffers:
        """Those of bn, which counts this batch where no kernel on `device` can."""
        mean, var, momentum, counter = bn.running_mean, bn.running_var, bn.momentum, None
        moves = bn.training and bn.track_running_stats
        if moves and (count := bn.num_batches_tracked) is not None:
            usual = type(count) is Tensor and count.dtype == torch.int64 and count.dim() == 0 and count.device == device
            if usual and momentum is not None:
                counter = count
            else:
                count.add_(1)
                momentum = 1.0 / float(count) if momentum is None else momentum  # the cumulative average
        known = mean is not None and var is not None
        return Buffers(mean if known else None, var if known else None, moves, momentum or 0.0, counter)


def refuse_capture(bn: nn.BatchNorm2d) -> None:
    """Raises RuntimeError where bn averages over all batches, whose number the host reads, while a CUDA graph is being
    captured."""
    averages = bn.momentum is None and bn.training and bn.track_running_stats and bn.num_batches_tracked is not None
    if averages and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"BatchNorm2d({bn.num_features}, momentum=None) averages over all batches: the host reads their number in "
            "every step, which a CUDA graph can't do. Give the layer a momentum, or don't capture the step"
        )


def bind(problem: ConvProblem, eps: float, batch_statistics: bool, engines: Engines) -> ConvBN:
    """The pair by these engines: the one place where a block's engine becomes code."""
    # oneDNN's fused primitives serve plans alone, whose weights are packed once: here the library does its passes.
    by: dict[str, type[Library]] = dict.fromkeys(("cudnn", "onednn", "aten"), Library)
    passes: Any = reference
    if {"triton", "stem"} & {engines.infer, engines.fprop, engines.dgrad, engines.wgrad, engines.passes}:
        from fastres.ops import triton_engine

        by |= {"triton": triton_engine.Kernels, "stem": triton_engine.Stem}
        passes = triton_engine.passes if engines.passes == "triton" else reference
    facts = problem, eps, batch_statistics, engines, passes
    infer, fprop, dgrad, wgrad = (
        by[name](*facts) for name in (engines.infer, engines.fprop, engines.dgrad, engines.wgrad)
    )
    return ConvBN(
        *facts,
        infer=infer.infer,
        infer_live=infer.infer_live,
        fprop=fprop.fprop,
        fprop_joined=fprop.fprop_joined,
        dgrad=dgrad.dgrad,
        dgrad_masked=dgrad.dgrad_masked,
        dgrad_joined=dgrad.dgrad_joined,
        wgrad=wgrad.wgrad,
    )


@lru_cache(maxsize=4096)
def conv_bn(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: Geometry,
    eps: float,
    batch_statistics: bool,
    dtype: torch.dtype,
    device: torch.device,
    choice: tuple[Any, ...],
) -> ConvBN:
    """The pair on x [N, H, W] (channels by w, [K, C/groups, R, S]) in `dtype`, by the engines of dispatch. choice:
    `dispatch.choice`."""
    from fastres.kernels.problem import ConvProblem

    k, c, r, s = w_shape
    problem = ConvProblem(*x_shape, c * geometry.groups, k, r, s, *geometry)
    return bind(problem, eps, batch_statistics, dispatch.engines(problem, dtype, device))
