"""Measures every tile of every convolution of a net and writes this GPU's table, which dispatch and kernels follow.

    python bench/tune.py --depth 50 --batch 256             # into the user's cache folder
    python bench/tune.py --depth all --batch 256 --ship     # into kernels/tables/, to be committed

Per problem and pass: the candidates of `fastres.kernels.config` that agree with cuDNN's result are timed; the best is
set against cuDNN with our pointwise kernels around it, and the faster of the two is the winner. All candidates are
compiled first, by as many processes as there are CPUs. The table is rewritten after every problem; a second run goes on
with what is missing (--again measures anew). Where a kernel breaks the CUDA context, the library wins that problem and
the rest is measured by a fresh process. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import layers
import precompile
import torch
from layers import DTYPES, PASSES, Operands, name
from torch import Tensor

import fastres
from fastres.kernels import config
from fastres.kernels.bottleneck import bottleneck_chain
from fastres.kernels.config import Measurement, Tile
from fastres.kernels.conv import conv_fprop
from fastres.kernels.dgrad import conv_dgrad
from fastres.kernels.launch import gpu_of, tma_refusal
from fastres.kernels.problem import ConvProblem
from fastres.kernels.stem import stem_refusal
from fastres.kernels.wgrad import conv_wgrad
from fastres.ops import steps

TUNED = (*PASSES, "chain")  # the chain last: what it is set against is then tuned
SHIPPED = Path(config.__file__).parent / "tables"


def candidates(problem: ConvProblem, pass_: str, dtype: torch.dtype, device: torch.device, most: int) -> list[Tile]:
    """The `most` most promising tiles, by TMA where it can carry the operands, and by pointers."""
    gpu = gpu_of(device)
    tiles: list[Tile] = []
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    carried = hopper and tma_refusal(problem, torch.empty(0, dtype=dtype, device="meta")) is None
    for tma in (True, False) if carried else (False,):
        if pass_ in ("infer", "fprop"):
            computed = pass_ == "fprop" and problem.C >= 8
            tiles += config.fprop_tiles(problem, dtype.itemsize, tma, gpu, computed=computed)[:most]
        elif pass_ == "dgrad":
            tiles += config.dgrad_tiles(problem, dtype.itemsize, tma, gpu, operands=2, epilogue=1)[:most]
        else:
            tiles += config.wgrad_tiles(problem, dtype.itemsize, tma, gpu, operands=2, prologue=problem.C >= 8)[:most]
    return tiles


def compile_candidate(problem: ConvProblem, pass_: str, dtype: torch.dtype, tile: Tile) -> None:
    """What `ours` launches, for `precompile`."""
    ours(problem, pass_, Operands.random(problem, dtype, torch.device("meta")), tile)()


def ours(problem: ConvProblem, pass_: str, operands: Operands, tile: Tile) -> Callable[[], Any]:
    """The pass on our kernel with one tile, fused as training uses it."""
    p, o = problem, operands
    sizes: dict[str, Any] = {"stride": p.stride, "pad": p.pad, "dilation": p.dilation, "groups": p.groups, "tile": tile}
    prologue = None if p.C < 8 else o.a_affine
    if pass_ == "infer":
        scale, shift = o.out_affine
        return lambda: conv_fprop(o.x, o.w, scale=scale, shift=shift, relu=True, **sizes)
    if pass_ == "fprop":
        return lambda: conv_fprop(o.x, o.w, prologue=prologue, statistics=True, **sizes)
    if pass_ == "dgrad":
        below = {"relu_mask": o.a_affine, "norm": (o.x, o.mean)}
        return lambda: conv_dgrad(o.dz, o.w, (p.N, p.H, p.W, p.C), bn_backward=o.bn, **below, **sizes)
    shape = (p.K, p.R, p.S, p.C // p.groups)
    return lambda: conv_wgrad(o.dz, o.x, shape, bn_backward=o.bn, prologue=prologue, **sizes)


def agrees(result: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Whether two results of one pass in `dtype` differ by no more than their roundings; never true for a NaN."""
    a, b = (r if isinstance(r, Tensor) else r[0] for r in (result, expected))
    error = (torch.dist(a.double(), b.double()) / b.double().norm()).item()
    return error <= 8 * torch.finfo(dtype).eps


def ways(problem: ConvProblem, pass_: str, operands: Operands, most: int) -> Iterator[tuple[str, Tile | None, Any]]:
    """(engine, tile, work) of everything of ours that may serve."""
    for tile in candidates(problem, pass_, operands.x.dtype, operands.x.device, most):
        yield "triton", tile, ours(problem, pass_, operands, tile)
    if pass_ in ("infer", "fprop") and stem_refusal(problem) is None:
        step = layers.step(problem, operands.x.dtype, operands.x.device)
        packed = replace(step, infer_by="stem", fprop_by="stem")
        yield "stem", None, layers.call(packed, pass_, operands)


def tune(problem: ConvProblem, pass_: str, dtype: torch.dtype, device: torch.device, most: int) -> tuple[Any, str]:
    """(Measurement, line): the winner of one problem."""
    operands = Operands.random(problem, dtype, device)
    with fastres.backend("cudnn"):
        library = layers.call(layers.step(problem, dtype, device), pass_, operands)
    expected, rival = library(), layers.microseconds(library)
    if pass_ == "dgrad":  # the library's gradient still waits for the ReLU's mask
        expected = steps.gradient(expected[0], operands.x, expected[1], None)
    best, best_us, engine, failed = None, float("inf"), "triton", []
    for way, tile, work in ways(problem, pass_, operands, most):
        try:
            if not agrees(work(), expected, dtype):
                failed.append(f"{way} {tile} gives a wrong result")
                continue
            us = layers.microseconds(work)
        except Exception as error:  # a tile that this GPU cannot run is no candidate; say so and go on
            require_context(f"{way} {tile}", error)
            failed.append(f"{way} {tile}: {first_line(error)}")
            continue
        if us < best_us:
            best, best_us, engine = tile, us, way
    winner = engine if best_us < rival else "cudnn"
    lines = [f"{pass_:5} {name(problem):28} ours {best_us:9.1f} us, cuDNN {rival:9.1f} us -> {winner} {best}"]
    return Measurement(winner, best), "\n".join(lines + [f"      {text}" for text in failed])


class LostContextError(RuntimeError):
    """A kernel broke the CUDA context: nothing runs on the GPU any more in this process."""


def require_context(what: str, error: Exception) -> None:
    """Raises LostContextError if CUDA fails after `what` raised `error`."""
    try:
        torch.cuda.synchronize()
    except Exception as lost:
        raise LostContextError(f"{what}: {first_line(error)}") from lost


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"


def chained(problem: ConvProblem) -> bool:
    """Whether a bottleneck net continues this 3x3 in a way that `bottleneck_chain` serves."""
    p = problem
    return (p.R, p.stride, p.groups) == (3, 1, 1) and p.C == p.K and p.C in (64, 128)


def tune_chain(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """(Measurement, line): one kernel for a block's 3x3, its expansion and the next block's reduction, or three."""
    p = problem
    expand, reduce = (ConvProblem(p.N, p.H, p.W, c, k) for c, k in ((p.C, 4 * p.C), (4 * p.C, p.C)))
    three = [(layers.step(q, dtype, device), Operands.random(q, dtype, device)) for q in (p, expand, reduce)]
    (first, a), (second, b), (third, c) = three
    one = [torch.ones(q.K, device=device) for q in (p, expand, reduce)]
    shifts = [o.out_affine[1] for _, o in three]

    def apart() -> tuple[Tensor, Tensor]:
        hidden = first.infer(a.x, a.w, one[0], shifts[0])
        out = second.infer(hidden, b.w, one[1], shifts[1], c.x)
        return out, third.infer(out, c.w, one[2], shifts[2])

    def together() -> tuple[Tensor, Tensor]:
        return bottleneck_chain(a.x, a.w, shifts[0], b.w, shifts[1], c.x, c.w, shifts[2])

    if not all(agrees(x, y, dtype) for x, y in zip(together(), apart(), strict=True)):
        return Measurement("cudnn", None), f"chain {name(problem):28} gives a wrong result"
    ours_us, apart_us = layers.microseconds(together), layers.microseconds(apart)
    winner = "triton" if ours_us < apart_us else "cudnn"
    line = f"chain {name(problem):28} one kernel {ours_us:9.1f} us, three {apart_us:9.1f} us -> {winner}"
    return Measurement(winner, None), line


def compile_candidates(
    missing: Sequence[tuple[str, ConvProblem, torch.dtype]], device: torch.device, most: int, processes: int
) -> None:
    start = time.monotonic()
    tasks: list[precompile.Task] = [
        (compile_candidate, (problem, pass_, dtype, tile))
        for pass_, problem, dtype in missing
        if pass_ != "chain"
        for tile in candidates(problem, pass_, dtype, device, most)
    ]
    failed = precompile.compile_all(tasks, processes)
    print(f"{len(tasks)} candidates compiled in {time.monotonic() - start:.0f} s by {processes} processes", flush=True)
    for text in failed:
        print(f"      {text}", flush=True)


def start_anew(arguments: list[str] | None, seconds: float) -> None:
    """This command in a fresh process in place of this one, with so much time; what the table has is not repeated."""
    kept = [argument for argument in (sys.argv[1:] if arguments is None else arguments) if argument != "--again"]
    command = [sys.executable, __file__, *kept, "--seconds", str(max(0.0, seconds))]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", choices=("18", "34", "50", "101", "152", "all"), default="50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--pass", dest="passes", action="append", choices=TUNED, help="default: all of them")
    parser.add_argument("--tiles", type=int, default=6, help="candidates per way of loading, most promising first")
    parser.add_argument("--seconds", type=float, default=460, help="start no problem after so long")
    parser.add_argument("--jobs", type=int, default=precompile.cpus(), help="processes that compile; default: CPUs")
    parser.add_argument("--ship", action="store_true", help="write kernels/tables/ instead of the user's own folder")
    parser.add_argument("--again", action="store_true", help="measure what the table has already, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning measures on a CUDA GPU, and there is none")
    device, dtype = torch.device("cuda"), DTYPES[options.dtype]
    torch.backends.cudnn.benchmark = True
    path = config.table_file(torch.cuda.get_device_name(device), SHIPPED if options.ship else None)
    table = config.read_table(path)
    depths = (18, 34, 50, 101, 152) if options.depth == "all" else (int(options.depth),)
    todo = {
        (pass_, problem, dtype): None
        for depth in depths
        for pass_ in options.passes or TUNED
        for problem in layers.problems(depth, options.batch, options.size)
        if (chained(problem) and depth >= 50 if pass_ == "chain" else layers.applicable(problem, pass_))
    }
    missing = [key for key in todo if options.again or key not in table]
    print(f"{len(missing)} of {len(todo)} problems to measure; table {path}", flush=True)
    start = time.monotonic()
    compile_candidates(missing, device, options.tiles, options.jobs)
    for i, (pass_, problem, _) in enumerate(missing):
        if time.monotonic() - start > options.seconds:
            print(f"{len(missing) - i} problems left: run the same command again")
            break
        try:
            if pass_ == "chain":
                table[pass_, problem, dtype], text = tune_chain(problem, dtype, device)
            else:
                table[pass_, problem, dtype], text = tune(problem, pass_, dtype, device, options.tiles)
            config.write_table(table, path)
        except Exception as error:  # memory that ran out; the chain on a GPU that can't run it
            text = f"{pass_:5} {name(problem):28} not measured: {first_line(error)}"
            try:
                require_context(text, error)
            except LostContextError:
                print(f"{text}\n      the CUDA context is lost, a fresh process goes on", flush=True)
                table[pass_, problem, dtype] = Measurement("cudnn", None)
                config.write_table(table, path)
                start_anew(arguments, options.seconds - (time.monotonic() - start))
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
