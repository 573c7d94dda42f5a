"""Which engine computes a step. The only place that decides it, once, when a call is prepared.

`engines` answers for a convolution in a block, `folded_engine` and `layer_engine` for a step of `optimize`'s plan;
`why_engine` and `why_unfused` give reasons in words. `backend` forces one choice everywhere, `fusions` switches single
ones on or off so that each one's worth can be measured. Whether a call may run fused at all is the question of
`eligibility`.
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
    "cudnn": "the library's convolutions, fastres's kernels around them",
    "reference": "plain PyTorch through the same entry points as the fused kernels",
}

_ALIKE = "same compute capability and multiprocessor count"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ISA_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class Fusions:
    """The fusions of a training step, each of which can be turned on or off.

    statistics: BN statistics in the conv's epilogue, not in a pass of their own. prologue: normalise + ReLU while the
    next conv loads. bn_backward: dz = c_g g + c_z z + c_1 while dgrad and wgrad load. relu_mask: the ReLU mask and both
    BN sums in dgrad's epilogue. block_end: a block's end within its successor's first convolution; forward it is
    computed while a 1x1 loads, backward its mask and sums stand in dgrad's epilogue. Off unless asked for: recompute
    (it saves memory, not time): the outputs of a stage's blocks are not kept for backward but computed again.
    keep_activation (it takes memory): an activation that a convolution and its weight gradient both read stored is kept
    from one to the other, not computed twice. overlap (an H200 gained less than runs differ): on a GPU a weight
    gradient runs on a second stream, beside the rest of its block's backward, and what it reads is kept until it is
    done.
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
        """All of them: a hash that costs less than the dataclass's own."""
        return tuple(vars(self).values())


_ALL_ON = Fusions()

_forced: ContextVar[str] = ContextVar("fastres_backend", default="auto")
_fusions: ContextVar[Fusions] = ContextVar("fastres_fusions", default=_ALL_ON)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every fusable call runs on the implementation `name`, a key of `BACKENDS`.

    Holds for the current thread (or async task) only; a backward pass keeps what its forward was given. Raises
    ValueError for an unknown name.
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
    """Within this context the named fields of `Fusions` are on or off. Raises ValueError for an unknown field."""
    known = [field.name for field in fields(Fusions)]
    if unknown := sorted(switches.keys() - set(known)):
        raise ValueError(f"unknown fusion {', '.join(unknown)}; accepted: {', '.join(known)}")
    token = _fusions.set(replace(_fusions.get(), **switches))
    try:
        yield
    finally:
        _fusions.reset(token)


def fuses_blocks() -> bool:
    """True where a fusion across blocks is in force: `recompute`, or `block_end` with kernels to do it."""
    wanted = _fusions.get()
    return wanted.recompute or (wanted.block_end and _forced.get() in ("auto", "triton"))


def why_unfused(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no fused path serves `dtype` on `device`, in words; None where one does."""
    if _forced.get() == "reference":
        return None
    reason = _kernel_less(device)
    if dtype not in _DTYPES:
        return f"there are no fused kernels for {dtype}"
    return reason or _uninterpreted(dtype, device)


def _kernel_less(device: torch.device) -> str | None:
    """Why no kernel runs on `device`. Raises RuntimeError where `backend` forces kernels that cannot run there."""
    forced = _forced.get()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reason = None if has_triton() else "Triton is not installed"
        if capability < LEAST:
            reason = f"compute capability {spelt(capability)} is below {spelt(LEAST)}"
    elif interpreting():
        reason = "the kernels' interpreter serves only backend('triton')" if forced == "auto" else None
    else:
        reason = f"there are no fused kernels for {device.type}"
    if reason is not None and forced != "auto":
        raise RuntimeError(f"backend({forced!r}) is in force but {reason}; use a CUDA GPU or TRITON_INTERPRET=1")
    return reason


def _uninterpreted(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why Triton's interpreter, where it runs the kernels, must not multiply `dtype`: `tl.dot` is wrong there in
    bfloat16. Raises RuntimeError where `backend` forces it."""
    if not interpreting() or dtype != torch.bfloat16 or device.type == "meta":
        return None
    reason = "Triton's interpreter multiplies bfloat16 wrongly"
    if (forced := _forced.get()) != "auto":
        raise RuntimeError(f"backend({forced!r}) is in force but {reason}; use a CUDA GPU, float16 or float32")
    return reason


@cache
def has_triton() -> bool:
    """Whether Triton, in which the kernels are written, is installed. PyTorch brings it on Linux only."""
    return importlib.util.find_spec("triton") is not None


def why_no_int8(device: torch.device) -> str | None:
    """Why no engine has int8 convolutions on `device`, in words; None where one has."""
    if device.type != "cpu":
        return f"there are no int8 convolutions for {device.type}"
    return why_no_onednn(torch.int8)


def why_no_onednn(dtype: torch.dtype) -> str | None:
    """Why oneDNN's fused convolutions don't serve `dtype` on this CPU, in words; None where they do.

    qint8 and quint8 mean what int8 does: uint8 activations by int8 weights. oneDNN would compute more than is let
    pass: bfloat16 by emulation, which is slow, and int8 by instructions that saturate in 16 bits, which is wrong.
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
            return f"{name}={os.environ[name]} keeps oneDNN from this CPU's instructions"
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
    """True where `backend("reference")` is in force."""
    return _forced.get() == "reference"


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes its operand x: autocast's where it is on, else x's own."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) if x.is_floating_point() and x.dtype != torch.float64 else x.dtype
    return x.dtype


def conv_engine(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> Engine:
    """What computes one convolution: "triton", "stem" (Triton too, over packed images of few channels), "cudnn" (ATen
    on a CUDA device), "onednn" (with all that follows as one primitive: inference on a CPU) or "aten" (ATen there)."""
    return why_engine(pass_, problem, dtype, device)[0]


def why_engine(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> tuple[Engine, str]:
    """`conv_engine`'s answer and the reason for it, in words."""
    library: Engine = "cudnn" if device.type == "cuda" else "aten"
    forced = _forced.get()
    if forced == "reference":
        return library, "backend('reference')"
    if dtype == torch.int8:
        reason = why_no_int8(device)
        return ("onednn", "8 bits") if reason is None else (library, reason)
    if pass_ == "infer" and forced == "auto" and device.type == "cpu":
        reason = why_no_onednn(dtype)
        return ("onednn", "one primitive does all of it") if reason is None else ("aten", reason)
    unknown = None if dtype in (*_DTYPES, quantised.FLOAT8) else f"there are no fused kernels for {dtype}"
    reason = _kernel_less(device) or unknown or _uninterpreted(dtype, device)
    if reason is not None or forced == "cudnn":
        return library, reason or "backend('cudnn')"
    if forced == "triton":
        return "stem" if _over_packed_images(pass_, problem, dtype) else "triton", "backend('triton')"
    if dtype == quantised.FLOAT8:
        return "triton", "the library has no float8 convolution"
    if precision(dtype, device) == "tf32":  # as accurate as PyTorch, whatever was faster
        return library, "TF32: the library rounds to it what our kernels cut off"
    found = _measured(pass_, problem, dtype, device)
    if found is not None:
        winner: Any = found.measurement.winner
        return (winner if winner in ("triton", "stem") else library), _how_measured(found, problem, device)
    if _over_packed_images(pass_, problem, dtype):
        return "stem", "unmeasured: few channels, packed"
    # Unmeasured: memory-bound shapes gain from a fused epilogue, compute-bound ones are cuDNN's until measured.
    if problem.groups > 1:
        return library, "unmeasured: grouped"
    if 2 * problem.multiply_adds / problem.min_bytes(dtype.itemsize) < 150:
        return "triton", "unmeasured: memory-bound"
    return library, "unmeasured: compute-bound"


def _over_packed_images(pass_: Pass, problem: ConvProblem, dtype: torch.dtype) -> bool:
    """Whether kernels/stem.py computes a pass where that isn't measured.

    It copies 16 bytes at a time where the kernels for all shapes load one value; float32 was never measured, nor is it
    what a net is trained in.
    """
    from fastres.kernels.stem import stem_refusal

    served = pass_ in ("infer", "fprop", "wgrad") and dtype in (torch.bfloat16, torch.float16)
    return served and stem_refusal(problem) is None


def on_load(pass_: Pass, problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether our kernel computes what it reads while it loads, instead of one pass that stores it before: in "fprop"
    and "wgrad" the activation (of a block's first pair: the end of the block before), in "dgrad" dz, for
    wgrad as well. As measured, else by rule."""
    found = _measured(pass_, problem, dtype, device)
    if found is not None and not found.measurement.note:
        return found.measurement.on_load
    return pass_ != "dgrad" or bn_backward_on_load(problem)


def bn_backward_on_load(problem: ConvProblem) -> bool:
    """Whether dgrad and wgrad compute dz on load where that isn't measured.

    Where a filter has several taps, every dz would be computed once a tap: by the compiled instruction counts that
    costs more than the pass.
    """
    return problem.R == problem.S == 1


def optimizes_by_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """True where `optimize` runs a plan in `dtype` by oneDNN's fused operators."""
    return _forced.get() == "auto" and device.type == "cpu" and why_no_onednn(dtype) is None


class Candidate(NamedTuple):
    """What computes a step of a plan: the engine as tables name it, and the reason in words.

    otherwise: what computes it where this one raises RuntimeError; the error's first line stands for "{error}" in the
    other's reason. timed: where this one serves, it is timed against the other, once for all steps with these facts.
    wide: the dtype in which an engine without 8 bits simulates them.
    """

    engine: str
    why: str
    otherwise: Candidate | None = None
    timed: tuple[Any, ...] = ()
    wide: torch.dtype | None = None


def folded_engine(
    problem: ConvProblem, dtype: torch.dtype, device: torch.device, *, relu: bool, added: bool, alike: bool = True
) -> Candidate:
    """What computes [relu](conv(x, w) + shift + residual) in a plan. dtype: of w, float8_e4m3fn and int8 included;
    added: whether there is a residual; alike: whether it has the output's shape, without which only int8 is served."""
    engine, why = why_engine("infer", problem, dtype, device)
    if dtype == torch.int8:
        if engine != "onednn":
            return _simulated(engine, f"{why}; int8", torch.float64)
        if not alike:
            return _simulated("aten", "what is added has another shape; int8")
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
        return Candidate(apart, f"{why}; not fused: the fused op can't promise to be deterministic")
    facts = problem, dtype, device, added, apart, precision(dtype, device), cudnn.benchmark
    return Candidate("cudnn fused", why, Candidate(apart, f"{why}; not fused: cuDNN: {{error}}"), facts)


def _simulated(engine: str, said: str, wide: torch.dtype = torch.float32) -> Candidate:
    return Candidate(engine, f"{said} simulated in {str(wide).removeprefix('torch.')}", wide=wide)


def layer_engine(layer: Any, pool: tuple[int, int, int] | None, inputs: Sequence[Any]) -> Candidate:
    """What computes a library operation of a plan on `inputs`, images in NHWC. layer: the module, None where a function
    is called; pool: (kernel, stride, pad) of a max pool for which there is a kernel."""
    library = Candidate("aten", "no kernel of ours")
    x = inputs[0] if len(inputs) == 1 else None
    if not isinstance(x, Tensor):
        return library
    if pool is not None and x.dim() == 4 and x.is_contiguous() and 0 < x.numel() < 2**30 * x.shape[3]:
        fits = min(x.shape[1:3]) + 2 * pool[2] >= pool[0] and why_unfused(x.dtype, x.device) is None
        if fits and passes_engine(x.dtype, x.device) == "triton":
            return Candidate("triton", "writes no indices")
    if x.is_quantized:  # only max pools work in 8 bits
        simulates = wants_reference() or x.device.type != "cpu"
        return _simulated("aten", "int8") if simulates else Candidate("aten", "8 bits")
    packs = type(layer) is nn.Linear and x.dim() == 2 and x.numel() > 0 and x.dtype == layer.weight.dtype
    if packs and optimizes_by_onednn(x.dtype, x.device):
        return Candidate("onednn", "weights packed", library)
    return library


def why_not_scripted(dtype: torch.dtype) -> str | None:
    """Why a plan that oneDNN's operators run on a CPU does not go through TorchScript, in words; None where it may."""
    if dtype not in (torch.float32, torch.bfloat16, torch.int8):
        return f"it is not used for {dtype}"
    mkldnn: Any = torch.backends.mkldnn
    rounded = mkldnn.conv.fp32_precision
    return None if rounded in ("none", "ieee") else f"it would not round float32 to {rounded}"


def joins(problem: ConvProblem) -> bool:
    """Whether a convolution computes the end of the block before it while it loads: a 1x1 that reads every pixel once,
    with so few output channels that one tile holds them or two, each of which computes it; see `on_load`, too."""
    return problem.pointwise and problem.groups == 1 and problem.K <= 256


def why_chained(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why one kernel (`bottleneck_chain`) does the 3x3 convolution `problem`, the 1x1 expansion and the next block's
    1x1 reduction, in words: where that was measured faster than three. Else None."""
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
    """The reason for a choice by `found`."""
    from fastres.kernels import checks

    where = "this GPU" if found.gpu == checks.gpu_of(device).name else f"{found.gpu} ({_ALIKE})"
    if found.measurement.note:
        return f"unmeasured: tuning on {where} {found.measurement.note}"
    return f"measured fastest on {where}" + ("" if found.N == problem.N else f" at N={found.N}, the nearest measured")


def table_in_force(device: torch.device) -> str:
    """The measurements by which engines and tiles are chosen on a GPU, in words."""
    from fastres.kernels import checks, tables

    gpu = checks.gpu_of(device)
    try:
        found = tables.serving(gpu)
    except ValueError as error:
        return f"broken: {error}"
    said = []
    for name, table, _ in found:
        failed = sum(bool(measurement.note) for measurement in table.values())
        whose = "this GPU's own" if name == gpu.name else f"{name}'s ({_ALIKE})"
        said.append(f"{whose}, measured problems: {len(table) - failed}" + (f", failed: {failed}" if failed else ""))
    if not said:
        return "none: heuristics choose engines and tiles until bench/tune.py has measured"
    return "; for others ".join(said)


def passes_engine(dtype: torch.dtype, device: torch.device) -> Engine:
    """What computes the passes between convolutions: "triton" or "aten"."""
    if _forced.get() == "reference" or dtype not in _DTYPES:
        return "aten"
    if device.type == "cuda":
        return "triton" if _kernel_less(device) is None else "aten"
    return "triton" if interpreting() else "aten"


@dataclass(frozen=True)
class Engines:
    """What computes each pass of one convolution and what stands around it, and what our kernels fuse."""

    infer: Engine
    fprop: Engine
    dgrad: Engine
    wgrad: Engine
    passes: Engine
    fprop_on_load: bool  # of the activation; see `on_load`
    wgrad_on_load: bool
    dz_on_load: bool
    joins: bool  # by its shape
    fusions: Fusions
    precision: Literal["ieee", "tf32"]

    @property
    def joins_block_end(self) -> bool:
        """Whether the convolution computes the end of the block before it while it loads."""
        return self.fusions.block_end and self.joins and self.fprop_on_load and self.fprop == "triton"

    @property
    def keeps_activation(self) -> bool:
        """Whether `keep_activation` keeps relu(s x + t) for the weight gradient: both convolutions read it stored."""
        on_load = self.fprop in ("triton", "stem") and self.fprop_on_load
        on_load |= self.wgrad in ("triton", "stem") and self.wgrad_on_load
        return self.fusions.keep_activation and not (self.fusions.prologue and on_load)

    def fuses_bn_backward(self, batch_statistics: bool) -> bool:
        """Whether dgrad and wgrad take dz as c_g g + c_z z + c_1: on load, or, without c_z and c_1, by filters scaled
        with c_g."""
        on_load = self.dz_on_load and self.dgrad == self.wgrad == "triton"
        return self.fusions.bn_backward and (on_load or not batch_statistics)


def engines(problem: ConvProblem, dtype: torch.dtype, device: torch.device) -> Engines:
    """The engines of a convolution in a block: asked once, when a call is prepared."""
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
    """What engines depend on besides problem, dtype and device: whoever caches them must key them by this, too."""
    return _forced.get(), _fusions.get().key, precision(dtype, device)


def precision(dtype: torch.dtype, device: torch.device) -> Literal["ieee", "tf32"]:
    """How a float32 product is rounded, by PyTorch's own switch for convolutions."""
    if dtype != torch.float32 or device.type != "cuda":
        return "ieee"
    cudnn: Any = torch.backends.cudnn  # whose allow_tf32 raises where convolutions and RNNs differ
    return "tf32" if cudnn.conv.fp32_precision == "tf32" and cudnn.enabled else "ieee"
