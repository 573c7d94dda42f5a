"""One convolution's steps bound to their implementations: kernel launches where dispatch chose them, `steps` elsewhere.

The bodies below only translate: which engine is `dispatch`'s decision, made once per call in `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastres.ops import dispatch, steps
from fastres.ops.dispatch import Engine, Fusions
from fastres.ops.steps import Geometry

if TYPE_CHECKING:
    from fastres.kernels.problem import ConvProblem
    from fastres.ops.conv_bn_act import Layer

Affine = tuple[Tensor, Tensor]  # (scale, shift), each [C]
Statistics = tuple[Tensor, Tensor, Tensor, Tensor]  # (mean, rstd, scale, shift), each [K]
BNBackward = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # (z, p, q, r)
Norms = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]  # (z, mean) of a block's last BN, of a projection's


def step(x_shape: Sequence[int], weight: Tensor, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Step:
    """The step of a convolution of x [N, H, W] (channels by the weight [K, C/groups, R, S]) in `dtype`."""
    return _step(tuple(x_shape), tuple(weight.shape), geometry, dtype, device, dispatch.choice(dtype, device))


@lru_cache(maxsize=4096)
def _step(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    choice: dispatch.Choice,
) -> Step:
    from fastres.kernels.problem import ConvProblem

    k, c, r, s = w_shape
    stride, pad, dilation, groups = geometry
    problem = ConvProblem(*x_shape, c * groups, k, r, s, stride, pad, dilation, groups)
    return Step(
        problem,
        geometry,
        infer_by=dispatch.conv_engine("infer", problem, dtype, device),
        fprop_by=dispatch.conv_engine("fprop", problem, dtype, device),
        dgrad_by=dispatch.conv_engine("dgrad", problem, dtype, device),
        wgrad_by=dispatch.conv_engine("wgrad", problem, dtype, device),
        pointwise_by=dispatch.pointwise_engine(dtype, device),
        fprop_on_load=dispatch.on_load("fprop", problem, dtype, device),
        wgrad_on_load=dispatch.on_load("wgrad", problem, dtype, device),
        dz_on_load=dispatch.on_load("dgrad", problem, dtype, device),
        fusions=choice.fusions,
        precision=choice.precision,
    )


def _scaled(w: Tensor, bn: BNBackward | None) -> tuple[Tensor, BNBackward | None]:
    """(w, bn), or where dz is p g the filters p w, by which g gives the same dx, and None."""
    if bn is None or bn[2] is not None:
        return w, bn
    return (w * bn[1][:, None, None, None]).to(w.dtype), None


@lru_cache
def _pointwise_kernels() -> SimpleNamespace:
    """The kernels between convolutions, by the names that `steps` gives them."""
    from fastres.kernels import batch_norm, pool, residual

    return SimpleNamespace(**{**vars(pool), **vars(residual), **vars(batch_norm)})


@dataclass(frozen=True)
class Step:
    """A conv-BN pair's operations on NHWC activations and KRSC weights; meanings and shapes are those of `steps`."""

    problem: ConvProblem
    geometry: Geometry
    infer_by: Engine
    fprop_by: Engine
    dgrad_by: Engine
    wgrad_by: Engine
    pointwise_by: Engine
    fprop_on_load: bool
    wgrad_on_load: bool
    dz_on_load: bool
    fusions: Fusions
    precision: Literal["ieee", "tf32"]

    def fuses_bn_backward(self, bn: BNBackward) -> bool:
        """Whether dgrad and wgrad take dz as p g + q z + r: on load, or without q and r by what p does to filters."""
        if bn[2] is None:
            return self.fusions.bn_backward
        fuses = self.fusions.bn_backward and self.dz_on_load
        return fuses and self.dgrad_by == self.wgrad_by == "triton"

    @property
    def _conv(self) -> dict[str, Any]:
        stride, pad, dilation, groups = self.geometry
        return {"stride": stride, "pad": pad, "dilation": dilation, "groups": groups, "precision": self.precision}

    def infer(
        self, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Tensor:
        """[relu](scale conv(x) + shift + residual): a convolution with its BatchNorm's running statistics."""
        if self.infer_by == "stem" and residual is None:
            return self._stem(x, w, scale=scale, shift=shift, relu=relu)
        if self.infer_by in ("triton", "stem"):
            from fastres.kernels.conv import conv_fprop

            return conv_fprop(x, w, **self._conv, scale=scale, shift=shift, residual=residual, relu=relu)
        z = steps.conv_fprop(x, w, geometry=self.geometry)
        return self.normalize(z, scale, shift, residual=residual, relu=relu)

    def infer_live(
        self,
        x: Tensor,
        w: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        layer: Layer,
        residual: Tensor | None = None,
        relu: bool = True,
    ) -> Tensor:
        """`infer` by the BatchNorm's running statistics as they are now."""
        if self.infer_by == "triton":
            from fastres.kernels.conv import RunningNorm, conv_fprop

            assert layer.running is not None
            norm = RunningNorm(*layer.running, gamma, beta, layer.eps)
            return conv_fprop(x, w, **self._conv, norm=norm, residual=residual, relu=relu)
        _, _, scale, shift = self.running_statistics(gamma, beta, layer)
        return self.infer(x, w, scale, shift, residual, relu)

    def fprop(self, x: Tensor, w: Tensor, prologue: Affine | None) -> Tensor:
        """z = conv(x), or conv(relu(s x + t)) with prologue = (s, t)."""
        if self.fprop_by == "stem" and prologue is None:
            return self._stem(x, w)
        if self.fprop_by in ("triton", "stem"):
            from fastres.kernels.conv import conv_fprop

            x, prologue = self._prologue(x, prologue, self.fprop_on_load)
            return conv_fprop(x, w, **self._conv, prologue=prologue)
        return steps.conv_fprop(x if prologue is None else self.normalize(x, *prologue), w, geometry=self.geometry)

    def fprop_statistics(self, x: Tensor, w: Tensor, prologue: Affine | None) -> tuple[Tensor, Tensor]:
        """z and its statistics' partials."""
        if self.fusions.statistics and self.fprop_by == "stem" and prologue is None:
            return self._stem(x, w, statistics=True)
        if self.fusions.statistics and self.fprop_by in ("triton", "stem"):
            from fastres.kernels.conv import conv_fprop

            x, prologue = self._prologue(x, prologue, self.fprop_on_load)
            return conv_fprop(x, w, **self._conv, prologue=prologue, statistics=True)
        z = self.fprop(x, w, prologue)
        return z, self._pointwise.statistics(z)

    def fprop_joined(
        self, z: Tensor, affine: Affine, w: Tensor, *, statistics: bool, **addend: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x, conv(x), its statistics' partials) for x = relu(scale z + shift + shortcut), the end of the residual
        block before, with the shortcut that `addend`, `normalize`'s arguments, describes."""
        residual, fused_statistics = addend["residual"], statistics and self.fusions.statistics
        if self.joins_block_end and residual is not None and residual.shape == z.shape:
            from fastres.kernels.conv import Join, conv_fprop

            x = torch.empty_like(z)
            join = Join(residual, *(addend.get("residual_affine") or (None, None)), x)
            found = conv_fprop(z, w, **self._conv, prologue=affine, join=join, statistics=fused_statistics)
            out, partials = found if isinstance(found, tuple) else (found, None)
            return x, out, self._pointwise.statistics(out) if statistics and partials is None else partials
        x = self.normalize(z, *affine, **addend)
        return x, *(self.fprop_statistics(x, w, None) if statistics else (self.fprop(x, w, None), None))

    @property
    def joins_block_end(self) -> bool:
        """Whether the convolution can compute the end of the block before it while it loads."""
        fuses = self.fusions.block_end and self.fprop_on_load and self.fprop_by == "triton"
        return fuses and dispatch.joins(self.problem)

    def _stem(self, x: Tensor, w: Tensor, **epilogue: Any) -> Any:
        """x may have any strides and dtype: packing converts it to that of w."""
        from fastres.kernels.stem import conv_stem, pack_filters, pack_images

        images = pack_images(steps.nchw(x), self.problem, w.dtype)
        return conv_stem(images, pack_filters(w), self.problem, precision=self.precision, **epilogue)

    def _prologue(self, x: Tensor, prologue: Affine | None, on_load: bool) -> tuple[Tensor, Affine | None]:
        if prologue is None or (self.fusions.prologue and on_load):
            return x, prologue
        return self.normalize(x, *prologue), None

    @property
    def keeps_activation(self) -> bool:
        """Whether relu(s x + t) before the convolution is kept for its weight gradient: both read it stored."""
        on_load = self.fprop_by in ("triton", "stem") and self.fprop_on_load
        on_load |= self.wgrad_by in ("triton", "stem") and self.wgrad_on_load
        return self.fusions.keep_activation and not (self.fusions.prologue and on_load)

    @property
    def _pointwise(self) -> Any:
        return _pointwise_kernels() if self.pointwise_by == "triton" else steps

    def finish_statistics(
        self, partials: Tensor, gamma: Tensor | None, beta: Tensor | None, layer: Layer
    ) -> Statistics:
        mean, var = layer.running if layer.running is not None and layer.tracked else (None, None)
        moved = {"running_mean": mean, "running_var": var, "momentum": layer.momentum, "counter": layer.counter}
        return self._pointwise.finish_statistics(partials, gamma, beta, layer.eps, **moved)

    def running_statistics(self, gamma: Tensor | None, beta: Tensor | None, layer: Layer) -> Statistics:
        assert layer.running is not None
        return self._pointwise.running_statistics(*layer.running, gamma, beta, layer.eps)

    def normalize(
        self,
        z: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        relu: bool = True,
        residual: Tensor | None = None,
        residual_affine: Affine | None = None,
        residual_stride: int = 1,
    ) -> Tensor:
        by, to = residual_affine if residual_affine is not None else (None, None)
        return self._pointwise.normalize(
            z,
            scale,
            shift,
            relu=relu,
            residual=residual,
            residual_scale=by,
            residual_shift=to,
            residual_stride=residual_stride,
        )

    def normalize_max_pool(
        self, z: Tensor, scale: Tensor, shift: Tensor, kernel: int, stride: int, pad: int, taps: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return self._pointwise.normalize_max_pool(z, scale, shift, kernel=kernel, stride=stride, pad=pad, taps=taps)

    def backward_reduce(self, dy: Tensor, z: Tensor, mean: Tensor, **source: Any) -> Any:
        """`source`: mask, pool, projection, as `steps.backward_reduce`."""
        return self._pointwise.backward_reduce(dy, z, mean, **source)

    def finish_backward(
        self, partials: Tensor, gamma: Tensor | None, mean: Tensor, rstd: Tensor, batch_statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        count = self.problem.pixels
        return self._pointwise.finish_backward(partials, gamma, mean, rstd, count, batch_statistics=batch_statistics)

    def backward_apply(self, dy: Tensor, bn: BNBackward, **source: Any) -> Any:
        """`source`: mask, pool, projection, as `steps.backward_apply`."""
        return self._pointwise.backward_apply(dy, *bn, **source)

    def pad_shortcut_backward(self, dx: Tensor, dy: Tensor, stride: int, mask: Tensor | None) -> Tensor:
        return self._pointwise.pad_shortcut_backward(dx, dy, stride=stride, mask=mask)

    def dgrad(
        self,
        dz: Tensor,
        w: Tensor,
        bn: BNBackward | None,
        *,
        residual: Tensor | None = None,
        residual_mask: Tensor | None = None,
    ) -> Tensor:
        """dx = conv_transpose(dz) + residual [masked where residual_mask <= 0]."""
        w, bn = _scaled(w, bn)
        if self.dgrad_by == "triton":
            from fastres.kernels.dgrad import conv_dgrad

            return conv_dgrad(
                dz, w, self.x_shape, **self._conv, bn_backward=bn, residual=residual, residual_mask=residual_mask
            )
        dx = steps.conv_dgrad(self._dz(dz, bn), w, self.x_shape, geometry=self.geometry)
        return dx if residual is None else self.pad_shortcut_backward(dx, residual, 1, residual_mask)

    def dgrad_masked(
        self, dz: Tensor, w: Tensor, z: Tensor, affine: Affine, mean: Tensor, bn: BNBackward | None
    ) -> tuple[Tensor, Affine | None, Tensor]:
        """Gradient through the convolution to the BN below, whose raw input is z: (dy, mask still to apply, partials of
        sum g and sum g (z - mean))."""
        w, bn = _scaled(w, bn)
        if self.dgrad_by == "triton" and self.fusions.relu_mask:
            from fastres.kernels.dgrad import conv_dgrad

            below = {"relu_mask": affine, "norm": (z, mean)}
            g, partials = conv_dgrad(dz, w, self.x_shape, **self._conv, bn_backward=bn, **below)
            return g, None, partials
        dy = self.dgrad(dz, w, bn)
        return dy, affine, self.backward_reduce(dy, z, mean, mask=affine)

    def dgrad_joined(
        self, dz: Tensor, w: Tensor, bn: BNBackward | None, out: Tensor, norms: Norms, **residual: Any
    ) -> tuple[Tensor, Any]:
        """Gradient through the convolution to the end of the block before it, whose output `out` is and whose
        BatchNorms `norms` are: (dx, None), or where one kernel does it all (dx where `out` > 0, partials as of
        `backward_reduce`). `residual`: as of `dgrad`."""
        w, bn = _scaled(w, bn)
        if self.dgrad_by == "triton" and self.fusions.block_end:
            from fastres.kernels.dgrad import conv_dgrad

            norm, projection = norms
            below = {"relu_mask": out, "norm": norm, "projection": projection}
            return conv_dgrad(dz, w, self.x_shape, **self._conv, bn_backward=bn, **residual, **below)
        return self.dgrad(dz, w, bn, **residual), None

    def wgrad(
        self, dz: Tensor, a: Tensor, bn: BNBackward | None, prologue: Affine | None, dtype: torch.dtype
    ) -> Tensor:
        """`a`, where it is what a stem's fprop packed, may have any strides and dtype."""
        if bn is not None and bn[2] is None:  # each filter's gradient is that of p g
            p = bn[1][:, None, None, None]
            return (p * self.wgrad(dz, a, None, prologue, p.dtype)).to(dtype)
        if self.wgrad_by == "stem" and prologue is None:
            from fastres.kernels.stem import conv_stem_wgrad, pack_images

            images = pack_images(steps.nchw(a), self.problem, dz.dtype)
            return conv_stem_wgrad(self._dz(dz, bn), images, self.problem, precision=self.precision, out_dtype=dtype)
        if a.dtype != dz.dtype or not a.is_contiguous():
            a = steps.dense(steps.nchw(a), dz.dtype)
        if self.wgrad_by in ("triton", "stem"):
            from fastres.kernels.wgrad import conv_wgrad

            a, prologue = self._prologue(a, prologue, self.wgrad_on_load)
            return conv_wgrad(
                dz, a, self.filter_shape, **self._conv, bn_backward=bn, prologue=prologue, out_dtype=dtype
            )
        a = a if prologue is None else self.normalize(a, *prologue)
        return steps.conv_wgrad(self._dz(dz, bn), a, self.filter_shape, geometry=self.geometry)

    def _dz(self, g: Tensor, bn: BNBackward | None) -> Tensor:
        return g if bn is None else self.backward_apply(g, bn)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        p = self.problem
        return p.N, p.H, p.W, p.C

    @property
    def filter_shape(self) -> tuple[int, int, int, int]:
        p = self.problem
        return p.K, p.R, p.S, p.C // p.groups
