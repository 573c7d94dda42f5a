"""conv + BatchNorm (+ residual) + ReLU over a whole residual block or the stem: one differentiable call.

A model asks `eligibility.serves` first and calls `residual_block` or `stem` only where the answer is yes. With
z = conv(a) raw, training keeps every z, the block's input and output and per-channel statistics, and nothing else: the
activation a = relu(scale z + shift) between two convolutions is recomputed from z wherever it is read, unless the
fusion `keep_activation` is asked for. Equations: `steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.ops import dispatch, eligibility, launch, reference
from fastres.ops.beside import Beside
from fastres.ops.launch import Norms, Step
from fastres.ops.steps import Geometry, Pool, dense, nchw, nhwc

Unit = tuple[nn.Module, nn.Module]  # (conv, norm)


def residual_block(x: Tensor, units: Sequence[Unit], shortcut: nn.Module | None) -> Tensor:
    """relu(F(x) + shortcut(x)) with F the (conv, norm) `units`, ReLU between them. Equivalent to
    `reference.residual_block`, which gives shapes and dtypes.

    Raises ValueError as `nn.BatchNorm2d` does where batch statistics would be taken of a single value.
    """
    if dispatch.wants_reference():
        return reference.residual_block(x, units, shortcut)  # type: ignore[arg-type]
    return _run(x, *with_end(units, shortcut))


def with_end(units: Sequence[Unit], shortcut: nn.Module | None) -> tuple[Sequence[Unit], End]:
    """The units of a residual block, a projection's behind the others, and its end."""
    if shortcut is None:
        return units, End("add")
    if isinstance(shortcut, nn.Sequential):
        return [*units, (shortcut[0], shortcut[1])], End("project")
    return units, End("pad", stride=shortcut.stride)  # type: ignore[arg-type]


def plain_block(x: Tensor, units: Sequence[Unit]) -> Tensor:
    """relu(F(x)): the block of a net without shortcuts. Equivalent to `reference.plain_block`."""
    if dispatch.wants_reference():
        return reference.plain_block(x, units)  # type: ignore[arg-type]
    return _run(x, units, End("relu"))


def stem(x: Tensor, conv: nn.Module, bn: nn.Module, pool: nn.Module) -> Tensor:
    """maxpool(relu(bn(conv(x)))). Equivalent to `reference.stem`, which gives shapes and dtypes."""
    if dispatch.wants_reference() or (sizes := eligibility.pool_sizes(pool)) is None:
        return reference.stem(x, conv, bn, pool)  # type: ignore[arg-type]
    return _run(x, [(conv, bn)], End("pool", *sizes))


@dataclass(frozen=True)
class End:
    """What follows the last BN: "relu"; "add" the block's input; "project" it by the last unit; "pad" it (option A,
    `stride`); "join" another tensor; max "pool" (`kernel`, `stride`, `pad`); or nothing, "linear". A ReLU stands after
    the addition and before the pool."""

    kind: str
    kernel: int = 0
    stride: int = 1
    pad: int = 0


@dataclass(frozen=True)
class Layer:
    """The static facts of one conv-BN pair, and the BN's buffers, which a forward in training mode moves."""

    geometry: Geometry
    eps: float
    momentum: float
    batch_statistics: bool
    tracked: bool
    running: tuple[Tensor, Tensor] | None
    counter: Tensor | None = None  # that counts this batch when its statistics are finished; None where it has been


def _layer(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Layer:
    running = None if bn.running_mean is None or bn.running_var is None else (bn.running_mean, bn.running_var)
    geometry = Geometry(conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups)  # type: ignore[arg-type]
    tracked, counter = bn.training and bn.track_running_stats, _counter(bn, conv.weight.device)
    momentum = reference.count_batch(bn) if counter is None else bn.momentum or 0.0
    return Layer(geometry, bn.eps, momentum, bn.training or running is None, tracked, running, counter)


def _counter(bn: nn.BatchNorm2d, device: torch.device) -> Tensor | None:
    """The number of batches, where the host needn't know it and a kernel on `device` can add one to it."""
    count = bn.num_batches_tracked
    if not (bn.training and bn.track_running_stats) or bn.momentum is None or count is None:
        return None
    usual = type(count) is Tensor and count.dtype == torch.int64 and count.dim() == 0 and count.device == device
    return count if usual else None


@dataclass(frozen=True)
class Call:
    """One forward's static side. Steps are chosen here, once: autograd runs backward on threads that don't see
    `dispatch`'s contexts."""

    layers: tuple[Layer, ...]
    end: End
    steps: tuple[Step, ...]

    @property
    def depth(self) -> int:
        """Number of layers on the main branch; a projection stands after them."""
        return len(self.layers) - (self.end.kind == "project")

    def read(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [N, C, H, W] as the first convolution takes it, [N, H, W, C]: contiguous in `dtype`, or a view of what a
        stem packs, whatever its strides and dtype."""
        packs = self.end.kind == "pool" and self.steps[0].fprop_by == "stem"
        return x.resolve_neg().permute(0, 2, 3, 1) if packs else dense(x, dtype)


def prepare(
    shape: Sequence[int], units: Sequence[Unit], end: End, dtype: torch.dtype, device: torch.device
) -> tuple[Call, list[Any]]:
    """The call on an x of `shape` [N, C, H, W], and its parameters: weight, BN weight, BN bias a layer."""
    layers = tuple(_layer(conv, bn) for conv, bn in units)  # type: ignore[arg-type]
    parameters: list[Any] = [t for conv, bn in units for t in (conv.weight, bn.weight, bn.bias)]
    return Call(layers, end, choose_steps(shape, parameters[::3], layers, end, dtype, device)), parameters


def _run(x: Tensor, units: Sequence[Unit], end: End) -> Tensor:
    dtype = dispatch.compute_dtype(x)
    call, parameters = prepare(x.shape, units, end, dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        if torch._C._len_torch_dispatch_stack():  # a mode (FlopCounterMode) sees operators, not kernels
            from fastres.ops import registered

            return registered.run(call, x.to(dtype), parameters)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
            return _Block.apply(call, dtype, x, *parameters)
        if not any(layer.batch_statistics for layer in call.layers):
            return _infer(call, x, dtype, parameters)
        return nchw(forward(call, x, dtype, parameters)[0])


def choose_steps(
    shape: Sequence[int],
    weights: Sequence[Tensor],
    layers: Sequence[Layer],
    end: End,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Step, ...]:
    n, _, h, w = shape
    sizes, steps = (h, w), []
    for i, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        if end.kind == "project" and i == len(layers) - 1:
            sizes = (h, w)
        step = launch.step((n, *sizes), weight, layer.geometry, dtype, device)
        sizes = (step.problem.P, step.problem.Q)
        if layer.batch_statistics and n * sizes[0] * sizes[1] == 1:
            size = torch.Size((n, step.problem.K, *sizes))
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        steps.append(step)
    return tuple(steps)


def unaliased(out: Tensor) -> Tensor:
    """`nchw(out)` that is no view to autograd: what a custom function returns must be open to in-place operations."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return nchw(out)


def krsc(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return nhwc(weight.detach().to(dtype))


def _infer(call: Call, x: Tensor, dtype: torch.dtype, parameters: Sequence[Any]) -> Tensor:
    """Every BN by its running statistics, live: scale and shift act in the conv's epilogue, nothing is kept."""
    a = x = call.read(x, dtype)
    identity: Tensor | None = x
    if call.end.kind == "project":
        weight, gamma, beta = parameters[-3:]
        identity = call.steps[-1].infer_live(x, krsc(weight, dtype), gamma, beta, call.layers[-1], relu=False)
    for i in range(call.depth):
        step, layer = call.steps[i], call.layers[i]
        weight, gamma, beta = parameters[3 * i : 3 * i + 3]
        w, last = krsc(weight, dtype), i == call.depth - 1
        if last and call.end.kind in ("pool", "pad"):
            z = step.fprop(a, w, None)
            _, _, scale, shift = step.running_statistics(gamma, beta, layer)
            if call.end.kind == "pad":
                return nchw(step.normalize(z, scale, shift, residual=x, residual_stride=call.end.stride))
            sizes = call.end.kernel, call.end.stride, call.end.pad
            return nchw(step.normalize_max_pool(z, scale, shift, *sizes, taps=False)[0])
        residual = identity if last and call.end.kind in ("add", "project") else None
        a = step.infer_live(a, w, gamma, beta, layer, residual)
    return nchw(a)


@dataclass(frozen=True)
class Pending:
    """A block's output that is not computed yet: relu(scale z + shift + shortcut), see `Step.normalize`."""

    step: Step
    z: Tensor
    affine: tuple[Tensor, Tensor]
    addend: dict[str, Any]

    def compute(self) -> Tensor:
        return self.step.normalize(self.z, *self.affine, **self.addend)


def convolutions(
    call: Call, x: Tensor | Pending, weights: Sequence[Tensor], parameters: Sequence[Any]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor | None]]:
    """x NHWC, then per layer: z, its [mean, rstd, scale, shift] in one flat list, the activation to keep
    (`Step.keeps_activation`) or None. x: as `Call.read` gives it; a pending one is computed with the first convolution.
    weights: by `krsc`."""
    zs: list[Tensor] = []
    stats: list[Tensor] = []
    activations: list[Tensor | None] = []
    a, prologue, partials = x, None, None
    for i, (step, layer) in enumerate(zip(call.steps, call.layers, strict=True)):
        w, (gamma, beta) = weights[i], parameters[3 * i + 1 : 3 * i + 3]
        if i == call.depth:  # the projection reads the block's input again
            a, prologue = x, None
        kept = None
        if isinstance(a, Tensor) and prologue is not None and step.keeps_activation and parameters[3 * i].requires_grad:
            a = kept = step.normalize(a, *prologue)
            prologue = None
        if isinstance(a, Pending):
            x, z, partials = step.fprop_joined(a.z, a.affine, w, statistics=layer.batch_statistics, **a.addend)
        elif layer.batch_statistics:
            z, partials = step.fprop_statistics(a, w, prologue)
        else:
            z = step.fprop(a, w, prologue)
        if layer.batch_statistics:
            assert partials is not None
            four = step.finish_statistics(partials, gamma, beta, layer)
        else:
            four = step.running_statistics(gamma, beta, layer)
        zs.append(z)
        stats += four
        activations.append(kept)
        a, prologue = z, (four[2], four[3])
    assert not isinstance(x, Pending)
    return x, zs, stats, activations


def forward(
    call: Call, x: Tensor, dtype: torch.dtype, parameters: Sequence[Any], residual: Tensor | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor | None], Tensor | None]:
    """out NPQK in `dtype`, then per layer z, its statistics, the weight as the conv read it and the activation to keep,
    and the pool's taps. x [N, C, H, W]; `residual` is what a "join" adds."""
    weights = [krsc(weight, dtype) for weight in parameters[::3]]
    x, zs, stats, activations = convolutions(call, call.read(x, dtype), weights, parameters)
    if call.end.kind == "pool":
        end, last = call.end, call.depth - 1
        scale, shift = stats[4 * last + 2 : 4 * last + 4]
        out, taps = call.steps[last].normalize_max_pool(zs[last], scale, shift, end.kernel, end.stride, end.pad)
        return out, zs, stats, weights, activations, taps
    return pending(call, x, zs, stats, residual).compute(), zs, stats, weights, activations, None


def pending(
    call: Call, x: Tensor, zs: Sequence[Tensor], stats: Sequence[Tensor], residual: Tensor | None = None
) -> Pending:
    """What stands behind the last convolution of a block without a pool. x NHWC."""
    end, last = call.end, call.depth - 1
    addend: dict[str, Any] = {"residual": x, "residual_stride": end.stride}
    if end.kind == "project":
        addend = {"residual": zs[-1], "residual_affine": (stats[-2], stats[-1])}
    elif end.kind in ("relu", "linear"):
        addend = {"residual": None, "relu": end.kind == "relu"}
    elif end.kind == "join":
        assert residual is not None
        addend = {"residual": nhwc(residual)}
    return Pending(call.steps[last], zs[last], (stats[4 * last + 2], stats[4 * last + 3]), addend)


def norms(call: Call, zs: Sequence[Tensor], stats: Sequence[Tensor]) -> Norms:
    """The BatchNorms whose sum is the block's output before its ReLU."""
    last = call.depth - 1
    projection = (zs[-1], stats[-4]) if call.end.kind == "project" else None
    return (zs[last], stats[4 * last]), projection


class _Block(torch.autograd.Function):
    """The whole block as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, call: Call, dtype: torch.dtype, x: Tensor, *parameters: Tensor | None) -> Tensor:
        x_read = nchw(call.read(x, dtype))
        out, zs, stats, weights, activations, taps = forward(call, x_read, dtype, parameters)
        y = unaliased(out)
        ctx.call, ctx.x_dtype, ctx.counts = call, x.dtype, (len(parameters), len(zs))
        ctx.save_for_backward(x, x_read, y, taps, *parameters, *zs, *stats, *weights, *activations)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        x, x_read, y, taps, *rest = ctx.saved_tensors
        n_parameters, n_layers = ctx.counts
        parameters, rest = rest[:n_parameters], rest[n_parameters:]
        if torch.is_grad_enabled():  # create_graph=True: differentiate the definition instead
            return None, None, *_differentiable_backward(call, y.dtype, x, parameters, dy, ctx.needs_input_grad[2:])
        zs, stats = rest[:n_layers], rest[n_layers : 5 * n_layers]
        weights, activations = rest[5 * n_layers : 6 * n_layers], rest[6 * n_layers :]
        needs_x, needs = ctx.needs_input_grad[2], ctx.needs_input_grad[3:]
        of_layers = (zs, stats, weights, activations)
        work = Backward(call, call.read(x_read, y.dtype), nhwc(y), taps, *of_layers, parameters, needs_x, needs)
        dx, dparameters = work.run(Gradient(nhwc(dy.to(y.dtype))))
        return None, None, None if dx is None else nchw(dx.value).to(ctx.x_dtype), *dparameters


def _differentiable_backward(
    call: Call, dtype: torch.dtype, x: Tensor, parameters: Sequence[Any], dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by autograd through the plain formulation, so that they can be differentiated again."""
    with torch.enable_grad():
        out = definition(call, x.to(dtype), parameters)
        inputs = [t for t, need in zip((x, *parameters), needs, strict=True) if need]
        grads = iter(torch.autograd.grad(out, inputs, dy, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]


def definition(call: Call, x: Tensor, parameters: Sequence[Any]) -> Tensor:
    """The block as autograd sees it without this file; moves no running statistics."""

    def unit(a: Tensor, i: int) -> Tensor:
        weight, gamma, beta = parameters[3 * i : 3 * i + 3]
        layer = call.layers[i]
        z = F.conv2d(a, weight.to(a.dtype), None, *layer.geometry)
        mean, var = layer.running if layer.running is not None and not layer.batch_statistics else (None, None)
        return F.batch_norm(z, mean, var, gamma, beta, layer.batch_statistics, 0.0, layer.eps)

    y = unit(x, 0)
    for i in range(1, call.depth):
        y = unit(F.relu(y), i)
    end = call.end
    if end.kind == "add":
        y = y + x
    elif end.kind == "project":
        y = y + unit(x, call.depth)
    elif end.kind == "pad":
        y = y + reference.pad_shortcut(x, end.stride, y.shape[1])
    y = F.relu(y)
    return F.max_pool2d(y, end.kernel, end.stride, end.pad) if end.kind == "pool" else y


class Gradient(NamedTuple):
    """The gradient at a block's output, NHWC. With `sums` the mask of the block's last ReLU is applied, and they are
    the partials of the BatchNorms before it (`steps.backward_reduce`)."""

    value: Tensor
    sums: Any = None


@dataclass
class Backward:
    """One block's backward, from its last BN to its input.

    g_i is the gradient at BN i's output with the ReLU's mask applied; dz_i = p g_i + q z_i + r. A gradient nobody needs
    is not computed. `below`: the BatchNorms at the end of the block that x came from, where that block's backward
    follows; its mask and sums are then taken with dx. `casts`: else a weight gradient that isn't of the weight's dtype
    is left so, [K, C, R, S], for the caller to cast.
    """

    call: Call
    x: Tensor
    out: Tensor
    taps: Tensor | None
    zs: Sequence[Tensor]
    stats: Sequence[Tensor]
    weights: Sequence[Tensor]
    activations: Sequence[Tensor | None]
    parameters: Sequence[Any]
    needs_x: bool
    needs: Sequence[bool]
    below: Norms | None = None
    casts: bool = True

    def run(self, dout: Gradient) -> tuple[Gradient | None, list[Tensor | None]]:
        """dx, and one gradient per parameter, each None where nobody needs it."""
        self.grads: list[Tensor | None] = [None] * len(self.parameters)
        overlap = self.call.steps[0].fusions.overlap and Beside.serves(self.x.device)
        self.beside = Beside(self.x.device) if overlap else None
        try:
            return self._run(dout), self.grads
        finally:
            if self.beside is not None:
                self.beside.join()

    def _run(self, dout: Gradient) -> Gradient | None:
        i = self.call.depth - 1
        # Without bn dz is stored; else dz means g, and p g + q z + r is computed on load.
        dz, bn, shortcut_dx = self._end(dout)
        while dz is not None and i > 0:
            step, below = self.call.steps[i], self.zs[i - 1]
            mean, _, scale, shift = self._stats(i - 1)
            kept = self.activations[i]
            self._weight_grad(i, dz, bn, *((below, (scale, shift)) if kept is None else (kept, None)))
            if not self._needed_below(i):
                return None
            g, mask, partials = step.dgrad_masked(dz, self.weights[i], below, (scale, shift), mean, bn)
            i -= 1
            step, bn = self.call.steps[i], (below, *self._bn(i, partials))
            if not self._needed_at(i):
                return None
            if mask is None and step.fuses_bn_backward(bn):
                dz = g
            else:
                dz, bn = step.backward_apply(g, bn, mask=mask), None
        if dz is None:
            return None
        self._weight_grad(0, dz, bn, self.x, None)
        return self._into_input(dz, bn, shortcut_dx, dout) if self.needs_x else None

    def _end(self, dout: Gradient) -> tuple[Tensor | None, Any, Tensor | None]:
        """dz of the last layer (None where no convolution needs it) and its bn, and a projection's share of dx.

        Still to be masked by the saved output, g costs a third tensor: dz is written once and read twice instead.
        """
        end, i, dy = self.call.end, self.call.depth - 1, dout.value
        step, z, (mean, _, scale, shift) = self.call.steps[i], self.zs[i], self._stats(i)
        source: dict[str, Any] = {"mask": self.out}
        if end.kind == "linear" or dout.sums is not None:
            source = {"mask": None}
        elif end.kind == "relu":  # z is read anyway and says the same as the output
            source = {"mask": (scale, shift)}
        elif end.kind == "pool":
            assert self.taps is not None
            source = {"mask": (scale, shift), "pool": Pool(self.taps, end.kernel, end.stride, end.pad)}
        if end.kind != "project":
            sums = step.backward_reduce(dy, z, mean, **source) if dout.sums is None else dout.sums
            bn = (z, *self._bn(i, sums))
            if not self._needed_at(i):
                return None, None, None
            if dout.sums is not None and step.fuses_bn_backward(bn):
                return dy, bn, None
            return step.backward_apply(dy, bn, **source), None, None
        d, z_d = i + 1, self.zs[-1]
        both = {"projection": (z_d, self._stats(d)[0]), **source}
        sums, sums_d = step.backward_reduce(dy, z, mean, **both) if dout.sums is None else dout.sums
        bn, bn_d = (z, *self._bn(i, sums)), (z_d, *self._bn(d, sums_d))
        if not (self._needed_at(i) or self.needs[3 * d]):
            return None, None, None
        dz, dz_d = step.backward_apply(dy, bn, projection=bn_d, **source)
        self._weight_grad(d, dz_d, None, self.x, None)
        return dz, None, self.call.steps[d].dgrad(dz_d, self.weights[d], None) if self.needs_x else None

    def _stats(self, i: int) -> Sequence[Tensor]:
        return self.stats[4 * i : 4 * i + 4]

    def _needed_below(self, i: int) -> bool:
        """Whether anything before layer i's convolution wants a gradient."""
        return self.needs_x or any(self.needs[: 3 * i])

    def _needed_at(self, i: int) -> bool:
        """Whether layer i's convolution has anything to do."""
        return self._needed_below(i) or self.needs[3 * i]

    def _bn(self, i: int, partials: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Store dweight and dbias of BN i; return its (p, q, r)."""
        mean, rstd, _, _ = self._stats(i)
        gamma = self.parameters[3 * i + 1]
        layer, step = self.call.layers[i], self.call.steps[i]
        dgamma, dbeta, p, q, r = step.finish_backward(partials, gamma, mean, rstd, layer.batch_statistics)
        for at, grad in ((3 * i + 1, dgamma), (3 * i + 2, dbeta)):
            parameter = self.parameters[at]
            if parameter is not None and self.needs[at]:
                self.grads[at] = grad.to(parameter.dtype)
        return p, q, r

    def _weight_grad(self, i: int, dz: Tensor, bn: Any, a: Tensor, prologue: Any) -> None:
        if not self.needs[3 * i]:
            return
        step, weight = self.call.steps[i], self.parameters[3 * i]

        def gradient(dz: Tensor, a: Tensor, bn: Any, prologue: Any) -> Tensor:
            dw = step.wgrad(dz, a, bn, prologue, weight.dtype)
            return like_parameter(dw, weight) if self.casts or dw.dtype == weight.dtype else nchw(dw)

        operands = (dz, a, bn, prologue)
        self.grads[3 * i] = gradient(*operands) if self.beside is None else self.beside(gradient, *operands)

    def _into_input(self, dz: Tensor, bn: Any, shortcut_dx: Tensor | None, dout: Gradient) -> Gradient:
        """dx: the first convolution's share plus the shortcut's."""
        end, step, w = self.call.end, self.call.steps[0], self.weights[0]
        masked_by = self.out if dout.sums is None else None
        if end.kind == "pad":
            dx = step.dgrad(dz, w, bn)
            return Gradient(step.pad_shortcut_backward(dx, dout.value, end.stride, masked_by))
        residual: dict[str, Any] = {}
        if end.kind == "add":
            residual = {"residual": dout.value, "residual_mask": masked_by}
        elif end.kind == "project":
            residual = {"residual": shortcut_dx}
        if self.below is None:
            return Gradient(step.dgrad(dz, w, bn, **residual))
        return Gradient(*step.dgrad_joined(dz, w, bn, self.x, self.below, **residual))


def like_parameter(dw: Tensor, weight: Tensor) -> Tensor:
    """dw KRSC as a gradient [K, C, R, S] of weight's dtype with exactly its strides (DDP's buckets want that)."""
    grad = nchw(dw)
    if grad.dtype == weight.dtype:
        if grad.stride() == weight.stride():
            return grad
        if all(n == 1 or a == b for n, a, b in zip(grad.shape, grad.stride(), weight.stride(), strict=True)):
            return grad.as_strided(weight.shape, weight.stride())  # a 1x1 has two names for one order
    return torch.empty_like(weight, memory_format=torch.preserve_format).copy_(grad)
