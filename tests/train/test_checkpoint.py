"""Checkpoints: bit-exact resumption after a kill at any point, the contents of the files, damaged files."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from training import SHORT, assert_same, ends, short, weights

from fastres.cli.main import main
from fastres.models import families
from fastres.train import checkpoint
from fastres.train.checkpoint import CheckpointError
from fastres.train.loop import Summary, Trainer, train

pytestmark = pytest.mark.usefixtures("one_thread")
undisturbed = training.undisturbed


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_in_a_step(out: Path, iteration: int) -> None:
    def step(self: Trainer, batches: Any) -> None:
        if self.iteration == iteration:
            _kill()
        whole(self, batches)

    whole = Trainer.step
    Trainer.step = step  # type: ignore[method-assign]
    train(short(out, resume=True))


def _killed_while_saving(out: Path, moment: str, which: str, count: int) -> None:
    """Train, and kill the process at the count-th write of the file `which`.

    moment: "half" kills it when half of the file is written, "unnamed" before the file is renamed.
    """

    def write(path: Path, content: bytes) -> None:
        nonlocal count
        count -= path.name == which
        if path.name == which and count == 0:
            if moment == "half":
                os.write(tempfile.mkstemp(prefix=".writing-", dir=path.parent)[0], content[: len(content) // 2])
                _kill()
            os.replace = lambda *names: _kill()  # type: ignore[assignment]
        whole(path, content)

    whole = checkpoint.write_atomically
    checkpoint.write_atomically = write
    train(short(out, resume=True))


def test_killed_anywhere_it_ends_as_if_never_killed(tmp_path: Path, undisturbed: Path) -> None:
    """A run that is killed again and again ends with the same bits as one that never was.

    It is killed before its first checkpoint, in iterations, and while it writes files.
    """
    assert ends(_killed_in_a_step, tmp_path, 2) == -signal.SIGKILL
    assert not (tmp_path / checkpoint.LAST).exists()
    assert ends(_killed_while_saving, tmp_path, "half", checkpoint.LAST, 1) == -signal.SIGKILL
    assert ends(_killed_while_saving, tmp_path, "unnamed", checkpoint.LAST, 2) == -signal.SIGKILL
    assert torch.load(tmp_path / checkpoint.LAST, weights_only=True)["iteration"] == 3
    assert torch.load(tmp_path / checkpoint.BEST, weights_only=True)["iteration"] == 4
    assert list(tmp_path.glob(".writing-*"))
    assert ends(_killed_in_a_step, tmp_path, 5) == -signal.SIGKILL
    assert ends(_killed_while_saving, tmp_path, "half", checkpoint.WEIGHTS, 1) == -signal.SIGKILL
    assert torch.load(tmp_path / checkpoint.LAST, weights_only=True)["iteration"] == 6
    train(short(tmp_path, resume=True))
    ours, theirs = (torch.load(out / checkpoint.LAST, weights_only=True) for out in (tmp_path, undisturbed))
    for name in ("model", "ema"):
        assert_same(ours[name], theirs[name])
    momenta = [[entry["momentum_buffer"] for entry in run["optimizer"]["state"].values()] for run in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert ours["schedule"] == theirs["schedule"]
    assert torch.equal(ours["rng"][0]["torch"], theirs["rng"][0]["torch"])
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k} for row in run["history"]] for run in (ours, theirs)
    ]
    assert timeless[0] == timeless[1]
    assert_same(weights(tmp_path, checkpoint.BEST), weights(undisturbed, checkpoint.BEST))
    assert not list(tmp_path.glob(".writing-*"))


def test_the_files_hold_weights_log_and_curves(undisturbed: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    best = torch.load(undisturbed / checkpoint.BEST, weights_only=True)
    with safe_open(undisturbed / checkpoint.WEIGHTS, "pt") as file:
        meta = json.loads(file.metadata()["fastres"])
    assert meta == best["meta"]
    assert (meta["classes"], meta["family"], meta["depth"], meta["data"]) == (list("0123456789"), "cifar", 8, "digits")
    assert_same(load_file(undisturbed / checkpoint.WEIGHTS), best["ema"])
    net = families.build(
        meta["family"], meta["depth"], num_classes=meta["num_classes"], in_channels=meta["in_channels"]
    )
    net.load_state_dict(load_file(undisturbed / checkpoint.WEIGHTS))
    rows = list(csv.DictReader((undisturbed / "log.csv").open()))
    assert [(row["iteration"], bool(row["train_loss"])) for row in rows] == [
        ("3", True),
        ("4", False),
        ("6", True),
        ("8", True),
        ("8", False),
    ]
    assert min(float(row["val_error"]) for row in rows if row["val_error"]) == meta["best"]
    assert (undisturbed / "curves.png").read_bytes()[:4] == b"\x89PNG"


def _run_files(out: Path, undisturbed: Path) -> Path:
    out.mkdir()
    for name in (checkpoint.LAST, checkpoint.BEST):
        (out / name).write_bytes((undisturbed / name).read_bytes())
    return out


def test_damaged_checkpoints_are_refused_and_left(tmp_path: Path, undisturbed: Path) -> None:
    out = _run_files(tmp_path / "run", undisturbed)
    last = out / checkpoint.LAST
    whole = last.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", b"no zip"):
        last.write_bytes(content)
        with pytest.raises(
            CheckpointError,
            match=rf"{last} is truncated, damaged or not.*resume from {out / checkpoint.BEST}, copy it to {last}$",
        ):
            train(short(out, resume=True))
        assert last.read_bytes() == content
    torch.save({"state": 1}, last)
    with pytest.raises(CheckpointError, match="must have the keys meta, model and ema"):
        train(short(out, resume=True))
    torch.save({"meta": _kill}, last)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        train(short(out, resume=True))
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(tmp_path / "none.pt")


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path, undisturbed: Path) -> None:
    out = _run_files(tmp_path / "run", undisturbed)
    before = (out / checkpoint.LAST).read_bytes()
    others: list[tuple[dict[str, Any], str]] = [
        ({"depth": 14}, "depth is 8 in the checkpoint, 14 now"),
        ({"family": "cifar-plain"}, "family is 'cifar' in the checkpoint, 'cifar-plain' now"),
        (
            {"seed": 1, "holdout": 100},
            "training images is 1438 in the checkpoint, 1338 now; holdout is 0 in the checkpoint, 100 now; seed",
        ),
        ({"recipe": dataclasses.replace(SHORT, lr=0.3)}, "recipe.lr is 0.1 in the checkpoint, 0.3 now"),
        ({"micro_batch": 16}, "micro-batches is 2 in the checkpoint, 4 now"),
    ]
    for options, message in others:
        with pytest.raises(ValueError, match=message):
            train(short(out, **options, resume=True))
    with pytest.raises(ValueError, match=r"last\.pt exists already: use --resume"):
        train(short(out))
    assert (out / checkpoint.LAST).read_bytes() == before


def test_another_runs_checkpoint_is_a_wrong_argument(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of another run gives status 2, with `--resume` and without it."""
    out = _run_files(tmp_path / "run", undisturbed)
    for given, said in ((["--resume"], "to another run: "), ([], "exists already")):
        with pytest.raises(SystemExit) as stopped:
            main(["train", "--out", str(out), "--device", "cpu", "--lr", "0.3", *given])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_a_resumed_run_says_where_it_begins(
    tmp_path: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(short(tmp_path / "none", dataclasses.replace(SHORT, iterations=1)))
    assert "starting from the beginning" not in capsys.readouterr().err
    train(short(tmp_path / "new", dataclasses.replace(SHORT, iterations=1), resume=True))
    assert f"no checkpoint in {tmp_path / 'new'}: starting from the beginning\n" in capsys.readouterr().err
    out = _run_files(tmp_path / "run", undisturbed)
    train(short(out, resume=True))
    assert f"{out / checkpoint.LAST}: resuming at iteration 8 of 8\n" in capsys.readouterr().err


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    """A limit on the file size, far below the size of a checkpoint, acts like a full disk."""
    out = _run_files(tmp_path / "run", undisturbed)
    before = (out / checkpoint.LAST).read_bytes()
    state = checkpoint.load(out / checkpoint.LAST)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"last\.pt can't be written \(\d+ bytes\): File too large.* is intact: free some space, then resume",
        ):
            checkpoint.save(out, state, best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / checkpoint.LAST).read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == [checkpoint.BEST, checkpoint.LAST]


def test_a_disk_full_at_first_claims_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        if path.suffix == ".pt":
            raise OSError(errno.ENOSPC, "x")
        whole(path, content)

    whole = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", write)
    with pytest.raises(
        CheckpointError, match=r"full; there is no earlier checkpoint: free some space, then start again$"
    ):
        train(short(tmp_path))


def test_best_takes_the_place_of_a_damaged_last(tmp_path: Path, undisturbed: Path) -> None:
    """A run resumes from best.pt copied to last.pt, as the error message suggests."""
    out = _run_files(tmp_path / "run", undisturbed)
    (out / checkpoint.LAST).write_bytes((out / checkpoint.BEST).read_bytes())
    train(short(out, resume=True))
    assert_same(weights(out), weights(undisturbed))


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "system is read-only")])
def test_system_errors_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, "x")

    monkeypatch.setattr(checkpoint.tempfile, "mkstemp", refuse)
    with pytest.raises(SystemExit, match=f"can't write checkpoints to {tmp_path}.*: .*{said}; choose another --out"):
        main(["train", "--out", str(tmp_path / "run"), "--device", "cpu"])


def test_a_folder_that_can_t_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't write checkpoints to .*file/run: "):
        train(short(tmp_path / "file" / "run"))


def test_random_generators_come_back() -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())  # noqa: NPY002

    torch.save(checkpoint.rng_state(), buffer := io.BytesIO())
    first = draw()
    buffer.seek(0)
    checkpoint.set_rng_state(torch.load(buffer, weights_only=True))
    assert draw() == first


def test_matplotlib_and_safetensors_are_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib.figure", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    done = train(short(tmp_path, dataclasses.replace(SHORT, iterations=1)))
    assert isinstance(done, Summary)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.BEST, checkpoint.LAST, "log.csv"]
    assert f"; {tmp_path} holds log.csv, last.pt, best.pt\n" in str(done)
