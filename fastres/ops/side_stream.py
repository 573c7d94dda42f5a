"""A second CUDA stream for work whose result isn't needed immediately."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


class SideStream:
    """Runs functions on a second stream, concurrently with later launches on the current stream.

    A call starts after everything that was launched on the current stream before it. The current stream waits for the
    call in the next call or in `join`; its result must not be used earlier. So at most one call is in flight, and its
    arguments are kept alive only until then. In a CUDA graph the calls become a parallel branch. With
    `torch.backends.cudnn.benchmark`, cuDNN times the algorithms of a call while other work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.current_stream(device)
        self.second = _second(self.main)
        self.read: tuple[Any, ...] | None = None

    @staticmethod
    def serves(device: torch.device) -> bool:
        """Return whether `device` has streams, which means that it is a CUDA device."""
        return device.type == "cuda"

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return function(*arguments): a tensor, or a tuple of tensors and Nones."""
        self.join()
        self.read = arguments  # if they were freed, the current stream could reuse their memory during the call
        self.second.wait_stream(self.main)
        with torch.cuda.stream(self.second):
            result = function(*arguments)
        for tensor in result if isinstance(result, tuple) else (result,):
            if tensor is not None:
                tensor.record_stream(self.main)  # its memory belongs to the second stream's pool
        return result

    def join(self) -> None:
        """Make the current stream wait for the call in flight, if any, and release its arguments."""
        if self.read is not None:
            self.main.wait_stream(self.second)
            self.read = None


@cache
def _second(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """Return the second stream that belongs to `main`: always the same one, and never `main` itself.

    Each main stream asks for its own second stream, because capturing `main` also captures its second stream. PyTorch
    hands out streams from a pool in turn, so a new stream may be `main` itself. Two successive streams differ, so one
    of the two is not `main`.
    """
    one, other = torch.cuda.Stream(main.device), torch.cuda.Stream(main.device)
    return other if one == main else one
