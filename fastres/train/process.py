"""Process group, gradient averaging, timing and signal handling of a training."""

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
    """Rank, world size (number of processes) and device of this process."""

    rank: int
    world: int
    device: torch.device


class PeerError(ConnectionError):
    """Another process of the group has ended or can't be reached."""


def device_named(name: str | None) -> torch.device:
    """Return the device called `name`; for None, a GPU if there is one, else the CPU.

    Raises ValueError if torch doesn't know the name.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}; accepted: cpu, cuda and cuda:<number>") from error


@contextmanager
def place(device: str | None) -> Iterator[Place]:
    """Yield the `Place` of this process; under torchrun, with the process group initialised inside the context.

    The backend is NCCL on GPUs and gloo on CPUs. Under torchrun each process uses the GPU of its local rank, even if
    `device` names another.

    Raises ValueError if this machine doesn't have the device, and PeerError if gloo loses another process.
    """
    chosen = device_named(device)
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device {device} can't be used: this machine trains on {'cuda or ' * torch.cuda.is_available()}cpu"
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
            cause = str(error).partition("] ")[2]
            raise PeerError(f"another process has ended; its own output says why ({cause})") from error
        raise
    finally:
        gc.collect()  # a DistributedDataParallel that outlives its process group can hang when it is freed
        dist.destroy_process_group()


@torch.no_grad()
def average(parameters: Iterable[Tensor]) -> None:
    """Replace each parameter's gradient by its mean over all processes, in place, as DistributedDataParallel does.

    All processes must call it with the same parameters in the same order. Parameters without `requires_grad` are
    skipped. Raises RuntimeError, before any communication, if another parameter has no gradient.

    Equivalent to:

        for p in parameters:
            dist.all_reduce(p.grad.div_(dist.get_world_size()))
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
    """Return the number of CPUs this process may use, divided by torchrun's processes on this machine; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Clock:
    """Measures a training in seconds: its total over all resumptions, and the time this process spent training."""

    def __init__(self, before: float = 0.0) -> None:
        """Create a stopped clock. before: seconds that earlier processes of a resumed training took; may be nan."""
        self.before = before
        self._began: float | None = None
        self._paused = 0.0
        self._pause: float | None = None  # start of the current pause

    def start(self) -> None:
        self._began = time.perf_counter()

    def total(self) -> float:
        """Return the seconds of this training with pauses and earlier processes; nan if the latter are unknown."""
        return self.before + self._running()

    def training(self) -> float:
        """Return the seconds of this process, without those inside `pause`."""
        return (self._running() if self._pause is None else self._pause) - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside the context from `training`."""
        began = self._pause = self._running()
        try:
            yield
        finally:
            self._pause = None
            self._paused += self._running() - began

    def _running(self) -> float:
        return 0.0 if self._began is None else time.perf_counter() - self._began


class Signals:
    """Records SIGTERM and Ctrl-C in `received`, so that the training loop can save a checkpoint before it stops.

    A second Ctrl-C ends the process immediately. A second SIGTERM doesn't, because torchrun sends one to processes that
    are still saving. If a signal was received and the context ends without an exception, for instance because the last
    iteration was already done, the signal is raised again on exit. This also stops the `experiment` command, which
    would otherwise continue with its next training run.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: object) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
            if os.environ.get("RANK", "0") == "0":
                with suppress(OSError):  # not print, which isn't reentrant: the handler may interrupt one
                    os.write(
                        2, b"\nCtrl-C: saving a checkpoint after this iteration; press again to stop immediately\n"
                    )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._restore()
        if self.received and kind is None:
            signal.raise_signal(self.received)
