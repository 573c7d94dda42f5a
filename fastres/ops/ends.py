"""How a block ends: what follows its last BatchNorm, what that means, how it runs forward and backward.

Relu, Linear         a ReLU; nothing
Add, Project, Pad    relu(y + shortcut(x)) with the identity, a projection, option A
Join                 relu(y + another tensor)
Pool                 maxpool(relu(y))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastres.ops import reference
from fastres.ops.conv_bn import ConvBN, Kept
from fastres.ops.layout import nhwc
from fastres.ops.reference import Affine, EndNorms, Pair


class BlockKept(NamedTuple):
    """What a block's forward leaves for its backward: its input x as its first convolution read it, NHWC, and what its
    pairs keep, a projection's last."""

    x: Tensor
    pairs: Sequence[Kept]


@dataclass(frozen=True)
class Pending:
    """A block's output that is not computed yet: relu(scale z + shift + shortcut). addend: `reference.normalize`'s
    arguments about the shortcut."""

    pair: ConvBN
    z: Tensor
    affine: Affine
    addend: dict[str, Any]

    def compute(self) -> Tensor:
        return self.pair.passes.normalize(self.z, *self.affine, **self.addend)


class Gradient(NamedTuple):
    """The gradient at a block's output, NHWC. With `sums` the mask of the block's last ReLU is applied, and they are
    the partials of the BatchNorms before it (`reference.backward_reduce`)."""

    value: Tensor
    sums: Any = None


@dataclass(frozen=True)
class End:
    """A ReLU, and what all ends have in common. word and sizes stand for an end in the operators' schemas."""

    word: ClassVar[str] = "relu"
    tail: ClassVar[str] = "-ReLU"  # of a pattern's name, behind conv-BN-ReLU-conv-BN
    last: ClassVar[int] = -1  # where the main branch's last pair stands
    reads_output: ClassVar[bool] = False  # backward takes the ReLU's mask from the block's output

    @property
    def sizes(self) -> tuple[int, int, int]:
        return 0, 1, 0

    @property
    def projects(self) -> bool:
        """Whether the last pair is the shortcut's."""
        return self.last == -2

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """The whole block in plain PyTorch: x [N, C, H, W] through `pairs`."""
        return reference.plain_block(x, pairs)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        """`reference.normalize`'s arguments about what follows the last BatchNorm."""
        return {"relu": True, "residual": None}

    def pending(self, pairs: Sequence[ConvBN], kept: BlockKept) -> Pending:
        """The output of a block whose convolutions are done."""
        last = kept.pairs[self.last]
        return Pending(pairs[self.last], last.z, (last.scale, last.shift), self.addend(kept))

    def finish(self, pairs: Sequence[ConvBN], kept: BlockKept) -> tuple[Tensor, Tensor | None]:
        """The block's output [N, P, Q, K], and a pool's taps."""
        return self.pending(pairs, kept).compute(), None

    def added(self, x: Tensor, projected: Tensor | None) -> Tensor | None:
        """What inference adds, of the block's input and its projection."""
        return None

    def infer(self, pair: ConvBN, a: Tensor, w: Tensor, norm: Any, x: Tensor, projected: Tensor | None) -> Tensor:
        """The last convolution and all that follows, by running statistics."""
        return pair.infer_live(a, w, norm, self.added(x, projected))

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        """`reference.gradient`'s arguments at the last BatchNorm, besides the gradient."""
        return {"mask": (last.scale, last.shift)}  # z is read anyway and says the same as the output

    def residual(self, dout: Gradient, mask: Tensor | None, dx_proj: Tensor | None) -> dict[str, Any]:
        """The shortcut's share of the gradient at the block's input, as `ConvBN.dgrad` adds it. mask: what dout is
        still to be masked by; dx_proj: the gradient through a projection."""
        return {}

    def backward(self, pair: ConvBN, dgrad: Callable[..., Gradient], *given: Any) -> Gradient:
        """The gradient at the block's input: `dgrad(joins=True, **residual)` of its first convolution, which may reach
        down into the block before where it `joins`. given: as of `residual`."""
        return dgrad(**self.residual(*given))

    def batch_norms(self, kept: BlockKept) -> EndNorms:
        """(z, mean) of the last BatchNorm, and of a projection's or None."""
        last, projection = kept.pairs[self.last], kept.pairs[-1]
        return (last.z, last.mean), (projection.z, projection.mean) if self.projects else None

    def out_shape(self, z: Sequence[Any]) -> Sequence[Any]:
        """[N, P, Q, K] of the block's output from that of the last convolution."""
        return z


class Relu(End):
    """relu(y): nothing is added."""


class Linear(End):
    word, tail = "linear", ""

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.branch(x, pairs)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        return {"relu": False, "residual": None}

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        return {"mask": None}


class _Sum(End):
    reads_output = True

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        return {"mask": out}


class Add(_Sum):
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
    stride: int
    word, tail = "pad", "-pad-ReLU"

    @property
    def sizes(self) -> tuple[int, int, int]:
        return 0, self.stride, 0

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.pad_shortcut_add_relu(reference.branch(x, pairs), x, self.stride)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        return {"relu": True, "residual": kept.x, "residual_stride": self.stride}

    def infer(self, pair: ConvBN, a: Tensor, w: Tensor, norm: Any, x: Tensor, projected: Tensor | None) -> Tensor:
        z, _ = pair.fprop(a, w, None)
        _, _, *affine = pair.passes.running_statistics(*norm, pair.eps)
        return pair.passes.normalize(z, *affine, relu=True, residual=x, residual_stride=self.stride)

    def backward(self, pair: ConvBN, dgrad: Callable[..., Gradient], *given: Any) -> Gradient:
        (dout, mask, _), dx = given, dgrad(joins=False).value
        return Gradient(pair.passes.pad_shortcut_backward(dx, dout.value, stride=self.stride, mask=mask))


@dataclass(frozen=True)
class Join(_Sum):
    joined: Tensor | None = None  # [N, K, P, Q], in a forward
    word, tail = "join", "-join-ReLU"

    def definition(self, x: Tensor, pairs: Sequence[Pair]) -> Tensor:
        return reference.residual_block(x, pairs, lambda _: self._joined)

    def addend(self, kept: BlockKept) -> dict[str, Any]:
        return {"relu": True, "residual": nhwc(self._joined)}

    @property
    def _joined(self) -> Tensor:
        assert self.joined is not None
        return self.joined


@dataclass(frozen=True)
class Pool(End):
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

    def infer(self, pair: ConvBN, a: Tensor, w: Tensor, norm: Any, x: Tensor, projected: Tensor | None) -> Tensor:
        z, _ = pair.fprop(a, w, None)
        _, _, *affine = pair.passes.running_statistics(*norm, pair.eps)
        return pair.passes.normalize_max_pool(z, *affine, **vars(self), taps=False)[0]

    def gradient_arguments(self, out: Tensor | None, last: Kept, taps: Tensor | None) -> dict[str, Any]:
        assert taps is not None
        return {"mask": (last.scale, last.shift), "pool": reference.Pool(taps, *self.sizes)}

    def out_shape(self, z: Sequence[Any]) -> Sequence[Any]:
        n, p, q, k = z
        p, q = ((size + 2 * self.pad - self.kernel) // self.stride + 1 for size in (p, q))
        return n, p, q, k


def of_words(word: str, sizes: Sequence[int], joined: Tensor | None = None) -> End:
    """The end that stands as `word` and `sizes` in the operators' schemas; joined: what a `Join` adds."""
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
