"""Compiles Triton kernels ahead of time, without a GPU, and checks properties of the binary that determine its speed.

    with record() as launches:                    # launchers called here launch nothing
        normalize(z, scale, shift, relu=True)     # meta tensors are enough
    binary = launches[0].compile(sm=90)           # or compile_kernel(fn, signature, constexprs, sm=90)
    check(binary, absent=("LDL",), registers=64)

TRITON_INTERPRET must be unset when the kernels are defined: their decorator decides whether they can be compiled.
Triton caches compiled kernels on disk. Registers and spills are read from ptxas' log, instructions from the disassembly
(`sass`).
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
    """A compiled kernel: its resources and instructions. Sizes are in bytes, registers per thread, shared memory per
    program."""

    name: str
    sm: int
    registers: int
    stack: int
    spill: int  # bytes stored and loaded
    shared: int
    warnings: tuple[str, ...]  # ptxas' performance warnings: C7515 and similar ones report that wgmma was serialised
    hazards: tuple[str, ...] = field(repr=False)  # writes to registers that wgmma may still be reading
    code: tuple[sass.Instruction, ...] = field(repr=False)
    loop: tuple[sass.Instruction, ...] = field(repr=False)  # the main loop; () without one

    def count(self, opcode: str, *, loop: bool = False) -> int:
        """Count the instructions with this base opcode and at least these modifiers, in any order.

        "LDG" counts all global loads, "LDG.128" those with the modifier 128. loop: count in the main loop only.
        """
        base, *modifiers = opcode.split(".")
        code = self.loop if loop else self.code
        return sum(i.base == base and set(modifiers) <= set(i.opcode.split(".")) for i in code)

    def opcodes(self, *, loop: bool = False) -> Counter[str]:
        return Counter(i.base for i in (self.loop if loop else self.code))

    @property
    def matrix(self) -> dict[str, int]:
        """The number of tensor-core instructions by opcode and shape, such as {"HGMMA.64x128x16 SS": 4}.

        For wgmma, "SS" or "RS" says whether the first operand is in shared memory or in registers.
        """
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

    signature: the Triton type of every runtime argument ("*bf16", "i32", "tensordesc<bf16[64, 64]>").
    constexprs: the value of every other argument, including those that are None or the integer 1.
    divisible: the arguments known to be multiples of 16; by default all pointers.

    Raises ValueError unless the two mappings together have each argument of `fn` exactly once, and no other name.
    """
    names = fn.arg_names
    passed = [*signature, *constexprs]
    if sorted(passed) != sorted(names):
        raise ValueError(f"{fn.__name__} takes the arguments {names}, but signature and constexprs have {passed}")
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
        """Return (kernel, types, constexprs, attributes, options): what Triton would compile for capability `sm`.

        Launches share a binary if their specialisations have the same `repr`.
        """
        backend = make_backend(GPUTarget("cuda", sm, 32))
        bind = create_function_from_signature(self.fn.signature, self.fn.params, backend)
        bound, specialization, options = bind(*self.args, **self.kwargs)
        _, types, constexprs, attrs = self.fn._pack_args(backend, self.kwargs, bound, specialization, options)
        return self.fn, types, constexprs, attrs, options

    def compile(self, sm: int = 90) -> Binary:
        """Compile the specialisation that this launch would use on a GPU of compute capability `sm`."""
        return _compile(*self.specialization(sm), sm)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Record kernel launches instead of running them; the context's value is the list of launches.

    Tensors may be on the meta device.
    """
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
    """Raise AssertionError that lists every requirement which `binary` does not meet.

    These always apply: no spills, no stack, no performance warning of ptxas, no wgmma register hazard.

    registers: the largest number per thread. shared: the largest number of bytes; None: no limit.
    matrix: the only tensor-core opcode that may and must occur ("HGMMA"), "" for none; None: not checked.
    present, absent, loop_absent: opcodes, as `Binary.count` takes them, that must occur, must not occur, and must not
    occur in the main loop.
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
    """Return the largest number that `pattern` finds: ptxas reports one per function."""
    return max(map(int, re.findall(pattern, log)))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
