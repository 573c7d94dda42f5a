"""Evaluation agrees with naive loops on real photographs, counts correctly, and refuses bad input."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import lived_in
from PIL import Image
from tolerances import HALF_SCORES, SCORES, SLIDING, SUMS
from torch import Tensor, nn

import fastres
from fastres import paper
from fastres.evaluate import Predictor, Result, Views, evaluate, fully_convolutional
from fastres.train.data import Preprocess, by_channel

CPU = torch.device("cpu")
SCALES = (32, 37, 48)


pytestmark = pytest.mark.usefixtures("one_thread")


def small_net(classes: int = 7) -> Any:
    return lived_in(paper.cifar(8, num_classes=classes))


def photo_files(folder: Path, sides: tuple[int, int] = (96, 64)) -> list[Path]:
    """scikit-learn's two photographs as PNG files, one in landscape and one in portrait format."""
    lying, standing = pytest.importorskip("sklearn.datasets").load_sample_images().images
    pictures = [Image.fromarray(lying), Image.fromarray(standing).transpose(Image.Transpose.ROTATE_90)]
    paths = []
    for i, picture in enumerate(pictures):
        size = sides if picture.width > picture.height else sides[::-1]
        paths.append(folder / f"photo{i}.png")
        picture.resize(size).save(paths[-1])
    return paths


@pytest.fixture
def photos(tmp_path: Path) -> list[Tensor]:
    """Return two photographs, uint8 [3, 64, 96] and [3, 96, 64], and the mirror image of the first."""
    images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in photo_files(tmp_path)]
    return [*images, images[0].flip(2)]


def mean_image(size: int = 32) -> Preprocess:
    """Return the paper's normalisation: subtract a mean image that is not constant, and don't divide."""
    ramp = torch.linspace(0.2, 0.6, size)
    mean = torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), 0.5 * (ramp + ramp[:, None])])
    return Preprocess(mean, torch.ones(3, 1, 1), torch.zeros(3, 3))


# Naive loops: one image, one crop, one position at a time.


def resized(image: Tensor, side: int) -> Tensor:
    """Resize the image by Pillow to a shorter side of `side`. Like `Views`, Pillow rounds to 8 bits."""
    height, width = image.shape[1:]
    scale = side / min(height, width)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
    assert abs(size[0] - width * scale) < 1
    return torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1)


def normalised(view: Tensor, preprocess: Preprocess) -> Tensor:
    mean = F.interpolate(preprocess.mean[None], view.shape[1:], mode="bilinear", antialias=True)[0]
    return (view.float() / 255 - mean) / preprocess.std


def softmax(scores: Tensor) -> Tensor:
    powers = (scores.double() - scores.max()).exp()
    return powers / powers.sum()


@torch.no_grad()
def naive_crops(net: Any, image: Tensor, crops: str, size: int, resize: int, preprocess: Preprocess) -> Tensor:
    image = resized(image, resize)
    height, width = image.shape[1:]
    top, left = (height - resize) // 2, (width - resize) // 2
    square = image[:, top : top + resize, left : left + resize]
    far, middle = resize - size, (resize - size) // 2
    places = [(middle, middle)] if crops == "center" else [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    scores = []
    for y, x in places:
        crop = square[:, y : y + size, x : x + size]
        for view in [crop] if crops == "center" else [crop, crop.flip(2)]:
            scores.append(softmax(net(normalised(view, preprocess)[None])[0]))
    return torch.stack(scores).mean(0)


@torch.no_grad()
def naive_multiscale(net: Any, image: Tensor, scales: tuple[int, ...], size: int, preprocess: Preprocess) -> Tensor:
    views = []
    for side in scales:
        scaled = resized(image, side)
        for view in (scaled, scaled.flip(2)):
            x = net._stem(normalised(view, preprocess)[None])
            maps = net.layer3(net.layer2(net.layer1(x)))[0]
            window = size // 4  # these nets have a total stride of 4
            scores = []
            for p in range(maps.shape[1] - window + 1):
                for q in range(maps.shape[2] - window + 1):
                    feature = maps[:, p : p + window, q : q + window].mean((1, 2))
                    scores.append(softmax(net.fc.weight @ feature + net.fc.bias))
            views.append(torch.stack(scores).mean(0))
    return torch.stack(views).mean(0)


def close(actual: Tensor, expected: Tensor, atol: float = SCORES) -> None:
    """Compare scores, which are in [0, 1]. The default tolerance is the fp32 rounding error of about ten layers."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def test_the_resize_is_pillows(photos: list[Tensor]) -> None:
    for image in photos:
        for side in (32, 37, 80):
            (scaled,) = Views("multiscale", 32, None, (side,), flip=False).of(image[None])
            expected = resized(image, side)
            assert scaled[0].shape == expected.shape
            assert (scaled[0].int() - expected.int()).abs().max() <= 1


@pytest.fixture
def exact_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use Pillow's resize in the tested code, too; `test_the_resize_is_pillows` allows differences of 1/255."""
    own = torchvision.transforms.v2.functional.resize

    def resize(image: Tensor, size: list[int], **kwargs: Any) -> Tensor:
        if image.dtype != torch.uint8:
            return own(image, size, **kwargs)
        return resized(image, min(size)) if image.dim() == 3 else torch.stack([resized(i, min(size)) for i in image])

    monkeypatch.setattr("fastres.evaluate.tvf.resize", resize)


@pytest.mark.usefixtures("exact_resize")
@pytest.mark.parametrize("crops", ["center", "10"])
def test_crops_equal_a_naive_loop(crops: str, photos: list[Tensor]) -> None:
    net, preprocess = small_net(), mean_image()
    views = Views(crops, 32, 40)
    scores = Predictor(net, views, preprocess)([views.prepare(image) for image in photos])
    close(scores, torch.stack([naive_crops(net, image, crops, 32, 40, preprocess) for image in photos]))
    assert (scores[0] - scores[1]).abs().max() > 1e-3  # the scores depend on the image


@pytest.mark.usefixtures("exact_resize")
def test_multiscale_equals_a_naive_loop(photos: list[Tensor]) -> None:
    net, preprocess = small_net(), mean_image()
    views = Views("multiscale", 32, scales=SCALES)
    scores = Predictor(net, views, preprocess)([views.prepare(image) for image in photos])
    close(scores, torch.stack([naive_multiscale(net, image, SCALES, 32, preprocess) for image in photos]))


def test_multiscale_without_mirror_images_is_not_symmetric(photos: list[Tensor]) -> None:
    net = small_net()
    preprocess = Preprocess(torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25), torch.zeros(3, 3))
    both, one = (Predictor(net, Views("multiscale", 32, scales=(32,), flip=f), preprocess) for f in (True, False))
    close(both(photos)[0], both(photos)[2])
    assert (one(photos)[0] - one(photos)[2]).abs().max() > 1e-4
    close(both(photos)[0], (one(photos)[0] + one(photos)[2]) / 2)


def test_scores_come_in_the_images_order(photos: list[Tensor]) -> None:
    """Images of one shape are scored together, wherever they are in the input."""
    lying, standing, mirrored = photos
    images = [lying, standing, lying[:, :, :80], mirrored, standing.flip(1)]
    predictor = Predictor(small_net(), Views("multiscale", 32, scales=(32,)), mean_image())
    close(predictor(images), torch.cat([predictor(image[None]) for image in images]))


# Fully convolutional.


def without_padding() -> nn.Module:
    """Return a net with a total stride of 4 whose convolutions have no padding."""
    return lived_in(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
        )
    ).double()


def test_fully_convolutional_is_a_sliding_window_where_strides_align() -> None:
    """Without padding, every position of the score map has the scores of a crop at a multiple of the net's stride, up
    to rounding errors."""
    net, size, stride = without_padding(), 19, 4
    image = torch.rand(1, 3, size + 3 * stride, size + 5 * stride, dtype=torch.float64)
    with torch.no_grad():
        dense = fully_convolutional(net, size)(image)
        crops = image.unfold(2, size, stride).unfold(3, size, stride)[0].permute(1, 2, 0, 3, 4).flatten(0, 1)
        sliding = net(crops)
    assert dense.shape == (1, 5, 4 * 6)
    torch.testing.assert_close(dense[0].T, sliding, rtol=0, atol=SLIDING)


NETS: dict[str, tuple[Callable[..., nn.Module], int]] = {  # and their total stride
    "cifar": (lambda: paper.cifar(8, num_classes=9), 4),
    "cifar-plain": (lambda: paper.cifar(8, residual=False, num_classes=9), 4),
    "cifar-stem": (lambda: paper.cifar_stem(18, num_classes=9), 8),
    "paper A": (lambda: paper.resnet(18, "A", num_classes=9), 32),
    "resnet18": (lambda: fastres.resnet18(num_classes=9), 32),
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=9), 32),
}


@pytest.mark.parametrize("name", NETS)
def test_at_the_crops_size_the_dense_form_is_the_net(name: str) -> None:
    build, stride = NETS[name]
    net = lived_in(build()).train()
    modules, x = [type(module) for module in net.modules()], torch.randn(2, 3, 64, 64)
    dense = fully_convolutional(net, 64)
    assert [type(module) for module in net.modules()] == modules
    assert net.training
    assert not dense.training
    assert {p.data_ptr() for p in dense.parameters()} == {p.data_ptr() for p in net.parameters()}
    with torch.no_grad():
        torch.testing.assert_close(dense(x), net.eval()(x)[:, :, None])
        assert dense(F.pad(x, (0, 2 * stride))).shape == (2, 9, 3)


def test_what_has_no_dense_form_is_refused() -> None:
    for net, named in (
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "average pool: Sequential has none"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(4, 2)), "has 1"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2), nn.Linear(2, 2)), "has 2, 3"),
    ):
        with pytest.raises(ValueError, match=named):
            fully_convolutional(net, 32)


# Ensembles, optimized nets, GPUs.


def test_an_ensemble_averages_scores(photos: list[Tensor]) -> None:
    nets, ways = (
        [small_net(), small_net()],
        [mean_image(), Preprocess(*torch.full((2, 3, 1, 1), 0.5), torch.zeros(3, 3))],
    )
    views = Views("multiscale", 32, scales=SCALES)
    single = [Predictor(net, views, way)(photos) for net, way in zip(nets, ways, strict=True)]
    together = Predictor(nets, views, ways)(photos)
    close(together, (single[0] + single[1]) / 2)
    assert (single[0] - single[1]).abs().max() > 1e-3
    close(Predictor([nets[0], nets[0]], views, ways[0])(photos), single[0])


def test_unequal_nets_make_no_ensemble(photos: list[Tensor]) -> None:
    views = Views("center", 32, 40)
    prepared = [views.prepare(image) for image in photos]
    with pytest.raises(ValueError, match="same number of classes: got 7, 5"):
        Predictor([small_net(), small_net(5)], views, mean_image())(prepared)
    with pytest.raises(ValueError, match="got 2 and 1"):
        Predictor([small_net(), small_net()], views, [mean_image()])
    with pytest.raises(ValueError, match="got 0 and"):
        Predictor([], views, mean_image())


@pytest.mark.parametrize("crops", ["center", "10", "multiscale"])
def test_the_optimized_net_scores_the_same(crops: str, photos: list[Tensor]) -> None:
    net, views = small_net(), Views(crops, 32, 40, SCALES)
    prepared = [views.prepare(image) for image in photos]
    plain, fast = (Predictor(net, views, mean_image(), fast=fast)(prepared) for fast in (False, True))
    close(fast, plain, SUMS)
    half = Predictor(net, views, mean_image(), dtype=torch.bfloat16)(prepared)
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < HALF_SCORES


@pytest.mark.parametrize("crops", ["center", "10", "multiscale"])
def test_calibration_sees_what_a_call_shows_the_nets(
    crops: str, photos: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration gets all views of every image, grouped by shape and preprocessed for each net of the ensemble."""
    shown: list[list[Tensor]] = []
    monkeypatch.setattr(
        "fastres.evaluate.optimize", lambda net, *, calibration, **_: (shown.append(list(calibration)), net)[1]
    )
    nets, views = [small_net(), small_net()], Views(crops, 32, 40, SCALES)
    prepared = [views.prepare(image) for image in photos]
    batches = [(prepared[:2], "labels"), (torch.stack([prepared[0]] * 3), "labels")]
    ways = [mean_image(), by_channel()]
    predict = Predictor(nets, views, ways, dtype=torch.int8, fast=True, calibration=batches)
    read: list[list[Tensor]] = [[], []]
    for (_, net), inputs in zip(predict.members, read, strict=True):
        net.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
    for images, _ in batches:
        predict(images)
    for calibrating, reading in zip(shown, read, strict=True):
        assert len(calibrating) == len(reading)
        for one, other in zip(calibrating, reading, strict=True):
            assert torch.equal(one, other)
            assert one.is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.int8, torch.float64):  # autocast would only warn, and compute in float32
        with pytest.raises(ValueError, match=rf"{dtype} needs fast=True"):
            Predictor(nets, views, ways, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("crops", ["center", "10", "multiscale"])
def test_a_gpu_scores_as_the_cpu(crops: str, fast: bool) -> None:
    net, views = small_net(), Views(crops, 32, 40, SCALES)
    coarse = torch.rand(3, 3, 8, 8)
    images = [F.interpolate(255 * coarse[i, None], (64, 96 - 16 * (i == 1)))[0].to(torch.uint8) for i in range(3)]
    prepared = [views.prepare(image) for image in images]
    expected = Predictor(net, views, mean_image())(prepared)
    found = Predictor(net.cuda(), views, mean_image(), dtype=torch.bfloat16, fast=fast)(prepared)
    assert found.is_cuda
    close(found.cpu(), expected, HALF_SCORES)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"crops": "9"}, "center, 10, multiscale"),
        ({"crops": "multiscale", "scales": (192, 256)}, "192"),
        ({"crops": "multiscale", "scales": ()}, "at least one"),
        ({"crops": "10", "size": 224, "resize": 200}, "got size=224, resize=200"),
        ({"size": 0}, "got size=0"),
    ],
)
def test_what_cannot_be_tested_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Views(**arguments)


def test_images_below_the_crop_are_refused() -> None:
    with pytest.raises(ValueError, match="smaller than its crop, 32x32"):
        Views("center", 32, None).prepare(torch.zeros(3, 40, 30, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least one image is needed"):
        Predictor(small_net(), Views("center", 32, 32), mean_image())([])


# Counting.


def counted(scores: Tensor, labels: Tensor, sizes: list[int]) -> Result:
    """Run `evaluate` on precomputed scores, in batches of the given sizes."""
    pytest.importorskip("torchmetrics")
    batches = zip(scores.split(sizes), labels.split(sizes), strict=True)
    return evaluate(lambda x: x, batches, scores.shape[1], CPU)


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_top1_and_top5_equal_a_count_by_hand(classes: int) -> None:
    # The last class has no images.
    scores, labels = torch.rand(40, classes).softmax(1), torch.randint(classes - 1, (40,))
    result = counted(scores, labels, [16, 16, 0, 8])
    first, five = [0] * classes, [0] * classes
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        ranking = sorted(range(classes), key=lambda k: -row[k])
        first[label] += ranking[0] == label
        five[label] += label in ranking[:5]
    assert result.images.tolist() == [labels.tolist().count(k) for k in range(classes)]
    assert result.top1.tolist() == first
    assert result.count == 40
    assert result.accuracy() == sum(first) / 40
    if classes < 5:
        assert result.top5 is None
        assert "top-5" not in str(result)
        with pytest.raises(ValueError, match="top-5 accuracy is undefined"):
            result.accuracy(5)
    else:
        assert result.top5 is not None
        assert result.top5.tolist() == five
        assert result.accuracy(5) == sum(five) / 40
        assert f"top-5 accuracy {sum(five) / 40:.2%}, error {1 - sum(five) / 40:.2%}" in str(result)


def test_the_csv_has_a_line_per_class(tmp_path: Path) -> None:
    result = Result(torch.tensor([4, 0, 3]), torch.tensor([1, 0, 3]), None)
    result.write_csv(tmp_path / "a.csv", ["tench", "no, images", "shark"])
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["class", "name", "images", "top1_correct", "top1_accuracy"],
            ["0", "tench", "4", "1", "0.250000"],
            ["1", "no, images", "0", "0", ""],
            ["2", "shark", "3", "3", "1.000000"],
        ]
    full = Result(torch.tensor([4]), torch.tensor([1]), torch.tensor([2]))
    full.write_csv(tmp_path / "b.csv", ["x"])
    assert (tmp_path / "b.csv").read_text().splitlines() == [
        "class,name,images,top1_correct,top5_correct,top1_accuracy,top5_accuracy",
        "0,x,4,1,2,0.250000,0.500000",
    ]


def test_what_cannot_be_counted_is_refused() -> None:
    scores = torch.rand(4, 6)
    for labels, named in ((torch.tensor([0, 1, 2, 6]), "got 0 to 6"), (torch.tensor([-1, 1, 2, 3]), "got -1")):
        with pytest.raises(ValueError, match=named):
            counted(scores, labels, [4])
    with pytest.raises(ValueError, match="no images"):
        counted(scores[:0], torch.zeros(0, dtype=torch.long), [0])
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        counted(scores, torch.tensor([0, 1, 2, 3]), [2, 2])
    with pytest.raises(ValueError, match=r"shape \[4, 5\]: got \[4, 6\]"):
        evaluate(lambda x: x, [(scores, torch.zeros(4, dtype=torch.long))], 5, CPU)


def test_without_torchmetrics_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ImportError, match=r"fastres\[eval\]"):
        evaluate(lambda x: x, [], 6, CPU)


def test_nothing_of_this_is_loaded_by_import_fastres() -> None:
    code = "import sys, fastres; print([n for n in sys.modules if n.startswith(('fastres.', 'torchmetrics'))])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    for name in ("evaluate", "weights", "cli", "train", "torchmetrics"):
        assert name not in loaded
