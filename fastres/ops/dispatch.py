"""Chooses the engine that computes each step. No other module makes this choice, and callers cache the answer.

`engines` chooses for a convolution in a block; `folded_engine` and `layer_engine` choose for a step of `optimize`'s
plan. `why_engine` and `why_unfused` also give the reason as text. `backend` forces one implementation for every call.
`fusions` switches single fusions on or off, so that the gain of each can be measured. Whether a call may run fused at
all is decided in `eligibility`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastres.capability import LEAST, spelt
from fastres.ops import quantised

if TYPE_CHECKING:
    from fastres.kernels.problem import ConvProblem, Pass
    from fastres.kernels.tables import Found

Engine = Literal["triton", "stem", "cudnn", "onednn", "aten"]

BACKENDS = {
    "auto": "the fastest implementation known for each call",
    "triton": "fastres's own kernels for every step",
    "cudnn": "PyTorch's convolutions (cuDNN on a GPU), fastres's kernels for everything else",
    "reference": "plain PyTorch through the same entry points as the fused kernels",
}

_ALIKE = "same compute capability and multiprocessor count"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class Fusions:
    """Switches for the fusions of a training step.

    statistics: the convolution's epilogue computes the BN statistics, instead of a separate pass.
    prologue: the next convolution applies BN and ReLU to its input while loading it.
    bn_backward: dgrad and wgrad compute dz = c_g g + c_z z + c_1 while loading.
    relu_mask: dgrad's epilogue applies the ReLU mask and computes both BN sums.
    block_end: the end of a block, relu(BN(z) + shortcut), is fused with the next block's first convolution. In forward
        a 1x1 convolution computes it while loading; in backward dgrad's epilogue computes its mask and BN sums.

    The others are off by default.

    recompute: backward recomputes the outputs of a stage's blocks, except the last, instead of saving them. Saves
        memory, not time.
    keep_activation: if a convolution and its weight gradient both read the activation from memory, it is saved instead
        of computed twice. Costs memory.
    overlap: on a GPU, weight gradients run on a second stream, concurrently with the rest of their block's backward.
        Their operands stay allocated until they finish. On an H200 the gain was smaller than the variation between
        runs.
    """

    statistics: bool = True
    prologue: bool = True
    bn_backward: bool = True
    relu_mask: bool = True
    block_end: bool = True
    recompute: bool = False
    keep_activation: bool = False
    overlap: bool = False

    @cached_property
    def key(self) -> tuple[bool, ...]:
        """The values of all switches: cheaper to hash than the dataclass."""
        return tuple(vars(self).values())


_ALL_ON = Fusions()

_forced: ContextVar[str] = ContextVar("fastres_backend", default="auto")
_fusions: ContextVar[Fusions] = ContextVar("fastres_fusions", default=_ALL_ON)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every fusable call in this context to run on the implementation `name`.

    name: "auto" (the default), "triton", "cudnn" or "reference"; `BACKENDS` describes them. Results agree up to
    rounding error. The choice applies to the current thread or async task only. A backward pass uses the choice of its
    forward. Example:

        with fastres.backend("reference"):
            y = model(x)  # plain PyTorch

    Raises ValueError for an unknown name. Inside the context, a fusable call raises RuntimeError if "triton" or "cudnn"
    is forced where fastres's kernels can't run.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; accepted: {', '.join(map(repr, BACKENDS))}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def fusions(**switches: bool) -> Iterator[None]:
    """Switch the named fields of `Fusions` on or off within this context. Raises ValueError for an unknown field."""
    known = [field.name for field in fields(Fusions)]
    if unknown := sorted(switches.keys() - set(known)):
        raise ValueError(f"unknown fusion {', '.join(unknown)}; accepted: {', '.join(known)}")
    token = _fusions.set(replace(_fusions.get(), **switches))
    try:
        yield
    finally:
        _fusions.reset(token)


def fuses_blocks() -> bool:
    """Return True if a fusion across blocks is on: `recompute`, or `block_end` under backend "auto" or "triton"."""
    wanted = _fusions.get()
    return wanted.recompute or (wanted.block_end and _forced.get() in ("auto", "triton"))


def why_unfused(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why no fused path supports `dtype` on `device`; None if one does.

    Raises RuntimeError if `backend` forces kernels that can't run there.
    """
    if _forced.get() == "reference":
        return None
    reason = _kernel_less(device)
    if dtype not in _DTYPES:
        return f"there are no fused kernels for {dtype}"
    return reason or _uninterpreted(dtype, device)


def _kernel_less(device: torch.device) -> str | None:
    """Return the reason why no fused kernel runs on `device`; None if they run.

    Raises RuntimeError instead if `backend` forces them.
    """
    forced = _forced.get()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = None if has_triton() else "Triton is not installed"
        if capability < LEAST:
            reason = f"compute capability {spelt(capability)} is below {spelt(LEAST)}"
    elif interpreting():
        reason = "Triton's interpreter is used only under backend('triton')" if forced == "auto" else None
    else:
        reason = f"there are no fused kernels for {device.type}"
    if reason is not None and forced != "auto":
        raise RuntimeError(f"backend({forced!r}) is in force but {reason}; use a CUDA GPU or TRITON_INTERPRET=1")
    return reason


def _uninterpreted(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why the kernels can't run in `dtype` under Triton's interpreter; None if they can or if the
    interpreter is off.

    `tl.dot` gives wrong results there in bfloat16. Raises RuntimeError instead if `backend` forces the kernels.
    """
    if not interpreting() or dtype != torch.bfloat16 or device.type == "meta":
        return None
    reason = "Triton's interpreter multiplies bfloat16 wrongly"
    if (forced := _forced.get()) != "auto":
        raise RuntimeError(f"backend({forced!r}) is in force but {reason}; use a CUDA GPU, float16 or float32")
    return reason


@cache
def has_triton() -> bool:
    """Return whether Triton is installed. The kernels need it; PyTorch installs it on Linux only."""
    return importlib.util.find_spec("triton") is not None


def why_no_int8(device: torch.device) -> str | None:
    """Return the reason why no engine has int8 convolutions on `device`; None if one has."""
    if device.type != "cpu":
        return f"there are no int8 convolutions for {device.type}"
    return why_no_onednn(torch.int8)


def why_no_onednn(dtype: torch.dtype) -> str | None:
    """Return the reason why oneDNN's fused convolutions aren't used for `dtype` on this CPU; None if they are.

    int8, qint8 and quint8 all stand for uint8 activations with int8 weights. Some cases that oneDNN accepts are
    refused: bfloat16 without native instructions, which it emulates slowly, and int8 with instructions that saturate in
    16 bits, which gives wrong sums.
    """
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    if (machine := platform.machine().lower()) not in ("x86_64", "amd64"):
        return f"oneDNN's fused convolutions are used on x86-64 only, this CPU is {machine}"
    if dtype == torch.float32:
        return None
    if dtype not in (torch.bfloat16, torch.float16, torch.int8, torch.qint8, torch.quint8):
        return f"oneDNN has no fused convolution in {dtype}"
    for name in _ISA_LIMITS:
        if os.environ.get(name):
            return f"{name}={os.environ[name]} may keep oneDNN from using this CPU's instructions"
    if dtype == torch.bfloat16:
        served = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return None if served else "this CPU has neither AVX512-BF16 nor AMX"
    if dtype == torch.float16:
        served = torch.ops.mkldnn._is_mkldnn_fp16_supported()
        return None if served else "this CPU computes no convolution in float16 (AVX512-FP16)"
    if "onednn" not in torch.backends.quantized.supported_engines:
        return "this PyTorch is built without oneDNN's quantised operators"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no AVX512-VNNI; without it int8 sums can saturate"
    return "oneDNN saturates int8 sums in 16 bits here" if quantised.saturates() else None


def wants_reference() -> bool:
    """Return True inside `backend("reference")`."""
    return _forced.get() == "reference"


def interpreting() -> bool:
    """Return True if Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution reads x: autocast's dtype where autocast applies, else x's dtype."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) if x.is_floating_point() and x.dtype != torch.float64 else x.dtype
    return x.dtype


def conv_engine(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> Engine:
    """Return the engine that computes the pass `pass_` of a convolution.

    "triton": our kernels for all shapes. "stem": our kernels for packed images of few channels. "cudnn": ATen on a CUDA
    device. "onednn": one fused primitive for the convolution and what follows it, in inference on a CPU. "aten": ATen
    on any other device.
    """
    return why_engine(pass_, problem, dtype, device)[0]


def why_engine(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> tuple[Engine, str]:
    """Return `conv_engine`'s choice and the reason for it.

    Raises RuntimeError if `backend` forces kernels that can't run on `device` or in `dtype`.
    """
    library: Engine = "cudnn" if device.type == "cuda" else "aten"
    forced = _forced.get()
    if forced == "reference":
        return library, "backend('reference')"
    if dtype == torch.int8:
        reason = why_no_int8(device)
        return ("onednn", "8 bits") if reason is None else (library, reason)
    if pass_ == "infer" and forced == "auto" and device.type == "cpu":
        reason = why_no_onednn(dtype)
        return ("onednn", "one fused primitive") if reason is None else ("aten", reason)
    unknown = None if dtype in (*_DTYPES, quantised.FLOAT8) else f"there are no fused kernels for {dtype}"
    reason = _kernel_less(device) or unknown or _uninterpreted(dtype, device)
    if reason is not None or forced == "cudnn":
        return library, reason or "backend('cudnn')"
    if forced == "triton":
        return "stem" if _over_packed_images(pass_, problem, dtype) else "triton", "backend('triton')"
    if dtype == quantised.FLOAT8:
        return "triton", "the library has no float8 convolution"
    if precision(dtype, device) == "tf32":  # accuracy first, even where our kernel was measured faster
        return library, "TF32: the library rounds its operands, our kernels would truncate them"
    found = _measured(pass_, problem, dtype, device)
    if found is not None:
        winner: Any = found.measurement.winner
        return (winner if winner in ("triton", "stem") else library), _how_measured(found, problem, device)
    if _over_packed_images(pass_, problem, dtype):
        return "stem", "unmeasured: few channels, packed"
    # Memory-bound shapes gain from a fused epilogue. Compute-bound shapes run on cuDNN until they have been measured.
    if problem.groups > 1:
        return library, "unmeasured: grouped"
    if 2 * problem.multiply_adds / problem.min_bytes(dtype.itemsize) < 150:
        return "triton", "unmeasured: memory-bound"
    return library, "unmeasured: compute-bound"


def _over_packed_images(pass_: Pass, problem: ConvProblem, dtype: torch.dtype) -> bool:
    """Return whether the stem's kernels (kernels/stem.py) compute a convolution if no measurement decides.

    They copy 16 bytes at a time, where the kernels for all shapes load single values. Without a measurement they are
    not used in float32.
    """
    from fastres.kernels.stem import stem_refusal

    served = pass_ in ("infer", "fprop", "wgrad") and dtype in (torch.bfloat16, torch.float16)
    return served and stem_refusal(problem) is None


def on_load(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether our kernel computes its operand while loading it; otherwise a separate pass stores it first.

    The operand is the activation in "fprop" and "wgrad" (in "fprop" of a block's first pair: the end of the previous
    block), and dz in "dgrad"; the answer for "dgrad" applies to wgrad's dz too. A measurement decides, if there is one.
    Without one, the answer is True for activations and `bn_backward_on_load` for dz.
    """
    found = _measured(pass_, problem, dtype, device)
    if found is not None and not found.measurement.note:
        return found.measurement.on_load
    return pass_ != "dgrad" or bn_backward_on_load(problem)


def bn_backward_on_load(problem: ConvProblem) -> bool:
    """Return whether dgrad and wgrad compute dz while loading, for a convolution that has not been measured.

    A filter with several taps loads every dz once per tap, so it would compute every dz once per tap. By the compiled
    instruction counts that costs more than one pass that stores dz.
    """
    return problem.R == problem.S == 1


def optimizes_by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if `optimize` runs a plan in `dtype` on oneDNN's fused operators."""
    return _forced.get() == "auto" and device.type == "cpu" and why_no_onednn(dtype) is None


class Candidate(NamedTuple):
    """The engine chosen for a step of a plan, and the reason as text.

    engine: the engine's name, as the tables of plans print it.
    why: the reason.
    otherwise: the fallback if this engine raises RuntimeError; None if there is none. The first line of the error
        replaces "{error}" in the fallback's reason.
    timed: if not empty and this engine works, it is timed against `otherwise`; steps with equal `timed` share the
        result.
    wide: the dtype in which an engine without 8-bit arithmetic simulates it; None where nothing is simulated.
    """

    engine: str
    why: str
    otherwise: Candidate | None = None
    timed: tuple[Any, ...] = ()
    wide: torch.dtype | None = None


def folded_engine(
    problem: ConvProblem, dtype: torch.dtype, device: torch.device, *, relu: bool, added: bool, alike: bool = True
) -> Candidate:
    """Return the engine for [relu](conv(x, w) + shift + residual) in a plan of `optimize`.

    dtype: of w; may be float8_e4m3fn or int8. relu: whether the step ends with a ReLU. added: whether there is a
    residual. alike: whether the residual has the output's shape, which matters for int8 only.
    """
    engine, why = why_engine("infer", problem, dtype, device)
    if dtype == torch.int8:
        if engine != "onednn":
            return _simulated(engine, f"{why}; int8", torch.float64)
        if not alike:
            return _simulated("aten", "the residual has another shape; int8")
        return Candidate("onednn int8", why, _simulated("aten", "oneDNN: {error}; int8"))
    if engine == "onednn":
        return Candidate(engine, why, Candidate("aten", "oneDNN: {error}"))
    if engine in ("triton", "stem"):
        return Candidate("triton" if added else engine, why)  # the stem's kernel adds nothing
    if dtype == quantised.FLOAT8:
        return _simulated(engine, f"{why}; float8")
    if engine == "aten" or not relu:
        return Candidate(engine, why)
    apart = "cudnn + triton" if passes_engine(dtype, device) == "triton" else "cudnn"
    cudnn = torch.backends.cudnn
    if not cudnn.enabled:
        return Candidate(apart, f"{why}; not fused: cudnn.enabled is off")
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return Candidate(apart, f"{why}; not fused: the fused op is not guaranteed to be deterministic")
    facts = problem, dtype, device, added, apart, precision(dtype, device), cudnn.benchmark
    return Candidate("cudnn fused", why, Candidate(apart, f"{why}; not fused: cuDNN: {{error}}"), facts)


def _simulated(engine: str, why: str, wide: torch.dtype = torch.float32) -> Candidate:
    return Candidate(engine, f"{why} simulated in {str(wide).removeprefix('torch.')}", wide=wide)


def layer_engine(layer: Any, pool: tuple[int, int, int] | None, inputs: Sequence[Any]) -> Candidate:
    """Return the engine for a step of `optimize`'s plan that is not a convolution.

    layer: the step's module, or None if the step calls a function. pool: (kernel, stride, pad) of a max pool that our
    kernel supports, else None. inputs: the operands; images are [N, H, W, C].
    """
    library = Candidate("aten", "no fused kernel")
    x = inputs[0] if len(inputs) == 1 else None
    if not isinstance(x, Tensor):
        return library
    if pool is not None and x.dim() == 4 and x.is_contiguous() and 0 < x.numel() < 2**30 * x.shape[3]:
        fits = min(x.shape[1:3]) + 2 * pool[2] >= pool[0] and why_unfused(x.dtype, x.device) is None
        if fits and passes_engine(x.dtype, x.device) == "triton":
            return Candidate("triton", "writes no indices")
    if x.is_quantized:  # max pools are the only steps besides convolutions that run in 8 bits
        simulates = wants_reference() or x.device.type != "cpu"
        return _simulated("aten", "int8") if simulates else Candidate("aten", "8 bits")
    packs = type(layer) is nn.Linear and x.dim() == 2 and x.numel() > 0 and x.dtype == layer.weight.dtype
    if packs and optimizes_by_onednn(x.dtype, x.device):
        return Candidate("onednn", "weights packed", library)
    return library


def why_not_scripted(dtype: torch.dtype) -> str | None:
    """Return the reason why TorchScript isn't used for a plan on oneDNN's operators on a CPU; None if it may be."""
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"it is not used for {dtype}"
    mkldnn: Any = torch.backends.mkldnn
    rounded = mkldnn.conv.fp32_precision
    return None if rounded in ("none", "ieee") else f"it would not round float32 to {rounded}"


def joins(problem: ConvProblem) -> bool:
    """Return whether the shape of a convolution lets it compute the end of the block before it while loading.

    It must be a 1x1 that reads every pixel, with at most 256 output channels. These fit into one or two tiles, and
    every tile of output channels computes the block's end again. `on_load` must agree as well.
    """
    return problem.pointwise and problem.groups == 1 and problem.K <= 256


def why_chained(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the reason why one kernel, `bottleneck_chain`, computes the 3x3 convolution `problem`, the 1x1 expansion
    and the next block's 1x1 reduction.

    None unless it was measured faster than three kernels.
    """
    if _forced.get() not in ("auto", "triton"):
        return None
    found = _measured("chain", problem, dtype, device)
    if found is None or found.measurement.winner != "triton":
        return None
    return _how_measured(found, problem, device)


def _measured(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> Found | None:
    if device.type != "cuda":
        return None
    from fastres.kernels import checks, tables

    return tables.measured(pass_, problem, dtype, checks.gpu_of(device))


def _how_measured(found: Found, problem: ConvProblem, device: torch.device) -> str:
    """Return the reason for a choice made by the measurement `found`."""
    from fastres.kernels import checks

    where = "this GPU" if found.gpu == checks.gpu_of(device).name else f"{found.gpu} ({_ALIKE})"
    if found.measurement.note:
        return f"unmeasured: tuning on {where} {found.measurement.note}"
    return f"measured fastest on {where}" + ("" if found.N == problem.N else f" at N={found.N}, the nearest measured")


def table_in_force(device: torch.device) -> str:
    """Describe in one line the tables of measurements that choose engines and tiles on a GPU."""
    from fastres.kernels import checks, tables

    gpu = checks.gpu_of(device)
    try:
        found = tables.serving(gpu)
    except ValueError as error:
        return f"broken: {error}"
    texts = []
    for name, table, _ in found:
        failed = sum(bool(measurement.note) for measurement in table.values())
        whose = "this GPU's own" if name == gpu.name else f"{name}'s ({_ALIKE})"
        texts.append(f"{whose}, measured problems: {len(table) - failed}" + (f", failed: {failed}" if failed else ""))
    if not texts:
        return "none: heuristics choose engines and tiles until bench/tune.py has measured"
    return "; for others ".join(texts)


def passes_engine(dtype: torch.dtype, device: torch.device) -> Engine:
    """Return the engine of the memory-bound steps between convolutions: "triton" or "aten"."""
    if _forced.get() == "reference" or dtype not in _DTYPES:
        return "aten"
    if device.type == "cuda":
        return "triton" if _kernel_less(device) is None else "aten"
    return "triton" if interpreting() else "aten"


@dataclass(frozen=True)
class Engines:
    """The engines of one convolution's passes and of the memory-bound steps around it, and what our kernels fuse.

    passes: the engine of the memory-bound steps (`passes_engine`).
    """

    infer: Engine
    fprop: Engine
    dgrad: Engine
    wgrad: Engine
    passes: Engine
    fprop_on_load: bool  # fprop computes the activation while loading; see `on_load`
    wgrad_on_load: bool  # wgrad computes the activation while loading
    dz_on_load: bool  # dgrad and wgrad compute dz while loading
    joins: bool  # the shape lets fprop compute the end of the block before it; see `joins`
    fusions: Fusions
    precision: Literal["ieee", "tf32"]

    @property
    def joins_block_end(self) -> bool:
        """Whether the convolution computes the end of the block before it while loading."""
        return self.fusions.block_end and self.joins and self.fprop_on_load and self.fprop == "triton"

    @property
    def keeps_activation(self) -> bool:
        """Whether `keep_activation` saves the activation relu(scale z + shift) for the weight gradient.

        True only if fprop and wgrad both read it from memory.
        """
        on_load = self.fprop in ("triton", "stem") and self.fprop_on_load
        on_load |= self.wgrad in ("triton", "stem") and self.wgrad_on_load
        return self.fusions.keep_activation and not (self.fusions.prologue and on_load)

    def fuses_bn_backward(self, batch_statistics: bool) -> bool:
        """Return whether dgrad and wgrad take g and account for dz = c_g g + c_z z + c_1 themselves.

        batch_statistics: whether BatchNorm uses the batch's statistics. If so, both compute dz while loading. With
        running statistics dz = c_g g, which needs no work on load: dgrad scales its filters by c_g, wgrad its result.
        """
        on_load = self.dz_on_load and self.dgrad == self.wgrad == "triton"
        return self.fusions.bn_backward and (on_load or not batch_statistics)


def engines(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> Engines:
    """Return the engines of a convolution in a block; callers cache the result per call shape and `choice`."""
    return Engines(
        infer=conv_engine("infer", problem, dtype, device),
        fprop=conv_engine("fprop", problem, dtype, device),
        dgrad=conv_engine("dgrad", problem, dtype, device),
        wgrad=conv_engine("wgrad", problem, dtype, device),
        passes=passes_engine(dtype, device),
        fprop_on_load=on_load("fprop", problem, dtype, device),
        wgrad_on_load=on_load("wgrad", problem, dtype, device),
        dz_on_load=on_load("dgrad", problem, dtype, device),
        joins=joins(problem),
        fusions=_fusions.get(),
        precision=precision(dtype, device),
    )


def choice(dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Return the settings on which `engines` depends besides problem, dtype and device: add it to any cache key."""
    return _forced.get(), _fusions.get().key, precision(dtype, device)


def precision(dtype: torch.dtype, device: torch.device) -> Literal["ieee", "tf32"]:
    """Return the precision of convolutions: "tf32" for float32 on CUDA if PyTorch's switch for cuDNN's convolutions
    allows it, else "ieee"."""
    if dtype != torch.float32 or device.type != "cuda":
        return "ieee"
    cudnn: Any = torch.backends.cudnn  # not cudnn.allow_tf32: it raises where convolutions and RNNs differ
    return "tf32" if cudnn.conv.fp32_precision == "tf32" and cudnn.enabled else "ieee"
