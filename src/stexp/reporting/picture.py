"""Figures that notebooks show as they are returned, without pyplot and its list of open ones."""

from __future__ import annotations

import io
import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke


class Picture(Figure):
    """A matplotlib figure; as the last value of a notebook's cell it is shown, once."""

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def scale_bar(ax: Axes, um_per_px: float | None, low: np.ndarray, high: np.ndarray) -> None:
    """Draw a bar of 1, 2 or 5 x 10^n micrometres, about a fifth of the width; nothing where the scale is unknown.

    Parameters
    ----------
    low, high : (2,)
        Corners of what is shown, in level-0 pixels.
    """
    if um_per_px is None:
        return
    width, height = high - low
    room = 0.25 * width * um_per_px
    power = 10 ** math.floor(math.log10(room))
    length = power * max(step for step in (1, 2, 5) if step * power <= room)
    x, y = low[0] + 0.04 * width, high[1] - 0.04 * height
    line = ax.plot([x, x + length / um_per_px], [y, y], color="black", linewidth=3, solid_capstyle="butt")[0]
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} um"
    label = ax.text(x, y - 0.015 * height, text, va="bottom", ha="left", fontsize=10)
    halo: list[AbstractPathEffect] = [withStroke(linewidth=4, foreground="white")]
    for artist in (line, label):
        artist.set_path_effects(halo)
