"""oneDNN on a CPU: a convolution with bias, addition and ReLU as one primitive, and a whole plan as one graph.

The operators are those that PyTorch's Inductor calls. They are internal to PyTorch, so
tests/inference/test_onednn.py pins what is used of them. oneDNN's ReLU makes 0 of NaN: give it finite inputs only.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fastres.ops.layout import Geometry, nchw, nhwc

_OVERFLOWS = (torch.float16,)  # activations of real nets leave their range: ReLU stays PyTorch's, which keeps NaN
_FUSION = threading.Lock()  # held while TorchScript's fusion by oneDNN, which all threads share, is switched
HEAP_BLOCK = 2**25 - 2**16  # bytes: almost the largest block that glibc may serve from its heap, 32 MiB


class Packings:
    """The weights of one net in the formats that oneDNN wants, one copy a format.

    The format depends on the layer, the size of its input, the number of threads and whether there are several images.
    """

    def __init__(self) -> None:
        self._by_call: dict[Any, Tensor] = {}
        self._by_format: dict[Any, Tensor] = {}
        # Convolutions in int8, by layer and the size of its input, while a plan uses them.
        self.int8: WeakValueDictionary[Any, Any] = WeakValueDictionary()

    def conv(self, name: str, w: Tensor, geometry: Geometry, x: Tensor) -> Tensor:
        """The filters w [K, R, S, C/groups] of layer `name` for x [N, H, W, C], opaque."""
        stride, pad, dilation, groups = geometry.both
        shape = list(nchw(x).shape)
        pack = torch.ops.mkldnn._reorder_convolution_weight
        return self._packed((name, *shape[1:], len(x) > 1), lambda: pack(nchw(w), pad, stride, dilation, groups, shape))

    def linear(self, name: str, w: Tensor, x: Tensor) -> Tensor:
        """The weights w [classes, features] of layer `name` for x [N, features], opaque."""
        return self._packed((name, len(x) > 1), lambda: torch.ops.mkldnn._reorder_linear_weight(w, len(x)))

    def _packed(self, call: tuple[Any, ...], pack: Callable[[], Tensor]) -> Tensor:
        key = (*call, torch.get_num_threads())
        if key not in self._by_call:
            packed = pack()
            layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
            self._by_call[key] = self._by_format.setdefault((call[0], layout), packed)
        return self._by_call[key]


def conv(
    x: Tensor, residual: Any = None, *, w: Tensor, bias: Any, geometry: Geometry, relu: bool, overwrite: bool = False
) -> Tensor:
    """[relu](conv(x, w) + bias + residual), NHWC; w from `Packings.conv`. overwrite: the result may take the residual's
    memory."""
    stride, pad, dilation, groups = geometry.both
    terms, unary = (w, bias, pad, stride, dilation, groups), "relu" if relu and x.dtype not in _OVERFLOWS else None
    if residual is None:
        y = torch.ops.mkldnn._convolution_pointwise.default(nchw(x), *terms, unary or "none", [], "")
    else:
        added = torch.ops.mkldnn._convolution_pointwise_ if overwrite else torch.ops.mkldnn._convolution_pointwise
        both = (nchw(residual), nchw(x)) if overwrite else (nchw(x), nchw(residual))
        y = added.binary(*both, *terms, "add", 1.0, unary, [], "")
    return nhwc(y.relu_() if relu and unary is None else y)


def linear(x: Tensor, *, w: Tensor, bias: Tensor | None) -> Tensor:
    """x w^T + bias [N, classes]; w from `Packings.linear`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, w, bias, "none", [], "")


@cache
def keep_heap() -> None:
    """Have the C library reuse the memory of tensors that die; once a process is enough.

    glibc maps each large block again and unmaps it when it is freed, which costs a page fault for every 4 KiB written.
    Freeing a mapped block raises the limit of what counts as large to its size, up to 32 MiB: so one is freed here.
    """
    torch.empty(HEAP_BLOCK, dtype=torch.uint8)


def graph(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """`function`, PyTorch's operations on x [N, C, H, W], as TorchScript in which one oneDNN graph, or a few, compute
    the convolutions and what follows them. It takes inputs of x's shape and strides only.

    It is faster than single primitives: each part of the graph is compiled once instead of being looked up per call,
    and values between the parts keep oneDNN's own layouts. Raises RuntimeError where oneDNN took no part of it.
    """
    with _FUSION:
        before = torch.jit.onednn_fusion_enabled()
        try:
            torch.jit.enable_onednn_fusion(True)
            traced = script(function, x)
        finally:
            torch.jit.enable_onednn_fusion(before)
    if "oneDNNFusionGroup" not in str(torch.jit.last_executed_optimized_graph()):
        raise RuntimeError("TorchScript found nothing that oneDNN's graph compiler takes")
    return traced


def script(function: Callable[[Tensor], Tensor], x: Tensor, held: Sequence[Any] = ()) -> Callable[[Tensor], Tensor]:
    """`function`, PyTorch's operations on x, as TorchScript, which calls them without Python. held: the packed weights
    that the operations take. TorchScript holds no tensor in a layout of oneDNN's own."""

    class Net(nn.Module):  # a function may not refer to packed weights, a module may own them
        def __init__(self) -> None:
            super().__init__()
            for i, each in enumerate(held):
                setattr(self, f"held{i}", each)

        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shapes become constants: here they are
        if held:
            traced: Callable[[Tensor], Tensor] = torch.jit.trace(Net().eval(), (x,), check_trace=False)
        else:  # not by `trace`, whose unit keeps what it compiled, with the weights, for as long as the process lives
            recorded, _ = torch._C._create_graph_by_tracing(function, (x,), lambda _: "", True, False)
            traced = torch._C._create_function_from_graph("net", recorded)
        for _ in range(2):  # the first call is profiled, the second compiles for the shape that was found
            traced(x)
    return traced
