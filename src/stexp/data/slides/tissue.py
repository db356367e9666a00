"""Where a slide shows tissue, found on a thumbnail."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from stexp.data.slides.slide import Slide
from stexp.data.tile_measures import CELL_UM, GREENEST, INK_GREY, INK_OD
from stexp.errors import InputError

log = logging.getLogger(__name__)

THUMBNAIL_UM, THUMBNAIL_PX = 4.0, 3000  # um/px, and the longest side, whichever is coarser
SLIDE_UM, FINEST_UM = 10_000.0, 0.25  # taken for the longer side of a slide without a scale; no scanner is finer
TEXTURE_UM = 40.0  # side of the squares whose texture is judged: wider than a nucleus and what is around it
TEXTURE = 0.015  # optical density, standard deviation within a square, see `find_tissue`
DENSE = 0.15  # optical density by which green exceeds that of glass
STROKE_UM = 50.0  # narrower than any stroke of a pen
INK_RED = 0.1  # optical density, red over green, all over such a square; the bluest of HER2+ has 0.04
SPECK_MM2, PIECE_MM2, HOLE_MM2 = 0.02, 0.1, 0.02  # what is dust, what is a piece of tissue, what is filled


@dataclass(frozen=True, eq=False)
class Tissue:
    """Where a slide shows tissue.

    Parameters
    ----------
    mask : (height, width) bool
    downsample
        Level-0 pixels per pixel of the mask.
    """

    mask: np.ndarray
    downsample: float

    def share(self, xy_px: np.ndarray, side_px: float) -> np.ndarray:
        """Share of tissue, (N,) 0..1, in squares of `side_px` around `xy_px` (N, 2), both in level-0 pixels.

        What lies beyond the border of the image is no tissue.
        """
        # area of tissue above and left of every corner of the mask; exact between corners too, where it is bilinear
        area = np.pad(self.mask.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
        x, y = np.asarray(xy_px, dtype=np.float64).T / self.downsample
        half = side_px / self.downsample / 2

        def at(y: np.ndarray, x: np.ndarray) -> np.ndarray:
            return ndimage.map_coordinates(area, np.stack([y, x]), order=1, mode="nearest")

        inside = at(y + half, x + half) - at(y - half, x + half) - at(y + half, x - half) + at(y - half, x - half)
        return np.clip(inside / (2 * half) ** 2, 0, 1)


def tissue_mask(slide: Slide, um_per_px: float | None = None) -> Tissue:
    """Find the tissue of a slide on a thumbnail of 4 um/px, 3,000 px at most; see `find_tissue`.

    Parameters
    ----------
    um_per_px
        Micrometres per level-0 pixel; None: what the file says. Where nobody says, the longer side is taken for
        10 mm, or for pixels of 0.25 um where that makes it longer, which is logged.
    """
    width, height = slide.size
    um = um_per_px or slide.um_per_px
    if um is None:
        um = max(SLIDE_UM / max(slide.size), FINEST_UM)
        log.info("image %s: no um/px; tissue is looked for as if it were %.2g", slide.path.name, um)
    image, scale = slide.thumbnail(max(1, min(THUMBNAIL_PX, round(max(width, height) * um / THUMBNAIL_UM))))
    return Tissue(find_tissue(image, um / scale), 1 / scale)


def find_tissue(image: np.ndarray, um_per_px: float) -> np.ndarray:
    """Tissue of a reduced image.

    Parameters
    ----------
    image : (height, width, 3) uint8
    um_per_px
        Micrometres per pixel of `image`; about 4 to 10.

    Returns
    -------
    (height, width) bool

    Notes
    -----
    Tissue is where optical density varies: by `TEXTURE` within 40 um. Glass does not, whatever its tint, and neither
    does eosin that bled into it, on which thresholds of colour fail (on five images of HER2+ and one of mouse colon
    half the glass varies by less than 0.004, nine tenths of the spots by 0.028 and more). Tissue without texture
    counts where green is `DENSE` above glass. Blue, green and black ink is told by colour; other ink, which lets
    tissue be seen through it, is a flag of tiles (`stexp.data.tile_measures.ink`). Pieces below 0.02 mm2 are dust, or
    the frame of a Visium slide, even in numbers; what is left below 0.1 mm2 once holes up to 0.02 mm2 (fat cells) are
    filled is left out too.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"an image must be (height, width, 3) uint8, got {image.shape} {image.dtype}")
    to_density = -np.log10((np.minimum(np.arange(256), 254) + 1) / 255).astype(np.float32)
    side = _odd(TEXTURE_UM, um_per_px)
    density = to_density[image].mean(axis=2)
    mean = ndimage.uniform_filter(density, side)
    density **= 2
    textured = ndimage.uniform_filter(density, side) - mean**2 > TEXTURE**2
    del density, mean
    # a border shows in all squares that reach over it: back to where the middle of the square is
    tissue = ndimage.minimum_filter(textured, _odd(TEXTURE_UM / 2, um_per_px))
    colours = [ndimage.uniform_filter(to_density[image[..., i]], max(1, round(CELL_UM / um_per_px))) for i in range(3)]
    ink = _ink(colours[0], colours[1], colours[2], um_per_px)
    glass = ~textured & ~ink
    if glass.any():
        red, green, blue = (colour - np.median(colour[glass]) for colour in colours)
        tissue |= (green > DENSE) & (green - (red + blue) / 2 > GREENEST)
    tissue &= ~ndimage.maximum_filter(ink, side)
    mm2 = 1e-6 * um_per_px**2
    tissue = _without_small(tissue, SPECK_MM2 / mm2)
    tissue = ~_without_small(~tissue, HOLE_MM2 / mm2)
    return _without_small(tissue & ~ink, PIECE_MM2 / mm2)


def _ink(red: np.ndarray, green: np.ndarray, blue: np.ndarray, um_per_px: float) -> np.ndarray:
    darkest, palest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    ink = (darkest > INK_OD) & (red - green > INK_RED)
    ink |= (palest > 2 * INK_OD) & (darkest - palest < INK_GREY)
    stroke = _odd(STROKE_UM, um_per_px)
    return ndimage.maximum_filter(ndimage.minimum_filter(ink, stroke), stroke)


def _odd(um: float, um_per_px: float) -> int:
    return 2 * max(1, round(um / um_per_px / 2)) + 1 if um_per_px < um else 1


def _without_small(mask: np.ndarray, least_px: float) -> np.ndarray:
    """The mask without connected pieces of fewer pixels."""
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= least_px
    large[0] = False
    return large[labels]
