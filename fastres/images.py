"""Read image files as 8 bits per channel. This module alone decides which files are accepted, and how they are read.

`eval`, `predict` and training use it, and DALI decodes only files for which it gives the same pixels. The rules:

- Up to 8 bits per channel, including palettes, CMYK, YCbCr and LAB: converted by Pillow.
- 16-bit grey in a format that fixes the value of white (PNG, PGM, JPEG 2000, unsigned TIFF): scaled so that white is
  255. Pillow reads 16-bit colour as its upper 8 bits, which is at most one level off.
- Everything else (32-bit integers, floating point, signed numbers): refused, because the value of white is unknown.
- Transparency is dropped: the result has the colours of the transparent pixels.
- EXIF orientation and colour profiles are ignored, as in torchvision's reference code, with which the accuracy of
  published weights was measured. (Pillow does apply a TIFF's orientation tag when it decodes the file.)
- The first image of a file with several images is used.

Errors name the file. Pillow's warnings don't, so they are switched off.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastres.terminal import printable

__all__ = ["READING", "ClassFolders", "ImageError", "eight_bits", "image_files", "opened", "read_image", "require_file"]

READING = 2  # version of these rules, for cached mean images: raise it when the same file gives other pixels

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ACCEPTED = "8 bits per channel, and 16-bit grey as PNG, PGM, JPEG 2000 or unsigned TIFF"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}

warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """A file that is not an image, is damaged, or is of a kind that is not accepted. The message names file and fix."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file without decoding it.

    Raises ImageError, a single line that names the file, for any exception inside the context: a damaged file often
    fails only when it is decoded, and with any type of exception.
    """
    name = printable(path)
    try:
        if isinstance(path, (str, Path)):  # not a file in memory
            require_file(path)
        with Image.open(path) as image:
            yield image
    except ImageError as error:
        raise ImageError(f"{name} is not a readable image ({error}); convert it to 8 bits") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # raised by the operating system, not by Pillow
            raise ImageError(f"{name} can't be read: {error.strerror}") from error
        why, remedy = printable(error) or type(error).__name__, "fetch it again or remove it"
        if isinstance(error, UnidentifiedImageError):
            why = "not in a format that Pillow supports"
        elif isinstance(error, (Image.DecompressionBombError, MemoryError)):
            remedy = "make it smaller or remove it"
        raise ImageError(f"{name} is not a readable image ({why.rstrip('.')}); {remedy}") from error


def require_file(path: str | Path) -> None:
    """Raise OSError unless `path` is a regular file. A missing one raises too; reading a pipe could block forever."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'a device')}, not a file")


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Return the decoded image of a file in mode "RGB" or "L". Raises ImageError, which names the file."""
    with opened(path) as image:
        return eight_bits(image, mode)


def eight_bits(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Decode `image`, as `opened` yields it, into mode "RGB" or "L". Raises ImageError if its kind is not accepted."""
    white = _white(image)
    if white is None:
        raise ImageError(
            f"mode {image.mode} in a {image.format} file, which does not define the value of white; accepted: "
            f"{_ACCEPTED}"
        )
    image.load()
    if white != 255:
        values = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((255 * values + white // 2) // white).astype(np.uint8))
    elif image.mode == "LAB":
        image = image.convert("RGB")  # Pillow converts LAB to no other mode
    return image.convert(mode)


def _white(image: Image.Image) -> int | None:
    """Return the pixel value of white, judged by mode and format; None if the file doesn't define it reliably."""
    white = 255 if image.mode in _EIGHT_BITS else None
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        unsigned = set(tags.get(SAMPLEFORMAT, (1,))) == {1}
        if image.mode in _SIXTEEN_BITS and tags.get(PHOTOMETRIC_INTERPRETATION) == 1:  # with 0, white is zero
            white = (1 << tags[BITSPERSAMPLE][0]) - 1
        return white if unsigned else None
    if image.format in ("PNG", "PPM", "JPEG2000") and image.mode in ("I", *_SIXTEEN_BITS):
        return 65535  # Pillow scales files with fewer bits or another maximum to this
    return white


def image_files(folder: str | Path, unlisted: Callable[[OSError], None]) -> list[str]:
    """Return all files at any depth below `folder` that have an image's file extension, in no particular order.

    Links to folders are followed, unless they lead to a folder that contains them. `unlisted` is called with the error
    for each folder that can't be listed, and may raise it.
    """
    found = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(str(folder), frozenset())]
    while waiting:
        place, around = waiting.pop()
        try:
            known = os.stat(place)
            here = known.st_dev, known.st_ino
            entries = [] if here in around else list(os.scandir(place))
        except OSError as error:
            unlisted(error)
            continue
        for entry in entries:
            if _is_folder(entry):
                waiting.append((entry.path, around | {here}))
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                found.append(entry.path)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class ClassFolders(ImageFolder):
    """torchvision's `ImageFolder` with the files that `image_files` finds, in torchvision's order.

    Raises OSError for a folder that is missing or can't be listed, and for classes without images.
    """

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], **_: object) -> list[tuple[str, int]]:
        def refused(error: OSError) -> None:
            raise error

        files = {name: image_files(os.path.join(directory, name), refused) for name in class_to_idx}
        empty = [name for name, found in files.items() if not found]
        if empty:
            named = ", ".join(empty[:5]) + ", ..." * (len(empty) > 5)
            raise FileNotFoundError(f"no images in {named}; accepted: {', '.join(IMG_EXTENSIONS)}")
        return [(path, class_to_idx[name]) for name in files for path in sorted(files[name], key=os.path.split)]
