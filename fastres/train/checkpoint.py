"""Checkpoints: files that are either whole or not there, and clear words when one can't be written or read."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import pickle
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LAST, BEST, WEIGHTS = "last.pt", "best.pt", "weights.safetensors"
_TEMPORARY = ".writing-"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, read or used here. The message names the file, the cause and the mend."""


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds either what it held before or all of `data`, whenever the process or the machine stops.

    Raises OSError, with the old file intact and nothing left beside it.
    """
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def prepare(folder: Path) -> None:
    """Makes the folder of a run, tries whether it can be written, clears what a killed process left half written.

    Raises CheckpointError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(f"{_TEMPORARY}*"):
            rest.unlink(missing_ok=True)
        probe = folder / f"{_TEMPORARY}probe"
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"{folder} can't hold checkpoints: {_cause(error)}; choose another --out") from error


def save(folder: Path, state: dict[str, Any], *, best: bool) -> None:
    """Writes last.pt and, if `best`, first best.pt and weights.safetensors.

    state: of tensors, numbers, strings, lists, tuples and dicts, so that `torch.load(weights_only=True)` reads it; with
    "meta", "model", "ema" (None or the averaged weights, which then are the ones in weights.safetensors) and
    "preprocess" with "mean" and "std". In this order a process killed in between repeats the step that was best and
    writes it again. Raises CheckpointError.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files = {}
    if best:
        files[BEST] = buffer.getvalue()
        weights = _safetensors(state["ema"] or state["model"], state["preprocess"], state["meta"])
        if weights is not None:
            files[WEIGHTS] = weights
    files[LAST] = buffer.getvalue()
    for name, data in files.items():
        try:
            write_atomically(folder / name, data)
        except OSError as error:
            last = folder / LAST
            there = f"{last} is intact, make room and go on from it"
            mend = there if last.exists() else "there is no earlier checkpoint, make room and start again"
            said = f"{folder / name} can't be written ({len(data)} bytes): {_cause(error)}; {mend}"
            raise CheckpointError(said) from error


def _cause(error: OSError) -> str:
    causes = {
        errno.ENOSPC: "the disk is full",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no permission",
    }
    return causes.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))


def _safetensors(weights: dict[str, Tensor], preprocess: dict[str, Tensor], meta: dict[str, Any]) -> bytes | None:
    """The bytes of a safetensors file; None where the package is not installed.

    Its tensors are the weights and nothing else, so that a net loads them as they are. Its metadata hold "fastres",
    `meta` as JSON, and "preprocess", mean and std as a safetensors file of their own in base 64.
    """
    try:
        import safetensors.torch
    except ImportError:
        return None

    def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    before = safetensors.torch.save(plain({name: preprocess[name] for name in ("mean", "std")}))
    known = {"fastres": json.dumps(meta), "preprocess": base64.b64encode(before).decode()}
    return safetensors.torch.save(plain(weights), known)


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises CheckpointError for a file that is missing, truncated or foreign."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        other = path.with_name(BEST if path.name == LAST else LAST)
        mend = f"; {other} is there to resume from: copy it to {path}" if other.exists() else ""
        raise CheckpointError(f"{path} is truncated, damaged or no checkpoint ({error}){mend}") from error
    if not isinstance(state, dict) or not {"meta", "model", "ema"} <= state.keys():
        raise CheckpointError(f"{path} is no checkpoint of fastres: it lacks meta, model and ema")
    return state


def require_equal(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError that names each setting in which the checkpoint's run differs from this one."""
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        differences = "; ".join(f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in names)
        raise ValueError(f"{path} is of another run: {differences}. Resume with its settings or choose another --out")


def rng_state() -> dict[str, Any]:
    """The states of all generators that a training could draw from, in types that `weights_only=True` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`; a GPU's state is left out where there is none."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
