"""A second CUDA stream for work whose result nobody needs at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """Calls on a second stream, beside what is launched on the current one meanwhile.

    A call comes after all that was launched before it. The current stream waits for it in the next call and in `join`,
    before which nobody may use its result: so one call at a time is under way, and what it reads lives no longer than
    that. In a CUDA graph the calls are a branch. Where `torch.backends.cudnn.benchmark` is on, algorithms that are
    timed within a call are timed beside other work.
    """

    def __init__(self, device: torch.device) -> None:
        self.main = torch.cuda.current_stream(device)
        self.second = _second(self.main)
        self.read: tuple[Any, ...] | None = None

    @staticmethod
    def serves(device: torch.device) -> bool:
        """True where there are streams."""
        return device.type == "cuda"

    def __call__(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        self.join()
        self.read = arguments  # freed, their memory would at once be the current stream's to use again
        self.second.wait_stream(self.main)
        with torch.cuda.stream(self.second):
            result = function(*arguments)
        result.record_stream(self.main)  # freed, its memory is the second stream's
        return result

    def join(self) -> None:
        """What is launched on the current stream from here on comes after the calls."""
        if self.read is not None:
            self.main.wait_stream(self.second)
            self.read = None


@cache
def _second(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each stream: where that is captured, this one is, too. PyTorch takes streams in turn from a pool, where
    `main` may be from."""
    one, other = torch.cuda.Stream(main.device), torch.cuda.Stream(main.device)
    return other if one == main else one
