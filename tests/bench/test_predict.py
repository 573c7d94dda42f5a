"""Tests of bench/predict.py and bench/launch_trace.py.

Every kernel of a step is recorded once, with its bytes and FLOPs. The model's distance from the records is as large as
when it was fitted. Invalid arguments are refused.
"""

from __future__ import annotations

import csv
import importlib
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
import triton
import triton.language as tl
from tolerances import COUNTS, PRINTED, RECORDED, TILED, WINDOWED
from triton.tools.tensor_descriptor import TensorDescriptor

import fastres
from fastres.kernels import batch_norm, fprop, persistent, problem, stem, tables, tiles
from fastres.kernels.problem import ConvProblem
from fastres.ops import conv_bn, dispatch
from fastres.ops.block import stages

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
KERNELS = BENCH / "records" / "nvidia-h200-kernels-50.csv"
BF16 = torch.bfloat16
H200 = problem.H200, tiles.H200


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules, imported as in `python bench/predict.py`, with the shipped tables."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("FASTRES_CACHE_DIR", os.devnull + "/none")
    tables.forget_tables()
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("launch_trace", "layers", "predict")})
    tables.forget_tables()


@cache
def steps_of(depth: int, batch: int, mode: str, backend: str) -> list[Any]:
    return importlib.import_module("predict").step(depth, batch, mode, BF16, backend)


@cache
def compared() -> list[dict[str, Any]]:
    return importlib.import_module("predict").beside(KERNELS, 50, 256, BF16, *H200)


def flops_by_layer(launches: list[Any]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for one in launches:
        if one.flops and one.layer:
            found[one.pass_, one.layer] += one.flops
    return found


@pytest.mark.parametrize("depth", [18, 50])
def test_a_training_step_has_the_flops_of_its_convolutions(bench: SimpleNamespace, depth: int) -> None:
    """A step's FLOPs are those of each convolution in each pass, whatever the engine and the number of launches."""
    wanted: Counter[tuple[str, str]] = Counter()
    for (p, _), count in bench.layers.roles(depth, 256, 224).items():
        for pass_ in ("fprop", "dgrad", "wgrad"):
            if bench.layers.applicable(p, pass_):
                wanted[pass_, bench.layers.name(p)] += 2 * p.multiply_adds * count
    found = flops_by_layer(steps_of(depth, 256, "train", "fastres"))
    assert found.keys() == wanted.keys()
    for key, flops in wanted.items():
        assert found[key] == pytest.approx(flops, rel=COUNTS), key


def test_each_convolution_runs_on_the_engine_that_dispatch_chooses(bench: SimpleNamespace) -> None:
    with bench.launch_trace.recorded(BF16):
        wanted = {
            (pass_, bench.layers.name(p)): dispatch.conv_engine(pass_, p, BF16, bench.launch_trace.META) != "cudnn"
            for p, _ in bench.layers.roles(50, 256, 224)
            for pass_ in ("fprop", "dgrad", "wgrad")
            if bench.layers.applicable(p, pass_)
        }
    launches = steps_of(50, 256, "train", "fastres")
    assert {(one.pass_, one.layer): one.ours for one in launches if one.flops and one.layer} == wanted
    assert 0 < sum(wanted.values()) < len(wanted)


def test_a_training_step_has_the_kernels_that_a_profiler_saw() -> None:
    """Compares the kernels that each BatchNorm needs once. Others have changed since the record."""
    with (BENCH / "records" / "nvidia-h200-timeline-train.csv").open(newline="") as source:
        seen = {row["kernel"]: float(row["calls"]) for row in csv.DictReader(source)}
    found = Counter(one.kernel for one in steps_of(50, 256, "train", "fastres"))
    for kernel in ("finish_statistics_kernel", "finish_backward_kernel"):
        assert found[kernel] == seen[kernel] == 53
    assert found["_fused_sgd_"] == 1
    # The only copy_ is that of the batch. There would be more if the recorder kept gradients alive, because autograd
    # copies a gradient to which another reference exists. _foreach_copy_ casts weights and gradients in each of the
    # four stages, since the library computes some convolutions of every stage.
    assert (found["copy_"], found["_foreach_copy_"]) == (1, 4 + 4)


def test_optimized_inference_has_the_flops_of_its_convolutions(bench: SimpleNamespace) -> None:
    """This includes the convolutions in chains, which are recorded under the name of their first convolution."""
    launches = steps_of(50, 256, "infer", "fastres")
    wanted = sum(2 * p.multiply_adds * count for (p, _), count in bench.layers.roles(50, 256, 224).items())
    assert sum(one.flops for one in launches if one.layer) == pytest.approx(wanted, rel=COUNTS)
    assert any(one.kernel == "bottleneck_chain_kernel" and one.flops for one in launches)
    assert {one.pass_ for one in launches if one.layer} == {"infer"}


def kernels_of(bench: SimpleNamespace, p: ConvProblem, pass_: str, role: Any, backend: str) -> list[Any]:
    launches, _ = bench.predict.of_layer(p, role, pass_, BF16, backend)
    return launches


def test_bytes_of_a_convolution_are_those_counted_by_hand(bench: SimpleNamespace) -> None:
    N, C, K, H = 2, 64, 256, 56
    role = bench.layers.Role("last")
    (one,) = kernels_of(bench, ConvProblem(N, H, H, C, K), "fprop", role, "triton")
    x, y, w = 2 * N * H * H * C, 2 * N * H * H * K, 2 * C * K
    partials = 3 * 4 * K * one.programs // math.ceil(K / one.arguments["BM"])
    assert one.bytes == x + y + w + partials + 2 * 4 * C
    (library,) = kernels_of(bench, ConvProblem(N, H, H, C, K), "infer", role, "cudnn")
    assert library.bytes == x + 2 * y + w + 2 * K


def test_a_1x1_of_stride_2_reads_a_quarter_of_its_pixels(bench: SimpleNamespace) -> None:
    N, C, K, H = 2, 256, 512, 56
    p, role = ConvProblem(N, H, H, C, K, stride=2), bench.layers.Role("project")
    x, y, w = 2 * N * H * H * C, 2 * N * H * H // 4 * K, 2 * C * K
    for backend in ("triton", "cudnn"):
        (one,) = kernels_of(bench, p, "infer", role, backend)
        assert one.bytes == x // 4 + y + w
        gradient = kernels_of(bench, p, "dgrad", role, backend)  # our kernel has a launch for each class of pixels
        assert sum(one.bytes for one in gradient) == x + y + w
        assert sum(one.flops for one in gradient) == pytest.approx(2 * p.multiply_adds, rel=COUNTS)


def test_bytes_of_a_pass_are_those_counted_by_hand(bench: SimpleNamespace) -> None:
    z, residual = (torch.empty(2, 8, 8, 64, dtype=BF16, device="meta") for _ in range(2))
    v = torch.empty(64, device="meta")
    with bench.launch_trace.recorded(BF16) as recorder:
        batch_norm.normalize(z, v, v, relu=True, residual=residual)
    (one,) = recorder.launches()
    assert (one.kernel, one.flops, one.ours) == ("normalize_kernel", 0, True)
    assert one.bytes == 3 * z.nbytes + v.nbytes  # the vector that is passed twice counts once


@triton.jit
def product(a, b):
    return tl.dot(a, b)


@triton.jit
def unknown_kernel(a, b, c, BLOCK: tl.constexpr):
    c.store([0, 0], product(a.load([0, 0]), b.load([0, 0])))


@triton.jit
def plain_kernel(a, b, BLOCK: tl.constexpr):
    tl.store(b + tl.arange(0, BLOCK), tl.load(a + tl.arange(0, BLOCK)))


def test_an_unknown_kernel_is_counted_by_its_arguments(bench: SimpleNamespace) -> None:
    x = torch.empty(64, 64, dtype=BF16, device="meta")
    half = torch.empty(128, 64, dtype=BF16, device="meta")[:64]
    boxes = TensorDescriptor.from_tensor(x, [16, 16])
    p = ConvProblem(1, 8, 8, 64, 64)
    with bench.launch_trace.recorded(BF16) as recorder:
        recorder.work.append(bench.launch_trace.Work("fprop", p, 1000))
        batch_norm.launch(unknown_kernel, (7, 3), a=boxes, b=x, c=half, BLOCK=16)
        batch_norm.launch(plain_kernel, (5,), a=x, b=None, BLOCK=16)
    multiplying, plain = recorder.launches()
    assert (multiplying.programs, multiplying.flops, plain.flops) == (21, 1000, 0)
    assert multiplying.bytes == 2 * x.nbytes  # counts the view `half`, not the larger tensor
    assert plain.bytes == x.nbytes
    time = bench.predict.time(multiplying, *H200)
    assert time.predicted >= time.floor
    assert time.by_bytes == pytest.approx(1e6 * multiplying.bytes / problem.H200.bandwidth)


def test_recording_restores_what_it_replaces(bench: SimpleNamespace) -> None:
    before = dispatch.why_engine, conv_bn.bind, batch_norm.launch, torch.autocast, dispatch._kernel_less
    with pytest.raises(ValueError, match="shape"), bench.launch_trace.recorded(BF16):
        batch_norm.normalize(torch.empty(2, 8, 8, 64, device="meta"), *[torch.empty(3, device="meta")] * 2, relu=True)
    assert (dispatch.why_engine, conv_bn.bind, batch_norm.launch, torch.autocast, dispatch._kernel_less) == before
    assert torch._C._len_torch_dispatch_stack() == 0
    x = torch.empty(2, 3, 64, 64, device="meta")
    assert fastres.resnet18().conv1.weight.device.type == "cpu"
    assert "no fused kernels for meta" in str(dispatch.why_unfused(BF16, x.device))


def test_bytes_bound_one_layer_and_waves_another(bench: SimpleNamespace) -> None:
    """Shows the reason for LATENCY: a convolution from 64 to 256 channels with one program per tile takes more than 1.7
    times its lower bound, one from 256 to 64 less than 1.3 times. With persistent programs, which the table has for the
    former, bytes bound that as well."""
    narrow, wide = ConvProblem(256, 56, 56, 64, 256), ConvProblem(256, 56, 56, 256, 64)
    (staying,) = kernels_of(bench, narrow, "fprop", bench.layers.Role("last"), "triton")
    assert bench.predict.time(staying, *H200).bound == "bytes"
    by_tile = tiles.fprop_tiles(narrow, 2, True, computed=1)[0]
    with bench.predict.tiles({("fprop", bench.layers.name(narrow)): by_tile}, {}):
        (waiting,) = kernels_of(bench, narrow, "fprop", bench.layers.Role("last"), "triton")
    (moving,) = kernels_of(bench, wide, "infer", bench.layers.Role("first", boundary=True), "triton")
    slow, fast = (bench.predict.time(one, *H200) for one in (waiting, moving))
    assert slow.bound == "latency"
    assert slow.predicted > 1.7 * slow.floor
    assert fast.bound == "bytes"
    assert fast.predicted < 1.3 * fast.floor


def test_programs_on_a_multiprocessor_wait_at_the_same_time(bench: SimpleNamespace) -> None:
    """The four programs that a multiprocessor holds wait at the same time, so ten waves of them take ten LATENCY."""
    given = {"BM": 64, "BN": 128, "BK": 64, "steps": 1, "num_warps": 4, "num_stages": 2, "K": 64}
    one = bench.launch_trace.Launch("k", "fprop", "l", 10**6, (), (), True, (132 * 40,), given)
    time = bench.predict.time(one, *H200)
    held = bench.predict.resident(one, bench.predict.tile_of(one), tiles.H200)
    assert held == 4
    assert time.waves == 10
    assert time.predicted == pytest.approx(10 * bench.predict.LATENCY, rel=0.1)


def test_a_persistent_program_waits_once(bench: SimpleNamespace) -> None:
    """A persistent program computes all its tiles, with channels beyond the edge, and doesn't fetch the filters
    again."""
    p = ConvProblem(256, 56, 56, 64, 192)
    tile = tiles.Tile(128, 64, 64, 8, 3, (1, 1, 64), persistent=2)
    x, w = (torch.empty(shape, dtype=BF16, device="meta") for shape in ((256, 56, 56, 64), (192, 1, 1, 64)))
    s, t = (torch.empty(64, device="meta") for _ in range(2))
    with bench.launch_trace.recorded(BF16) as recorder:
        recorder.work.append(bench.launch_trace.Work("fprop", p, 2 * p.multiply_adds))
        fprop.conv_fprop(x, w, ConvProblem.of(x.shape, w.shape), prologue=(s, t), statistics=True, tile=tile)
    (one,) = recorder.launches()
    assert (one.kernel, one.programs, one.flops) == ("pointwise_fprop_kernel", 264, 2 * p.multiply_adds)
    cut = bench.predict.tile_of(one)
    each = 2 * 12544 / 264  # tiles of 128 channels and 64 pixels per program
    assert (cut.steps, cut.fetched, cut.instructions, cut.stays) == (math.ceil(each), 64, 64 * tiles.AFFINE, True)
    assert bench.predict.executed(one) == pytest.approx(2 * p.multiply_adds * 256 / 192, rel=TILED)
    time = bench.predict.time(one, *H200)
    assert time.waves == 1
    assert time.predicted < 1.3 * time.floor

    like_dx = dict.fromkeys(("dx", "z_below", "z_proj", "relu_mask", "residual", "residual_mask"), x)
    dz = torch.empty(256, 56, 56, 192, dtype=BF16, device="meta")
    with bench.launch_trace.recorded(BF16) as recorder:
        recorder.work.append(bench.launch_trace.Work("dgrad", p, 2 * p.multiply_adds))
        rest = dict.fromkeys(("c_g", "c_z", "c_1", "scale", "shift", "mean", "mean_proj"), s)
        persistent.launch_dgrad(p, tile, w, {"dy": dz, "z": dz}, like_dx, PRECISION="ieee", **rest)
    (one,) = recorder.launches()
    cut = bench.predict.tile_of(one)
    assert (cut.steps, cut.fetched) == (math.ceil(12544 / 264) * 3, 128)
    assert cut.instructions == 64 * tiles.COMPUTED
    assert bench.predict.executed(one) == pytest.approx(2 * p.multiply_adds * 128 / 64, rel=TILED)


def test_the_stem_fetches_windows_and_multiplies_whole_rows(bench: SimpleNamespace) -> None:
    """The kernel fetches dz once and, for every pixel, 7 windows of 32 values, of which 21 are used."""
    p = ConvProblem(256, 224, 224, 3, 64, 7, 7, 2, 3)
    launches = kernels_of(bench, p, "wgrad", bench.layers.Role("stem"), "triton")
    (one,) = (launch for launch in launches if launch.flops)
    assert one.kernel == "stem_wgrad_kernel"
    assert one.flops == 2 * p.multiply_adds
    cut = bench.predict.tile_of(one)
    executed = bench.predict.executed(one)
    assert executed == pytest.approx(2 * p.pixels * 64 * 7 * 32, rel=WINDOWED)
    fetched = executed / (2 * cut.BM * cut.BN * cut.taps) * cut.fetched
    assert fetched == pytest.approx(p.pixels * (64 + 7 * 32), rel=WINDOWED)
    images, dz = 2 * 256 * 224 * 230 * 4, 2 * p.pixels * 64
    assert images + dz < one.bytes < 1.05 * (images + dz)

    packed = torch.empty(256, 224, 230, 4, dtype=BF16, device="meta")
    filters = torch.empty(64, 7, 8, 4, dtype=BF16, device="meta")
    with bench.launch_trace.recorded(BF16) as recorder:
        recorder.work.append(bench.launch_trace.Work("infer", p, 2 * p.multiply_adds))
        stem.conv_stem(packed, filters, p, tile=tiles.Tile(64, 128, 32, 4, 3))
    (one,) = recorder.launches()
    assert one.kernel == "stem_fprop_kernel"
    assert bench.predict.executed(one) == 2 * p.pixels * 64 * 7 * 32


def test_a_split_convolution_is_two_kernels(bench: SimpleNamespace) -> None:
    p, role = ConvProblem(1, 7, 7, 512, 512, 3, 3, 1, 1), bench.layers.Role("middle")
    tile = next(one for one in tiles.fprop_tiles(p, 2, True, tiles.H200, split=True) if one.splits == 8)
    with bench.predict.tiles({("infer", bench.layers.name(p)): tile}, {}):
        split, reduce = kernels_of(bench, p, "infer", role, "triton")
    assert (split.kernel, reduce.kernel, reduce.flops) == ("conv_fprop_tma_kernel", "fprop_reduce_kernel", 0)
    assert split.flops == 2 * p.multiply_adds
    sums, y = 8 * 4 * 49 * 512, 2 * 49 * 512
    assert split.bytes == 2 * 49 * 512 + 2 * 9 * 512 * 512 + sums
    assert sums + y < reduce.bytes < sums + y + 10 * 512
    assert [one.programs for one in kernels_of(bench, p, "infer", role, "triton")] != [split.programs]


@pytest.mark.parametrize(("batch", "mode"), [(256, "train"), (256, "infer"), (1, "infer")])
def test_untried_tiles_are_used_where_they_win(bench: SimpleNamespace, batch: int, mode: str) -> None:
    def record() -> list[Any]:
        return bench.predict.step(50, batch, mode, BF16, "fastres")

    def cost(launches: list[Any], key: tuple[str, str]) -> float:
        return sum(bench.predict.time(one, *H200).predicted for one in launches if (one.pass_, one.layer) == key)

    usual, chosen = steps_of(50, batch, mode, "fastres"), tables._measured_tile
    found = bench.predict.by_untried(record, *H200)
    assert tables._measured_tile is chosen
    assert flops_by_layer(found).keys() == flops_by_layer(usual).keys()
    for key, flops in flops_by_layer(usual).items():
        assert flops_by_layer(found)[key] == pytest.approx(flops, rel=COUNTS), key
    assert Counter(one.ours for one in found if one.flops) == Counter(one.ours for one in usual if one.flops)
    us, least = (sum(bench.predict.time(one, *H200).predicted for one in some) for some in (usual, found))
    names = {one.kernel for one in found}
    assert ("pointwise_fprop_kernel" in names) == (batch == 256)
    assert least < us if batch == 256 else least == us
    widening, untried = (("fprop" if mode == "train" else "infer"), "1x1 64->256 @56x56"), {}
    with bench.predict.tiles({}, untried):
        again = record()
    for tile in untried[widening]:
        with bench.predict.tiles({widening: tile}, {}):
            assert cost(found, widening) <= cost(record(), widening)
    assert [one.kernel for one in again] == [one.kernel for one in usual]


def ratios(lines: list[dict[str, Any]]) -> list[float]:
    return [line["predicted_us"] / line["measured_us"] for line in lines]


def test_the_model_is_as_close_to_the_kernels_record_as_before(bench: SimpleNamespace) -> None:
    """Pins the median, 10th and 90th percentile of predicted / measured."""
    by = {engine: [line for line in compared() if line["by"] == engine] for engine in ("triton", "cudnn")}
    assert len(by["triton"]) == len(by["cudnn"]) == 91
    assert bench.predict.spread(ratios(by["triton"])) == pytest.approx((0.99, 0.78, 1.19), abs=RECORDED)
    assert bench.predict.spread(ratios(by["cudnn"])) == pytest.approx((0.89, 0.69, 1.09), abs=RECORDED)


def test_a_fit_gives_the_constants_and_they_hold_on_other_rows(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KERNELS.open(newline="") as source:
        order = [(row["pass"], row["layer"], float(row["us"])) for row in csv.DictReader(source)]
    roles = {bench.layers.name(p): (p, role) for p, (_, role) in bench.layers.problems([50], 256, 224).items()}
    rows = [
        (kernels_of(bench, roles[layer][0], pass_, roles[layer][1], "triton"), us)
        for pass_, layer, us in order
        if not layer.startswith("7x7")
    ]

    def distance(some: list[Any]) -> float:
        def off(launches: list[Any], us: float) -> float:
            return abs(math.log(sum(bench.predict.time(one, *H200).predicted for one in launches) / us))

        return statistics.median(off(launches, us) for launches, us in some)

    shipped = bench.predict.EFFICIENCY, bench.predict.LATENCY
    held = distance(rows[1::2])
    found = {}
    for efficiency in (0.76, 0.79, 0.82, 0.85, 0.88, 0.91):
        for latency in (4.0, 4.5, 5.0, 5.5, 6.0, 7.0):
            monkeypatch.setattr(bench.predict, "EFFICIENCY", efficiency)
            monkeypatch.setattr(bench.predict, "LATENCY", latency)
            found[efficiency, latency] = distance(rows[::2])
    assert min(found, key=found.__getitem__) == shipped
    assert held < 0.13


@pytest.mark.parametrize(
    ("mode", "backend", "low", "high"),
    [
        ("train", "fastres", 0.80, 1.00),  # it was 0.94 with the kernels of the record
        ("infer", "fastres", 0.75, 0.90),
        ("train", "eager", 0.65, 0.75),
        ("infer", "eager", 0.72, 0.82),
        ("train", "inductor", 0.82, 0.92),
        ("infer", "inductor", 0.78, 0.88),
    ],
)
def test_a_predicted_step_is_as_close_to_the_record_as_before(
    bench: SimpleNamespace, mode: str, backend: str, low: float, high: float
) -> None:
    """Pins predicted / measured time. The library's kernels have no known tile, so their predictions are too fast."""
    _, img_s = bench.predict.on_record("NVIDIA H200", 50, 256, mode, "bf16", backend)
    us = sum(bench.predict.time(one, *H200).predicted for one in steps_of(50, 256, mode, backend))
    assert low < us / 1e6 * img_s / 256 < high


def test_inductor_moves_less_than_eager_and_multiplies_the_same(bench: SimpleNamespace) -> None:
    for mode in ("train", "infer"):
        eager, fused = (steps_of(50, 8, mode, backend) for backend in ("eager", "inductor"))
        assert flops_by_layer(eager) == flops_by_layer(fused)
        assert sum(one.bytes for one in fused) < 0.9 * sum(one.bytes for one in eager)
    names = Counter(one.kernel for one in steps_of(50, 8, "train", "eager"))
    assert names["native_batch_norm"] == names["native_batch_norm_sums"] == names["convolution"] == 53


def test_inductor_fuses_pointwise_operators_into_their_readers(bench: SimpleNamespace) -> None:
    part, launch_of = bench.launch_trace.Part, bench.launch_trace.Launch

    def op(kernel: str, reads: str, writes: str) -> Any:
        size = 2**20
        return launch_of(kernel, "p", "", 0, *(tuple(part(ord(c), size) for c in names) for names in (reads, writes)))

    fused = bench.launch_trace.as_inductor(
        [op("convolution", "x", "z"), op("relu", "z", "a"), op("add", "as", "y"), op("convolution", "y", "o")]
    )
    assert [one.kernel for one in fused] == ["convolution", "fused_pointwise", "convolution"]
    assert {p.memory for p in fused[1].reads} == {ord("z"), ord("s")}
    many = [op("add", "ab", "p"), op("add", "cd", "q"), op("add", "pq", "r"), op("add", "re", "t"), op("mm", "t", "u")]
    assert [one.kernel for one in bench.launch_trace.as_inductor(many)] == ["fused_pointwise", "fused_pointwise", "mm"]


def test_the_listed_losses_cover_a_goal(bench: SimpleNamespace) -> None:
    found = bench.predict.rows(steps_of(50, 256, "train", "fastres"), *H200)
    total, lost = sum(row.predicted_us for row in found), sorted((row.lost_us for row in found), reverse=True)
    goal = 256e6 / (total - 1000)
    said = bench.predict.towards(goal, found, 256, None).splitlines()
    assert "1,000 us must be saved" in said[1]
    listed = [float(line.split()[0].replace(",", "")) for line in said[3:]]
    assert listed == pytest.approx(lost[: len(listed)], abs=PRINTED)
    assert sum(listed[:-1]) < 1000 <= sum(listed) + 0.1
    assert all(any(bound in line for bound in ("bytes", "FLOPs", "latency", "L2", "start")) for line in said[3:])
    # With a measurement, the gap is that of the measured step, and the part that the model doesn't explain is printed.
    said = bench.predict.towards(goal, found, 256, ("x", 256e6 / (total + 500))).splitlines()
    assert "500 us of the measured step are not explained by the model" in said[1]
    assert "1,500 us must be saved" in said[2]
    assert "the goal is reached" in bench.predict.towards(goal / 2, found, 256, None)
    assert "bytes or FLOPs must go" in bench.predict.towards(10 * goal, found, 256, None)


def test_the_command_runs_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    sink = tmp_path / "deep" / "rows.csv"
    command = [sys.executable, str(BENCH / "predict.py"), "--goal", "9000", "--measured", str(KERNELS)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "FASTRES_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([*command, "--csv", str(sink)], capture_output=True, text=True, env=hidden, timeout=60)
    assert run.returncode == 0, run.stderr
    for word in ("predicted / measured", "measured (fastres-graph)", "must be saved", "conv_fprop_tma_kernel"):
        assert word in run.stdout
    with sink.open(newline="") as source:
        written = list(csv.DictReader(source))
    assert sum(float(row["predicted_us"]) for row in written) > 1e4
    assert all(row["bound"] and int(row["count"]) > 0 for row in written)


def test_a_fusion_switch_changes_the_prediction(bench: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """With keep_activation there are fewer normalisation kernels, because backward doesn't normalise again."""
    kernels = []
    for arguments in ([], ["--fusions", "keep_activation=1", "overlap=0"]):
        assert bench.predict.main(["--batch", "8", *arguments]) == 0
        out = capsys.readouterr().out
        assert ("keep_activation=1, overlap=0" in out) == bool(arguments)
        (found,) = re.findall(r"^normalize_kernel +(\d+) ", out, re.MULTILINE)
        kernels.append(int(found))
    assert kernels[1] < kernels[0]
    assert dispatch._fusions.get() == dispatch.Fusions()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--depth", "19"], "invalid choice: 19"),
        (["--batch", "0"], "invalid positive int value: '0'"),
        (["--goal", "-3"], "invalid positive float value: '-3'"),
        (["--goal", "nan"], "invalid positive float value: 'nan'"),
        (["--gpu", "NVIDIA T4"], "choose from"),
        (["--dtype", "fp32"], "choose from"),
        (["--mode", "tune"], "choose from"),
        (["--fusions", "keep_activation"], "'keep_activation' is not a switch; accepted: NAME=0 and NAME=1"),
        (["--fusions", "prologue=1", "keep=1"], "unknown fusion keep; accepted: statistics"),
        (["--fusions", "prologue=2"], "'prologue=2' is not a switch; accepted"),
        (["--fusions", "prologue=0", "--backend", "eager"], "need --backend fastres: got eager"),
        (["--untried", "--backend", "inductor"], "need --backend fastres: got inductor"),
        (["--measured", "nowhere.csv"], "No such file"),
        (
            ["--measured", str(BENCH / "records" / "nvidia-h200-timeline-train.csv")],
            "accepted is a table that bench/kernels.py",
        ),
        (["--measured", str(KERNELS), "--batch", "128"], "another batch size"),
        (["--measured", str(KERNELS), "--depth", "18"], "has no row for"),
    ],
)
def test_invalid_arguments_are_refused(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        bench.predict.main(arguments)
    assert raised.value.code == 2
    out, error = capsys.readouterr()
    assert said in error
    assert out == ""


def drawn_kernels(bench: SimpleNamespace, net: Any, make: Any, blocks: int) -> tuple[int, int]:
    """Return the number of forward and backward kernels of `blocks` bottleneck blocks.

    Kernels that merge partial sums, count batches or convert dtypes and layouts are left out. PyTorch's BatchNorm
    counts as one.
    """
    with bench.launch_trace.META:
        made = [make(256, 64).to(memory_format=torch.channels_last) for _ in range(blocks)]
    small = ("merge", "finish", "wgrad_reduce", "_sums", "clone", "_copy")
    with bench.launch_trace.recorded(BF16) as recorder:
        x = torch.empty(256, 256, 56, 56, dtype=BF16, device="meta").to(memory_format=torch.channels_last)
        y = net(x.requires_grad_(), made)
        forward = len(recorder.launches())
        y.backward(torch.empty_like(y))
    big = [one.bytes > 2**20 and not any(part in one.kernel for part in small) for one in recorder.launches()]
    return sum(big[:forward]), sum(big[forward:])


def test_blocks_have_the_number_of_kernels_that_is_drawn(bench: SimpleNamespace) -> None:
    """docs/fused.svg names the numbers for an inner block of a stage with the H200's shipped table. The last block of a
    stage has more kernels, because its end is not fused with a next block."""

    def ours(x: torch.Tensor, blocks: list[Any]) -> torch.Tensor:
        return stages(x, [[(block.pairs(), block.downsample) for block in blocks]])

    def theirs(x: torch.Tensor, blocks: list[Any]) -> torch.Tensor:
        return torch.nn.Sequential(*blocks)(x)

    last = drawn_kernels(bench, ours, fastres.Bottleneck, 1)
    both = drawn_kernels(bench, ours, fastres.Bottleneck, 2)
    assert last == (5, 9)
    assert (both[0] - last[0], both[1] - last[1]) == (4, 7)
    assert drawn_kernels(bench, theirs, torchvision.models.resnet.Bottleneck, 1) == (10, 13)
    drawing = (ROOT / "docs" / "fused.svg").read_text()
    assert re.findall(r">(\d+) kernels<", drawing) == ["10", "4", "13", "7"]
