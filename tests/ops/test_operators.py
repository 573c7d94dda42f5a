"""The operators for torch.compile and dispatch modes: PyTorch's operator checks, layouts, results and FLOPs."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from cases import by_library, relative_error
from tolerances import EXACT_BLOCK, EXACT_BLOCK_GRADIENTS, KERNELS, KERNELS_GRADIENTS, ROUNDING
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastres.ops import block as fused
from fastres.ops import dispatch, ends, operators, reference

N, C, H, W = 2, 6, 7, 6
ENDS = ("linear", "relu", "add", "join", "project", "pad", "pool")
LAYERS = {  # (C, K, side, stride, groups) of each conv
    "linear": [(6, 4, 1, 1, 1), (4, 8, 3, 2, 1)],
    "relu": [(6, 4, 3, 1, 2)],
    "add": [(6, 4, 1, 1, 1), (4, 6, 3, 1, 1)],
    "join": [(6, 8, 3, 1, 1)],
    "project": [(6, 4, 3, 2, 1), (4, 8, 1, 1, 1), (6, 8, 1, 2, 1)],
    "pad": [(6, 8, 3, 2, 1)],
    "pool": [(6, 5, 3, 1, 1)],
}


def arguments(end: str, training: bool, dtype: torch.dtype = torch.float32, grad: bool = True) -> tuple[Any, ...]:
    """Return arguments of `operators.conv_bn_act` for a small block; the second layer's BN, if any, has no weight and
    bias."""
    parameters: list[Tensor | None] = []
    running: list[Tensor] = []
    geometry: list[int] = []
    for i, (c, k, side, stride, groups) in enumerate(LAYERS[end]):
        weight = torch.randn(k, c // groups, side, side)
        if i == 1:
            weight = weight.to(memory_format=torch.channels_last)
        affine = [None, None] if i == 1 else [torch.rand(k) + 0.5, torch.randn(k)]
        parameters += [None if p is None else p.requires_grad_(grad) for p in (weight, *affine)]
        running += [torch.randn(k), torch.rand(k) + 0.5]
        geometry += [stride, side // 2, 1, groups]
    n = len(LAYERS[end])
    x = torch.randn(N, C, H, W, dtype=dtype).requires_grad_(grad)
    residual = torch.randn(N, 8, H, W, dtype=dtype).requires_grad_(grad) if end == "join" else None
    sizes = {"pad": [0, 2, 0], "pool": [3, 2, 1]}.get(end, [0, 1, 0])
    return x, parameters, running, residual, geometry, [1e-5] * n, [0.1] * n, [training] * n, end, sizes


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("end", ENDS)
def test_the_operator_passes_opcheck(end: str) -> None:
    training = end != "join"
    torch.library.opcheck(operators.conv_bn_act, arguments(end, training), test_utils=CHECKS)


@pytest.mark.parametrize("end", ENDS)
def test_the_operators_backward_passes_opcheck(end: str) -> None:
    x, parameters, running, residual, geometry, eps, momentum, training, _, sizes = arguments(end, True, grad=False)
    given = (x, parameters, running, residual, geometry, eps, momentum, training, end, sizes)
    out, _, statistics, kept = operators.conv_bn_act(*given)
    mask = [True, *(p is not None for p in parameters)]
    args = (torch.randn_like(out), x, out, parameters, statistics, kept, geometry, training, end, sizes, mask)
    torch.library.opcheck(operators.conv_bn_act_backward, args, test_utils=("test_schema", "test_faketensor"))


def test_the_inference_operator_passes_opcheck() -> None:
    x, scale, shift = torch.randn(N, C, H, W), torch.randn(8), torch.randn(8)
    for residual in (None, torch.randn(N, 8, H, W)):
        args = (x, torch.randn(8, 3, 3, 3), scale, shift, residual, [1, 1, 1, 2], True)
        torch.library.opcheck(operators.conv_affine_act, args)


@pytest.mark.parametrize("end", ENDS)
def test_fakes_have_the_strides_and_dtypes_of_the_results(end: str) -> None:
    """`opcheck` doesn't compare these on a CPU. x is bf16 and the parameters are fp32, as under autocast."""
    given = arguments(end, True, torch.bfloat16, grad=False)
    real = operators.conv_bn_act(*given)
    fake = operators._forward_fake(*given)
    layout = [(t.shape, t.stride(), t.dtype) for t in torch.utils._pytree.tree_leaves(real)]
    assert layout == [(t.shape, t.stride(), t.dtype) for t in torch.utils._pytree.tree_leaves(fake)]
    assert real[0].is_contiguous(memory_format=torch.channels_last)
    x, parameters, _, _, geometry, _, _, training, _, sizes = given
    mask = [True, *(p is not None for p in parameters)]
    args = (real[0], x, real[0], parameters, real[2], real[3], geometry, training, end, sizes, mask)
    grads, fakes = operators.conv_bn_act_backward(*args), operators._backward_fake(*args)
    assert [(t.shape, t.stride(), t.dtype) for t in grads] == [(t.shape, t.stride(), t.dtype) for t in fakes]
    like = [p for p in parameters if p is not None]
    assert [(t.stride(), t.dtype) for t in grads[1:]] == [(p.stride(), p.dtype) for p in like]


def plain(end: str, args: tuple[Any, ...]) -> Tensor:
    """Run the block with PyTorch's own functions; this updates the running statistics in place."""
    x, parameters, running, residual, geometry, eps, momentum, training, _, sizes = args

    def pair(a: Tensor, i: int) -> Tensor:
        filters, weight, bias = parameters[3 * i : 3 * i + 3]
        z = by_library(nn.functional.conv2d, a, filters, None, *geometry[4 * i : 4 * i + 4])
        mean, var = running[2 * i : 2 * i + 2]
        return nn.functional.batch_norm(z, mean, var, weight, bias, training[i], momentum[i], eps[i])

    depth = len(training) - (end == "project")
    y = pair(x, 0)
    for i in range(1, depth):
        y = pair(y.relu(), i)
    added = {"add": lambda: x, "join": lambda: residual, "project": lambda: pair(x, depth)}
    added["pad"] = lambda: reference.pad_shortcut(x, sizes[1], y.shape[1])
    y = y + added[end]() if end in added else y
    y = y if end == "linear" else y.relu()
    return nn.functional.max_pool2d(y, *sizes) if end == "pool" else y


def leaves_of(args: tuple[Any, ...]) -> list[Tensor | None]:
    return [args[0], args[3], *args[1]]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("end", ENDS)
def test_the_operator_equals_the_definition(end: str, training: bool) -> None:
    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().double().requires_grad_(value.requires_grad)
        return [wide(v) for v in value] if isinstance(value, list) else value

    args = tuple(map(wide, arguments(end, training)))
    theirs = copy.deepcopy(args)
    out, moved, _, _ = operators.conv_bn_act(*args)
    want = plain(end, theirs)
    assert relative_error(out, want) < EXACT_BLOCK
    if training:
        assert relative_error(moved, torch.cat(theirs[2])) < EXACT_BLOCK
    else:
        assert moved.numel() == 0
    dy = torch.randn_like(want)
    leaves = [(a, b) for a, b in zip(leaves_of(args), leaves_of(theirs), strict=True) if a is not None]
    grads = torch.autograd.grad(out, [a for a, _ in leaves], dy)
    for got, right in zip(grads, torch.autograd.grad(want, [b for _, b in leaves], dy), strict=True):
        assert relative_error(got, right) < EXACT_BLOCK_GRADIENTS


@pytest.mark.parametrize("end", ENDS)
def test_an_ends_definition_computes_its_block(end: str) -> None:
    x, parameters, _, residual, geometry, eps, *_, sizes = args = arguments(end, True, grad=False)

    def pair(i: int) -> tuple[Any, Any]:
        weight, *affine = parameters[3 * i : 3 * i + 3]
        conv = partial(nn.functional.conv2d, weight=weight, bias=None)
        sides = dict(zip(("stride", "padding", "dilation", "groups"), geometry[4 * i : 4 * i + 4], strict=True))
        norm = partial(nn.functional.batch_norm, running_mean=None, running_var=None, training=True, eps=eps[i])
        return partial(conv, **sides), partial(norm, weight=affine[0], bias=affine[1])

    got = ends.of_words(end, sizes, residual).definition(x, [pair(i) for i in range(len(eps))])
    assert relative_error(got, plain(end, args)) < ROUNDING


def test_an_unknown_end_is_refused() -> None:
    x, *rest, sizes = arguments("relu", True)
    with pytest.raises(ValueError, match="unknown end 'gelu'; accepted: relu, linear, add"):
        operators.conv_bn_act(x, *rest[:-1], "gelu", sizes)


def test_only_the_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("add", True)
    for tensor in (args[0], *args[1][1:]):
        if tensor is not None:
            tensor.requires_grad_(False)
    asked = []
    body = operators.Backward.run
    monkeypatch.setattr(
        operators.Backward, "run", lambda self, dy: asked.append((self.needs_x, self.needs)) or body(self, dy)
    )
    out, moved, statistics, kept = operators.conv_bn_act(*args)
    assert not any(t.requires_grad for t in (moved, statistics, *kept))
    out.sum().backward()
    assert args[1][0].grad is not None
    assert asked == [(False, [True, False, False, False, False, False])]


def test_results_allow_in_place_operations() -> None:
    """The operator and the eager call both return a permuted tensor, which must not be marked as a view."""
    args = arguments("linear", True)
    operators.conv_bn_act(*args)[0].relu_().sum().backward()
    unit = (nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
    fused.residual_block(args[0], [unit], None).add_(1)


def test_unsupported_differentiation_raises_an_error() -> None:
    args = arguments("relu", True)
    out = operators.conv_bn_act(*args)[0]
    (dx,) = torch.autograd.grad(out.square().sum(), args[0], create_graph=False)
    assert dx.shape == args[0].shape
    out = operators.conv_bn_act(*args)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(out.square().sum(), args[0], create_graph=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse-mode"):
        operators.conv_bn_act(forward_ad.make_dual(args[0].detach(), torch.ones(N, C, H, W)), *args[1:])
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: operators.conv_bn_act(x, *args[1:])[0].sum())(args[0].detach())
    with pytest.raises(NotImplementedError, match="has no derivative"):
        operators.conv_affine_act(args[0], args[1][0], torch.ones(4), torch.ones(4), None, args[4], True)


def flops_of(end: str, args: tuple[Any, ...], call: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        call(args).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("input_grad", [True, False], ids=["dx", "no-dx"])
def test_flops_are_those_of_the_definition(end: str, input_grad: bool) -> None:
    args = arguments(end, True)
    args[0].requires_grad_(input_grad)
    want = flops_of(end, args, lambda a: plain(end, a))
    if end == "relu":  # PyTorch's formula for wgrad ignores groups
        want = (2 + input_grad) * 2 * N * H * W * 4 * 3 * 9
    assert flops_of(end, args, lambda a: operators.conv_bn_act(*a)[0]) == want


def test_flops_in_inference_are_those_of_the_convolution() -> None:
    x, weight = torch.randn(N, C, H, W), torch.randn(8, 3, 3, 3)
    with FlopCounterMode(display=False) as counter:
        operators.conv_affine_act(x, weight, torch.ones(8), torch.ones(8), None, [2, 1, 1, 2], True)
    assert counter.get_total_flops() == 2 * N * 4 * 3 * 8 * 3 * 9


def test_a_dispatch_mode_sees_the_operator() -> None:
    """Under FlopCounterMode, an eager fused block counts its convolutions' FLOPs and still updates its buffers."""
    convs = [nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2)]
    pairs = [(conv, nn.BatchNorm2d(6)) for conv in convs]
    x = torch.randn(N, C, H, W, requires_grad=True)
    other = copy.deepcopy(pairs)
    want = fused.residual_block(x, other, None)
    with FlopCounterMode(display=False) as counter:
        got = fused.residual_block(x, pairs, None)
        got.sum().backward()
    assert torch.equal(got, want)
    assert counter.get_flop_counts()["Global"].keys() == {
        torch.ops.fastres.conv_bn_act,
        torch.ops.fastres.conv_bn_act_backward,
    }
    assert counter.get_total_flops() == 3 * 2 * 2 * N * H * W * 6 * 6 * 9
    for (_, bn), (_, right) in zip(pairs, other, strict=True):
        assert torch.equal(bn.running_var, right.running_var)
        assert torch.equal(bn.running_mean, right.running_mean)
        assert bn.num_batches_tracked == right.num_batches_tracked == 1


@pytest.mark.interpret
@pytest.mark.parametrize("end", ENDS)
def test_the_operator_runs_on_kernels(end: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to(device).requires_grad_(value.requires_grad)
        return [there(v) for v in value] if isinstance(value, list) else value

    args = tuple(map(there, arguments(end, True)))
    theirs = tuple(map(there, args))
    with dispatch.backend("triton"):
        out, moved, _, _ = operators.conv_bn_act(*args)
        want = plain(end, theirs)
        torch.testing.assert_close(out, want, rtol=KERNELS, atol=KERNELS)
        torch.testing.assert_close(moved, torch.cat(theirs[2]), rtol=KERNELS, atol=KERNELS)
        dy = torch.randn_like(want)
        mine, right = (torch.autograd.grad(y, a[0], dy)[0] for y, a in ((out, args), (want, theirs)))
        torch.testing.assert_close(mine, right, rtol=KERNELS_GRADIENTS, atol=KERNELS_GRADIENTS)
