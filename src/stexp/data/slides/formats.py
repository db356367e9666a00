"""Which files are slides, and what reads which format: OpenSlide, tifffile, zarr or Pillow."""

from __future__ import annotations

import math
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import openslide
from PIL import Image, ImageOps

from stexp.data.slides import tiff
from stexp.data.slides.ome_zarr import ZarrImage
from stexp.data.slides.pixels import (
    BLOCK_PX,
    ORIENTATION,
    check_memory,
    check_orientation,
    check_size,
    on_glass,
)
from stexp.data.slides.pixels import WHITE as WHITE
from stexp.data.slides.pixels import free_memory as free_memory
from stexp.data.slides.tiff import TiffImage
from stexp.errors import InputError

WHOLE_SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".qptiff")
SUFFIXES = frozenset(
    (*WHOLE_SLIDES, ".tif", ".tiff", ".btf", ".tf2", ".tf8", ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".jp2")
)
"""Endings, in lower case, of what is taken for a slide in a folder; another one is read where it is named itself."""

_LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini"}  # of Windows; that of macOS begins with a dot, but for Icon\r
_PILLOW = ("BMP", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "GIF")  # none that runs a program, as EPS


def is_litter(path: Path) -> bool:
    """Whether a file is hidden, or what macOS (``._x.tif``) and Windows (``Thumbs.db``) leave in folders."""
    return path.name.startswith(".") or path.name.lower() in _LITTER or path.name == "Icon\r"


def slide_files(folder: Path) -> list[Path]:
    """Slides of a folder by the ending of their name, sorted; without litter, and the parts of .vms slides."""
    files = [path for path in sorted(folder.iterdir()) if not is_litter(path) and path.suffix.lower() in SUFFIXES]
    wholes = tuple(path.stem for path in files if path.suffix.lower() in (".vms", ".vmu"))
    return [path for path in files if path.is_file() and not (_is_jpeg(path) and path.name.startswith(wholes or "/"))]


def _is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


def slide_name(path: Path) -> str:
    """The name of a file without its ending, nor the ``.ome`` before it."""
    return re.sub(r"(?i)(?<=.)\.ome$", "", path.stem)


def open_image(path: Path) -> OpenSlideImage | TiffImage | PillowImage | ZarrImage:
    """Open an image with what reads it best.

    Every one has ``sizes`` and ``read(level, x, y, width, height)`` of all levels, ``um_xy`` as the file states it
    (or None), ``block``, the region that suits how the file is stored, ``notes`` for its owner, and ``hints``, which
    say what metadata were ignored.
    """
    if path.is_dir():
        return ZarrImage(path)
    vendor = openslide.OpenSlide.detect_format(path)
    with path.open("rb") as file:
        is_tiff = file.read(4) in tiff.STARTS
    if vendor not in (None, "generic-tiff"):
        return OpenSlideImage(path)
    if not is_tiff:
        return PillowImage(path)
    image = TiffImage(path)
    if image.plain_colours and not (vendor and image.openslide_reads_it):
        return image
    image.close()
    if not image.plain_colours:
        return PillowImage(path)
    faster = OpenSlideImage(path)
    if list(faster.sizes) == image.sizes:
        # OpenSlide takes the scale of the first page, which need not be the largest
        faster.um_xy, faster.notes, faster.hints = image.um_xy, image.notes, image.hints
        return faster
    faster.close()
    return TiffImage(path)


class OpenSlideImage:
    """Whole-slide formats."""

    block = (BLOCK_PX, BLOCK_PX)

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        self.hints: list[str] = []
        self._file = openslide.OpenSlide(path)
        self.sizes = self._file.level_dimensions
        check_size(path, *self.sizes[0], expansion=None)
        for level in range(len(self.sizes)):  # OpenSlide ends the process where it gets no memory for a tile
            sides = [self._file.properties.get(f"openslide.level[{level}].tile-{side}") for side in ("width", "height")]
            check_memory(path, 4 * int(sides[0] or 0) * int(sides[1] or 0))
        stated = [self._file.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        self.um_xy = None if stated == [None, None] else (_float(stated[0]), _float(stated[1]))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        scale = self._file.level_downsamples[level]
        region = self._file.read_region((round(x * scale), round(y * scale)), level, (width, height))
        rgba = np.asarray(region)
        return rgba[..., :3] if (rgba[..., 3] == 255).all() else np.asarray(on_glass(region))

    def close(self) -> None:
        self._file.close()


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def qupath_origin(path: str | Path) -> list[int]:
    """Where QuPath begins to count, in level-0 pixels: the corner of what was scanned, where all its bounds are stated.

    QuPath's OpenSlide reader adds the corner to what it reads whether or not the bounds make the image smaller; one
    of the four that is missing, or no whole number, and there are none.
    """
    if Path(path).is_dir() or openslide.OpenSlide.detect_format(path) is None:
        return [0, 0]
    with openslide.OpenSlide(path) as slide:
        try:
            bounds = [int(slide.properties[f"openslide.bounds-{key}"]) for key in ("x", "y", "width", "height")]
        except (KeyError, ValueError):
            return [0, 0]
    return bounds[:2]


_GLOBALS = threading.Lock()
"""Held while Pillow's limit or the filters of warnings are others: both are those of the whole process."""


class PillowImage:
    """Images that are decoded whole."""

    block = (BLOCK_PX, BLOCK_PX)
    um_xy = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self.notes: list[str] = []
        self.hints: list[str] = []
        with _GLOBALS, warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            # slides are larger than what Pillow takes for a decompression bomb; sizes are checked before decoding
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                self._image = Image.open(path, formats=_PILLOW)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        self.hints += [f"image {path}: {' '.join(str(warning.message).split())}" for warning in heard]
        check_size(path, *self._image.size)
        if self._image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in self._image.tile):
            raise InputError(f"image {path} has {self._image.mode} pixels; save it with 8 bits a channel")
        hint = check_orientation(path, _orientation(self._image))
        self.hints += [hint] if hint else []
        self.sizes = [self._image.size]
        self._loaded = False

    def _load(self) -> Image.Image:
        if not self._loaded:
            width, height = self._image.size
            check_memory(self._path, width * height * (1 if len(self._image.getbands()) == 1 else 4))
            self._image.load()
            check_orientation(self._path, _orientation(self._image))  # PNG may have it behind the pixels
            self._loaded = True
        return self._image

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return np.asarray(on_glass(self._load().crop((x, y, x + width, y + height))))

    def thumbnail(self, size: tuple[int, int]) -> np.ndarray:
        self._image.draft("RGB", size)  # JPEG decodes straight to a smaller size
        small = on_glass(self._load())
        return np.asarray(small if small.size == size else ImageOps.contain(small, size))

    def close(self) -> None:
        self._image.close()


def _orientation(image: Image.Image) -> object:
    """EXIF's orientation as far as the header was read; 1 where there is none, or none that can be parsed."""
    try:
        with _GLOBALS, warnings.catch_warnings():
            warnings.simplefilter("error")  # of EXIF that ends too early
            # that of a PNG decodes the image first, before its size is checked
            return Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # damaged EXIF makes Pillow raise anything
        return "of EXIF that cannot be parsed"
