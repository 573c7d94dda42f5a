"""An object in a process of its own: it may hang, die or lose its CUDA context, and whoever asks it goes on.

with Apart(Row, "inductor", case) as row:       # Row("inductor", case), made there
    try:
        row.ask("prepare", seconds=300)         # its method `prepare`, called there
    except Gone as error:                       # and so is the process
        print(error)
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class Gone(RuntimeError):
    """The process is no more: it gave no answer in time and was killed, it died, or it lost its CUDA context."""


class Apart:
    """`make(*arguments)`, made in a fresh process, which starts at once. Both must pickle.

    A context manager; its end, like `close`, ends the process.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")  # CUDA doesn't survive a fork
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, arguments), daemon=True)
        self._process.start()
        there.close()

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """What the object's method answers within `seconds`, of which the first call's hold the process's start, too.

        Raises what the method raised, or `Gone`; after that every call does.
        """
        try:
            self._connection.send((method, arguments))
            if not self._connection.poll(seconds):
                self._process.kill()
                self.close()
                raise Gone(f"no answer within {seconds:.0f} s, so its process was killed")
            said, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            code = self._process.exitcode
            self.close()
            raise Gone(f"its process ended (exit status {code})") from None
        if said == "lost":
            self.close()
            raise Gone(f"it lost the CUDA context, and with it its process: {answer}")
        if said == "raised":
            raise answer
        return answer

    def close(self) -> None:
        """End the process: it goes by itself when nobody asks any more, or is killed if it doesn't."""
        self._connection.close()
        self._process.join(timeout=5)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Here:
    """What `Apart` does, in this process: nothing is limited, and what goes wrong goes wrong for all."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._make = partial(make, *arguments)
        self._served: Any = None

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        self._served = self._make() if self._served is None else self._served
        return getattr(self._served, method)(*arguments)

    def close(self) -> None:
        """Let go of the object, by its own `close` if it has one."""
        served, self._served = self._served, None
        if hasattr(served, "close"):
            served.close()

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Answer questions until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the asking process ends this one
    if sys.platform == "linux":  # if that one is killed, a kernel that hangs must not keep the GPU
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    served = None
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        try:
            served = make(*arguments) if served is None else served
            said, answer = "answered", getattr(served, method)(*given)
        except Exception as error:
            said, answer = "raised", _portable(error)
        if (lost := lost_context()) is not None:
            connection.send(("lost", f"{answer!r}" if said == "raised" else lost))
            os._exit(1)  # without destructors, which would wait for the GPU
        connection.send((said, answer))


def lost_context() -> str | None:
    """What CUDA says where nothing runs on the GPU in this process any more; None where all is well."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return str(error).strip().partition("\n")[0]
    return None


def _portable(error: Exception) -> Exception:
    """The error, or one with its words where it can't be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error.with_traceback(None)
