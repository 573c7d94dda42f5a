"""Run an object in its own process, which may hang, die or lose its CUDA context without harming the process that asks.

with Worker(Row, "inductor", case) as row:    # starts the process
    try:
        row.ask("prepare", seconds=300)       # makes Row("inductor", case) there, calls its `prepare`
    except WorkerLost as error:               # the process is gone as well
        print(error)
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class WorkerLost(RuntimeError):
    """The worker's process is gone. `verdict` is "hung" (no answer in time, so it was killed), "died" or "lost the CUDA
    context"."""

    def __init__(self, verdict: str, said: str) -> None:
        super().__init__(said)
        self.verdict = verdict


class Worker:
    """An object in a new process, which starts immediately. The first `ask` makes the object: `make(*arguments)`.

    `make`, all arguments and all results must be picklable. On Linux the process is killed when the thread that started
    it ends. `close` ends the process; a `with` statement calls it at its end.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")  # CUDA doesn't survive a fork
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments))
        self._process.start()
        there.close()
        self._gone: WorkerLost | None = None

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """Call `method` in the process and return its result.

        Raises what the method raised, or `WorkerLost` if the process dies, loses its CUDA context or gives no answer
        within `seconds`. All later calls then raise the same `WorkerLost`. The first call's time includes starting the
        process.
        """
        if self._gone is not None:
            raise self._gone
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(seconds):
                self._process.kill()
                raise self._end("hung", f"no answer within {seconds:.0f} s, so its process was killed")
            said, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            raise self._end("died", f"its process ended (exit status {self._process.exitcode})") from None
        if said == "lost":
            raise self._end("lost the CUDA context", f"its process lost the CUDA context and ended: {answer}")
        if said == "raised":
            raise answer
        return answer

    def _end(self, verdict: str, said: str) -> WorkerLost:
        """End the process and return the error that every later `ask` raises."""
        self.close()
        self._gone = WorkerLost(verdict, said)
        return self._gone

    def leave(self) -> None:
        """Close the connection, which makes the process exit, and don't wait for that."""
        self._connection.close()

    def close(self) -> None:
        """End the process: kill it if it doesn't exit within 5 seconds."""
        self.leave()
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join(timeout=10)  # a hanging driver can delay even a killed process

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class LocalWorker:
    """The interface of `Worker` in this process, without a time limit or isolation."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._make = partial(make, *arguments)
        self._served: Any = None

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """Call `method` of the object, which the first call makes, and return its result. `seconds` is ignored."""
        self._served = self._make() if self._served is None else self._served
        return getattr(self._served, method)(*arguments)

    def leave(self) -> None:
        """Do nothing: the object stays until `close`."""

    def close(self) -> None:
        """Call the object's own `close`, if it has one, and drop the object."""
        served, self._served = self._served, None
        if hasattr(served, "close"):
            served.close()

    def __enter__(self) -> LocalWorker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Make the object and answer calls until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    if sys.platform == "linux":  # if the parent is killed, a hanging kernel must not keep the GPU
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    served = None
    while True:
        try:
            method, arguments_of_call = connection.recv()
        except EOFError:
            return
        try:
            served = make(*arguments) if served is None else served
            reply = "answered", getattr(served, method)(*arguments_of_call)
        except Exception as error:
            traceback.print_exc()  # the parent gets the error without its traceback
            reply = "raised", _portable(error)
        if (lost := lost_context()) is not None:
            connection.send(("lost", f"{reply[1]!r}" if reply[0] == "raised" else lost))
            os._exit(1)  # skips destructors, which would wait for the GPU
        connection.send(reply)
        del reply  # an exception's causes would keep tensors alive


def lost_context() -> str | None:
    """Return CUDA's error message if this process has lost its context, else None."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).strip().partition("\n")[0]
    return None


def _portable(error: Exception) -> Exception:
    """Return the error without its traceback, or a RuntimeError with its type and text if it can't be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error.with_traceback(None)
