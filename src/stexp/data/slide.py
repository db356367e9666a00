"""The image of a section, read by region."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stexp import InputError


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

    def _open(self) -> Image.Image:
        try:
            with warnings.catch_warnings():
                # whole slides are larger than what Pillow takes for a decompression bomb
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    return Image.open(self.path)
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
        except UnidentifiedImageError:
            raise InputError(f"image {self.path} is not an image that Pillow can read") from None

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height at level 0, from the header alone."""
        with self._open() as image:
            return image.size

    def read(self) -> np.ndarray:
        """The whole image, (height, width, 3) uint8 RGB."""
        try:
            with self._open() as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise InputError(f"image {self.path} is truncated or damaged: {error}") from None

    def thumbnail(self, max_px: int = 1000) -> tuple[np.ndarray, float]:
        """A reduced image whose longer side is at most `max_px`, and its scale (thumbnail px per level-0 px)."""
        scale = min(1.0, max_px / max(self.size))
        try:
            with self._open() as image:
                image.draft("RGB", (max_px, max_px))  # JPEG decodes straight to a smaller size
                size = tuple(max(1, round(side * scale)) for side in self.size)
                small = ImageOps.contain(image.convert("RGB"), size) if image.size != size else image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise InputError(f"image {self.path} is truncated or damaged: {error}") from None
        return np.asarray(small), small.size[0] / self.size[0]
