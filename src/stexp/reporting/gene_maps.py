"""Maps of genes on their sections as figures: predicted, and observed where it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection

from stexp.evaluation.metrics import pearson_per_gene
from stexp.reporting.picture import Picture, scale_bar
from stexp.reporting.places import Place, places

PANEL_INCH, MOST_TALL = 3.0, 1.6
ABREAST = 4
CLIPPED = (1, 99)  # percentiles that a colour scale spans: single spots would dim all others
COLOURS = "viridis"
PALE = 0.35  # of the image under the spots
NOTHING = "#d9d9d9"  # of spots without a value


@dataclass(frozen=True)
class Layer:
    """Values that are drawn as one row of maps.

    Parameters
    ----------
    values : (N, G)
        Of all spots and of the genes that are drawn.
    """

    name: str
    values: np.ndarray


def draw(adata: ad.AnnData, genes: Sequence[str], sections: Sequence[str], layers: Sequence[Layer]) -> Picture:
    """A column a gene, four at most beside each other; a row a section and layer, over the paled image if there is one.

    Spots have their size and place on the slide, y down; a bar gives the scale. Each map has a colour scale of its
    own. Over predicted ones stands Pearson's correlation with what was observed in the section.

    Parameters
    ----------
    layers
        With ``observed`` among them, correlations are said.
    """
    drawn = [place for place in places(adata) if place.name in sections]
    corners = [_corners(place) for place in drawn]
    tall = [PANEL_INCH * min(MOST_TALL, float((high - low)[1] / (high - low)[0])) for low, high in corners]
    columns = math.ceil(len(genes) / math.ceil(len(genes) / ABREAST))
    starts = range(0, len(genes), columns)
    maps = [(place, corner, layer) for place, corner in zip(drawn, corners, strict=True) for layer in layers]
    rows = [(start, *each) for start in starts for each in maps]
    heights = [height for _ in starts for height in tall for _ in layers]
    width = columns * (PANEL_INCH + 0.7) + 0.4
    figure = Picture(figsize=(width, sum(heights) + 0.55 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    observed = next((layer.values for layer in layers if layer.name == "observed"), None)
    for line, (start, place, (low, high), layer) in zip(axes, rows, strict=True):
        values = layer.values[place.rows]
        pearson = None
        if observed is not None and layer.name == "predicted":
            pearson = pearson_per_gene(observed[place.rows], values)
        for column, ax in enumerate(line, start):
            if column >= len(genes):
                ax.set_axis_off()
                continue
            _draw_map(ax, place, values[:, column], low, high)
            said = "" if pearson is None or np.isnan(pearson[column]) else f"  r = {pearson[column]:.2f}"
            ax.set_title(f"{genes[column]}  {layer.name}{said}", fontsize=10)
        line[0].set_ylabel(place.name, fontsize=10)
        scale_bar(line[0], place.um_per_px, low, high)
    return figure


def _corners(place: Place) -> tuple[np.ndarray, np.ndarray]:
    """Corners of what is shown: the spots, with a margin, not beyond the image."""
    margin = 1.5 * place.spacing
    low, high = place.xy.min(axis=0) - margin, place.xy.max(axis=0) + margin
    if place.image is not None:
        low, high = np.maximum(low, 0), np.minimum(high, place.size)
    high[1] += place.spacing  # for the bar
    return low, high


def _draw_map(ax: Axes, place: Place, values: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    if place.image is not None:
        width, height = place.size
        ax.imshow(place.image, extent=(0, width, height, 0), alpha=PALE, interpolation="antialiased")
    measured = np.isfinite(values)
    for rows, coloured in ((~measured, False), (measured, True)):
        size = np.full(int(rows.sum()), place.diameter)
        spots = EllipseCollection(
            size, size, np.zeros(len(size)), units="xy", offsets=place.xy[rows], offset_transform=ax.transData
        )
        spots.set(linewidth=0, facecolor=NOTHING)
        if coloured and len(size):
            spots.set(array=values[rows], cmap=COLOURS)
            spots.set_clim(*np.percentile(values[rows], CLIPPED))
            bar = ax.figure.colorbar(spots, ax=ax, shrink=0.7, aspect=22, pad=0.02)
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=8)
        ax.add_collection(spots)
    ax.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
