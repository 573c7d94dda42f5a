"""A training step, or a part of one, in a CUDA graph: the host launches it whole instead of kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UPS = 3  # calls before the recording: libraries choose algorithms and allocate workspaces, which a capture forbids


class Graph:
    """A function with a backward pass in it, captured in a CUDA graph and replayed on inputs of the same shapes.

    function: of `inputs`, without anything that waits for the GPU, as a BatchNorm with momentum=None does; under
    autocast with cache_enabled=False, because a cached cast would outlive the memory that a graph owns. It runs
    `WARM_UPS` times and is recorded once. touched: tensors that a call changes and that live on; all of this leaves
    them as they were, even where it fails, but not the gradients: those are the caller's to zero. What a call returns
    is overwritten by the next one.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], touched: Sequence[Tensor]
    ) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        before = [tensor.detach().clone() for tensor in touched]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):  # around the capture as well: one that fails doesn't leave its stream
                for _ in range(WARM_UPS):
                    function(*self.inputs)
                # On the stream where autograd's accumulators have been, should any live on. The default mode, "global",
                # fails when another thread allocates pinned memory, as a loader's does.
                with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                    self.result = function(*self.inputs)
        finally:
            torch.cuda.current_stream().wait_stream(side)
            with torch.no_grad():
                torch._foreach_copy_(list(touched), before)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.result
