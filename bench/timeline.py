"""Show where a step's time on the GPU goes, kernel by kernel.

    python bench/timeline.py --backend fastres-graph --mode train
    python bench/timeline.py --backend fastres-optimize --mode infer --batch 1 --csv out/timeline.csv

Runs one backend of bench/run.py on ResNet-50 (or --net) under PyTorch's profiler. Prints for every kernel how often a
step runs it, its microseconds per step and its share; then the sum, and the time from the first kernel's start to the
last one's end. The difference between the two is time in which the GPU waits. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import backends
import layers
import measure
import torch
from run import DTYPES, SEED, inputs, weights
from torch.profiler import ProfilerActivity, profile

from fastres.models import families

COLUMNS = ("kernel", "calls", "us", "share")
STEPS = 3  # number of profiled steps, which follow the same number of warm-up steps


@contextmanager
def running(backend: backends.Backend, case: backends.Case) -> Iterator[Callable[[int], Any]]:
    """Yield the step of `case` as bench/run.py runs it, a function of the number of its batch."""
    torch.backends.cudnn.benchmark = True
    batches = inputs(case.batch, case.size)
    generator = torch.Generator().manual_seed(SEED)
    labels = [torch.randint(10, (case.batch,), generator=generator) for _ in batches]
    with backend.isolated(case.device):
        yield measure.STEPS[case.mode](backend, case, measure.Data(weights(case.net, case.size), batches, labels))


def kernels(step: Any) -> tuple[dict[str, tuple[float, float]], float]:
    """Return a dict name -> (calls, microseconds) per step, and the microseconds per step from first start to last
    end."""
    for i in range(STEPS):
        step(i)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(STEPS):
            step(i)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    start, end = float("inf"), 0.0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name].append(event.device_time_total)
            start, end = min(start, event.time_range.start), max(end, event.time_range.end)
    return {name: (len(us) / STEPS, sum(us) / STEPS) for name, us in times.items()}, (end - start) / STEPS


def short(name: str) -> str:
    """Return a kernel's name without template arguments and parameters."""
    while (bare := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = bare
    return re.sub(r"^void ", "", name)[:90]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--mode", choices=backends.MODES, default="train")
    parser.add_argument("--backend", choices=backends.BACKENDS, default="fastres-graph")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: this script measures its time")
    size = families.usual_size(options.net)
    device = torch.device("cuda", torch.cuda.current_device())
    case = backends.Case(options.net, options.mode, options.batch, DTYPES[options.dtype], size, device)
    backend = backends.BACKENDS[options.backend]
    if reason := backend.why_not(case):
        parser.error(f"backend {options.backend!r} can't run this: {reason}")
    with running(backend, case) as step:
        found, span = kernels(step)
    total = sum(us for _, us in found.values())
    rows = [
        {"kernel": short(name), "calls": calls, "us": round(us, 1), "share": round(us / total, 4)}
        for name, (calls, us) in sorted(found.items(), key=lambda item: -item[1][1])
    ]
    print(f"{options.net}, {options.mode}, {options.backend}, batch {options.batch}, {torch.cuda.get_device_name()}")
    for row in rows:
        print(f"{row['us']:9.1f} us {100 * row['share']:5.1f} % {row['calls']:6.1f} x  {row['kernel']}")
    print(f"{total:9.1f} us in kernels, {span:.1f} us from the first one's start to the last one's end")
    if options.csv:
        layers.write_csv(options.csv, COLUMNS, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
