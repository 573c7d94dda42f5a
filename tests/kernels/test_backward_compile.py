"""dgrad and wgrad, with the arguments of a ResNet's training step, compiled without a GPU.

The binaries must have no register spills and the expected matrix and copy instructions. wgmma must not be serialised,
and it must read both operands from shared memory unless the kernel waits for each product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from binary import Launch, check, record
from covering import extra
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import H200, Gpu, Tile, dgrad_tiles, wgrad_tiles
from fastres.kernels.wgrad import conv_wgrad
from fastres.ops import dispatch

pytestmark = pytest.mark.compiles

GPUS = {
    80: Gpu("NVIDIA A100", 108, 166912, (8, 0)),
    90: H200,
    100: Gpu("NVIDIA B200", 148, 232448, (10, 0)),
}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# What a training step fuses with dgrad. "bn": dz is computed on load; otherwise it is stored. "relu": the mask and sums
# of the BatchNorm below, within a block. "residual": for a block's first convolution, the gradient through the
# shortcut, which needs a mask ("out") if no kernel has applied it yet. "end": mask and sums of the end of the previous
# block, and the sums of its projection's BatchNorm ("projection").
STARTS = [f"residual{out}{end}" for out in ("", " out") for end in ("", " end", " end projection")]
DGRAD = [*(bn + rest for bn in ("", "bn ") for rest in ("relu", *STARTS)), ""]
WGRAD = ("bn activation", "bn", "", "activation")


def layers(depth: int) -> list[ConvProblem]:
    """Return the distinct convolutions of a torchvision ResNet for 256 images of 224 x 224, without the stem."""
    expansion, kind = (1, "basic") if depth < 50 else (4, "bottleneck")
    found: dict[ConvProblem, None] = {}
    channels, size = 64, 56
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            if kind == "basic":
                convs = [(channels, width, 3, stride, size), (width, width, 3, 1, size // stride)]
            else:
                convs = [
                    (channels, width, 1, 1, size),
                    (width, width, 3, stride, size),
                    (width, 4 * width, 1, 1, size // stride),
                ]
            if stride == 2 or channels != width * expansion:
                convs.append((channels, width * expansion, 1, stride, size))
            for c, k, r, s, hw in convs:
                found[ConvProblem(256, hw, hw, c, k, r, r, s, r // 2)] = None
            channels, size = width * expansion, size // stride
    return list(found)


STEM = ConvProblem(256, 224, 224, 3, 64, 7, 7, 2, 3)
NARROW = ConvProblem(256, 56, 56, 64, 64, 3, 3, 1, 1)
WIDE = ConvProblem(256, 14, 14, 1024, 256)
STRIDED = ConvProblem(256, 28, 28, 256, 256, 3, 3, 2, 1)
LATE = ConvProblem(256, 14, 14, 256, 256, 3, 3, 1, 1)
GROUPED = ConvProblem(256, 28, 28, 256, 256, 3, 3, 1, 1, groups=32)


def launches(pass_: str, n: ConvProblem, features: str, tile: Tile | None, dtype: torch.dtype) -> list[Launch]:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def vectors(count: int, channels: int) -> list[torch.Tensor]:
        return [empty(channels, dtype=torch.float32) for _ in range(count)]

    x, dy, w = n.x_shape, n.y_shape, n.w_shape
    options: dict[str, Any] = {"tile": tile, "precision": "tf32"}
    if "bn" in features:
        options["bn_backward"] = (empty(*dy), *vectors(3, n.K))
    if "activation" in features:
        options["prologue"] = tuple(vectors(2, n.C))
    if "relu" in features:
        options |= {"relu_mask": tuple(vectors(2, n.C)), "below": (empty(*x), *vectors(1, n.C))}
    if "end" in features:
        options |= {"relu_mask": empty(*x), "below": (empty(*x), *vectors(1, n.C))}
    if "projection" in features:
        options["projection"] = (empty(*x), *vectors(1, n.C))
    if "residual" in features:
        options["residual"] = empty(*x)
    if "out" in features:
        options["residual_mask"] = empty(*x)
    with record() as recorded:
        if pass_ == "dgrad":
            conv_dgrad(empty(*dy), empty(*w), n, **options)
        else:
            conv_wgrad(empty(*dy), empty(*x), n, **options)
    return recorded


MET = {"residual": 1, "out": 1, "relu": 1, "end": 2, "projection": 1}  # tensors that dgrad's epilogue reads


def best(pass_: str, n: ConvProblem, features: str, tma: bool, sm: int, itemsize: int = 2) -> Tile:
    operands = 1 + ("bn" in features)
    if pass_ == "dgrad":
        met = sum((name in features) * count for name, count in MET.items())
        return dgrad_tiles(n, itemsize, tma, GPUS[sm], False, operands, met)[0]
    return wgrad_tiles(n, itemsize, tma, GPUS[sm], False, operands, "activation" in features)[0]


def distinct(recorded: Iterable[Launch]) -> Iterator[Launch]:
    """Yield one launch per specialisation: Triton specialises by an integer's divisibility and a tensor's dtype."""

    def kind(launch: Launch, name: str) -> Any:
        value = launch.kwargs[name]
        if isinstance(value, TensorDescriptor):
            return value.base.dtype, tuple(value.block_shape)
        if isinstance(value, torch.Tensor):
            return value.dtype
        constexpr = name.startswith("num_") or launch.fn.params[launch.fn.arg_names.index(name)].is_constexpr
        return value if constexpr or value is None else (value % 16 == 0, value == 1)

    seen = set()
    for launch in recorded:
        key = (launch.fn.__name__, *(kind(launch, name) for name in sorted(launch.kwargs)))
        if key not in seen:
            seen.add(key)
            yield launch


def verify(launch: Launch, sm: int) -> None:
    """Compile a launch for `sm` and check its instructions, registers and shared memory."""
    binary = launch.compile(sm)
    given = launch.kwargs
    if "partials" in given and "splits" in given:
        check(binary, matrix="")
        return
    boxes = given["TN"] > 0
    idle = given.get("TAPS_R") == 0 or given.get("TAPS_S") == 0  # no filter tap reaches these pixels: no product
    present = ["UTMASTG"] if boxes and "dx" in given else []
    absent = []
    if given["UNIFORM"] and not idle:
        present.append("UTMALDG" if boxes else "LDGSTS")
        # Only asynchronous copies are allowed, with two exceptions: filters over 3 image channels are loaded word by
        # word, and mma's transposed first operand (wgrad on sm_80) can't be copied asynchronously.
        if given["C_GROUP"] % 8 == 0 and (sm >= 90 or "dx" in given):
            absent.append("LDG")
    narrow = min(given["BM"], 64 if "dx" in given else given["BN"]) < 64
    matrix = "" if idle else "HMMA" if narrow else MATRIX[sm]
    check(binary, matrix=matrix, present=present, loop_absent=absent, shared=GPUS[sm].shared)
    if matrix == "HGMMA" and not given.get("WAIT"):
        assert all(name.endswith("SS") for name in binary.matrix), binary.matrix


BOXES = [
    ("dgrad", NARROW, "bn relu", 90),
    ("dgrad", WIDE, "bn residual out", 90),
    ("dgrad", WIDE, "bn residual end", 90),
    ("dgrad", NARROW, "residual end projection", 90),
    extra("dgrad", WIDE, "", 90),
    ("dgrad", STRIDED, "bn relu", 90),
    ("dgrad", WIDE, "bn relu", 100),
    ("wgrad", NARROW, "bn activation", 90),
    extra("wgrad", NARROW, "activation", 90),
    extra("wgrad", WIDE, "bn", 90),
    extra("wgrad", WIDE, "activation", 90),
    ("wgrad", WIDE, "bn activation", 90),
    ("wgrad", STRIDED, "bn", 90),
    ("wgrad", STRIDED, "bn", 100),
]


@pytest.mark.parametrize(("pass_", "problem", "features", "sm"), BOXES)
def test_boxes(pass_: str, problem: ConvProblem, features: str, sm: int) -> None:
    tile = best(pass_, problem, features, True, sm)
    for launch in distinct(launches(pass_, problem, features, tile, torch.bfloat16)):
        verify(launch, sm)


@pytest.mark.parametrize("problem", [LATE, extra(STRIDED)])
@pytest.mark.parametrize("sm", [90, extra(100)])
def test_large_tiles_of_plain_operands(problem: ConvProblem, sm: int) -> None:
    """Check a wgrad tile of three taps of 128 x 128 and one with four stages; on an H200 the first fills one wave."""
    tiles = wgrad_tiles(problem, 2, True, GPUS[sm])[: 6 if sm == 90 else None]
    three = [tile for tile in tiles if (tile.BM, tile.BN, tile.taps) == (128, 128, 3)]
    deep = [tile for tile in tiles if tile.stages == 4]
    if sm == 90:
        assert 2 * 2 * 3 * three[0].splits == GPUS[sm].sms
    for tile in (three[0], deep[0]):
        for launch in distinct(launches("wgrad", problem, "", tile, torch.bfloat16)):
            verify(launch, sm)


@pytest.mark.parametrize(
    ("pass_", "problem", "features", "sm"),
    [
        ("dgrad", NARROW, "bn relu", 80),
        ("dgrad", WIDE, "", 90),
        ("dgrad", GROUPED, "bn relu", 90),
        ("wgrad", NARROW, "bn activation", 80),
        ("wgrad", STRIDED, "", 90),
        ("wgrad", GROUPED, "bn activation", 90),
        ("wgrad", STEM, "bn", 90),
    ],
)
def test_pointers(pass_: str, problem: ConvProblem, features: str, sm: int) -> None:
    tile = best(pass_, problem, features, False, sm)
    for launch in distinct(launches(pass_, problem, features, tile, torch.bfloat16)):
        verify(launch, sm)


@pytest.mark.parametrize("pass_", ["dgrad", "wgrad"])
def test_float32_as_tf32(pass_: str) -> None:
    tile = best(pass_, WIDE, "bn", True, 90, itemsize=4)
    for launch in distinct(launches(pass_, WIDE, "bn", tile, torch.float32)):
        verify(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("pass_", ["dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_layer_of_resnet_18_to_152(pass_: str, sm: int, dtype: torch.dtype) -> None:
    recorded = []
    for problem in dict.fromkeys([*layers(18), *layers(50), STEM]):
        tma = sm >= 90 and problem is not STEM
        for features in DGRAD if pass_ == "dgrad" else WGRAD:
            if "bn" in features and not dispatch.bn_backward_on_load(problem):
                continue
            if ("end" in features or "out" in features) and problem.stride > 1:
                continue
            tile = best(pass_, problem, features, tma, sm)
            recorded += launches(pass_, problem, features, tile, dtype)
    wrong = []
    for launch in distinct(recorded):
        try:
            verify(launch, sm)
        except AssertionError as error:
            # For sm_100, Triton divides a program's registers among warp roles. In one wgrad, a role spills two.
            if pass_ == "wgrad" and str(error).endswith("for sm_100: 8 B spilled, 8 B of stack"):
                continue
            wrong.append(f"{error} with {launch.kwargs}")
    assert not wrong, "\n".join(wrong)
