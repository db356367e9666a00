"""``stexp.plot``: maps of genes, scores beside their floors, and spots on their image, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np

from stexp.api.score import Score
from stexp.api.typed import typed
from stexp.data.section import Section
from stexp.errors import InputError, did_you_mean
from stexp.evaluation.verdict import label
from stexp.reporting import gene_maps, overlay
from stexp.reporting.picture import Picture
from stexp.reporting.plots import score_chart

COLOUR_OF = {"method": "#3b6fb6", "floor": "#b9bec6", "oracle": "#e3c58a"}
SHOWN = 6
"""Genes that are drawn where none are named."""


@typed
def genes(
    adata: ad.AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    sections: str | Sequence[str] | None = None,
    layers: str | Sequence[str] | None = None,
) -> Picture:
    """Draw the expression of genes at the places of their spots, over the image.

    Parameters
    ----------
    adata
        Of ``model.predict``, or as scanpy has spots: ``obsm["spatial"]``, and ``uns["spatial"]`` for the image.
    genes
        Names; None: those predicted best, where that is known, else those that vary most; six at most.
    sections
        Those to draw; None: all.
    layers
        Of ``predicted``, ``observed``, ``uncertainty``, ``lower`` and ``upper`` or any other, a row each; None:
        predicted and observed as far as they are there, else ``X``.

    Returns
    -------
    Picture
        A matplotlib figure, which notebooks show; ``.savefig("genes.png")`` writes it.

    Examples
    --------
    >>> stexp.plot.genes(model.predict(data), ["ERBB2", "KRT8"]).savefig("genes.png")
    """
    if "spatial" not in adata.obsm or np.shape(adata.obsm["spatial"])[1:] != (2,):
        raise InputError('adata.obsm["spatial"] with the x and y of every spot, in pixels, would fit')
    if "section" not in adata.obs:
        adata = adata.copy()
        adata.obs["section"] = next(iter(adata.uns.get("spatial", {})), "section")
    kinds = _listed(layers, list(adata.layers), "layers")
    if kinds is None:
        kinds = [key for key in ("observed", "predicted") if key in adata.layers]
    chosen = _listed(genes, list(map(str, adata.var_names)), "genes")
    names = list(dict.fromkeys(adata.obs["section"].astype(str)))
    if chosen is None:
        chosen = _most_telling(adata, kinds)
    values = {key: _dense(adata[:, chosen].layers[key]) for key in kinds} or {"X": _dense(adata[:, chosen].X)}
    drawn = [gene_maps.Layer(key, array) for key, array in values.items()]
    return gene_maps.draw(adata, chosen, _listed(sections, names, "sections") or names, drawn)


@typed
def scores(score: Score, metric: str = "pearson_acg") -> Picture:
    """Draw a score as bars: the method, its floors and oracles, a dot for every section, and the ceiling.

    Parameters
    ----------
    metric
        ``"pearson_acg"``: all genes; ``"pearson_heg50"``: the 50 highest.

    Examples
    --------
    >>> stexp.plot.scores(model.score)
    """
    titles = {"pearson_acg": "Pearson, all genes", "pearson_heg50": "Pearson, the 50 highest genes"}
    if metric not in titles:
        raise InputError(f"metric={metric}: choose {', '.join(titles)}{did_you_mean(str(metric), titles)}")
    chart = score_chart(score.metrics, metric, titles[metric])
    bars = chart.bars[::-1]
    figure = Picture(figsize=(6.6, 0.34 * len(bars) + 1.1), dpi=110, layout="constrained")
    ax = figure.subplots()
    for y, bar in enumerate(bars):
        ax.barh(y, np.nan if bar.value is None else bar.value, color=COLOUR_OF[bar.kind], height=0.7)
        ax.plot(bar.sections, [y] * len(bar.sections), "o", color="#22262b", markersize=3.5, alpha=0.7)
    if chart.ceiling is not None:
        ax.axvline(chart.ceiling, color="#22262b", linewidth=1, linestyle=(0, (4, 3)))
        ax.text(chart.ceiling, len(bars) - 0.4, "ceiling ", ha="right", va="bottom", fontsize=8)
    named = [
        label(bar.name) + (" (oracle)" if bar.kind == "oracle" and "oracle" not in bar.name else "") for bar in bars
    ]
    ax.set(yticks=range(len(bars)), yticklabels=named, xlabel=chart.title, xlim=(chart.low, chart.high))
    ax.tick_params(axis="y", length=0)
    ax.axvline(0, color="#22262b", linewidth=0.8)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    return figure


@typed
def section(section: Section, tile_px: int | None = None) -> Picture:
    """Draw a section's spots on its image, where a flipped or shifted join is seen at once.

    Parameters
    ----------
    tile_px
        Side of a tile in level-0 pixels, one of which is drawn at its true size; None: none.

    Examples
    --------
    >>> stexp.plot.section(sections[0])
    """
    return overlay.draw(section, [""] * len(section), tile_px)


def _listed(names: str | Sequence[str] | None, choices: list[str], what: str) -> list[str] | None:
    """Names as a list, each checked."""
    if names is None:
        return None
    listed = [names] if isinstance(names, str) else [str(name) for name in names]
    unknown = [name for name in listed if name not in choices]
    if unknown or not listed:
        there = f"{len(choices)} are there" if len(choices) > 12 else f"there are {', '.join(choices) or 'none'}"
        raise InputError(f"{what}: {', '.join(unknown[:5]) or 'none'} not in adata; {there}{_meant(unknown, choices)}")
    return listed


def _meant(unknown: list[str], choices: list[str]) -> str:
    return did_you_mean(unknown[0], choices) if unknown else ""


def _most_telling(adata: ad.AnnData, kinds: Sequence[str]) -> list[str]:
    """Genes with the highest accuracy to expect, else the highest spread of what is shown last."""
    if "expected_pearson" in adata.var:
        worth = adata.var["expected_pearson"].to_numpy(float)
    else:
        worth = _dense(adata.layers[kinds[-1]] if kinds else adata.X).std(axis=0)
    order = np.argsort(-np.nan_to_num(worth, nan=-np.inf), kind="stable")[:SHOWN]
    return [str(name) for name in adata.var_names[order]]


def _dense(values) -> np.ndarray:
    array = values.toarray() if not isinstance(values, np.ndarray) else values
    return np.asarray(array, dtype=np.float64)
