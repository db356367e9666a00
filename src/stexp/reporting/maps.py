"""Expression and pictures for the maps of a report, packed to fit into one file."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from PIL import Image

from stexp.data.slides.pictures import CELL, SHEET_COLUMNS, SHEET_PX, Sheet, SlidePicture, share_budget, to_jpeg
from stexp.evaluation.metrics import pearson_per_gene
from stexp.evaluation.predictions import spacing

MISSING = 255  # code of a value that is not there
FINE, COARSE = ("observed", "predicted"), ("uncertainty", "interval")
"""Layers that can be shown; the coarse ones, in `COARSE_STEPS` of a gene's range, are read rather than seen."""
STEPS, COARSE_STEPS = (254, 126, 62, 30), 14
"""Of the fine layers: the most that fit are taken."""
VALUE_BYTES = 10_500_000
"""Of expression values in a report, as base64."""
PAGE_BYTES = 14_300_000
"""Of a report, without its text."""
THUMBNAIL_PX = 1200


@dataclass(frozen=True)
class Maps:
    """Packed expression and pictures of a page.

    Attributes
    ----------
    genes
        Those that can be shown; not all where there are very many.
    first
        Which of them is shown first.
    sections
        One record per section, in order of appearance.
    references
        Spots that are named as neighbours; None where there are none.
    steps
        Of the range of a gene, by layer.
    arrays
        Base64 by ``"<section number>-<what>"``: ``xy`` (N, 2) and ``pearson`` (G,) float32; for each layer its codes
        (G, N) uint8 and ``<layer>-range`` (2, G) float32; ``neighbours`` (N, 5) int32 and ``weights`` (N, 5) float32;
        all these deflated. ``slide``: JPEG cells, one behind the other; ``sheet``: tiles of the references.
    """

    genes: list[str]
    first: int
    sections: list[dict[str, Any]]
    references: dict[str, Any] | None
    steps: dict[str, int]
    arrays: dict[str, str]


def quantise(values: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0..levels over each gene's own range.

    Parameters
    ----------
    values : (N, G)
        NaN where there is no value.

    Returns
    -------
    codes : (G, N) uint8
        ``MISSING`` where there is no value.
    ranges : (2, G) float32
        Lowest and highest value of each gene, NaN where it has none. A code c stands for
        low + c / levels x (high - low).
    """
    genes = np.asarray(values, dtype=np.float32).T
    measured = np.isfinite(genes)
    low = np.where(measured, genes, np.inf).min(axis=1, initial=np.inf)
    high = np.where(measured, genes, -np.inf).max(axis=1, initial=-np.inf)
    empty = ~measured.any(axis=1)
    low[empty] = high[empty] = np.nan
    step = np.where(high > low, (high - low) / levels, 1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        codes = np.rint((genes - low[:, None]) / step[:, None])
    return np.where(measured, codes, MISSING).astype(np.uint8), np.stack([low, high])


def pack(array: np.ndarray) -> str:
    """Array as base64 of its zlib-compressed little-endian bytes, which browsers unpack by themselves."""
    array = np.ascontiguousarray(array)
    return _base64(zlib.compress(array.astype(array.dtype.newbyteorder("<")).tobytes()))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def make_maps(
    predictions: ad.AnnData,
    slides: dict[str, SlidePicture],
    references: Sheet | None,
    by_worth: list[str] | None = None,
) -> Maps:
    """Pack predictions with what there is of pictures, within `PAGE_BYTES`.

    Parameters
    ----------
    by_worth
        Genes, those first that should be kept where not all of them fit; the first that varies is shown first.
    """
    names = predictions.obs["section"].astype(str).to_numpy()
    rows_of = {name: np.flatnonzero(names == name) for name in dict.fromkeys(names)}
    layers = _layers(predictions)
    genes, steps = _fitting(list(predictions.var_names), layers, by_worth)
    columns = predictions.var_names.get_indexer(genes)
    arrays: dict[str, str] = {}
    sections = []
    for number, (name, rows) in enumerate(rows_of.items()):
        of_section = {key: values[np.ix_(rows, columns)] for key, values in layers.items()}
        arrays |= _expression(predictions, of_section, steps, rows, number)
        sections.append(_record(predictions, name, rows, list(layers)))
    first_section = next(iter(rows_of.values()))
    first = first_gene(
        [values[np.ix_(first_section, columns)] for key, values in layers.items() if key in FINE],
        [genes.index(gene) for gene in by_worth or genes if gene in set(genes)],
    )
    budget = PAGE_BYTES - sum(map(len, arrays.values()))
    shown = _references(predictions, references) if "neighbours" in predictions.obsm else None
    if shown and references is not None and len(references.jpeg) * 4 / 3 < budget / 2:
        arrays["sheet"] = _base64(references.jpeg)
        budget -= len(arrays["sheet"])
    arrays |= _pictures(predictions, sections, share_budget(slides, int(0.75 * budget)))
    return Maps(genes, first, sections, shown, steps, arrays)


def first_gene(layers: list[np.ndarray], order: list[int]) -> int:
    """The first gene of an order that a map shows something of: it varies no less than most genes do.

    Parameters
    ----------
    layers : list of (N, G)
        Observed, where it is known, and predicted.
    order
        Columns; where none of them varies, the first.
    """
    varies = np.ones(layers[0].shape[1], dtype=bool)
    for values in layers:
        measured = np.isfinite(values)
        spread = np.where(measured, values, 0).std(axis=0)
        spread[~measured.all(axis=0)] = 0
        varies &= (spread > 0) & (spread >= np.median(spread))
    return next((gene for gene in order if varies[gene]), order[0] if order else 0)


def _layers(predictions: ad.AnnData) -> dict[str, np.ndarray]:
    """What can be shown of each gene: `FINE` layers, and `COARSE` ones that hold anything."""
    layers = {key: np.asarray(values) for key, values in predictions.layers.items() if key in FINE + COARSE}
    if {"lower", "upper"} <= set(predictions.layers):
        layers["interval"] = np.asarray(predictions.layers["upper"]) - np.asarray(predictions.layers["lower"])
    shown = [key for key in FINE + COARSE if key in layers and (key in FINE or np.isfinite(layers[key]).any())]
    return {key: layers[key] for key in shown}


def _expression(
    predictions: ad.AnnData, layers: dict[str, np.ndarray], steps: dict[str, int], rows: np.ndarray, number: int
) -> dict[str, str]:
    """Packed arrays of one section: values, positions, correlations and neighbours."""
    arrays = {}
    for key, values in layers.items():
        codes, ranges = quantise(values, steps[key])
        arrays[f"{number}-{key}"], arrays[f"{number}-{key}-range"] = pack(codes), pack(ranges)
    arrays[f"{number}-xy"] = pack(np.asarray(predictions.obsm["spatial"], dtype=np.float32)[rows])
    if "observed" in layers:
        arrays[f"{number}-pearson"] = pack(pearson_per_gene(layers["observed"], layers["predicted"]).astype(np.float32))
    if "neighbours" in predictions.obsm:
        arrays[f"{number}-neighbours"] = pack(np.asarray(predictions.obsm["neighbours"], dtype=np.int32)[rows])
        arrays[f"{number}-weights"] = pack(np.asarray(predictions.obsm["neighbour_weights"], np.float32)[rows])
    return arrays


def _pictures(
    predictions: ad.AnnData, sections: list[dict[str, Any]], slides: dict[str, SlidePicture]
) -> dict[str, str]:
    """Cells of the slides, which their sections' records get to know; a section without a slide gets a thumbnail."""
    arrays = {}
    for number, section in enumerate(sections):
        if section["name"] in slides:
            section["slide"], arrays[f"{number}-slide"] = _cells(slides[section["name"]])
        else:
            section["image"] = thumbnail(predictions, section["name"])
    return arrays


def _fitting(
    genes: list[str], layers: dict[str, np.ndarray], by_worth: list[str] | None
) -> tuple[list[str], dict[str, int]]:
    """Genes and steps by layer that come to `VALUE_BYTES`, judged by a few genes."""
    some = np.unique(np.linspace(0, len(genes) - 1, 64).astype(int))
    for fine in STEPS:
        steps = {key: fine if key in FINE else COARSE_STEPS for key in layers}
        packed = (len(pack(quantise(values[:, some], steps[key])[0])) for key, values in layers.items())
        a_gene = sum(packed) / len(some)
        if a_gene * len(genes) <= VALUE_BYTES:
            return genes, steps
    kept = set((by_worth or genes)[: max(1, int(VALUE_BYTES / a_gene))])
    return [gene for gene in genes if gene in kept], steps


def _record(predictions: ad.AnnData, name: str, rows: np.ndarray, layers: list[str]) -> dict[str, Any]:
    obs, xy = predictions.obs.iloc[rows], np.asarray(predictions.obsm["spatial"], dtype=np.float32)[rows]
    scale = predictions.uns.get("spatial", {}).get(name, {}).get("scalefactors", {})
    spots = obs["spot"].astype(str) if "spot" in obs else obs.index.astype(str)
    strange = obs.get("ood_percentile")
    return {
        "name": name,
        "patient": str(obs["patient"].iloc[0]) if "patient" in obs else None,
        "spots": spots.tolist(),
        "source": _sources(obs),
        "strange": None if strange is None else [round(float(value), 3) for value in strange],
        "image": None,
        "slide": None,
        "spot_px": float(scale.get("spot_diameter_fullres", 0)) or spacing(xy) / 2 or 1.0,
        "layers": layers,
    }


def _sources(obs: pd.DataFrame) -> list[str] | None:
    if "neighbour_section" not in obs:
        return None
    columns = zip(obs["neighbour_section"], obs["neighbour_section_weight"], strict=True)
    return [f"{name} ({weight:.0%} of the weight)" for name, weight in columns]


def _references(predictions: ad.AnnData, sheet: Sheet | None) -> dict[str, Any]:
    table = predictions.uns["references"]
    place = {} if sheet is None else {name: i for i, name in enumerate(sheet.names)}
    columns = {key: pd.Categorical(table[key].astype(str)) for key in ("section", "patient")}
    return {
        "spots": table["spot"].astype(str).tolist() if "spot" in table else None,
        **{key: column.codes.tolist() for key, column in columns.items()},
        **{f"{key}s": column.categories.tolist() for key, column in columns.items()},
        "tile": [place.get(name, -1) for name in table.index.astype(str)],
        "px": SHEET_PX,
        "columns": SHEET_COLUMNS,
    }


def _cells(slide: SlidePicture) -> tuple[dict[str, Any], str]:
    """Places of a slide's cells, and the cells."""
    levels, data, at = [], [], 0
    for level in slide.levels:
        cells = []
        for (column, row), jpeg in level.cells.items():
            cells.append([column, row, at, at + len(jpeg)])
            data.append(jpeg)
            at += len(jpeg)
        levels.append({"downsample": level.downsample, "cells": cells})
    record = {"width": slide.width, "height": slide.height, "side": slide.side_px, "cell": CELL, "levels": levels}
    return record, _base64(b"".join(data))


def thumbnail(predictions: ad.AnnData, name: str, side_px: int = THUMBNAIL_PX) -> dict[str, Any] | None:
    """Small image of a section as a data URI, with the size of its slide in level-0 px; None where it has no image."""
    spatial = predictions.uns.get("spatial", {}).get(name, {})
    image = spatial.get("images", {}).get("hires")
    if image is None:
        return None
    scale, small = float(spatial["scalefactors"]["tissue_hires_scalef"]), Image.fromarray(np.asarray(image, np.uint8))
    small.thumbnail((side_px, side_px))
    return {
        "uri": "data:image/jpeg;base64," + _base64(to_jpeg(np.asarray(small), quality=80)),
        "width": image.shape[1] / scale,
        "height": image.shape[0] / scale,
    }
