"""Runs Triton's complete host side without a GPU: launches are compiled, bound, packed, and sent to a stub driver.

    with driver() as launches:
        normalize(z, scale, shift, relu=True)     # on CPU tensors
    launches[0].arguments                         # the bytes that the GPU would read

The stub driver, `stub_cuda.c`, is a libcuda.so.1 that executes nothing. It rejects the tensor maps that the real driver
rejects.
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
    """A launch as the driver received it.

    arguments: bytes, in the order of the compiled kernel's parameters. A tensor map begins with the struct `Map` that
    `stub_cuda.c` writes into it.
    """

    name: str
    grid: tuple[int, int, int]
    shared: int
    arguments: tuple[bytes, ...]


def unbuildable() -> str | None:
    """Return the reason why the stub and Triton's launchers can't be built here; None if they can."""
    if os.environ.get("CC") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "there is no C compiler"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.exists() else f"{header} is missing"


@cache
def library() -> ctypes.CDLL:
    """Build the stub and load it under the driver's name, libcuda.so.1, which Triton's modules look up."""
    folder = Path(tempfile.mkdtemp(prefix="stub-cuda-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)  # not earlier: launchers are linked against it
    built, source = folder / "libcuda.so.1", Path(__file__).with_name("stub_cuda.c")
    command = [os.environ.get("CC") or shutil.which("gcc") or "clang", "-Wall", "-Wextra", "-Werror", "-O1", "-shared"]
    command += ["-fPIC", *(f"-I{path}" for path in nvidia.include_dirs), str(source), "-o", str(built)]
    subprocess.run([*command, "-Wl,-soname,libcuda.so.1"], check=True)
    triton.knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)


class Driver(nvidia.CudaDriver):
    """Triton's driver for NVIDIA GPUs, with fixed answers where the original calls PyTorch."""

    def __init__(self, sm: int) -> None:
        super().__init__()
        self.sm = sm
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


@contextmanager
def driver(sm: int = 90) -> Iterator[list[Launch]]:
    """Launch kernels as on a GPU of compute capability `sm`, with CPU tensors; the context's value lists the launches.

    Requires that kernels are not interpreted and that torch has no GPU.
    """
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
        for kernel in kernels.values():  # handles from the stub are useless after this context
            kernel.src.fn.device_caches.clear()


def parameter_bytes(ptx: str) -> list[int]:
    """Return the sizes of a kernel's parameters in bytes, as its PTX declares them."""
    declared = re.search(r"\.entry [^(]*\((.*?)\n\)", ptx, re.DOTALL)
    assert declared is not None
    sizes = []
    for line in declared[1].split("\n"):
        if found := re.search(r"\.param (?:\.align \d+ )?\.(b|u|s|f)(\d+).*?(?:\[(\d+)\])?,?$", line):
            sizes.append(int(found[2]) // 8 * int(found[3] or 1))
    return sizes
