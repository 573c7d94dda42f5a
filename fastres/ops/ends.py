"""The ends of blocks. An end is what follows a block's last BatchNorm, whose output is y.

Relu                 relu(y)
Linear               y
Add, Project, Pad    relu(y + shortcut(x)); the shortcut is the identity, a projection or option A (zero padding)
Join                 relu(y + another tensor)
Pool                 maxpool(relu(y))

Each end is a class with its definition in plain PyTorch, its forward and its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres.ops import reference
from fastres.ops.conv_bn import ConvBN, FrozenPair, Kept
from fastres.ops.layout import nhwc, wide
from fastres.ops.reference import Affine, EndNorms, Pair


class BlockKept(NamedTuple):
    """The tensors that a block's forward saves for its backward.

    x: the block's input as its first convolution read it, NHWC. pairs: the tensors of each pair, a projection's last.
    """

    x: Tensor
    pairs: Sequence[Kept]


@dataclass(frozen=True)
class Pending:
    """A block's output that is not computed yet: [relu](scale z + shift [+ shortcut]).

    z: the output [N, P, Q, K] of the main branch's last convolution, whose pair is `pair`. affine: (scale, shift).
    addend: the keyword arguments of `reference.normalize` for the ReLU and the shortcut.
    """

    pair: ConvBN
    z: Tensor
    affine: Affine
    addend: dict[str, Any]

    def compute(self) -> Tensor:
        """Return the output [N, P, Q, K]."""
        return self.pair.passes.normalize(self.z, *self.affine, **self.addend)


class Gradient(NamedTuple):
    """The gradient at a block's output, NHWC.

    sums: None, or the partial sums of the BatchNorms before the block's last ReLU, as `reference.backward_reduce`
    returns them; () in a frozen block, which needs none. If they are given, `value` is already masked by that ReLU; if
    None, it may be unmasked.
    """

    value: Tensor
    sums: Any = None


@dataclass(frozen=True)
class End:
    """The base class of all ends; its own methods implement a plain ReLU.

    word: the name of the end in the operators' schemas, where it stands for the end together with `sizes`.
    """

    word: ClassVar[str] = "relu"
    tail: ClassVar[str] = "-ReLU"  # suffix of a pattern's name, as in conv-BN-ReLU-conv-BN-add-ReLU
    last: ClassVar[int] = -1  # index of the main branch's last pair
    reads_output: ClassVar[bool] = False  # whether backward reads the ReLU's mask from the block's output
    masks: ClassVar[bool] = True  # whether there is a ReLU

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(kernel, stride, pad) of a pool, (0, stride, 0) for option A, else (0, 1, 0); for the operators' schemas."""
        return 0, 1, 0

    def keeps_output(self, frozen: bool) -> bool:
        """Return whether backward reads the block's output. frozen: whether it is a frozen block (`frozen`)."""
        return self.reads_output or (frozen and self.masks)

    @property
    def projects(self) -> bool:
        """Whether the last pair is a projection on the shortcut."""
        return self.last == -2

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """Run the whole block in plain PyTorch, differentiable, on x [N, C, H, W] with `pairs`."""
        return reference.plain_block(x, pairs)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        """Return the keyword arguments of `reference.normalize` for what follows the last BatchNorm."""
        return {"relu": True, "residual": None}

    def pending(self, pairs: Sequence[ConvBN], kept: BlockKept) -> Pending:
        """Return the output of a block whose convolutions are done, without computing it."""
        last = kept.pairs[self.last]
        return Pending(pairs[self.last], last.z, (last.scale, last.shift), self.addend(kept))

    def finish(self, pairs: Sequence[ConvBN], kept: BlockKept) -> tuple[Tensor, Tensor | None]:
        """Compute the block's output; return it, NHWC, and the taps of a max pool or None if there is no pool.

        A tap is the position of a maximum within its window (`reference.normalize_max_pool`).
        """
        return self.pending(pairs, kept).compute(), None

    def added(self, x: Tensor, projected: Tensor | None) -> Tensor | None:
        """Return the tensor that `run` adds before the ReLU: x, the projection's output or, if nothing, None."""
        return None

    def run(self, last: FrozenPair, a: Tensor, x: Tensor, projected: Tensor | None, taps: bool) -> Any:
        """Run the last convolution and everything after it in a frozen block; return (the output, NHWC, a pool's taps).

        The taps are None if there is no pool, and without `taps`. a: the convolution's input, NHWC. x: the block's
        input. projected: the projection's output, if there is one.
        """
        return last.run(a, self.added(x, projected)), None

    def unpooled(self, pair: ConvBN, g: Tensor, taps: Tensor | None) -> Tensor:
        """Return the gradient before the max pool [N, P, Q, K], from g, the gradient at its output; g without a pool.

        pair: the main branch's last.
        """
        return g

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        """Return the arguments `mask` and, after a pool, `pool` of `reference.gradient` at the last BatchNorm.

        out: the block's output, if `reads_output`. last: the tensors saved by the main branch's last pair. taps: the
        pool's.
        """
        return {"mask": (last.scale, last.shift)}  # the mask is recomputed from z, which backward reads anyway

    def residual(self, dout: Gradient, mask: Tensor | None, dx_proj: Tensor | None) -> dict[str, Any]:
        """Return the keyword arguments with which `ConvBN.dgrad` adds the shortcut's share of dx; {} if it adds none.

        dout: the gradient at the block's output. mask: the block's output if the ReLU's mask has not been applied to
        dout yet (dout counts as 0 where mask <= 0), else None. dx_proj: the projection's share of dx, or None.
        """
        return {}

    def backward(self, pair: ConvBN, dgrad: Callable[..., Gradient], *given: Any) -> Gradient:
        """Return the gradient at the block's input.

        pair: the block's first. dgrad(joins=True, **residual) runs the dgrad of the pair's convolution; if `joins`, it
        may also apply the previous block's ReLU mask and compute the partial sums of the BatchNorms before that ReLU.
        given: the arguments of the method `residual`.
        """
        return dgrad(**self.residual(*given))

    def batch_norms(self, kept: BlockKept) -> EndNorms:
        """Return (z, mean) of the last BatchNorm, and of the projection's BatchNorm or None."""
        last, projection = kept.pairs[self.last], kept.pairs[-1]
        return (last.z, last.mean), (projection.z, projection.mean) if self.projects else None

    def out_shape(self, z: Sequence[Any]) -> Sequence[Any]:
        """Return the shape of the block's output, given the shape [N, P, Q, K] of the last convolution's output."""
        return z


class Relu(End):
    """relu(y)."""


class Linear(End):
    """y, without a ReLU."""

    word, tail, masks = "linear", "", False

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.branch(x, pairs)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        return {"relu": False, "residual": None}

    def run(self, last: FrozenPair, a: Tensor, x: Tensor, projected: Tensor | None, taps: bool) -> Any:
        return last.run(a, relu=False), None

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        return {"mask": None}


class _Sum(End):
    """A ReLU after an addition. Its mask comes from the output, because z alone doesn't determine it."""

    reads_output = True

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        return {"mask": out}


class Add(_Sum):
    """relu(y + x)."""

    word, tail = "add", "-add-ReLU"

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.residual_block(x, pairs)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        return {"relu": True, "residual": kept.x}

    def added(self, x: Tensor, projected: Tensor | None) -> Tensor | None:
        return x

    def residual(self, dout: Gradient, mask: Tensor | None, dx_proj: Tensor | None) -> dict[str, Any]:
        return {"residual": dout.value, "residual_mask": mask}


class Project(_Sum):
    """relu(y + projection(x)); the projection is the block's last pair."""

    word, tail, last = "project", "-project-ReLU", -2

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.residual_block(x, pairs[:-1], lambda x: reference.branch(x, pairs[-1:]))

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        z, _, _, scale, shift, *_ = kept.pairs[-1]
        return {"relu": True, "residual": z, "residual_scale": scale, "residual_shift": shift}

    def added(self, x: Tensor, projected: Tensor | None) -> Tensor | None:
        return projected

    def residual(self, dout: Gradient, mask: Tensor | None, dx_proj: Tensor | None) -> dict[str, Any]:
        return {"residual": dx_proj}


@dataclass(frozen=True)
class Pad(_Sum):
    """relu(y + pad_shortcut(x)): option A, x subsampled by `stride` with zero channels appended."""

    stride: int
    word, tail = "pad", "-pad-ReLU"

    @property
    def sizes(self) -> tuple[int, int, int]:
        return 0, self.stride, 0

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.pad_shortcut_add_relu(reference.branch(x, pairs), x, self.stride)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        return {"relu": True, "residual": kept.x, "residual_stride": self.stride}

    def run(self, last: FrozenPair, a: Tensor, x: Tensor, projected: Tensor | None, taps: bool) -> Any:
        z, _ = last.pair.fprop(a, last.w, None)
        return last.pair.passes.normalize(z, *last.affine, relu=True, residual=x, residual_stride=self.stride), None

    def backward(self, pair: ConvBN, dgrad: Callable[..., Gradient], *given: Any) -> Gradient:
        (dout, mask, _), dx = given, dgrad(joins=False).value
        return Gradient(pair.passes.pad_shortcut_backward(dx, dout.value, stride=self.stride, mask=mask))


@dataclass(frozen=True)
class Join(_Sum):
    """relu(y + joined), where `joined` is a tensor from elsewhere in the net."""

    joined: Tensor | None = None  # [N, K, P, Q]; None in a backward, which doesn't read it
    word, tail = "join", "-join-ReLU"

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.residual_block(x, pairs, lambda _: self._joined)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        return {"relu": True, "residual": nhwc(self._joined)}

    def added(self, x: Tensor, projected: Tensor | None) -> Tensor | None:
        return nhwc(self._joined)

    @property
    def _joined(self) -> Tensor:
        assert self.joined is not None
        return self.joined


@dataclass(frozen=True)
class Pool(End):
    """maxpool(relu(y)), the end of a stem."""

    kernel: int
    stride: int
    pad: int
    word, tail = "pool", "-ReLU-maxpool"

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.kernel, self.stride, self.pad

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.stem(x, *pairs[0], lambda y: F.max_pool2d(y, *self.sizes))

    def finish(self, pairs: Sequence[ConvBN], kept: BlockKept) -> tuple[Tensor, Tensor | None]:
        last = kept.pairs[-1]
        return pairs[-1].passes.normalize_max_pool(last.z, last.scale, last.shift, **vars(self))

    def run(self, last: FrozenPair, a: Tensor, x: Tensor, projected: Tensor | None, taps: bool) -> Any:
        z, _ = last.pair.fprop(a, last.w, None)
        return last.pair.passes.normalize_max_pool(z, *last.affine, **vars(self), taps=taps)

    def unpooled(self, pair: ConvBN, g: Tensor, taps: Tensor | None) -> Tensor:
        assert taps is not None
        p = pair.problem
        ones = torch.ones(p.K, dtype=wide(g.dtype), device=g.device)
        z = g.new_empty((p.N, p.P, p.Q, p.K))  # only its shape is used
        return pair.passes.backward_apply(g, z, ones, None, None, pool=reference.Pool(taps, *self.sizes))

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        assert taps is not None
        return {"mask": (last.scale, last.shift), "pool": reference.Pool(taps, *self.sizes)}

    def out_shape(self, z: Sequence[Any]) -> Sequence[Any]:
        n, p, q, k = z
        p, q = ((size + 2 * self.pad - self.kernel) // self.stride + 1 for size in (p, q))
        return n, p, q, k


def of_words(word: str, sizes: Sequence[int], joined: Tensor | None = None) -> End:
    """Return the end that `word` and `sizes` name in the operators' schemas.

    joined: the tensor [N, K, P, Q] that a `Join` adds. Raises ValueError for an unknown word.
    """
    known: dict[str, Callable[[], End]] = {
        "relu": Relu,
        "linear": Linear,
        "add": Add,
        "project": Project,
        "pad": lambda: Pad(sizes[1]),
        "join": lambda: Join(joined),
        "pool": lambda: Pool(*sizes),
    }
    if word not in known:
        raise ValueError(f"unknown end {word!r}; accepted: {', '.join(known)}")
    return known[word]()
