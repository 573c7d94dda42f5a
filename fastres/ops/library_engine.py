"""A conv-BN pair by the library: ATen on a CPU, through it cuDNN on a GPU. What stands around a convolution takes
passes of its own; `triton_engine` fuses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastres.ops import reference
from fastres.ops.dispatch import Engines
from fastres.ops.layout import Geometry, dense, nchw
from fastres.ops.reference import Affine, EndNorms, OnLoad, Prologue

if TYPE_CHECKING:
    from fastres.kernels.problem import ConvProblem


@dataclass(frozen=True)
class Facts:
    """What is known of a conv-BN pair before its tensors are. passes: what computes the steps between convolutions,
    under the names and with the signatures of `reference`."""

    problem: ConvProblem
    eps: float
    batch_statistics: bool
    engines: Engines
    passes: Any

    @cached_property
    def geometry(self) -> Geometry:
        p = self.problem
        return Geometry(p.stride, p.pad, p.dilation, p.groups)


class Library(Facts):
    """`ConvBN` says what each method computes."""

    def infer(
        self, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        z = reference.conv_fprop(x, w, geometry=self.geometry)
        return self.passes.normalize(z, scale, shift, residual=residual, relu=relu)

    def infer_live(self, x: Tensor, w: Tensor, norm: Any, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        _, _, scale, shift = self.passes.running_statistics(*norm, self.eps)
        return self.infer(x, w, scale, shift, residual, relu)

    def fprop(self, x: Tensor, w: Tensor, prologue: Prologue) -> tuple[Tensor, Tensor | None]:
        x = x if prologue is None else self.passes.normalize(x, *prologue, relu=True)
        return self.with_partials(reference.conv_fprop(x, w, geometry=self.geometry))

    def with_partials(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return z, self.passes.statistics(z) if self.batch_statistics else None

    def fprop_joined(self, z: Tensor, affine: Affine, w: Tensor, **addend: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        x = self.passes.normalize(z, *affine, **addend)
        return x, *self.fprop(x, w, None)

    def dgrad(
        self, dz: Tensor, w: Tensor, bn: OnLoad, *, residual: Tensor | None = None, residual_mask: Tensor | None = None
    ) -> Tensor:
        w, bn = scaled(w, bn)
        dx = reference.conv_dgrad(self.stored(dz, bn), w, self.problem.x_shape, geometry=self.geometry)
        if residual is None:
            return dx
        return self.passes.pad_shortcut_backward(dx, residual, stride=1, mask=residual_mask)

    def dgrad_masked(
        self, dz: Tensor, w: Tensor, bn: OnLoad, z: Tensor, mean: Tensor, affine: Affine
    ) -> tuple[Tensor, Affine | None, Tensor]:
        dy = self.dgrad(dz, w, bn)
        return dy, affine, self.passes.backward_reduce(dy, z, mean, mask=affine)

    def dgrad_joined(
        self, dz: Tensor, w: Tensor, bn: OnLoad, out: Tensor, end_below: EndNorms, **residual: Any
    ) -> tuple[Tensor, Any]:
        return self.dgrad(dz, w, bn, **residual), None

    def wgrad(self, dz: Tensor, a: Tensor, bn: OnLoad, prologue: Prologue, dtype: torch.dtype) -> Tensor:
        if bn is not None and bn.c_z is None:  # each filter's gradient is that of c_g g
            c_g = bn.c_g[:, None, None, None]
            return (c_g * self.filter_gradient(dz, a, None, prologue, c_g.dtype)).to(dtype)
        return self.filter_gradient(dz, a, bn, prologue, dtype)

    def filter_gradient(self, dz: Tensor, a: Tensor, bn: OnLoad, prologue: Prologue, dtype: torch.dtype) -> Tensor:
        a = read_again(a, dz.dtype)
        a = a if prologue is None else self.passes.normalize(a, *prologue, relu=True)
        return reference.conv_wgrad(self.stored(dz, bn), a, self.problem.w_shape, geometry=self.geometry)

    def stored(self, g: Tensor, bn: OnLoad) -> Tensor:
        """dz, of which only g exists where there is a bn."""
        return g if bn is None else self.passes.backward_apply(g, *bn)


def scaled(w: Tensor, bn: OnLoad) -> tuple[Tensor, OnLoad]:
    """(w, bn), or where dz is c_g g the filters c_g w, by which g gives the same dx, and None."""
    if bn is None or bn.c_z is not None:
        return w, bn
    return (w * bn.c_g[:, None, None, None]).to(w.dtype), None


def read_again(a: Tensor, dtype: torch.dtype) -> Tensor:
    """a as all passes read it but a stem's fprop, which packs it and takes any strides and dtype."""
    return a if a.dtype == dtype and a.is_contiguous() else dense(nchw(a), dtype)
