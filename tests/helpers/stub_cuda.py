"""Triton's whole host side on a machine without a GPU: a launch is compiled, bound, packed and handed to a driver that
runs nothing.

    with driver() as launches:
        normalize(z, scale, shift, relu=True)     # on CPU tensors
    launches[0].arguments                         # what the GPU would have read

`stub_cuda.c` is the driver: a libcuda.so.1 that refuses tensor maps as the real one does.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime import driver as runtime

Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, *[ctypes.c_uint] * 4, ctypes.POINTER(ctypes.c_void_p))


@dataclass(frozen=True)
class Launch:
    """What the driver was handed. Arguments in the order of the compiled kernel's parameters, a tensor map as the 104
    bytes that `stub_cuda.c` makes of it."""

    name: str
    grid: tuple[int, int, int]
    shared: int
    arguments: tuple[bytes, ...]


def unbuildable() -> str | None:
    """Why the stub and Triton's launchers can't be built here, None where they can."""
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there is no C compiler"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.exists() else f"{header} is missing"


@cache
def library() -> ctypes.CDLL:
    """The stub, loaded under the name by which Triton's modules ask for the driver."""
    folder = Path(tempfile.mkdtemp(prefix="stub-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # till then launchers are linked against it
    built, source = folder / "libcuda.so.1", Path(__file__).with_name("stub_cuda.c")
    command = [os.environ.get("CC") or shutil.which("gcc") or "clang", "-Wall", "-Wextra", "-Werror", "-O1", "-shared"]
    command += ["-fPIC", *(f"-I{path}" for path in nvidia.include_dirs), str(source), "-o", str(built)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    triton.knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


class Driver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA GPUs, but for the questions it has PyTorch answer."""

    def __init__(self, sm: int) -> None:
        super().__init__()
        self.sm = sm
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


@contextmanager
def driver(sm: int = 90) -> Iterator[list[Launch]]:
    """Within, kernels are launched as on a GPU of compute capability `sm`, with CPU tensors for its memory, and every
    launch is appended to the list. Only where kernels are not interpreted and torch sees no GPU."""
    assert not triton.knobs.runtime.interpret
    assert not torch.cuda.is_available()
    stub, load = library(), CompiledKernel._init_handles
    launches: list[Launch] = []
    kernels: dict[int, CompiledKernel] = {}

    def loaded(kernel: CompiledKernel) -> None:
        load(kernel)
        kernels[kernel.function] = kernel

    @Callback
    def on_launch(function: int, x: int, y: int, z: int, shared: int, parameters: Any) -> None:
        kernel = kernels[function]
        sizes = parameter_bytes(kernel.asm["ptx"])
        arguments = tuple(ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes))
        launches.append(Launch(kernel.name, (x, y, z), shared, arguments))

    stub.stub_on_launch(on_launch)
    before = runtime._active
    runtime.set_active(Driver(sm))
    try:
        with patch.object(CompiledKernel, "_init_handles", loaded):
            yield launches
    finally:
        runtime._active = before
        for kernel in kernels.values():  # what was loaded into the stub serves nobody else
            kernel.src.fn.device_caches.clear()


def parameter_bytes(ptx: str) -> list[int]:
    """Sizes of a kernel's parameters."""
    declared = re.search(r"\.entry [^(]*\((.*?)\n\)", ptx, re.DOTALL)
    assert declared is not None
    sizes = []
    for line in declared[1].split("\n"):
        if found := re.search(r"\.param (?:\.align \d+ )?\.(b|u|s|f)(\d+).*?(?:\[(\d+)\])?,?$", line):
            sizes.append(int(found[2]) // 8 * int(found[3] or 1))
    return sizes
