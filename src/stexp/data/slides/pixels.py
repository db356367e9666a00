"""What every reader of images keeps to: glass, orientation, plausible sizes, memory that is free."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from stexp.errors import InputError

WHITE = 255  # glass: what lies beyond the border, and what is transparent
BLOCK_PX = 1024  # side of the regions that long reads are made of
STRIP_BYTES = 96 << 20  # the same where a file can only be read in full rows
ORIENTATION = 0x0112  # tag of TIFF and EXIF
MAX_SIDE_PX = 1_000_000  # 75 mm of a microscope slide at 0.1 um are 750,000
MAX_PX = 250_000_000_000
BOMB_BYTES, EXPANSION = 256 << 20, 2_000  # decoded bytes a byte of file: deflate makes 1,032 at most, tissue 10 to 50


def check_size(path: Path, width: int, height: int, expansion: int | None = EXPANSION) -> None:
    """Refuse dimensions that no slide has, or that a file is too small to hold, before anything is allocated.

    Parameters
    ----------
    expansion
        Decoded bytes that a byte of the file may stand for; None: the pixels are in other files.
    """
    if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX and width * height <= MAX_PX):
        raise InputError(f"image {path} says that it has {width} x {height} px, which no slide has")
    n_bytes = path.stat().st_size
    if expansion is not None and 3 * width * height > max(BOMB_BYTES, expansion * n_bytes):
        raise InputError(
            f"image {path} says that it has {width} x {height} px in {n_bytes:,} bytes, which cannot hold them "
            f"(a decompression bomb?)"
        )


def check_memory(path: Path, need: int) -> None:
    """Refuse what would not fit into the memory that is free."""
    free = free_memory()
    if free is not None and need > free:
        raise InputError(
            f"image {path} decoded whole needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            f"a tiled TIFF is read by region"
        )


def free_memory() -> int | None:
    """Bytes that could be allocated; on macOS those of the machine; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):  # macOS lacks the first, Windows all
            continue
    return None


def check_orientation(path: Path, value: object) -> str | None:
    """Refuse an image that is stored turned (EXIF 2 to 8); of a value that EXIF does not define, say so."""
    if value in range(2, 9):
        raise InputError(
            f"image {path} is stored turned (EXIF orientation {value}): it is not clear which way round the spots "
            f"were measured; save it upright, without the tag"
        )
    if value == 1:
        return None
    return f"image {path} states the orientation {value!r}, which EXIF does not define; it is read as it is stored"


def on_glass(image: Image.Image) -> Image.Image:
    """As RGB; what is transparent is white, like the glass around tissue."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
