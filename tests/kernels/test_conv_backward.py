"""dgrad and wgrad against float64, with every prologue and epilogue.

On a CPU the kernels run in the interpreter, in float32 and float16, because the interpreter multiplies bfloat16
wrongly. On a GPU the same tests run compiled, also in bfloat16, and there are tests of the layers of ResNet-50.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from cases import Broken, assert_close_to_reference, by_library, check_sums, terms_of
from conv_cases import traits
from covering import covered, some_seeds
from tolerances import GRADIENTS, PRODUCTS, PRODUCTS_TF32, lost_in_sums
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from fastres.kernels import dgrad as dgrad_module
from fastres.kernels import launcher
from fastres.kernels import wgrad as wgrad_module
from fastres.kernels.checks import gpu_of
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import Tile, dgrad_tiles, wgrad_tiles
from fastres.kernels.wgrad import conv_wgrad

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]

DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

GATHER = Tile(16, 32, 16, warps=4, stages=2)
BOXES = Tile(16, 32, 16, warps=4, stages=2, box=(2, 4, 4))
WGRAD_GATHER = Tile(16, 16, 32, warps=4, stages=2, splits=3)
WGRAD_BOXES = Tile(16, 16, 32, warps=4, stages=2, box=(2, 4, 4), splits=2)

ODD = ConvProblem(N=1, H=9, W=8, C=5, K=7, R=3, S=3, pad=1)
POINTWISE = ConvProblem(N=2, H=7, W=5, C=24, K=16)
SQUARE = ConvProblem(N=3, H=6, W=7, C=8, K=24, R=3, S=3, pad=1)
STRIDED = ConvProblem(N=2, H=8, W=6, C=16, K=8, R=3, S=3, stride=2, pad=1)
SHAPES = {
    "odd": ODD,
    "pointwise": POINTWISE,
    "3x3": SQUARE,
    "3x3 stride 2": STRIDED,
    "3x3 stride 2 odd": ConvProblem(N=2, H=9, W=7, C=8, K=8, R=3, S=3, stride=2, pad=1),
    "1x1 stride 2": ConvProblem(N=2, H=8, W=6, C=8, K=16, stride=2),
    "1x1 stride 2 odd": ConvProblem(N=1, H=9, W=7, C=8, K=16, stride=2),
    "stem": ConvProblem(N=1, H=11, W=10, C=3, K=8, R=7, S=7, stride=2, pad=3),
    "groups": ConvProblem(N=1, H=5, W=6, C=12, K=8, R=3, S=3, pad=1, groups=4),
    "wide groups, stride 2": ConvProblem(N=1, H=7, W=6, C=32, K=32, R=3, S=3, stride=2, pad=1, groups=2),
    "dilation": ConvProblem(N=1, H=8, W=8, C=8, K=8, R=3, S=3, pad=2, dilation=2),
    "dilation 2, stride 2": ConvProblem(N=1, H=9, W=8, C=8, K=8, R=3, S=3, stride=2, pad=1, dilation=2),
    "dilation 2, stride 3, no padding": ConvProblem(N=1, H=9, W=8, C=6, K=4, R=3, S=2, stride=3, dilation=2),
    "more padding than filter": ConvProblem(N=1, H=4, W=5, C=8, K=8, R=2, S=3, pad=3),
    "one pixel": ConvProblem(N=1, H=1, W=1, C=8, K=8, R=3, S=3, stride=2, pad=1),
}

FEATURES = {
    "plain": "",
    "bn": "bn",
    "relu": "relu",
    "residual": "residual",
    "masked residual": "residual out",
    "all": "bn relu residual out",
    "end of a block": "bn residual out end",
    "end of a block with a projection": "residual end projection",
}


@dataclass
class Operands:
    """The tensors of one backward step.

    dz is c_g dy + c_z z + c_1, or dy itself. dout is the gradient through the shortcut, masked where out <= 0. A mask
    is the sign of a tensor, or of scale x + shift, computed from dyadic numbers without rounding: it is equal in all
    dtypes.
    """

    problem: ConvProblem
    dy: Tensor
    w: Tensor
    x: Tensor
    z: Tensor
    dout: Tensor
    out: Tensor
    c_g: Tensor
    c_z: Tensor
    c_1: Tensor
    scale: Tensor  # [C], of the previous layer
    shift: Tensor
    mean: Tensor
    below: Tensor  # output of the previous block [N, H, W, C]; z_proj: input of its projection's BatchNorm
    z_proj: Tensor
    mean_proj: Tensor

    def map(self, convert: Callable[[Tensor], Tensor]) -> Operands:
        tensors = {f.name: convert(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "problem"}
        return Operands(self.problem, **tensors)


def make(problem: ConvProblem, dtype: torch.dtype) -> Operands:
    N, H, W, C, P, Q, K = problem.N, problem.H, problem.W, problem.C, problem.P, problem.Q, problem.K

    def values(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=DEVICE) * std).to(dtype)

    def dyadic(*shape: int) -> Tensor:
        return (torch.randn(shape, device=DEVICE).clamp(-4, 4) * 8).round() / 8

    def scales(channels: int) -> Tensor:
        sign = torch.randint(0, 2, (channels,), device=DEVICE) * 2 - 1
        return sign * 2.0 ** torch.randint(-1, 2, (channels,), device=DEVICE)

    c_group = C // problem.groups
    return Operands(
        problem,
        dy=values(N, P, Q, K),
        w=values(K, problem.R, problem.S, c_group, std=(problem.R * problem.S * c_group) ** -0.5),
        x=dyadic(N, H, W, C).to(dtype),
        z=dyadic(N, P, Q, K).to(dtype),
        dout=values(N, H, W, C),
        out=values(N, H, W, C).relu(),
        c_g=torch.rand(K, device=DEVICE) + 0.5,
        c_z=torch.randn(K, device=DEVICE) / 4,
        c_1=torch.randn(K, device=DEVICE),
        scale=scales(C),
        shift=dyadic(C),
        mean=torch.randn(C, device=DEVICE),
        below=values(N, H, W, C).relu(),
        z_proj=values(N, H, W, C),
        mean_proj=torch.randn(C, device=DEVICE),
    )


def nchw(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


def nhwc(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1)


def where_positive(sign: Tensor, g: Tensor) -> Tensor:
    """Return g, zeroed where sign <= 0. A NaN in sign lets g pass, as in PyTorch's backward of ReLU."""
    return torch.where(sign <= 0, torch.zeros_like(g), g)


def dz_of(o: Operands, features: str) -> Tensor:
    """Return dz, computed in c_g's dtype and rounded to dy's, with "bn"; otherwise dy."""
    wide = o.c_g.dtype
    return (o.c_g * o.dy.to(wide) + o.c_z * o.z.to(wide) + o.c_1).to(o.dy.dtype) if "bn" in features else o.dy


def conv_args(problem: ConvProblem) -> dict[str, int]:
    return {"stride": problem.stride, "dilation": problem.dilation, "groups": problem.groups}


def reference_dgrad(o: Operands, features: str) -> tuple[Tensor, Tensor | None]:
    """Return dx and, with "relu" or "end", the sums [2, C] of the BatchNorm below, otherwise None."""
    n, wide = o.problem, o.c_g.dtype
    shape, dz = (n.N, n.C, n.H, n.W), dz_of(o, features)
    dx = nhwc(by_library(conv2d_input, shape, nchw(o.w), nchw(dz), padding=n.pad, **conv_args(n)))
    if "residual" in features:
        dx = dx + (where_positive(o.out, o.dout) if "out" in features else o.dout)
    if "relu" in features:
        dx = where_positive(o.scale * o.x.to(wide) + o.shift, dx)
    elif "end" in features:
        dx = where_positive(o.below, dx)
    else:
        return dx, None
    return dx, terms_of(dx, o.x, o.mean).sum((1, 2, 3))


def reference_wgrad(o: Operands, features: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return dw, computed in `dtype` (default: x's)."""
    n, wide, dtype = o.problem, o.c_g.dtype, dtype or o.x.dtype
    a = F.relu(o.scale * o.x.to(wide) + o.shift).to(o.x.dtype) if "activation" in features else o.x
    shape = (n.K, n.C // n.groups, n.R, n.S)
    dz = dz_of(o, features).to(dtype)
    return nhwc(by_library(conv2d_weight, nchw(a.to(dtype)), shape, nchw(dz), padding=n.pad, **conv_args(n)))


def load_options(o: Operands, features: str) -> dict[str, Any]:
    return {"bn_backward": (o.z, o.c_g, o.c_z, o.c_1)} if "bn" in features else {}


def run_dgrad(o: Operands, features: str, tile: Tile | None, **options: Any) -> tuple[Tensor, Any]:
    options = {**load_options(o, features), **options}
    if "relu" in features:
        options |= {"relu_mask": (o.scale, o.shift), "below": (o.x, o.mean)}
    if "end" in features:
        options |= {"relu_mask": o.below, "below": (o.x, o.mean)}
    if "projection" in features:
        options["projection"] = (o.z_proj, o.mean_proj)
    if "residual" in features:
        options["residual"] = o.dout
    if "out" in features:
        options["residual_mask"] = o.out
    result = conv_dgrad(o.dy, o.w, o.problem, tile=tile, **options)
    return result if isinstance(result, tuple) else (result, None)


def run_wgrad(o: Operands, features: str, tile: Tile | None, **options: Any) -> Tensor:
    options = {**load_options(o, features), **options}
    if "activation" in features:
        options["prologue"] = (o.scale, o.shift)
    return conv_wgrad(o.dy, o.x, o.problem, tile=tile, **options)


def check_dgrad(o: Operands, features: str, tile: Tile | None, **options: Any) -> None:
    """Check dx and its sums against float64.

    The error may be a few times that of PyTorch's own kernels in the same dtype on the same operands.
    """
    dx, partials = run_dgrad(o, features, tile, **options)
    want, _ = reference_dgrad(o.map(Tensor.double), features)
    torch_dx, _ = reference_dgrad(o, features)
    lost = lost_in_sums(o.problem.gemm("dgrad").k, o.dy)
    assert_close_to_reference(dx, want, torch_dx, factor=GRADIENTS, what="dx", lost=lost)
    norms = [(o.x, o.mean), (o.z_proj, o.mean_proj)]
    for each, norm in zip(partials if isinstance(partials, tuple) else (partials,), norms, strict=False):
        if each is not None:
            check_sums(each, dx, *norm)


def check_wgrad(o: Operands, features: str, tile: Tile | None, **options: Any) -> None:
    dw = run_wgrad(o, features, tile, **options)
    assert dw.is_contiguous()
    want = reference_wgrad(o.map(Tensor.double), features)
    lost = lost_in_sums(o.problem.pixels, o.x)
    assert_close_to_reference(dw, want, reference_wgrad(o, features, dw.dtype), factor=GRADIENTS, what="dw", lost=lost)


def tiles_of_dgrad(problem: ConvProblem) -> list[Tile]:
    return [GATHER, BOXES] if problem.groups == 1 and problem.C % 8 == problem.K % 8 == 0 else [GATHER]


def tiles_of_wgrad(problem: ConvProblem) -> list[Tile]:
    if problem.groups > 1 or problem.C % 8 or problem.K % 8:
        return [WGRAD_GATHER]
    if problem.stride > 2 or (problem.stride == 2 and (problem.H % 2 or problem.W % 2)):
        return [WGRAD_GATHER]
    row = [dataclasses.replace(WGRAD_BOXES, taps=3)] if problem.S == 3 else []
    return [WGRAD_GATHER, WGRAD_BOXES, *row]


def of_shape(name: str, *others: str) -> tuple[Any, ...]:
    return *traits(SHAPES[name]), *others


@covered(by=of_shape, name=[*SHAPES], features=["", "all"])
def test_dgrad_shapes(name: str, features: str) -> None:
    o = make(SHAPES[name], torch.float32)
    for tile in tiles_of_dgrad(o.problem):
        check_dgrad(o, FEATURES.get(features, features), tile)


@covered(problem={"odd": ODD, "pointwise": POINTWISE, "stride 2": STRIDED}, features=FEATURES, dtype=DTYPES)
def test_dgrad_features(problem: ConvProblem, features: str, dtype: torch.dtype) -> None:
    check_dgrad(make(problem, dtype), features, tiles_of_dgrad(problem)[-1])


@covered(by=of_shape, name=[*SHAPES], features=["", "bn activation"])
def test_wgrad_shapes(name: str, features: str) -> None:
    o = make(SHAPES[name], torch.float32)
    for tile in tiles_of_wgrad(o.problem):
        check_wgrad(o, features, tile)


@covered(
    problem={"odd": ODD, "pointwise": POINTWISE, "3x3": SQUARE, "stride 2": STRIDED},
    features=["bn", "activation", "bn activation"],
    dtype=DTYPES,
)
def test_wgrad_features(problem: ConvProblem, features: str, dtype: torch.dtype) -> None:
    check_wgrad(make(problem, dtype), features, tiles_of_wgrad(problem)[-1])


@covered(
    by=of_shape,
    name=["odd", "pointwise", "3x3 stride 2", "1x1 stride 2 odd", "stem", "groups"],
    precision=["ieee", "tf32"],
)
def test_tiles_by_default(name: str, precision: str) -> None:
    """The default tiles are larger than these problems, so most of each tile is masked. float16 uses TMA if it can."""
    dtype = torch.float32 if precision == "ieee" else torch.float16
    o = make(SHAPES[name], dtype)
    check_dgrad(o, "bn relu residual", None, precision=precision)
    check_wgrad(o, "bn activation", None, precision=precision)


@pytest.mark.parametrize("splits", [1, 5, 1000])
def test_wgrad_splits_and_output_dtype(splits: int) -> None:
    o = make(SQUARE, torch.float16)
    tile = dataclasses.replace(WGRAD_GATHER, splits=splits)
    check_wgrad(o, "", tile, out_dtype=torch.float16)
    check_wgrad(o, "", tile, out_dtype=torch.float32)


def test_training_chain_against_autograd() -> None:
    """Compare the gradients of the convolution in relu(bn(conv(relu(bn(x))))) with autograd's in float64."""
    o = make(ConvProblem(N=2, H=8, W=6, C=16, K=8, R=3, S=3, stride=2, pad=1), torch.float32)

    def chain(dtype: torch.dtype) -> list[Tensor]:
        """Return the gradient g of the second BatchNorm's output, its input z, and the gradients of the first ReLU's
        input and of w; channels last."""
        weight = torch.ones(16, dtype=dtype, device=DEVICE)
        x, w, bias = nchw(o.x).to(dtype), nchw(o.w).to(dtype).requires_grad_(), o.shift.to(dtype)
        before = F.batch_norm(x, None, None, weight, bias, training=True).requires_grad_()
        z = F.conv2d(F.relu(before), w, stride=2, padding=1)
        y = F.batch_norm(z, None, None, o.c_g.to(dtype), o.c_1.to(dtype), training=True)
        y.retain_grad()
        F.relu(y).backward(nchw(o.dy).to(dtype))
        return [nhwc(t.detach()).contiguous() for t in (y.grad, z, before.grad, w.grad)]

    def moments(t: Tensor) -> tuple[Tensor, Tensor]:
        return t.mean((0, 1, 2)), (t.var((0, 1, 2), unbiased=False) + 1e-5).rsqrt()

    g, z, dx, dw = by_library(chain, torch.float64)
    _, _, torch_dx, torch_dw = by_library(chain, torch.float32)
    mean, rstd = moments(z)
    c_g = o.c_g.double() * rstd
    c_z = -c_g * rstd * (g * (z - mean) * rstd).mean((0, 1, 2))
    c_1 = -c_g * g.mean((0, 1, 2)) - c_z * mean
    g, z, c_g, c_z, c_1 = (t.float() for t in (g, z, c_g, c_z, c_1))
    mean, scale = moments(o.x.double())
    shift = (o.shift - mean * scale).float()
    mean, scale = mean.float(), scale.float()
    options: dict[str, Any] = {"bn_backward": (z, c_g, c_z, c_1)}
    sums = torch.stack((dx.sum((0, 1, 2)), (dx * (o.x - mean)).sum((0, 1, 2))))
    below = {"relu_mask": (scale, shift), "below": (o.x, mean)}
    for tile in (GATHER, BOXES):
        got, partials = conv_dgrad(g, o.w, o.problem, **below, tile=tile, **options)
        assert_close_to_reference(got, dx, torch_dx, factor=GRADIENTS, what="dx")
        torch_sums = torch.stack((torch_dx.sum((0, 1, 2)), (torch_dx * (o.x - mean)).sum((0, 1, 2))))
        assert_close_to_reference(partials.sum(0), sums, torch_sums, factor=GRADIENTS, what="partial sums")
    for tile in (WGRAD_GATHER, WGRAD_BOXES):
        got = conv_wgrad(g, o.x, o.problem, prologue=(scale, shift), tile=tile, **options)
        assert_close_to_reference(got, dw, torch_dw, factor=GRADIENTS, what="dw")


def double_on_cpu(t: Tensor) -> Tensor:
    """Return t on the CPU, in float64, where a convolution is computed as a plain sum of products.

    cuDNN may use transforms, which round integers and spread a NaN.
    """
    return t.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", [ODD, STRIDED, SHAPES["groups"]], ids=["odd", "stride 2", "groups"])
def test_integers_are_exact(problem: ConvProblem, dtype: torch.dtype) -> None:
    """With small integers, no product and no sum is rounded, so results must be exactly equal."""
    o = make(problem, dtype).map(lambda t: t.float().round().clamp(-1, 1).to(t.dtype))
    o.w = torch.randint_like(o.w, -1, 2)  # rounding w itself would give almost only zeros
    exact = o.map(double_on_cpu)
    for tile in tiles_of_dgrad(problem):
        dx, partials = run_dgrad(o, FEATURES["all"], tile)
        want, sums = reference_dgrad(exact, FEATURES["all"])
        assert torch.equal(double_on_cpu(dx), want)
        assert partials is not None
        assert sums is not None
        assert torch.equal(double_on_cpu(partials).sum(0), sums)
    for tile in tiles_of_wgrad(problem):
        dw = run_wgrad(o, "bn activation", tile)
        assert torch.equal(double_on_cpu(dw), reference_wgrad(exact, "bn activation"))


@pytest.mark.parametrize("problem", [POINTWISE, STRIDED, ODD], ids=["pointwise", "stride 2", "odd"])
def test_nan_goes_where_torch_sends_it(problem: ConvProblem) -> None:
    o = make(problem, torch.float32)
    for tensor, at in ((o.dy, (0, 1, 2, 3)), (o.x, (0, 2, 1, 1)), (o.out, (0, 0, 0, 0))):
        tensor[at] = float("nan")
    exact = o.map(double_on_cpu)
    for features in ("", "bn relu residual out"):
        want = reference_dgrad(exact, features)[0].isnan()
        assert want.any()
        for tile in tiles_of_dgrad(problem):
            dx, partials = run_dgrad(o, features, tile)
            assert torch.equal(dx.isnan().cpu(), want)
            if partials is not None:
                poisoned = want.any(0).any(0).any(0)
                poisoned[1] |= True  # z_below itself is NaN there
                sums = partials.sum(0).cpu()
                assert not sums[:, ~poisoned].isnan().any()
                assert sums[1, poisoned].isnan().all()
    for features in ("", "activation"):
        want = reference_wgrad(exact, features).isnan()
        assert want.any()
        assert not want.all()
        for tile in tiles_of_wgrad(problem):
            assert torch.equal(run_wgrad(o, features, tile).isnan().cpu(), want)


@pytest.mark.parametrize("problem", [STRIDED, SHAPES["groups"]], ids=["stride 2", "groups"])
def test_equal_inputs_give_equal_bits(problem: ConvProblem) -> None:
    o = make(problem, torch.float16)
    for tile in tiles_of_dgrad(problem):
        first, second = (run_dgrad(o, FEATURES["all"], tile) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    for tile in tiles_of_wgrad(problem):
        first, second = (run_wgrad(o, "bn activation", tile) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("problem", [ODD, STRIDED], ids=["odd", "stride 2"])
def test_64_bit_offsets_change_nothing(problem: ConvProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx and dw must not change by a bit. The compiler may reorder partial sums, so they are checked by tolerance."""
    o = make(problem, torch.float32)

    def results() -> list[Tensor]:
        dx = [run_dgrad(o, FEATURES["all"], tile)[0] for tile in tiles_of_dgrad(problem)]
        return dx + [run_wgrad(o, "bn activation", tile) for tile in tiles_of_wgrad(problem)]

    narrow = results()
    monkeypatch.setattr(ConvProblem, "int32_safe", property(lambda self: False))
    launcher.forget()
    assert all(map(torch.equal, narrow, results()))
    for tile in tiles_of_dgrad(problem):
        check_dgrad(o, FEATURES["all"], tile)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_precision(precision: str) -> None:
    """With "ieee", products have full fp32 precision; with "tf32", each factor keeps 10 mantissa bits."""
    o = make(SQUARE, torch.float32)
    dx, _ = run_dgrad(o, "bn", GATHER, precision=precision)
    dw = run_wgrad(o, "bn", WGRAD_GATHER, precision=precision)
    wanted = (reference_dgrad(o.map(Tensor.double), "bn")[0], reference_wgrad(o.map(Tensor.double), "bn"))
    allowed = PRODUCTS_TF32 if precision == "tf32" else PRODUCTS
    for got, want in zip((dx, dw), wanted, strict=True):
        assert (got - want).abs().max() <= allowed * want.abs().max()


@pytest.mark.parametrize("wrong", [{"PADDED": False}, {"offset_h": 0}, {"SKIP_S": 2}], ids=str)
def test_a_wrong_dgrad_fails(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dgrad_module, "dgrad_kernel", Broken(dgrad_module.dgrad_kernel, **wrong))
    with pytest.raises(AssertionError, match="error"):
        check_dgrad(make(SQUARE, torch.float32), "bn", GATHER)


@pytest.mark.parametrize("wrong", [{"PADDED_A": False}, {"PAD": 0}, {"steps_in_all": 1}], ids=str)
def test_a_wrong_wgrad_fails(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wgrad_module, "wgrad_kernel", Broken(wgrad_module.wgrad_kernel, **wrong))
    with pytest.raises(AssertionError, match="error"):
        check_wgrad(make(SQUARE, torch.float32), "bn activation", dataclasses.replace(WGRAD_GATHER, splits=1))


def random_case(seed: int) -> tuple[ConvProblem, torch.dtype, str, str]:
    rng = random.Random(seed)
    while True:
        groups = rng.choice([1, 1, 1, 2, 3])
        try:
            problem = ConvProblem(
                N=rng.randint(1, 3),
                H=rng.randint(1, 9),
                W=rng.randint(1, 9),
                C=groups * rng.choice([1, 3, 8, 16, 20]),
                K=groups * rng.choice([1, 5, 8, 24]),
                R=rng.randint(1, 4),
                S=rng.randint(1, 4),
                stride=rng.randint(1, 3),
                pad=rng.randint(0, 3),
                dilation=rng.randint(1, 2),
                groups=groups,
            )
        except ValueError:  # the filter is larger than the padded input
            continue
        load = rng.choice(["", "bn "])
        store = load + rng.choice(["", "relu ", "residual ", "relu residual out ", "residual out end projection "])
        return problem, rng.choice(DTYPES), store, load + rng.choice(["", "activation "])


@pytest.mark.parametrize("seed", some_seeds(12 if DEVICE == "cpu" else 200))
def test_fuzz(seed: int) -> None:
    problem, dtype, dgrad_features, wgrad_features = random_case(seed)
    torch.manual_seed(seed)
    print(f"reproduce: pytest 'tests/kernels/test_conv_backward.py::test_fuzz[{seed}]'  # {problem} {dtype}")
    o = make(problem, dtype)
    for tile in tiles_of_dgrad(problem):
        check_dgrad(o, dgrad_features, tile)
    for tile in tiles_of_wgrad(problem):
        check_wgrad(o, wgrad_features, tile)


LAYERS = [  # layers of ResNet-50 for images of 224 x 224: H = W, C, K, R = S, stride
    (56, 64, 64, 3, 1),
    (56, 256, 64, 1, 1),
    (56, 256, 128, 1, 1),
    (56, 256, 512, 1, 2),
    (56, 128, 128, 3, 2),
    (28, 128, 512, 1, 1),
    (28, 256, 256, 3, 2),
    (14, 256, 256, 3, 1),
    (14, 512, 512, 3, 2),
    (7, 512, 512, 3, 1),
    (7, 512, 2048, 1, 1),
]


def layer_operands(layer: tuple[int, ...], dtype: torch.dtype) -> Operands:
    size, C, K, R, stride = layer
    return make(ConvProblem(8, size, size, C, K, R, R, stride, R // 2), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("features", "met"), {"": 0, "bn relu": 1, "bn residual out": 2, "bn residual end projection": 4}.items()
)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_tile_of_dgrad_at_every_layer(
    layer: tuple[int, ...], features: str, met: int, dtype: torch.dtype
) -> None:
    o = layer_operands(layer, dtype)
    for boxes in {torch.cuda.get_device_capability() >= (9, 0), False}:
        for tile in dgrad_tiles(o.problem, 2, boxes, gpu_of(o.dy.device), False, 1 + ("bn" in features), met):
            check_dgrad(o, features, tile)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", ["", "bn", "activation", "bn activation"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_tile_of_wgrad_at_every_layer(layer: tuple[int, ...], features: str, dtype: torch.dtype) -> None:
    o = layer_operands(layer, dtype)
    for boxes in {torch.cuda.get_device_capability() >= (9, 0), False}:
        operands, prologue = 1 + ("bn" in features), "activation" in features
        tiles = wgrad_tiles(o.problem, 2, boxes, gpu_of(o.dy.device), False, operands, prologue)
        programs: dict[Tile, Tile] = {dataclasses.replace(tile, splits=1): tile for tile in reversed(tiles)}
        for tile in programs.values():
            check_wgrad(o, features, tile)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    assert not ConvProblem(N=33, H=1024, W=1024, C=64, K=64).int32_safe
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GB")
    dy = torch.zeros(33, 1024, 1024, 64, dtype=torch.bfloat16, device=DEVICE)
    x = torch.zeros(33, 1024, 1024, 64, dtype=torch.bfloat16, device=DEVICE)
    for t in (dy, x):  # whole numbers, so that sums over a million pixels are exact
        t[-1] = torch.randint(-2, 3, t[-1].shape, device=DEVICE)
    w = torch.randn(64, 1, 1, 64, device=DEVICE).to(dy.dtype)
    for tile in (dataclasses.replace(GATHER, BN=256), dataclasses.replace(BOXES, BN=256)):
        dx = conv_dgrad(dy, w, ConvProblem.of(x.shape, w.shape), tile=tile)
        want = dy[-1].double() @ w.double().view(64, 64)
        assert not dx[:-1].any()
        assert_close_to_reference(dx[-1], want, dy[-1] @ w.view(64, 64), factor=GRADIENTS, what="dx")
    for tile in (dataclasses.replace(WGRAD_GATHER, splits=264), dataclasses.replace(WGRAD_BOXES, splits=264)):
        dw = conv_wgrad(dy, x, ConvProblem.of(x.shape, w.shape), tile=tile)
        want = dy[-1].double().view(-1, 64).T @ x[-1].double().view(-1, 64)
        assert torch.equal(dw.view(64, 64).double(), want)


def test_a_mask_to_recompute_may_be_any_pair() -> None:
    """The pair (scale, shift) may also be a list. If a list were ignored, dx and the sums would stay unmasked."""
    o = make(SHAPES["3x3"], torch.float32)
    pair = torch.ones_like(o.scale), torch.full_like(o.shift, -1e9)
    for mask in (pair, [*pair]):
        dx, sums = conv_dgrad(o.dy, o.w, o.problem, relu_mask=mask, below=(o.x, o.mean), tile=GATHER)  # type: ignore[arg-type, misc]
        assert not dx.any()
        assert not sums.any()


def test_no_pixels() -> None:
    problem = ConvProblem(N=0, H=4, W=4, C=8, K=16, R=3, S=3, pad=1)
    o = make(problem, torch.float32)
    dx, partials = run_dgrad(o, FEATURES["all"], None)
    assert dx.shape == (0, 4, 4, 8)
    assert partials is not None
    assert partials.shape == (0, 2, 8)
    dw = run_wgrad(o, "bn activation", None)
    assert torch.equal(dw, torch.zeros(16, 3, 3, 8, device=DEVICE))


REFUSING, GROUPED = (ConvProblem(3, 6, 7, 8, 24, 3, 3, 1, 1, groups=groups) for groups in (1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.zeros(3, 6, 7, 23)}, r"dy must have shape \[3, 6, 7, 24\], got \[3, 6, 7, 23\]"),
        ({"dy": torch.zeros(3, 6, 7, 24).double()}, "dy must be .*float32, got torch.float64"),
        ({"dy": torch.zeros(3, 24, 6, 7).permute(0, 2, 3, 1)}, "dy must be contiguous"),
        ({"w": torch.zeros(24, 3, 3, 8).half()}, "w must be torch.float32, got torch.float16"),
        ({"w": torch.zeros(24, 3, 3)}, r"w must have shape \[24, 3, 3, 8\], got \[24, 3, 3\]"),
        ({"precision": "bf16"}, "precision must be 'ieee' or 'tf32'"),
        ({"residual": torch.zeros(3, 6, 7, 9)}, "residual must have shape"),
        ({"residual_mask": torch.zeros(3, 6, 7, 8)}, "residual_mask requires a residual"),
        ({"bn_backward": (torch.zeros(3, 6, 7, 24), *torch.zeros(3, 23))}, r"c_g must have shape \[24\]"),
        ({"relu_mask": torch.zeros(2, 8)}, r"relu_mask must have shape \[3, 6, 7, 8\]"),
        (
            {"relu_mask": (torch.zeros(8), torch.zeros(8))},
            r"relu_mask=\(scale, shift\) requires below=\(z_below, mean\)",
        ),
        (
            {"relu_mask": tuple(torch.zeros(2, 8).half()), "below": (torch.zeros(3, 6, 7, 8), torch.zeros(8))},
            "scale must be torch.float32",
        ),
        (
            {"relu_mask": (None, torch.zeros(8)), "below": (torch.zeros(3, 6, 7, 8), torch.zeros(8))},
            r"relu_mask must be a tensor of dx's shape or the pair \(scale, shift\)",
        ),
        ({"projection": (torch.zeros(3, 6, 7, 8), torch.zeros(8))}, r"projection requires below=\(z_below, mean\)"),
        (
            {"problem": GROUPED, "w": torch.zeros(24, 3, 3, 4), "tile": BOXES},
            "TMA, which is impossible here: groups=2",
        ),
    ],
)
def test_dgrad_rejects_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"dy": torch.zeros(3, 6, 7, 24), "w": torch.zeros(24, 3, 3, 8), "problem": REFUSING}
    with pytest.raises(ValueError, match=message):
        conv_dgrad(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 6, 7, 8).half()}, "x must be torch.float32, got torch.float16"),
        ({"prologue": (torch.zeros(8), torch.zeros(9))}, r"shift must have shape \[8\]"),
        ({"out_dtype": torch.int32}, "out_dtype must be a floating-point dtype"),
        ({"tile": dataclasses.replace(WGRAD_GATHER, taps=3)}, "taps must be 1, or 3 .*, got 3"),
        ({"tile": dataclasses.replace(WGRAD_BOXES, splits=0)}, "splits"),
        (
            {"problem": ConvProblem(3, 6, 7, 8, 24, 3, 3, 3), "dy": torch.zeros(3, 2, 2, 24), "tile": WGRAD_BOXES},
            "stride 3 on 6x7",
        ),
    ],
)
def test_wgrad_rejects_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"dy": torch.zeros(3, 6, 7, 24), "x": torch.zeros(3, 6, 7, 8), "problem": REFUSING}
    with pytest.raises(ValueError, match=message):
        conv_wgrad(**{**arguments, **change})
