"""This process among those of a training, and the signals that end one."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """This process among those of the training."""

    rank: int
    world: int
    device: torch.device


class PeerError(ConnectionError):
    """Another process of the group has ended, or can't be reached."""


def device_named(name: str | None) -> torch.device:
    """None: a GPU where there is one, else the CPU. Raises ValueError for what is no device's name."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} does not exist: cpu, cuda and cuda:<number> are accepted") from error


@contextmanager
def place(device: str | None) -> Iterator[Place]:
    """One process, or torchrun's, whose process group is up inside: NCCL on GPUs, gloo elsewhere.

    Raises ValueError for a device that isn't there, PeerError when gloo loses another process.
    """
    chosen = device_named(device)
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device {device} is not there: this machine trains on {'cuda or ' * torch.cuda.is_available()}cpu"
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
    if chosen.type == "cuda" and (chosen.index is None or world > 1):
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        yield Place(0, 1, chosen)
        return
    if chosen.type == "cuda":
        dist.init_process_group("nccl", device_id=chosen)
    else:
        dist.init_process_group("gloo")
    try:
        yield Place(dist.get_rank(), world, chosen)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, RuntimeError) and "gloo/transport" in str(error):
            said = str(error).partition("] ")[2]
            raise PeerError(f"another process has ended, whose last words say why ({said})") from error
        raise
    finally:
        gc.collect()  # a DistributedDataParallel that outlives its process group can hang when it is freed
        dist.destroy_process_group()


@torch.no_grad()
def average(parameters: Iterable[Tensor]) -> None:
    """Each parameter's gradient becomes its mean over all processes, as DistributedDataParallel makes it.

    All processes call it with the same parameters in the same order. Raises RuntimeError, before anything is sent,
    where a parameter that wants a gradient has none: another process may have one.
    """
    wanting = [p for p in parameters if p.requires_grad]
    gradients = [p.grad for p in wanting if p.grad is not None]
    if len(gradients) < len(wanting):
        raise RuntimeError(f"{len(wanting) - len(gradients)} of {len(wanting)} parameters have no gradient to average")
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size())
    dist.all_reduce(flat)
    means = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(means, gradients, strict=True)])


def usable_cpus() -> int:
    """CPUs for each of the processes on this machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Clock:
    """Seconds of a training: all of them, of the processes before a resumption as well, and those spent training."""

    def __init__(self, before: float = 0.0) -> None:
        """before: what earlier processes took."""
        self.before = before
        self._began: float | None = None
        self._paused = 0.0
        self._pause: float | None = None  # when the present one began

    def start(self) -> None:
        self._began = time.perf_counter()

    def total(self) -> float:
        return self.before + self._running()

    def training(self) -> float:
        """Of this process, without what runs inside `pause`."""
        return (self._running() if self._pause is None else self._pause) - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        began = self._pause = self._running()
        try:
            yield
        finally:
            self._pause = None
            self._paused += self._running() - began

    def _running(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began


class Signals:
    """SIGTERM and Ctrl-C as a wish that the loop grants after its iteration.

    A second Ctrl-C ends the process at once; a second SIGTERM does not: torchrun sends one to processes still saving.
    One that comes when no iteration is left is delivered again in the end, so that `experiment` stops there as well.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # not print: a handler may run in the midst of one
                    os.write(2, b"\nCtrl-C: saves a checkpoint after this iteration; once more ends at once\n")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # the only one that may set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._restore()
        if self.received and kind is None:
            signal.raise_signal(self.received)
