"""One call of a block: everything about it except its input and parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops import reference
from fastres.ops.conv_bn import Buffers, ConvBN, conv_bn, uses_batch_statistics
from fastres.ops.ends import BlockKept, End, Pending, Pool
from fastres.ops.layout import Geometry, dense

Pair = tuple[Any, Any]  # (conv, norm): modules
Block = tuple[Sequence[Pair], End]  # a projection's pair comes last


@dataclass(frozen=True)
class Call:
    """Everything about one block's call except its input and parameters.

    The engines are bound already, because autograd runs the backward on threads that don't see `dispatch`'s contexts.
    """

    pairs: tuple[ConvBN, ...]  # a projection's comes last
    buffers: tuple[Buffers, ...]
    end: End

    @property
    def depth(self) -> int:
        """The number of pairs on the main branch."""
        return len(self.pairs) + self.end.last + 1

    @property
    def frozen(self) -> bool:
        """Whether all BatchNorms use running statistics, so that `frozen` runs the block."""
        return not any(pair.batch_statistics for pair in self.pairs)

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x [N, C, H, W] as the first convolution reads it, [N, H, W, C].

        It is contiguous in `dtype`. Exception: a stem that packs its images takes any strides and dtype, so for it this
        is a view of x (a copy only if x's negative bit is set).
        """
        packs = isinstance(self.end, Pool) and self.pairs[0].engines.fprop == "stem"
        return x.resolve_neg().permute(0, 2, 3, 1) if packs else dense(x, dtype)

    def pending(self, kept: BlockKept) -> Pending:
        """Return the block's output as a `Pending`, computable once the block's convolutions are done."""
        return self.end.pending(self.pairs, kept)

    @property
    def words(self) -> tuple[Any, ...]:
        """The non-tensor arguments of the operator `conv_bn_act`: geometry, eps, momentum, training, end and sizes."""
        sizes = [size for pair in self.pairs for size in pair.geometry]
        eps, momentum = [pair.eps for pair in self.pairs], [each.momentum for each in self.buffers]
        training = [pair.batch_statistics for pair in self.pairs]
        return sizes, eps, momentum, training, self.end.word, list(self.end.sizes)

    def definition(self, x: Tensor, parameters: Sequence[Any]) -> Tensor:
        """Run the block in plain PyTorch, so that autograd can differentiate it any number of times.

        x is [N, C, H, W]. Running statistics are not updated.
        """

        def plain(i: int) -> reference.Pair:
            (filters, weight, bias), pair, buffers = parameters[3 * i : 3 * i + 3], self.pairs[i], self.buffers[i]
            mean, var = (None, None) if pair.batch_statistics else (buffers.mean, buffers.var)

            def conv(a: Tensor) -> Tensor:
                return F.conv2d(a, filters.to(a.dtype), None, *pair.geometry)

            def norm(z: Tensor) -> Tensor:
                return F.batch_norm(z, mean, var, weight, bias, pair.batch_statistics, 0.0, pair.eps)

            return conv, norm

        return self.end.definition(x, [plain(i) for i in range(len(self.pairs))])


def bound(shape: Sequence[int], statics: Sequence[tuple[Any, ...]], end: End, *facts: Any) -> tuple[ConvBN, ...]:
    """Return the pairs of a block on x of `shape` [N, C, H, W], bound to their engines.

    statics: for each pair (filter shape [K, C/groups, R, S], geometry, eps, whether it uses batch statistics). facts:
    dtype, device and `dispatch.choice`. Raises ValueError, as `nn.BatchNorm2d` does, if batch statistics would be
    computed from one value per channel.
    """
    n, _, *first = shape
    pairs: list[ConvBN] = []
    for i, static in enumerate(statics):
        on_input = i == 0 or (end.projects and i + 1 == len(statics))
        pair = conv_bn((n, *(first if on_input else pairs[-1].out_size)), *static, *facts)
        if pair.batch_statistics and pair.problem.pixels == 1:
            size = torch.Size((n, pair.problem.K, *pair.out_size))
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        pairs.append(pair)
    return tuple(pairs)


def prepare(shape: Sequence[int], blocks: Sequence[Block], *facts: Any) -> tuple[tuple[Call, ...], list[Any]]:
    """Return a `Call` for each block on x of `shape` [N, C, H, W], and the flat list of their parameters.

    The list has (filters, BN weight, BN bias) for each pair. facts: as for `bound`.
    """
    calls, parameters = [], []
    for modules, end in blocks:
        statics: list[tuple[Any, ...]] = []
        for conv, bn in modules:
            filters = conv.weight
            geometry = Geometry(conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups)
            statics.append((tuple(filters.shape), geometry, bn.eps, uses_batch_statistics(bn)))
            parameters += [filters, bn.weight, bn.bias]
        device = parameters[-3].device
        buffers = tuple(Buffers.of(bn, device) for _, bn in modules)
        pairs = bound(shape, statics, end, *facts)
        calls.append(Call(pairs, buffers, end))
        shape = (shape[0], 0, *pairs[end.last].out_size)
    return tuple(calls), parameters


def split(calls: Sequence[Call], tensors: Sequence[Any], per_pair: int) -> list[Sequence[Any]]:
    """Split `tensors`, which has `per_pair` entries for each pair, into one sequence for each call."""
    if len(calls) == 1:
        return [tensors]
    ends = [*accumulate((per_pair * len(call.pairs) for call in calls), initial=0)]
    return [tensors[a:b] for a, b in pairwise(ends)]
