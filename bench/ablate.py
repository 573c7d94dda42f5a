"""Measure the effect of each fusion on a training step: each is switched on its own and compared with the defaults and
with stock PyTorch.

In every row the whole step is in one CUDA graph. If kernels were launched one by one, the host would limit most rows.

    python bench/ablate.py --depth 50 --json out/ablate-50.json

Each row has images per second, their ratio to those of the defaults, and the memory per image that PyTorch reserves,
the graph's included. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import backends
import measure
import record
import run
import torch
from backends import BACKENDS, Case

import fastres
from fastres.ops import dispatch

ROWS = {
    "the defaults": {},
    **{
        f"without {field.name}" if field.default else f"with {field.name}": {field.name: not field.default}
        for field in fields(dispatch.Fusions)
    },
}


@contextlib.contextmanager
def setting(name: str) -> Iterator[None]:
    """Apply the settings of the row called `name` within the context."""
    with contextlib.ExitStack() as stack:
        if name in ROWS:
            stack.enter_context(dispatch.fusions(**ROWS[name]))
        elif name == "library convolutions, fused passes between":
            stack.enter_context(fastres.backend("cudnn"))
        yield


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=backends.DEPTHS, default=50)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--seconds", type=float, default=10, help="timed seconds per row; default: 10")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: without one, fastres runs no fused training step to measure")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options.dtype]
    case = Case(f"resnet{options.depth}", "train", options.batch, dtype, options.size, torch.device("cuda"))
    torch.backends.cudnn.benchmark = True
    try:
        data = measure.prepare(case, run.weights(case.net, case.size), run.inputs(case.batch, case.size), run.SEED)
    except torch.OutOfMemoryError as error:
        parser.error(f"a training step of this size runs out of memory: {measure.first_line(error)}")
    rows: list[dict[str, Any]] = []
    document = {"created": record.now(), "code": record.code(), "environment": record.environment(case.device)}
    document |= {"schema": "fastres.ablation/1", "options": {key: str(value) for key, value in vars(options).items()}}
    names = [*ROWS, "library convolutions, fused passes between", "stock PyTorch, channels_last"]
    for name in names:
        backend = BACKENDS["eager-graph" if name.startswith("stock") else "fastres-graph"]
        with setting(name):
            found = measure.measure(
                replace(backend), case, data, options.seconds, run.cost(case.net, options.size).multiply_adds
            )
        rows.append({"row": name, **found})
        print(line(rows[-1], rows[0], options.batch), flush=True)
        if options.json:
            record.write(document | {"rows": rows}, options.json)
    return 0


def line(row: dict[str, Any], first: dict[str, Any], batch: int) -> str:
    """Return a row as text, with its ratio to the row `first`."""
    if row["status"] != "ok" or first["status"] != "ok":
        return f"{row['row']:44} {row['status']}: {row.get('reason', 'nothing to compare with')}"
    return (
        f"{row['row']:44} {row['img_s']:9.0f} img/s  x {row['img_s'] / first['img_s']:5.2f}  "
        f"{row['peak_reserved_mib'] / batch:7.2f} MiB/img  {row.get('path', '')}"
    )


if __name__ == "__main__":
    sys.exit(main())
