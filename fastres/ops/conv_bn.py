"""One pair (a convolution with its BatchNorm) of a block: its static properties, and one callable for each step.

`conv_bn` asks `dispatch` once for each combination of shape and settings and caches the pair with its steps bound to
engines, so that later calls don't choose again.
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
    """A pair for one input shape, and its operations. Activations are NHWC, filters w are KRSC.

    Arguments and results that operations share:
    prologue: (s, t), each [C], if the convolution's input is relu(s a + t); None if it is a.
    partials: partial results of z's batch statistics (`reference.statistics`); None with running statistics.
    norm: (running mean, running variance, weight, bias) of the BatchNorm.
    bn: z and the coefficients of BatchNorm's backward, or None. With bn, the argument `dz` holds g, and the operation
    computes dz = c_g g + c_z z + c_1; without, it holds dz.
    """

    # (x, w, scale, shift, residual=None, relu=True): [relu](scale conv(x) + shift + residual)
    infer: Callable[..., Tensor]
    infer_live: Callable[..., Tensor]  # (x, w, norm, residual=None, relu=True): `infer` with scale and shift of norm
    fprop: Callable[..., tuple[Tensor, Tensor | None]]  # (a, w, prologue): z, partials
    # (z, affine, w, **addend): (x, conv(x), partials of conv(x)). z: the output of the previous block's last
    # convolution; x = relu(scale z + shift + shortcut): the previous block's output; affine: (scale, shift); addend:
    # the keyword arguments that `End.addend` returns
    fprop_joined: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    # (dz, w, bn, residual=, residual_mask=, relu_mask=): dx + residual; the residual counts as 0 where
    # residual_mask <= 0, and the sum is set to 0 where relu_mask <= 0
    dgrad: Callable[..., Tensor]
    # (dz, w, bn, z, mean, affine): the gradient at the output of the block's previous BN, as (dy, the mask that is
    # still to be applied to dy or None, partials of sum g and sum g (z - mean), where g is the masked dy). z, mean and
    # affine = (scale, shift) are the previous BN's
    dgrad_masked: Callable[..., tuple[Tensor, reference.Affine | None, Tensor]]
    # (dz, w, bn, out, end_below, residual=, residual_mask=): the gradient at `out`, the previous block's output, as
    # (dx, None); or, if dgrad's epilogue also masks it, as (dx set to 0 where out <= 0, partials as returned by
    # `reference.backward_reduce`)
    dgrad_joined: Callable[..., tuple[Tensor, Any]]
    # (dz, a, bn, prologue, dtype): dw KRSC in dtype; `library_engine.Library` may return it in dz's dtype instead
    wgrad: Callable[..., Tensor]

    @property
    def out_size(self) -> tuple[int, int]:
        """(P, Q): height and width of z."""
        return self.problem.P, self.problem.Q

    def statistics(self, partials: Tensor | None, weight: Tensor | None, bias: Tensor | None, buffers: Buffers) -> Any:
        """Return (mean, rstd, scale, shift), each [K], from `partials`, or if None from the running statistics.

        With partials, this also updates in place the running statistics (if `buffers.moves`) and the batch counter (if
        `buffers` has one).
        """
        if partials is None:
            return self.passes.running_statistics(buffers.mean, buffers.var, weight, bias, self.eps)
        mean, var = (buffers.mean, buffers.var) if buffers.moves else (None, None)
        moved = {"running_mean": mean, "running_var": var, "momentum": buffers.momentum, "counter": buffers.counter}
        return self.passes.finish_statistics(partials, weight, bias, self.eps, **moved)

    def fuses(self, bn: reference.BNBackward) -> bool:
        """Return whether dgrad and wgrad should take g and `bn` instead of a stored dz."""
        return self.engines.fuses_bn_backward(bn.c_z is not None)


class FrozenPair(NamedTuple):
    """A pair with running statistics, and the tensors of one call.

    w: the filters KRSC. norm: (running mean, running variance, weight, bias). vectors: the norm's (mean, rstd, scale,
    shift), or None: a kernel may then compute scale and shift itself.
    """

    pair: ConvBN
    w: Tensor
    norm: tuple[Any, ...]
    vectors: tuple[Tensor, ...] | None = None

    @property
    def affine(self) -> reference.Affine:
        """(scale, shift), each [K]."""
        known = self.vectors or self.pair.passes.running_statistics(*self.norm, self.pair.eps)
        return known[2], known[3]

    def run(self, a: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        """Return [relu](scale conv(a) + shift + residual), NHWC."""
        if self.vectors is None:
            return self.pair.infer_live(a, self.w, self.norm, residual, relu)
        return self.pair.infer(a, self.w, *self.affine, residual, relu)


class Kept(NamedTuple):
    """The tensors that a pair's forward saves for its backward.

    z is [N, P, Q, K]; mean, rstd, scale and shift are [K]. w: the filters KRSC in the compute dtype, which share the
    parameter's memory if that has this layout and dtype. activation: the convolution's input, saved only with
    `Engines.keeps_activation`.

    In a frozen block (`frozen`) z is None, and activation is saved for each convolution of the main branch but the
    first, if backward reads it.
    """

    z: Any
    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    w: Tensor
    activation: Tensor | None


class Buffers(NamedTuple):
    """A BatchNorm's buffers during one forward.

    mean, var: the running statistics [K], both None if the BatchNorm lacks either. moves: whether this forward updates
    them in place with the batch's statistics, of which momentum is the weight. counter: an integer [] that goes up by
    one with that update; None if `of` has counted the batch already, or if batches are not counted.
    """

    mean: Tensor | None
    var: Tensor | None
    moves: bool
    momentum: float
    counter: Tensor | None = None

    @staticmethod
    def of(bn: Any, device: torch.device) -> Buffers:
        """Return the buffers of bn, a BatchNorm2d or FrozenBatchNorm2d, for one forward on `device`.

        If bn counts batches, but the update can't be left to a kernel (so that `counter` is None), this counts the
        batch.
        """
        if not isinstance(bn, nn.BatchNorm2d):
            return Buffers(bn.running_mean, bn.running_var, False, 0.0)
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


def uses_batch_statistics(bn: Any) -> bool:
    """Return whether bn, a BatchNorm2d or FrozenBatchNorm2d, normalises with the statistics of the batch."""
    return isinstance(bn, nn.BatchNorm2d) and (bn.training or bn.running_mean is None or bn.running_var is None)


def refuse_capture(bn: Any) -> None:
    """Raise RuntimeError if bn has momentum=None in training while a CUDA graph is being captured.

    Such a layer averages over all batches, and the host reads the number of batches in every forward.
    """
    if not (isinstance(bn, nn.BatchNorm2d) and bn.momentum is None and bn.training and bn.track_running_stats):
        return
    if bn.num_batches_tracked is not None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"BatchNorm2d({bn.num_features}, momentum=None) averages over all batches: the host reads the number of "
            "batches in every step, which a CUDA graph can't do. Give the layer a momentum, or don't capture the step"
        )


def bind(problem: ConvProblem, eps: float, batch_statistics: bool, engines: Engines) -> ConvBN:
    """Return the pair with each operation bound to its engine; only this function maps a block's engines to code."""
    # oneDNN's fused primitives are used only in the plans of `optimize`, which pack their weights once. In a block,
    # ATen runs the steps.
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
    """Return the pair for one input shape, bound to the engines that `dispatch` chooses; cached (LRU).

    x_shape: (N, H, W); the number of channels follows from w_shape (K, C/groups, R, S) and the groups. dtype: of the
    activations. choice: the result of `dispatch.choice`, all other settings that the engines depend on; it is only part
    of the cache key.
    """
    from fastres.kernels.problem import ConvProblem

    k, c, r, s = w_shape
    problem = ConvProblem(*x_shape, c * geometry.groups, k, r, s, *geometry)
    return bind(problem, eps, batch_statistics, dispatch.engines(problem, dtype, device))
