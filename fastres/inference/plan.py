"""The static plan of a net for inference: its steps, and how they are merged and quantised.

`fuse` merges conv, BN, residual and ReLU into one step; `quantise` puts 8 bits between the convolutions; `fuse_chains`
marks where three convolutions of a bottleneck may run as one. Every step names the values it reads and writes; each
value is written once (what works in place in the model writes a new value here), so steps may move freely between their
inputs and their first reader.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fastres.ops.layout import Geometry
from fastres.ops.quantised import FLOAT8, Grid, Quantised, grid
from fastres.ops.shortcut import PadShortcut

INPUT = "input"
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_BY_PIXELS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, PadShortcut)
_POINTWISE = (nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid)
LAYERS = (*_BY_PIXELS, *_POINTWISE, nn.Linear, nn.BatchNorm1d, nn.Conv1d, nn.Flatten, nn.Softmax, nn.GroupNorm)
# The functions and methods a traced net may call: name here -> (what computes it on NCHW values, its spellings).
_TABLE: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "relu": (lambda input, inplace=False: F.relu(input), (F.relu, torch.relu, torch.relu_, "relu", "relu_")),
    "add": (operator.add, (operator.add, operator.iadd, torch.add, "add", "add_")),
    "mul": (operator.mul, (operator.mul, operator.imul, torch.mul, "mul", "mul_")),
    "sub": (operator.sub, (operator.sub, operator.isub, torch.sub, "sub", "sub_")),
    "div": (operator.truediv, (operator.truediv, operator.itruediv, torch.div, "div", "div_")),
    "sigmoid": (torch.sigmoid, (torch.sigmoid, F.sigmoid, "sigmoid")),
    "mean": (torch.mean, (torch.mean, "mean")),
    "normalize": (F.normalize, (F.normalize,)),
    "squeeze": (torch.squeeze, (torch.squeeze, "squeeze")),
    "flatten": (torch.flatten, (torch.flatten, "flatten")),
    "reshape": (
        lambda input, *shape, **named: input.reshape(*(shape or named.values())),
        (torch.reshape, "reshape", "view"),
    ),
    "expand_as": (Tensor.expand_as, ("expand_as",)),
    "size": (Tensor.size, ("size",)),
    "getattr": (getattr, (getattr,)),
    "getitem": (operator.getitem, (operator.getitem,)),
    "pad": (F.pad, (F.pad,)),
    "max_pool2d": (F.max_pool2d, (F.max_pool2d, torch.max_pool2d)),
    "avg_pool2d": (F.avg_pool2d, (F.avg_pool2d,)),
    "adaptive_avg_pool2d": (F.adaptive_avg_pool2d, (F.adaptive_avg_pool2d,)),
    "conv2d": (F.conv2d, (F.conv2d,)),
    "group_norm": (F.group_norm, (F.group_norm,)),
}
FUNCTIONS = {name: function for name, (function, _) in _TABLE.items()}
SPELLINGS = {spelling: name for name, (_, spellings) in _TABLE.items() for spelling in spellings}
ARITHMETIC = ("add", "mul", "sub", "div")
VIEWS = ("flatten", "squeeze", "reshape", "expand_as", "getitem")  # may give a view of what they read


@dataclass(frozen=True)
class Value:
    """A step's argument that another step wrote."""

    name: str


@dataclass(frozen=True)
class ModelTensor:
    """A step's argument that is a tensor of the model, by its path."""

    path: str

    def of(self, model: nn.Module) -> Tensor:
        owner, _, name = self.path.rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(owner), name)
        return tensor


class _WritesOne:
    """A step that writes one value."""

    out: str

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True)
class Aten(_WritesOne):
    """A step done by the library, on NCHW views: the module `name`, or a key of `FUNCTIONS`."""

    name: str
    kind: str  # "module", "norm" (a BN that follows no convolution), or the key of FUNCTIONS
    args: tuple[Any, ...]
    out: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    selects: bool = False  # a max pool: each number of its output is one of its input's

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(v.name for v in leaves((self.args, self.kwargs)) if isinstance(v, Value)))


@dataclass(frozen=True)
class Pair:
    """A convolution and the BN folded into it (None: none), as paths in the model."""

    conv: str
    norm: str | None = None


@dataclass(frozen=True)
class Conv(_WritesOne):
    """out = [relu](conv(x, w) + shift + residual), w and shift as folded from `pair`.

    absorbed: the projection on the residual whose shift is added here, so that there it needs no pass of its own
    (`bare`).
    """

    pair: Pair
    x: str
    out: str
    geometry: Geometry
    filter: tuple[int, int, int, int]  # K, R, S, C/groups
    residual: str | None = None
    relu: bool = False
    absorbed: Pair | None = None
    bare: bool = False
    quantised: Quantised | None = None

    @property
    def name(self) -> str:
        return self.pair.conv

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass(frozen=True)
class Convert(_WritesOne):
    """out = x stored on `grid`, or what x stored there means where `back`."""

    x: str
    out: str
    grid: Grid
    back: bool = False

    @property
    def name(self) -> str:
        return "dequantise" if self.back else "quantise"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Chain:
    """Three convolutions that one kernel may do: 3x3 -> 1x1 expand + residual -> the next block's 1x1 reduce, each with
    ReLU. Its meaning is the three steps in order."""

    spatial: Conv
    expand: Conv
    reduce: Conv

    @property
    def convs(self) -> tuple[Conv, Conv, Conv]:
        return self.spatial, self.expand, self.reduce

    @property
    def name(self) -> str:
        return " + ".join(conv.name for conv in self.convs)

    @property
    def reads(self) -> tuple[str, ...]:
        assert self.expand.residual is not None
        return self.spatial.x, self.expand.residual

    @property
    def writes(self) -> tuple[str, ...]:
        return self.expand.out, self.reduce.out


Step = Aten | Conv | Convert | Chain


def convs(step: Step) -> tuple[Conv, ...]:
    """The convolutions that `step` does."""
    return step.convs if isinstance(step, Chain) else (step,) if isinstance(step, Conv) else ()


def unchained(steps: Iterable[Step]) -> list[Step]:
    """`steps` with the three convolutions of each chain one by one."""
    return [single for step in steps for single in convs(step) or (step,)]


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """`tree` with `function` applied to its leaves."""
    if isinstance(tree, (tuple, list)):
        return (tuple if isinstance(tree, tuple) else list)(mapped(item, function) for item in tree)
    if isinstance(tree, Mapping):
        return {key: mapped(item, function) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(mapped(item, function) for item in (tree.start, tree.stop, tree.step)))
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested tuples, lists, dicts and slices."""
    collected: list[Any] = []
    mapped(tree, collected.append)
    return collected


def readers(steps: Iterable[Step], output: str) -> Counter[str]:
    """How many steps read each value; the caller reads the output."""
    count = Counter(name for step in steps for name in step.reads)
    count[output] += 1
    return count


def overwritable(steps: Sequence[Step], output: str) -> set[str]:
    """The convolutions, by what they write, that may write it over their residual: a step wrote that which always
    takes memory of its own, nothing may share it, and nobody reads it afterwards."""
    owned = {step.out for step in steps if not isinstance(step, Chain) and not _may_share(step)} - {output}
    for step in steps:
        if _may_share(step):
            owned -= set(step.reads)
    last_reader = {name: step for step in steps for name in step.reads}
    adding = (step for step in steps if isinstance(step, Conv) and step.residual in owned and step.x != step.residual)
    return {step.out for step in adding if last_reader[step.residual] is step}  # type: ignore[index]


def _may_share(step: Step) -> bool:
    """Whether what `step` writes may share the memory of what it reads."""
    return isinstance(step, Aten) and step.kind in (*VIEWS, "module") and not step.selects


def by_image(steps: Iterable[Step], model: nn.Module) -> bool:
    """Whether every step is known to treat each image of a batch by itself, so that a batch may be cut."""
    flat: set[str] = set()  # values that may have lost dimensions: then a number of one no longer tells which it is
    for step in steps:
        reads_flat = bool(flat & set(step.reads))
        if not isinstance(step, Aten):
            if reads_flat:  # a residual that broadcasts
                return False
            continue
        layer = model.get_submodule(step.name) if step.kind in ("module", "norm") else None
        if not _aten_by_image(step, model, layer, reads_flat):
            return False
        if step.kind in ("flatten", "mean") or isinstance(layer, nn.Flatten) or reads_flat:
            flat.add(step.out)
    return True


def _aten_by_image(step: Aten, model: nn.Module, layer: nn.Module | None, reads_flat: bool) -> bool:
    held = [leaf for leaf in leaves((step.args, step.kwargs)) if isinstance(leaf, ModelTensor)]
    # Of a tensor of the model alone there is one, however many images.
    if held and not (step.kind in ARITHMETIC and step.reads and all(_is_one_for_all(t, model) for t in held)):
        return False
    rest, named = step.args[1:], step.kwargs
    if isinstance(layer, nn.Flatten):
        return layer.start_dim > 0
    if layer is not None:
        images = isinstance(layer, (*NORMS, *_BY_PIXELS)) and not reads_flat
        return images or isinstance(layer, (nn.Linear, nn.BatchNorm1d, *_POINTWISE))
    if step.kind == "flatten":
        first = rest[0] if rest else named.get("start_dim", 0)
        return isinstance(first, int) and first > 0
    if step.kind == "mean":
        dims = [*leaves(rest[0] if rest else named.get("dim"))]
        return not reads_flat and all(isinstance(dim, int) and dim > 0 for dim in dims)
    if step.kind in ("relu", "sigmoid"):
        return True
    return step.kind in (*ARITHMETIC, "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d") and not reads_flat


def _is_one_for_all(held: ModelTensor, model: nn.Module) -> bool:
    """Whether a tensor of the model, met by a batch of images, is the same for each of them."""
    tensor = held.of(model)
    return tensor.dim() < 4 or (tensor.dim() == 4 and len(tensor) == 1)


def borrows(steps: Iterable[Step], output: str) -> bool:
    """Whether `output` may be a view of the input or of a tensor of the model, with nothing computed on the way."""
    borrowed = {INPUT}
    for step in steps:
        if isinstance(step, Aten) and step.kind in (*VIEWS, "module"):
            held = any(isinstance(leaf, ModelTensor) for leaf in leaves((step.args, step.kwargs)))
            if held or borrowed & set(step.reads):
                borrowed.add(step.out)
    return output in borrowed


def fuse(steps: Sequence[Step], output: str, *, absorb: bool = True) -> list[Step]:
    """Merge BN, the addition of a residual and ReLU into the convolution before them, where nobody else reads it.

    absorb: the shift of a projection is added by the convolution that adds the projection. That saves a pass, but
    widens the range of what the projection writes.
    """
    uses = readers(steps, output)
    plan: dict[str, Step] = {}
    for step in steps:
        for unwritten, merged in _merges(step, plan, uses) if isinstance(step, Aten) else ():
            del plan[unwritten]
            step = merged
            break
        plan[step.writes[0]] = step  # a merged convolution moves to where its last part stood
    return _absorb_shifts(list(plan.values()), output) if absorb else list(plan.values())


def _merges(step: Aten, plan: Mapping[str, Step], uses: Counter[str]) -> Iterator[tuple[str, Conv]]:
    """The ways to merge `step`: (the value no longer written, the merged convolution)."""
    if step.kind not in ("norm", "relu", "add"):
        return
    for i, arg in enumerate(step.args):
        conv = plan.get(arg.name) if isinstance(arg, Value) and uses[arg.name] == 1 else None
        if not isinstance(conv, Conv) or conv.relu:
            continue
        if step.kind == "relu":
            yield conv.out, replace(conv, relu=True, out=step.out)
        elif step.kind == "norm":
            if conv.pair.norm is None and conv.residual is None:
                yield conv.out, replace(conv, pair=Pair(conv.name, step.name), out=step.out)
        elif conv.residual is None and isinstance(step.args[1 - i], Value) and step.args[1 - i] != arg:
            yield conv.out, replace(conv, residual=step.args[1 - i].name, out=step.out)


def _absorb_shifts(steps: list[Step], output: str) -> list[Step]:
    """conv(x) + b, added to another convolution's output as its residual: that one adds b, along with its own shift."""
    uses, plan = readers(steps, output), {step.writes[0]: step for step in steps}
    for step in steps:
        if isinstance(step, Conv) and step.residual is not None and uses[step.residual] == 1:
            projection = plan.get(step.residual)
            if isinstance(projection, Conv) and not projection.relu and projection.residual is None:
                if projection.filter[0] != step.filter[0]:
                    continue  # one of them broadcasts
                plan[projection.out] = replace(projection, bare=True)
                plan[step.out] = replace(step, absorbed=projection.pair)
    return list(plan.values())


def fuse_chains(steps: Sequence[Step], output: str) -> list[Step]:
    """Merge 3x3 -> 1x1 expand + residual -> next 1x1 reduce into a `Chain` wherever the three follow each other."""
    uses = readers(steps, output)
    plan = {step.writes[0]: step for step in steps}
    for reduce in steps:
        expand = plan.get(reduce.x) if isinstance(reduce, Conv) else None
        spatial = plan.get(expand.x) if isinstance(expand, Conv) else None
        if not (isinstance(reduce, Conv) and isinstance(expand, Conv) and isinstance(spatial, Conv)):
            continue
        if uses[spatial.out] == 1 and _is_chain(spatial, expand, reduce):
            del plan[spatial.out], plan[reduce.out]
            plan[expand.out] = Chain(spatial, expand, reduce)  # where the expansion stood: its residual is there
    return list(plan.values())


def _is_chain(spatial: Conv, expand: Conv, reduce: Conv) -> bool:
    c = spatial.filter[0]
    return (
        (spatial.filter, spatial.geometry) == ((c, 3, 3, c), Geometry(pad=1))
        and (expand.filter, expand.geometry) == ((4 * c, 1, 1, c), Geometry())
        and (reduce.filter, reduce.geometry) == ((c, 1, 1, 4 * c), Geometry())
        and spatial.residual is None
        and expand.residual is not None
        and reduce.residual is None
        and all(conv.relu and conv.quantised is None for conv in (spatial, expand, reduce))
    )


def quantise(
    steps: Sequence[Step], output: str, ranges: Mapping[str, tuple[float, float]], dtype: torch.dtype
) -> tuple[list[Step], str]:
    """The plan with convolutions in `dtype`, float8_e4m3fn or int8, and the name of its output.

    In int8 every convolution reads and writes 8 bits, and a max pool between two of them passes them on. In float8
    every ungrouped convolution but the net's first reads float8 and writes it where one reads it next. All else stays
    as it was, with a `Convert` between. ranges: the ends between which the numbers of each value lie.
    """
    grids = {name: grid(*ends, dtype) for name, ends in ranges.items()}
    first = next(step for step in steps if isinstance(step, Conv))
    eligible = {
        step.out
        for step in steps
        if isinstance(step, Conv) and (dtype != FLOAT8 or (step is not first and step.geometry.groups == 1))
        # what has no range is a number, or not an image, that broadcasts
        if all(name in grids for name in step.reads)
    }
    read = {name for step in steps if step.writes[0] in eligible for name in step.reads}  # in 8 bits
    written = read & eligible if dtype == FLOAT8 else set(eligible)  # in 8 bits, by what computes them
    for step in steps:
        passes_on = isinstance(step, Aten) and step.selects and dtype != FLOAT8
        # one of a tensor of the model reads nothing
        if passes_on and step.reads and {*step.reads} <= written and step.writes[0] in read:
            written.add(step.writes[0])
            grids[step.writes[0]] = grids[step.reads[0]]
    plan: dict[str, Step] = {}
    suffix = "float8" if dtype == FLOAT8 else "int8"

    def narrow(name: str) -> str:
        if name in written:
            return name
        plan.setdefault(f"{name}:{suffix}", Convert(name, f"{name}:{suffix}", grids[name]))
        return f"{name}:{suffix}"

    def wide(name: str) -> str:
        if name not in written:
            return name
        plan.setdefault(f"{name}:wide", Convert(name, f"{name}:wide", grids[name], back=True))
        return f"{name}:wide"

    def widened(leaf: Any) -> Any:
        return Value(wide(leaf.name)) if isinstance(leaf, Value) else leaf

    for step in steps:
        if isinstance(step, Aten) and step.out not in written:
            step = replace(step, args=mapped(step.args, widened), kwargs=mapped(step.kwargs, widened))
        elif isinstance(step, Conv):
            stored = narrow if step.out in eligible else wide
            if step.out in eligible:
                out = grids[step.out] if step.out in written else None
                residual = None if step.residual is None else grids[step.residual]
                step = replace(step, quantised=Quantised(grids[step.x], residual, out))
            step = replace(step, x=stored(step.x), residual=None if step.residual is None else stored(step.residual))
        plan[step.writes[0]] = step
    output = wide(output)
    return list(plan.values()), output
