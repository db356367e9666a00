"""TIFF of 8 bits a channel, read by region with tifffile."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from stexp.data.slides import pixels
from stexp.data.slides.pixels import ORIENTATION, WHITE, check_memory, check_orientation, check_size, on_glass
from stexp.errors import InputError

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG = 7
_SPARSE = 10_000  # decoded bytes a byte of file: glass may be left out
_UM = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}  # micro sign, Greek mu
_COLOURS = {-16776961: 0, 16711935: 1, 65535: 2}  # OME's signed RGBA of pure red, green, blue -> place


class TiffImage:
    """TIFF of strips or tiles, of one page or a pyramid, OME or not.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    levels : list of list of TiffPage
        Pages of every level, largest first: one, or one a channel.
    sizes : list of (int, int)
        Width and height of every level.
    um_xy : (float, float) or None
        Micrometres per pixel of the first level as stated, plausible or not.
    block : (int, int)
        Width and height of regions that suit how the file is stored.
    plain_colours : bool
        Whether `read` can read it: grey, RGB or YCbCr in JPEG, with or without alpha.
    openslide_reads_it : bool
        Whether OpenSlide shows the same, faster.
    notes, hints : list of str
        What its owner should know; metadata that were ignored.

    Raises
    ------
    InputError
        More than 8 bits a channel, channels that no H&E image has, or a header that its pixels contradict.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.hints: list[str] = []
        self._file = tifffile.TiffFile(path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise
        self._last: tuple[tuple[int, int] | None, np.ndarray | None] = (None, None)

    def _read_header(self) -> None:
        self.levels, n_others = self._ome_levels() if self._file.is_ome else self._plain_levels()
        page = self.levels[0][0].keyframe
        self._check_pixels(page)
        hint = check_orientation(self.path, self._file.pages[0].aspage().tags.valueof(ORIENTATION, 1))
        self.hints += [hint] if hint else []
        self.um_xy = self._um_of_ome() if self._file.is_ome else self._um_of_tags(page)
        if n_others:
            self.notes.append(
                f"image {self.path} holds {n_others} more image(s), which are no reduced copies of the first; the "
                f"first is used ({page.imagewidth} x {page.imagelength} px)"
            )
        bits = np.unique(page.bitspersample)
        # palettes, CMYK, bilevel: Pillow knows them
        self.plain_colours = bits.min() == 8 and (
            page.photometric in (1, 2) or (page.photometric == 6 and page.compression == _JPEG)
        )
        if not self.plain_colours and page.index != 0:
            raise InputError(
                f"image {self.path}: its largest level is page {page.index + 1}; save it as RGB, that first"
            )
        self.sizes = [(pages[0].keyframe.imagewidth, pages[0].keyframe.imagelength) for pages in self.levels]
        for pages in self.levels:
            self._check_segments(pages[0].keyframe)
        self.openslide_reads_it = (
            len(self.levels) > 1
            and not (self._file.is_ome or page.pages or page.extrasamples)
            and page.planarconfig == 1
            and page.compression in (1, 5, 7, 8)  # none, LZW, JPEG, deflate
        )
        width = self.sizes[0][0]
        by_row = not page.is_tiled and not page.is_final
        self.block = (width, max(1, pixels.STRIP_BYTES // (3 * width))) if by_row else (pixels.BLOCK_PX,) * 2

    def _plain_levels(self) -> tuple[list[list], int]:
        """Levels by size, whatever their order in the file, and how many pages are other images."""
        pages = [page.aspage() for page in self._file.pages]
        first = pages[0]
        reduced = [*(first.pages or []), *(page for page in pages[1:] if page.is_reduced or first.is_reduced)]
        by_width = {page.imagewidth: page for page in reversed([first, *(p for p in reduced if _is_level(p, first))])}
        levels = sorted(by_width.values(), key=lambda page: -page.imagewidth)
        if levels[0] is not first:
            self.notes.append(
                f"image {self.path}: its levels are not in order; the largest is taken for the image "
                f"({levels[0].imagewidth} x {levels[0].imagelength} px)"
            )
        others = sum(not page.is_reduced for page in pages if page not in levels)
        grey = [page for page in pages if page.samplesperpixel == 1 and page.shape == first.shape]
        planes = 1
        if self._file.is_imagej or self._file.is_shaped:
            series = self._file.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
            planes = math.prod(size for axis, size in sizes.items() if axis not in "YXS")
            if sizes.get("C") == planes == len(grey) == 3 and first.samplesperpixel == 1:
                return [grey], 0
        if first.samplesperpixel == 1 and max(planes, len(grey)) > 1:
            raise InputError(
                f"image {self.path} holds {max(planes, len(grey))} grey images of one size (channels, or a stack); "
                f"save it as one image of RGB"
            )
        return [[page] for page in levels], others

    def _ome_levels(self) -> tuple[list[list], int]:
        series = self._file.series[0]
        sizes = dict(zip(series.axes, series.shape, strict=True))
        channels = sizes.get("C", 1) * sizes.get("S", 1)
        if set(sizes) - set("CSYX") or channels not in (1, 3, 4) or sizes.get("C") == 4:
            shape = " x ".join(f"{size} {axis}" for axis, size in sizes.items())
            raise InputError(
                f"image {self.path} is an OME-TIFF of {shape}; an image of H&E has one plane of 3 channels"
            )
        order = self._ome_colours() if sizes.get("C") == 3 else None
        planes = [list(level.pages) for level in series.levels]
        # Any: the keyframe of a page of a series is never None, which its annotation allows
        levels: list[list[Any]] = [[page for page in level if page is not None] for level in planes]
        if list(map(len, levels)) != list(map(len, planes)):
            raise InputError(f"image {self.path}: its OME metadata name planes that the file does not hold")
        first = levels[0][0].keyframe
        if any(level[0].keyframe.imagewidth > first.imagewidth for level in levels):
            raise InputError(
                f"image {self.path}: its sub-resolutions are larger than the image they are said to reduce"
            )
        levels = [level for level in levels if level is levels[0] or _is_level(level[0].keyframe, first)]
        levels.sort(key=lambda level: -level[0].keyframe.imagewidth)
        if order is not None:
            levels = [[level[i] for i in order] for level in levels]
        return levels, len(self._file.series) - 1

    def _ome_colours(self) -> list[int] | None:
        """Which channels are red, green and blue; None where nothing is said: they are in this order."""
        pixels_of = next(_elements(self._file.ome_metadata, "Pixels"), None)
        channels = [] if pixels_of is None else [c.get("Color") for c in pixels_of if c.tag.endswith("}Channel")]
        if not any(channels):
            return None
        try:
            places = [_COLOURS[int(colour)] for colour in channels]
            return [places.index(i) for i in range(3)]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"image {self.path} is an OME-TIFF whose channels are not red, green and blue ({channels}): is it "
                f"fluorescence? an image of H&E would fit"
            ) from None

    def _check_pixels(self, page: tifffile.TiffPage) -> None:
        bits = int(np.max(page.bitspersample))
        if bits > 8:
            raise InputError(f"image {self.path} has {bits} bits a channel; save it with 8 bits a channel")
        if page.sampleformat != 1:
            raise InputError(f"image {self.path} has signed or real pixels; save it with 8 bits a channel, unsigned")
        samples = page.samplesperpixel
        if samples > 4 or (samples == 2 and not page.extrasamples):
            raise InputError(f"image {self.path} has {samples} channels; an image of H&E has 3")

    def _check_segments(self, page: tifffile.TiffPage) -> None:
        """Refuse sizes that cannot be, and strips or tiles that are not those of the size stated."""
        check_size(self.path, page.imagewidth, page.imagelength, _SPARSE)
        across, down = _segment_size(page)
        n = -(-page.imagewidth // across) * -(-page.imagelength // down)
        n *= page.samplesperpixel if page.planarconfig == 2 else 1
        offsets, counts = page.dataoffsets, page.databytecounts
        kind = "tiles" if page.is_tiled else "strips"
        stated = f"image {self.path} says that it has {page.imagewidth} x {page.imagelength} px"
        if page.is_final and not page.is_tiled:  # tifffile joins strips that follow each other
            n = 1
        if len(offsets) < n or (page.planarconfig == 1 and len(offsets) == n * page.samplesperpixel > n):
            raise InputError(f"{stated} in {n} {kind}, it has {len(offsets)}: its header contradicts its pixels")
        need = page.imagewidth * page.imagelength * page.samplesperpixel * int(np.min(page.bitspersample)) // 8
        if page.compression == 1 and not page.is_tiled and sum(counts) < need:
            raise InputError(f"{stated}, {need:,} bytes, and holds {sum(counts):,}: its header contradicts its pixels")
        if self.plain_colours and not (page.is_final and not page.is_tiled):
            check_memory(self.path, across * down * (1 if page.planarconfig == 2 else page.samplesperpixel))

    def _um_of_ome(self) -> tuple[float, float] | None:
        for pixels_of in _elements(self._file.ome_metadata, "Pixels"):
            sizes = [pixels_of.get(f"PhysicalSize{axis}") for axis in "XY"]
            if sizes == [None, None]:
                return None
            try:
                x, y = (
                    float(size or "") * _UM.get(pixels_of.get(f"PhysicalSize{axis}Unit", "um"), math.nan)
                    for axis, size in zip("XY", sizes, strict=True)
                )
            except ValueError:
                x = y = math.nan
            return x, y
        return None

    def _um_of_tags(self, page: tifffile.TiffPage) -> tuple[float, float] | None:
        unit = page.tags.valueof(296, 2)  # inch, which is the default, cm, or 1 for none
        stated = [page.tags.valueof(code) for code in (282, 283)]
        if unit == 1 or None in stated:
            return None
        um = {2: 25400.0, 3: 10000.0}.get(unit, math.nan) if isinstance(unit, int) else math.nan
        x, y = (um / number if (number := _number(value)) else math.nan for value in stated)
        return x, y

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        pages = self.levels[level]
        samples = np.concatenate([self._read_page(page, x, y, width, height) for page in pages], axis=2)
        colours = 3 if samples.shape[2] >= 3 else 1
        colour, alpha = samples[..., :colours], samples[..., colours:]
        if colours == 1:
            colour = np.repeat(colour, 3, axis=2)
        kind = pages[0].keyframe.extrasamples[:1]
        if kind == (1,):  # colours are multiplied by alpha already
            colour = np.minimum(colour.astype(np.uint16) + (255 - alpha), 255).astype(np.uint8)
        elif kind == (2,):
            colour = np.asarray(on_glass(Image.fromarray(np.concatenate([colour, alpha], axis=2))))
        return colour

    def _read_page(self, page, x: int, y: int, width: int, height: int) -> np.ndarray:
        key = page.keyframe  # what pages of a series share
        if page.is_final and not key.is_tiled:
            # mapped anew each time: pages of a map that stays would count as memory of this process
            mapped = np.memmap(self.path, np.uint8, "r", offset=page.dataoffsets[0], shape=tuple(key.shaped))
            part = mapped[:, 0, y : y + height, x : x + width]
            return np.ascontiguousarray(part.transpose(1, 2, 0, 3)).reshape(height, width, -1)
        across, down = _segment_size(key)
        columns, rows = -(-key.imagewidth // across), -(-key.imagelength // down)
        separate = key.planarconfig == 2
        out = np.full((height, width, key.samplesperpixel), WHITE, dtype=np.uint8)
        for plane in range(key.samplesperpixel if separate else 1):
            target = out[..., plane : plane + 1] if separate else out
            for row in range(y // down, -(-(y + height) // down)):
                for column in range(x // across, -(-(x + width) // across)):
                    segment = self._segment(page, (plane * rows + row) * columns + column)
                    if segment is None:  # never written
                        continue
                    top, left = row * down - y, column * across - x
                    part = segment[max(0, -top) : height - top, max(0, -left) : width - left]
                    target[max(0, top) :, max(0, left) :][: part.shape[0], : part.shape[1]] = part
        return out

    def _segment(self, page, index: int) -> np.ndarray | None:
        """A decoded strip or tile; the last one is kept, since strips may be as large as the image."""
        offset, length = page.dataoffsets[index], page.databytecounts[index]
        if self._last[0] == (offset, index):
            return self._last[1]
        if length == 0:
            return None
        self._file.filehandle.seek(offset)
        data = self._file.filehandle.read(length)
        if len(data) != length:
            raise EOFError("it ends before its last pixels")
        segment = page.keyframe.decode(data, index, jpegtables=page.jpegtables)[0][0]
        self._last = ((offset, index), segment)
        return segment

    def close(self) -> None:
        self._file.close()


def _is_level(page, first) -> bool:
    """Whether one of both pages can be the other one reduced."""
    small, large = sorted((page, first), key=lambda p: p.imagewidth)
    fits = abs(small.imagelength - large.imagelength * small.imagewidth / large.imagewidth) <= 1
    return fits and page.samplesperpixel == first.samplesperpixel and page.bitspersample == first.bitspersample


def _segment_size(page) -> tuple[int, int]:
    """Width and height of a tile, or of a strip."""
    if page.is_tiled:
        return page.tilewidth, page.tilelength
    return page.imagewidth, min(page.rowsperstrip, page.imagelength)


def _elements(xml: str | None, name: str):
    """Elements of OME's XML by their local name; none where it cannot be parsed."""
    try:
        root = ElementTree.fromstring(xml or "")
    except ElementTree.ParseError:
        return
    for element in root.iter():
        if element.tag.rpartition("}")[2] == name:
            yield element


def _number(value: object) -> float:
    """A rational (numerator, denominator) or plain number of a tag; 0 for anything else."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, int) for part in value):
        return value[0] / value[1] if value[1] else 0.0
    return float(value) if isinstance(value, int | float) else 0.0
