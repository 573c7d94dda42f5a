"""conv_fprop and the stem's kernels, with the arguments that the nets pass, compiled without a GPU.

The binaries must have no register spills and the expected matrix and copy instructions. wgmma must not be serialised,
and it must read both operands from shared memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from binary import Launch, check, record
from conv_cases import net_problems
from covering import extra

from fastres.kernels.fprop import Join, RunningNorm, conv_fprop, fprop_tma_refusal
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import conv_stem, conv_stem_wgrad, pack_filters, pack_images, stem_columns
from fastres.kernels.tiles import H200, Gpu, Tile, fprop_tiles, stem_tiles, stem_wgrad_tiles
from fastres.ops import dispatch

pytestmark = pytest.mark.compiles

GPUS = {
    80: Gpu("NVIDIA A100", 108, 166912, (8, 0)),
    89: Gpu("NVIDIA L4", 58, 101376, (8, 9)),
    90: H200,
    100: Gpu("NVIDIA B200", 148, 232448, (10, 0)),
}
MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# The fusions that nets use: a folded or an eval-mode BatchNorm at inference, statistics in training, or none.
USES = (
    "shift relu",
    "scale shift residual relu",
    "norm relu",
    "norm residual relu",
    "statistics",
    "prologue statistics",
    "prologue join statistics",
    "prologue join projection statistics",
    "prologue",
    "",
)


def launches(n: ConvProblem, use: str, tile: Tile | None, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Return the launches of one conv_fprop. tile: None for the one that is chosen on an H200."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w = empty(n.N, n.H, n.W, n.C, dtype=dtype), empty(n.K, n.R, n.S, n.C // n.groups, dtype=dtype)
    options: dict[str, Any] = {"relu": "relu" in use, "statistics": "statistics" in use, "precision": "tf32"}
    if "prologue" in use:
        options["prologue"] = (empty(n.C), empty(n.C))
    if "join" in use:
        affine = (empty(n.C), empty(n.C)) if "projection" in use else (None, None)
        options["join"] = Join(torch.empty_like(x), *affine, torch.empty_like(x))
    for name in ("scale", "shift"):
        if name in use:
            options[name] = empty(n.K)
    if "norm" in use:
        options["norm"] = RunningNorm(*(empty(n.K) for _ in range(4)), 1e-5)
    if "residual" in use:
        wide = torch.bfloat16 if dtype.itemsize == 1 else dtype
        options["residual"] = empty(n.N, n.P, n.Q, n.K, dtype=wide)
    with record() as recorded:
        conv_fprop(x, w, n, **options, tile=tile)
    return recorded


def stem_launches(
    n: ConvProblem, use: str, dtype: torch.dtype = torch.bfloat16, tile: Tile | None = None
) -> list[Launch]:
    """Return the launches of the stem's forward pass or, for use "wgrad", of its filter gradient.

    tile: None for the one that is chosen on an H200.
    """
    filters = pack_filters(torch.empty(n.K, n.R, n.S, n.C, dtype=dtype, device="meta"))
    vector = torch.empty(n.K, device="meta") if "shift" in use else None
    with record() as recorded:
        packed = pack_images(torch.empty(n.N, n.C, n.H, n.W, device="meta"), n, dtype)
        if use == "wgrad":
            dz = torch.empty(n.N, n.P, n.Q, n.K, dtype=dtype, device="meta")
            conv_stem_wgrad(dz, packed, n, precision="tf32", tile=tile)
            return recorded
        conv_stem(
            packed, filters, n, scale=vector, shift=vector, relu="relu" in use, statistics="statistics" in use,
            precision="tf32", tile=tile,
        )  # fmt: skip
    return recorded


def best(n: ConvProblem, use: str, sm: int, tma: bool, itemsize: int = 2) -> Tile:
    return fprop_tiles(n, itemsize, tma, GPUS[sm], computed=("prologue" in use) + ("join" in use))[0]


def verify(launch: Launch, sm: int) -> None:
    """Compile a launch for `sm` and check its instructions, registers and shared memory."""
    binary = launch.compile(sm)
    given = launch.kwargs
    if launch.fn.__name__ in ("pack_images_kernel", "wgrad_reduce_kernel"):
        check(binary, registers=64, matrix="", absent=("STS", "LDS") if "packed" in given else ())
        return
    if launch.fn.__name__ == "fprop_reduce_kernel":
        check(binary, registers=128, matrix="", present=("LDG.128",) if given["K"] % 16 == 0 else (), absent=("BAR",))
        return
    matrix: str | None = MATRIX[sm]
    if given["BM"] < 64 and sm >= 90:  # too few rows for wgmma
        matrix = "HMMA" if sm == 90 else None
    shared = GPUS[sm].shared
    if "TN" in given:
        check(binary, matrix=matrix, present=("UTMALDG", "UTMASTG"), loop_absent=("LDG", "STG"), shared=shared)
    else:
        copies = not given["ROW"] % 2  # an asynchronous copy has at least 4 bytes
        loop = (("LDG",) if copies else ()) + (("STG",) if given["joined"] is None else ())
        check(binary, matrix=matrix, present=("LDGSTS",) if copies else (), loop_absent=loop, shared=shared)
    if matrix == "HGMMA":
        assert all(name.endswith("SS") for name in binary.matrix), binary.matrix


def distinct(recorded: Iterable[Launch], sm: int) -> Iterator[Launch]:
    """Yield one launch per binary."""
    found = {repr(launch.specialization(sm)): launch for launch in recorded}
    yield from found.values()


NARROW = ConvProblem(256, 56, 56, 64, 64, 3, 3, 1, 1)
SQUARE = ConvProblem(256, 14, 14, 256, 256, 3, 3, 1, 1)
STRIDED = ConvProblem(256, 56, 56, 128, 128, 3, 3, 2, 1)
EXPAND = ConvProblem(256, 56, 56, 64, 256)
REDUCE = ConvProblem(256, 28, 28, 512, 128)
GROUPED = ConvProblem(256, 56, 56, 128, 128, 3, 3, 1, 1, groups=32)
SINGLE = ConvProblem(1, 7, 7, 512, 512, 3, 3, 1, 1)
LAST = ConvProblem(1, 7, 7, 2048, 512)
DOWN = ConvProblem(1, 14, 14, 512, 512, 3, 3, 2, 1)
GROUPED_SINGLE = ConvProblem(1, 7, 7, 1024, 1024, 3, 3, 1, 1, groups=32)
CIFAR = ConvProblem(128, 32, 32, 16, 16, 3, 3, 1, 1)
STEM = ConvProblem(256, 224, 224, 3, 64, 7, 7, 2, 3)


@pytest.mark.parametrize(
    ("problem", "use", "sm"),
    [
        (EXPAND, "shift residual relu", 90),
        extra(EXPAND, "prologue statistics", 90),
        extra(REDUCE, "shift relu", 90),
        (REDUCE, "statistics", 90),
        (REDUCE, "prologue join statistics", 90),
        (REDUCE, "prologue join projection statistics", 90),
        extra(NARROW, "shift relu", 90),
        (NARROW, "prologue statistics", 90),
        extra(SQUARE, "scale shift relu", 90),
        (SQUARE, "norm residual relu", 90),
        extra(SQUARE, "prologue statistics", 90),
        (STRIDED, "prologue statistics", 90),
        (SINGLE, "shift relu", 90),
        (CIFAR, "prologue statistics", 90),
        (SQUARE, "prologue statistics", 100),
        (EXPAND, "shift residual relu", 100),
    ],
)
def test_boxes(problem: ConvProblem, use: str, sm: int) -> None:
    for launch in launches(problem, use, best(problem, use, sm, tma=True)):
        verify(launch, sm)


@pytest.mark.parametrize(
    ("problem", "use", "sm"),
    [
        (SQUARE, "shift residual relu", 80),
        (SQUARE, "prologue statistics", 80),
        (REDUCE, "prologue join statistics", 80),
        (EXPAND, "shift residual relu", 89),
        (STEM, "scale shift relu", 80),
        (SQUARE, "prologue statistics", 90),
        (GROUPED, "prologue statistics", 90),
        (STRIDED, "shift relu", 100),
    ],
)
def test_pointers(problem: ConvProblem, use: str, sm: int) -> None:
    for launch in launches(problem, use, best(problem, use, sm, tma=False)):
        verify(launch, sm)


@pytest.mark.parametrize(
    ("problem", "use", "sm", "tma"),
    [
        (SINGLE, "norm residual relu", 90, True),
        (SINGLE, "shift residual relu", 90, False),
        (LAST, "shift relu", 90, True),
        (LAST, "prologue", 90, True),
        extra(LAST, "", 90, False),
        (DOWN, "scale shift relu", 90, True),
        (GROUPED_SINGLE, "shift relu", 90, False),
        (SINGLE, "shift relu", 100, True),
        (SINGLE, "shift residual relu", 80, False),
        extra(LAST, "shift residual relu", 100, False),
    ],
)
def test_splits(problem: ConvProblem, use: str, sm: int, tma: bool) -> None:
    """Splits take two launches: one for the partial sums, with no empty split, and one that adds them up."""
    for dtype in (torch.bfloat16, torch.float16) if use == "" else (torch.bfloat16,):
        tile = replace(best(problem, use, sm, tma), splits=7)
        convolve, reduce = launches(problem, use, tile, dtype)
        steps, each = convolve.kwargs["steps"], convolve.kwargs["steps_per_split"]
        splits = convolve.grid[-1]
        assert (splits - 1) * each < steps <= splits * each
        assert reduce.kwargs["SPLITS"] == splits > 1
        for launch in (convolve, reduce):
            verify(launch, sm)


def test_the_loads_of_8_splits_are_in_flight_together() -> None:
    _, reduce = launches(SINGLE, "shift residual relu", replace(best(SINGLE, "", 90, tma=True), splits=8))
    binary = reduce.compile(90)
    assert binary.count("LDG.128") == 8
    at = {kind: [i for i, one in enumerate(binary.code) if one.base == kind] for kind in ("LDG", "FADD")}
    assert max(at["LDG"]) < min(at["FADD"])


@pytest.mark.parametrize("use", ["scale shift relu", "statistics"])
def test_stem(use: str) -> None:
    for launch in stem_launches(STEM, use):
        verify(launch, 90)


@pytest.mark.parametrize(
    ("use", "sm", "most"),
    [
        ("statistics", 80, 1),
        ("scale shift relu", 90, 1),
        ("wgrad", 80, 1),
        *(extra(use, sm, 99) for use in ("scale shift relu", "statistics", "wgrad") for sm in (80, 90, 100)),
    ],
)
def test_stem_by_pointers(use: str, sm: int, most: int) -> None:
    """Windows and dz are copied asynchronously into shared memory, 16 bytes at a time. most: of how many tiles."""
    for tile in stem_tiles_of(STEM, use, sm, itemsize=2)[:most]:
        (launch,) = (one for one in stem_launches(STEM, use, tile=tile) if one.fn.__name__.startswith("stem_"))
        binary = launch.compile(sm)
        absent = () if "shift" in use else ("LDG",)
        check(binary, matrix=MATRIX[sm], present=("LDGSTS.128",), absent=absent, shared=GPUS[sm].shared)
        assert binary.count("LDGSTS") == binary.count("LDGSTS.128"), binary.opcodes()
        assert sm != 90 or all(name.endswith("SS") for name in binary.matrix), binary.matrix


def stem_tiles_of(n: ConvProblem, use: str, sm: int, itemsize: int) -> list[Tile]:
    """Return the candidate tiles without TMA, one per binary (tiles that differ only in splits share a binary)."""
    gpu = GPUS[sm]
    if use == "wgrad":
        tiles = stem_wgrad_tiles(n, itemsize, gpu)
    else:
        tiles = [tile for tile in stem_tiles(stem_columns(n), itemsize, False, gpu) if max(64, n.K) >= tile.BM]
    return list({replace(tile, splits=1): tile for tile in tiles}.values())


def test_the_stems_wgrad_reads_its_gradient_once() -> None:
    """For each step of 32 pixels a thread issues 2 copies of dz (4 KB in all), 7 of windows (14 KB) and 14 wgmma."""
    launch = stem_launches(STEM, "wgrad")[1]
    assert (launch.fn.__name__, launch.grid) == ("stem_wgrad_kernel", (1, 264))
    binary = launch.compile(90)
    assert (binary.count("LDGSTS.128", loop=True), binary.count("HGMMA", loop=True)) == (2 + 7, 14)
    assert 2 * binary.shared <= H200.shared
    check(binary, registers=168)


@pytest.mark.extra
@pytest.mark.parametrize("K", [16, 32, 96])
@pytest.mark.parametrize("use", ["statistics", "wgrad"])
def test_other_stems(use: str, K: int) -> None:
    """Filter counts other than 64, 3x3 filters, images of one channel, odd sizes, float32."""
    problem = ConvProblem(3, 97, 85, 3 if K > 16 else 1, K, 3, 3, 2, 1)
    for sm in (80, 90):
        for dtype in (torch.float16, torch.float32):
            for tile in stem_tiles_of(problem, use, sm, dtype.itemsize)[:2]:
                for launch in stem_launches(problem, use, dtype, tile)[1:]:
                    check(launch.compile(sm), shared=GPUS[sm].shared)


def test_tf32_and_fp8() -> None:
    (launch,) = launches(
        SQUARE, "prologue statistics", best(SQUARE, "prologue", 90, tma=True, itemsize=4), torch.float32
    )
    verify(launch, 90)
    (launch,) = launches(SQUARE, "shift residual relu", best(SQUARE, "", 90, tma=True, itemsize=1), torch.float8_e4m3fn)
    binary = launch.compile(90)
    check(binary, present=("QGMMA", "UTMALDG", "UTMASTG"), absent=("HGMMA", "HMMA"), shared=H200.shared)
    tile = replace(best(SINGLE, "", 90, tma=True, itemsize=1), splits=8)
    convolve, reduce = launches(SINGLE, "scale shift residual relu", tile, torch.float8_e4m3fn)
    check(convolve.compile(90), present=("QGMMA", "UTMALDG", "UTMASTG"), absent=("HGMMA", "HMMA"))
    verify(reduce, 90)


def test_statistics_of_fp16_sums() -> None:
    """Rounding sums to fp16 and upcasting them again for the statistics must not make ptxas serialise wgmma."""
    (launch,) = launches(SINGLE, "statistics", best(SINGLE, "statistics", 90, tma=False), torch.float16)
    verify(launch, 90)


def test_offsets_widen_past_2_31() -> None:
    small = ConvProblem(1, 64, 64, 512, 512)
    for problem, wide in ((small, False), (ConvProblem(1024, 64, 64, 512, 512), True)):
        (launch,) = launches(problem, "", best(problem, "", 90, tma=False))
        assert launch.kwargs["INT64"] is wide
    verify(launch, 90)
    convolve, _ = launches(problem, "", replace(best(problem, "", 90, tma=False), splits=2))
    verify(convolve, 90)


def test_cpu_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
        conv_fprop(torch.zeros(1, 4, 4, 16), torch.zeros(16, 1, 1, 16), ConvProblem.of((1, 4, 4, 16), (16, 1, 1, 16)))


NETS = ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"]  # 34, 101 and 152 have no other layers


@pytest.mark.slow
@pytest.mark.parametrize("sm", GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_everything_the_nets_launch(sm: int, dtype: torch.dtype) -> None:
    recorded = []
    for problem in {p for name in NETS for batch in (256, 32, 1) for p in net_problems(name, batch)}:
        tma = sm >= 90 and fprop_tma_refusal(problem, torch.empty(0, dtype=dtype, device="meta")) is None
        for use in USES:
            # The first convolution has no prologue, and only a 1x1 can compute the end of the previous block.
            if ("prologue" not in use or problem.C > 3) and ("join" not in use or dispatch.joins(problem)):
                recorded += launches(problem, use, best(problem, use, sm, tma), dtype)
            if problem.N == 1 and "statistics" not in use and "prologue" not in use:
                tiles = fprop_tiles(problem, 2, tma, GPUS[sm], split=True)
                for tile in [tile for tile in tiles if tile.splits > 1][:2]:
                    recorded += launches(problem, use, tile, dtype)
            if problem.C == 3 and sm >= 90 and "prologue" not in use and "residual" not in use:
                recorded += stem_launches(problem, use, dtype)
    for launch in distinct(recorded, sm):
        verify(launch, sm)
