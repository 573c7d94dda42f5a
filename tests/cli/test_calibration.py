"""`eval` and `predict` with --optimize in bf16, int8 and fp8: accuracy, and which images calibrate."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import cli_cases
import pytest
import torch
from cli_cases import SMALL, images_of, net, refused, saved
from PIL import Image
from torch import Tensor, nn

import fastres
from fastres import evaluate
from fastres.cli import batches, testing_options
from fastres.cli.main import main
from fastres.evaluate import Views
from fastres.ops import dispatch
from fastres.ops.dispatch import why_no_onednn
from fastres.train import checkpoint, loop
from fastres.train.data import by_channel
from fastres.train.recipe import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")
photos, scored = cli_cases.photos, cli_cases.scored


SERVED = [
    pytest.param("int8", marks=pytest.mark.skipif(why_no_onednn(torch.int8) is not None, reason="needs VNNI")),
    "fp8",  # simulated
]


VIEWS = [["center"], ["10", "--resize", "9"], ["multiscale", "--no-flip", "--scales", "8", "9"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a small net trained on digits to a validation error below 5 %."""
    for package in ("torchmetrics", "sklearn", "matplotlib", "safetensors"):
        pytest.importorskip(package)
    recipe = dataclasses.replace(RECIPES["digits"], epochs=None, iterations=200)
    out = tmp_path_factory.mktemp("digits")
    summary = loop.train(loop.Run("digits", recipe, out, depth=8, device="cpu", eval_every=200, save_every=200))
    assert summary.error < 0.05
    return str(out / checkpoint.BEST)


def top1(out: str) -> float:
    found = re.search(r"top-1 accuracy ([\d.]+)%", out)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("views", VIEWS, ids=" ".join)
@pytest.mark.parametrize("dtype", ["bf16", *SERVED])
def test_a_narrow_dtype_is_as_accurate(
    dtype: str, views: list[str], trained: str, capsys: pytest.CaptureFixture[str], scored: list[Tensor]
) -> None:
    """The accuracy differs from that of fp32 by at most one point (3 of 359 digits), but the scores do differ."""
    arguments = ["eval", "--checkpoint", trained, "--device", "cpu", "--crops", *views]
    assert main(arguments) == 0
    expected, exact = top1(capsys.readouterr().out), torch.cat(scored)
    scored.clear()
    with fastres.backend("reference" if dtype == "fp8" else "auto"):
        assert main([*arguments, "--optimize", "--dtype", dtype]) == 0
    first, *more, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"cifar-8 in {dtype}, ")
    assert more == ([] if dtype == "bf16" else ["calibrated with 256 of 1,438 training images of digits"])
    assert top1(last) == pytest.approx(expected, abs=1.0)
    assert 1e-4 < (torch.cat(scored) - exact).abs().max() < 0.5


@pytest.mark.parametrize("dtype", SERVED)
def test_the_percentile_reaches_the_net(
    dtype: str, trained: str, scored: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--checkpoint", trained, "--device", "cpu", "--optimize", "--dtype", dtype]
    scores = []
    with fastres.backend("reference" if dtype == "fp8" else "auto"):
        for more in ([], ["--percentile", "100"], ["--percentile", "90"]):
            scored.clear()
            assert main([*arguments, *more]) == 0
            scores.append(torch.cat(scored))
    assert "training images of digits, percentile 90\n" in capsys.readouterr().out
    assert torch.equal(scores[0], scores[1])
    assert (scores[0] - scores[2]).abs().max() > 0.01


@dataclasses.dataclass
class Calibrated:
    """A stand-in for `optimize` that records the calibration batches of each net and returns the net unchanged."""

    shown: list[list[Tensor]]
    served: bool = True

    def tried(self, model: nn.Module, *, dtype: torch.dtype, **_: Any) -> None:
        if not self.served:
            raise ValueError(f"{dtype} isn't served")

    def optimize(self, model: nn.Module, *, dtype: torch.dtype, calibration: Any, **_: Any) -> nn.Module:
        assert dtype == torch.int8
        self.shown.append(list(calibration))
        return model


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> Calibrated:
    stand_in = Calibrated([])
    monkeypatch.setattr(testing_options, "optimize", stand_in.tried)
    monkeypatch.setattr(evaluate, "optimize", stand_in.optimize)
    return stand_in


INT8 = ["--optimize", "--dtype", "int8"]


def read_by(folder: Path, count: int = 256) -> Tensor:
    """Return the preprocessed images of the expected sample: at most `count` from `folder`, in alphabetical order."""
    images = [Views("center", 32, 40).prepare(image) for _, image in images_of(folder)]
    picked = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].sort().values
    return by_channel()(torch.stack(images)[picked])


@pytest.fixture
def with_training_images(photos: Path) -> Path:
    """The folder `photos` with an added train/, which has the images of val/, mirrored."""
    for path, image in images_of(photos / "val"):
        copied = photos / "train" / path.relative_to(photos / "val")
        copied.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.flip(2).permute(1, 2, 0).numpy()).save(copied)
    return photos


@pytest.mark.parametrize(
    ("data", "more", "folder", "count", "said"),
    [
        ("", [], "train", 8, "8 of 8 training images in {}/train"),
        ("", ["--calibration-images", "3"], "train", 3, "3 of 8 training images in {}/train"),
        ("", ["--calibration", "val/temple"], "val/temple", 4, "4 of 4 images in val/temple"),
        ("val", [], "val", 8, "8 of 8 images tested"),
        ("val", ["--calibration-images", "5"], "val", 5, "5 of 8 images tested"),
    ],
)
def test_which_images_calibrate_an_evaluation(
    data: str,
    more: list[str],
    folder: str,
    count: int,
    said: str,
    with_training_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibrated: Calibrated,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchmetrics")
    photos = with_training_images
    monkeypatch.chdir(photos)
    file = saved(tmp_path / "net.pt", net().state_dict())
    arguments = ["eval", "--data", str(photos / data), "--checkpoint", file, file, *SMALL, "--batch", "3"]
    assert main([*arguments, *INT8, *more]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("an ensemble of cifar-8, cifar-8 in int8, center crop")
    assert told[1] == f"calibrated with {said.format(photos)}"
    expected = read_by(photos / folder, count)
    assert len(calibrated.shown) == 2
    for shown in calibrated.shown:
        assert {len(batch) for batch in shown[:-1]} <= {3}
        assert torch.equal(torch.cat(shown), expected)


@pytest.mark.parametrize("own", [False, True])
def test_which_images_calibrate_a_prediction(
    own: bool,
    with_training_images: Path,
    tmp_path: Path,
    calibrated: Calibrated,
    capsys: pytest.CaptureFixture[str],
) -> None:
    photos = with_training_images
    file = saved(tmp_path / "net.pt", net().state_dict())
    more = ["--calibration", str(photos / "train")] if own else []
    assert main(["predict", str(photos / "val"), "--weights", file, *SMALL, *INT8, *more]) == 0
    assert torch.equal(torch.cat(calibrated.shown[0]), read_by(photos / ("train" if own else "val")))
    whose = f"images in {photos / 'train'}" if own else "images given"
    assert capsys.readouterr().err == f"note: calibrated with 8 of 8 {whose}\n"


def test_images_that_calibrate_and_cannot_be_read_are_named(
    with_training_images: Path, tmp_path: Path, calibrated: Calibrated, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchmetrics")
    bad = with_training_images / "train" / "temple" / "bad.jpg"
    bad.write_bytes(b"no image")
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["eval", "--data", str(with_training_images), "--checkpoint", file, *SMALL, *INT8]) == 1
    out, err = capsys.readouterr()
    assert "calibrated with 8 of 9 training images" in out
    assert f"calibration: {bad} is not a readable image" in err
    assert "1 of 9 calibration images could not be read" in err


def test_calibration_needs_an_image_that_can_be_read(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "why_no_int8", lambda device: None)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jpg").write_bytes(b"no image")
    given = ["predict", str(photos), "--weights", saved(tmp_path / "net.pt", net().state_dict()), *SMALL, *INT8]
    told = refused([*given, "--calibration", str(bad)], capsys)
    assert f"calibrated with 0 of 1 images in {bad}: none of the images sampled can be read" in told


@pytest.mark.parametrize("more", [[], ["--dtype", "bf16"], ["--optimize"], ["--optimize", "--dtype", "bf16"]])
def test_a_dtype_that_optimize_does_not_fuse_is_noted(
    more: list[str],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dispatch, "why_no_onednn", {torch.float32: None, torch.bfloat16: "no AMX"}.get)
    file = saved(tmp_path / "net.pt", net().state_dict())
    assert main(["predict", str(photos), "--weights", file, *SMALL, *more]) == 0
    note = "note: --optimize fuses nothing in bf16 here: no AMX\n"
    assert capsys.readouterr().err == (note if len(more) == 3 else "")


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize(
    ("more", "served", "named"),
    [
        (["--dtype", "int8"], True, "--dtype int8 requires --optimize"),
        (["--dtype", "fp8"], True, "--dtype fp8 requires --optimize"),
        (INT8, False, "torch.int8 isn't served"),
        (
            [*INT8, "--calibration-images", "0"],
            True,
            "--calibration-images must be a whole number of at least 1: got 0",
        ),
        ([*INT8, "--calibration", "nowhere"], True, "nowhere does not exist"),
        (["--percentile", "99"], True, "--percentile requires --optimize with --dtype int8 or fp8"),
        (["--calibration", "."], True, "--calibration requires --optimize with --dtype int8 or fp8"),
        (
            ["--optimize", "--calibration-images", "9"],
            True,
            "--calibration-images requires --optimize with --dtype int8 or fp8",
        ),
    ],
)
def test_calibration_is_refused_before_an_image_is_read(
    command: str,
    more: list[str],
    served: bool,
    named: str,
    with_training_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calibrated: Calibrated,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchmetrics")
    calibrated.served = served
    monkeypatch.setattr(batches, "read_image", None)
    file, images = saved(tmp_path / "net.pt", net().state_dict()), str(with_training_images)
    given = ["--data", images, "--checkpoint", file] if command == "eval" else [images, "--weights", file]
    assert named in refused([command, *given, *SMALL, *more], capsys)
    assert not calibrated.shown


@pytest.mark.parametrize(
    ("dtype", "more", "needed"),
    [
        ("int8", [], "VNNI"),
        ("fp8", [], "needs a CUDA GPU, but the model is on cpu"),
        ("int8", ["--percentile", "0"], "percentile"),
    ],
)
def test_what_optimize_refuses_is_refused_first(
    dtype: str, more: list[str], needed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unsupported dtypes are rejected first, even if neither the weights nor the data exist."""
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    arguments = ["eval", "--data", "nowhere", "--checkpoint", "none.pt", "--device", "cpu", "--optimize"]
    assert needed in refused([*arguments, "--dtype", dtype, *more], capsys)
