"""The image of a section, read by region."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stexp import InputError

EXIF_ORIENTATION = 0x0112


class Slide:
    """An H&E image, opened when first needed.

    Parameters
    ----------
    path
        Any format Pillow reads (JPEG, PNG, plain TIFF). It is decoded whole: 3 bytes a pixel.

    Raises
    ------
    InputError
        File missing, truncated or not an image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"image {self.path} does not exist")

    @contextmanager
    def _open(self) -> Iterator[Image.Image]:
        try:
            with warnings.catch_warnings():
                # whole slides are larger than what Pillow takes for a decompression bomb
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    image = Image.open(self.path)
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
            if image.mode.startswith(("I", "F")):
                raise InputError(f"image {self.path} has {image.mode} pixels; save it with 8 bits a channel")
            if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
                raise InputError(
                    f"image {self.path} is stored turned (EXIF orientation): it is not clear which way round the spots "
                    f"were measured; save it upright, without the tag"
                )
            with image:
                yield image
        except UnidentifiedImageError:
            raise InputError(f"image {self.path} is not an image that Pillow can read") from None
        except (OSError, SyntaxError, ValueError, struct.error) as error:  # what Pillow's plugins raise
            raise InputError(f"image {self.path} is truncated or damaged: {error}") from None

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height at level 0, from the header alone."""
        with self._open() as image:
            return image.size

    def read(self) -> np.ndarray:
        """The whole image, (height, width, 3) uint8 RGB."""
        with self._open() as image:
            return np.asarray(_on_glass(image))

    def thumbnail(self, max_px: int = 1000) -> tuple[np.ndarray, float]:
        """A reduced image whose longer side is at most `max_px`, and its scale (thumbnail px per level-0 px)."""
        width, height = self.size
        scale = min(1.0, max_px / max(width, height))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        with self._open() as image:
            image.draft("RGB", (max_px, max_px))  # JPEG decodes straight to a smaller size
            small = _on_glass(image)
            if small.size != size:
                small = ImageOps.contain(small, size)
        return np.asarray(small), small.size[0] / width


def _on_glass(image: Image.Image) -> Image.Image:
    """As RGB; what is transparent is white, like the glass around tissue."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
