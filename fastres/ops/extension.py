"""Builds and loads csrc/: the CPU and the CUDA kernels of the option-A shortcut, one shared library each.

If the cache folder (`fastres.paths`) doesn't have a library yet, ninja builds it at the first call of an operator with
a tensor of its device. This takes seconds, because the sources use torch's stable ABI without Python and
torch/extension.h. The library's name contains a hash of the sources, flags, torch version and platform.

The building process holds a file lock, which the system releases when the process dies. It builds in a temporary folder
and renames the result into place, so neither a killed build nor a second process leaves a partial library. The file
ends with the SHA-256 of everything before it. Loading a file that a full disk or a power failure has truncated could
end the process with a bus error: such a file fails the check and is built again.

`FASTRES_CUDA_EXT` controls both libraries. `0`: never build or load. `1`: raise `BuildError` if a library can't be
built or loaded. `auto` (the default): in that case, warn once per device, and use the ATen implementation.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastres.paths import cache_folder

DEVICES = ("cpu", "cuda")
_TORCH = Path(torch.__file__).parent
_MODES = ("0", "1", "auto")
_DIGEST = 64  # bytes at the end of a library: its SHA-256 in hexadecimal
_TORCH_ABI = "0x020a000000000000"  # 2.10: the oldest stable ABI that has everything csrc/ uses (parallel_for, empty)


class BuildError(RuntimeError):
    """The library of a device can't be built or loaded. The message gives the cause and the remedy."""


@dataclass(frozen=True)
class Status:
    """The state of both libraries. cpu, cuda: whether that device's kernels are loaded, or built already and loaded at
    first use. reason: the state of both, as text."""

    cpu: bool
    cuda: bool
    reason: str


def load(device: str) -> bool:
    """Build and load the kernels for tensors of `device` if necessary; return True if they are loaded.

    device: a type such as "cpu" or "cuda"; other devices have no library. Unless it raises, the result holds for the
    rest of the process. Raises BuildError if this fails under `FASTRES_CUDA_EXT=1`, and ValueError for an unknown value
    of `FASTRES_CUDA_EXT`.
    """
    if device in _outcome:
        return _outcome[device] is None
    if device not in DEVICES:
        return False
    with _lock:
        if device not in _outcome:
            _outcome[device] = _try_load(device)
    return _outcome[device] is None


def status(build: bool = False) -> Status:
    """Return whether the shortcut has its own kernel or runs as plain PyTorch, on the CPU and on CUDA, and why.

    build: first build and load both libraries, with the errors of `load`. By default nothing is built or loaded.
    """
    if build:
        for device in DEVICES:
            load(device)
    (cpu, cpu_reason), (cuda, cuda_reason) = map(_describe, DEVICES)
    return Status(cpu, cuda, f"shortcut on the CPU: {cpu_reason}; on CUDA: {cuda_reason}")


# For each device tried so far: None if its library is loaded, else the reason why not. In that second case ATen is used
# for the rest of the process.
_outcome: dict[str, str | None] = {}
_lock = threading.Lock()


def _mode() -> str:
    mode = os.environ.get("FASTRES_CUDA_EXT") or "auto"
    if mode not in _MODES:
        raise ValueError(f"FASTRES_CUDA_EXT is {mode!r}; accepted: {', '.join(_MODES)}")
    return mode


def _try_load(device: str) -> str | None:
    mode = _mode()
    if mode == "0":
        return "off by FASTRES_CUDA_EXT=0"
    try:
        library = build(device)
        try:
            torch.ops.load_library(str(library))
        except (OSError, UnicodeError) as error:  # UnicodeError: the folder's name is not UTF-8
            cause = error.__cause__ or error
            raise BuildError(f"{library} doesn't load ({cause}); delete it to have it built again") from error
    except BuildError as error:
        if mode == "1":
            raise
        warnings.warn(
            f"fastres: the option-A shortcut runs on plain PyTorch for {device.upper()} tensors: {error} "
            "(FASTRES_CUDA_EXT=0 silences this)",
            RuntimeWarning,
            stacklevel=2,
        )
        return str(error)
    return None


def _describe(device: str) -> tuple[bool, str]:
    if device in _outcome:
        outcome = _outcome[device]
        return outcome is None, "own kernel, loaded" if outcome is None else f"plain PyTorch, {outcome}"
    if _mode() == "0":
        return False, "plain PyTorch, off by FASTRES_CUDA_EXT=0"
    try:
        recipe = _recipe(device)
    except BuildError as error:
        return False, f"plain PyTorch, {error}"
    if _is_whole(recipe.library):
        return True, "own kernel, built, loads at first use"
    return False, "own kernel, not built yet, builds at first use"


@dataclass(frozen=True)
class _Recipe:
    """How to build a library: run `command -o RESULT SOURCE libraries`. key: the hash in the library's name."""

    device: str
    source: Path
    command: tuple[str, ...]
    libraries: tuple[str, ...]
    key: str

    @property
    def name(self) -> str:
        return f"shortcut_{self.device}-{self.key}.so"

    @property
    def library(self) -> Path:
        return cache_folder() / self.name


def build(device: str, archs: tuple[str, ...] | None = None) -> Path:
    """Return the path of the library of `device` ("cpu" or "cuda"); build it unless the cache has it intact.

    Loads nothing. archs: compute capabilities to build for on cuda, such as ("80", "90"); by default those of the GPUs
    that are present. Raises BuildError, which gives the cause and the remedy.
    """
    recipe = _recipe(device, archs)
    if _is_whole(recipe.library):
        return recipe.library
    try:
        recipe.library.parent.mkdir(parents=True, exist_ok=True)
        with _file_lock(recipe.library.with_suffix(".lock")):
            if not _is_whole(recipe.library):
                _run(recipe)
    except OSError as error:
        raise BuildError(
            f"the cache folder {recipe.library.parent} can't be written ({error.strerror}); "
            "set FASTRES_CACHE_DIR to a folder that can be written"
        ) from error
    return recipe.library


def _run(recipe: _Recipe) -> None:
    """Build in a temporary folder and move the result into place. The caller holds the lock."""
    library = recipe.library
    for abandoned in library.parent.glob(f"{library.stem}.*.build"):
        shutil.rmtree(abandoned, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{library.stem}.", suffix=".build", dir=library.parent))
    try:
        command, libraries = (shlex.join(part).replace("$", "$$") for part in (recipe.command, recipe.libraries))
        rule = f"rule shared\n  command = {command} -o $out $in {libraries}\n"
        source = re.sub(r"([$ :])", r"$\1", str(recipe.source))
        (folder / "build.ninja").write_text(f"{rule}build {recipe.name}: shared {source}\n")
        done = subprocess.run([_ninja(), "-C", str(folder)], capture_output=True, text=True, errors="replace")
        product = folder / recipe.name
        if done.returncode or not product.exists():
            cause = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise BuildError(f"building {recipe.source.name} failed:\n{cause}\n")
        digest = _digest(product.read_bytes())
        with product.open("ab") as file:  # loaders ignore bytes after the end of an ELF file
            file.write(digest)
        os.replace(product, library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_whole(library: Path) -> bool:
    """Return True if the file exists and its digest is correct."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return content[-_DIGEST:] == _digest(content[:-_DIGEST])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl  # POSIX only, and so are the builds

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _recipe(device: str, archs: tuple[str, ...] | None = None) -> _Recipe:
    if sys.platform != "linux":
        raise BuildError(f"own kernels are built on Linux only, not on {sys.platform}")
    folder = Path(importlib.import_module("fastres.csrc").__path__[0])
    flags = ["-O3", "-std=c++17", "-shared", f"-DTORCH_TARGET_VERSION={_TORCH_ABI}"]
    if device == "cpu":
        source = folder / "shortcut.cpp"
        compiler = _cxx()
        flags += ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", *_instruction_set()]
    else:
        source = folder / "shortcut_cuda.cu"
        compiler = [_nvcc()]
        flags += [
            "-DUSE_CUDA",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-cudart=shared",
            "--threads=0",
            *_gencode(archs),
        ]
    digest = hashlib.sha256()
    for part in (source.read_bytes(), (folder / "shortcut.h").read_bytes()):
        digest.update(hashlib.sha256(part).digest())
    digest.update(repr((flags, torch.__version__, platform.machine(), platform.libc_ver())).encode())
    libraries = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", *(["-ltorch_cuda"] if device == "cuda" else [])]
    command = (*compiler, *flags, f"-I{_TORCH / 'include'}")
    return _Recipe(device, source, command, tuple(libraries), digest.hexdigest()[:16])


def _instruction_set() -> list[str]:
    """Return compiler flags for the instruction set that ATen uses on this CPU, so that our kernels are not slower.

    The flags are part of the library's key, so machines with different CPUs can share a cache folder.
    """
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    if platform.machine() != "x86_64":
        return []
    return {"AVX2": avx2, "AVX512": avx2 + avx512}.get(torch.backends.cpu.get_cpu_capability(), [])


def _gencode(archs: tuple[str, ...] | None) -> list[str]:
    """Return nvcc's flags for one binary per compute capability in `archs`; by default, those of the GPUs present.

    torch's own extension builder takes the list from TORCH_CUDA_ARCH_LIST or from the GPUs, not as an argument.
    """
    if archs is None:
        if not torch.cuda.is_available():
            raise BuildError("no CUDA GPU is present")
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        archs = tuple(f"{major}{minor}" for major, minor in sorted(capabilities))
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]


def _cxx() -> list[str]:
    cxx = os.environ.get("CXX", "")
    try:
        named = shlex.split(cxx)
    except ValueError as error:
        raise BuildError(f"CXX is {cxx!r}, which is not a valid command ({error}); set it to g++ or clang++") from error
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX names {named[0]!r}, which was not found" if named else "no C++ compiler was found"
    raise BuildError(f"{missing}; install g++ or clang++, or set CXX to one")


def _nvcc() -> str:
    """Return the path of the first nvcc found in CUDA_HOME, CUDA_PATH, PATH (it may be a wrapper script) and
    /usr/local/cuda. Its major version must be that of torch's CUDA."""
    wanted = torch.version.cuda
    if wanted is None:
        raise BuildError("this torch is built without CUDA")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if (nvcc := shutil.which(candidate)) is None:
            continue
        version = re.search(
            r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        )
        major = wanted.split(".")[0]
        if version is None or version[1] != major:
            found = f"CUDA {version[1]}" if version else "an unknown CUDA"
            raise BuildError(
                f"{nvcc} is from {found}, torch is built for CUDA {wanted}; point CUDA_HOME to a CUDA {major} toolkit"
            )
        return nvcc
    raise BuildError("nvcc was not found; install the CUDA toolkit or point CUDA_HOME to it")


def _ninja() -> str:
    """Return the path of the `ninja` package's binary, which need not be on PATH; else that of the system's ninja."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        if found := shutil.which("ninja"):
            return found
    raise BuildError("ninja was not found; pip install ninja")
