"""Building and loading csrc/: missing or failing compilers, killed builds, concurrent processes, damaged or read-only
caches. Also checks that the CUDA source compiles for the supported GPUs."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastres.ops import extension


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder that doesn't exist yet; forget earlier builds and unset the variables that affect them."""
    for name in ("FASTRES_CUDA_EXT", "CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(folder))
    monkeypatch.setattr(extension, "_outcome", {})
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that sets CXX to a script with the given body and returns the log of its calls.

    In the body, `$out` is the requested output file.
    """

    def make(body: str) -> Path:
        log, script = tmp_path / "calls", tmp_path / "compiler with space"
        find_out = 'out=; for a in "$@"; do [ "$last" = -o ] && out=$a; last=$a; done'
        script.write_text(f"#!/bin/sh\necho $$ >> '{log}'\n{find_out}\n{body}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", f"'{script}'")
        return log

    return make


def built(cache: Path) -> list[str]:
    """Return the sorted suffixes of the files in the cache."""
    return sorted(p.suffix for p in cache.iterdir())


def test_a_library_is_built_once_and_found_again(cache: Path, compiler: Callable[[str], Path]) -> None:
    log = compiler("echo library > $out")
    first = extension.build("cpu")
    assert extension.build("cpu") == first
    assert len(log.read_text().split()) == 1
    assert built(cache) == [".lock", ".so"]
    assert extension.status().cpu


def test_status_builds_nothing(cache: Path) -> None:
    status = extension.status()
    assert not status.cpu
    assert "not built yet, builds at first use" in status.reason
    assert not cache.exists()


def test_a_librarys_name_holds_sources_and_flags(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {extension._recipe("cpu").name}
    monkeypatch.setattr(extension, "_instruction_set", lambda: ["-mother"])
    names.add(extension._recipe("cpu").name)
    monkeypatch.setattr(torch, "__version__", "0")
    names.add(extension._recipe("cpu").name)
    source = extension._recipe("cpu").source
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: b"" if p == source else read(p))
    names.add(extension._recipe("cpu").name)
    assert len(names) == 4


def expect_aten(message: str) -> None:
    """Check that loading fails with `message`: FASTRES_CUDA_EXT=auto warns once, =1 raises, =0 doesn't try."""
    with pytest.warns(RuntimeWarning, match=message) as record:
        assert [extension.load("cpu") for _ in range(2)] == [False, False]
    assert len(record) == 1
    assert not extension.status().cpu
    assert re.search(message, extension.status().reason)
    extension._outcome.clear()
    os.environ["FASTRES_CUDA_EXT"] = "1"  # the caller's monkeypatch restores it
    with pytest.raises(extension.BuildError, match=message):
        extension.load("cpu")
    os.environ["FASTRES_CUDA_EXT"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not extension.load("cpu")


def test_without_a_compiler_aten_serves(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    monkeypatch.setenv("PATH", "")
    expect_aten(r"no C\+\+ compiler was found; install")


def test_a_named_compiler_that_is_missing_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    expect_aten("CXX names 'no-such-compiler', which was not found")


def test_a_compiler_that_fails_is_quoted(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    compiler("echo half > $out; echo 'error: too old' >&2; exit 1")
    expect_aten(r"building shortcut\.cpp failed:\n(.|\n)*error: too old")
    assert built(cache) == [".lock"]


def test_a_library_that_does_not_load_is_named(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    compiler("echo not a library > $out")
    expect_aten(r"doesn't load \((.|\n)*\); delete it")


@pytest.mark.parametrize("damage", ["cut short", "empty", "foreign", "dangling link"])
def test_a_damaged_library_is_built_again(cache: Path, compiler: Callable[[str], Path], damage: str) -> None:
    """Loading a truncated library can kill the process with a bus error, and a foreign one registers no operators."""
    log = compiler("echo library > $out")
    library = extension.build("cpu")
    whole = library.read_bytes()
    library.unlink()
    if damage == "dangling link":
        library.symlink_to(cache / "nowhere")
    else:
        library.write_bytes({"cut short": whole[:-1], "empty": b"", "foreign": b"x" * 200}[damage])
    assert "not built yet" in extension.status().reason
    assert extension.build("cpu").read_bytes() == whole
    assert len(log.read_text().split()) == 2
    assert built(cache) == [".lock", ".so"]


def test_a_compiler_that_writes_nothing_has_failed(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    compiler("true")
    expect_aten(r"building shortcut\.cpp failed")


def test_a_named_compiler_that_is_no_command_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    monkeypatch.setenv("CXX", "g++ '-O2")
    expect_aten("CXX is .*, which is not a valid command")


def test_a_cache_may_have_a_name_that_is_not_utf8(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    monkeypatch.setenv("FASTRES_CACHE_DIR", os.fsdecode(os.fsencode(cache) + b"\xff"))
    compiler("echo library > $out")
    expect_aten("doesn't load")


def test_an_unwritable_cache_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setenv("FASTRES_CUDA_EXT", "auto")
    expect_aten("the cache folder .* can't be written .*; set FASTRES_CACHE_DIR")


def test_a_read_only_cache_serves_what_it_has(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler("echo library > $out")
    library = extension.build("cpu")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(extension, "_file_lock", refuse)
    assert extension.build("cpu") == library
    library.unlink()
    with pytest.raises(extension.BuildError, match="Read-only file system"):
        extension.build("cpu")


def test_an_unknown_mode_is_refused_and_other_devices_have_no_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not extension.load("meta")
    monkeypatch.setenv("FASTRES_CUDA_EXT", "")
    assert "not built yet" in extension.status().reason
    monkeypatch.setenv("FASTRES_CUDA_EXT", "yes")
    with pytest.raises(ValueError, match="FASTRES_CUDA_EXT is 'yes'; accepted: 0, 1, auto"):
        extension.load("cpu")


def test_cuda_without_gpu_or_toolkit_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(extension.BuildError, match=r"nvcc was not found; install the CUDA toolkit|built without CUDA"):
        extension.build("cuda")
    assert not extension.status().cuda


def test_a_toolkit_of_another_major_version_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 7.5, V7.5.1'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(
        extension.BuildError, match=r"is from CUDA 7, torch is built for CUDA 13\.0; point CUDA_HOME to a CUDA 13"
    ):
        extension.build("cuda", ("90",))


def test_processes_build_once(cache: Path, compiler: Callable[[str], Path]) -> None:
    log = compiler("sleep 0.5; echo library > $out")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=extension.build, args=("cpu",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().split()) == 1
    assert built(cache) == [".lock", ".so"]


def test_a_killed_build_leaves_no_lock_behind(cache: Path, compiler: Callable[[str], Path]) -> None:
    """After SIGKILL during a build, the lock is free, and the next build succeeds and removes the remains."""
    log = compiler("echo half > $out; sleep 60")
    process = multiprocessing.get_context("fork").Process(target=extension.build, args=("cpu",))
    process.start()
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text().strip() and list(cache.glob("*.build/*.so"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join(10)
    assert ".build" in built(cache)
    orphans = os.getpgid(int(log.read_text()))  # the compiler outlives the build, in a group that ninja made for it
    assert orphans != os.getpgrp()
    compiler("echo library > $out")
    assert extension.build("cpu").read_text().startswith("library\n")
    assert built(cache) == [".lock", ".so"]
    os.killpg(orphans, signal.SIGKILL)


def test_paths_may_hold_special_characters(
    cache: Path, tmp_path: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler('for a in "$@"; do case $a in *.cpp) cp "$a" "$out";; esac; done')
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "a $b: c"))
    assert "Option-A" in extension.build("cpu").read_text()


ARCHS = ("80", "90", "100")


@pytest.mark.extra  # torch's headers alone take nvcc ten seconds
def test_cuda_compiles(cache: Path) -> None:
    """nvcc builds the library for A100, H100 and B200; nothing spills, and a third uses 16-byte accesses."""
    try:
        extension._nvcc()
    except extension.BuildError as error:
        pytest.skip(str(error))
    library = extension.build("cuda", ARCHS)
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("triton has no cuobjdump here")

    def dump(*options: str) -> str:
        return subprocess.run([str(tool), *options, str(library)], capture_output=True, text=True, check=True).stdout

    assert set(re.findall(r"sm_(\d+)", dump("--list-elf"))) == set(ARCHS)
    usage = re.findall(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", dump("--dump-resource-usage"))
    assert len(usage) >= len(ARCHS) * 50
    assert all(int(stack) == int(local) == 0 for _, stack, local in usage)
    assert max(int(registers) for registers, _, _ in usage) <= 64  # for 4 blocks of 256 threads per SM
    assembly = dump("-sass", "-arch", "sm_90")
    functions = re.split(r"Function : ", assembly)[1:]
    wide = [f for f in functions if re.search(r"LDG\.E\.128", f) and re.search(r"STG\.E\.128", f)]
    assert len(wide) * 3 >= len(functions)  # one of three variants (packed, single, 64-bit) is packed


@pytest.mark.gpu
def test_cuda_loads() -> None:
    assert extension.load("cuda"), extension.status().reason
    assert extension.status().cuda
