"""The image of a section, read by region."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from stexp.data.slides.formats import WHITE, PillowImage, check_memory, open_image
from stexp.errors import InputError

log = logging.getLogger(__name__)


class Slide:
    """An H&E image, opened when first needed.

    Parameters
    ----------
    path
        Whole-slide formats and pyramidal TIFF are read by OpenSlide (svs, ndpi, mrxs with its folder, scn, ...),
        other 8-bit TIFF, OME-TIFF with its levels among them, by tifffile, the rest by Pillow (JPEG, PNG, ...).
        Pillow decodes an image whole, up to 4 bytes a pixel; the others read what is asked for.

    Raises
    ------
    InputError
        File missing, damaged, not an image, not 8 bits a channel, or stored turned.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"image {self.path} does not exist")

    def open(self) -> SlideReader:
        """A reader that keeps the file open, for many regions; to be used in a ``with`` statement."""
        return SlideReader(self.path)

    @cached_property
    def _header(self) -> tuple[tuple[int, int], tuple[float, float] | None]:
        with self.open() as reader:
            if reader.note is not None:
                log.warning("%s", reader.note)
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
    note : str or None
        What the owner of the file should know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _said(path):
            self._file = open_image(path)
        self.sizes, self.block = [tuple(size) for size in self._file.sizes], self._file.block
        self.note = self._file.note
        width, height = self.sizes[0]
        self.downsamples = [(width / w + height / h) / 2 for w, h in self.sizes]
        um = self._file.um_xy
        self.um_xy = um if um is not None and all(0.02 <= value <= 20 for value in um) else None

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
            with _said(self.path):
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
        box = [round(value / self.downsamples[level]) for value in (x, y, width, height)]
        pixels = self.read(*box[:2], max(1, box[2]), max(1, box[3]), level)
        size = (max(1, round(width / downsample)), max(1, round(height / downsample)))
        if pixels.shape[1::-1] == size:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))

    def thumbnail(self, size: tuple[int, int]) -> np.ndarray:
        """The whole image at `size` (width, height), in bounded memory; (height, width, 3) uint8."""
        if isinstance(self._file, PillowImage):
            with _said(self.path):
                return self._file.thumbnail(size)
        level = self.level(self.sizes[0][0] / size[0])
        width, height = self.sizes[level]
        factor = max(1, min(width // size[0], height // size[1]))
        block = tuple(max(factor, side // factor * factor) for side in self.block)
        small = np.empty((-(-height // factor), -(-width // factor), 3), dtype=np.uint8)
        for x, y, w, h in _blocks((width, height), block):
            part = np.asarray(Image.fromarray(self.read(x, y, w, h, level)).reduce(factor))
            small[y // factor :, x // factor :][: part.shape[0], : part.shape[1]] = part
        box = (0, 0, width / factor, height / factor)
        return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC, box=box))


def _blocks(size: tuple[int, int], block: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    (width, height), (across, down) = size, block
    for y in range(0, height, down):
        for x in range(0, width, across):
            yield x, y, min(across, width - x), min(down, height - y)


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """What reading a file raises, as one line."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise InputError(f"image {path} is not an image that OpenSlide, tifffile or Pillow can read") from None
    except Exception as error:  # damaged files make the libraries raise anything
        raise InputError(f"image {path} is truncated or damaged: {' '.join(str(error).split())[:200]}") from error
