"""The convolution launches of whole nets: their arguments, random operands for them, and a reference in PyTorch.

The arguments are recorded by running the net on the meta device, in training and inference.

    for call in calls(tune, (50,), batch=256):
        given = drawn(call, torch.bfloat16, device)
        for how, tensors, partials in launched(tune, call, given, most=6): ...
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from cases import by_library, pieces
from conv_cases import geometry, reference
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

import fastres
from fastres.kernels import dgrad, fprop, stem, tables, wgrad
from fastres.kernels.checks import gpu_of
from fastres.kernels.problem import ConvProblem
from fastres.kernels.tiles import Tile
from fastres.ops import conv_bn, dispatch
from fastres.ops.layout import nchw, nhwc

META, BF16 = torch.device("meta"), torch.bfloat16
USERS_TABLES = tables.table_file("any").parent  # read before a test sets its own cache folder
MODULES = {"conv_fprop": fprop, "conv_dgrad": dgrad, "conv_wgrad": wgrad}


@dataclass(frozen=True)
class Call:
    """A call of a convolution's launcher.

    given: all arguments by name, except the tile; activations and filters are bfloat16, and all tensors are on the meta
    device. pass_: "infer", "fprop", "dgrad" or "wgrad". by_rule: True if `dispatch`'s rules chose what is computed on
    load; False if the opposite was chosen in some pass, as a measured table may do.
    """

    launcher: str
    problem: ConvProblem
    given: Mapping[str, Any]
    pass_: str
    by_rule: bool

    @property
    def facts(self) -> tuple[str, str]:
        """The launcher and its arguments, with tensors by shape and dtype: equal for equal calls."""
        return self.launcher, str(_mapped(lambda name, i, t: (tuple(t.shape), t.dtype), self.given))


def _mapped(function: Callable[[str, int, Tensor], Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` with every tensor replaced by function(name, index, tensor).

    index: the tensor's position in a tuple, or 0 for a tensor that is not in one.
    """

    def mapped(name: str, value: Any, i: int = 0) -> Any:
        if isinstance(value, tuple):
            inner = [mapped(name, each, j) for j, each in enumerate(value)]
            return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
        return function(name, i, value) if isinstance(value, Tensor) else value

    return {name: mapped(name, value) for name, value in given.items()}


@lru_cache
def calls(tune: ModuleType, depths: tuple[int, ...], batch: int, size: int = 224) -> tuple[Call, ...]:
    """Return the distinct calls of ResNets of these depths in a training step, in eval mode and in `optimize`.

    Where measurements may choose whether an operand is computed on load or stored first, training runs both ways.
    batch, size: the images are [batch, 3, size, size]. tune: the module bench/tune.py.
    """
    found: dict[tuple[str, str], Call] = {}
    for depth in depths:
        for flipped in ((), ("fprop", "wgrad"), ("dgrad",), ("fprop", "dgrad", "wgrad")):
            with _noting(found, flipped):
                _train(_net(depth).train(), batch, size)
        with _noting(found), torch.no_grad():
            _net(depth).to(BF16).eval()(_images(batch, size))
        with _noting(found):
            for problem, role in tune.layers.roles(depth, batch, size):
                operands = tune.layers.Operands.random(problem, BF16, META)
                (step,) = tune.our_pairs(problem, "infer", role, BF16, META, True)
                tune.layers.call(step, "infer", operands, role)()
    return tuple(found.values())


def _net(depth: int) -> nn.Module:
    with META:
        net = getattr(fastres, f"resnet{depth}")()
    net.fc = nn.Identity()
    return net


def _images(batch: int, size: int) -> Tensor:
    return torch.empty(batch, size, size, 3, dtype=BF16, device=META).permute(0, 3, 1, 2)


def _train(net: nn.Module, batch: int, size: int) -> None:
    """Run forward and backward, with weights in float32 as under autocast."""
    net(_images(batch, size)).float().sum().backward()


@contextmanager
def _noting(found: dict[tuple[str, str], Call], flipped: tuple[str, ...] = ()) -> Iterator[None]:
    """Make meta tensors take the path of GPU tensors, up to the convolutions' launchers; add their calls to `found`.

    flipped: the passes in which an operand is computed on load where the rule stores it, and stored where it does not.
    """

    def on_load(pass_: str, problem: ConvProblem, *_: Any) -> bool:
        return (pass_ != "dgrad" or dispatch.bn_backward_on_load(problem)) != (pass_ in flipped)

    replaced = {
        "_kernel_less": lambda device: None,
        "conv_engine": lambda *_: "triton",
        "passes_engine": lambda *_: "aten",
        "compute_dtype": lambda x: BF16,
        "on_load": on_load,
    }
    with ExitStack() as stack:
        stack.callback(conv_bn.conv_bn.cache_clear)
        for name, function in replaced.items():
            stack.enter_context(patch.object(dispatch, name, function))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))  # meta has no autocast
        for name, module in MODULES.items():
            stack.enter_context(patch.object(module, name, _noted(getattr(module, name), found, not flipped)))
        conv_bn.conv_bn.cache_clear()
        yield


def _noted(launcher: Callable[..., Any], found: dict[tuple[str, str], Call], by_rule: bool) -> Callable[..., Any]:
    name, signature = launcher.__name__, inspect.signature(launcher)

    def note(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {key: value for key, value in bound.arguments.items() if key != "tile"}
        p = given["problem"]
        training = given.get("statistics") or given.get("prologue") is not None
        pass_ = name.removeprefix("conv_") if training or name != "conv_fprop" else "infer"
        call = Call(name, p, given, pass_, by_rule)
        found.setdefault(call.facts, call)
        if name == "conv_wgrad":
            return torch.empty(p.w_shape, dtype=given["out_dtype"], device=META)
        if name == "conv_dgrad":
            dx, sums = torch.empty(p.x_shape, dtype=BF16, device=META), torch.empty(1, 2, p.C, device=META)
            return dx if given["below"] is None else (dx, sums if given["projection"] is None else (sums, sums))
        y = torch.empty(p.y_shape, dtype=BF16, device=META)
        return (y, torch.empty(1, 3, p.K, device=META)) if given["statistics"] else y

    return note


def drawn(call: Call, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return random operands for a call, with bfloat16 tensors in `dtype`, such that its results are about 1.

    A ReLU's mask never depends on rounding: where it is the sign of scale z + shift, the scale is a power of two, so
    the product is exact and the sum has the right sign. c_1, the constant of BatchNorm's backward, is as small as a
    mean of gradients: a larger one would dominate wgrad's sums.
    """

    def draw(name: str, i: int, like: Tensor) -> Tensor:
        t = torch.randn(like.shape, dtype=dtype if like.dtype == BF16 else like.dtype, device=device)
        if name == "w":
            return t * like.shape[1:].numel() ** -0.5
        if (name, i) == ("norm", 1):  # a variance
            return t.abs() + 0.5
        if (name, i) == ("bn_backward", 3):
            return t * call.problem.pixels**-0.5
        if like.dim() == 1 and (name, i) == ("relu_mask", 0):
            return t.sign() * 2.0 ** torch.randint(-1, 2, t.shape, device=device)
        return t

    return _mapped(draw, call.given)


def untouched(call: Call) -> dict[str, Any]:
    """Return uninitialised operands on the CPU; the system assigns no memory to pages that are never touched."""
    return _mapped(lambda name, i, like: torch.empty_like(like, device="cpu"), call.given)


Launched = tuple[str, list[Tensor], list[Tensor]]  # how it was launched, the results, partial sums


def launched(tune: ModuleType, call: Call, given: Mapping[str, Any], most: int) -> Iterator[Launched]:
    """Launch the call with every tile that may be used for it; yield the tile's name, the results and the partial sums.

    The tiles are the default, the choices of all shipped tables and the user's, and up to `most` of the tiles that
    tuning tries. A stem's convolution also runs on the stem's kernel.
    """
    like = given["dy" if "dy" in given else "x"]
    most = tune.numbers(call.pass_, most)[not call.by_rule]
    tables.forget_tables()
    with _asking() as asked:
        yield "as chosen", *_launch(call, given, None)
    tiles, (problem, itemsize, tma, *rest) = asked[0]
    for tile in tune.promising(call.pass_, tiles(problem, itemsize, tma, *rest), most):
        yield str(tile), *_launch(call, given, tile)
    few = max(0, min(tune.FEW, most - tune.FEW)) if tma else 0
    for tile in tune.promising(call.pass_, tiles(problem, itemsize, False, *rest), few):
        yield str(tile), *_launch(call, given, tile)
    images = tune.over_images(call.pass_, call.problem)
    for tile in (
        (None, *tune.stem_candidates(call.problem, call.pass_, like.dtype, like.device, most)) if images else ()
    ):
        yield f"stem {tile}", *_launch_stem(call, given, tile)
    own = tables.table_file(gpu_of(like.device).name)
    assert not own.exists(), "tests must use a separate folder for tables"
    own.parent.mkdir(parents=True, exist_ok=True)
    for table in (*sorted(tables.SHIPPED.glob("*.json")), *sorted(USERS_TABLES.glob("*.json"))):
        shutil.copy(table, own)
        tables.forget_tables()
        yield f"as chosen by {table.stem}'s table", *_launch(call, given, None)
        if images:
            yield f"stem as chosen by {table.stem}'s table", *_launch_stem(call, given, None)
        own.unlink()
    tables.forget_tables()


@contextmanager
def _asking() -> Iterator[list[tuple[Callable[..., list[Tile]], tuple[Any, ...]]]]:
    """Record calls of the functions of `tiles` that list tiles: (function, arguments)."""
    asked = []

    def watched(tiles: Callable[..., list[Tile]]) -> Callable[..., list[Tile]]:
        return lambda *arguments: asked.append((tiles, arguments)) or tiles(*arguments)

    with ExitStack() as stack:
        for name in ("fprop_tiles", "dgrad_tiles", "wgrad_tiles"):
            stack.enter_context(patch.object(tables, name, watched(getattr(tables, name))))
        yield asked


def _launch(call: Call, given: Mapping[str, Any], tile: Tile | None) -> tuple[list[Tensor], list[Tensor]]:
    join = given.get("join")
    if join is not None:
        given = {**given, "join": (join := join._replace(out=torch.empty_like(join.out)))}
    result = getattr(MODULES[call.launcher], call.launcher)(**given, tile=tile)
    value, partials = result if isinstance(result, tuple) else (result, ())
    tensors = [value] if join is None else [join.out, value]
    return tensors, [partials] if isinstance(partials, Tensor) else [*partials]


def _launch_stem(call: Call, given: Mapping[str, Any], tile: Tile | None) -> tuple[list[Tensor], list[Tensor]]:
    packed = stem.pack_images(nchw(given["x"]), call.problem, given["x"].dtype)
    if call.launcher == "conv_wgrad":
        return [stem.conv_stem_wgrad(given["dy"], packed, call.problem, out_dtype=given["out_dtype"], tile=tile)], []
    epilogue = {name: given[name] for name in ("scale", "shift", "relu", "statistics")}
    result = stem.conv_stem(packed, stem.pack_filters(given["w"]), call.problem, **epilogue, tile=tile)
    value, *partials = result if isinstance(result, tuple) else (result,)
    return [value], partials


def by_pytorch(call: Call, given: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Return the call's results, computed by PyTorch.

    Products and stored values are in `dtype`, everything else in float32 or wider. To save memory it computes a few
    images at a time, and stores float64 results of 16-bit operands in float32, which is accurate enough for them.
    """
    p = call.problem
    large = call.pass_ != "wgrad" and given["w"].itemsize == 2
    kept = torch.float32 if large and dtype == torch.float64 else None
    parts = []
    for part in pieces(p.N, max(p.x_numel, p.y_numel) // p.N):
        some = _mapped(lambda name, i, t, part=part: t[part] if t.dim() == 4 and name != "w" else t, given)
        parts.append([t.to(kept or t.dtype) for t in _meant(call, some, dtype)])
    if call.pass_ != "wgrad":
        return [torch.cat(each) for each in zip(*parts, strict=True)]
    dw = torch.stack([dw for (dw,) in parts]).sum(0, dtype=torch.float64)
    return [dw if dtype == torch.float64 else dw.to(given["out_dtype"])]


def _meant(call: Call, given: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    p, wide = call.problem, torch.promote_types(dtype, torch.float32)
    if call.launcher == "conv_fprop":
        x, prologue, join = given["x"], given["prologue"], given["join"]
        epilogue = {name: given[name] for name in ("scale", "shift", "norm", "residual", "relu")}
        if join is None:
            return [reference(p, x, given["w"], dtype, prologue=prologue, **epilogue)]
        shortcut = join.shortcut.to(wide)
        shortcut = shortcut if join.scale is None else shortcut * join.scale + join.shift
        a = F.relu(x.to(wide) * prologue[0] + prologue[1] + shortcut).to(dtype)
        return [a, reference(p, a, given["w"], dtype, **epilogue)]
    dz = given["dy"].to(wide)
    if given["bn_backward"] is not None:
        z, c_g, c_z, c_1 = given["bn_backward"]
        dz = c_g * dz + c_z * z.to(wide) + c_1
    dz = nchw(dz.to(dtype))
    if call.launcher == "conv_wgrad":
        x, prologue = given["x"].to(wide), given["prologue"]
        a = x if prologue is None else F.relu(x * prologue[0] + prologue[1])
        a, shape = nchw(a.to(dtype)).to(wide), nchw(torch.empty(p.w_shape, device=META)).shape
        return [nhwc(by_library(conv2d_weight, a, shape, dz.to(wide), **geometry(p)))]
    shape = (dz.shape[0], p.C, p.H, p.W)
    dx = nhwc(by_library(conv2d_input, shape, nchw(given["w"].to(dtype)), dz, **geometry(p))).to(wide)
    if given["residual"] is not None:
        dx = dx + _where_open(given["residual_mask"], given["residual"].to(wide))
    mask = given["relu_mask"]
    if isinstance(mask, tuple):
        mask = mask[0] * given["below"][0].to(wide) + mask[1]
    return [_where_open(mask, dx).to(dtype)]


def _where_open(sign: Tensor | None, g: Tensor) -> Tensor:
    return g if sign is None else torch.where(sign <= 0, 0.0, g)
