"""Compare random nets (`fuzz.py`) with eager PyTorch, and check that the fuzzer finds known faults put back."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import fuzz
import pytest

from fastres.compile import graph, layout, match
from fastres.inference import program, trace
from fastres.ops.operators import conv_affine_act, conv_bn_act

pytestmark = pytest.mark.usefixtures("compiled_afresh")

NETS = 100


@pytest.mark.parametrize("first", range(0, NETS, 10))
def test_random_nets_give_eagers_results(first: int) -> None:
    verdict, wrong = fuzz.Verdict(), []
    for seed in range(first, first + 10):
        of_net = fuzz.examine(seed)
        wrong += [fuzz.command(seed), *of_net.faults] if of_net.faults else []
        verdict += of_net
    assert not wrong, "\n".join(wrong)
    assert verdict.counts["matches rewritten"] >= 15, "the backend had little to do"
    assert verdict.counts["optimized"] >= 5


def test_the_nets_contain_difficult_code() -> None:
    """The nets contain in-place operations, views, aliases, modules used twice, and results that share memory."""
    programs = [fuzz.Writer(seed).write() for seed in range(NETS)]
    sources = [program.source() for program in programs]

    def having(pattern: str) -> int:
        return sum(bool(re.search(pattern, source, re.MULTILINE)) for source in sources)

    assert having(r"^        (F\.relu\(\w+, (True|inplace=True)\)|torch\.relu_|self\.relu\d+|\w+\.\w+_\()") >= 20
    assert having(r"[+*]= ") >= 10
    assert having(r"flatten|view\(x|reshape|\[:, |expand_as|permute|unsqueeze") >= 30
    assert having(r"self\.(?!relu)(\w+)\(.*\n(.*\n)*.*self\.\1\(") >= 10
    assert having(r"return .*, ") >= 40
    assert having(r"return .*\[:, :2\]") >= 5
    assert having("PadShortcut|F.pad") >= 5
    assert 20 <= sum(program.channels_last for program in programs) <= 60


def compiled(mode: str) -> Callable[[int], fuzz.Verdict]:
    """Return a function that compiles the net of a seed and compares it with eager."""

    def form(seed: int) -> fuzz.Verdict:
        program = fuzz.Writer(seed).write()
        return fuzz.compiled(program.build, program.images(), mode)

    return form


def optimized(seed: int) -> fuzz.Verdict:
    program, verdict = fuzz.Writer(seed).write(), fuzz.Verdict()
    for output in (None, *range(len(program.outputs))):
        verdict += fuzz.optimized(program.build(output), program.images())
    return verdict


def _reading(user: Any, root: Any, observed: bool) -> str:
    ours = graph.calls(user, conv_bn_act, conv_affine_act) or "example_value" not in user.meta
    return "ends" if ours else "follows"


MENDS: dict[str, tuple[Any, str, Any, Callable[[int], fuzz.Verdict], int]] = {
    # fix: (owner and name of the function that has the fix, a replacement without it, what then fails, first seed)
    "memory that is written into has one format": (graph.Memory, "is_observed", lambda *_: False, compiled("eval"), 0),
    "a write is known by any spelling": (graph, "nodes_in", lambda tree: [], compiled("eval"), 0),
    "dependent readers get the traced format": (layout, "_reading", _reading, compiled("eval"), 0),
    "nothing moves past a write": (match, "_obstacle", lambda *_: None, compiled("eval"), 25),
    "BatchNorms that share statistics go together": (
        match, "_sharing_statistics", lambda *_: [], compiled("train"), 120,
    ),
    "an addition into shared memory stays": (match, "_is_its_own", lambda *_: True, compiled("eval"), 1206),
    "views are tied to their memory": (trace._Translation, "_may_share", lambda *_: None, optimized, 0),
    "outputs that share memory are copied": (
        program, "borrows", lambda steps, outputs: (False,) * len(outputs.names), optimized, 30,
    ),
    "second names follow a change": (
        trace._Translation, "_is_same", lambda self, node, _: self._is_new(node), optimized, 70,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mend", MENDS)
def test_the_fuzzer_finds_faults_put_back(mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fix removed, at least one of 300 nets fails. Each case starts at a seed that fails soon, to save time."""
    owner, name, instead, form, first = MENDS[mend]
    monkeypatch.setattr(owner, name, instead)
    assert any(form(seed).faults for seed in range(first, first + 300))
