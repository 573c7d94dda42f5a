"""What the bench can run: one table, `BACKENDS`. A new way to run a net is one entry there and, if it should run
without being asked for, its name in `by_default`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import torch._inductor.utils
import torchvision
from torch import nn

import fastres
from fastres import compile as fastres_compile
from fastres.ops import dispatch

DEPTHS = (18, 34, 50, 101, 152)
MODES = ("infer", "train")


@dataclass(frozen=True)
class Case:
    """What one row measures, apart from the backend. `size` is the image's height and width."""

    depth: int
    mode: str
    batch: int
    dtype: torch.dtype
    size: int
    device: torch.device


@dataclass(frozen=True)
class Backend:
    """One way to run a net.

    net: depth -> a module with torchvision's state_dict keys.
    compile: keyword arguments of `torch.compile`; None runs the module as it is.
    freeze: what turns the prepared net into what is called, in inference only: the backend doesn't train.
    ours: fastres, compared with the best peer; the others are the peers.
    needs: device type this backend is confined to.
    package: what must be installed besides fastres' own dependencies.
    """

    net: Callable[[int], nn.Module]
    says: str
    compile: dict[str, Any] | None = None
    inductor: dict[str, Any] = field(default_factory=dict)
    freeze: Callable[[nn.Module], Callable] | None = None
    channels_last: bool = True
    ours: bool = False
    needs: str | None = None
    package: str | None = None

    def why_not(self, device: torch.device, mode: str = "infer") -> str | None:
        """The reason, in words, why this backend can't run `mode` on `device` here; None where it can."""
        if self.freeze and mode == "train":
            return "it only infers"
        if self.needs and device.type != self.needs:
            return f"it needs a {self.needs} device"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package}"
        return None

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self, weights: dict[str, torch.Tensor], case: Case) -> tuple[nn.Module, Callable]:
        """(the module that owns the parameters, what to call on a batch), on the case's device.

        Inference: eval mode, everything in the case's dtype. Training: fp32 master weights (fp64 in fp64); autocast is
        the caller's.
        """
        with torch.device("meta"):  # no time spent on an initialisation that is overwritten
            model = self.net(case.depth)
        model.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        infer = case.mode == "infer"
        model.train(not infer).requires_grad_(not infer)
        dtype = case.dtype if infer or case.dtype == torch.float64 else torch.float32
        model = model.to(case.device, dtype, memory_format=self.memory_format)
        if self.freeze is not None:
            return model, self.freeze(model)
        if self.compile is None:
            return model, model
        return model, torch.compile(model, dynamic=False, **self.compile)

    @contextmanager
    def isolated(self, device: torch.device) -> Iterator[None]:
        """Whatever this backend compiles or configures ends with the context; compilation starts with empty caches."""
        with ExitStack() as stack:
            if self.compile is not None:
                start_compiler(self.compile["backend"], device)
                torch.compiler.reset()
                stack.callback(torch.compiler.reset)
                stack.enter_context(torch._inductor.utils.fresh_cache())
                stack.enter_context(torch._inductor.config.patch(self.inductor))
            yield


@cache
def start_compiler(backend: str, device: torch.device) -> None:
    """What `backend` imports and finds out about the machine, once a process: no part of its first row.

    Where it doesn't work, the rows that need it will say so.
    """
    with torch._inductor.utils.fresh_cache(), suppress(Exception):
        x = torch.ones(64, device=device, requires_grad=True)
        torch.compile(lambda x: x.sigmoid().sum(), backend=backend)(x).backward()


def torchvision_net(depth: int) -> nn.Module:
    return getattr(torchvision.models, f"resnet{depth}")()


def fastres_net(depth: int) -> nn.Module:
    return getattr(fastres, f"resnet{depth}")()


def timm_net(depth: int) -> nn.Module:
    import timm

    return timm.create_model(f"resnet{depth}")


def inductor(mode: str = "default", **kwargs: Any) -> Backend:
    return Backend(
        torchvision_net,
        f"torch.compile, mode {mode!r}, weights frozen in inference",
        compile={"backend": "inductor", "mode": mode},
        inductor={"freezing": True},
        **kwargs,
    )


BACKENDS = {
    "eager": Backend(torchvision_net, "torchvision as it comes: NCHW, no compiler", channels_last=False),
    "eager-channels-last": Backend(torchvision_net, "torchvision in channels_last"),
    "cudagraphs": Backend(
        torchvision_net, "torchvision in a CUDA graph, nothing fused", compile={"backend": "cudagraphs"}, needs="cuda"
    ),
    "aot-eager": Backend(
        torchvision_net, "AOTAutograd's graph run by ATen, nothing fused", compile={"backend": "aot_eager"}
    ),
    "inductor": inductor(),
    "reduce-overhead": inductor("reduce-overhead", needs="cuda"),
    "max-autotune": inductor("max-autotune"),
    "max-autotune-no-cudagraphs": inductor("max-autotune-no-cudagraphs"),
    "timm": Backend(timm_net, "timm's resnet in channels_last", package="timm"),
    "timm-inductor": Backend(
        timm_net,
        "timm's resnet under torch.compile, weights frozen in inference",
        compile={"backend": "inductor"},
        inductor={"freezing": True},
        package="timm",
    ),
    "fastres": Backend(fastres_net, "fastres in channels_last, no compiler", ours=True),
    "fastres-inductor": Backend(
        fastres_net,
        "fastres under torch.compile, weights frozen in inference",
        compile={"backend": "inductor"},
        inductor={"freezing": True},
        ours=True,
    ),
    "fastres-compile": Backend(
        torchvision_net,
        "torchvision under torch.compile, backend 'fastres', weights frozen in inference",
        compile={"backend": "fastres"},
        inductor={"freezing": True},
        ours=True,
    ),
    "fastres-optimize": Backend(
        fastres_net,
        "fastres.optimize: a static plan of folded convolutions, in a CUDA graph on a GPU; inference only",
        freeze=fastres.optimize,
        ours=True,
    ),
}


def by_default(device: torch.device, depth: int, mode: str) -> list[str]:
    """The backends that make sense on this device when none is named.

    On a GPU depth 50 meets every peer and the other depths the strongest ones. On a CPU compilation takes longer than
    everything else together: one compiled row stands for all.
    """
    if device.type == "cuda":
        every_depth = ("eager-channels-last", "inductor", "max-autotune")
        return [
            name
            for name, backend in BACKENDS.items()
            if (depth == 50 or backend.ours or name in every_depth) and not (backend.freeze and mode == "train")
        ]
    chosen = ["eager-channels-last", "fastres"]
    if depth == 50:
        chosen += ["eager", "timm"]
        if mode == "infer":
            chosen.append("inductor")
    return [name for name in BACKENDS if name in chosen]


def shared_weights(depth: int, calibration: list[torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The state_dict, fp32 on the CPU, that every backend of a depth runs with.

    torchvision's initialisation with BatchNorms that do something: random weight and bias, running statistics
    gathered over the `calibration` batches. The last one of each residual branch is small, as in the usual recipes:
    otherwise a fresh net amplifies rounding so much that right and wrong gradients can't be told apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision_net(depth)
        norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        last = "bn3" if depth >= 50 else "bn2"
        for name, norm in norms.items():
            nn.init.uniform_(norm.weight, *((0.05, 0.1) if name.endswith(f".{last}") else (0.5, 1.5)))
            nn.init.normal_(norm.bias, 0, 0.1)
            norm.momentum = None
    with torch.no_grad():
        for batch in calibration:
            model(batch)
    return model.state_dict()


@contextmanager
def watched_paths() -> Iterator[Counter[str | None]]:
    """Counts, while the context lasts, the answers to stem, blocks and stages of blocks, and to the chains that backend
    "fastres" finds: why the plain path; None where fused."""
    answers: Counter[str | None] = Counter()
    ask, ask_together, rewrite = dispatch.why_plain, dispatch.serves_stage, fastres_compile.rewrite

    def listen(*call: Any) -> str | None:
        answer = ask(*call)
        answers[answer] += 1
        return answer

    def listen_to_stage(x: torch.Tensor, blocks: Sequence[Any]) -> bool:
        served = ask_together(x, blocks)
        if served:
            answers[None] += len(blocks)
        return served

    def look(*call: Any, **options: Any) -> list[fastres_compile.Finding]:
        findings = rewrite(*call, **options)
        answers.update(None if finding.hit else finding.reason for finding in findings)
        return findings

    with (
        mock.patch.object(dispatch, "why_plain", listen),
        mock.patch.object(dispatch, "serves_stage", listen_to_stage),
        mock.patch.object(fastres_compile, "rewrite", look),
    ):
        yield answers


def path_in_words(answers: Counter[str | None], backend: Backend) -> str:
    """What served a fastres row, from `watched_paths`' answers during one call."""
    compiled = backend.compile is not None
    if backend.freeze is not None:
        return "a static plan of folded convolutions"
    if not answers:
        return "plain path: torch.compile traced the plain modules" if compiled else "plain path"
    total = sum(answers.values())
    parts = [
        f"plain path in {n} of {total} blocks: {why}" if why else f"fused in {n} of {total} blocks"
        for why, n in answers.most_common()
    ]
    return "; ".join(parts)
