"""Random small nets: compares `optimize` and torch.compile's backend "fastres" with eager PyTorch.

    python tests/helpers/fuzz.py --nets 5000                 # seeds 0 to 4999
    python tests/helpers/fuzz.py --first 123 --nets 1 --show # repeat one net and print its source

A net is written line by line: convolutions, BatchNorm, many spellings of ReLU, additions, pools, views, modules used
twice, values changed in place and read again under another name. Each line runs as soon as it is written, and is kept
only if PyTorch accepts it. The nets run in float64, in which a correct rewriting agrees up to rounding error, and on a
CPU, where the fused operators call PyTorch's own functions. So the test is of the rewriting, not of the kernels.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import multiprocessing
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from tolerances import EXACT_ANY_NET, ROUNDING, WHOLE_NETS
from torch import Tensor, nn
from tqdm import tqdm

import fastres
from fastres.ops.shortcut import PadShortcut

MODES = ("eval", "eval with gradients", "train")
INDUCTOR_EVERY = 50

HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn

from fastres.ops.shortcut import PadShortcut
"""


class Net(nn.Module):
    """The net on which lines are tried; modules are added to it while they are written."""


@dataclass
class Program:
    """A net as source code: its `modules` by name, the lines of `forward`, and the names of its outputs."""

    seed: int
    channels_last: bool
    modules: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def source(self, output: int | None = None) -> str:
        """Return the source of the class `Net`. output: the index of the only output to return; by default all."""
        returned = self.outputs if output is None else [self.outputs[output]]
        init = [f"        self.{name} = {module}" for name, module in self.modules.items()]
        body = [f"        {line}" for line in self.lines]
        return "\n".join(
            [
                f"{HEAD}\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()",
                *init,
                "\n    def forward(self, x):",
                *body,
                f"        return {', '.join(returned)}\n",
            ]
        )

    def build(self, output: int | None = None) -> nn.Module:
        scope: dict[str, Any] = {}
        exec(compile(self.source(output), f"<net {self.seed}>", "exec"), scope)
        return settled(scope["Net"](), self.seed)

    def images(self) -> Tensor:
        return images(self.seed, self.channels_last)


def images(seed: int, channels_last: bool) -> Tensor:
    x = torch.randn(3, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def settled(module: nn.Module, seed: int) -> nn.Module:
    """Convert `module` to float64 and draw its parameters and statistics from `seed`; return it."""
    module.double()
    chance = torch.Generator().manual_seed(seed)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not tensor.is_floating_point():
            continue
        low, high = (0.5, 1.5) if "var" in name or (tensor.dim() == 1 and name.endswith("weight")) else (-0.5, 0.5)
        with torch.no_grad():
            tensor.uniform_(low, high, generator=chance)
    return module


class Writer:
    """Writes a random program. `chance` makes all choices. With `plain` the program has only operations that `optimize`
    supports, although it may refuse a combination of them."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.plain = chance.random() < 0.5
        self.program = Program(seed, channels_last=chance.random() < 0.4)
        self.net = Net()
        x = images(seed, self.program.channels_last).requires_grad_()
        self.scope: dict[str, Any] = {"x": x.clone(), "self": self.net, "torch": torch, "F": F}
        self.names = ["x"]

    def write(self) -> Program:
        chance = self.chance
        self.pair(self.image())
        size = chance.randint(3, 11)
        kinds: list[tuple[int, Callable[[], None]]] = [
            (5, lambda: self.pair(self.image())),
            (2, self.block),
            (5, self.relu),
            (4, self.add),
            (3, self.view),
            (3, self.change),
            (2, self.keep),
            (2, self.pool),
            (2, self.gate),
            (1, lambda: self.convolve(self.image())),
            (1, lambda: self.normalise(self.image())),
            (1, self.shortcut),
            (1, self.statistics),
            (1, self.join),
        ]
        weights = [weight for weight, _ in kinds]
        while len(self.program.lines) < size:
            chance.choices(kinds, weights)[0][1]()
        program = self.program
        program.outputs = self.returned()
        body = "\n".join(program.lines)
        program.modules = {m: made for m, made in program.modules.items() if re.search(rf"self\.{m}\b", body)}
        return program

    # Choice of operands.

    def recent(self, names: Sequence[str]) -> str:
        """Return the latest name with a probability of a half or more, else any of them."""
        return names[-1] if self.chance.random() < 0.5 else self.chance.choice(names)

    def any(self) -> str:
        return self.recent(self.names)

    def image(self) -> str:
        fit = [n for n in self.names if self.scope[n].dim() == 4 and min(self.scope[n].shape[2:]) >= 2]
        return self.recent(fit)

    def like(self, name: str) -> str:
        shape = self.scope[name].shape
        return self.chance.choice([n for n in self.names if self.scope[n].shape == shape])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.scope[name].shape)

    # Writing of lines.

    def module(self, kind: str, constructor: str, again: float = 0.2) -> str:
        """Return the name of a module made by `constructor`: a new one, or with probability `again` an existing one."""
        same = [name for name, made in self.program.modules.items() if made == constructor]
        if same and self.chance.random() < again:
            return self.chance.choice(same)
        name = f"{kind}{len(self.program.modules)}"
        self.program.modules[name] = constructor
        setattr(self.net, name, settled(eval(constructor, {"nn": nn, "PadShortcut": PadShortcut}), len(self.names)))
        return name

    def say(self, expression: str) -> str | None:
        """Write the line `name = expression` and return the new name; None if PyTorch rejects it."""
        name = f"v{len(self.names)}"
        if not self.run(f"{name} = {expression}"):
            return None
        self.names.append(name)
        return name

    def run(self, line: str) -> bool:
        """Run a line and add it to the program; return False if PyTorch rejects it."""
        if not self.plain and self.chance.random() < 0.03:
            line = f"with torch.no_grad(): {line}"
        try:
            exec(line, self.scope)
        except (RuntimeError, ValueError, IndexError):  # e.g. mismatched shapes, or a view that would need a copy
            return False
        self.program.lines.append(line)
        return True

    def convolve(self, x: str) -> str | None:
        c = self.shape(x)[1]
        k = self.chance.choice([4, 4, 4, 6, 8, c])
        side, stride = self.chance.choice([(1, 1), (3, 1), (3, 1), (3, 2), (1, 2)])
        groups = self.chance.choice([1, 1, 1, 1, 2]) if c % 2 == k % 2 == 0 else 1
        bias = self.chance.random() < 0.25
        args = f"{c}, {k}, {side}, {stride}, {side // 2}, groups={groups}, bias={bias}"
        return self.say(f"self.{self.module('conv', f'nn.Conv2d({args})')}({x})")

    def normalise(self, x: str) -> str | None:
        n, c, *size = self.shape(x)
        if n * size[0] * size[1] < 12:  # few values are sometimes nearly equal, and then rounding errors are large
            return None
        affine = "" if self.chance.random() < 0.9 else ", affine=False"
        return self.say(f"self.{self.module('bn', f'nn.BatchNorm2d({c}{affine})', again=0.3)}({x})")

    def pair(self, x: str) -> str | None:
        z = self.convolve(x)
        y = None if z is None else self.normalise(z)
        if y is not None and self.chance.random() < 0.6:
            return self.relu(y)
        return y

    def block(self) -> None:
        """Write a residual block: two branches and their sum."""
        x = self.image()
        y = self.pair(x)
        z = None if y is None else self.convolve(y)
        z = None if z is None else self.normalise(z)
        if z is None:
            return
        self.now_and_then_change(x)
        if self.shape(z) != self.shape(x):
            c, k = self.shape(x)[1], self.shape(z)[1]
            stride = 2 if self.shape(z)[2] < self.shape(x)[2] else 1
            conv = self.module("conv", f"nn.Conv2d({c}, {k}, 1, {stride}, bias=False)")
            projected = self.say(f"self.{conv}({x})")
            x = None if projected is None else self.normalise(projected)  # type: ignore[assignment]
        if x is not None and self.shape(z) == self.shape(x):
            y = self.add(z, x)
            if y is not None:
                self.relu(y)

    def relu(self, x: str | None = None) -> str | None:
        x = x or self.any()
        inplace = f"self.{self.module('relu', 'nn.ReLU(inplace=True)', again=0.5)}({x})"
        pure = [f"F.relu({x})", f"torch.relu({x})", f"{x}.relu()", f"self.{self.module('relu', 'nn.ReLU()', 0.5)}({x})"]
        writing = [inplace, f"F.relu({x}, inplace=True)", f"F.relu({x}, True)", f"torch.relu_({x})", f"{x}.relu_()"]
        if self.chance.random() < 0.5:
            return self.say(self.chance.choice(pure))
        return self.written(self.chance.choice(writing))

    def written(self, expression: str) -> str | None:
        """Write an expression that changes its operand in place, as a statement or assigned to a new name."""
        if self.chance.random() < 0.5:
            self.run(expression)
            return None
        return self.say(expression)

    def add(self, a: str | None = None, b: str | None = None) -> str | None:
        a = a or self.any()
        b = b or self.like(a)
        if self.chance.random() < 0.5:
            a, b = b, a
        if self.chance.random() < 0.6:
            return self.say(self.chance.choice([f"{a} + {b}", f"torch.add({a}, {b})", f"{a}.add({b})"]))
        if self.chance.random() < 0.5:
            self.run(f"{a} += {b}")
            return a
        return self.written(f"{a}.add_({b})")

    def view(self, x: str | None = None) -> str | None:
        x = x or self.any()
        n = self.shape(x)[0]
        served = [
            f"{x}.flatten(1)", f"torch.flatten({x}, 1)", f"{x}.flatten(2)", f"{x}.reshape({x}.shape[0], -1)",
            f"{x}.view({x}.size(0), -1)", f"{x}[:, :1]", f"{x}[:, 1:]", f"{x}[:, :, ::2, ::2]", f"{x}[:2]",
            f"{x}.expand_as({self.like(x)})", f"{x}.contiguous()", f"self.{self.module('same', 'nn.Identity()')}({x})",
            f"self.{self.module('drop', 'nn.Dropout(0.0)')}({x})", f"F.dropout({x}, 0.5, False)",
            f"self.{self.module('flat', 'nn.Flatten()')}({x})", f"{x}.reshape({x}.shape)",
        ]  # fmt: skip
        others = [
            f"{x}.detach()", f"{x}.unsqueeze(1)", f"{x}.squeeze()", f"{x}.transpose(-1, -2)", f"{x}.view_as({x})",
            f"{x}.permute(0, 2, 3, 1)", f"{x}.contiguous(memory_format=torch.channels_last)", f"{x}.clone()",
            f"{x}.chunk(2, 1)[0]", f"{x}.unbind(0)[{self.chance.randrange(n)}]", f"{x}.narrow(1, 0, 1)",
            f"{x}.mT", f"{x}[0]", f"{x}[:, 0]", f"{x}.to(torch.float64)", f"{x}.split(1, 1)[0]", f"{x}.movedim(1, -1)",
            f"torch.as_strided({x}, (2, 2), (2, 1))", f"{x}.reshape(-1)", f"{x}.unflatten(0, (1, -1))",
        ]  # fmt: skip
        return self.say(self.chance.choice(served if self.plain else served + others))

    def keep(self) -> str | None:
        """Write a view of a value, then a change or a ReLU of one of the two, then a read of the other one."""
        x = self.any()
        y = self.view(x)
        if y is None:
            return None
        x, y = self.chance.sample([x, y], 2)
        self.chance.choice([self.relu, self.change])(x)
        return self.say(f"{y} * 2.0")

    def now_and_then_change(self, x: str) -> None:
        """Sometimes change x in place: a block's input, which is read at its beginning and at its end."""
        if self.chance.random() < 0.25:
            self.change(x)

    def change(self, x: str | None = None) -> str | None:
        """Write a change of a value in place, by a number or another tensor."""
        x = x or self.any()
        y = self.like(x)
        served = [f"{x}.add_(1.0)", f"{x}.mul_(0.5)", f"{x}.mul_(torch.sigmoid({y}))"]
        others = [
            f"{x}.sub_(0.25)", f"{x}.copy_({y})", f"{x}.clamp_(-0.5, 2.0)", f"{x}.neg_()", f"torch.sigmoid_({x})",
            f"{x}[:, :1].mul_(0.5)", f"{x}[:, :1].relu_()", f"F.leaky_relu({x}, 0.1, True)", f"{x}.data.mul_(0.5)",
            f"{x}.detach().add_(1.0)", f"torch.add({x}, 1.0, out={x})", f"{x}.flatten().mul_(0.5)",
        ]  # fmt: skip
        statements = [f"{x} += 1.0", f"{x} *= 0.5"]
        other_statements = [f"{x} -= 0.25", f"{x}[:, :1] = 0.5", f"{x}[:, :1] += 1.0", f"{x}[:, -1:] = {y}[:, :1]"]
        if self.chance.random() < 0.4:
            self.run(self.chance.choice(statements if self.plain else statements + other_statements))
            return None
        return self.written(self.chance.choice(served if self.plain else served + others))

    def pool(self) -> str | None:
        x = self.image()
        small = self.module("pool", "nn.MaxPool2d(3, 2, 1)")
        pools = [
            f"F.max_pool2d({x}, 2)",
            f"self.{small}({x})",
            f"F.avg_pool2d({x}, 2)",
            f"F.adaptive_avg_pool2d({x}, 3)",
        ]
        return self.say(self.chance.choice(pools))

    def gate(self) -> str | None:
        """Write an attention gate over channels, or over all elements: the product broadcasts in the first case."""
        x = self.image()
        c = self.shape(x)[1]
        mean = self.chance.choice([f"{x}.mean((2, 3), keepdim=True)", f"F.adaptive_avg_pool2d({x}, 1)", x])
        conv = self.module("gate", f"nn.Conv2d({c}, {c}, 1)")
        return self.say(f"{x} * torch.sigmoid(self.{conv}({mean}))")

    def shortcut(self) -> str | None:
        """Write a block's end with an option-A shortcut."""
        x = self.image()
        c = self.shape(x)[1]
        if c > 8:
            return None
        module = self.module("pad", f"PadShortcut(2, {c + 2})")
        pads = [f"F.pad({x}[:, :, ::2, ::2], (0, 0, 0, 0, 0, 2))", f"self.{module}({x})"]
        y = self.say(self.chance.choice(pads))
        self.now_and_then_change(x)
        conv = self.module("conv", f"nn.Conv2d({c}, {c + 2}, 3, 2, 1, bias=False)")
        z = self.say(f"self.{conv}({x})")
        z = None if z is None else self.normalise(z)
        if z is not None and self.chance.random() < 0.3:
            z = self.say(f"{z}[:]")
        if y is None or z is None or self.shape(y) != self.shape(z):
            return None
        total = self.add(z, y)
        return None if total is None else self.relu(total)

    def statistics(self) -> str | None:
        """Write a read of a BatchNorm's parameter or buffer between its calls."""
        x = self.image()
        norms = [
            m for m, made in self.program.modules.items() if made.startswith(f"nn.BatchNorm2d({self.shape(x)[1]})")
        ]
        if not norms:
            return None
        kept = self.chance.choice(["running_mean", "running_var", "weight"])
        return self.say(f"{x} + self.{self.chance.choice(norms)}.{kept}.view(1, -1, 1, 1)")

    def join(self) -> str | None:
        x = self.image()
        if self.plain or self.shape(x)[1] > 8:
            return None
        return self.say(f"torch.cat([{x}, {self.like(x)}], 1)")

    def returned(self) -> list[str]:
        chance = self.chance
        names = [n for n in self.names if n != "x" or chance.random() < 0.2]
        chosen = [names[-1], *chance.sample(names[:-1], min(len(names) - 1, chance.choice([0, 1, 1, 2])))]
        if chance.random() < 0.2 and self.scope[chosen[0]].dim() > 1:
            chosen.append(f"{chosen[0]}[:, :2]")
        chance.shuffle(chosen)
        return chosen


class FrozenWriter(Writer):
    """Writes programs with frozen BatchNorms: arithmetic on the tensors of BatchNorm modules, spelt in many ways.

    Some of it is no BatchNorm after all, and some of the tensors are changed on the way.
    """

    def normalise(self, x: str) -> str | None:
        chance, c = self.chance, self.shape(x)[1]
        if chance.random() < 0.2:
            return super().normalise(x)
        norm = f"self.{self.module('bn', f'nn.BatchNorm2d({c})', again=0.3)}"
        early, eps = chance.random() < 0.7, chance.choice(["1e-05", "0.1"])
        w, b, m, v = (
            self.named(self.seen(f"{norm}.{name}")) if early else f"{norm}.{name}"
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = self.named(
            chance.choice(
                [
                    *(f"{w} * ({v} + {eps}).rsqrt()", f"torch.rsqrt({eps} + {v}) * {w}"),
                    *(f"torch.mul({w}, torch.rsqrt(torch.add({v}, {eps})))", f"{v}.add({eps}).rsqrt().mul({w})"),
                    f"({v} + {eps}).rsqrt()" if chance.random() < 0.2 else f"{w} * ({v} + {eps}).rsqrt()",
                ]
            )
        )
        if chance.random() < 0.1:
            self.disturb(norm, scale)
        wrong = [f"{m} * {scale} - {b}", f"{b} + {m} * {scale}", f"{b} - {m} * {w}"] if chance.random() < 0.2 else []
        right = [f"{b} - {m} * {scale}", f"torch.sub({b}, {scale}.mul({m}))", f"{b}.sub(torch.mul({m}, {scale}))"]
        shift = self.named(chance.choice(wrong or right))
        if chance.random() < 0.1:
            self.disturb(norm, scale)
        if not early:
            scale, shift = self.named(self.seen(scale)), self.named(self.seen(shift))
        y = self.say(
            chance.choice(
                [
                    *(f"{x} * {scale} + {shift}", f"torch.add({shift}, {scale} * {x})"),
                    *(f"{x}.mul({scale}).add_({shift})", f"{x}.mul_({scale}).add({shift})"),
                ]
            )
        )
        if chance.random() < 0.1:
            self.disturb(norm, scale)
        return y

    def named(self, expression: str) -> str:
        """Write an expression that PyTorch accepts, and return its name."""
        name = self.say(expression)
        assert name is not None, expression
        return name

    def seen(self, vector: str) -> str:
        views = ["{}.reshape(1, -1, 1, 1)", "{}.view(1, -1, 1, 1)", "{}[None, :, None, None]", "{}[..., None, None]"]
        views += ["{}.unsqueeze(1).unsqueeze(2)", "torch.reshape({}, (1, -1, 1, 1))"]
        return self.chance.choice(views).format(vector)

    def disturb(self, norm: str, scale: str) -> None:
        """Write a change of one of the BatchNorm's tensors, or of its scale."""
        changed = [f"{norm}.running_mean", f"{norm}.running_var", f"{norm}.weight.data", f"{norm}.bias.data", scale]
        self.run(f"{self.chance.choice(changed)}.mul_(1.5)")


@dataclass
class Outcome:
    """A call's outputs and their strides, the input after it, gradients and buffers, by name.

    shared: the pairs of outputs and input that share memory. same: those that are one tensor.
    """

    values: dict[str, Tensor | None]
    shared: set[tuple[str, str]]
    same: set[tuple[str, str]] = field(default_factory=set)


def outcome(run: Callable[..., Any], module: nn.Module, x: Tensor, gradients: bool) -> Outcome:
    """Call `run`, which is `module` or a compiled form of it, on a copy of x; with `gradients`, run backward too."""
    leaf = x.clone().requires_grad_(gradients)
    given = leaf.clone()
    with torch.set_grad_enabled(gradients):
        results = run(given)
    results = listed(results)
    values: dict[str, Tensor | None] = {f"output {i}": y.detach().clone() for i, y in enumerate(results)}
    sizes = [list(zip(y.shape, y.stride(), strict=True)) for y in results]  # a stride over one element is arbitrary
    strides = {f"strides of output {i}": torch.tensor([t for s, t in pairs if s > 1]) for i, pairs in enumerate(sizes)}
    tensors = {"input": given, **{f"output {i}": y for i, y in enumerate(results)}}
    shared = {
        (a, b)
        for (a, s), (b, t) in itertools.combinations(tensors.items(), 2)
        if s.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
    }
    same = {(a, b) for (a, s), (b, t) in itertools.combinations(tensors.items(), 2) if s is t}
    values |= strides | {"input": given.detach().clone()}
    if gradients:
        loss = sum((torch.linspace(-1, 1, y.numel()).view(y.shape) * y).sum() for y in results if y.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()
        values |= {"gradient of the input": leaf.grad}
        values |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    values |= dict(module.named_buffers())
    return Outcome(values, shared, same)


def differences(got: Outcome, want: Outcome, sharing: bool = True) -> list[str]:
    """Return descriptions of all differences. sharing: whether differences in shared memory count."""
    found = []
    if sharing and got.shared != want.shared:
        found.append(f"tensors that share memory: {sorted(got.shared)}, eager {sorted(want.shared)}")
    for name, value in want.values.items():
        other = got.values[name]
        if value is None or other is None:
            if value is not other:
                found.append(
                    f"{name}: {'none' if other is None else 'one'}, eager {'none' if value is None else 'one'}"
                )
        elif value.shape != other.shape or value.dtype != other.dtype:
            found.append(f"{name}: {list(other.shape)} {other.dtype}, eager {list(value.shape)} {value.dtype}")
        elif name.startswith("strides"):
            if not torch.equal(value, other):
                found.append(f"{name}: {other.tolist()}, eager {value.tolist()}")
        elif value.numel():
            error = float((value.double() - other.double()).abs().max())
            if not error <= EXACT_ANY_NET * (1 + float(value.double().abs().max())):
                found.append(f"{name}: off by {error:.2g}, eager's largest is {float(value.abs().max()):.2g}")
    return found


@dataclass
class Verdict:
    """The differences from eager PyTorch, and counts of comparisons and rewritten matches by kind."""

    faults: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: Verdict) -> Verdict:
        self.faults += other.faults
        self.counts += other.counts
        return self


def examine(seed: int, inner: str | None = None) -> Verdict:
    """Compare the net of `seed` in all modes, compiled and optimized.

    inner: the backend that compiles the rewritten graph; by default "aot_eager", and Inductor for every 50th seed.
    """
    program = Writer(seed).write()
    inner = inner or ("inductor" if seed % INDUCTOR_EVERY == INDUCTOR_EVERY - 1 else "aot_eager")
    verdict = Verdict()
    for mode in MODES:
        verdict += compiled(program.build, program.images(), mode, inner)
    for output in (None, *range(len(program.outputs))):  # all at once, and each alone, which is rejected less often
        verdict += optimized(program.build(output), program.images())
    return verdict


def compiled(build: Callable[[], nn.Module], x: Tensor, mode: str, inner: str = "aot_eager") -> Verdict:
    """Compare the net, compiled by our backend with `inner` as its inner backend, to eager PyTorch.

    If `inner` alone differs from eager too, the difference is counted as PyTorch's, not ours.
    """
    verdict, gradients = Verdict(), mode != "eval"

    def form(compile: Callable[[nn.Module], Callable[..., Any]] | None) -> Outcome:
        module = build().train(mode == "train")
        torch._dynamo.reset()
        return outcome(module if compile is None else compile(module), module, x, gradients)

    try:
        want = form(None)
    except RuntimeError:  # autograd rejects some changes in place
        verdict.counts[f"{mode}: eager refuses"] += 1
        return verdict
    options = {"fastres.rewrite": "always", "fastres.inner": inner}
    sharing = gradients or inner != "inductor"  # Inductor without gradients may or may not alias equal outputs
    with rewritten(verdict.counts):
        found = attempt(lambda: form(lambda m: torch.compile(m, backend="fastres", options=options)), want, sharing)
    if found and attempt(lambda: form(lambda m: torch.compile(m, backend=inner)), want, sharing):
        verdict.counts[f"{mode}: {inner} alone differs as well"] += 1
    else:
        verdict.counts[f"{mode}: compiled"] += 1
        verdict.faults += [f"{mode}, {inner}: {line}" for line in found]
    return verdict


@contextmanager
def rewritten(counts: Counter[str]) -> Iterator[None]:
    """Count the matches that the backend rewrites within this context, from its log."""

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (explanation,) = record.args  # type: ignore[misc]
            counts["matches rewritten"] += len(explanation.hits)  # type: ignore[attr-defined]

    log, handler = logging.getLogger("fastres.compile"), Counting()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def attempt(form: Callable[[], Outcome], want: Outcome, sharing: bool) -> list[str]:
    try:
        return differences(form(), want, sharing)
    except Exception as error:  # any exception of a compiler counts as a difference
        return [one_line(error)]


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def optimized(model: nn.Module, x: Tensor) -> Verdict:
    """Compare `optimize(model)` with the model, in float64 and float32, unless `optimize` rejects the model.

    In float64 the input must also be unchanged afterwards, and no two tensors may share memory, except that a tensor
    which the model returns twice may be returned twice.
    """
    model.eval()
    want = outcome(model, model, x, gradients=False)
    try:
        net = fastres.optimize(model)
    except ValueError:
        return Verdict(counts=Counter({"optimize refuses": 1}))
    try:
        got = outcome(net, model, x, gradients=False)
    except Exception as error:  # also an error of optimize's own comparison: then the plan is wrong
        return Verdict([f"optimize: {one_line(error)}"])
    results = {name: value for name, value in want.values.items() if name.startswith("output")}
    found = differences(got, Outcome(results | {"input": x}, set()), sharing=False)
    found += [f"{a} and {b} share memory" for a, b in sorted(got.shared - (got.same & want.same))]
    verdict = Verdict([f"optimize: {line}" for line in found], Counter(optimized=1))
    verdict.faults += in_single_precision(model, x, list(results.values()))
    return verdict


def in_single_precision(model: nn.Module, x: Tensor, want: Sequence[Any]) -> list[str]:
    """Compare `optimize(model)` in float32, on oneDNN's primitives, with the float64 results `want`.

    The batch is split into single images where the plan allows it. The error may be a few times that of eager PyTorch
    in float32.
    """
    eager = copy.deepcopy(model).float()
    with (
        torch.no_grad(),
        mock.patch("fastres.inference.optimized.MAX_ALIVE_BYTES", 1),
        mock.patch("fastres.inference.optimized.FIRST_SLICE", 1),
    ):
        theirs = listed(eager(x.float()))
        try:
            ours = listed(fastres.optimize(eager)(x.float()))
        except Exception as error:
            return [f"optimize in float32: {one_line(error)}"]
    wrong = []
    for y, their, right in zip(ours, theirs, want, strict=True):
        allowed = WHOLE_NETS * float((their - right).abs().max()) + ROUNDING * (1 + float(right.abs().max()))
        error = float((y - right).abs().max())
        if not error <= allowed:
            wrong.append(f"optimize in float32: off by {error:.2g}, {allowed:.2g} is allowed")
    return wrong


def listed(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


def command(seed: int) -> str:
    """Return the command that shows the net of `seed` and its differences."""
    return f"python tests/helpers/fuzz.py --show --nets 1 --first {seed}"


def examined(seeds: Sequence[int], jobs: int) -> Iterator[Verdict]:
    torch.set_num_threads(1)  # the tensors are tiny, so more threads would be slower
    if jobs == 1:
        yield from map(examine, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap(examine, seeds, chunksize=5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--nets", type=int, default=100, help="number of nets (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first net (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes, 0 for one per core (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print each net's source")
    args = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    wrong = 0
    seeds = range(args.first, args.first + args.nets)
    verdicts = zip(seeds, examined(seeds, args.jobs or os.cpu_count() or 1), strict=True)
    for seed, verdict in tqdm(verdicts, total=args.nets, disable=None):  # None: only on a terminal
        if args.show:
            print(Writer(seed).write().source())
        if verdict.faults:
            wrong += 1
            print(command(seed))
            print("\n".join(f"    {fault}" for fault in verdict.faults), flush=True)
        counts += verdict.counts
    print("\n".join(f"{count:7} {what}" for what, count in sorted(counts.items())))
    print(f"{wrong} of {args.nets} nets differ from eager PyTorch")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
