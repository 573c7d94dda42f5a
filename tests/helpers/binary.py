"""Compile a Triton kernel ahead of time, without a GPU, and read what the binary says about its speed.

    with record() as launches:                    # launchers called here launch nothing
        normalize(z, scale, shift, relu=True)     # meta tensors do
    binary = launches[0].compile(sm=90)           # or compile_kernel(fn, signature, constexprs, sm=90)
    check(binary, absent=("LDL",), registers=64)

Works only where TRITON_INTERPRET is unset: the decorator decides whether a kernel can be compiled at all. Triton caches
what it compiles on disk; registers and spills come from ptxas' log, instructions from the disassembly (`sass`).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.knobs import nvidia as tools
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Binary:
    """What one compiled kernel needs and does. Sizes in bytes, registers per thread, shared memory per program."""

    name: str
    sm: int
    registers: int
    stack: int
    spill: int  # bytes stored and loaded
    shared: int
    warnings: tuple[str, ...]  # of ptxas: C7515 and its kin say that wgmma was serialised
    hazards: tuple[str, ...] = field(repr=False)  # registers that wgmma may still be reading when they are written
    code: tuple[sass.Instruction, ...] = field(repr=False)
    loop: tuple[sass.Instruction, ...] = field(repr=False)  # the main loop, () without one

    def count(self, opcode: str, *, loop: bool = False) -> int:
        """Instructions whose opcode is `opcode` or refines it: "LDG", "LDG.128" (modifiers in any order)."""
        base, *modifiers = opcode.split(".")
        code = self.loop if loop else self.code
        return sum(i.base == base and set(modifiers) <= set(i.opcode.split(".")) for i in code)

    def opcodes(self, *, loop: bool = False) -> Counter[str]:
        return Counter(i.base for i in (self.loop if loop else self.code))

    @property
    def matrix(self) -> dict[str, int]:
        """Tensor-core instructions by shape and, for wgmma, home of the first operand: {"HGMMA.64x128x16 SS": 4}."""
        return dict(Counter(sass.matrix_name(i) for i in self.code if i.base in sass.MATRIX))


def compile_kernel(
    fn: JITFunction[Any],
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    sm: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible: Iterable[str] | None = None,
) -> Binary:
    """Compile `fn` for compute capability `sm` (80, 89, 90, 100, 120).

    signature: Triton type of every runtime argument ("*bf16", "i32", "tensordesc<bf16[64, 64]>"); constexprs: value of
    every other argument (also of those that are None or the integer 1); divisible: the arguments known to be multiples
    of 16, by default every pointer. Raises ValueError for an argument that is in neither or in both.
    """
    names = fn.arg_names
    given = [*signature, *constexprs]
    if sorted(given) != sorted(names):
        raise ValueError(f"{fn.__name__} takes {names}; signature and constexprs name {given}")
    if divisible is None:
        divisible = [name for name, kind in signature.items() if kind.startswith("*")]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    types = {name: signature.get(name, "constexpr") for name in names}
    return _compile(fn, types, dict(constexprs), attrs, {"num_warps": num_warps, "num_stages": num_stages}, sm)


@dataclass(frozen=True)
class Launch:
    """One recorded launch `fn[grid](*args, **kwargs)`."""

    fn: JITFunction[Any]
    grid: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def specialization(self, sm: int = 90) -> tuple[Any, ...]:
        """(kernel, types, constexprs, attributes, options): what Triton would compile for capability `sm`. Launches
        whose specialisations have the same `repr` share one binary."""
        backend = make_backend(GPUTarget("cuda", sm, 32))
        bind = create_function_from_signature(self.fn.signature, self.fn.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs)
        _, types, constexprs, attrs = self.fn._pack_args(backend, self.kwargs, bound, specialization, options)
        return self.fn, types, constexprs, attrs, options

    def compile(self, sm: int = 90) -> Binary:
        """The very specialisation that this launch would compile on a GPU of compute capability `sm`."""
        return _compile(*self.specialization(sm), sm)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within, `fn[grid](...)` launches nothing and is appended to the list. Tensors may be on the meta device."""
    launches: list[Launch] = []

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, grid, args, kwargs))

    with patch.object(JITFunction, "run", run):
        yield launches


def check(
    binary: Binary,
    *,
    registers: int = 255,
    shared: int | None = None,
    matrix: str | None = None,
    present: Sequence[str] = (),
    absent: Sequence[str] = (),
    loop_absent: Sequence[str] = (),
) -> None:
    """Raises AssertionError that lists every promise `binary` breaks.

    Always: no spills, no stack, no ptxas performance warning, no wgmma register hazard. On request: at most `registers`
    per thread and `shared` bytes; `matrix`, the only tensor-core opcode ("HGMMA"; "" for none); opcodes that must
    occur, that must not, and that must not in the main loop, each as `Binary.count` takes it.
    """
    wrong = []
    if binary.spill or binary.stack:
        wrong.append(f"{binary.spill} B spilled, {binary.stack} B of stack")
    wrong += [f"ptxas: {line}" for line in binary.warnings]
    if binary.hazards:
        wrong.append(f"hazard: {binary.hazards[0]} ({len(binary.hazards)} such)")
    if binary.registers > registers:
        wrong.append(f"{binary.registers} registers, at most {registers} allowed")
    if shared is not None and binary.shared > shared:
        wrong.append(f"{binary.shared} B of shared memory, at most {shared} allowed")
    if matrix is not None:
        found = {op: n for op in sass.MATRIX if (n := binary.count(op))}
        if set(found) != ({matrix} if matrix else set()):
            wrong.append(f"matrix instructions {found or 'none'}, expected only {matrix or 'none'}")
    wrong += [f"no {op} in it" for op in present if not binary.count(op)]
    wrong += [f"{op} x{n} in it" for op in absent if (n := binary.count(op))]
    wrong += [f"{op} x{n} in the main loop" for op in loop_absent if (n := binary.count(op, loop=True))]
    if wrong:
        raise AssertionError(f"{binary.name} for sm_{binary.sm}: " + "; ".join(wrong))


def _compile(fn: Any, types: dict[str, str], constexprs: Any, attrs: Any, options: dict[str, Any], sm: int) -> Binary:
    source = ASTSource(fn, signature=types, constexprs=constexprs, attrs=attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        log = _run(get_ptxas(sm).path, "-v", f"--gpu-name={sm_arch_from_capability(sm)}", "-o", "/dev/null", str(ptx))
        code, labels = sass.parse(_run(tools.nvdisasm.path, "-c", str(cubin)))
    return Binary(
        name=fn.__name__,
        sm=sm,
        registers=_number(r"Used (\d+) registers", log),
        stack=_number(r"(\d+) bytes stack frame", log),
        spill=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        shared=kernel.metadata.shared,
        warnings=tuple(line.strip() for line in log.splitlines() if re.search(r"\(C7\d+\)|warning", line)),
        hazards=sass.hazards(code, labels),
        code=tuple(code),
        loop=sass.main_loop(code, labels),
    )


def _number(pattern: str, log: str) -> int:
    """The largest over the functions that ptxas reports."""
    return max(map(int, re.findall(pattern, log)))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
