"""All readers give the right pixels for many kinds of image files, and refuse others with an error that names them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.transforms import v2

from fastres.cli.batches import Files
from fastres.evaluate import Views
from fastres.images import ImageError, opened, read_image
from fastres.train import dali, data

RAMP = np.arange(0, 65536, 5, dtype=np.uint16)[:13107].reshape(51, 257)
COLOUR = (200, 100, 50)
GREY = 124  # grey value of that colour, by ITU-R 601


def tiff(bits: int, content: bytes, *, photometric: int = 1, numbers: int = 1) -> bytes:
    """Return a TIFF with a row of grey pixels. photometric: 0 if white is zero; numbers: 1 unsigned, 2 signed, 3
    floating point."""
    width = 8 * len(content) // bits
    start = 8 + 2 + 10 * 12 + 4
    values = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: start, 277: 1, 278: 1, 279: len(content)}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**values, 339: numbers}.items()]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + content


def png(rows: np.ndarray, colour: int) -> bytes:
    """Return a PNG. rows: [H, W, channels] in 8 or 16 bits. colour: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    big = rows.astype(rows.dtype.newbyteorder(">"))
    head = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 8 * rows.itemsize, colour, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.tobytes() for row in big))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def written(path: Path, image: Image.Image | bytes, **options: Any) -> Path:
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.tif", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.pgm", {}),
        ("a.jp2", {}),
        ("big.tif", {}),
        ("big.tif", {"compression": "tiff_adobe_deflate"}),
    ],
)
def test_16_bits_of_grey_are_scaled(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    image = Image.fromarray(RAMP)
    if name == "big.tif":
        image = Image.frombytes("I;16B", image.size, RAMP.astype(">u2").tobytes())
    path = written(tmp_path / name, image, **options)
    grey = np.asarray(read_image(path, "L"))
    np.testing.assert_array_equal(grey, np.rint(RAMP / 257))
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.repeat(grey[..., None], 3, 2))


def test_12_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", tiff(12, bytes.fromhex("000800fff010")))
    assert np.asarray(read_image(path, "L")).tolist() == [[0, round(0x800 / 4095 * 255), 255, 1]]


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_16_bits_of_colour_or_with_alpha_are_one_level_off_at_most(colour: int, tmp_path: Path) -> None:
    channels = {2: 3, 4: 2, 6: 4}[colour]
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, channels), dtype=np.uint16)
    found = np.asarray(read_image(written(tmp_path / "a.png", png(pixels, colour)))).astype(int)
    assert np.abs(found - (pixels[..., :1] if colour == 4 else pixels[..., :3]) / 257).max() <= 1


@pytest.mark.parametrize(
    ("mode", "name", "away"),
    [
        ("RGB", "a.png", 0),
        ("P", "a.png", 0),
        ("P", "a.tif", 0),
        ("CMYK", "a.tif", 0),
        ("CMYK", "a.jpg", 1),
        ("YCbCr", "a.tif", 1),
        ("LAB", "a.tif", 1),
        ("RGBA", "a.png", 0),
        ("RGBA", "a.tif", 0),
    ],
)
def test_colour_is_read_in_every_mode(mode: str, name: str, away: int, tmp_path: Path) -> None:
    """Also in grey, for nets of one channel. Transparent pixels keep their colours."""
    image = Image.new("RGB", (16, 16), COLOUR)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(0)
    path = written(tmp_path / name, image, quality=100)
    with Image.open(path) as file:
        assert file.mode == mode
    assert np.abs(np.asarray(read_image(path)).astype(int) - COLOUR).max() <= away
    assert np.abs(np.asarray(read_image(path, "L")).astype(int) - GREY).max() <= away


def test_transparency_of_grey_and_of_palettes_is_left_out(tmp_path: Path) -> None:
    grey = written(tmp_path / "grey.png", Image.new("LA", (2, 2), (90, 0)))
    palette = written(tmp_path / "palette.png", Image.new("RGB", (2, 2), COLOUR).quantize(2), transparency=0)
    assert np.asarray(read_image(grey)).tolist() == [[[90] * 3] * 2] * 2
    assert np.asarray(read_image(palette)).tolist() == [[[*COLOUR]] * 2] * 2
    black = written(tmp_path / "black.png", Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert np.asarray(read_image(black, "L")).tolist() == [[0, 255]]
    inverse = written(tmp_path / "inverse.tif", tiff(8, bytes([0, 55]), photometric=0))
    assert np.asarray(read_image(inverse, "L")).tolist() == [[255, 200]]


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_is_ignored(name: str, tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    halves = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 16, 0).repeat(16, 1)).convert("RGB")
    found = np.asarray(read_image(written(tmp_path / name, halves, exif=turned), "L"))
    assert found.shape == (16, 32)
    assert found[:, :12].max() < 40 < 215 < found[:, 20:].min()


def test_the_first_of_several_pictures_is_read(tmp_path: Path) -> None:
    first, second = (Image.new("L", (4, 4), level) for level in (10, 240))
    for name in ("a.png", "a.tif"):
        path = written(tmp_path / name, first, save_all=True, append_images=[second])
        assert set(np.asarray(read_image(path, "L")).flat) == {10}


UNKNOWN_WHITE = {
    "floating point": ("F", tiff(32, np.array([0, 0.5, 1], "<f4").tobytes(), numbers=3)),
    "32 bits": ("I", tiff(32, np.array([0, 70000], "<u4").tobytes())),
    "signed 32 bits": ("I", tiff(32, np.array([-1, 200], "<i4").tobytes(), numbers=2)),
    "signed 16 bits": ("I", tiff(16, np.array([-1, 200], "<i2").tobytes(), numbers=2)),
    "signed 8 bits": ("L", tiff(8, np.array([-1, 100], "i1").tobytes(), numbers=2)),
    "16 bits, white is zero": ("I;16", tiff(16, np.array([0, 65535], "<u2").tobytes(), photometric=0)),
}


@pytest.mark.parametrize("kind", UNKNOWN_WHITE)
def test_what_has_no_certain_white_is_refused(kind: str, tmp_path: Path) -> None:
    mode, content = UNKNOWN_WHITE[kind]
    path = written(tmp_path / "a.tif", content)
    with pytest.raises(ImageError, match=rf"^{path} .*mode {mode} in a TIFF file.* accepted: 8 bits .*; convert it"):
        read_image(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp", "a.bmp", "a.ppm"])
def test_a_truncated_file_is_named(name: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = written(tmp_path / name, Image.fromarray(pixels))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ImageError, match=rf"^{path} is not a readable image .*; fetch it again or remove it$"):
        read_image(path)


def test_whatever_goes_wrong_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.png", Image.new("RGB", (8, 8)))
    for error in (KeyError("tag"), MemoryError()):  # decoders raise any type of exception for damaged files
        with pytest.raises(ImageError, match=rf"^{path} .*(tag|MemoryError)"), opened(path):
            raise error
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ImageError, match=rf"^{path} .*64 pixels"):
        read_image(path)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(
        ImageError, match=r"text\.png is not a readable image .*not in a format that Pillow supports\); fetch"
    ):
        read_image(tmp_path / "text.png")
    with pytest.raises(ImageError, match=r"nothing\.png"):
        read_image(tmp_path / "nothing.png")


@pytest.fixture
def kinds(tmp_path: Path) -> datasets.ImageFolder:
    """Files that decoders read differently, and two that they read alike."""
    place = tmp_path / "class"
    place.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    image, turned = Image.fromarray(pixels[..., :3]), Image.Exif()
    turned[0x0112] = 6
    written(place / "0 jpeg.jpg", image, exif=turned)
    written(place / "1 png.png", image)
    written(place / "2 grey16.png", Image.fromarray(257 * pixels[..., 0].astype(np.uint16)))
    written(place / "3 rgb16.png", png(257 * pixels[..., :3].astype(np.uint16), 2))
    written(place / "4 alpha.png", Image.fromarray(pixels))
    written(place / "5 key.png", image, transparency=tuple(pixels[0, 0, :3].tolist()))
    written(place / "6 rgb.jpg", image, keep_rgb=True)
    written(place / "7 two.png", image.convert("1"))
    return datasets.ImageFolder(str(tmp_path))


def test_every_reader_sees_the_same(kinds: datasets.ImageFolder) -> None:
    """Covers training, DALI's loader, `eval` and `predict`. DALI itself decodes only files that all decoders read
    alike."""
    folder = data.Folder(kinds, v2.Identity())
    coded = dali.Encoded(folder)
    files = Files([(Path(path), label) for path, label in kinds.samples], Views("multiscale"), 3)
    heads = []
    for index, (path, _) in enumerate(kinds.samples):
        expected = np.asarray(read_image(path))
        for found in (folder[index, 0], coded[index, 0], files[index]):
            assert not isinstance(found, data.DataError)
            assert not isinstance(found[0], str)
        np.testing.assert_array_equal(folder[index, 0][0], expected)  # type: ignore[index]
        np.testing.assert_array_equal(files[index][0].permute(1, 2, 0), expected)  # type: ignore[union-attr]
        content = coded[index, 0][1].numpy().tobytes()  # type: ignore[index]
        heads.append(content[:2])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), expected)
    assert heads == [b"\xff\xd8", b"\x89P"] + [b"P6"] * 6
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    np.testing.assert_array_equal(files[2][0], np.repeat(pixels[None, ..., 0], 3, 0))


def test_every_reader_names_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    path = written(tmp_path / "class" / "float.tif", UNKNOWN_WHITE["floating point"][1])
    folder = data.Folder(datasets.ImageFolder(str(tmp_path)), v2.Identity())
    (reason, _) = Files([(path, 0)], Views("multiscale"), 3)[0]
    for said in (folder[0, 0], dali.Encoded(folder)[0, 0], data.ReadError(reason)):
        assert isinstance(said, data.ReadError)
        assert str(said).startswith(f"{path} is not a readable image (mode F in a TIFF file")
