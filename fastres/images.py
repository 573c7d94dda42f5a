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

What can't be read is refused by name, so Pillow's own warnings, which name no file, are switched off.
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

READING = 2  # to be raised when other pixels are made of a file: mean images are kept from run to run

_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_ACCEPTED = "8 bits per channel, and 16-bit grey as PNG, PGM, JPEG 2000 or unsigned TIFF"
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}

warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """A file that is no image, a damaged one, or one of a kind that isn't read. The message names it and the mend."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The image in the file, not yet decoded. Raises ImageError, one line that names the file, for whatever goes wrong
    inside: damage often shows in decoding only, and as any exception."""
    name = printable(path)
    try:
        if isinstance(path, (str, Path)):  # not a file in memory
            require_file(path)
        with Image.open(path) as image:
            yield image
    except ImageError as error:
        raise ImageError(f"{name} is no image that can be read ({error}); convert it to 8 bits") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's word, not Pillow's
            raise ImageError(f"{name} can't be read: {error.strerror}") from error
        why, mend = printable(error) or type(error).__name__, "fetch it again or remove it"
        if isinstance(error, UnidentifiedImageError):
            why = "in no format that Pillow knows"
        elif isinstance(error, (Image.DecompressionBombError, MemoryError)):
            mend = "make it smaller or remove it"
        raise ImageError(f"{name} is no image that can be read ({why.rstrip('.')}); {mend}") from error


def require_file(path: str | Path) -> None:
    """Raises OSError for what isn't there, and for pipes and their like, which would be waited for without an end."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'a device')}, not a file")


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


def image_files(folder: str | Path, unlisted: Callable[[OSError], None]) -> list[str]:
    """The files at any depth below `folder` whose names end as those of images do, in no order.

    Links to folders are followed, but not to a folder that they lie in. unlisted: is told of each folder that can't be
    listed, and may raise what it is told.
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
    """torchvision's ImageFolder of the files that `image_files` finds, in torchvision's order.

    Raises OSError for a folder that isn't there or can't be listed, and for classes without images.
    """

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int], **_: object) -> list[tuple[str, int]]:
        def refused(error: OSError) -> None:
            raise error

        files = {name: image_files(os.path.join(directory, name), refused) for name in class_to_idx}
        empty = [name for name, found in files.items() if not found]
        if empty:
            named = ", ".join(empty[:5]) + ", ..." * (len(empty) > 5)
            raise FileNotFoundError(f"no images in {named}; accepted are {', '.join(IMG_EXTENSIONS)}")
        return [(path, class_to_idx[name]) for name in files for path in sorted(files[name], key=os.path.split)]
