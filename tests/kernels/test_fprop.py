"""conv_fprop against float64, with tiles for TMA and for pointers.

On a CPU the kernels run in the interpreter, at small shapes, in float32 and float16, because the interpreter multiplies
bfloat16 wrongly. On a GPU the same tests run compiled, also in bfloat16, and so does every candidate tile at every
layer of three nets.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from cases import Broken, assert_close_to_reference, check_statistics, relative_error
from conv_cases import BOXED, GATHERED, net_problems, reference, traits
from covering import covered, some_seeds
from tolerances import FUSED, ROUNDING, lost_in_sums
from torch import Tensor

from fastres.kernels import fprop, launcher
from fastres.kernels.fprop import Join, RunningNorm, conv_fprop, fprop_tma_refusal
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import Tile, fprop_tiles, reduction_steps
from fastres.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned")]

ROUTES = {f"gather, {name}": (p, False) for name, p in GATHERED.items()}
ROUTES |= {f"TMA, {name}": (p, True) for name, p in BOXED.items()}
CASES = [pytest.param(*route, id=name) for name, route in ROUTES.items()]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def small_tile(problem: ConvProblem, boxed: bool) -> Tile:
    """Return a tile that cuts a small problem into several programs and steps, some of them partly masked."""
    BK = 32 if not boxed or problem.C % 32 == 0 or problem.pointwise else 16
    box = None if not boxed else (1, 1, 32) if problem.pointwise else (1, 4, 8) if problem.N == 1 else (2, 4, 4)
    return Tile(16, 32, BK, 4, 2, box)


def operands(p: ConvProblem, dtype: torch.dtype, integers: bool = False) -> tuple[Tensor, Tensor]:
    """Return random x and w for which y is about 1; or small integers, whose sums are exact in any order."""
    x_shape, w_shape = (p.N, p.H, p.W, p.C), (p.K, p.R, p.S, p.C // p.groups)
    if integers:
        x, w = (torch.randint(-2, 3, shape).to(dtype) for shape in (x_shape, w_shape))
    else:
        x = torch.randn(x_shape).to(dtype)
        w = (torch.randn(w_shape) / p.gemm("fprop").k ** 0.5).to(dtype)
    return x.to(DEVICE), w.to(DEVICE)


def extras(p: ConvProblem, dtype: torch.dtype, *names: str) -> dict[str, Any]:
    """Return random values for the optional arguments `names` of `conv_fprop`."""
    made: dict[str, Any] = {
        "prologue": (torch.rand(p.C, device=DEVICE) + 0.5, torch.randn(p.C, device=DEVICE)),
        "scale": torch.randn(p.K, device=DEVICE),
        "shift": torch.randn(p.K, device=DEVICE),
        "norm": RunningNorm(*(torch.rand(4, p.K, device=DEVICE) + 0.5).to(dtype), 1e-3),
        "norm without affine": RunningNorm(*(torch.rand(2, p.K, device=DEVICE) + 0.5), None, None, 1e-3),
        "residual": torch.randn(p.N, p.P, p.Q, p.K, device=DEVICE).to(dtype),
        "relu": True,
    }
    return {name.partition(" ")[0]: made[name] for name in names}


def hold(p: ConvProblem, y: Any, x: Tensor, w: Tensor, tile: Tile | None = None, **given: Any) -> None:
    """Check y against float64, with a tolerance relative to PyTorch's own error in the same dtype."""
    assert isinstance(y, Tensor)
    assert y.dtype == x.dtype
    ref64, baseline = reference(p, x, w, **given), reference(p, x, w, x.dtype, **given)
    lost = lost_in_sums(p.gemm("fprop").k, x)
    assert_close_to_reference(y, ref64, baseline, factor=FUSED, what=f"{p} {tile} {[*given]}", lost=lost)


def check(p: ConvProblem, dtype: torch.dtype, tile: Tile | None, *names: str, **options: Any) -> None:
    x, w = operands(p, dtype)
    given = extras(p, dtype, *names)
    hold(p, conv_fprop(x, w, p, **given, **options, tile=tile), x, w, tile, **given)


@covered(
    by=lambda route, dtype: (route[1], *traits(route[0]), dtype),
    route=ROUTES,
    dtype={str(d).removeprefix("torch."): d for d in DTYPES},
)
def test_every_problem(route: tuple[ConvProblem, bool], dtype: torch.dtype) -> None:
    problem, boxed = route
    check(problem, dtype, small_tile(problem, boxed))
    check(problem, dtype, small_tile(problem, boxed), "prologue", "scale", "shift", "residual", "relu")


@covered(
    by=lambda route, dtype: (route[1], *traits(route[0]), dtype),
    route=ROUTES,
    dtype={str(d).removeprefix("torch."): d for d in DTYPES},
)
def test_splits(route: tuple[ConvProblem, bool], dtype: torch.dtype) -> None:
    """Cut the sum into two splits, into one split per step, and into more splits than there are steps."""
    problem, boxed = route
    tile = small_tile(problem, boxed)
    steps = reduction_steps(problem, tile)
    for splits, names in ((2, ()), (steps, ("shift", "residual", "relu")), (steps + 1, ("prologue", "norm"))):
        check(problem, dtype, replace(tile, splits=splits), *names)


@pytest.mark.parametrize(("problem", "boxed"), CASES[:: 1 if DEVICE == "cuda" else 3])
def test_splits_give_exact_sums_and_equal_bits(problem: ConvProblem, boxed: bool) -> None:
    tile = small_tile(problem, boxed)
    x, w = operands(problem, torch.float16, integers=True)
    for splits in (2, 3, 4):
        y = conv_fprop(x, w, problem, tile=replace(tile, splits=splits))
        assert torch.equal(y, conv_fprop(x, w, problem, tile=tile))
    x, w = operands(problem, torch.float16)
    first, again = (conv_fprop(x, w, problem, tile=replace(tile, splits=3)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("boxed", [False, True], ids=["gather", "TMA"])
def test_a_missing_split_fails(boxed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BOXED["3x3"]
    tile = replace(small_tile(problem, boxed), splits=3)
    check(problem, torch.float32, tile)
    kernel = "conv_fprop_tma_kernel" if boxed else "conv_fprop_gather_kernel"
    for name, wrong in (("fprop_reduce_kernel", {"SPLITS": 2}), (kernel, {"steps_per_split": 2})):
        with monkeypatch.context() as patched:
            patched.setattr(fprop, name, Broken(getattr(fprop, name), **wrong))
            with launcher.forgetful(), pytest.raises(AssertionError, match="error"):
                check(problem, torch.float32, tile)


def check_block_end(problem: ConvProblem, dtype: torch.dtype, projection: bool, *tiles: Tile | None) -> None:
    z, w = operands(problem, dtype)
    shortcut = torch.randn(z.shape).to(z)
    (scale, shift), affine = (extras(problem, dtype, "prologue")["prologue"] for _ in range(2))

    def block_end(wide: torch.dtype) -> Tensor:
        across = shortcut.to(wide) if not projection else shortcut.to(wide) * affine[0].to(wide) + affine[1].to(wide)
        return F.relu(z.to(wide) * scale.to(wide) + shift.to(wide) + across)

    for tile in tiles:
        out, what = torch.full_like(z, float("nan")), f"{problem} {tile}"
        join = Join(shortcut, *(affine if projection else (None, None)), out)
        y, partials = conv_fprop(z, w, problem, prologue=(scale, shift), join=join, statistics=True, tile=tile)
        assert_close_to_reference(
            out, block_end(torch.float64), block_end(torch.float32).to(dtype), factor=FUSED, what=what
        )
        hold(problem, y, out, w, tile)
        check_statistics(partials, y)


@dtypes
@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("boxed", [False, True], ids=["gather", "TMA"])
def test_end_of_the_block_before(boxed: bool, projection: bool, dtype: torch.dtype) -> None:
    """Compute the end of the previous block on load (the join), with partly masked tiles.

    If there are several tiles of output channels, each of them stores the same output of that block.
    """
    problem = ConvProblem(2, 5, 7, 40, 24)
    check_block_end(problem, dtype, projection, small_tile(problem, boxed), None)


EPILOGUES = [(), ("shift",), ("shift", "relu"), ("scale", "shift"), ("shift", "residual", "relu"), ("residual",)]
EPILOGUES += [("norm", "relu"), ("norm", "residual", "relu"), ("norm without affine",)]


@covered(
    prologue={"plain": (), "prologue": ("prologue",)},
    epilogue={"+".join(names): names for names in EPILOGUES},
    boxed={"gather": False, "TMA": True},
    splits={"whole": 1, "split": 4},
)
def test_every_prologue_with_every_epilogue(
    prologue: tuple[str, ...], epilogue: tuple[str, ...], boxed: bool, splits: int
) -> None:
    problem = ConvProblem(1, 6, 5, 16, 24, 3, 3, 1, 1)
    for dtype in DTYPES:
        check(problem, dtype, replace(small_tile(problem, boxed), splits=splits), *prologue, *epilogue)


@pytest.mark.parametrize(("problem", "boxed"), CASES)
def test_integers_are_exact(problem: ConvProblem, boxed: bool) -> None:
    x, w = operands(problem, torch.float16, integers=True)
    y = conv_fprop(x, w, problem, tile=small_tile(problem, boxed))
    assert torch.equal(y.double(), reference(problem, x, w).round())  # round: the library may use a transform


@pytest.mark.parametrize(("problem", "boxed"), CASES[::2] if DEVICE == "cpu" else CASES)
def test_statistics(problem: ConvProblem, boxed: bool) -> None:
    x, w = operands(problem, torch.float16)
    options = extras(problem, x.dtype, "prologue", "shift")
    y, partials = conv_fprop(x, w, problem, **options, statistics=True, tile=small_tile(problem, boxed))
    hold(problem, y, x, w, **options)
    check_statistics(partials, y)


@pytest.mark.parametrize("boxed", [False, True], ids=["gather", "TMA"])
def test_statistics_survive_a_mean_far_from_zero(boxed: bool) -> None:
    problem = ConvProblem(4, 8, 8, 16, 16)
    x, w = operands(problem, torch.float32)
    shift = torch.full((16,), 50.0, device=DEVICE)
    y, partials = conv_fprop(
        x, w, ConvProblem.of(x.shape, w.shape), shift=shift, statistics=True, tile=small_tile(problem, boxed)
    )
    check_statistics(partials, y)


@pytest.mark.parametrize("boxed", [False, True], ids=["gather", "TMA"])
def test_padding_is_zero_after_the_prologue(boxed: bool) -> None:
    """x = 0 and shift = 1 make every pixel 1 and the padding 0, so y is 16 channels times the taps inside the image."""
    problem = ConvProblem(1, 6, 6, 16, 16, 3, 3, 1, 1)
    x, w = torch.zeros(1, 6, 6, 16, device=DEVICE), torch.ones(16, 3, 3, 16, device=DEVICE)
    for slope in (1.0, -1.0):
        prologue = (torch.full((16,), slope, device=DEVICE), torch.ones(16, device=DEVICE))
        y = conv_fprop(
            x, w, ConvProblem.of(x.shape, w.shape, pad=1), prologue=prologue, tile=small_tile(problem, boxed)
        )
        assert isinstance(y, Tensor)
        inside = torch.tensor([2.0, 3, 3, 3, 3, 2], device=DEVICE)
        assert torch.equal(y[0, :, :, 0], 16 * inside[:, None] * inside)


@pytest.mark.parametrize("boxed", [False, True], ids=["gather", "TMA"])
def test_nan_comes_through_relu_and_prologue(boxed: bool) -> None:
    problem = ConvProblem(1, 6, 6, 16, 16, 3, 3, 1, 1)
    x, w = operands(problem, torch.float32)
    x[0, 2, 3, 4] = float("nan")
    options = extras(problem, x.dtype, "prologue", "relu")
    y = conv_fprop(x, w, ConvProblem.of(x.shape, w.shape, pad=1), **options, tile=small_tile(problem, boxed))
    assert isinstance(y, Tensor)
    want = reference(problem, x.cpu(), w.cpu(), prologue=tuple(v.cpu() for v in options["prologue"]), relu=True)
    assert torch.equal(y.isnan().cpu(), want.isnan())  # a GPU's library may spread a NaN over a tile
    assert y.isnan().any()
    assert not y.isnan().all()


@pytest.mark.parametrize(("problem", "boxed"), CASES[:: 1 if DEVICE == "cuda" else 3])
def test_equal_inputs_give_equal_bits(problem: ConvProblem, boxed: bool) -> None:
    x, w = operands(problem, torch.float16)
    first, again = (conv_fprop(x, w, problem, statistics=True, tile=small_tile(problem, boxed)) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("problem", GATHERED.values(), ids=GATHERED)
def test_wide_offsets(problem: ConvProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force int64 offsets, which are otherwise used only if an offset can exceed 2**31 - 1."""
    monkeypatch.setattr(ConvProblem, "int32_safe", False)
    for splits in (1, 2):
        check(problem, torch.float32, replace(small_tile(problem, False), splits=splits), "prologue", "residual")


@pytest.mark.parametrize("problem", (*GATHERED.values(), *BOXED.values())[:: 3 if DEVICE == "cpu" else 1], ids=str)
def test_tiles_of_the_heuristic(problem: ConvProblem) -> None:
    """Check the tiles that run by default."""
    check(problem, torch.float16, None, "shift", "relu")


def test_out_and_empty() -> None:
    problem = BOXED["3x3"]
    x, w = operands(problem, torch.float32)
    out = torch.full((2, 7, 6, 24), float("nan"), device=DEVICE)
    split = replace(small_tile(problem, True), splits=2)
    for tile in (None, split):
        assert conv_fprop(x, w, ConvProblem.of(x.shape, w.shape, pad=1), out=out.fill_(float("nan")), tile=tile) is out
        hold(problem, out, x, w)
        assert conv_fprop(x[:0], w, ConvProblem.of(x[:0].shape, w.shape, pad=1), tile=tile).shape == (0, 7, 6, 24)  # type: ignore[union-attr]
    y, partials = conv_fprop(x[:0], w, ConvProblem.of(x[:0].shape, w.shape, pad=1), statistics=True)
    assert y.shape == (0, 7, 6, 24)
    assert partials.shape[0] == 0


def test_single_pixels_of_any_strides() -> None:
    """A contiguous tensor may have any stride along an axis of length 1, but TMA requires multiples of 16 bytes."""
    problem = ConvProblem(3, 1, 1, 32, 16, 3, 3, 1, 1)
    x, w = operands(problem, torch.float32)
    x = x.as_strided(x.shape, (32, 1, 1, 1))
    assert x.is_contiguous()
    y = conv_fprop(
        x,
        w,
        ConvProblem.of(x.shape, w.shape, pad=1),
        residual=torch.zeros(3, 16, 1, 1, device=DEVICE).permute(0, 2, 3, 1),
        tile=small_tile(problem, True),
    )
    hold(problem, y, x, w)


def test_other_output_dtype() -> None:
    problem = BOXED["3x3"]
    x, w = operands(problem, torch.float16)
    residual = torch.randn(2, 7, 6, 24, device=DEVICE)
    for tile in (None, replace(small_tile(problem, True), splits=2)):
        y = conv_fprop(
            x, w, ConvProblem.of(x.shape, w.shape, pad=1), out_dtype=torch.float32, residual=residual, tile=tile
        )
        assert isinstance(y, Tensor)
        assert relative_error(y, reference(problem, x, w, residual=residual)) < ROUNDING + lost_in_sums(9 * 32, x)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("boxed", [False, True], ids=["gather", "TMA"])
def test_fp8(boxed: bool, splits: int) -> None:
    """e4m3 operands, with sums dequantised by `scale`. On a GPU also an e4m3 result, times `out_scale`, at most 448."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    problem = ConvProblem(2, 6, 4, 32, 16, 3, 3, 1, 1)
    x, w = (t.to(torch.float8_e4m3fn) for t in operands(problem, torch.float32))
    residual = torch.randn(2, 6, 4, 16, device=DEVICE).to(torch.float8_e4m3fn)
    options = {"scale": torch.rand(16, device=DEVICE) + 0.5, "relu": True}
    tile = replace(small_tile(problem, boxed), splits=splits)
    wide = reference(problem, x.float(), w.float(), **options, residual=residual.double() * 0.25)
    y = conv_fprop(
        x, w, ConvProblem.of(x.shape, w.shape, pad=1), **options, residual=residual, residual_scale=0.25, tile=tile
    )
    assert isinstance(y, Tensor)
    assert y.dtype == torch.bfloat16
    assert_close_to_reference(y, wide)
    if DEVICE == "cpu":
        return  # the interpreter rounds to e4m3 without a carry: 31.85 becomes 16
    options |= {"residual": residual, "residual_scale": 0.25}
    y = conv_fprop(
        x,
        w,
        ConvProblem.of(x.shape, w.shape, pad=1),
        **options,
        out_dtype=torch.float8_e4m3fn,
        out_scale=200.0,
        tile=tile,
    )
    assert isinstance(y, Tensor)
    assert (y.float() == 448).any()
    assert relative_error(y, (200 * wide).clamp(max=448)) <= torch.finfo(torch.float8_e4m3fn).eps


def random_case(seed: int) -> tuple[ConvProblem, bool, tuple[str, ...]]:
    draw = random.Random(seed)
    while True:
        R, S = draw.choice([(1, 1), (3, 3), (3, 3), (1, 3), (5, 5)])
        groups = draw.choice([1, 1, 1, 2, 3])
        p = (draw.randint(1, 3), draw.randint(1, 12), draw.randint(1, 12))
        channels = [groups * draw.choice([1, 2, 4, 5, 8, 16, 24, 32]) for _ in range(2)]
        window = (draw.choice([1, 1, 2, 2, 3]), draw.randint(0, 3), draw.choice([1, 1, 2]))
        try:
            problem = ConvProblem(*p, *channels, R, S, *window, groups)
        except ValueError:
            continue
        names = ("prologue", "scale", "shift", "residual", "relu")
        x = torch.empty(0, dtype=torch.float32)
        boxed = fprop_tma_refusal(problem, x) is None and draw.random() < 0.8
        return problem, boxed, tuple(name for name in names if draw.random() < 0.5)


@pytest.mark.parametrize("seed", some_seeds(16 if DEVICE == "cpu" else 300))
def test_fuzz(seed: int) -> None:
    problem, boxed, names = random_case(seed)
    torch.manual_seed(seed)
    print(f"reproduce: pytest 'tests/kernels/test_fprop.py::test_fuzz[{seed}]'  # {problem} {names}")
    check(problem, torch.float32, small_tile(problem, boxed), *names)


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that forgets its last reduction step must not pass."""
    right = fprop.reduction_steps
    monkeypatch.setattr(fprop, "reduction_steps", lambda *args: right(*args) - 1)
    for problem, boxed in ((GATHERED["odd everything"], False), (BOXED["3x3"], True)):
        with pytest.raises(AssertionError, match="error"):
            check(problem, torch.float32, small_tile(problem, boxed))


def test_bad_arguments_raise() -> None:
    problem = BOXED["3x3"]
    x, w = operands(problem, torch.float32)
    vector = torch.ones(24, device=DEVICE)
    tma, gather = small_tile(problem, True), small_tile(problem, False)

    def refused(message: str, x: Tensor = x, w: Tensor = w, problem: ConvProblem = problem, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            conv_fprop(x, w, problem, **{"tile": gather, **options})

    refused("x must be bfloat16, float16, float32 or float8", x=x.double())
    refused("x must have shape .2, 7, 6, 32., got .7, 6, 32.", x=x[0])
    refused("w must be torch.float32, got torch.float16", w=w.half())
    refused("w must have shape .24, 3, 3, 32., got .24, 3, 3, 16.", w=w[..., :16])
    refused("w must be on", w=w.to("meta"))
    refused("x must be contiguous", x=torch.cat([x, x], 3)[..., :32])
    refused("shift must have shape .24., got .23.", shift=vector[:23])
    refused("scale must be torch.float32, got torch.float16", scale=vector.half())
    refused("prologue_scale must have shape .32.", prologue=(vector, vector))
    refused("residual must have shape", residual=x)
    refused("residual must be torch.float32", residual=torch.zeros(2, 7, 6, 24, dtype=torch.int32, device=DEVICE))
    refused("out must be torch.float16", out=torch.empty(2, 7, 6, 24, device=DEVICE), out_dtype=torch.float16)
    refused("precision must be", precision="high")
    refused("norm already determines scale and shift", norm=RunningNorm(*[vector] * 4, 1e-5), shift=vector)
    refused(r"norm.var must have shape .24., got .5.", norm=RunningNorm(vector, vector[:5], None, None, 1e-5))
    refused("join needs a prologue and a 1x1", join=Join(x, None, None, x))
    for wrong in (tma, gather):
        refused("splits must be >= 1, got 0", tile=replace(wrong, splits=0))
        refused("splits=2: statistics requires splits=1", tile=replace(wrong, splits=2), statistics=True)
    ones, split, pointwise = torch.ones(32, device=DEVICE), replace(gather, splits=2), ConvProblem(2, 7, 6, 32, 24)
    joined = {"prologue": (ones, ones), "join": Join(x, None, None, x.clone())}
    refused("splits=2: join requires splits=1", w=w[:, :1, :1].contiguous(), problem=pointwise, **joined, tile=split)
    refused("BK=64 must divide C=32", tile=Tile(16, 32, 64, 4, 2, tma.box))
    refused("the box must contain BN pixels", tile=Tile(16, 64, 32, 4, 2, tma.box))
    refused("impossible here: stride 2 requires even H and W, got 7x6", problem=replace(problem, stride=2), tile=tma)
    narrow = {"x": x[..., :8].contiguous(), "w": w[..., :8].contiguous(), "problem": replace(problem, C=8)}
    refused("impossible here: C=8 is not a multiple of 16", **narrow, tile=tma)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("names", [(), ("prologue", "shift", "residual", "relu")], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_every_tile_at_every_layer(name: str, dtype: torch.dtype, names: tuple[str, ...], part: int) -> None:
    """Check every candidate tile at the nets' own sizes, plain and with all fusions, split into parts for xdist."""
    for problem in net_problems(name, 16)[part::12]:
        x, w = operands(problem, dtype)
        given = extras(problem, dtype, *names)
        boxed = [True] if fprop_tma_refusal(problem, x, w) is None else []
        ref64, baseline = reference(problem, x, w, **given), reference(problem, x, w, dtype, **given)
        for tile in (t for tma in (*boxed, False) for t in fprop_tiles(problem, 2, tma, computed=len(names) > 0)):
            y, partials = conv_fprop(x, w, problem, **given, statistics=True, tile=tile)
            assert_close_to_reference(y, ref64, baseline, factor=FUSED, what=f"{problem} {tile} {names}")
            check_statistics(partials, y)


@pytest.mark.gpu
@pytest.mark.parametrize("names", [(), ("norm", "residual", "relu")], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_every_split_tile_at_every_layer(name: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Check every candidate tile with splits, at the layers of a single image."""
    for problem in net_problems(name, 1):
        x, w = operands(problem, dtype)
        given = extras(problem, dtype, *names)
        boxed = [True] if fprop_tma_refusal(problem, x, w) is None else []
        ref64, baseline = reference(problem, x, w, **given), reference(problem, x, w, dtype, **given)
        for tile in (t for tma in (*boxed, False) for t in fprop_tiles(problem, 2, tma, split=True)):
            y = conv_fprop(x, w, problem, **given, tile=tile)
            assert_close_to_reference(y, ref64, baseline, factor=FUSED, what=f"{problem} {tile} {names}")


@pytest.mark.gpu
@pytest.mark.parametrize("projection", [False, True], ids=["identity", "projection"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_tile_at_every_end_of_a_block(dtype: torch.dtype, projection: bool) -> None:
    for problem in filter(dispatch.joins, net_problems("resnet50", 16)):
        tma = fprop_tma_refusal(problem, *operands(problem, dtype)) is None
        tiles = (tile for boxed in {tma, False} for tile in fprop_tiles(problem, 2, boxed, computed=2))
        check_block_end(problem, dtype, projection, *tiles)
