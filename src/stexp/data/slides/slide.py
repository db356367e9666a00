"""The image of a section, read by region."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from stexp.data.slides.formats import PillowImage, open_image
from stexp.data.slides.ome_zarr import is_zarr
from stexp.data.slides.pixels import WHITE, check_memory
from stexp.data.slides.tiff import STARTS
from stexp.errors import InputError

log = logging.getLogger(__name__)

FINEST_UM, COARSEST_UM = 0.02, 20.0  # a pixel of a slide; 72 dpi, which many programs write, come to 353 um


class Slide:
    """An H&E image, opened when first needed.

    Parameters
    ----------
    path
        ``~`` is the home folder. Whole-slide formats and pyramidal TIFF are read by OpenSlide (svs, ndpi, mrxs with
        its folder, scn, ...), other 8-bit TIFF, OME-TIFF with its levels among them, by tifffile, the folder of an
        OME-Zarr image (``store.zarr/images/name`` of SpatialData) by zarr, the rest by Pillow (JPEG, PNG, ...). Pillow
        decodes an image whole, up to 4 bytes a pixel; the others read what is asked for.

    Raises
    ------
    InputError
        File missing, damaged, not an image, not 8 bits a channel, or stored turned.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        if not self.path.is_file() and not is_zarr(self.path):
            what = "is a folder; name a file in it" if self.path.is_dir() else "does not exist"
            raise InputError(f"image {self.path} {what}")

    def open(self) -> SlideReader:
        """A reader that keeps the file open, for many regions; to be used in a ``with`` statement."""
        return SlideReader(self.path)

    @cached_property
    def _header(self) -> tuple[tuple[int, int], tuple[float, float] | None]:
        with self.open() as reader:
            for note in reader.notes:
                log.warning("%s", note)
            for hint in reader.hints:
                log.info("%s", hint)
            return reader.sizes[0], reader.um_xy

    @property
    def size(self) -> tuple[int, int]:
        """Width and height at level 0, from the header alone."""
        return self._header[0]

    @cached_property
    def um_per_px(self) -> float | None:
        """Micrometres per level-0 pixel as the file states it; None where it does not.

        From the whole-slide header, OME's PhysicalSizeX, or the resolution tags of a TIFF where they come to 0.02
        to 20 um: 72 dpi says nothing of the tissue. The dpi of JPEG and PNG are never taken.
        """
        if self._header[1] is None:
            return None
        x, y = self._header[1]
        if max(x, y) > 1.05 * min(x, y):
            log.warning("image %s: pixels are %.4g um wide and %.4g um high; no um_per_px is taken", self.path, x, y)
            return None
        return (x + y) / 2

    def read(self) -> np.ndarray:
        """The whole image, (height, width, 3) uint8 RGB."""
        with self.open() as reader:
            width, height = reader.sizes[0]
            check_memory(self.path, 3 * width * height)
            image = np.empty((height, width, 3), dtype=np.uint8)
            for x, y, w, h in _blocks(reader.sizes[0], reader.block):
                image[y : y + h, x : x + w] = reader.read(x, y, w, h)
        return image

    def read_region(self, x: int, y: int, width: int, height: int, downsample: float = 1.0) -> np.ndarray:
        """One region; see :meth:`SlideReader.read_region`, and `open` for many."""
        with self.open() as reader:
            return reader.read_region(x, y, width, height, downsample)

    def thumbnail(self, max_px: int = 1000) -> tuple[np.ndarray, float]:
        """A reduced image whose longer side is at most `max_px`, and its scale (thumbnail px per level-0 px)."""
        width, height = self.size
        scale = min(1.0, max_px / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        with self.open() as reader:
            small = reader.thumbnail(size)
        return small, small.shape[1] / width


class SlideReader:
    """An open slide.

    Attributes
    ----------
    sizes : list of (int, int)
        Width and height of every level, level 0 first.
    downsamples : list of float
        Level-0 pixels per pixel of the level.
    um_xy : (float, float) or None
        Micrometres per level-0 pixel across and down, where the file says so.
    block : (int, int)
        Width and height of regions that suit how the file is stored.
    notes, hints : list of str
        What the owner of the file should know; which metadata were ignored, and why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _one_line(path):
            self._file = open_image(path)
        self.sizes, self.block = [tuple(size) for size in self._file.sizes], self._file.block
        self.notes, self.hints = list(self._file.notes), list(self._file.hints)
        width, height = self.sizes[0]
        self.downsamples = [(width / w + height / h) / 2 for w, h in self.sizes]
        self.um_xy = self._file.um_xy
        if self.um_xy is not None and not all(FINEST_UM <= um <= COARSEST_UM for um in self.um_xy):
            numbers = " x ".join("nothing valid" if math.isnan(um) else f"{um:.4g} um" for um in self.um_xy)
            self.hints.append(
                f"image {path}: as the size of its pixels it states {numbers}; ignored, as no scanner has it"
            )
            self.um_xy = None

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def level(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as `downsample`."""
        # sizes of levels are rounded: 4.003 is meant as 4
        fine = [i for i, of_level in enumerate(self.downsamples) if of_level <= 1.002 * downsample]
        return max(fine, key=self.downsamples.__getitem__, default=0)

    def read(self, x: int, y: int, width: int, height: int, level: int = 0) -> np.ndarray:
        """Pixels of a level as they are, (height, width, 3) uint8; all arguments in pixels of that level.

        What lies beyond the border is white.
        """
        right, bottom = self.sizes[level]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom)
        pixels = np.empty((0, 0, 3), np.uint8)
        if x0 < x1 and y0 < y1:
            with _one_line(self.path):
                pixels = self._file.read(level, x0, y0, x1 - x0, y1 - y0)
            if pixels.shape[:2] == (height, width):
                return pixels
        out = np.full((height, width, 3), WHITE, dtype=np.uint8)
        if pixels.size:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels
        return out

    def read_region(self, x: int, y: int, width: int, height: int, downsample: float = 1.0) -> np.ndarray:
        """A rectangle of level 0, reduced.

        Parameters
        ----------
        x, y, width, height
            In level-0 pixels; what lies beyond the border is white.
        downsample
            Level-0 pixels per pixel of the result, > 0. Read from the coarsest level that is fine enough and
            resampled (antialiased bilinear) from there; on a level other than 0 the rectangle is rounded to whole
            pixels of that level.

        Returns
        -------
        (round(height / downsample), round(width / downsample), 3) uint8
        """
        if downsample <= 0:
            raise InputError(f"downsample={downsample}: a number above 0 would fit")
        level = self.level(downsample)
        left, top, across, down = (round(value / self.downsamples[level]) for value in (x, y, width, height))
        pixels = self.read(left, top, max(1, across), max(1, down), level)
        size = (max(1, round(width / downsample)), max(1, round(height / downsample)))
        if pixels.shape[1::-1] == size:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))

    def thumbnail(self, size: tuple[int, int]) -> np.ndarray:
        """The whole image at `size` (width, height), in bounded memory; (height, width, 3) uint8."""
        if isinstance(self._file, PillowImage):
            with _one_line(self.path):
                return self._file.thumbnail(size)
        level = self.level(self.sizes[0][0] / size[0])
        width, height = self.sizes[level]
        factors = [max(1, whole // part) for whole, part in zip((width, height), size, strict=True)]
        across, down = (max(f, side // f * f) for f, side in zip(factors, self.block, strict=True))
        small = np.empty((-(-height // factors[1]), -(-width // factors[0]), 3), dtype=np.uint8)
        for x, y, w, h in _blocks((width, height), (across, down)):
            part = np.asarray(Image.fromarray(self.read(x, y, w, h, level)).reduce(tuple(factors)))
            small[y // factors[1] :, x // factors[0] :][: part.shape[0], : part.shape[1]] = part
        box = (0, 0, width / factors[0], height / factors[1])
        return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC, box=box))


def _blocks(size: tuple[int, int], block: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    (width, height), (across, down) = size, block
    for y in range(0, height, down):
        for x in range(0, width, across):
            yield x, y, min(across, width - x), min(down, height - y)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What reading a file raises, as one line with its cause."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"image {path} does not fit into memory; a tiled TIFF is read by region") from error
    except UnidentifiedImageError:
        raise InputError(
            f"image {path} is not an image that OpenSlide, tifffile or Pillow can read{_what(path)}"
        ) from None
    except Exception as error:  # damaged files make the libraries raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:
            raise InputError(f"image {path} cannot be read: {error.strerror}") from error
        if _is_cut_off(path):
            raise InputError(f"image {path} is truncated, its end is missing: {reason}") from error
        raise InputError(f"image {path} is damaged, or of a kind that is not read{_what(path)}: {reason}") from error


def _what(path: Path) -> str:
    """What a file is instead of an image, where its first bytes tell."""
    if path.is_dir():
        return ""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "; it is empty"
    if start.startswith((b"\0\5\x16\7", b"\0\5\x16\0")):
        return "; it is what macOS keeps beside a file, whose name lacks the ._"
    if start.startswith(b"version https://git-lfs"):
        return "; it is a pointer of Git LFS: fetch the file itself (git lfs pull)"
    if re.match(rb"\s*<(!doctype )?html", start, re.IGNORECASE):
        return "; it is a web page, perhaps one that asks to log in"
    if start.startswith((b"\x1f\x8b", b"PK\3\4")):
        return "; it is compressed: unpack it"
    if not any(start):
        return "; it begins with zeros, as a copy that was not finished"
    return ""


def _is_cut_off(path: Path) -> bool:
    """Whether a TIFF, JPEG or PNG lacks its end; of other formats it is not known."""
    if path.is_dir():
        return False
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        file.seek(max(0, size - 4096))
        end = file.read()
    if start[:4] in STARTS:
        return _last_byte_of_tiff(path) > size
    if start.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in end
    if start.startswith(b"\x89PNG"):
        return b"IEND" not in end
    return False


def _last_byte_of_tiff(path: Path) -> float:
    """Up to where the pixels and pages of a TIFF reach; infinity where not even its pages can be listed."""
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page for page in file.pages for page in (page, *(page.pages or ()))]
            segments = [zip(page.dataoffsets, page.databytecounts, strict=False) for page in pages]
            return max(offset + count for pairs in segments for offset, count in pairs)
    except Exception:  # as above
        return math.inf
