"""Compare the BatchNorm, max-pool and shortcut kernels with PyTorch's autograd in float64, forward and backward.

Triton's interpreter (TRITON_INTERPRET=1) runs them at small, odd sizes; a GPU also runs the sizes of real layers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from cases import assert_close_to_reference, relative_error
from covering import covered, some_seeds
from tolerances import CANCELLED, MEANS, MOMENTS, ROUNDING, TOLERANCES, TWICE
from torch import Tensor

from fastres.kernels import batch_norm, launcher, rows
from fastres.kernels.batch_norm import Pool
from fastres.kernels.max_pool import max_pool
from fastres.kernels.pad_shortcut import pad_shortcut_backward
from fastres.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]
gpu = pytest.mark.gpu

EPS, MOMENTUM = 1e-5, 0.3
ENDS = ("linear", "relu", "add", "project", "pad")
SMALL = [(2, 9, 8, 5), (1, 7, 7, 24), (3, 6, 5, 64), (1, 3, 1, 130)]
REAL = [
    (64, 56, 56, 64),
    (64, 56, 56, 256),
    (64, 28, 28, 128),
    (64, 14, 14, 1024),
    (256, 7, 7, 2048),
    (128, 32, 32, 16),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """The end of a block: z [N, P, Q, K] through BatchNorm, the shortcut `end` and ReLU.

    "linear" has neither shortcut nor ReLU, and "relu" has no shortcut. The others are "add" (the identity), "project"
    (a projection with a BatchNorm) and "pad" (option A).
    """

    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    end: str = "relu"
    batch_statistics: bool = True
    affine: bool = True
    mean: float = 0.5
    std: float = 1.0
    channels: int = 3  # of the input of an option-A shortcut
    stride: int = 2
    seed: int = 0


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def inputs(case: Case) -> dict[str, Tensor]:
    """Return random tensors by name, in the dtypes that the kernels take.

    dy is zero where the ReLU's input is so close to 0 that its sign could differ in float64.
    """
    generator = torch.Generator(DEVICE).manual_seed(case.seed)
    N, P, Q, K = case.shape

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    def branch() -> Tensor:
        return (normal(N, P, Q, K) * case.std + case.mean * (1 + 0.1 * normal(K))).to(case.dtype)

    t = {"z": branch(), "dy": normal(N, P, Q, K, dtype=case.dtype)}
    names = [""]
    if case.end == "add":
        t["residual"] = normal(N, P, Q, K, dtype=case.dtype)
    elif case.end == "project":
        t["z_proj"] = branch()
        names.append("_proj")
    elif case.end == "pad":
        H, W = (P - 1) * case.stride + 1, Q * case.stride
        t["residual"] = normal(N, H, W, min(case.channels, K), dtype=case.dtype)
    for d in names:
        if case.affine:
            t["weight" + d], t["bias" + d] = 1 + 0.3 * normal(K), normal(K)
        t["running_mean" + d], t["running_var" + d] = normal(K), 0.5 + normal(K).abs()
    if case.end != "linear":
        before = stock({**t, "dy": torch.zeros_like(t["dy"])}, case, torch.float64, relu=False)["y"]
        t["dy"] *= before.abs() > 1e-2
    return t


def stock(t: dict[str, Tensor], case: Case, dtype: torch.dtype, *, relu: bool = True) -> dict[str, Tensor]:
    """Return PyTorch's results in `dtype` as NHWC; vectors are float64 if `dtype` is, else float32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    activations = ("z", "z_proj", "residual", "dy")
    t = {name: v.to(dtype if name in activations else wide, copy=True) for name, v in t.items()}
    leaves = [n for n in t if n != "dy" and not n.startswith("running")]
    for name in leaves:
        t[name].requires_grad_()

    def bn(d: str) -> Tensor:
        return F.batch_norm(
            nchw(t["z" + d]), t["running_mean" + d], t["running_var" + d], t.get("weight" + d), t.get("bias" + d),
            case.batch_statistics, MOMENTUM, EPS,
        )  # fmt: skip

    y = bn("")
    if case.end == "add":
        y = y + nchw(t["residual"])
    elif case.end == "project":
        y = y + bn("_proj")
    elif case.end == "pad":
        y = y + reference.pad_shortcut(nchw(t["residual"]), case.stride, y.shape[1])
    if case.end != "linear" and relu:
        y = F.relu(y)
    y.backward(nchw(t["dy"]))
    grads = {"d" + name: t[name].grad for name in leaves}
    running = {name: v for name, v in t.items() if name.startswith("running")}
    return {"y": nhwc(y.detach()), **grads, **running}  # type: ignore[dict-item]


def ours(t: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Return the kernels' results, by the same names as `stock`."""
    z, dy = t["z"], t["dy"]
    count = z.numel() // z.shape[-1]
    out: dict[str, Tensor] = {}

    def bn(d: str) -> batch_norm.Statistics:
        weight, bias = t.get("weight" + d), t.get("bias" + d)
        mean, var = t["running_mean" + d].clone(), t["running_var" + d].clone()
        out["running_mean" + d], out["running_var" + d] = mean, var
        if not case.batch_statistics:
            return batch_norm.running_statistics(mean, var, weight, bias, EPS)
        partials = batch_norm.statistics(t["z" + d])
        return batch_norm.finish_statistics(
            partials, weight, bias, EPS, running_mean=mean, running_var=var, momentum=MOMENTUM
        )

    def finish(partials: Tensor, s: batch_norm.Statistics, d: str = "") -> list[Tensor | None]:
        v = batch_norm.finish_backward(
            partials, t.get("weight" + d), s.mean, s.rstd, count, batch_statistics=case.batch_statistics
        )
        if case.affine:
            out["dweight" + d], out["dbias" + d] = v.dweight, v.dbias
        assert (v.c_z is None) == (v.c_1 is None) == (not case.batch_statistics)
        return [v.c_g, v.c_z, v.c_1]

    s = bn("")
    mask: Any = (s.scale, s.shift)
    if case.end in ("linear", "relu"):
        out["y"] = batch_norm.normalize(z, s.scale, s.shift, relu=case.end == "relu")
        mask = mask if case.end == "relu" else None
        v = finish(batch_norm.backward_reduce(dy, z, s.mean, mask=mask), s)
        out["dz"] = batch_norm.backward_apply(dy, z, *v, mask=mask)
    elif case.end == "project":
        s_proj, z_proj = bn("_proj"), t["z_proj"]
        y = batch_norm.normalize(
            z, s.scale, s.shift, relu=True, residual=z_proj, residual_scale=s_proj.scale, residual_shift=s_proj.shift
        )
        partials, partials_proj = batch_norm.backward_reduce(dy, z, s.mean, mask=y, projection=(z_proj, s_proj.mean))
        v, v_proj = finish(partials, s), finish(partials_proj, s_proj, "_proj")
        out["y"] = y
        out["dz"], out["dz_proj"] = batch_norm.backward_apply(dy, z, *v, mask=y, projection=(z_proj, *v_proj))
    else:
        stride = case.stride if case.end == "pad" else 1
        residual = t["residual"]
        y = batch_norm.normalize(z, s.scale, s.shift, relu=True, residual=residual, residual_stride=stride)
        v = finish(batch_norm.backward_reduce(dy, z, s.mean, mask=y), s)
        out["y"] = y
        out["dz"] = batch_norm.backward_apply(dy, z, *v, mask=y)
        if residual is not None:
            out["dresidual"] = pad_shortcut_backward(torch.zeros_like(residual), dy, stride=stride, mask=y)
    return out


def masked_gradient(dy: Tensor, z: Tensor, mask: batch_norm.Mask, pool: Pool | None) -> Tensor:
    """Return g, the gradient dy after the backward of pool and ReLU: it is dz for c_g = 1 without c_z and c_1."""
    return batch_norm.backward_apply(dy, z, torch.ones(z.shape[-1], device=DEVICE), None, None, mask=mask, pool=pool)


def hold(case: Case) -> None:
    """Assert that the kernels' error against float64 is at most twice that of PyTorch in the same dtype, plus rounding.

    The allowance for rounding is `TOLERANCES`; it is larger in two cases. Vectors are fp32 sums over pixels, while
    PyTorch on the CPU sums in float64. And if |mean| >> std, the terms of y = scale z + shift and the last two of dz =
    c_g g + c_z z + c_1 cancel, which leaves rounding errors of their size; PyTorch on a GPU subtracts the mean first.
    """
    t = inputs(case)
    truth, baseline, actual = stock(t, case, torch.float64), stock(t, case, case.dtype), ours(t, case)
    assert sorted(actual) == sorted(truth)
    for name, value in actual.items():
        allowed = TOLERANCES[value.dtype] * (8 if value.dim() == 1 else 1)
        for z in t.keys() & {"z", "z_proj"}:
            if name in ("y", f"d{z}"):
                mean, rstd = vectors(t[z])
                allowed += 4 * TOLERANCES[torch.float32] * float((mean.abs() * rstd).max())
        allowed += TWICE * relative_error(baseline[name], truth[name])
        error = relative_error(value, truth[name])
        assert error <= allowed, f"{name} of {case}: error {error:.3g}, allowed {allowed:.3g}"


@covered(shape=SMALL, end=ENDS, dtype=DTYPES)
def test_block_end(shape: tuple[int, int, int, int], end: str, dtype: torch.dtype) -> None:
    hold(Case(shape, dtype, end))


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_block_end_of_real_layers(shape: tuple[int, int, int, int], end: str, dtype: torch.dtype) -> None:
    hold(Case(shape, dtype, end, channels=shape[-1] // 2))


@pytest.mark.parametrize("end", ENDS)
def test_given_statistics(end: str) -> None:
    """In eval mode the running statistics don't change, and no gradient flows through them."""
    hold(Case((2, 5, 4, 24), end=end, batch_statistics=False))


@pytest.mark.parametrize("end", ["relu", "project"])
def test_no_affine(end: str) -> None:
    hold(Case((2, 5, 4, 8), end=end, affine=False))


def test_pad_shortcut_keeps_the_branch_gradient() -> None:
    """dy is added to dx at the strided pixels only. K and C are multiples of 8, so accesses are vectorised."""
    dx = torch.randint(-9, 9, (2, 5, 6, 16), device=DEVICE).half()
    dy = torch.randint(-9, 9, (2, 3, 3, 24), device=DEVICE).half()
    expected = dx.clone()
    expected[:, ::2, ::2] += dy[..., :16]
    assert torch.equal(pad_shortcut_backward(dx, dy, stride=2), expected)


def vectors(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and rstd of z in float64."""
    var, mean = torch.var_mean(z.double(), (0, 1, 2), correction=0)
    return mean, (var + EPS).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mean", "std"), [(20.0, 0.1), (100.0, 0.1)])
def test_statistics_do_not_cancel(mean: float, std: float, dtype: torch.dtype) -> None:
    z = (torch.randn(4, 20, 16, 8, device=DEVICE) * std + mean).to(dtype)
    true_mean, true_rstd = vectors(z)
    s = batch_norm.finish_statistics(batch_norm.statistics(z), None, None, EPS)
    assert relative_error(s.mean, true_mean) < MEANS
    assert relative_error(s.rstd, true_rstd) < MOMENTS
    x = z.float()
    naive = ((x * x).mean((0, 1, 2)) - x.mean((0, 1, 2)) ** 2 + EPS).rsqrt()
    assert not relative_error(naive, true_rstd) < CANCELLED, "this input is too easy to tell good statistics from bad"


def test_statistics_partials() -> None:
    """Each partial has the count, mean and M2 of its own chunk of pixels."""
    z = torch.randn(3, 40, 30, 12, device=DEVICE)
    partials = batch_norm.statistics(z).double()
    view = rows.rows("z", z, rows.REDUCED)
    chunks, steps = view.chunks()
    assert partials.shape == (chunks, 3, 12)
    assert chunks > 1
    pixels = z.double().view(-1, 12).split(view.BM * steps)
    assert len(pixels) == chunks
    for chunk, (count, mean, m2) in zip(pixels, partials, strict=True):
        assert torch.equal(count, torch.full_like(count, len(chunk)))
        assert relative_error(mean, chunk.mean(0)) < MOMENTS
        assert relative_error(m2, ((chunk - chunk.mean(0)) ** 2).sum(0)) < MOMENTS


@pytest.mark.parametrize("tiles", [1, 130, 700])
def test_merge_of_uneven_tiles(tiles: int) -> None:
    """Partials may have different counts, zero included. More than 512 are merged in two steps."""
    counts = [random.randrange(0, 7) for _ in range(tiles)]
    counts[0] = 3
    z = torch.randn(sum(counts), 1, 1, 20, device=DEVICE) + 30
    partials = torch.zeros(tiles, 3, 20, device=DEVICE)
    for tile, chunk in zip(partials, z.double().view(-1, 20).split(counts), strict=True):
        if len(chunk):
            tile[0], tile[1], tile[2] = len(chunk), chunk.mean(0), ((chunk - chunk.mean(0)) ** 2).sum(0)
    true_mean, true_rstd = vectors(z)
    s = batch_norm.finish_statistics(partials, None, None, EPS)
    assert relative_error(s.mean, true_mean) < MEANS
    assert relative_error(s.rstd, true_rstd) < ROUNDING


@pytest.mark.parametrize("tiles", [1, 130, 700])
def test_merge_of_sums(tiles: int) -> None:
    partials = torch.randint(-9, 9, (tiles, 2, 20), device=DEVICE).float()
    one = torch.ones(20, device=DEVICE)
    v = batch_norm.finish_backward(partials, None, one, 2 * one, 4, batch_statistics=True)
    sum_g, sum_gz = partials.sum(0)
    assert torch.equal(v.dbias, sum_g)
    assert torch.equal(v.dweight, 2 * sum_gz)
    assert torch.equal(v.c_g, 2 * one)
    assert torch.equal(v.c_z, -2 * sum_gz)
    assert torch.equal(v.c_1, 2 * sum_gz - sum_g / 2)


@pytest.mark.parametrize("buffer", DTYPES, ids=str)
def test_running_statistics_follow_stock(buffer: torch.dtype) -> None:
    """Running statistics follow `nn.BatchNorm2d` over three steps, also with low-precision parameters and buffers."""
    bn = torch.nn.BatchNorm2d(6, momentum=MOMENTUM, device=DEVICE).to(buffer)
    torch.nn.init.normal_(bn.weight)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()  # type: ignore[union-attr]
    for _ in range(3):
        z = torch.randn(2, 3, 2, 6, device=DEVICE) * 2 + 1
        bn(nchw(z.to(buffer)))
        z = z.to(buffer)
        s = batch_norm.finish_statistics(
            batch_norm.statistics(z), bn.weight.detach(), bn.bias.detach(), bn.eps,
            running_mean=mean, running_var=var, momentum=MOMENTUM,
        )  # fmt: skip
        assert relative_error(s.scale, vectors(z)[1] * bn.weight.detach().double()) < ROUNDING
    assert mean.dtype == buffer
    tolerance = 4 * TOLERANCES[buffer]
    assert relative_error(mean, bn.running_mean) < tolerance  # type: ignore[arg-type]
    assert relative_error(var, bn.running_var) < tolerance  # type: ignore[arg-type]


def test_batches_are_counted() -> None:
    """The counter grows by 1 per call, although several programs run, and also without running statistics."""
    z, counter = torch.randn(2, 3, 2, 40, device=DEVICE), torch.tensor(2**40, device=DEVICE)
    mean, var = torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE)
    partials = batch_norm.statistics(z)
    for running in ({"running_mean": mean, "running_var": var, "momentum": 0.1}, {}):
        batch_norm.finish_statistics(partials, None, None, EPS, counter=counter, **running)
    assert int(counter) == 2**40 + 2


def test_only_one_running_buffer() -> None:
    z = torch.randn(2, 3, 2, 6, device=DEVICE)
    var = torch.ones(6, device=DEVICE)
    batch_norm.finish_statistics(batch_norm.statistics(z), None, None, EPS, running_var=var, momentum=1.0)
    assert relative_error(var, z.double().var((0, 1, 2))) < ROUNDING


def stock_pool(a: Tensor, kernel: int, stride: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return the values of F.max_pool2d and the tap of each maximum, which is its index in the window; both NHWC."""
    y, flat = F.max_pool2d(nchw(a), kernel, stride, pad, return_indices=True)
    top = torch.arange(y.shape[2], device=a.device)[:, None] * stride - pad
    left = torch.arange(y.shape[3], device=a.device) * stride - pad
    tap = (flat // a.shape[2] - top) * kernel + flat % a.shape[2] - left
    return nhwc(y), nhwc(tap)


POOLS = {"-".join(map(str, p)): p for p in [(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 0), (5, 2, 2), (5, 4, 1)]}


@covered(shape=[(1, 7, 12, 16), (2, 9, 8, 5)], dtype=DTYPES, pool=POOLS)
def test_max_pool(shape: tuple[int, int, int, int], dtype: torch.dtype, pool: tuple[int, int, int]) -> None:
    """Values, taps and gradients equal PyTorch's bit for bit on small integers, which have many ties and zeros."""
    hold_pool(shape, dtype, *pool)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_of_the_stem(dtype: torch.dtype) -> None:
    hold_pool((64, 112, 112, 64), dtype, 3, 2, 1)


def hold_pool(shape: tuple[int, int, int, int], dtype: torch.dtype, kernel: int, stride: int, pad: int) -> None:
    K = shape[-1]
    z = torch.randint(-4, 5, shape, device=DEVICE).to(dtype)
    scale = torch.tensor([1.0, 2.0, -1.0, 0.5] * K, device=DEVICE)[:K]
    shift = torch.randint(-2, 3, (K,), device=DEVICE).float()
    mean = torch.randint(-2, 3, (K,), device=DEVICE).float()

    y, tap = batch_norm.normalize_max_pool(z, scale, shift, kernel=kernel, stride=stride, pad=pad)
    leaf = (z.float() * scale + shift).requires_grad_()
    a = F.relu(leaf)
    expected, expected_tap = stock_pool(a, kernel, stride, pad)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(tap, expected_tap.to(torch.uint8))
    bare = max_pool(z, kernel=kernel, stride=stride, pad=pad)
    assert torch.equal(bare, nhwc(F.max_pool2d(nchw(z.float()), kernel, stride, pad)).to(dtype))

    dy = torch.randint(-4, 5, y.shape, device=DEVICE).to(dtype)
    F.max_pool2d(nchw(a), kernel, stride, pad).backward(nchw(dy.float()))
    g = leaf.grad
    assert g is not None
    pool = Pool(tap, kernel, stride, pad)
    mask = (scale, shift)
    assert torch.equal(masked_gradient(dy, z, mask, pool), g.to(dtype))
    sums = batch_norm.backward_reduce(dy, z, mean, mask=mask, pool=pool).double().sum(0)
    exact = torch.stack([g.double().sum((0, 1, 2)), (g.double() * (z.double() - mean)).sum((0, 1, 2))])
    assert torch.equal(sums, exact)
    c_g, c_z, c_1 = (torch.randint(-2, 3, (K,), device=DEVICE).float() for _ in range(3))
    dz = batch_norm.backward_apply(dy, z, c_g, c_z, c_1, mask=mask, pool=pool)
    assert torch.equal(dz, (c_g * g + c_z * z.float() + c_1).to(dtype))


def test_max_pool_of_reals() -> None:
    """Random reals have no ties above 0, so the taps of positive maxima must equal those of float64."""
    z = torch.randn(2, 7, 9, 24, device=DEVICE)
    scale, shift = torch.randn(24, device=DEVICE), torch.randn(24, device=DEVICE)
    y, tap = batch_norm.normalize_max_pool(z, scale, shift)
    expected, expected_tap = stock_pool(F.relu(z.double() * scale + shift), 3, 2, 1)
    assert_close_to_reference(y, expected)
    positive = expected > 0
    assert torch.equal(tap[positive].long(), expected_tap[positive])


def test_max_pool_nan() -> None:
    """A NaN is the maximum of its windows and gets their gradient; among several NaNs the last one does."""
    z = torch.randn(2, 8, 8, 8, device=DEVICE)
    z[0, 2, 3, :4] = float("nan")
    z[0, 3, 3, :2] = float("nan")
    z[1, 0, 0] = float("inf")
    z[1, 3:6, 3:6] = -float("inf")  # a whole window
    one, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    assert torch.equal(max_pool(z).nan_to_num(7.0), nhwc(F.max_pool2d(nchw(z), 3, 2, 1)).nan_to_num(7.0))
    y, tap = batch_norm.normalize_max_pool(z, one, zero)
    leaf = z.clone().requires_grad_()
    expected, expected_tap = stock_pool(F.relu(leaf), 3, 2, 1)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert torch.equal(tap, expected_tap.to(torch.uint8))
    dy = torch.randn_like(y)
    expected.backward(dy)
    g = masked_gradient(dy, z, (one, zero), Pool(tap, 3, 2, 1))
    assert_close_to_reference(g, leaf.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Results on small integers are exact, because every intermediate value fits the dtype."""

    def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randint(-3, 4, shape, device=DEVICE).to(dtype)

    z, z_proj, dy = (integers(2, 5, 7, 24, dtype=dtype) for _ in range(3))
    scale, shift, scale_proj, shift_proj, mean, mean_proj = (integers(24) for _ in range(6))
    c_g, c_z, c_1, c_g_proj, c_z_proj, c_1_proj = (integers(24) for _ in range(6))
    added = {"residual": z_proj, "residual_scale": scale_proj, "residual_shift": shift_proj}
    y = batch_norm.normalize(z, scale, shift, relu=True, **added)
    before = z.double() * scale + shift + z_proj.double() * scale_proj + shift_proj
    assert torch.equal(y.double(), before.relu())
    g = dy.double() * (before > 0)
    partials, partials_proj = batch_norm.backward_reduce(dy, z, mean, mask=y, projection=(z_proj, mean_proj))
    for sums, x, centre in ((partials, z, mean), (partials_proj, z_proj, mean_proj)):
        exact = torch.stack([g.sum((0, 1, 2)), (g * (x.double() - centre)).sum((0, 1, 2))])
        assert torch.equal(sums.double().sum(0), exact)
    projection = (z_proj, c_g_proj, c_z_proj, c_1_proj)
    dz, dz_proj = batch_norm.backward_apply(dy, z, c_g, c_z, c_1, mask=y, projection=projection)
    assert torch.equal(dz.double(), c_g * g + c_z * z.double() + c_1)
    assert torch.equal(dz_proj.double(), c_g_proj * g + c_z_proj * z_proj.double() + c_1_proj)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("end", ["linear", "relu", "add", "project"])
def test_bad_values_spread_as_in_stock(end: str, value: float) -> None:
    """A NaN or infinity in z, dy and an added shortcut makes the same results non-finite as in PyTorch."""
    case = Case((2, 3, 5, 6), end=end)
    t = inputs(case)
    t["z"][1, 2, 3, 4] = value
    t["dy"][0, 1, 1, 2] = value
    if "residual" in t:
        t["residual"][0, 0, 0, 0] = value
    expected, actual = stock(t, case, torch.float32), ours(t, case)
    for name, result in actual.items():
        assert torch.equal(result.isfinite(), expected[name].isfinite()), name


def test_given_statistics_do_not_mix_in_z() -> None:
    """With c_z = c_1 = None an infinite z doesn't reach dz, as in PyTorch's eval mode."""
    z = torch.full((1, 2, 2, 8), float("inf"), device=DEVICE)
    one = torch.ones(8, device=DEVICE)
    assert torch.equal(batch_norm.backward_apply(torch.ones_like(z), z, one, None, None), torch.ones_like(z))


def test_equal_inputs_give_equal_bits() -> None:
    for end in ENDS:
        case = Case((2, 9, 11, 24), torch.bfloat16, end)
        t = inputs(case)
        first, second = ours(t, case), ours(t, case)
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_empty_batch() -> None:
    z = torch.empty(0, 4, 4, 8, device=DEVICE)
    v = torch.ones(8, device=DEVICE)
    assert batch_norm.normalize(z, v, v, relu=True).shape == z.shape
    assert batch_norm.backward_apply(z, z, v, v, v).shape == z.shape
    assert batch_norm.normalize_max_pool(z, v, v)[0].shape == (0, 2, 2, 8)
    with pytest.raises(ValueError, match="z is empty"):
        batch_norm.statistics(z)


@pytest.mark.parametrize("seed", some_seeds(10))
def test_fuzz(seed: int) -> None:
    """Random sizes, dtypes, shortcuts and means. The printed command repeats a failed case."""
    draw = random.Random(seed)
    K = draw.choice([1, 3, 8, 16, 40, 65, 72, 100])
    shape = (draw.randint(1, 4), draw.randint(1, 13), draw.randint(2, 13), K)
    case = Case(
        shape, draw.choice(DTYPES), draw.choice(ENDS), batch_statistics=draw.random() < 0.8, affine=draw.random() < 0.8,
        mean=draw.choice([0.0, 1.0, 5.0]), std=draw.choice([0.1, 1.0, 3.0]),
        channels=draw.randint(1, K), stride=draw.choice([1, 2, 3]), seed=seed,
    )  # fmt: skip
    print(f"to repeat: pytest 'tests/kernels/test_batch_norm.py::test_fuzz[{seed}]'  {case}")
    hold(case)


@triton.jit
def wrong_normalize_kernel(
    z, scale, shift, residual, residual_scale, residual_shift, y, M, K_VECS, P, Q, H, W, C_VECS,
    RELU: tl.constexpr, STRIDE: tl.constexpr, VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A `normalize_kernel` without the ReLU."""
    K = K_VECS * VEC
    row, channel = rows.tile_of(tl.program_id(0), K, BM, BK)
    valid = (row < M)[:, None] & (channel < K)[None, :]
    here = rows.at(row, channel, K)
    out = tl.load(z + here, mask=valid, other=0.0).to(tl.float32)
    out = out * rows.vector(scale, channel, K) + rows.vector(shift, channel, K)
    tl.store(y + here, out.to(y.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["steps"])
def wrong_statistics_kernel(z, partials, M, K_VECS, steps, VEC: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """A `statistics_kernel` that also counts the masked rows after the last pixel."""
    K = K_VECS * VEC
    chunk = tl.program_id(0)
    row, channel = rows.tile_of(tl.program_id(1), K, BM, BK)
    row += chunk * steps * BM
    total = tl.zeros((BK,), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    for _ in range(steps):
        valid = (row < M)[:, None] & (channel < K)[None, :]
        x = tl.load(z + rows.at(row, channel, K), mask=valid, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
        squares += tl.sum(x * x, 0)
        row += BM
    count = (steps * BM).to(tl.float32)
    out = partials + chunk * 3 * K + channel
    tl.store(out, total * 0 + count, mask=channel < K)
    tl.store(out + K, total / count, mask=channel < K)
    tl.store(out + 2 * K, squares - total * total / count, mask=channel < K)


@pytest.mark.parametrize("name", ["normalize_kernel", "statistics_kernel"])
def test_a_wrong_kernel_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((2, 9, 8, 5), torch.bfloat16)
    hold(case)
    monkeypatch.setattr(batch_norm, name, globals()[f"wrong_{name}"])
    launcher.forget()
    with pytest.raises(AssertionError, match="error"):
        hold(case)


@gpu
def test_beyond_int32() -> None:
    """With more than 2**31 elements the last rows are right too."""
    N, K = 2**20 + 3, 2048
    z = torch.empty(N, 1, 1, K, dtype=torch.bfloat16, device=DEVICE).fill_(1)
    z[-2:] = 3
    one = torch.ones(K, device=DEVICE)
    y = batch_norm.normalize(z, one, one, relu=True)
    assert bool((y[-2:] == 4).all())
    assert bool((y[:2] == 2).all())
    partials = batch_norm.backward_reduce(z, z, 0 * one)
    assert torch.equal(partials[-1, 0], partials[0, 0] * 0 + partials[-1, 0, 0])
    assert float(partials[:, 0, 0].double().sum()) == N + 4
    s = batch_norm.finish_statistics(batch_norm.statistics(z), None, None, EPS)
    assert relative_error(s.mean, torch.full_like(one, 1 + 4 / N).double()) < ROUNDING


def test_refusals() -> None:
    z = torch.ones(2, 4, 6, 8, device=DEVICE)
    v = torch.ones(8, device=DEVICE)
    partials = torch.ones(4, 3, 8, device=DEVICE)
    refused: list[tuple[str, Any]] = [
        ("z must be bfloat16, float16 or float32", lambda: batch_norm.statistics(z.double())),
        ("z must be contiguous", lambda: batch_norm.statistics(nchw(z))),
        (r"z must be \[\.\.\., K\]", lambda: batch_norm.statistics(v)),
        (r"scale must have shape \[8\]", lambda: batch_norm.normalize(z, v[:4], v, relu=True)),
        ("shift must be torch.float32", lambda: batch_norm.normalize(z, v, v.half(), relu=True)),
        ("residual must be torch.float32", lambda: batch_norm.normalize(z, v, v, relu=True, residual=z.half())),
        ("option-A shortcut", lambda: batch_norm.normalize(z, v, v, relu=True, residual=z[..., :4].contiguous()[:1])),
        ("option-A shortcut", lambda: batch_norm.normalize(z, v, v, relu=True, residual=z, residual_stride=2)),
        ("given together", lambda: batch_norm.normalize(z, v, v, relu=True, residual=z, residual_scale=v)),
        ("given together", lambda: batch_norm.normalize(z, v, v, relu=True, residual_scale=v, residual_shift=v)),
        (r"dy must have shape", lambda: batch_norm.backward_reduce(z[:1], z, v)),
        (r"mask must have shape", lambda: batch_norm.backward_reduce(z, z, v, mask=z[:1])),
        ("c_z and c_1 must be given together", lambda: batch_norm.backward_apply(z, z, v, v, None)),
        (r"partials must be \[T >= 1, 3, K\]", lambda: batch_norm.finish_statistics(z[0], None, None, EPS)),
        (r"counter must have shape \[\], got \[1\]",
         lambda: batch_norm.finish_statistics(partials, None, None, EPS, counter=v[:1].long())),
        ("counter must be torch.int64, got torch.int32",
         lambda: batch_norm.finish_statistics(partials, None, None, EPS, counter=v[0].int())),
        (r"partials must be \[T >= 1, 2, K\]",
         lambda: batch_norm.finish_backward(z[0], None, v, v, 48, batch_statistics=True)),
        ("count must be >= 1",
         lambda: batch_norm.finish_backward(z[0, :, :2].contiguous(), None, v, v, 0, batch_statistics=True)),
        ("stride <= 4", lambda: batch_norm.backward_reduce(z, z, v, pool=Pool(z, 3, 0, 1))),
        ("stride <= 4", lambda: max_pool(z, stride=5)),
        ("kernel <= 15", lambda: batch_norm.normalize_max_pool(z, v, v, kernel=3, pad=2)),
        ("does not fit", lambda: batch_norm.normalize_max_pool(z, v, v, kernel=9, pad=0)),
        (r"the input of a max pool must be \[N, P, Q, K\]", lambda: batch_norm.normalize_max_pool(z[0], v, v)),
        ("option-A shortcut", lambda: pad_shortcut_backward(z, z, stride=2)),
        ("z has 2147483648 pixels", lambda: batch_norm.statistics(torch.empty(2**31, 1, device="meta"))),
        ("residual has 2147483648 pixels", lambda: batch_norm.normalize(
            torch.empty(2**20, 16, 32, 1, device="meta"), v[:1].to("meta"), v[:1].to("meta"), relu=True,
            residual=torch.empty(2**20, 32, 64, 1, device="meta"), residual_stride=2)),
    ]  # fmt: skip
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
