"""Blocks whose BatchNorms all use running statistics: in eval mode, or FrozenBatchNorm2d.

Such a BatchNorm is a fixed scale and shift for each channel. The convolution's epilogue applies both, together with the
ReLU or the addition of the shortcut, so z = conv(a, w) is never stored. Training saves what the next convolution reads,
which is also the mask of the ReLU, and what eager PyTorch saves for a net without BatchNorm. With g, the gradient at a
BatchNorm's output, masked by the ReLU after it, and its input a, the backward is

    dbias = sum g,   G = wgrad(g, a),   dw = scale G,   da = dgrad(g, scale w)
    dweight = rstd (sum g z - mean dbias),   sum g z = sum over c, r, s of w G, for each output channel

The last equation holds because z is linear in w, and saves storing z. Source: You et al. (2023), "Efficient ConvBN
Blocks for Transfer Learning and Beyond", section 3 (Tune mode).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastres.ops.backward import Backward
from fastres.ops.call import Call, split
from fastres.ops.conv_bn import FrozenPair, Kept
from fastres.ops.ends import BlockKept, Gradient
from fastres.ops.layout import krsc, like_parameter, nchw
from fastres.ops.reference import BNBackward, relu_backward


def infer(call: Call, x: Tensor, dtype: torch.dtype, parameters: Sequence[Any]) -> Tensor:
    """Run one block on x [N, H, W, C] and save nothing; return its output [N, P, Q, K].

    parameters: (filters, BN weight, BN bias) for each pair.
    """
    weights = [krsc(filters, dtype) for filters in parameters[::3]]
    pairs = [FrozenPair(*each) for each in zip(call.pairs, weights, _norms(call, parameters), strict=True)]
    return _run(call, pairs, x, taps=False)[1]


def forward(
    calls: Sequence[Call], x: Tensor, weights: Sequence[Tensor], parameters: Sequence[Any], needs: Sequence[bool]
) -> tuple[list[BlockKept], Tensor, Tensor | None]:
    """Run the blocks on x [N, H, W, C]; return the tensors saved for backward, the output and a pool's taps or None.

    weights: the filters of each pair as returned by `krsc`. parameters: (filters, BN weight, BN bias) for each pair.
    needs: whether x and each of the parameters require a gradient.
    """
    kept, taps, at = [], None, 1
    for call, own_weights, own in zip(calls, split(calls, weights, 1), split(calls, parameters, 3), strict=True):
        pairs: list[FrozenPair] = []
        for conv_bn, w, norm in zip(call.pairs, own_weights, _norms(call, own), strict=True):
            vectors = conv_bn.passes.running_statistics(*norm, conv_bn.eps)
            pairs.append(FrozenPair(conv_bn, w, norm, vectors))
        inputs, out, taps = _run(call, pairs, x, taps=True)
        of_pairs = []
        for i, pair in enumerate(pairs):
            # Read by the weight gradient of this convolution, or as the mask of the ReLU for the layers before it.
            read = 0 < i < call.depth and any(needs[: at + 3 * i + 2])
            assert pair.vectors is not None
            of_pairs.append(Kept._make((None, *pair.vectors, pair.w, inputs[i] if read else None)))
        kept.append(BlockKept(x, of_pairs))
        x, at = out, at + len(own)
    return kept, x, taps


def _norms(call: Call, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return (running mean, running variance, weight, bias) for each pair."""
    return [(b.mean, b.var, *parameters[3 * i + 1 : 3 * i + 3]) for i, b in enumerate(call.buffers)]


def _run(
    call: Call, pairs: Sequence[FrozenPair], x: Tensor, *, taps: bool
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Return the input of each convolution on the main branch, the block's output and a pool's taps or None."""
    projected = pairs[-1].run(x, relu=False) if call.end.projects else None
    inputs, last = [x], call.depth - 1
    for pair in pairs[:last]:
        inputs.append(pair.run(inputs[-1]))
    return inputs, *call.end.run(pairs[last], inputs[-1], x, projected, taps)


class FrozenBackward(Backward):
    """The backward pass of one block that `forward` ran.

    out: the block's output [N, P, Q, K]. end_below: not None if the block's input is the output of a ReLU and only this
    block reads it; dx is then masked by that ReLU.
    """

    def _run(self, dout: Gradient) -> Gradient | None:
        last = len(self.pairs) + self.end.last
        g = self.end.unpooled(self.pairs[last], self._masked(dout), self.taps)
        top, dx_proj = Gradient(g, ()), None
        if self.end.projects:
            self._of_parameters(last + 1, g, self.kept.x)
            dx_proj = self._dgrad(last + 1, g) if self.needs_x else None
        for i in range(last, 0, -1):
            a = self.kept.pairs[i].activation
            self._of_parameters(i, g, a)
            if not self._needed_below(i):
                return None
            g = self._dgrad(i, g, relu_mask=a)
        self._of_parameters(0, g, self.kept.x)
        if not self.needs_x:
            return None

        def dgrad(joins: bool = True, **residual: Any) -> Gradient:
            if self.end_below is None or not joins:
                return Gradient(self._dgrad(0, g, **residual))
            return Gradient(self._dgrad(0, g, **residual, relu_mask=self.kept.x), ())

        return self.end.backward(self.pairs[0], dgrad, top, None, dx_proj)

    def _masked(self, dout: Gradient) -> Tensor:
        """Return the gradient at the block's output, masked by its ReLU if it has one."""
        if dout.sums is not None or self.out is None:
            return dout.value
        return relu_backward(dout.value, self.out)

    def _dgrad(self, i: int, g: Tensor, **epilogue: Any) -> Tensor:
        return self.pairs[i].dgrad(g, self.kept.pairs[i].w, self._scaling(i), **epilogue)

    def _scaling(self, i: int) -> BNBackward:
        return BNBackward(None, self.kept.pairs[i].scale, None, None)

    def _of_parameters(self, i: int, g: Tensor, a: Any) -> None:
        """Store the gradients of pair i's filters, BN weight and BN bias, if required. a: the convolution's input."""
        if not any(self.needs[3 * i : 3 * i + 3]):
            return
        stream = self.side_stream
        found = self._gradients(i, g, a) if stream is None else stream(self._gradients, i, g, a)
        self.grads[3 * i : 3 * i + 3] = found

    def _gradients(self, i: int, g: Tensor, a: Any) -> tuple[Tensor | None, ...]:
        """Return (dw, dweight, dbias) of pair i; None for those that are not required."""
        pair, kept, filters = self.pairs[i], self.kept.pairs[i], self.parameters[3 * i]
        needs_filters, needs_weight, needs_bias = self.needs[3 * i : 3 * i + 3]
        dw: Any = None
        dweight: Any = None
        dbias: Any = None
        if needs_bias or needs_weight:
            dbias = g.sum((0, 1, 2), dtype=kept.mean.dtype)
        if needs_weight:
            of_g = pair.wgrad(g, a, None, None, kept.mean.dtype).to(kept.mean.dtype)
            dweight = kept.rstd * ((kept.w * of_g).sum((1, 2, 3)) - kept.mean * dbias)
            dw = kept.scale[:, None, None, None] * of_g
        elif needs_filters:
            dw = pair.wgrad(g, a, self._scaling(i), None, filters.dtype)
        if dw is not None:
            dw = like_parameter(dw, filters) if dw.dtype == filters.dtype else nchw(dw)
        return dw if needs_filters else None, dweight, dbias if needs_bias else None
