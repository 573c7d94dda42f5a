"""The backward pass of one block, from its last BatchNorm to its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastres.ops.conv_bn import ConvBN
from fastres.ops.ends import BlockKept, End, Gradient
from fastres.ops.layout import like_parameter, nchw
from fastres.ops.reference import BNBackward, EndNorms, OnLoad
from fastres.ops.side_stream import SideStream


@dataclass
class Backward:
    """The backward pass of one block; `run` returns the block's gradients.

    No dgrad or wgrad runs for a gradient that isn't required.

    z_i is the output of the convolution of pair i, g_i the gradient at the output of its BatchNorm with the mask of the
    following ReLU applied, and dz_i = c_g g_i + c_z z_i + c_1 the gradient at z_i.

    pairs: the block's pairs; a projection's pair comes last. kept: the tensors that the block's forward saved.
    out: the block's output [N, P, Q, K], or None if the backward of `end` doesn't read it.
    taps: the max pool's taps (`reference.normalize_max_pool`), or None if the block doesn't end in a pool.
    parameters: (filters, BN weight, BN bias) of each pair, as one flat list. needs_x, needs: whether x and each of the
    parameters require a gradient.
    end_below: (z, mean) of the BatchNorms that end the previous block, or None if that block's backward doesn't follow.
    If given, dx may be returned with the previous block's last ReLU mask applied and the partial sums of these
    BatchNorms.
    """

    pairs: Sequence[ConvBN]
    end: End
    kept: BlockKept
    out: Tensor | None
    taps: Tensor | None
    parameters: Sequence[Any]
    needs_x: bool
    needs: Sequence[bool]
    end_below: EndNorms | None = None

    def run(self, dout: Gradient) -> tuple[Gradient | None, list[Tensor | None]]:
        """Return dx and a list with one gradient for each parameter. Gradients that aren't required are None.

        dout: the gradient at the block's output. A filter gradient [K, C/groups, R, S] may have another dtype than its
        parameter; the caller casts all such gradients together (`layout.cast_gradients`).
        """
        self.grads: list[Tensor | None] = [None] * len(self.parameters)
        device = self.kept.x.device
        overlap = self.pairs[0].engines.fusions.overlap and SideStream.serves(device)
        self.side_stream = SideStream(device) if overlap else None
        try:
            return self._run(dout), self.grads
        finally:
            if self.side_stream is not None:
                self.side_stream.join()

    def _run(self, dout: Gradient) -> Gradient | None:
        i = len(self.pairs) + self.end.last
        # If bn is None, `dz` holds dz_i. Else it holds g_i, and dgrad and wgrad compute dz_i from g_i and bn.
        dz, bn, dx_proj = self._end(i, dout)
        while dz is not None and i > 0:
            pair, kept, below = self.pairs[i], self.kept.pairs[i], self.kept.pairs[i - 1]
            affine = (below.scale, below.shift)
            read = (below.z, affine) if kept.activation is None else (kept.activation, None)
            self._weight_grad(i, dz, bn, *read)
            if not self._needed_below(i):
                return None
            g, mask, partials = pair.dgrad_masked(dz, kept.w, bn, below.z, below.mean, affine)
            i -= 1
            pair, bn = self.pairs[i], self._bn(i, partials)
            if not self._needed_at(i):
                return None
            if mask is None and pair.fuses(bn):
                dz = g
            else:
                dz, bn = pair.passes.backward_apply(g, *bn, mask=mask), None
        if dz is None:
            return None
        self._weight_grad(0, dz, bn, self.kept.x, None)
        return self._into_input(dz, bn, dout, dx_proj) if self.needs_x else None

    def _end(self, i: int, dout: Gradient) -> tuple[Tensor | None, OnLoad, Tensor | None]:
        """Return (dz, bn, the projection's share of dx) for the main branch's last pair, whose index is i.

        dz is None if no convolution's gradient depends on it. If bn is not None, the first entry holds g instead of dz
        (see `_run`). The third entry is None without a projection, or if dx isn't required.

        The entry is g only if dout is masked already and there is no projection. With an unmasked gradient, dgrad and
        wgrad would each have to read a third tensor, the mask; instead dz is written once and read twice.
        """
        pair, last, projection = self.pairs[i], self.kept.pairs[i], self.kept.pairs[-1]
        dy, sums = dout
        masked = {"mask": None} if sums is not None else self.end.gradient_arguments(self.out, last, self.taps)
        if not self.end.projects:
            bn = self._bn(i, pair.passes.backward_reduce(dy, last.z, last.mean, **masked) if sums is None else sums)
            if not self._needed_at(i):
                return None, None, None
            if sums is not None and pair.fuses(bn):
                return dy, bn, None
            return pair.passes.backward_apply(dy, *bn, **masked), None, None
        if sums is None:
            sums = pair.passes.backward_reduce(
                dy, last.z, last.mean, **masked, projection=(projection.z, projection.mean)
            )
        bn, bn_proj = self._bn(i, sums[0]), self._bn(i + 1, sums[1])
        if not (self._needed_at(i) or self.needs[-3]):
            return None, None, None
        dz, dz_proj = pair.passes.backward_apply(dy, *bn, **masked, projection=bn_proj)
        self._weight_grad(i + 1, dz_proj, None, self.kept.x, None)
        return dz, None, self.pairs[-1].dgrad(dz_proj, projection.w, None) if self.needs_x else None

    def _needed_below(self, i: int) -> bool:
        """Return whether anything before pair i's convolution requires a gradient."""
        return self.needs_x or any(self.needs[: 3 * i])

    def _needed_at(self, i: int) -> bool:
        """Return whether pair i's dgrad or wgrad is required."""
        return self._needed_below(i) or self.needs[3 * i]

    def _bn(self, i: int, partials: Tensor) -> BNBackward:
        """Store the weight and bias gradients of BN i, if required; return z and the coefficients that turn g into dz.

        partials: the partial sums of `reference.backward_reduce`.
        """
        pair, kept = self.pairs[i], self.kept.pairs[i]
        weight, count = self.parameters[3 * i + 1], pair.problem.pixels
        dweight, dbias, *coefficients = pair.passes.finish_backward(
            partials, weight, kept.mean, kept.rstd, count, batch_statistics=pair.batch_statistics
        )
        for at, grad in ((3 * i + 1, dweight), (3 * i + 2, dbias)):
            parameter = self.parameters[at]
            if parameter is not None and self.needs[at]:
                self.grads[at] = grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)
        return BNBackward(kept.z, *coefficients)

    def _weight_grad(self, i: int, dz: Tensor, bn: OnLoad, a: Tensor, prologue: Any) -> None:
        if not self.needs[3 * i]:
            return
        operands = i, dz, bn, a, prologue
        self.grads[3 * i] = self._dw(*operands) if self.side_stream is None else self.side_stream(self._dw, *operands)

    def _dw(self, i: int, dz: Tensor, bn: OnLoad, a: Tensor, prologue: Any) -> Tensor:
        weight = self.parameters[3 * i]
        dw = self.pairs[i].wgrad(dz, a, bn, prologue, weight.dtype)
        return like_parameter(dw, weight) if dw.dtype == weight.dtype else nchw(dw)

    def _into_input(self, dz: Tensor, bn: OnLoad, dout: Gradient, dx_proj: Tensor | None) -> Gradient:
        """Return dx: the first convolution's share plus the shortcut's."""
        pair, w = self.pairs[0], self.kept.pairs[0].w

        def dgrad(joins: bool = True, **residual: Any) -> Gradient:
            if self.end_below is None or not joins:
                return Gradient(pair.dgrad(dz, w, bn, **residual))
            return Gradient(*pair.dgrad_joined(dz, w, bn, self.kept.x, self.end_below, **residual))

        return self.end.backward(pair, dgrad, dout, self.out if dout.sums is None else None, dx_proj)
