"""Crop a resized image without computing the whole resized image where that would be very large.

An image of 2x6000 pixels whose shorter side is resized to 256 has about 200 million pixels, of which a 224x224 crop
shows 50,000. Up to `MOST_PIXELS` pixels, torchvision resizes the image and crops it. Beyond that, Pillow resizes only
the part of the image that the crop shows; its pixels differ by at most 1/255 from a crop of the whole resized image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

__all__ = ["MOST_PIXELS", "centre", "resized", "resized_crop"]

MOST_PIXELS = 2**24  # of a resized image: the output of a first layer then is 1 GB (16 values per pixel in fp32)


def resized(size: Sequence[int], side: int) -> tuple[int, int]:
    """Return the height and width after resizing the shorter side of `size` to `side`, rounded as torchvision does."""
    height, width = size
    longer = int(side * max(height, width) / min(height, width))
    return (side, longer) if height <= width else (longer, side)


def centre(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """Return the box (top, left, height, width) of a centre crop of side `side`, placed as torchvision does."""
    return round((size[0] - side) / 2), round((size[1] - side) / 2), side, side


def resized_crop(image: Any, size: tuple[int, int], box: tuple[int, int, int, int]) -> Any:
    """Resize `image` to `size`, (height, width), and return the crop `box`, (top, left, height, width).

    image: a Pillow image, a uint8 tensor [..., H, W], or any other type that torchvision's `resize` accepts. The result
    has the same type. Equivalent to, up to differences of 1/255 beyond `MOST_PIXELS` pixels,

        tvf.crop(tvf.resize(image, size, antialias=True), *box)
    """
    if size[0] * size[1] > MOST_PIXELS:
        if isinstance(image, Image.Image):
            return _window(image, size, box)
        if type(image) is Tensor:
            planes = image.reshape(-1, *image.shape[-2:]).cpu().numpy()
            windows = [np.asarray(_window(Image.fromarray(plane), size, box)) for plane in planes]
            return torch.from_numpy(np.stack(windows)).reshape(*image.shape[:-2], *box[2:])
    return tvf.crop(tvf.resize(image, list(size), antialias=True), *box)


def _window(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    top, left, height, width = box
    x0, x1, x, right = _span(image.width, size[1], left, width)
    y0, y1, y, bottom = _span(image.height, size[0], top, height)
    return image.crop((x0, y0, x1, y1)).resize((width, height), Image.Resampling.BILINEAR, (x, y, right, bottom))


def _span(length: int, resized: int, start: int, extent: int) -> tuple[int, int, float, float]:
    """Return (low, high, first, last) for one axis: the pixels [low, high) to read, and the window in them.

    length: pixels of the image. resized: its length after resizing. start, extent: the window in the resized image.
    Pillow takes the window's coordinates in float32, where large numbers lose precision. So first and last are relative
    to low.
    """
    scale = length / resized
    first, last = start * scale, min((start + extent) * scale, length)
    reach = max(scale, 1) + 1  # radius of the filter, plus one pixel for rounding
    low, high = max(0, math.floor(first - reach)), min(length, math.ceil(last + reach))
    return low, high, first - low, last - low
