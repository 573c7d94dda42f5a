"""Image files as pixels of 8 bits per channel: the one place that decides which are read, and how.

`eval`, `predict` and training read by it, and DALI decodes only what comes out alike. What becomes of a file:

- up to 8 bits per channel, palettes, CMYK, YCbCr and LAB among them: as Pillow converts it.
- 16-bit grey whose white the file's format fixes (PNG, PGM, JPEG 2000, unsigned TIFF): scaled, white to 255. 16-bit
  colour comes from Pillow as its upper 8 bits, which is at most one level off.
- anything else, 32-bit integers, floating point and signed numbers: refused, for nobody knows what white is there.
- transparency is left out: the colours beneath it show.
- EXIF orientation and colour profiles are ignored, as in torchvision's reference, with which the accuracy of published
  weights was measured. (A TIFF's own tag, which says in which order its rows lie, Pillow follows in decoding it.)
- of several pictures in a file, the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

__all__ = ["READING", "ImageError", "eight_bits", "opened", "read_image"]

READING = 2  # to be raised when other pixels are made of a file: mean images are kept from run to run

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ACCEPTED = "8 bits per channel, and 16-bit grey as PNG, PGM, JPEG 2000 or unsigned TIFF"


class ImageError(ValueError):
    """A file that is no image, a damaged one, or one of a kind that isn't read. The message names it and the mend."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The image in the file, not yet decoded. Raises ImageError, which names the file, for whatever goes wrong inside:
    damage often shows in decoding only, and as any exception."""
    try:
        with Image.open(path) as image:
            yield image
    except ImageError as error:
        raise ImageError(f"{path} is no image that can be read ({error}); convert it to 8 bits") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's word, not Pillow's
            raise ImageError(f"{path} can't be read: {error.strerror}") from error
        unknown = isinstance(error, UnidentifiedImageError)
        why = "in no format that Pillow knows" if unknown else str(error) or type(error).__name__
        raise ImageError(f"{path} is no image that can be read ({why}); fetch it again or remove it") from error


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """The image in the file, decoded, as "RGB" or "L". Raises ImageError, which names the file."""
    with opened(path) as image:
        return eight_bits(image, mode)


def eight_bits(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """`image`, just opened, as "RGB" or "L". Raises ImageError for one of a kind that isn't read."""
    white = _white(image)
    if white is None:
        raise ImageError(
            f"mode {image.mode} in a {image.format} file, where nothing says for certain what white is; accepted are "
            f"{_ACCEPTED}"
        )
    image.load()
    if white != 255:
        values = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((255 * values + white // 2) // white).astype(np.uint8))
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow knows no other way out of it
    return image.convert(mode)


def _white(image: Image.Image) -> int | None:
    """The greatest value that a pixel of such a file can have; None where the file doesn't say, or doesn't mean it."""
    white = 255 if image.mode in _EIGHT_BITS else None
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        unsigned = set(tags.get(SAMPLEFORMAT, (1,))) == {1}
        if image.mode in _SIXTEEN_BITS and tags.get(PHOTOMETRIC_INTERPRETATION) == 1:  # 0: white is zero
            white = (1 << tags[BITSPERSAMPLE][0]) - 1
        return white if unsigned else None
    if image.format in ("PNG", "PPM", "JPEG2000") and image.mode in ("I", *_SIXTEEN_BITS):
        return 65535  # Pillow scales to that what has fewer bits, or another maximum
    return white
