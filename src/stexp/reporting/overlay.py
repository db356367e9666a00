"""Pictures of spots on their image, in which a flipped or shifted join is seen at once."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from stexp.data.cache import write_whole
from stexp.data.section import Section
from stexp.data.slides.spacing import spacing
from stexp.reporting.picture import Picture, scale_bar

THUMBNAIL_PX, PANEL_INCH = 1400, 6.4
COLUMN, ROW, TILE = "#e6001a", "#111111", "#00a0ff"  # of what is marked


def draw(section: Section, flags: Sequence[str], tile_px: int | None) -> Picture:
    """The image alone, and paled under its spots, which are coloured by the logarithm of their counts.

    The first column and the first row of the array are ringed, one tile is drawn at its true size, and a bar gives
    the scale where it is known. Without an image the spots are drawn where they would be.

    Parameters
    ----------
    flags
        Of each spot; those with any are crossed.
    tile_px
        Side of a tile in level-0 pixels; None: not drawn.
    """
    xy, flagged = section.xy_px, np.array([bool(flag) for flag in flags])
    diameter = 0.55 * spacing(xy)  # about that of the spots of ST and of Visium
    if section.slide is None:
        picture, (low, high) = None, (xy.min(axis=0) - 2 * diameter, xy.max(axis=0) + 2 * diameter)
    else:
        picture = section.slide.thumbnail(THUMBNAIL_PX)[0]
        low, high = np.zeros(2), np.array(section.slide.size, dtype=float)
    width, height = high - low
    panels = 1 if picture is None else 2
    size = (PANEL_INCH * panels + 1.2, max(3.0, PANEL_INCH * min(height / width, 2.0)) + 1.2)
    figure = Picture(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for ax in axes:
        ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])
        if picture is not None:
            faint = 1.0 if ax is axes[0] else 0.45
            ax.imshow(picture, extent=(0, width, height, 0), alpha=faint, interpolation="antialiased")
    marked = axes[-1]
    drawn = EllipseCollection(
        *(np.full(len(xy), diameter),) * 2,
        np.zeros(len(xy)),
        units="xy",
        offsets=xy,
        offset_transform=marked.transData,
        array=np.log10(1 + section.total_counts),
        cmap="viridis",
        linewidth=0,
    )
    marked.add_collection(drawn)
    handles = _marks(marked, section, flagged, diameter, tile_px)
    scale_bar(axes[0], section.um_per_px, low, high)
    figure.colorbar(drawn, ax=marked, label="log10(1 + counts)", shrink=0.6, aspect=30)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    scale = "scale unknown" if section.um_per_px is None else f"{section.um_per_px:.3g} um/px"
    extent = "no image" if picture is None else f"{width:.0f} x {height:.0f} px"
    figure.suptitle(f"{section.name}, patient {section.patient}: {len(section)} spots, {extent}, {scale}", fontsize=11)
    return figure


def _marks(ax: Axes, section: Section, flagged: np.ndarray, diameter: float, tile_px: int | None) -> list[Line2D]:
    xy, handles = section.xy_px, []
    for axis, colour, what in ((0, COLUMN, "column (array_x"), (1, ROW, "row (array_y")):
        least = section.array_xy[:, axis].min()
        first = section.array_xy[:, axis] == least
        size = np.full(first.sum(), 1.25 * diameter)
        rings = EllipseCollection(
            size, size, np.zeros(len(size)), units="xy", offsets=xy[first], offset_transform=ax.transData
        )
        rings.set(facecolor="none", edgecolor=colour, linewidth=1.2)
        ax.add_collection(rings)
        ring: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.6}
        handles.append(Line2D([], [], color=colour, label=f"first array {what} = {least})", **ring))
    if tile_px is not None and section.slide is not None:
        middle = xy[np.linalg.norm(xy - np.median(xy, axis=0), axis=1).argmin()]
        square = Rectangle(middle - tile_px / 2, tile_px, tile_px, facecolor="none", edgecolor=TILE, linewidth=1.6)
        ax.add_patch(square)
        um = "" if section.um_per_px is None else f", {tile_px * section.um_per_px:.0f} um"
        box: dict[str, Any] = {"marker": "s", "linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.6}
        handles.append(Line2D([], [], color=TILE, label=f"one tile ({tile_px} px{um})", **box))
    if flagged.any():
        low, high = ax.get_xlim()
        cross = float(np.clip(0.8 * 72 * PANEL_INCH * diameter / (high - low), 2, 6))  # in points
        ax.plot(*xy[flagged].T, "x", color="white", markersize=cross + 1, markeredgewidth=2.4)
        ax.plot(*xy[flagged].T, "x", color=COLUMN, markersize=cross, markeredgewidth=1.0)
        handles.append(Line2D([], [], marker="x", linestyle="", color=COLUMN, label=f"flagged ({flagged.sum()})"))
    return handles


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    buffer = io.BytesIO()
    # a third of the time of the default, for an eighth more bytes
    figure.savefig(buffer, format="png", pil_kwargs={"compress_level": 1})
    write_whole(path, buffer.getvalue())


def sheet(pictures: Sequence[Path], path: Path, width_px: int = 2400) -> None:
    """The pictures side by side, reduced, on one page."""
    columns = math.ceil(math.sqrt(len(pictures) / 1.5))
    side = width_px // columns
    reduced = []
    for picture in pictures:
        with Image.open(picture) as image:
            image.thumbnail((side, side))
            reduced.append(image.convert("RGB"))
    rows = [reduced[start : start + columns] for start in range(0, len(reduced), columns)]
    heights = [max(image.height for image in row) for row in rows]
    page = Image.new("RGB", (side * min(columns, len(reduced)), sum(heights)), "white")
    for row, top in zip(rows, np.cumsum([0, *heights]), strict=False):
        for i, small in enumerate(row):
            page.paste(small, (i * side, int(top)))
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())
