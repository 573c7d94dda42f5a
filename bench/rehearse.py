"""Rehearse a script of bench/ that measures on a GPU, on a machine without one. Nothing it writes is a measurement.

    FASTRES_CACHE_DIR=out/rehearsal/cache python bench/rehearse.py bench/tune.py --batch 1 --size 32 --tiles 1

It simulates an H200 that is called "rehearsal", which is also the name of the table of tiles that is written for it.
Tensors are in CPU memory. Kernels are compiled for an H200 and launched against a stub driver that runs nothing
(tests/helpers/stub_cuda.py), so every result counts as right. The library's convolutions run on the CPU. Nothing is
timed: each reported time is a little shorter than the one before.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

TESTS = Path(__file__).resolve().parent.parent / "tests" / "helpers"
NAME = "rehearsal"


class CPUInstead:
    """Stands in for the module torch in a script and replaces the device "cuda" by the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(name: str) -> torch.device:
        return torch.device("cpu" if name.startswith("cuda") else name)


def stand_in(script: ModuleType) -> Any:
    """Put all stand-ins in place for the lifetime of this process. The returned object must be kept alive as long."""
    sys.path.append(str(TESTS))
    import layers
    import stub_cuda

    from fastres.kernels import checks, fprop, stem
    from fastres.ops import dispatch

    driver = stub_cuda.driver()
    driver.__enter__()
    for question, answer in {
        "is_available": True,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "synchronize": None,
    }.items():
        setattr(torch.cuda, question, lambda *_, answer=answer: answer)
    checks.INTERPRETER = checks.H200._replace(name=NAME)  # the GPU reported for tensors in CPU memory
    for module in (fprop, stem):
        module.check_device = lambda *_: None
    dispatch._kernel_less = lambda device: None
    dispatch.passes_engine = lambda *_: "triton"
    times = itertools.count(1000)

    def microseconds(work: Callable[[], Any]) -> float:
        work()
        return 1e6 / next(times)

    layers.microseconds = microseconds
    script.torch = CPUInstead()
    for check in {"right", "agrees"} & vars(script).keys():
        setattr(script, check, lambda *_: True)
    return driver


# Processes that the script starts import this file as well, and get the same stand-ins.
sys.path.insert(0, str(Path(__file__).parent))
script = importlib.import_module(Path(sys.argv[1]).stem)
alive = stand_in(script)

if __name__ == "__main__":
    print(f"{NAME}: no GPU, nothing measured", flush=True)
    sys.exit(script.main(sys.argv[2:]))
