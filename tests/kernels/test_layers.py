"""Every convolution of the nets against float64, with the arguments that the nets pass.

The tiles are those that the heuristic and the tables choose, and those that tuning tries.

On a GPU the tests run at the nets' own sizes; `-k "resnet50 and bfloat16"` selects the launches of ResNet-50. In the
interpreter the same checks run on small images, in float32 and float16. With neither, kernels are compiled and launched
on a stub driver, which runs nothing; the complete list of these is `slow`.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cases as shared
import pytest
import stub_cuda
import test_chain
import torch
import triton
from binary import record
from cases import Broken, assert_close_to_reference, check_statistics, check_sums
from conv_cases import net_problems, traits
from covering import chosen
from net_calls import Call, by_pytorch, calls, drawn, launched, untouched
from tolerances import FUSED, lost_in_sums
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres.kernels import checks, dgrad, fprop, stem, tables, wgrad
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import H200

BENCH = Path(__file__).resolve().parents[2] / "bench"
PASSES = ("infer", "fprop", "dgrad", "wgrad")
NETS = {"resnet50": (50,), "resnet34": (18, 34)}  # deeper nets have the launches of ResNet-50
TILES = 6  # the most of tuning's candidate tiles that a test launches

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
interpreted = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="for the interpreter")


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path))
    tables.forget_tables()
    yield
    tables.forget_tables()


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("tune")


def cases(net: str, batch: int, size: int, *passes: str) -> Iterator[Any]:
    """Yield (net, batch, pass, problem) of every distinct convolution, but no dgrad of the stem: nets don't need it."""
    for pass_ in passes:
        for p in net_problems(net, batch, size):
            if pass_ != "dgrad" or p.C > 3:
                named = f"{net}-{batch}-{pass_}-{p.R}x{p.S} stride {p.stride} {p.C} to {p.K} at {p.H}"
                yield pytest.param(net, batch, pass_, p, id=named)


CASES = {net: [*cases(net, 256, 224, *PASSES), *cases(net, 1, 224, "infer")] for net in NETS}


def of_problem(tune: ModuleType, net: str, batch: int, size: int, pass_: str, problem: ConvProblem) -> list[Call]:
    found = [c for c in calls(tune, NETS[net], batch, size) if (c.pass_, c.problem) == (pass_, problem)]
    assert found, f"{net} has no {pass_} of {problem}"
    return found


def check(tune: ModuleType, call: Call, dtype: torch.dtype, device: torch.device, most: int) -> None:
    """Check the results of a call, and its sums or statistics.

    A result may have a few times PyTorch's own error in the same dtype. Sums and statistics are compared with those of
    the kernel's own stored result.
    """
    given = drawn(call, dtype, device)
    exact, usual = by_pytorch(call, given, torch.float64), by_pytorch(call, given, dtype)
    lost = lost_in_sums(call.problem.gemm(call.pass_).k, exact[0].new_empty(0, dtype=dtype))  # type: ignore[arg-type]
    for how, tensors, partials in launched(tune, call, given, most):
        what = f"{call.pass_} {call.problem} {how}"
        for got, ref, baseline in zip(tensors, exact, usual, strict=True):
            assert_close_to_reference(got, ref, baseline, factor=FUSED, what=what, lost=lost)
        if call.launcher == "conv_dgrad":
            below = [each for each in (given["below"], given["projection"]) if each is not None]
            for sums, (z, mean) in zip(partials, below, strict=True):
                check_sums(sums, tensors[-1], z, mean)
        else:
            assert len(partials) == bool(given.get("statistics"))
            for statistics in partials:
                check_statistics(statistics, tensors[-1])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("net", "batch", "pass_", "problem"),
    [case for of_net in CASES.values() for case in of_net],
)
@dtypes
def test_every_launch(
    dtype: torch.dtype, net: str, batch: int, pass_: str, problem: ConvProblem, tune: ModuleType
) -> None:
    for call in of_problem(tune, net, batch, 224, pass_, problem):
        check(tune, call, dtype, torch.device("cuda"), TILES)


chains = pytest.mark.parametrize(("size", "channels"), [(56, 64), (28, 128)], ids=["64 at 56", "128 at 28"])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@chains
@pytest.mark.parametrize("batch", [256, 1], ids=["resnet50-256", "resnet50-1"])
@dtypes
def test_every_chain(dtype: torch.dtype, batch: int, size: int, channels: int) -> None:
    test_chain.hold(test_chain.operands(batch, size, size, channels, dtype))


def shown(p: ConvProblem) -> tuple[Any, ...]:
    """Return the traits of a convolution that select its fusions and code paths.

    They include whether it reduces or expands channels: a block's reduction may compute the end of the previous block,
    and an expansion may end with an addition.
    """
    return *traits(p), (p.C > p.K) - (p.C < p.K)


def small_cases() -> Iterator[Any]:
    """Yield the cases at 2 images of 16 x 16.

    The last two stages are left out, because more channels only take more time. `make test` runs a covering selection,
    and float32 is limited to that choice.
    """
    found = [case for net in NETS for case in cases(net, 2, 16, *PASSES)]
    found = [case for case in found if case.values[3].K < 256 or case.values[3].C < 128]
    picked = chosen([{(pass_, trait) for trait in enumerate(shown(p))} for _, _, pass_, p in (c.values for c in found)])
    for i, case in enumerate(found):
        for dtype in (torch.float16, torch.float32) if i in picked else (torch.float16,):
            extra = i not in picked or dtype != (torch.float16, torch.float32)[i % 2]
            named = f"{str(dtype).removeprefix('torch.')}-{case.id}"
            yield pytest.param(dtype, *case.values, id=named, marks=pytest.mark.extra if extra else ())


@pytest.mark.interpret
@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "net", "batch", "pass_", "problem"), [*small_cases()])
def test_every_small_launch(
    dtype: torch.dtype, net: str, batch: int, pass_: str, problem: ConvProblem, tune: ModuleType
) -> None:
    for call in of_problem(tune, net, batch, 16, pass_, problem):
        check(tune, call, dtype, torch.device("cpu"), 3)


@pytest.mark.interpret
@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "problem",
    [
        ConvProblem(2, 4, 4, 64, 64, 3, 3, 1, 1),
        ConvProblem(2, 4, 4, 128, 128, 3, 3, 2, 1),
        ConvProblem(2, 4, 4, 256, 64),
        ConvProblem(2, 4, 4, 256, 512, 1, 1, 2),
    ],
    ids=str,
)
def test_every_small_launch_by_splits(problem: ConvProblem, tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the interpreter has the multiprocessors of an H200, not one, so that splits are chosen."""
    monkeypatch.setattr(checks, "INTERPRETER", H200._replace(name="interpreter"))
    added = Counted(fprop.fprop_reduce_kernel)
    monkeypatch.setattr(fprop, "fprop_reduce_kernel", added)
    for call in of_problem(tune, "resnet50", 2, 16, "infer", problem):
        before = added.launches
        check(tune, call, torch.float16, torch.device("cpu"), 1)
        assert added.launches > before


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def first(tune: ModuleType, pass_: str, problem: ConvProblem, *names: str) -> Call:
    """Return the first call of ResNet-50 at images of 16 x 16 that passes all arguments `names`."""
    found = of_problem(tune, "resnet50", problem.N, 16, pass_, problem)
    return next(call for call in found if all(call.given[name] is not None for name in names))


SQUARE, REDUCE = ConvProblem(2, 4, 4, 64, 64, 3, 3, 1, 1), ConvProblem(2, 4, 4, 256, 64)
FOLDED, JOINED = ("infer", SQUARE, "shift"), ("fprop", REDUCE, "join")
INTO_TWO, WEIGHTS = ("dgrad", REDUCE, "projection"), ("wgrad", SQUARE)


@pytest.mark.interpret
@interpreted
@pytest.mark.parametrize(
    ("wanted", "module", "wrong"),
    [
        (FOLDED, fprop, {"RELU": False}),
        (FOLDED, fprop, {"PAD_H": 0}),
        (JOINED, fprop, {"steps": 3}),
        (JOINED, fprop, {"shortcut_scale": None, "shortcut_shift": None}),
        (INTO_TWO, dgrad, {"residual": None}),
        (("dgrad", SQUARE), dgrad, {"offset_h": 0}),
        (WEIGHTS, wgrad, {"PAD": 0}),
    ],
    ids=str,
)
def test_a_wrong_kernel_fails(
    wanted: tuple[Any, ...],
    module: ModuleType,
    wrong: dict[str, Any],
    tune: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = first(tune, *wanted)
    check(tune, call, torch.float16, torch.device("cpu"), 1)
    name = {fprop: "conv_fprop_tma_kernel", dgrad: "dgrad_kernel", wgrad: "wgrad_kernel"}[module]
    monkeypatch.setattr(module, name, Broken(getattr(module, name), **wrong))
    with pytest.raises(AssertionError, match="error"):
        check(tune, call, torch.float16, torch.device("cpu"), 1)


@pytest.mark.interpret
@interpreted
@pytest.mark.parametrize(
    ("wanted", "module", "outputs"), [(FOLDED, fprop, 1), (JOINED, fprop, 3), (INTO_TWO, dgrad, 3), (WEIGHTS, wgrad, 1)]
)
def test_every_output_is_checked(
    wanted: Any, module: ModuleType, outputs: int, tune: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the last value of any output makes the check fail."""
    call = first(tune, *wanted)
    right = getattr(module, call.launcher)
    for at in range(outputs):

        def wrong(at: int = at, **given: Any) -> Any:
            result = right(**given)
            tensors = tree_leaves((result, given["join"].out if at == 2 and "join" in given else ()))
            tensors[at].view(-1)[-1] += tensors[at].abs().max()
            return result

        monkeypatch.setattr(module, call.launcher, wrong)
        with pytest.raises(AssertionError):
            check(tune, call, torch.float16, torch.device("cpu"), 1)


@pytest.mark.interpret
@interpreted
@pytest.mark.parametrize("wanted", [FOLDED, JOINED, INTO_TWO, WEIGHTS], ids=str)
def test_references_in_pieces_equal_the_whole(wanted: Any, tune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """References of large tensors are computed image by image, and sums channel by channel, with the same results."""
    call = first(tune, *wanted)
    given = drawn(call, torch.float16, torch.device("cpu"))
    whole = by_pytorch(call, given, torch.float64)
    monkeypatch.setattr(shared, "PIECE", 32)
    for a, b in zip(by_pytorch(call, given, torch.float64), whole, strict=True):
        torch.testing.assert_close(a, b)
    check(tune, call, torch.float16, torch.device("cpu"), 1)


@pytest.mark.parametrize("pass_", PASSES)
def test_launches_include_wgmma_and_large_boxes(pass_: str, tune: ModuleType) -> None:
    """The launches of ResNet-50 cover the cases that matter on Hopper.

    Most have tiles for TMA that wgmma supports: at least 64 rows, and warps in groups of 4. Some boxes are wider than
    the 128 bytes of a TMA message. In fprop and dgrad, some boxes have 128 or more pixels. The tables' tiles are
    launched, too.
    """
    counts: Counter[str] = Counter()
    table = tables.read_table(tables.table_file(H200.name, tables.SHIPPED))
    for call in (call for call in calls(tune, (50,), 256) if call.pass_ == pass_):
        with record() as launches:
            for how, *_ in launched(tune, call, call.given, TILES):
                convolutions = [one.kwargs for one in launches if "PRECISION" in one.kwargs]
                launches.clear()
                for kwargs in convolutions:
                    rows = min(kwargs["BM"], kwargs["BN"]) if pass_ == "wgrad" else kwargs["BM"]
                    boxes = [value for value in kwargs.values() if isinstance(value, TensorDescriptor)]
                    pixels = [math.prod(box.block_shape[:-1]) for box in boxes if len(box.shape) > 2]
                    counts["all"] += 1
                    counts["wgmma by boxes"] += bool(boxes) and rows >= 64 and kwargs["num_warps"] % 4 == 0
                    counts["128 pixels"] += max(pixels, default=0) >= 128
                    counts["two messages"] += any(box.block_shape[-1] * box.base.itemsize > 128 for box in boxes)
                found = table.get((pass_, call.problem, torch.bfloat16))
                if how.startswith("as chosen by") and found is not None and found.tile is not None:
                    sizes = tuple(convolutions[0][name] for name in ("BM", "num_warps", "num_stages"))
                    counts["of a table"] += sizes == (found.tile.BM, found.tile.warps, found.tile.stages)
    assert 2 * counts["wgmma by boxes"] > counts["all"] > 200, counts
    assert min(counts["two messages"], counts["of a table"]) > 20, counts
    assert pass_ == "wgrad" or counts["128 pixels"] > 20, counts


def test_launches_of_a_single_image_include_splits(tune: ModuleType) -> None:
    """At inference, every layer with an input of at most 14 x 14 is tried with splits; no other pass is."""
    split: Counter[str] = Counter()
    for call in calls(tune, (50,), 1):
        with record() as launches:
            for _ in launched(tune, call, call.given, TILES):
                pass
        cut = sum(one.fn.__name__ == "fprop_reduce_kernel" for one in launches)
        assert call.pass_ == "infer" or not cut, call
        split["calls"] += cut > 0
        split["launches"] += cut
        if call.problem.H <= 14 and call.pass_ == "infer":
            assert cut >= TILES, call
    assert split["calls"] > 20, split
    assert split["launches"] > 150, split


def test_calls_include_ends_of_blocks(tune: ModuleType) -> None:
    """The calls cover the ends of blocks, with and without a projection, in dgrad and in fprop's joins.

    In dgrad, the end after a stage's first block has a projection's BatchNorm, and in its last block the residual is
    not masked yet. Every pass has more than 22 calls by the rules.
    """
    found = calls(tune, (50,), 2, 64)
    ends = [c.given for c in found if c.launcher == "conv_dgrad" and isinstance(c.given["relu_mask"], torch.Tensor)]
    seen = {(given["projection"] is not None, given["residual_mask"] is not None) for given in ends}
    assert seen == {(True, False), (False, False), (False, True)}
    joins = [call.given["join"] for call in found if call.given.get("join") is not None]
    assert {join.scale is not None for join in joins} == {True, False}
    assert {len([c for c in found if c.pass_ == pass_ and c.by_rule]) > 22 for pass_ in PASSES} == {True}


def test_deeper_nets_launch_nothing_else(tune: ModuleType) -> None:
    known = {call.facts for call in calls(tune, (50,), 256)}
    assert {call.facts for call in calls(tune, (101, 152), 256)} == known


def without_gpu(test: Any) -> Any:
    """Mark a test that launches on a stub driver: skip it on a GPU, or if the stub can't be built."""
    for reason in ("a GPU has a driver" if torch.cuda.is_available() else None, stub_cuda.unbuildable()):
        test = pytest.mark.skipif(reason is not None, reason=str(reason))(test)
    return test


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make launchers treat CPU tensors as memory of an H200."""
    monkeypatch.setattr(checks, "INTERPRETER", H200)
    for module in (fprop, stem):
        monkeypatch.setattr(module, "check_device", lambda *_: None)


def driver_cases() -> Iterator[Any]:
    """Yield the cases of ResNet-50. A covering selection is `extra` (`make test-all`), and the rest is `slow`."""
    found = CASES["resnet50"]
    picked = chosen([{(pass_, trait) for trait in enumerate(shown(p))} for _, _, pass_, p in (c.values for c in found)])
    for i, case in enumerate(found):
        mark = pytest.mark.extra if i in picked else pytest.mark.slow
        yield pytest.param(*case.values, id=f"bfloat16-{case.id}", marks=mark)


@without_gpu
@pytest.mark.parametrize(("net", "batch", "pass_", "problem"), [*driver_cases()])
def test_every_launch_on_a_stub_driver(
    net: str, batch: int, pass_: str, problem: ConvProblem, tune: ModuleType, as_on_a_gpu: None
) -> None:
    """Every launch compiles for Hopper, its arguments are bound, and the driver accepts its TMA descriptors."""
    with stub_cuda.driver() as accepted:
        for call in of_problem(tune, net, batch, 224, pass_, problem):
            before = len(accepted)
            tried = sum(1 for _ in launched(tune, call, untouched(call), TILES))
            assert len(accepted) - before >= tried > 2


@without_gpu
@pytest.mark.slow
@chains
def test_every_chain_on_a_stub_driver(size: int, channels: int, as_on_a_gpu: None) -> None:
    given = test_chain.operands(256, size, size, channels, torch.bfloat16, "meta")
    with stub_cuda.driver() as accepted:
        test_chain.bottleneck_chain(*(torch.empty_like(t, device="cpu") for t in given))
        assert len(accepted) == 1
