"""Tiles of an image in memory, cut at once."""

from __future__ import annotations

import numpy as np

from stexp.data.slides.tiles import corners, cut_tile


def cut_tiles(image: np.ndarray, xy_px: np.ndarray, side_px: int, px: int, out: np.ndarray) -> int:
    """Cut the squares around `xy_px` (N, 2) into `out`; returns how many reach beyond the image."""
    corner = corners(xy_px, side_px)
    cut_tile(image, corner, side_px, px, out)
    return int(((corner < 0) | (corner + side_px > image.shape[1::-1])).any(axis=1).sum())
