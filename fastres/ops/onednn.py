"""Inference on a CPU with oneDNN: fused convolutions (bias, residual, ReLU), linear layers, and whole plans as a graph.

These are the operators that PyTorch's Inductor calls. They are internal to PyTorch, so tests/inference/test_onednn.py
pins the behaviour that this file relies on. oneDNN's ReLU turns NaN into 0, so inputs must be finite.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fastres.ops.layout import Geometry, nchw, nhwc

_OVERFLOWS = (torch.float16,)  # real nets' activations can overflow: use PyTorch's ReLU, which keeps NaN
T = TypeVar("T")  # a tensor or a tuple of tensors
_FUSION = threading.Lock()  # protects TorchScript's switch for oneDNN fusion, which is global to the process
# Pixels. For outputs with fewer, oneDNN wants 1x1 filters in another format. Measured on ResNet-50, torch 2.11.
_FEW, _FEW_STRIDED = 64, 256
_PADDING = 108  # where oneDNN's description of a format has padding: after ndims, 12 dims and the data type
HEAP_BLOCK = 2**25 - 2**16  # bytes: just below 32 MiB, the largest block that glibc can allocate from its heap


class Packings:
    """A cache of one net's weights in oneDNN's packed formats. It packs few times, however many input shapes there are.

    Weights in another format than oneDNN wants for an input still serve, but are converted in each call. `format_for`
    says which inputs want the same format, so each layer is packed for the first of them, and for an `exact` one.
    """

    def __init__(self) -> None:
        self._first: dict[Any, Any] = {}  # (layer, `format_for`, threads) -> packed for the first such input
        self._alive: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()  # (layer, format) -> packed weights

    def conv(self, name: str, w: Tensor, geometry: Geometry, x: Tensor, exact: bool = True) -> Tensor:
        """Return the filters w [K, R, S, C/groups] of layer `name`, packed for x [N, H, W, C], as an opaque tensor.

        exact: False to accept a format that was packed for another input.
        """
        stride, pad, dilation, groups = geometry.both
        shape = list(nchw(x).shape)
        pack = torch.ops.mkldnn._reorder_convolution_weight
        packed = partial(pack, nchw(w), pad, stride, dilation, groups, shape)
        wanted = format_for(x, w.shape, geometry, w.dtype)
        return self._packed((name, wanted, torch.get_num_threads()), exact or wanted is None, packed)

    def linear(self, name: str, w: Tensor, x: Tensor, exact: bool = True) -> Tensor:
        """Return the weights w [classes, features] of layer `name`, packed for x [N, features], as an opaque tensor."""
        packed = partial(torch.ops.mkldnn._reorder_linear_weight, w, len(x))
        return self._packed((name, len(x) > 1, torch.get_num_threads()), exact, packed)

    def int8(
        self, name: str, pack: Callable[[], Any], filters: Sequence[int], geometry: Geometry, x: Tensor, exact: bool
    ) -> Any:
        """Return the result of `pack()`, the int8 weights of layer `name`. Their first call, with x, sets the format.

        filters: their shape, K, R, S, C/groups. exact: False to accept weights whose first call had another shape.
        """
        key = name, format_for(x, filters, geometry, torch.int8), torch.get_num_threads()
        if key not in self._first:
            self._first[key] = x.shape, pack()
        shape, packed = self._first[key]
        return pack() if exact and x.shape != shape else packed

    def _packed(self, key: tuple[Any, ...], exact: bool, pack: Callable[[], Tensor]) -> Tensor:
        if not exact and key in self._first:
            return self._first[key]
        packed = pack()
        packed = self._alive.setdefault((key[0], _format(packed)), packed)
        if key[1] is not None:
            self._first.setdefault(key, packed)
        return packed


def format_for(x: Tensor, filters: Sequence[int], geometry: Geometry, dtype: torch.dtype) -> int | None:
    """Return a number that says which format oneDNN wants for a layer's filters, given x [N, H, W, C].

    Inputs with the same number want the same format, with few exceptions. None: the format follows no simple rule, so
    pack for x.

    Only formats for 1x1 filters are told apart, because converting one into another can take 60 ms in each call, where
    packing takes 3 ms. For larger filters a conversion is much faster than the convolution.
    """
    if tuple(filters[1:3]) != (1, 1):
        return 0
    pixels = math.prod(-(-side // geometry.stride) for side in x.shape[1:3])
    if dtype == torch.float32 and pixels >= _FEW:
        return None
    return int(pixels >= (_FEW if geometry.stride == 1 else _FEW_STRIDED))


def _format(packed: Tensor) -> bytes:
    """Return a key for the format of packed weights: oneDNN's description without its four bytes of padding.

    The padding holds whatever was in memory, for example the height of the image.
    """
    description = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
    return description[:_PADDING] + description[_PADDING + 4 :]


def conv(
    x: Tensor, residual: Any = None, *, w: Tensor, bias: Any, geometry: Geometry, relu: bool, overwrite: bool = False
) -> Tensor:
    """Return [relu](conv(x, w) + bias + residual) [N, P, Q, K], as one oneDNN primitive (float16's ReLU is separate).

    x, residual: NHWC. w: from `Packings.conv`. bias [K] or None. overwrite: write the result into the residual.
    """
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
    """Return x w^T + bias [N, classes] for x [N, features]; w: from `Packings.linear`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, w, bias, "none", [], "")


@cache
def keep_heap() -> None:
    """Make the C library reuse the memory of freed tensors. It acts once per process; further calls do nothing.

    glibc maps every large block separately and unmaps it when it is freed, so each new block costs a page fault per
    4 KiB written. Freeing a mapped block raises the size limit for large blocks to its own size, up to 32 MiB. So this
    function allocates and frees one block of that size.
    """
    torch.empty(HEAP_BLOCK, dtype=torch.uint8)


def graph(function: Callable[[Tensor], T], x: Tensor) -> Callable[[Tensor], T]:
    """Trace `function` on x [N, C, H, W] and compile it with oneDNN's graph compiler, through TorchScript.

    Returns a function meant for inputs with x's shape and strides; it does not check them. One or more oneDNN graph
    partitions compute the convolutions and what follows them. This is faster than single primitives: each partition is
    compiled once instead of looked up per call, and values between partitions keep oneDNN's own layouts. Raises
    RuntimeError if oneDNN's graph compiler accepts no part of `function`.
    """
    with _FUSION:
        before = torch.jit.onednn_fusion_enabled()
        try:
            torch.jit.enable_onednn_fusion(True)
            traced = script(function, x)
        finally:
            torch.jit.enable_onednn_fusion(before)
    if "oneDNNFusionGroup" not in str(torch.jit.last_executed_optimized_graph()):
        raise RuntimeError("oneDNN's graph compiler accepted no part of the net")
    return traced


def script(function: Callable[[Tensor], T], x: Tensor, held: Sequence[Any] = ()) -> Callable[[Tensor], T]:
    """Trace `function` on x and return it as TorchScript, which runs its operations without Python.

    held: the packed int8 weights that the operations use. TorchScript can't store tensors in oneDNN's own layouts.
    """

    class Net(nn.Module):  # a traced function can't refer to packed weights; a module can own them
        def __init__(self) -> None:
            super().__init__()
            for i, each in enumerate(held):
                setattr(self, f"held{i}", each)

        def forward(self, x: Tensor) -> T:
            return function(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns that shapes become constants, which is intended
        if held:
            traced: Callable[[Tensor], T] = torch.jit.trace(Net().eval(), (x,), check_trace=False)
        else:  # not `trace`: its compilation unit keeps the compiled code and the weights until the process ends
            recorded, _ = torch._C._create_graph_by_tracing(function, (x,), lambda _: "", True, False)
            traced = torch._C._create_function_from_graph("net", recorded)
        for _ in range(2):  # the first call profiles, the second compiles for the profiled shape
            traced(x)
    return traced
