"""Time every candidate tile of every convolution of a net, and write this GPU's table, which dispatch and kernels
follow.

    python bench/tune.py --depth 50 --batch 256             # into the user's cache folder
    python bench/tune.py --depth all --batch 256 --ship     # into kernels/tables/, to be committed
    python bench/tune.py --merge nvidia-h200.json           # also into kernels/tables/: another machine's measurements

A problem is the shape of a convolution. For each problem and pass, the candidates of `fastres.kernels.tiles` whose
result agrees with cuDNN's are timed. The best is compared with cuDNN, and the faster of the two wins. Both do the work
that the net has around the convolution in the problem's most frequent role (bench/layers.py): in training, cuDNN's
convolution with our memory-bound kernels around it; in inference, cuDNN's fused convolution as `fastres.optimize` runs
it. An operand that our kernel can compute while it loads is tried both ways: computed on load, and stored before. All
candidates are compiled first, by as many processes as there are CPUs.

Measurements run in a separate process, so that no fault there ends the run. If a kernel hangs, breaks the CUDA context
or kills its process, cuDNN wins that problem, a note in the table gives the reason, and a new process continues. The
run ends only if a new process can't reach the GPU. The table is written before and after every problem; a problem that
was being measured when a run was stopped is marked "unfinished". The next run measures missing problems first, then
unfinished ones. --again measures everything again. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import layers
import precompile
import torch
from layers import DTYPES, PASSES, Operands, Role, name
from torch import Tensor
from worker import Worker, WorkerLost, lost_context

import fastres
from fastres.capability import TMA
from fastres.kernels import chain, dgrad, fprop, stem, tables, tiles, wgrad
from fastres.kernels.checks import gpu_of, tma_refusal
from fastres.kernels.fprop import fprop_tma_refusal
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import stem_columns, stem_refusal
from fastres.kernels.tables import Measurement
from fastres.kernels.tiles import Tile
from fastres.ops import dispatch, reference
from fastres.ops.conv_bn import ConvBN, bind, conv_bn

TUNED = (*PASSES, "chain")  # the chain comes last, when the kernels it is compared with are tuned
START = 120  # seconds for a process to start and reach the GPU
# Seconds for a problem; the second applies if its candidates may still have to be compiled.
PATIENCE, COMPILING = 40, 120
NOISE = 1.01  # two timings of one kernel differ by up to this factor; our kernel wins if it is as fast as the library
FEW = 2  # how many candidates of an unlikely kind to try: tiles without TMA where TMA can be used; see also `numbers`
ON_LOAD = {"fprop": "fprop_on_load", "dgrad": "dz_on_load", "wgrad": "wgrad_on_load"}  # a table's `on_load`, by pass

Task = tuple[str, ConvProblem, Role]  # a pass of a problem in its role, which is measured as a unit


def candidates(pair: ConvBN, pass_: str, role: Role, dtype: torch.dtype, device: torch.device, most: int) -> list[Tile]:
    """Return the `most` most promising tiles and all persistent ones.

    If TMA can load the operands, these are tiles for TMA, and up to `FEW` tiles for pointers follow. Otherwise they are
    tiles for pointers.
    """
    problem, gpu = pair.problem, gpu_of(device)
    like = torch.empty(0, dtype=dtype, device="meta")
    refusal = tma_refusal if pass_ == "dgrad" else fprop_tma_refusal  # wgrad reads x like fprop
    carried = torch.cuda.get_device_capability(device) >= TMA and refusal(problem, like) is None
    operands = 2 if role.summed and pair.engines.dz_on_load else 1
    tried: list[Tile] = []
    for tma in (True, False) if carried else (False,):
        of_pass = problem, dtype.itemsize, tma, gpu, dtype == torch.float32
        if pass_ == "infer":
            found = tiles.fprop_tiles(*of_pass, 0, True)
        elif pass_ == "fprop":
            computed = 2 if layers.joins(problem, role) else int(role.normed)
            found = tiles.fprop_tiles(*of_pass, computed if pair.engines.fprop_on_load else 0, False)
        elif pass_ == "dgrad":
            found = tiles.dgrad_tiles(*of_pass, operands, layers.met_by_dx(role))
        else:
            found = tiles.wgrad_tiles(*of_pass, operands, role.normed and pair.engines.wgrad_on_load)
        tried += promising(pass_, found, most if tma == carried else max(0, min(FEW, most - FEW)))
    return tried


def promising(pass_: str, found: Sequence[Tile], most: int) -> list[Tile]:
    """Return the first `most` tiles and all persistent ones. For inference, tiles with splits are counted separately.

    Persistent tiles, and split ones in inference, don't compete with the others for a place, because it hasn't been
    measured how well the model ranks them against the others.
    """
    usual = [tile for tile in found if not tile.persistent]
    cut = [tile for tile in usual if tile.splits > 1] if pass_ == "infer" else []
    kept = [tile for tile in usual if tile not in cut][:most] + cut[:most]
    return [tile for tile in found if tile.persistent or tile in kept]


def stem_candidates(
    problem: ConvProblem, pass_: str, dtype: torch.dtype, device: torch.device, most: int
) -> list[Tile]:
    """Return the most promising tiles of the kernels over packed images.

    For wgrad these are `most` tiles. For the forward pass they are `most` tiles that load by TMA, each of them again
    with other boxes of as many pixels, whose rows have 8 or 16 neighbouring windows, and `most` tiles that load by
    pointers.
    """
    gpu, ieee = gpu_of(device), dtype == torch.float32
    if pass_ == "wgrad":
        return tiles.stem_wgrad_tiles(problem, dtype.itemsize, gpu, ieee)[:most]
    tma = gpu.capability >= TMA
    found = tiles.stem_tiles(stem_columns(problem), dtype.itemsize, tma, gpu, ieee)
    found = [tile for tile in found if max(64, problem.K) >= tile.BM]
    boxed = [tile for tile in found if tile.box is not None][:most]
    boxes = ((n, h, w) for n in (1, 2, 4) for h in (1, 2, 4, 8, 16) for w in (8, 16))
    shaped = [replace(tile, box=box) for box in boxes for tile in boxed if math.prod(box) == tile.BN]
    return list(dict.fromkeys([*boxed, *shaped, *[tile for tile in found if tile.box is None][:most]]))


def over_images(pass_: str, problem: ConvProblem) -> bool:
    """Return whether the kernels over packed images support this pass of the problem."""
    return pass_ in ("infer", "fprop", "wgrad") and stem_refusal(problem) is None


def rebound(pair: ConvBN, **engines: Any) -> ConvBN:
    """Return the pair (a convolution with its BatchNorm) with some fields of its `Engines` replaced."""
    return bind(pair.problem, pair.eps, pair.batch_statistics, replace(pair.engines, **engines))


def packed_pair(pair: ConvBN) -> ConvBN:
    """Return the pair run by the kernels over packed images."""
    return rebound(pair, infer="stem", fprop="stem", wgrad="stem")


def our_pairs(
    problem: ConvProblem, pass_: str, role: Role, dtype: torch.dtype, device: torch.device, dz_on_load: bool
) -> list[ConvBN]:
    """Return the pair with our kernel in every pass, once or twice: with the default choice of what this pass computes
    on load, then, if it has the choice, with the opposite one.

    `dz_on_load` is whether dz is computed on load: in dgrad this is the default choice; wgrad has no choice of it.
    """
    ours: Any = dict.fromkeys(("infer", "fprop", "dgrad", "wgrad"), "triton")
    ours |= {"fprop_on_load": True, "wgrad_on_load": True, "dz_on_load": dz_on_load}
    pair = rebound(layers.pair(problem, dtype, device), **ours)
    choices = {"fprop": role.normed or layers.joins(problem, role), "dgrad": role.summed, "wgrad": role.normed}
    if not choices.get(pass_, False):
        return [pair]
    field = ON_LOAD[pass_]
    return [pair, rebound(pair, **{field: not getattr(pair.engines, field)})]


def numbers(pass_: str, most: int) -> tuple[int, int]:
    """Return (number of candidates to try for the default choice of what is computed on load, number for the opposite
    choice).

    The second is small, except in wgrad, where storing the activation won for most 3x3 convolutions on an H200.
    """
    return most, most if pass_ == "wgrad" else min(most, FEW)


def with_tile(tile: Tile | None, work: Callable[[], Any]) -> Any:
    """Return `work()`, in which all convolutions by our kernels use `tile`."""
    with ExitStack() as stack:
        of_passes = (fprop, "conv_fprop"), (dgrad, "conv_dgrad"), (wgrad, "conv_wgrad")
        for module, name in (*of_passes, (stem, "conv_stem"), (stem, "conv_stem_wgrad")):
            stack.enter_context(patch.object(module, name, partial(getattr(module, name), tile=tile)))
        return work()


def compile_candidate(
    problem: ConvProblem, engines: dispatch.Engines, pass_: str, role: Role, dtype: torch.dtype, tile: Tile
) -> None:
    """Launch a candidate of `ways` on meta tensors. Within `precompile.compiling` this compiles it."""
    operands = Operands.random(problem, dtype, torch.device("meta"))
    with_tile(tile, layers.call(bind(problem, 0.0, True, engines), pass_, operands, role))


def tolerance(problem: ConvProblem, pass_: str, dtype: torch.dtype) -> float:
    """Return the largest relative L2 distance that is accepted between two results of a pass.

    Each result is rounded once and may be computed from an operand that was rounded before, by at most half an eps each
    time: two eps in all. The error of sums in fp32 grows like a random walk.
    """
    terms = problem.gemm(pass_).k  # type: ignore[arg-type]
    return 2 * (torch.finfo(dtype).eps + math.sqrt(terms) * torch.finfo(torch.float32).eps)


def agrees(result: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether the relative L2 distance of two tensors is at most `tolerance`. It never is if one contains
    NaN."""
    error = torch.dist(result.double(), expected.double()) / expected.double().norm()
    return error.item() <= tolerance


def parts(pass_: str, result: Any, operands: Operands) -> tuple[list[Tensor], Tensor | None]:
    """Split a result of `layers.call` into (tensors to compare between engines, partial sums over the last of them or
    None). dgrad's mask, if it is still to be applied, is applied here."""
    if isinstance(result, Tensor):
        return [result], None
    *tensors, partials = result
    if pass_ == "dgrad":
        dx, mask = tensors
        tensors = [reference.gradient(dx, operands.x, mask, None)]
    return tensors, partials


def sums_agree(partials: Tensor, value: Tensor, below: tuple[Tensor, Tensor] | None) -> bool:
    """Return whether the partial sums [T, 3 or 2, K], merged, are those of `value` [N, H, W, K] as it is stored.

    If `below` is None, each is (number of values, their mean, sum of squared distances from it). If below = (z, mean),
    each is (sum of value, sum of value (z - mean)).

    Each partial sums n/T values in fp32, with an error of up to eps sqrt(n/T) of their magnitudes, like a random walk.
    T such errors of either sign add up like sqrt(T). Four times that is accepted, because the worst of 10^4 channels
    must pass.
    """
    v, pixels = value.double(), (0, 1, 2)
    if below is None:
        number, mean, squares = partials.double().unbind(1)
        total = number.sum(0)
        middle = (number * mean).sum(0) / total
        found = [total, middle * total, (squares + number * (mean - middle) ** 2).sum(0)]
        terms = [torch.ones_like(v), v, (v - v.mean(pixels)) ** 2]
    else:
        z, mean = below
        found = [*partials.double().sum(0)]
        terms = [v, v * (z.double() - mean)]
    n, count = value.numel() // value.shape[-1], len(partials)
    share = 4 * torch.finfo(torch.float32).eps * math.sqrt(n) / count
    wrong = [(a - t.sum(pixels)).abs() > share * t.abs().sum(pixels) for a, t in zip(found, terms, strict=True)]
    return bool(torch.stack(found).isfinite().all()) and not bool(torch.stack(wrong).any())


def right(
    pass_: str, role: Role, operands: Operands, result: Any, expected: Sequence[Tensor], tolerance: float
) -> bool:
    """Return whether the tensors of `result` agree with the library's (`expected`) within `tolerance`, and its partial
    sums are those of its own values."""
    tensors, partials = parts(pass_, result, operands)
    if not all(agrees(a, b, tolerance) for a, b in zip(tensors, expected, strict=True)):
        return False
    if partials is None:
        return True
    z_below = operands.below if role.boundary else operands.x
    return sums_agree(partials, tensors[-1], (z_below, operands.mean) if pass_ == "dgrad" else None)


def ways(
    ours: Sequence[ConvBN], pass_: str, role: Role, operands: Operands, most: int
) -> Iterator[tuple[str, Tile | None, ConvBN, Callable[[], Any]]]:
    """Yield (engine, tile, pair, work) for every candidate: `work` runs the pass on our kernels with `tile`. `ours`
    comes from `our_pairs`."""
    x = operands.x
    for pair, number in zip(ours, numbers(pass_, most), strict=False):
        work = layers.call(pair, pass_, operands, role)
        for tile in candidates(pair, pass_, role, x.dtype, x.device, number):
            yield "triton", tile, pair, partial(with_tile, tile, work)
    if over_images(pass_, ours[0].problem):
        packed = packed_pair(ours[0])
        work = layers.call(packed, pass_, operands, role)
        for tile in stem_candidates(packed.problem, pass_, x.dtype, x.device, most):
            yield "stem", tile, packed, partial(with_tile, tile, work)


def tune(
    problem: ConvProblem,
    pass_: str,
    role: Role,
    dtype: torch.dtype,
    device: torch.device,
    most: int,
    dz_on_load: bool,
) -> tuple[Measurement, str]:
    """Measure one problem and return (Measurement, text to print). `dz_on_load` is as in `our_pairs`.

    dz, the gradient of a convolution's output, can only be computed on load if dgrad and wgrad both run on our kernels,
    but each has its own winner in the table. dgrad is measured first, on the assumption that wgrad has the same engine;
    wgrad then reads dz in the way of dgrad's winner. A candidate that needs a stored dz is charged half of the pass
    that stores it, but only if some other candidate needs no such pass. (If the library wins wgrad after all, dz is
    stored for both, and the two together take longer than their lines say.)
    """
    operands = Operands.random(problem, dtype, device)
    with fastres.backend("cudnn"):
        theirs = layers.pair(problem, dtype, device)
    ours = our_pairs(problem, pass_, role, dtype, device, dz_on_load)
    library = layers.call(theirs, pass_, operands, role)
    (expected, _), allowed = parts(pass_, library(), operands), tolerance(problem, pass_, dtype)
    stores = partial(layers.stores_dz, role=role, operands=operands)
    charged = pass_ in ("dgrad", "wgrad") and stores(theirs) and not all(map(stores, ours))
    half = layers.half_of_dz(theirs, operands) if charged else 0.0

    def cost(pair: ConvBN, work: Callable[[], Any]) -> float:
        return layers.microseconds(work) + (half if stores(pair) else 0.0)

    rival, best, best_us, failed = cost(theirs, library), ("triton", None, ours[0]), float("inf"), []
    for engine, tile, pair, work in ways(ours, pass_, role, operands, most):
        try:
            if not right(pass_, role, operands, work(), expected, allowed):
                failed.append(f"{engine} {tile} gives a wrong result")
                continue
            us = cost(pair, work)
        except Exception as error:  # a tile that this GPU can't run: report it and go on
            if lost_context() is not None:
                raise RuntimeError(f"{engine} {tile}: {first_line(error)}") from error
            failed.append(f"{engine} {tile}: {first_line(error)}")
            continue
        if us < best_us:
            best, best_us = (engine, tile, pair), us
    engine, tile, pair = best
    winner = engine if best_us < NOISE * rival else "cudnn"
    on_load = getattr(pair.engines, ON_LOAD.get(pass_, ""), True)
    how = f"{tile}" if len(ours) == 1 else f"{tile}, {'computed on load' if on_load else 'stored first'}"
    lines = [f"{pass_:5} {name(problem):28} ours {best_us:9.1f} us, cuDNN {rival:9.1f} us -> {winner} {how}"]
    return Measurement(winner, tile, on_load), "\n".join(lines + [f"      {text}" for text in failed])


def dz_on_load(table: tables.Table, pass_: str, problem: ConvProblem, dtype: torch.dtype) -> bool:
    """Return whether dz is computed on load: for wgrad as dgrad's winner in the table does, if dgrad has been measured;
    else by dispatch's rule."""
    found = table.get(("dgrad", problem, dtype)) if pass_ == "wgrad" else None
    if found is None or found.note == tables.UNFINISHED:
        return dispatch.bn_backward_on_load(problem)
    return found.winner == "triton" and found.on_load


def first_line(error: Exception) -> str:
    """Return the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"


def chained(problem: ConvProblem, role: Role) -> bool:
    """Return whether this is a bottleneck's 3x3 convolution that `bottleneck_chain` supports, with those that follow
    it."""
    p = problem
    return role.place == "inner" and (p.R, p.stride, p.groups) == (3, 1, 1) and p.C == p.K and p.C in (64, 128)


def tune_chain(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """Measure a block's 3x3 convolution, its expansion and the next block's reduction as one kernel and as three.
    Returns (Measurement, line to print)."""
    p = problem
    tables.forget_tables()  # lets dispatch use the measurements of this run
    conv_bn.cache_clear()
    expand, reduce = (ConvProblem(p.N, p.H, p.W, c, k) for c, k in ((p.C, 4 * p.C), (4 * p.C, p.C)))
    three = [(layers.pair(q, dtype, device), Operands.random(q, dtype, device)) for q in (p, expand, reduce)]
    (_, a), (_, b), (_, c) = three
    reads = (a.x,), (b.x, c.x), (c.x,)
    first, second, third = (layers.infer(s, o.w, o.shift, x, True) for (s, o), x in zip(three, reads, strict=True))

    def apart() -> tuple[Tensor, Tensor]:
        out = second(first(a.x), c.x)
        return out, third(out)

    def together() -> tuple[Tensor, Tensor]:
        return chain.bottleneck_chain(a.x, a.w, a.shift, b.w, b.shift, c.x, c.w, c.shift)

    allowed = 2 * torch.finfo(dtype).eps
    if not all(agrees(x, y, allowed) for x, y in zip(together(), apart(), strict=True)):
        return Measurement("cudnn", None), f"chain {name(problem):28} gives a wrong result"
    ours_us, apart_us = layers.microseconds(together), layers.microseconds(apart)
    winner = "triton" if ours_us < apart_us else "cudnn"
    line = f"chain {name(problem):28} one kernel {ours_us:9.1f} us, three {apart_us:9.1f} us -> {winner}"
    return Measurement(winner, None), line


class Tuner:
    """The object that measures, in its own process (`Worker`)."""

    def __init__(self, dtype: torch.dtype, most: int) -> None:
        self.dtype, self.device, self.most = dtype, torch.device("cuda"), most
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # with TF32 on, dispatch leaves fp32 to the library: nothing to tune

    def reach(self) -> None:
        """Wait until the GPU answers."""
        torch.zeros(1, device=self.device).item()

    def tune(self, problem: ConvProblem, pass_: str, role: Role, dz_on_load: bool) -> tuple[Measurement, str]:
        """Return (Measurement, text to print) of one problem. `dz_on_load` is as in `our_pairs`."""
        if pass_ == "chain":
            return tune_chain(problem, self.dtype, self.device)
        return tune(problem, pass_, role, self.dtype, self.device, self.most, dz_on_load)


def compile_candidates(
    missing: Sequence[Task],
    dtype: torch.dtype,
    device: torch.device,
    most: int,
    processes: int,
) -> bool:
    """Compile all candidate tiles that will be measured, and return whether none is left to compile. The chain has no
    candidates and is not compiled here."""
    start = time.monotonic()
    tasks: list[precompile.Task] = [
        (compile_candidate, (problem, pair.engines, pass_, role, dtype, tile))
        for pass_, problem, role in missing
        if pass_ != "chain"
        for dz in ((True, False) if pass_ == "wgrad" and role.summed else (dispatch.bn_backward_on_load(problem),))
        for pair, number in zip(our_pairs(problem, pass_, role, dtype, device, dz), numbers(pass_, most), strict=False)
        for tile in candidates(pair, pass_, role, dtype, device, number)
    ]
    for pass_, problem, role in missing:
        if over_images(pass_, problem):
            packed = packed_pair(our_pairs(problem, pass_, role, dtype, device, True)[0])
            found = stem_candidates(problem, pass_, dtype, device, most)
            tasks += [(compile_candidate, (problem, packed.engines, pass_, role, dtype, tile)) for tile in found]
    failed = precompile.compile_all(tasks, processes)
    print(f"{len(tasks)} candidates compiled in {time.monotonic() - start:.0f} s by {processes} processes", flush=True)
    for text in failed:
        print(f"      {text}", flush=True)
    return processes > 1 and not failed


def measure(
    tasks: Sequence[Task],
    table: tables.Table,
    save: Callable[[], None],
    dtype: torch.dtype,
    most: int,
    patience: float,
    end: float,
) -> None:
    """Measure the tasks one after the other and put the results into the table. No task starts after `end`, a time of
    `time.monotonic`.

    The table is saved before each task, with the task marked as unfinished, and after it. If a task raises an error,
    its entry becomes what it was before, or is removed if it was unfinished. Raises WorkerLost if a new process can't
    reach the GPU.
    """
    with ExitStack() as stack:
        worker: Worker | None = None
        for i, (pass_, problem, role) in enumerate(tasks):
            if time.monotonic() > end:
                print(f"{len(tasks) - i} problems left: run the same command again")
                return
            if worker is None:
                worker = stack.enter_context(Worker(Tuner, dtype, most))
                worker.ask("reach", seconds=START)
            key, title = (pass_, problem, dtype), f"{pass_:5} {name(problem):28}"
            before, table[key] = table.get(key), Measurement("cudnn", None, note=tables.UNFINISHED)
            save()
            try:
                dz = dz_on_load(table, pass_, problem, dtype)
                table[key], text = worker.ask("tune", problem, pass_, role, dz, seconds=patience)
            except WorkerLost as error:
                worker = None
                table[key], text = Measurement("cudnn", None, note=error.verdict), f"{title} left to cuDNN: {error}"
            except Exception as error:  # out of memory, or a chain that this GPU can't run
                text = f"{title} not measured: {first_line(error)}"
                if before is None or before.note == tables.UNFINISHED:
                    del table[key]
                else:
                    table[key] = before
            save()
            print(text, flush=True)


def merge(file: Path) -> str:
    """Merge a table's finished measurements into the shipped table of its GPU and return a line that says how many.
    Raises ValueError if the file is not a table."""
    gpu, measured = tables.read_table_of(file)
    shipped = tables.table_file(gpu.name, tables.SHIPPED)
    new = {key: found for key, found in measured.items() if found.note != tables.UNFINISHED}
    tables.write_table(tables.read_table(shipped) | new, shipped, gpu)
    return f"{len(new)} problems of {file} are now in {shipped}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", choices=("18", "34", "50", "101", "152", "all"), default="50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images; default: 224")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--pass", dest="passes", action="append", choices=TUNED, help="default: all of them")
    of_tiles = "candidate tiles per problem, and in inference the same number with splits; default: 6"
    parser.add_argument("--tiles", type=int, default=6, help=of_tiles)
    parser.add_argument(
        "--seconds", type=float, default=460, help="start no problem after this many seconds; default: 460"
    )
    parser.add_argument(
        "--jobs", type=int, default=precompile.cpus(), help="number of processes that compile; default: number of CPUs"
    )
    patience = (
        f"seconds one problem may take; default: {PATIENCE}, or {COMPILING} if candidates are still to be compiled"
    )
    parser.add_argument("--patience", type=float, help=patience)
    parser.add_argument(
        "--ship", action="store_true", help="write to kernels/tables/ instead of the user's cache folder"
    )
    parser.add_argument("--merge", type=Path, metavar="FILE", help="merge a table into kernels/tables/ and exit")
    parser.add_argument("--again", action="store_true", help="also measure problems that the table already has")
    options = parser.parse_args(arguments)
    if options.merge:
        try:
            print(merge(options.merge))
        except (OSError, ValueError) as error:
            parser.error(str(error))
        return 0
    if not torch.cuda.is_available():
        parser.error("tuning needs a CUDA GPU, and torch sees none")
    device, dtype = torch.device("cuda"), DTYPES[options.dtype]
    gpu = gpu_of(device)
    path = tables.table_file(gpu.name, tables.SHIPPED if options.ship else None)
    table = tables.read_table(path)
    depths = (18, 34, 50, 101, 152) if options.depth == "all" else (int(options.depth),)
    found = layers.problems(depths, options.batch, options.size)
    todo = [
        (pass_, problem, role)
        for pass_ in options.passes or TUNED
        for problem, (_, role) in found.items()
        if (chained(problem, role) if pass_ == "chain" else layers.applicable(problem, pass_))
    ]
    notes = {one: table[key].note if (key := (*one[:2], dtype)) in table else None for one in todo}
    missing = [one for one, note in notes.items() if options.again or note in (None, tables.UNFINISHED)]
    missing.sort(key=lambda one: bool(notes[one]))
    print(f"{len(missing)} of {len(todo)} problems to measure; table {path}", flush=True)
    end = time.monotonic() + options.seconds
    compiled = compile_candidates(missing, dtype, device, options.tiles, options.jobs)
    limit = options.patience or (PATIENCE if compiled else COMPILING)
    try:
        save = partial(tables.write_table, table, path, gpu)
        measure(missing, table, save, dtype, options.tiles, limit, end)
    except WorkerLost as error:
        print(f"no process reaches the GPU: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
