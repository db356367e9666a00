"""Where on a slide is predicted, and how much of it a tile shows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stexp.data.slides.grid import Grid, make_grid, read_coordinates
from stexp.data.slides.slide import Slide
from stexp.data.slides.stain import measured_tiles
from stexp.data.slides.stream import tile_batches
from stexp.data.slides.tissue import tissue_mask
from stexp.errors import InputError
from stexp.evaluation.predictions import spacing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """N places on a slide.

    Parameters
    ----------
    slide
    um_per_px
        Micrometres per level-0 pixel; None where nobody says.
    side_px
        Side of a tile in level-0 pixels.
    px
        Side of the tile that a method reads.
    grid
        Centres, and where they lie among each other.
    """

    slide: Slide
    um_per_px: float | None
    side_px: int
    px: int
    grid: Grid

    def __len__(self) -> int:
        return len(self.grid.xy_px)

    @property
    def tile_um_per_px(self) -> float | None:
        """Micrometres per pixel of a tile."""
        return self.um_per_px and self.um_per_px * self.side_px / self.px

    @property
    def xy_um(self) -> np.ndarray:
        """Centres in micrometres, (N, 2) float32; NaN where nobody says the scale."""
        return (self.grid.xy_px * (np.nan if self.um_per_px is None else self.um_per_px)).astype(np.float32)

    def sample(self, batch_size: int) -> dict[int, np.ndarray]:
        """Some of the tiles, (px, px, 3) uint8 by row, by which a slide is judged; their colours as they are."""
        rows = measured_tiles(len(self))
        batches = tile_batches(self.slide, self.grid.xy_px[rows], self.side_px, self.px, batch_size)
        tiles = {int(rows[i]): tile for part, several in batches for i, tile in zip(part, several, strict=True)}
        return {row: tiles[row] for row in sorted(tiles)}

    def key(self, *depends_on: Any) -> str:
        """Hash of the places and of further plain values, as the name of a folder."""
        text = json.dumps([*depends_on, self.side_px, self.px, self.um_per_px]).encode()
        return hashlib.sha256(text + self.grid.xy_px.tobytes() + self.grid.array_xy.tobytes()).hexdigest()[:24]


def lay_out(
    slide: Slide,
    tile: Mapping[str, Any],
    um_per_px: float | None,
    kind: str,
    spacing_um: float,
    coordinates: str | Path | np.ndarray | None,
) -> Places:
    """Choose the places of a prediction; see :meth:`stexp.inference.predictor.Model.predict`.

    Parameters
    ----------
    tile
        Of ``model.json``: ``px``, ``um``, ``trained_um_per_px``.

    Raises
    ------
    InputError
        No scale where one is needed, a scale at which a tile is larger than the slide, no tissue, or coordinates that
        do not fit.
    """
    um = _scale(slide, um_per_px, tile, needs_grid=coordinates is None)
    return Places(slide, um, _side_px(slide, um, tile), tile["px"], _grid(slide, um, kind, spacing_um, coordinates))


def _scale(slide: Slide, um_per_px: float | None, tile: Mapping[str, Any], needs_grid: bool) -> float | None:
    is_number = isinstance(um_per_px, int | float) and not isinstance(um_per_px, bool)
    if um_per_px is not None and not (is_number and 0 < um_per_px < np.inf):
        raise InputError(f"um_per_px={um_per_px}: a number above 0 (0.5 for 20x, 0.25 for 40x) would fit")
    stated = slide.um_per_px
    um = stated if um_per_px is None else um_per_px
    if um is None and (needs_grid or tile["um"] is not None or tile["trained_um_per_px"] is not None):
        raise InputError(
            f"slide {slide.path.name} does not say how large its pixels are; give um_per_px= (about 0.5 for 20x, "
            f"0.25 for 40x)"
        )
    if um is not None and stated is not None and max(um, stated) > 1.1 * min(um, stated):
        log.warning(
            "slide %s: um_per_px %.4g was given, the file says %.4g; the given one counts", slide.path.name, um, stated
        )
    return None if um is None else float(um)


def _side_px(slide: Slide, um: float | None, tile: Mapping[str, Any]) -> int:
    """Side of a tile in level-0 pixels of the slide, so that it shows as much tissue as in training."""
    if um is not None and tile["um"] is not None:
        side = tile["um"] / um
    elif um is not None and tile["trained_um_per_px"] is not None:
        side = tile["px"] * tile["trained_um_per_px"] / um
    else:
        side = tile["px"]
        log.warning("nobody said the scale of the training sections: tiles are %d pixels of this slide", side)
    if not 0.5 <= side <= max(slide.size):
        at = "" if um is None else f" at {um:.4g} um/px"
        raise InputError(
            f"slide {slide.path.name}: a tile as in training is {side:.10g} px wide{at}, the image is "
            f"{slide.size[0]} x {slide.size[1]} px; is um_per_px right?"
        )
    return max(1, round(side))


def _grid(
    slide: Slide, um: float | None, kind: str, spacing_um: float, coordinates: str | Path | np.ndarray | None
) -> Grid:
    if coordinates is None:
        assert um is not None  # `_scale` sees to it
        return make_grid(slide, um, kind, spacing_um, tissue_mask(slide, um))
    if isinstance(coordinates, str | Path):
        return read_coordinates(coordinates, slide)
    xy = np.asarray(coordinates, dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2 or not len(xy) or not np.isfinite(xy).all():
        raise InputError(f"coordinates of shape {xy.shape}: rows of x and y in pixels would fit")
    if len(np.unique(xy, axis=0)) < len(xy):
        raise InputError("coordinates hold a place twice")
    pitch = spacing(xy)
    array_xy = np.round((xy - xy.min(axis=0)) / max(pitch, 1.0)).astype(np.int64)
    return Grid(xy, array_xy, None, pitch, "given")
