"""Compile kernels before they are timed, in several processes, into Triton's cache on disk.

A launcher that is called on meta tensors binds and specialises its kernels as on real ones, so what it compiles is what
the GPU loads later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

from triton.runtime.jit import JITFunction

Task = tuple[Callable[..., Any], tuple[Any, ...]]  # a call for a process; function and arguments must be picklable


def cpus() -> int:
    """Return the number of CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


@contextmanager
def compiling() -> Iterator[None]:
    """Within the context, let `fn[grid](...)` compile for the current GPU and load the result without launching it."""
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **kwargs)._init_handles()  # this also compiles its launcher, with gcc

    with patch.object(JITFunction, "run", compile_only):
        yield


def compile_all(tasks: Sequence[Task], processes: int) -> list[str]:
    """Run every task within `compiling`, and return the error messages. With fewer than two processes, do nothing.

    Errors do no harm: a kernel that is missing is compiled when it is launched.
    """
    if not tasks or processes < 2:
        return []
    try:
        with ProcessPoolExecutor(min(processes, len(tasks)), mp_context=get_context("spawn")) as pool:
            return [error_text for error_text in pool.map(_compile, tasks, chunksize=4) if error_text is not None]
    except BrokenProcessPool as error:
        return [f"a process died while compiling: {error}"]


def _compile(task: Task) -> str | None:
    """Run one task and return its error message, or None."""
    function, arguments = task
    try:
        with compiling():
            function(*arguments)
    except Exception as error:
        return f"{function.__name__}{arguments}: {type(error).__name__}: {str(error).strip()[:200]}"
    return None
