"""What reads which image format: OpenSlide, tifffile or Pillow."""

from __future__ import annotations

import os
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image, ImageOps

from stexp.errors import InputError

WHITE = 255  # glass: what lies beyond the border, and what is transparent
BLOCK_PX = 1024  # side of the regions that long reads are made of
STRIP_BYTES = 96 << 20  # the same where a file can only be read in full rows
_ORIENTATION = 0x0112
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG = 7
_UM = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}  # micro sign, Greek mu


def open_image(path: Path) -> OpenSlideImage | TiffImage | PillowImage:
    """Open an image with what reads it best.

    Every one has ``sizes`` and ``read(level, x, y, width, height)`` of all levels, ``um_xy`` as the file states it
    (or None), ``block``, the region that suits how the file is stored, and ``note``, what its owner should know.
    """
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor not in (None, "generic-tiff"):
        return OpenSlideImage(path)
    with path.open("rb") as file:
        is_tiff = file.read(4) in _TIFF_STARTS
    if not is_tiff:
        return PillowImage(path)
    tiff = TiffImage(path)
    if tiff.plain_colours and not (vendor and tiff.openslide_reads_it):
        return tiff
    tiff.close()
    return OpenSlideImage(path) if tiff.plain_colours else PillowImage(path)


class OpenSlideImage:
    """Whole-slide formats."""

    note = None
    block = (BLOCK_PX, BLOCK_PX)

    def __init__(self, path: Path) -> None:
        self._file = openslide.OpenSlide(path)
        self.sizes = self._file.level_dimensions
        um = [self._file.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        self.um_xy = None if None in um else (float(um[0]), float(um[1]))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        scale = self._file.level_downsamples[level]
        region = self._file.read_region((round(x * scale), round(y * scale)), level, (width, height))
        pixels = np.asarray(region)
        return pixels[..., :3] if (pixels[..., 3] == 255).all() else np.asarray(_on_glass(region))

    def close(self) -> None:
        self._file.close()


class TiffImage:
    """TIFF of 8 bits a channel: strips or tiles, one page or a pyramid, OME or not."""

    note: str | None = None

    def __init__(self, path: Path) -> None:
        self._file = tifffile.TiffFile(path)
        try:
            self._read_header(path)
        except BaseException:
            self.close()
            raise
        self._last: tuple[tuple[int, int] | None, np.ndarray | None] = (None, None)

    def _read_header(self, path: Path) -> None:
        first = self._file.pages[0]
        bits = np.unique(first.bitspersample)
        if bits.max() > 8 or first.sampleformat != 1:
            raise InputError(f"image {path} has {bits.max()} bits a channel; save it with 8 bits a channel")
        _refuse_turned(path, first.tags.valueof(_ORIENTATION, 1))
        self.um_xy = _um_of_tags(first)
        # palettes, CMYK, bilevel: Pillow knows them
        self.plain_colours = bits.min() == 8 and (
            first.photometric in (1, 2) or (first.photometric == 6 and first.compression == _JPEG)
        )
        if self._file.is_ome:
            self.levels = _ome_levels(self._file.series[0], path)
            self.um_xy = _um_of_ome(self._file.ome_metadata)
            n_others = len(self._file.series) - 1
        else:
            reduced = [*(first.pages or []), *(page for page in self._file.pages[1:] if page.is_reduced)]
            pyramid = [page for page in reduced if _is_level(page, first)]
            self.levels = [[page] for page in [first, *sorted(pyramid, key=lambda page: -page.imagewidth)]]
            n_others = sum(not page.is_reduced for page in self._file.pages[1:])
        if n_others:
            self.note = (
                f"image {path} holds {n_others} more image(s), which are no reduced copies of the first; the first "
                f"is used ({first.imagewidth} x {first.imagelength} px)"
            )
        self.sizes = [(pages[0].keyframe.imagewidth, pages[0].keyframe.imagelength) for pages in self.levels]
        self.openslide_reads_it = (
            len(self.levels) > 1
            and not (self._file.is_ome or first.pages or first.extrasamples)
            and first.compression in (1, 5, 7, 8)  # none, LZW, JPEG, deflate
        )
        samples = first.samplesperpixel
        if samples - 3 > 1 or (samples == 2 and not first.extrasamples):
            raise InputError(f"image {path} has {samples} channels; an image of H&E has 3")
        width = self.sizes[0][0]
        by_row = not first.is_tiled and not first.is_final
        self.block = (width, max(1, STRIP_BYTES // (3 * width))) if by_row else (BLOCK_PX, BLOCK_PX)
        if by_row and self.plain_colours:
            check_memory(path, width * min(first.rowsperstrip, first.imagelength) * samples)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        pages = self.levels[level]
        pixels = np.concatenate([self._read_page(page, x, y, width, height) for page in pages], axis=2)
        colours = 3 if pixels.shape[2] >= 3 else 1
        colour, alpha = pixels[..., :colours], pixels[..., colours:]
        if colours == 1:
            colour = np.repeat(colour, 3, axis=2)
        kind = pages[0].keyframe.extrasamples[:1]
        if kind == (1,):  # colours are multiplied by alpha already
            colour = np.minimum(colour.astype(np.uint16) + (255 - alpha), 255).astype(np.uint8)
        elif kind == (2,):
            colour = np.asarray(_on_glass(Image.fromarray(np.concatenate([colour, alpha], axis=2))))
        return colour

    def _read_page(self, page, x: int, y: int, width: int, height: int) -> np.ndarray:
        key = page.keyframe  # what pages of a series share
        if page.is_final and not key.is_tiled:
            # mapped anew each time: pages of a map that stays would count as memory of this process
            mapped = np.memmap(
                self._file.filehandle.path, np.uint8, "r", offset=page.dataoffsets[0], shape=tuple(key.shaped)
            )
            part = mapped[:, 0, y : y + height, x : x + width]
            return np.ascontiguousarray(part.transpose(1, 2, 0, 3)).reshape(height, width, -1)
        if key.is_tiled:
            across, down = key.tilewidth, key.tilelength
        else:
            across, down = key.imagewidth, min(key.rowsperstrip, key.imagelength)
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
    fits = abs(page.imagelength - first.imagelength * page.imagewidth / first.imagewidth) <= 1
    return fits and page.samplesperpixel == first.samplesperpixel and page.bitspersample == first.bitspersample


def _ome_levels(series, path: Path) -> list[list]:
    """The pages of every level: one, or one a channel."""
    sizes = dict(zip(series.axes, series.shape, strict=True))
    channels = sizes.get("C", 1) * sizes.get("S", 1)
    if set(sizes) - set("CSYX") or channels not in (1, 3, 4) or sizes.get("C") == 4:
        shape = " x ".join(f"{size} {axis}" for axis, size in sizes.items())
        raise InputError(f"image {path} is an OME-TIFF of {shape}; an image of H&E has one plane of 3 channels")
    return [list(level.pages) for level in series.levels]


def _um_of_ome(xml: str) -> tuple[float, float] | None:
    for pixels in ElementTree.fromstring(xml).iter():
        if pixels.tag.rpartition("}")[2] == "Pixels":
            um = [
                float(pixels.get(f"PhysicalSize{axis}", "nan"))
                * _UM.get(pixels.get(f"PhysicalSize{axis}Unit", "um"), 0)
                for axis in "XY"
            ]
            return (um[0], um[1]) if um[0] > 0 and um[1] > 0 else None
    return None


def _um_of_tags(page) -> tuple[float, float] | None:
    unit = {2: 25400.0, 3: 10000.0}.get(page.tags.valueof(296, 2))  # inch, which is the default, or cm
    resolution = [page.tags.valueof(code) for code in (282, 283)]
    if unit is None or None in resolution or 0 in (number for pair in resolution for number in pair):
        return None
    (x, per_x), (y, per_y) = resolution
    return unit * per_x / x, unit * per_y / y


class PillowImage:
    """Images that are decoded whole."""

    note = None
    block = (BLOCK_PX, BLOCK_PX)
    um_xy = None

    def __init__(self, path: Path) -> None:
        self._path = path
        with warnings.catch_warnings():
            # slides are larger than what Pillow takes for a decompression bomb; memory is checked before decoding
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                self._image = Image.open(path)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        if self._image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in self._image.tile):
            raise InputError(f"image {path} has {self._image.mode} pixels; save it with 8 bits a channel")
        _refuse_turned(path, self._image.getexif().get(_ORIENTATION, 1))
        self.sizes = [self._image.size]
        self._loaded = False

    def _load(self) -> Image.Image:
        if not self._loaded:
            width, height = self._image.size
            check_memory(self._path, width * height * (1 if len(self._image.getbands()) == 1 else 4))
            self._image.load()
            self._loaded = True
        return self._image

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return np.asarray(_on_glass(self._load().crop((x, y, x + width, y + height))))

    def thumbnail(self, size: tuple[int, int]) -> np.ndarray:
        self._image.draft("RGB", size)  # JPEG decodes straight to a smaller size
        small = _on_glass(self._load())
        return np.asarray(small if small.size == size else ImageOps.contain(small, size))

    def close(self) -> None:
        self._image.close()


def _refuse_turned(path: Path, orientation: int) -> None:
    if orientation != 1:
        raise InputError(
            f"image {path} is stored turned (EXIF orientation): it is not clear which way round the spots were "
            f"measured; save it upright, without the tag"
        )


def _on_glass(image: Image.Image) -> Image.Image:
    """As RGB; what is transparent is white, like the glass around tissue."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_memory(path: Path, need: int) -> None:
    """Refuse what would not fit into the memory that is free."""
    free = free_memory()
    if free is not None and need > free:
        raise InputError(
            f"image {path} decoded whole needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            f"a tiled TIFF is read by region"
        )


def free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # macOS, Windows
        return None
