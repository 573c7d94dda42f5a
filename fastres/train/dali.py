"""Photographs decoded and resized by DALI: on the GPU, by its JPEG decoder, where the training runs on one.

Order and chance stay those of `fastres.train.data`: workers read each file's bytes and pass the corners of the picture
through the very transform that Pillow's picture goes through elsewhere. Where they come to lie tells which window was
drawn; DALI, without chance or state of its own, decodes and resizes that window.

    bytes, window ─► decode ─► resize the window ─► flip ─► uint8 [N, H, W, 3]

On a CPU, decoding is Pillow's to the bit and resizing to one grey level; a GPU's decoder rounds in its own way. What
DALI might decode otherwise is decoded by `fastres.images`, which also says what is refused and why EXIF orientation is
ignored.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastres.images import ImageError, eight_bits, opened
from fastres.train.data import Batches, DataError, Dataset, Folder, Pairs, ReadError, fetched, seeded
from fastres.train.recipe import Recipe, ScaleCrop

Item = tuple[int, Tensor, Tensor, int]  # which photograph, its bytes, its window, its label


def chosen(asked: str, dataset: Dataset, recipe: Recipe, device: torch.device) -> str:
    """Which of `LOADERS` decodes: what is asked for, and for "auto" DALI on a GPU where it can and "torch" elsewhere.

    Raises DataError where DALI is asked for and can't.
    """
    if asked == "torch" or (asked == "auto" and device.type != "cuda"):
        return "torch"
    reason = refusal(recipe) if isinstance(dataset.train, Folder) else f"{dataset.name} has no files to decode"
    if reason is None:
        return "dali"
    if asked == "dali":
        raise DataError(f"--loader dali: {reason}")
    return "torch"


def refusal(recipe: Recipe) -> str | None:
    """Why DALI can't load photographs for `recipe`; None where it can."""
    if not isinstance(recipe.crop, ScaleCrop) or recipe.trivial_augment or recipe.erase:
        return "the recipe's augmentation is not only a scale, a crop and a flip"
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"DALI is not installed ({error}): pip install 'fastres[dali]'"
    return None


def window(transform: v2.Transform, width: int, height: int) -> Tensor:
    """What `transform`, a scale, crop and flip, shows of a picture, by torch's CPU generator.

    float32 [7]: top, left, bottom and right of the window in the picture's pixels, height and width of what is made of
    it, and 1 if that is mirrored.
    """
    corners = tv_tensors.KeyPoints([[0, 0], [width, height]], canvas_size=(height, width), dtype=torch.float64)
    moved = transform(corners)
    rows, columns = moved.canvas_size
    (left, top), (right, bottom) = moved.tolist()
    mirrored = right < left
    if mirrored:
        left, right = columns - 1 - left, columns - 1 - right
    down, across = height / (bottom - top), width / (right - left)
    box = (-top * down, -left * across, (rows - top) * down, (columns - left) * across)
    return torch.tensor([*box, rows, columns, mirrored], dtype=torch.float32)


class Encoded:
    """As the `Folder` it wraps, but undecoded: `dataset[(index, word)]` is an `Item`."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, item: tuple[int, int]) -> Item | ReadError:
        index, word = item
        path, label = self.folder.files.samples[index]
        try:
            content = io.BytesIO()
            with opened(path) as image:
                if _is_common(image):
                    size = image.size
                    content.write(Path(path).read_bytes())
                else:
                    picture = eight_bits(image)
                    size = picture.size
                    picture.save(content, "PPM")
        except ImageError as error:
            return ReadError(str(error))
        with seeded(word):
            return (
                index,
                torch.frombuffer(content.getbuffer(), dtype=torch.uint8),
                window(self.folder.transform, *size),
                label,
            )


def _is_common(image: Image.Image) -> bool:
    """Whether every decoder makes the same of the file, by its header: 8 bits of grey, or of RGB without transparency;
    a JPEG as YCbCr, which is what a GPU takes it for."""
    if image.mode not in ("L", "RGB") or "transparency" in image.info:
        return False
    if image.format == "JPEG":
        components = [layer[0] for layer in image.layer]  # type: ignore[attr-defined]
        return image.info.get("adobe_transform") != 0 and bytes(components) != b"RGB"
    if image.format == "PNG":
        layout = image.tile[0][3]  # type: ignore[attr-defined]
        return layout == image.mode  # else it has more bits or fewer
    return False


def collate(items: Sequence[Item | ReadError]) -> tuple[list[int], Tensor, list[int], Tensor, Tensor] | ReadError:
    """Which photographs, all their bytes in one tensor, how many each has, windows [N, 7], labels [N, 1]."""
    whole = []
    for item in items:
        if isinstance(item, ReadError):
            return item
        whole.append(item)
    which, data, windows, labels = zip(*whole, strict=True)
    return (
        list(which),
        torch.cat(data),
        [len(each) for each in data],
        torch.stack(windows),
        torch.tensor(labels)[:, None],
    )


def decoded(folder: Folder, batches: Batches, workers: int, device: torch.device) -> Pairs:
    """As `fastres.train.data.decoded`: uint8 [N, 3, H, W] in channels_last strides, and labels, on the device."""
    from nvidia.dali.plugin.pytorch import DALIClassificationIterator

    coming = fetched(Encoded(folder), batches, workers, collate)
    first = next(coming, None)  # starts the workers: before DALI's threads
    if first is None:
        return
    under_way: deque[list[int]] = deque()

    def source() -> Iterator[tuple[Any, ...]]:
        for which, data, lengths, windows, labels in chain([first], coming):
            under_way.append(which)
            start, end, size, mirrored = (
                np.ascontiguousarray(part) for part in np.split(windows.numpy(), (2, 4, 6), 1)
            )
            yield [part.numpy() for part in data.split(lengths)], start, end, size, mirrored[:, 0], labels.numpy()

    try:
        pipeline = _pipeline(source(), len(first[0]), max(1, workers), device)
        for (batch,) in DALIClassificationIterator(pipeline):
            under_way.popleft()
            yield batch["data"].permute(0, 3, 1, 2), batch["label"][:, 0]
    except RuntimeError as error:
        for index in chain(*under_way):
            culprit = folder[index, 0]
            if isinstance(culprit, ReadError):
                raise culprit from error
        raise
    finally:
        coming.close()  # the pipeline, which may live on, holds on to the workers


def _pipeline(source: Iterator[tuple[Any, ...]], most: int, threads: int, device: torch.device) -> Any:
    """Decoded, resized and flipped photographs uint8 [H, W, 3] with their labels; `most`: in a batch."""
    from nvidia.dali import fn, pipeline_def, types

    gpu = device.type == "cuda"

    @pipeline_def(batch_size=most, num_threads=threads, device_id=device.index if gpu else None)
    def photographs() -> tuple[Any, Any]:
        data, start, end, size, mirrored, labels = fn.external_source(source=source, num_outputs=6)
        x = fn.decoders.image(data, device="mixed" if gpu else "cpu", output_type=types.RGB, adjust_orientation=False)
        x = fn.resize(x, roi_start=start, roi_end=end, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(x, horizontal=fn.cast(mirrored, dtype=types.INT32)), labels.gpu() if gpu else labels

    return photographs()
