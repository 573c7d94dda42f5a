"""Write checkpoints atomically, and read them. Errors name the file, the cause and the remedy."""

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
    """A checkpoint can't be written, read or used. The message names the file and the cause, and usually a remedy."""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the contents of `path` by `data`, so that a crash leaves either the old file or the complete new one.

    Writes and syncs a temporary file in the same folder, then renames it. Raises OSError; if the write or the rename
    failed, the old file is intact and the temporary file is removed.
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
        os.fsync(folder)  # makes the rename durable
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def prepare(folder: Path) -> None:
    """Create the folder of a run, delete temporary files left by a killed process, and check that it is writable.

    Raises CheckpointError if it isn't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(f"{_TEMPORARY}*"):
            rest.unlink(missing_ok=True)
        probe = folder / f"{_TEMPORARY}probe"
        write_atomically(probe, b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"can't write checkpoints to {folder}: {_cause(error)}; choose another --out") from error


def save(folder: Path, state: dict[str, Any], *, best: bool) -> None:
    """Write last.pt; if `best`, write best.pt and weights.safetensors first.

    last.pt comes last so that a run killed in between resumes from the earlier checkpoint and writes all files again.

    state: tensors, numbers, strings, lists, tuples and dicts only, so that `torch.load(weights_only=True)` reads it. It
    must have the keys "meta", "model", "ema" (None, or the averaged weights, which weights.safetensors then contains)
    and "preprocess" (with "mean" and "std"). weights.safetensors is skipped if safetensors isn't installed. Raises
    CheckpointError if a file can't be written.
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
            intact = f"{last} is intact: free some space, then resume from it"
            remedy = intact if last.exists() else "there is no earlier checkpoint: free some space, then start again"
            message = f"{folder / name} can't be written ({len(data)} bytes): {_cause(error)}; {remedy}"
            raise CheckpointError(message) from error


def _cause(error: OSError) -> str:
    causes = {
        errno.ENOSPC: "the disk is full",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "no permission",
    }
    return causes.get(error.errno or 0, os.strerror(error.errno) if error.errno else str(error))


def _safetensors(weights: dict[str, Tensor], preprocess: dict[str, Tensor], meta: dict[str, Any]) -> bytes | None:
    """Return the bytes of a safetensors file, or None if safetensors isn't installed.

    The file's tensors are exactly `weights`, so that a net can load them directly. Its metadata have two keys:
    "fastres", which is `meta` as JSON, and "preprocess", which is a base64-encoded safetensors file with mean and std.
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
    """Return the state that `save` wrote, with its tensors on the CPU.

    Raises CheckpointError if the file is missing, damaged or not a checkpoint of fastres.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        other = path.with_name(BEST if path.name == LAST else LAST)
        remedy = f"; to resume from {other}, copy it to {path}" if other.exists() else ""
        raise CheckpointError(f"{path} is truncated, damaged or not a checkpoint ({error}){remedy}") from error
    if not isinstance(state, dict) or not {"meta", "model", "ema"} <= state.keys():
        raise CheckpointError(f"{path} is not a checkpoint of fastres: it must have the keys meta, model and ema")
    return state


def require_equal(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError, naming each difference, unless a checkpoint's settings equal those of this run.

    path: the checkpoint's file, for the message. theirs: its settings. ours: those of this run.
    """
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        differences = "; ".join(
            f"{name} is {theirs.get(name)!r} in the checkpoint, {ours.get(name)!r} now" for name in names
        )
        raise ValueError(
            f"{path} belongs to another run: {differences}. Resume with its settings, or choose another --out"
        )


def rng_state() -> dict[str, Any]:
    """Return the states of the random generators of torch (CPU and current GPU), NumPy and Python.

    It contains only types that `torch.load(weights_only=True)` reads.
    """
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
    """Restore the generator states that `rng_state` returned; a GPU's state is skipped if there is no GPU now."""
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, gauss_next = state["python"]
    random.setstate((version, tuple(words), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
