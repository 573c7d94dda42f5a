"""Reads a kernel's disassembly (nvdisasm -c): its instructions, its main loop, and register hazards with wgmma."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Opcodes of the tensor cores: Ampere/Ada, Hopper (wgmma), Blackwell (tcgen05).
MATRIX = ("HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")


class Instruction(NamedTuple):
    """An instruction: its full opcode (LDG.E.128), its operands, and whether it has a predicate."""

    opcode: str
    operands: str
    guarded: bool

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]


_FP64 = ("DADD", "DMUL", "DFMA")
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions in order, and for each label the index of the instruction that follows it."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            labels[match.group(1)] = len(code)
        elif match := _LINE.match(line):
            code.append(Instruction(match.group(2), match.group(3), match.group(1) is not None))
    return code, labels


def _target(instruction: Instruction, labels: Mapping[str, int]) -> int | None:
    """Return the index of a branch's target; None for any other instruction."""
    match = re.search(r"\.L_x_\d+", instruction.operands) if instruction.base == "BRA" else None
    return labels[match.group()] if match else None


def main_loop(code: Sequence[Instruction], labels: Mapping[str, int]) -> tuple[Instruction, ...]:
    """Return the innermost loop with the most tensor-core instructions; if no loop has any, the longest innermost one.

    The result is empty without a loop.
    """
    loops = []
    for end, instruction in enumerate(code):
        start = _target(instruction, labels)
        # The retry loops of mbarrier waits are placed after EXIT and jump far back: they are no loops of the program.
        if start is not None and start < end and not any(i.base == "EXIT" for i in code[start:end]):
            loops.append((start, end, sum(i.base in MATRIX for i in code[start:end])))
    loops = [loop for loop in loops if loop[2]] or loops
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        return ()
    start, end, _ = max(inner, key=lambda loop: (loop[2], loop[1] - loop[0]))
    return tuple(code[start : end + 1])


def matrix_name(instruction: Instruction) -> str:
    shape = re.match(r"\w+(\.\d+x?\d+\w*)?", instruction.opcode).group()  # type: ignore[union-attr]
    if not instruction.base.endswith("GMMA"):
        return shape
    return f"{shape} {'RS' if _fragment(instruction) else 'SS'}"


def _fragment(wgmma: Instruction) -> frozenset[int]:
    """Return the four registers of an RS wgmma's first operand; empty if it is in shared memory (SS)."""
    match = re.match(r"R\d+, R(\d+), gdesc", wgmma.operands)
    return frozenset(range(int(match.group(1)), int(match.group(1)) + 4)) if match else frozenset()


def _written(instruction: Instruction) -> range:
    """Return the vector registers that an instruction writes: its first operand, after any predicates."""
    match = re.match(r"(?:P\d,\s*|PT,\s*)?R(\d+)", instruction.operands)
    if not match or instruction.base in ("BAR", "RET", "BRX", "WARPSYNC", "NANOSLEEP"):
        return range(0)
    modifiers = set(instruction.opcode.split(".")[1:])
    if instruction.base == "LDSM":
        width = 4 if "4" in modifiers else 2 if "2" in modifiers else 1
    elif "128" in modifiers:
        width = 4
    else:
        wide = modifiers & {"64", "WIDE"} or instruction.opcode in ("CS2R", "LEPC") or instruction.base in _FP64
        width = 2 if wide else 1
    return range(int(match.group(1)), int(match.group(1)) + width)


def hazards(code: Sequence[Instruction], labels: Mapping[str, int]) -> tuple[str, ...]:
    """Return descriptions of writes to registers that a wgmma in flight may still read as its first operand.

    All paths through the program are followed. wgmma is asynchronous: `gsb0` closes a group of them, and
    `WARPGROUP.DEPBAR.LE gsb0, n` waits until at most n groups are in flight. The state on a path is the set of fragment
    registers of each group that may be in flight, oldest first, with the open group last.
    """
    if not any(i.base.endswith("GMMA") and _fragment(i) for i in code):
        return ()
    nothing: frozenset[int] = frozenset()
    found: dict[int, str] = {}
    todo: list[tuple[int, tuple[frozenset[int], ...]]] = [(0, (nothing,))]  # where to continue, and the groups
    seen, joins = set(), set(labels.values())
    while todo:
        at, groups = todo.pop()
        while at < len(code):
            if at in joins:
                if (at, groups) in seen:
                    break
                seen.add((at, groups))
            i = code[at]
            *closed, current = groups
            if i.base.endswith("GMMA"):
                groups = (*closed, current | _fragment(i))
                if "gsb0" in i.operands:
                    groups = (*groups[-8:], nothing)  # kernels have at most 8 in flight
            elif i.opcode.startswith("WARPGROUP.DEPBAR"):
                left = int(i.operands.rsplit(",", 1)[1], 16)
                groups = (*closed[max(len(closed) - left, 0) :], current)
            elif hit := nothing.union(*groups).intersection(_written(i)):
                found[at] = f"instruction {at}, {i.opcode}, writes R{min(hit)} while wgmma may read it"
            target = _target(i, labels)
            if target is not None and not i.guarded and i.operands.startswith("`"):  # unconditional
                at = target
                continue
            if target is not None:
                todo.append((target, groups))
            elif i.base == "EXIT" and not i.guarded:
                break
            at += 1
    return tuple(found[at] for at in sorted(found))
