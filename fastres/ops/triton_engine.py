"""Runs a conv-BN pair on our kernels, with the fusions that `dispatch` allows. Importing this module imports Triton."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastres.kernels import batch_norm, dgrad, fprop, max_pool, pad_shortcut, stem, wgrad
from fastres.kernels.fprop import Join, RunningNorm
from fastres.ops import reference
from fastres.ops.layout import nchw
from fastres.ops.library_engine import Library, read_again, scaled
from fastres.ops.reference import Affine, EndNorms, OnLoad, Prologue

# Launchers of the memory-bound kernels between convolutions, under the names that these steps have in `reference`.
passes = SimpleNamespace(**{**vars(max_pool), **vars(pad_shortcut), **vars(batch_norm)})


class Kernels(Library):
    """The steps of a conv-BN pair on the kernels for all shapes.

    The fields of `conv_bn.ConvBN` with the same names document what each method computes. Convolutions are called as
    attributes of their modules (`fprop.conv_fprop`), because tuning replaces them there.
    """

    def _fprop(self, x: Tensor, w: Tensor, **around: Any) -> Any:
        return fprop.conv_fprop(x, w, self.problem, precision=self.engines.precision, **around)

    def infer(
        self, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Any:
        return self._fprop(x, w, scale=scale, shift=shift, residual=residual, relu=relu)

    def infer_live(self, x: Tensor, w: Tensor, norm: Any, residual: Tensor | None = None, relu: bool = True) -> Any:
        norm = RunningNorm(*norm, self.eps)
        return self._fprop(x, w, norm=norm, residual=residual, relu=relu)

    def fprop(self, x: Tensor, w: Tensor, prologue: Prologue) -> Any:
        x, prologue = self._prologue(x, prologue, self.engines.fprop_on_load)
        return self._epilogue(self._fprop(x, w, prologue=prologue, statistics=self._sums))

    def fprop_joined(self, z: Tensor, affine: Affine, w: Tensor, **addend: Any) -> Any:
        residual = addend["residual"]
        if not self.engines.joins_block_end or residual is None or residual.shape != z.shape:
            return super().fprop_joined(z, affine, w, **addend)
        x = torch.empty_like(z)
        join = Join(residual, addend.get("residual_scale"), addend.get("residual_shift"), x)
        return x, *self._epilogue(self._fprop(z, w, prologue=affine, join=join, statistics=self._sums))

    @property
    def _sums(self) -> bool:
        """Whether fprop's epilogue computes the BN statistics."""
        return self.batch_statistics and self.engines.fusions.statistics

    def _epilogue(self, result: Any) -> Any:
        """Return (z, partials) from fprop's result, which is already that tuple if the kernel computed the statistics.

        Otherwise the result is z alone.
        """
        return result if self._sums else self.with_partials(result)

    def _prologue(self, a: Tensor, prologue: Prologue, on_load: bool) -> tuple[Tensor, Affine | None]:
        """Return (a, prologue) if the kernel applies the prologue while loading, else (the activation, None)."""
        if prologue is None or (self.engines.fusions.prologue and on_load):
            return a, prologue
        return self.passes.normalize(a, *prologue, relu=True), None

    def dgrad(
        self, dz: Tensor, w: Tensor, bn: OnLoad, *, relu_mask: Tensor | None = None, **residual: Tensor | None
    ) -> Any:
        if relu_mask is None or self.engines.fusions.relu_mask:
            return self._dgrad(dz, w, bn, relu_mask=relu_mask, **residual)
        return reference.relu_backward(self._dgrad(dz, w, bn, **residual), relu_mask)

    def _dgrad(self, dz: Tensor, w: Tensor, bn: OnLoad, **epilogue: Any) -> Any:
        w, bn = scaled(w, bn)
        return dgrad.conv_dgrad(dz, w, self.problem, precision=self.engines.precision, bn_backward=bn, **epilogue)

    def dgrad_masked(self, dz: Tensor, w: Tensor, bn: OnLoad, z: Tensor, mean: Tensor, affine: Affine) -> Any:
        if not self.engines.fusions.relu_mask:
            return super().dgrad_masked(dz, w, bn, z, mean, affine)
        g, partials = self._dgrad(dz, w, bn, relu_mask=affine, below=(z, mean))
        return g, None, partials

    def dgrad_joined(self, dz: Tensor, w: Tensor, bn: OnLoad, out: Tensor, end_below: EndNorms, **residual: Any) -> Any:
        if not self.engines.fusions.block_end:
            return super().dgrad_joined(dz, w, bn, out, end_below, **residual)
        last, projection = end_below
        return self._dgrad(dz, w, bn, **residual, relu_mask=out, below=last, projection=projection)

    def filter_gradient(self, dz: Tensor, a: Tensor, bn: OnLoad, prologue: Prologue, dtype: torch.dtype) -> Tensor:
        a, prologue = self._prologue(read_again(a, dz.dtype), prologue, self.engines.wgrad_on_load)
        return wgrad.conv_wgrad(
            dz, a, self.problem, precision=self.engines.precision, bn_backward=bn, prologue=prologue, out_dtype=dtype
        )


class Stem(Kernels):
    """The steps of a conv-BN pair on the kernels for packed images of few channels.

    These kernels have no prologue and add no residual. Calls that need either run on `Kernels` or `Library`.
    """

    infer_live = Library.infer_live
    fprop_joined = Library.fprop_joined

    def infer(
        self, x: Tensor, w: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, relu: bool = True
    ) -> Any:
        if residual is not None:
            return super().infer(x, w, scale, shift, residual, relu)
        return self._packed(x, w, scale=scale, shift=shift, relu=relu)

    def fprop(self, x: Tensor, w: Tensor, prologue: Prologue) -> Any:
        if prologue is not None:
            return super().fprop(x, w, prologue)
        return self._epilogue(self._packed(x, w, statistics=self._sums))

    def filter_gradient(self, dz: Tensor, a: Tensor, bn: OnLoad, prologue: Prologue, dtype: torch.dtype) -> Tensor:
        if prologue is not None:
            return super().filter_gradient(dz, a, bn, prologue, dtype)
        images, dz = stem.pack_images(nchw(a), self.problem, dz.dtype), self.stored(dz, bn)
        return stem.conv_stem_wgrad(dz, images, self.problem, precision=self.engines.precision, out_dtype=dtype)

    def _packed(self, x: Tensor, w: Tensor, **epilogue: Any) -> Any:
        """Launch the stem's convolution on x [N, H, W, C]. Packing accepts any strides, and converts to w's dtype."""
        images, filters = stem.pack_images(nchw(x), self.problem, w.dtype), stem.pack_filters(w)
        return stem.conv_stem(images, filters, self.problem, precision=self.engines.precision, **epilogue)
