"""Evaluation as in section 3.4 of the paper: one centre crop, 10 crops, or fully convolutional at several scales.

One net or an ensemble can be evaluated. All averages are means of softmax scores: over the positions of a score map,
over nets, and over views (crops, mirror images, scales).

    images uint8 [C, H, W] ─ Views.prepare ─► groups of one shape ─ Views.of ─► preprocess ─► nets ─► mean scores

Source: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2015). The crops are those of its reference
[21], the dense evaluation is that of its reference [41].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf

from fastres.crop import MOST_PIXELS, centre, resized, resized_crop
from fastres.inference import optimize
from fastres.table import Table

__all__ = ["CROPS", "SCALES", "Predictor", "Result", "Views", "evaluate", "fully_convolutional", "require_metrics"]

SCALES = (224, 256, 384, 480, 640)  # shorter sides of the images, for nets trained on 224x224
CROPS = {
    "center": "one crop from the centre",
    "10": "four corners, the centre and their mirror images, of the central square",
    "multiscale": "fully convolutional on the whole image at several scales",
}


@dataclass(frozen=True)
class Views:
    """The views of an image (crops, mirror images, scales) whose scores are averaged.

    crops: a key of `CROPS`.
    size: side of the crops. For "multiscale", side of the training images: it sets the size of the pooling window.
    resize: shorter side of an image before cropping; None to crop without resizing. "multiscale" ignores it.
    scales: shorter sides of the images for "multiscale".
    flip: for "multiscale", whether to add the mirror image of every scale.

    Raises ValueError for an unknown key, for crops or scales that don't fit, and for sides beyond `MOST_PIXELS`.
    """

    crops: str = "center"
    size: int = 224
    resize: int | None = 256
    scales: tuple[int, ...] = SCALES
    flip: bool = True

    def __post_init__(self) -> None:
        if self.crops not in CROPS:
            raise ValueError(f"crops must be one of {', '.join(CROPS)}: got {self.crops!r}")
        if self.crops == "multiscale":
            small = [side for side in self.scales if side < self.size]
            if small or not self.scales:
                raise ValueError(
                    f"scales must have at least one side, and none below size={self.size}: got {list(self.scales)}"
                )
        elif self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise ValueError(f"size must be at least 1 and at most resize: got size={self.size}, resize={self.resize}")
        kept = {"center": self.size, "10": self.resize or self.size, "multiscale": max(self.scales)}[self.crops]
        most = math.isqrt(MOST_PIXELS)
        if kept > most:
            raise ValueError(
                f"crops or scales of {kept}x{kept} are too large: up to {most}x{most} are accepted, for which a first "
                "layer's output has 1 GB"
            )

    def prepare(self, image: Tensor) -> Tensor:
        """Resize and crop an image, uint8 [..., C, H, W], before it is batched (for example in a loader's worker).

        Returns uint8 [..., C, size, size] for a centre crop. Returns the central square for 10 crops,
        [..., C, resize, resize] (with the image's shorter side if resize is None), from which the paper's reference
        [21] takes the crops. Returns the image unchanged for the fully convolutional form.

        Raises ValueError for an image that, resized, is smaller than its crop, or that has more than `MOST_PIXELS`
        pixels at the largest scale.
        """
        height, width = image.shape[-2:]
        if self.crops == "multiscale":
            rows, columns = resized((height, width), max(self.scales))
            if rows * columns > MOST_PIXELS:
                raise ValueError(
                    f"an image of {height}x{width} becomes {rows}x{columns}, more than {MOST_PIXELS:,} pixels"
                )
            return image
        if self.resize is not None:
            height, width = resized((height, width), self.resize)
        if min(height, width) < self.size:
            raise ValueError(f"an image of {list(image.shape)} is smaller than its crop, {self.size}x{self.size}")
        side = self.size if self.crops == "center" else min(height, width)
        return resized_crop(image, (height, width), centre((height, width), side))

    def of(self, images: Tensor) -> Iterator[Tensor]:
        """Yield one batch of views, uint8 [N, C, h, w], at a time, of images uint8 [N, C, H, W] from `prepare`."""
        if self.crops == "center":
            yield images
        elif self.crops == "10":
            yield from tvf.ten_crop(images, [self.size, self.size])
        else:
            for side in self.scales:
                scaled = tvf.resize(images, [side], antialias=True)
                yield scaled
                if self.flip:
                    yield tvf.horizontal_flip(scaled)


class _Pointwise(nn.Module):
    """A linear classifier as a 1x1 convolution: a feature map flattened to [N, C L] -> scores [N, K, L]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.conv = nn.Conv1d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
        self.conv.weight = nn.Parameter(linear.weight.detach()[:, :, None], requires_grad=False)
        if linear.bias is not None:
            self.conv.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(x.shape[0], self.conv.in_channels, -1))


def fully_convolutional(model: nn.Module, size: int) -> nn.Module:
    """Return a fully convolutional copy of `model` in eval mode, which accepts images of any size.

    The global average pool becomes an average pool of stride 1 whose window is the last feature map of an image
    [size, size]: 7x7 for the ImageNet nets at 224. The linear layer becomes a 1x1 convolution. The result maps images
    [N, C, H, W] to scores [N, K, L] for L window positions. It shares parameters and buffers with `model`, which is not
    changed. The scores at a position are those of a crop there, except that the net sees the surrounding pixels where
    a crop is padded with zeros.

    Raises ValueError for a net without exactly one global average pool and one linear layer.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    pool = _only(model, nn.AdaptiveAvgPool2d, "global average pool")
    head = _only(model, nn.Linear, "linear layer")
    entrance = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    window: list[int] = []
    hook = model.get_submodule(pool).register_forward_pre_hook(lambda _, args: window.extend(args[0].shape[-2:]))
    with torch.no_grad():
        model(entrance.weight.new_zeros(1, entrance.in_channels, size, size))
    hook.remove()
    linear = model.get_submodule(head)
    assert isinstance(linear, nn.Linear)
    model.set_submodule(pool, nn.AvgPool2d((window[0], window[1]), stride=1))
    model.set_submodule(head, _Pointwise(linear))
    return model.eval()


def _only(model: nn.Module, kind: type[nn.Module], what: str) -> str:
    found = [name for name, module in model.named_modules() if isinstance(module, kind)]
    if len(found) != 1 or getattr(model.get_submodule(found[0]), "output_size", 1) not in (1, (1, 1)):
        named = ", ".join(found) or "none"
        raise ValueError(
            f"the fully convolutional form needs a net with exactly one {what}: {type(model).__name__} has {named}"
        )
    return found[0]


class Predictor:
    """A function from images to the mean scores of one net or of an ensemble, over the given views.

    models: one or several nets, [N, C, H, W] -> [N, K], on one device and with one number of classes. They are put into
    eval mode (for multiscale, copies of them are).
    views: the views of each image.
    preprocess: maps uint8 [N, C, H, W] to the input of a net, e.g. a `fastres.train.data.Preprocess`, which resizes its
    mean image to each view. Pass one module for all nets, or one for each net.
    dtype: dtype of the convolutions; None for that of the nets. Without `fast`, 16-bit dtypes run under autocast, and
    float32 leaves the nets as they are.
    fast: run the nets through `fastres.optimize`.
    calibration: as for `fastres.optimize`, but (images, ...) tuples with images as `__call__` takes them. They are
    iterated over once per net, and all their views are used.
    percentile: as for `fastres.optimize`.

    Raises ValueError for another number of preprocess modules than nets, for a dtype that needs `fast`, and where
    `fully_convolutional` or `fastres.optimize` does.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        views: Views,
        preprocess: nn.Module | Sequence[nn.Module],
        *,
        dtype: torch.dtype | None = None,
        fast: bool = False,
        calibration: Iterable[tuple[Any, ...]] | None = None,
        percentile: float | None = None,
    ) -> None:
        nets = [models] if isinstance(models, nn.Module) else list(models)
        before = [preprocess] * len(nets) if isinstance(preprocess, nn.Module) else list(preprocess)
        if not nets or len(before) != len(nets):
            raise ValueError(
                f"models and preprocess must have the same length, at least 1: got {len(nets)} and {len(before)}"
            )
        if not fast and dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype {dtype} needs fast=True")
        self.views = views
        self.device = next(nets[0].parameters()).device
        self.autocast = None if fast or dtype in (None, torch.float32) else dtype
        dense = views.crops == "multiscale"
        nets = [fully_convolutional(net, views.size) if dense else net.eval() for net in nets]
        before = [copy.deepcopy(each).to(self.device) for each in before]
        if fast:  # a CUDA graph per input shape pays off for crops of one shape, not for whole images of many shapes
            shown = [None if calibration is None else self._shown(calibration, each) for each in before]
            nets = [
                optimize(net, dtype=dtype, cuda_graph=not dense, calibration=inputs, percentile=percentile)
                for net, inputs in zip(nets, shown, strict=True)
            ]
        self.members = list(zip(before, nets, strict=True))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Return scores [N, K], fp32 on the nets' device, of N images from `views.prepare`.

        images: one tensor uint8 [N, C, H, W], or a sequence of N tensors [C, H, W], whose shapes may differ. Raises
        ValueError for no images, or for nets with different numbers of classes.
        """
        if not len(images):
            raise ValueError("at least one image is needed: got none")
        groups = _grouped(images)
        parts = [self._group(group) for _, group in groups]
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([i for places, _ in groups for i in places], device=self.device)
        return torch.cat(parts)[order.argsort()]

    def _group(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return torch.stack([self._view(view) for view in self.views.of(images)]).mean(0)

    def _view(self, view: Tensor) -> Tensor:
        scores = []
        for preprocess, net in self.members:
            x = _read(preprocess, view)
            with nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
                y = net(x)
            y = y.float().softmax(1)
            scores.append(y.mean(2) if y.dim() == 3 else y)
        if len({each.shape for each in scores}) != 1:
            classes = ", ".join(str(each.shape[1]) for each in scores)
            raise ValueError(f"the nets of an ensemble must have the same number of classes: got {classes}")
        return torch.stack(scores).mean(0)

    def _shown(self, batches: Iterable[tuple[Any, ...]], preprocess: nn.Module) -> Iterator[Tensor]:
        """Yield the preprocessed views of all images of `batches`: the calibration inputs of a net."""
        for images, *_ in batches:
            for _, group in _grouped(images):
                for view in self.views.of(group.to(self.device)):
                    yield _read(preprocess, view)


def _grouped(images: Sequence[Tensor] | Tensor) -> list[tuple[Sequence[int], Tensor]]:
    """Group images by shape. Returns a list of (indices of the images in the input, the images [n, C, H, W])."""
    if isinstance(images, Tensor):
        return [(range(len(images)), images)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(i)
    return [(places, torch.stack([images[i] for i in places])) for places in groups.values()]


def _read(preprocess: nn.Module, view: Tensor) -> Tensor:
    return preprocess(view).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Result:
    """Counts per class, each int64 [K] on the CPU.

    images: number of images. top1, top5: how many of them have their label among the 1 or 5 highest scores; top5 is
    None for fewer than five classes.
    """

    images: Tensor
    top1: Tensor
    top5: Tensor | None

    @property
    def count(self) -> int:
        return int(self.images.sum())

    def accuracy(self, k: int = 1) -> float:
        """Return the top-k accuracy over all images, k being 1 or 5. Raises ValueError for k=5 below five classes."""
        correct = {1: self.top1, 5: self.top5}[k]
        if correct is None:
            raise ValueError(f"top-{k} accuracy is undefined for {len(self.images)} classes")
        return int(correct.sum()) / self.count

    def __str__(self) -> str:
        rates = [(k, self.accuracy(k)) for k in (1, 5) if k == 1 or self.top5 is not None]
        text = "; ".join(f"top-{k} accuracy {rate:.2%}, error {1 - rate:.2%}" for k, rate in rates)
        return f"{text} ({self.count:,} images, {len(self.images):,} classes)"

    def write_csv(self, path: str | Path, names: Sequence[str]) -> None:
        """Write a CSV file with a row per class: index, name, number of images, correct counts, accuracies.

        The accuracies of a class without images are empty.
        """
        columns = {"top1": self.top1} | ({} if self.top5 is None else {"top5": self.top5})
        with Table(path) as table:
            shares = [f"{name}_accuracy" for name in columns]
            table.row("class", "name", "images", *(f"{name}_correct" for name in columns), *shares)
            for k, (name, count) in enumerate(zip(names, self.images.tolist(), strict=True)):
                correct = [int(column[k]) for column in columns.values()]
                table.row(k, name, count, *correct, *(f"{c / count:.6f}" if count else "" for c in correct))


def evaluate(
    predict: Callable[[Any], Tensor], batches: Iterable[tuple[Any, Tensor]], classes: int, device: torch.device
) -> Result:
    """Count the top-1 and top-5 hits of `predict` over (images, labels) batches.

    predict: a `Predictor`, or any function from images to scores [N, classes] on `device`.
    batches: images as `predict` takes them, and labels int64 [N]; in several processes, the share of this process.

    Counting runs on `device` and does not synchronise with it until the end. If torch.distributed is initialised, every
    process gets the sum over all processes.

    Raises ImportError if torchmetrics is missing, and ValueError for no images, a label outside 0 to classes - 1,
    scores of another shape, and scores that aren't finite.
    """
    tops = [1] if classes < 5 else [1, 5]
    stat_scores = require_metrics()
    counters = [stat_scores(classes, average=None, top_k=k, validate_args=False).to(device) for k in tops]
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for images, labels in batches:
        if not len(labels):
            continue
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"labels must be indices of {classes} classes: got {int(labels.min())} to {int(labels.max())}"
            )
        scores = predict(images)
        if scores.shape != (len(labels), classes):
            raise ValueError(f"scores must have shape [{len(labels)}, {classes}]: got {list(scores.shape)}")
        broken |= ~scores.isfinite().all()
        for counter in counters:
            counter.update(scores, labels.to(device, non_blocking=True))
    if not counters[0].update_called:
        raise ValueError("there are no images to test on")
    if broken:
        raise ValueError("the net's scores are not finite: check its weights and its BatchNorm statistics")
    top = [counter.compute().cpu() for counter in counters]  # [K, (tp, fp, tn, fn, images)]
    return Result(top[0][:, 4], top[0][:, 0], top[1][:, 0] if len(top) > 1 else None)


def require_metrics() -> Any:
    """Return torchmetrics' `MulticlassStatScores`. Raises ImportError with the install command if it is missing."""
    try:
        from torchmetrics.classification import MulticlassStatScores
    except ImportError as error:
        raise ImportError(f"top-1 and top-5 need torchmetrics ({error}): pip install 'fastres[eval]'") from error
    return MulticlassStatScores
