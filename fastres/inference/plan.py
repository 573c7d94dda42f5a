"""The static plan of a net for inference: its steps, and the passes that merge and quantise them.

`fuse` merges a convolution with the BatchNorm, the addition of a residual and the ReLU after it. `quantise` makes
convolutions read and write 8 bits. `fuse_chains` merges three successive convolutions, from two neighbouring
bottlenecks, that one kernel may compute.

Every step names the values that it reads and writes. Each value is written once: an in-place operation of the model
writes a new value here. A step may therefore move anywhere between the steps that write its inputs and the first step
that reads its output.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torchvision.ops import FrozenBatchNorm2d

from fastres.ops.layout import Geometry
from fastres.ops.quantised import FLOAT8, Grid, Quantised, grid
from fastres.ops.shortcut import PadShortcut

INPUT = "input"
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_BY_PIXELS = (*_POOLS, nn.ZeroPad2d, nn.Upsample, PadShortcut)
_POINTWISE = (nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid)
LAYERS = (*_BY_PIXELS, *_POINTWISE, nn.Linear, nn.BatchNorm1d, nn.Conv1d, nn.Flatten, nn.Softmax, nn.GroupNorm)
# Functions and methods that a traced net may call: name in a plan -> (function on NCHW values, targets of fx nodes).
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
    "interpolate": (F.interpolate, (F.interpolate,)),
    "cat": (torch.cat, (torch.cat, torch.concat)),
}
FUNCTIONS = {name: function for name, (function, _) in _TABLE.items()}
SPELLINGS = {spelling: name for name, (_, spellings) in _TABLE.items() for spelling in spellings}
ARITHMETIC = ("add", "mul", "sub", "div")
VIEWS = ("flatten", "squeeze", "reshape", "expand_as", "getitem")  # may return a view of their input
SIZES = ("size", "getattr")  # return the shape of their input, or one of its numbers
# Containers in arguments and results -> the type of their copies.
_CONTAINERS: dict[type, Any] = {
    **{tuple: tuple, torch.Size: tuple, list: list, immutable_list: list},
    **{dict: dict, immutable_dict: dict, OrderedDict: OrderedDict},
}


@dataclass(frozen=True)
class Value:
    """An argument of a step: the value `name`, which another step writes."""

    name: str


@dataclass(frozen=True)
class ModelTensor:
    """An argument of a step: a parameter or buffer of the model, given by its path."""

    path: str

    def of(self, model: nn.Module) -> Tensor:
        """Return the tensor in `model`."""
        owner, _, name = self.path.rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(owner), name)
        return tensor


@dataclass(frozen=True)
class Place:
    """A leaf of `Outputs.structure`: the place of one of the plan's outputs."""

    index: int


@dataclass(frozen=True)
class Outputs:
    """What a plan returns.

    names: the value of each returned tensor. If the model returns two tensors with the same content, such as a tensor
    and its contiguous copy, a name occurs twice. structure: what the model returns, with a `Place` for each tensor. It
    is a `Place`, or nested dicts, lists and tuples of them; other leaves are constants, such as None.
    """

    names: tuple[str, ...]
    structure: Any

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Return `structure` with the output tensors in their places."""
        return mapped(self.structure, lambda leaf: tensors[leaf.index] if isinstance(leaf, Place) else leaf)


class _WritesOne:
    """A step that writes one value."""

    out: str

    @property
    def writes(self) -> tuple[str, ...]:
        return (self.out,)


@dataclass(frozen=True)
class Aten(_WritesOne):
    """A step that is one PyTorch module or function, whose 4-D inputs are NCHW.

    Some modules, such as max pools and linear layers, may run on another engine.
    """

    name: str  # the module's path, or the name of the function's node
    kind: str  # "module", "norm" (a BatchNorm not folded into a convolution), or a key of FUNCTIONS
    args: tuple[Any, ...]
    out: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    selects: bool = False  # True for a max pool: it only selects input elements, so it works on int8 values as well

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(v.name for v in leaves((self.args, self.kwargs)) if isinstance(v, Value)))


@dataclass(frozen=True)
class Pair:
    """The paths in the model of a convolution and of the BatchNorm that is folded into it (None if there is none)."""

    conv: str
    norm: str | None = None


@dataclass(frozen=True)
class Conv(_WritesOne):
    """out = [relu](conv(x, w) + shift + residual), with w and shift folded from `pair`.

    x, residual, out: names of values.
    absorbed: the projection that computes the residual, if this step adds its shift too; else None.
    bare: whether this step is such a projection. It then adds no shift, which can save a pass over its output.
    quantised: how x, residual and out are stored, if the convolution is float8 or int8; else None.
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
    """out = x quantised to the 8-bit `grid`; with `back`, out = x dequantised from `grid`."""

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
    """Three convolutions that one kernel may compute: 3x3 -> 1x1 expand + residual -> the next block's 1x1 reduce.

    Each is followed by a ReLU. Equivalent to the three steps in order.
    """

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
    """Return the convolutions that `step` computes."""
    return step.convs if isinstance(step, Chain) else (step,) if isinstance(step, Conv) else ()


def unchained(steps: Iterable[Step]) -> list[Step]:
    """Return `steps` with each chain replaced by its three convolutions."""
    return [single for step in steps for single in convs(step) or (step,)]


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return `tree` (nested tuples, NamedTuples, lists, dicts and slices) with each leaf replaced by `function(leaf)`.

    An object of any other type, also of a subclass, is a leaf.
    """
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(item, function) for item in tree))
    if isinstance(tree, slice):
        return slice(*(mapped(item, function) for item in (tree.start, tree.stop, tree.step)))
    kind = _CONTAINERS.get(type(tree))
    if kind is None:
        return function(tree)
    if isinstance(tree, dict):
        return kind((key, mapped(item, function)) for key, item in tree.items())
    return kind(mapped(item, function) for item in tree)


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested tuples, lists, dicts and slices."""
    collected: list[Any] = []
    mapped(tree, collected.append)
    return collected


def readers(steps: Iterable[Step], outputs: Outputs) -> Counter[str]:
    """Count the readers of each value: the steps that read it and, for an output, the caller."""
    return Counter([*(name for step in steps for name in step.reads), *outputs.names])


def overwritable(steps: Sequence[Step], outputs: Outputs) -> set[str]:
    """Return the names of the values that a convolution may write in place, over its residual.

    That is safe if the residual was written by a step that never returns a view of its input, if no other value may
    alias it, and if neither the convolution itself (as x), nor a later step, nor the caller reads it.
    """
    owned = {step.out for step in steps if not isinstance(step, Chain) and not _may_share(step)} - {*outputs.names}
    for step in steps:
        if _may_share(step):
            owned -= set(step.reads)
    last_reader = {name: step for step in steps for name in step.reads}
    adding = (step for step in steps if isinstance(step, Conv) and step.residual in owned and step.x != step.residual)
    return {step.out for step in adding if last_reader[step.residual] is step}  # type: ignore[index]


def _may_share(step: Step) -> bool:
    """Return whether the output of `step` may share memory with one of its inputs."""
    return isinstance(step, Aten) and step.kind in (*VIEWS, "module") and not step.selects


def by_image(steps: Iterable[Step], model: nn.Module) -> bool:
    """Return whether every step is known to process each image independently, so that a batch may be split."""
    # Values that may have lost dimensions. For these a dimension's index no longer says whether it is the batch.
    flat: set[str] = set()
    sizes: dict[str, tuple[int, ...]] = {}  # values that are sizes -> which dimensions of [N, C, H, W] they measure
    for step in steps:
        reads_flat = bool(flat & set(step.reads))
        if isinstance(step, Aten) and not reads_flat and (given := _dimensions(step, sizes)) is not None:
            sizes[step.out] = given
            continue
        if any(0 in sizes.get(name, ()) for name in step.reads):  # the number of images
            return False
        if not isinstance(step, Aten):
            if reads_flat:  # a residual that may broadcast over the batch
                return False
            continue
        layer = model.get_submodule(step.name) if step.kind in ("module", "norm") else None
        if not _aten_by_image(step, model, layer, reads_flat):
            return False
        if step.kind in ("flatten", "mean") or isinstance(layer, nn.Flatten) or reads_flat:
            flat.add(step.out)
    return True


def _dimensions(step: Aten, sizes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return which dimensions of [N, C, H, W] the output of `step` measures; None if it is not known to be a size.

    sizes: the same for the values before it.
    """
    of, *index = (*step.args, *step.kwargs.values())
    known = sizes.get(of.name) if isinstance(of, Value) and step.kind == "getitem" else None
    measured = (0, 1, 2, 3) if step.kind in SIZES else known
    if measured is None or step.kind == "getattr" or not index:
        return measured
    try:
        picked = measured[index[0]]
    except (IndexError, TypeError):  # an index that is out of range, or that the net computes
        return None
    return picked if isinstance(picked, tuple) else (picked,)


def _aten_by_image(step: Aten, model: nn.Module, layer: nn.Module | None, reads_flat: bool) -> bool:
    """Return whether `step` is known to process each image independently.

    layer: the module that it calls, if any. reads_flat: whether an input may have lost dimensions.
    """
    tensors = [leaf for leaf in leaves((step.args, step.kwargs)) if isinstance(leaf, ModelTensor)]
    # A step that reads model tensors but no value of the plan gives one result for the whole batch.
    if tensors and not (step.kind in ARITHMETIC and step.reads and all(_is_one_for_all(t, model) for t in tensors)):
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
    if step.kind == "cat":
        dim = named.get("dim", rest[0] if rest else 0)
        return not reads_flat and isinstance(dim, int) and dim not in (0, -4)
    resizes = step.kind in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "interpolate")
    return (resizes or step.kind in ARITHMETIC) and not reads_flat


def _is_one_for_all(argument: ModelTensor, model: nn.Module) -> bool:
    """Return whether a model tensor has no batch dimension, or one of size 1, so that it broadcasts over the images."""
    tensor = argument.of(model)
    return tensor.dim() < 4 or (tensor.dim() == 4 and len(tensor) == 1)


def borrows(steps: Iterable[Step], outputs: Outputs) -> tuple[bool, ...]:
    """Return for each output whether it may share memory with the input, a model tensor or an output before it."""
    memory: dict[str, set[Any]] = {INPUT: {INPUT}}  # value -> the values and model tensors in whose memory it may lie
    for step in steps:
        for name in step.writes:
            memory[name] = {name}
            if isinstance(step, Aten) and _may_share(step):
                of_model = (leaf for leaf in leaves((step.args, step.kwargs)) if isinstance(leaf, ModelTensor))
                memory[name].update(of_model, *(memory[read] for read in step.reads))
    taken: set[Any] = {INPUT}
    shares = []
    for name in outputs.names:
        shares.append(any(each in taken or isinstance(each, ModelTensor) for each in memory[name]))
        taken |= memory[name]
    return tuple(shares)


def fuse(steps: Sequence[Step], outputs: Outputs, *, absorb: bool = True) -> list[Step]:
    """Merge BatchNorm, the addition of a residual and ReLU into the convolution before them.

    A step is merged only if it is the only reader of the convolution's output. absorb: let the convolution that adds a
    projection also add the projection's shift. That can save a pass, but without its shift the projection's output may
    have a wider range, which matters for int8.
    """
    uses = readers(steps, outputs)
    plan: dict[str, Step] = {}
    for step in steps:
        for unwritten, merged in _merges(step, plan, uses) if isinstance(step, Aten) else ():
            del plan[unwritten]
            step = merged
            break
        plan[step.writes[0]] = step  # a merged convolution takes the place of the last step merged into it
    return _absorb_shifts(list(plan.values()), outputs) if absorb else list(plan.values())


def _merges(step: Aten, plan: Mapping[str, Step], uses: Counter[str]) -> Iterator[tuple[str, Conv]]:
    """Yield each way to merge `step` into a convolution: (the value that is no longer written, the new convolution)."""
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


def _absorb_shifts(steps: list[Step], outputs: Outputs) -> list[Step]:
    """Move the shift of each projection to the convolution that adds the projection as its residual.

    A projection here is a convolution whose output another convolution adds. It keeps its shift if its output has
    another reader, if it has a ReLU or a residual, or if the numbers of output channels differ, so that one of the two
    outputs broadcasts.
    """
    uses, plan = readers(steps, outputs), {step.writes[0]: step for step in steps}
    for step in steps:
        if isinstance(step, Conv) and step.residual is not None and uses[step.residual] == 1:
            projection = plan.get(step.residual)
            if isinstance(projection, Conv) and not projection.relu and projection.residual is None:
                if projection.filter[0] != step.filter[0]:
                    continue  # one of the two broadcasts
                plan[projection.out] = replace(projection, bare=True)
                plan[step.out] = replace(step, absorbed=projection.pair)
    return list(plan.values())


def fuse_chains(steps: Sequence[Step], outputs: Outputs) -> list[Step]:
    """Merge each 3x3 -> 1x1 expand + residual -> next block's 1x1 reduce into a `Chain`.

    The 3x3's output must have no other reader.
    """
    uses = readers(steps, outputs)
    plan = {step.writes[0]: step for step in steps}
    for reduce in steps:
        expand = plan.get(reduce.x) if isinstance(reduce, Conv) else None
        spatial = plan.get(expand.x) if isinstance(expand, Conv) else None
        if not (isinstance(reduce, Conv) and isinstance(expand, Conv) and isinstance(spatial, Conv)):
            continue
        if uses[spatial.out] == 1 and _is_chain(spatial, expand, reduce):
            del plan[spatial.out], plan[reduce.out]
            plan[expand.out] = Chain(spatial, expand, reduce)  # at the place of `expand`: its residual exists there
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
    steps: Sequence[Step], outputs: Outputs, ranges: Mapping[str, tuple[float, float]], dtype: torch.dtype
) -> tuple[list[Step], Outputs]:
    """Return the plan with convolutions in `dtype`, float8_e4m3fn or int8, and its outputs.

    In int8 every convolution reads and writes 8 bits, and a max pool between two of them stays in 8 bits. In float8
    every ungrouped convolution except the net's first reads float8, and it writes float8 if another such convolution
    reads its output. All other steps keep their dtype. A `Convert` step is inserted wherever a step reads a value that
    is stored in the other form.

    ranges: the range (lower, upper) of each value. A convolution that reads a value without a range stays as it is.
    """
    grids = {name: grid(*ends, dtype) for name, ends in ranges.items()}
    first = next(step for step in steps if isinstance(step, Conv))
    eligible = {
        step.out
        for step in steps
        if isinstance(step, Conv) and (dtype != FLOAT8 or (step is not first and step.geometry.groups == 1))
        # a value without a range is a number or a tensor that is not an image, added by broadcasting
        if all(name in grids for name in step.reads)
    }
    read = {name for step in steps if step.writes[0] in eligible for name in step.reads}  # values read in 8 bits
    # Values that the step computing them writes in 8 bits itself, without a `Convert` after it.
    written = read & eligible if dtype == FLOAT8 else set(eligible)
    for step in steps:
        passes_on = isinstance(step, Aten) and step.selects and dtype != FLOAT8
        # `reads` is empty for a pool of a model tensor
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
    outputs = replace(outputs, names=tuple(map(wide, outputs.names)))
    return list(plan.values()), outputs
