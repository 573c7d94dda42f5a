"""Load images in batches for `eval`, for `predict` and for calibration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

from fastres.cli.testing_options import CALIBRATED, CALIBRATION_IMAGES
from fastres.evaluate import Views
from fastres.images import ImageError, image_files, read_image, require_file
from fastres.pretrained import TrainedNets
from fastres.terminal import printable, shows_bars
from fastres.train.data import fetched

Items = list[tuple[str, int]] | tuple[Tensor, Tensor]


def count_images(items: Items) -> int:
    """Return the number of images in `items`: paths with labels, or (images [N, C, H, W], labels [N])."""
    return len(items[1]) if isinstance(items, tuple) else len(items)


def named_images(named: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Return the image files in `named`, and one message for each folder that can't be listed.

    named: files, which are kept in order, and folders, which are replaced by the images at any depth below them,
    sorted. Raises ValueError if a path doesn't exist, isn't a regular file or a folder, or is a folder without images;
    and if there are no images at all.
    """
    paths: list[str] = []
    errors: list[OSError] = []
    for path in named:
        if os.path.isdir(path):
            before = len(errors)
            found = image_files(path, errors.append)
            if not found and len(errors) == before:
                raise ValueError(f"{path} contains no images; accepted: {', '.join(IMG_EXTENSIONS)}")
            paths += sorted(found, key=lambda file: file.split(os.sep))
            continue
        try:
            require_file(path)
        except FileNotFoundError as error:
            raise ValueError(f"{path} does not exist") from error
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror}") from error
        paths.append(str(path))
    unlisted = [f"{printable(error.filename)} can't be listed: {error.strerror}" for error in errors]
    if not paths:
        raise ValueError("; ".join(unlisted))
    return paths, unlisted


class Files(Dataset):
    """A data set of image files: item i is (prepared image, label), or (error message, label) if it can't be read.

    items: paths with labels. views: prepare the images, uint8 [C, H, W]. channels: 1 for grey images, else RGB.
    """

    def __init__(self, items: Sequence[tuple[str, int]], views: Views, channels: int) -> None:
        self.items = items
        self.views = views
        self.mode = "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor | str, int]:
        path, label = self.items[index]
        try:
            return self.views.prepare(tvf.pil_to_tensor(read_image(path, self.mode))), label
        except ImageError as error:
            return str(error), label
        except (ValueError, MemoryError) as error:
            return f"{printable(path)} can't be prepared for the net ({printable(error)})", label


def _collate(pairs: Sequence[tuple[Tensor | str, int]]) -> tuple[Tensor | list[Tensor], Tensor, list[str]]:
    """Return (images, labels, error messages of the images that can't be read).

    images: one tensor [N, C, H, W] if all have the same shape, else a list of tensors [C, H, W].
    """
    images = [image for image, _ in pairs if not isinstance(image, str)]
    labels = [label for image, label in pairs if not isinstance(image, str)]
    reasons = [reason for reason, _ in pairs if isinstance(reason, str)]
    together = len({image.shape for image in images}) == 1
    return torch.stack(images) if together else images, torch.tensor(labels), reasons


class Batches:
    """An iterable of batches (images, labels), which can be iterated more than once.

    Images that can't be read are skipped and named on stderr; `failed` is their number in the latest pass.

    items: paths with labels, or (images, labels). args: `batch` and `workers` are read. views: prepare the images.
    sample_of: for calibration images, a description of the images that they were sampled from; None for others. A pass
    raises ValueError if the images don't have the channels of the net, or if no calibration image can be read.
    """

    def __init__(
        self, items: Items, args: argparse.Namespace, nets: TrainedNets, views: Views, sample_of: str | None = None
    ) -> None:
        self.items, self.count, self.size, self.workers = items, count_images(items), args.batch, args.workers
        self.channels, self.views, self.device = nets.channels, views, nets.device
        self.sample_of = sample_of
        self.failed = 0

    @property
    def said(self) -> str:
        """For calibration images, after a pass: a sentence with the number of images used and their source."""
        return f"calibrated with {self.count - self.failed:,} of {self.sample_of}"

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        self.failed = 0
        if isinstance(self.items, tuple):
            images, labels = self.items
            if images.shape[1] != self.channels:
                raise ValueError(
                    f"the net requires images with {self.channels} channels, but the data has {images.shape[1]}"
                )
            starts = range(0, len(labels), self.size)
            for i in self._shown(starts, len(starts)):
                yield self.views.prepare(images[i : i + self.size]), labels[i : i + self.size]
            return
        files = Files(self.items, self.views, self.channels)
        starts = range(0, self.count, self.size)
        places = (list(range(i, min(i + self.size, self.count))) for i in starts)
        pinned = self.device.type == "cuda"
        with closing(fetched(files, places, self.workers, _collate, pinned=pinned)) as batches:
            for images, labels, reasons in self._shown(batches, len(starts)):
                for reason in reasons:
                    tqdm.write(f"calibration: {reason}" if self.sample_of else reason, file=sys.stderr)
                self.failed += len(reasons)
                if len(labels):
                    yield images, labels
        if self.sample_of and self.failed == self.count:
            raise ValueError(f"{self.said}: none of the images sampled can be read")

    def _shown(self, batches: Iterable[Any], total: int) -> Iterable[Any]:
        title = "calibration" if self.sample_of else None
        return tqdm(batches, title, total, unit="batch", disable=not shows_bars(), leave=False)

    def report(self) -> int:
        """Return the exit status, which is 1 if images could not be read, and print their number on stderr."""
        if self.failed:
            which = "calibration images" if self.sample_of else "images"
            print(f"{self.failed} of {self.count} {which} could not be read", file=sys.stderr)
        return int(self.failed > 0)


def calibrating(
    args: argparse.Namespace, default: tuple[Items, str], nets: TrainedNets, views: Views
) -> Batches | None:
    """Return the batches of calibration images, or None if the dtype needs no calibration.

    They are a sample, drawn with a fixed seed, of the images in --calibration or, without that option, of `default`:
    (items, their description). Raises ValueError if --calibration has no images or can't be listed.
    """
    if args.dtype not in CALIBRATED:
        return None
    items, what = default
    if args.calibration is not None:
        paths, unlisted = named_images([args.calibration])
        if unlisted:
            raise ValueError(unlisted[0])
        items, what = [(path, 0) for path in paths], f"images in {printable(args.calibration)}"
    count = count_images(items)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    picked = order[: args.calibration_images or CALIBRATION_IMAGES].sort().values
    sample = (items[0][picked], items[1][picked]) if isinstance(items, tuple) else [items[i] for i in picked.tolist()]
    within = "" if args.percentile is None else f", percentile {args.percentile:g}"
    return Batches(sample, args, nets, views, sample_of=f"{count:,} {what}{within}")
