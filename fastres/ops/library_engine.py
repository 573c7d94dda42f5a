"""Runs a conv-BN pair on the library: ATen on a CPU, cuDNN through ATen on a GPU.

BatchNorm, ReLU and additions run as separate passes over the activations. `triton_engine` fuses them into convolutions.
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
    """Everything about a conv-BN pair that does not depend on the values of its tensors.

    problem: the convolution's sizes. eps: BatchNorm's. batch_statistics: whether BN uses the batch's statistics or the
    running ones. passes: a namespace with the memory-bound steps between convolutions (`normalize`, `statistics`, ...),
    with the names and signatures that they have in `reference`.
    """

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
    """The steps of a conv-BN pair on ATen and cuDNN.

    The fields of `conv_bn.ConvBN` with the same names document what each method computes. Activations are NHWC, filters
    KRSC. This class is also the fallback of the classes in `triton_engine`, which override what they can fuse.
    """

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
        self,
        dz: Tensor,
        w: Tensor,
        bn: OnLoad,
        *,
        residual: Tensor | None = None,
        residual_mask: Tensor | None = None,
        relu_mask: Tensor | None = None,
    ) -> Tensor:
        w, bn = scaled(w, bn)
        dx = reference.conv_dgrad(self.stored(dz, bn), w, self.problem.x_shape, geometry=self.geometry)
        if residual is not None:
            dx = self.passes.pad_shortcut_backward(dx, residual, stride=1, mask=residual_mask)
        return dx if relu_mask is None else reference.relu_backward(dx, relu_mask)

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
        if bn is not None and bn.c_z is None:  # dz = c_g g: compute dw from g, then scale each filter's by c_g
            c_g = bn.c_g[:, None, None, None]
            return (c_g * self.filter_gradient(dz, a, None, prologue, c_g.dtype)).to(dtype)
        return self.filter_gradient(dz, a, bn, prologue, dtype)

    def filter_gradient(self, dz: Tensor, a: Tensor, bn: OnLoad, prologue: Prologue, dtype: torch.dtype) -> Tensor:
        a = read_again(a, dz.dtype)
        a = a if prologue is None else self.passes.normalize(a, *prologue, relu=True)
        return reference.conv_wgrad(self.stored(dz, bn), a, self.problem.w_shape, geometry=self.geometry)

    def stored(self, g: Tensor, bn: OnLoad) -> Tensor:
        """Return dz in memory: g itself if bn is None, else c_g g + c_z z + c_1, computed in a separate pass."""
        return g if bn is None else self.passes.backward_apply(g, *bn)


def scaled(w: Tensor, bn: OnLoad) -> tuple[Tensor, OnLoad]:
    """Return (w, bn) for dgrad; if dz = c_g g, return (c_g w, None).

    In that case g with the scaled filters gives the same dx as dz with w, so no scaling of g is needed.
    """
    if bn is None or bn.c_z is not None:
        return w, bn
    return (w * bn.c_g[:, None, None, None]).to(w.dtype), None


def read_again(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a [N, H, W, C] contiguous in `dtype`.

    Only a stem's activation may arrive in another layout or dtype: its fprop packs the images and accepts any.
    """
    return a if a.dtype == dtype and a.is_contiguous() else dense(nchw(a), dtype)
