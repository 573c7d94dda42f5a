"""Time every convolution of a net on its own: our kernels, cuDNN's, and the roofline.

    python bench/kernels.py --depth 50 --batch 256 --csv out/kernels-50.csv

Prints a line for each distinct layer and pass: microseconds, TFLOP/s and GB/s of our kernel, its share of the roofline,
and how many times faster it is than the library at the same work. That work is what the net does around the layer in
its most frequent role (bench/layers.py). In training the library's side is cuDNN's convolution plus our memory-bound
kernels, as with `fastres.backend("cudnn")`; in inference it is cuDNN's fused convolution where cuDNN has one. Needs a
CUDA GPU. Two options run anywhere: --roofline prints only each layer's lower bound, and --losses FILE prints the ten
layers of a written table that are furthest from it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import layers
import torch
from layers import DTYPES, PASSES, Role, name

import fastres
from fastres.kernels.problem import H200, ConvProblem

COLUMNS = ("pass", "layer", "role", "count", "us", "tflops", "gbs", "roofline", "cudnn_us", "speedup", "winner")


def floor_us(problem: ConvProblem, pass_: str, dtype: torch.dtype, role: Role) -> float:
    """Return the lower bound on an H200: the longer of compute and memory time."""
    moved = layers.moved_bytes(problem, pass_, dtype.itemsize, role)
    return max(problem.roofline_us(dtype.itemsize), 1e6 * moved / H200.bandwidth)


def row(
    problem: ConvProblem, count: int, role: Role, pass_: str, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Measure one line of the table."""
    operands = layers.Operands.random(problem, dtype, device)
    times, stores = {}, {}
    for backend in ("triton", "cudnn"):
        with fastres.backend(backend):
            pair = layers.pair(problem, dtype, device)
        times[backend] = layers.microseconds(layers.call(pair, pass_, operands, role))
        stores[backend] = layers.stores_dz(pair, role, operands)
    if pass_ in ("dgrad", "wgrad") and stores["cudnn"] and not stores["triton"]:
        times["cudnn"] += layers.half_of_dz(pair, operands)
    us = times["triton"]
    return {
        "pass": pass_,
        "layer": name(problem),
        "role": role.place,
        "count": count,
        "us": us,
        "tflops": 2e-6 * problem.multiply_adds / us,
        "gbs": 1e-3 * layers.moved_bytes(problem, pass_, dtype.itemsize, role) / us,
        "roofline": floor_us(problem, pass_, dtype, role) / us,
        "cudnn_us": times["cudnn"],
        "speedup": times["cudnn"] / us,
        "winner": "triton" if us <= times["cudnn"] else "cudnn",
    }


def line(values: dict[str, Any]) -> str:
    """Return a measured line as text."""
    return (
        f"{values['pass']:6} {values['layer']:28} {values['role']:7} x{values['count']:<3} {values['us']:9.1f} us "
        f"{values['tflops']:7.1f} TFLOP/s {values['gbs']:7.0f} GB/s {100 * values['roofline']:5.0f} % of roofline "
        f"{values['speedup']:6.2f} x cuDNN"
    )


def totals(rows: list[dict[str, Any]]) -> str:
    """Return a line for each pass: in how many layers our kernel is faster, the time that these layers take in a step
    as a share of all layers' if each has the faster engine, and all layers' time by our kernels and by cuDNN alone."""
    lines = []
    for pass_ in dict.fromkeys(r["pass"] for r in rows):
        of_pass = [r for r in rows if r["pass"] == pass_]
        won = [r for r in of_pass if r["winner"] == "triton"]
        best = sum(r["count"] * min(r["us"], r["cudnn_us"]) for r in of_pass)
        share = sum(r["count"] * r["us"] for r in won) / best
        lines.append(
            f"{pass_:6} ours win {len(won)} of {len(of_pass)} layers, {100 * share:.0f} % of the time after dispatch; "
            f"all layers: {best / 1e3:.2f} ms after dispatch, "
            f"{sum(r['count'] * r['us'] for r in of_pass) / 1e3:.2f} ms ours alone, "
            f"{sum(r['count'] * r['cudnn_us'] for r in of_pass) / 1e3:.2f} ms cuDNN"
        )
    return "\n".join(lines)


def losses(rows: list[dict[str, Any]]) -> str:
    """Return the ten lines that lose most time to their lower bounds in a step of the net, each with the faster of our
    kernel and the library's."""

    def lost(r: dict[str, Any]) -> float:
        us, theirs = float(r["us"]), float(r["cudnn_us"])
        return int(r["count"]) * (min(us, theirs) - float(r["roofline"]) * us)

    return "\n".join(
        f"{lost(r):9.1f} us  {r['pass']:6} {r['layer']:28} {r['role']:7} x{r['count']:<3} {r['winner']}"
        for r in sorted(rows, key=lost, reverse=True)[:10]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), default=50)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images; default: 224")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--pass", dest="passes", action="append", choices=PASSES, help="default: all of them")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    parser.add_argument("--roofline", action="store_true", help="print each layer's lower bound on an H200, and exit")
    parser.add_argument(
        "--losses", type=Path, metavar="FILE", help="print the ten largest losses in a table that --csv wrote, and exit"
    )
    options = parser.parse_args(arguments)
    if options.losses:
        with options.losses.open(newline="") as source:
            print(losses(list(csv.DictReader(source))))
        return 0
    dtype, passes = DTYPES[options.dtype], options.passes or PASSES
    found = layers.problems([options.depth], options.batch, options.size)
    work = [(p, *found[p], pass_) for pass_ in passes for p in found if layers.applicable(p, pass_)]
    if options.roofline:
        for problem, count, role, pass_ in work:
            us = floor_us(problem, pass_, dtype, role)
            print(f"{pass_:6} {name(problem):28} {role.place:7} x{count:<3} {us:9.1f} us")
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU; --roofline prints every layer's lower bound without one")
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    print(f"ResNet-{options.depth}, batch {options.batch}, {options.dtype}, {torch.cuda.get_device_name()}", flush=True)
    rows = []
    for problem, count, role, pass_ in work:
        rows.append(row(problem, count, role, pass_, dtype, device))
        print(line(rows[-1]), flush=True)
        if options.csv:
            layers.write_csv(options.csv, COLUMNS, rows)
    print(f"{totals(rows)}\ntime lost to the lower bound in a step:\n{losses(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
