"""The page of a completed section: what was shown, what was asked for, and how well it was filled in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from stexp.completion.result import DENSE, PER_GENE, about_map, read_result
from stexp.data.slides.spacing import spacing
from stexp.errors import InputError
from stexp.evaluation.predictions import protocol_of, read
from stexp.evaluation.records import read_genes
from stexp.evaluation.verdict import label
from stexp.reporting.maps import FINE, make_maps
from stexp.reporting.page import render_report, unit
from stexp.reporting.plots import Bar, ScoreChart, axis_of

OF_PREDICTIONS = ("layers/observed", "layers/predicted", "layers/uncertainty", "obs/section", "obsm/spatial")
COLUMNS = [
    ("pearson_acg", "Pearson ACG", False),
    ("pearson_heg50", "Pearson HEG50", False),
    ("pearson_given_depth", "Pearson given depth", False),
    ("spearman_acg", "Spearman", False),
    ("mse", "MSE", True),
    ("mae", "MAE", True),
    ("coverage_95", "Within 95 %", None),
]
"""Of the score table: key, heading, whether less is better; None: 0.95 is."""


def completion_page(folder: Path) -> str:
    """The page of a completed section; see :func:`~stexp.reporting.report.write_report`."""
    result = read_result(folder)
    floor, shown = result["best_floor"], result["map"]
    of_genes = [f"floor_{name}" for name in result["floors"]] + list(result["methods"])
    genes = read_genes(folder / PER_GENE, *of_genes, "ceiling")
    hidden = read(folder / "predictions.h5ad", *OF_PREDICTIONS, "uns/stexp/protocol")
    between = read(folder / DENSE, *OF_PREDICTIONS) if (folder / DENSE).is_file() else None
    column = f"floor_{shown}" if shown in result["floors"] else shown
    for row in genes:
        row["pearson"] = row[column]
        own, best = row[column], row[f"floor_{floor}"]
        row["gain"] = None if own is None or best is None else own - best
    by_worth = sorted(genes, key=lambda row: math.inf if row["pearson"] is None else -row["pearson"])
    maps = make_maps(_parts(result, hidden, between), {}, None, by_worth=[row["gene"] for row in by_worth])
    if between is not None:
        maps.sections[0] |= {"square": True, "spot_px": 1.04 * spacing(np.asarray(between.obsm["spatial"]))}
    columns = [("gene", "Gene", "text"), ("pearson", label(shown).capitalize(), "number")]
    if shown != floor:
        columns += [(f"floor_{floor}", f"Floor: {label(floor)}", "number"), ("gain", "Above floor", "number")]
    columns += [("ceiling", "Ceiling", "number"), ("mean_observed", "Mean", "number"), ("heg50", "HEG50", "flag")]
    kept = {key for key, _, _ in columns}
    manifest = json.dumps(result["provenance"]["data_manifest"], sort_keys=True)
    return render_report(
        "completion.html.j2",
        maps,
        [{"key": key, "label": heading, "kind": kind} for key, heading, kind in columns],
        [{key: value for key, value in row.items() if key in kept} for row in genes],
        parts=True,
        result=result,
        provenance=result["provenance"],
        asked=_asked(result),
        about_map=about_map(result),
        columns=COLUMNS,
        charts=[chart for chart in map(_chart(result), COLUMNS[:2]) if chart is not None],
        unit=unit(protocol_of(hidden)),
        between=between is not None,
        manifest=hashlib.sha256(manifest.encode()).hexdigest(),
    )


def _asked(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Numbers of the header, each with what it counts."""
    if result["known"] == "spots":
        shown, asked = result.get("n_spots_shown"), result.get("n_spots_asked")
        return [(f"{shown}", "spots shown"), (f"{asked}", "asked for"), (f"{result.get('n_genes')}", "genes")]
    shown, asked = result.get("n_genes_shown"), result.get("n_genes_asked")
    return [(f"{shown}", "genes shown"), (f"{asked}", "asked for"), (f"{result.get('n_spots')}", "spots")]


def _parts(result: Mapping[str, Any], hidden: ad.AnnData, between: ad.AnnData | None) -> ad.AnnData:
    """What the maps show, each under its name: between the spots first, where that is mapped; then what was hidden."""
    what = "hidden spots" if result["known"] == "spots" else "hidden genes"
    named = {f"{what}, by {label(result['map'])}": hidden}
    if between is not None:
        if list(between.var_names) != list(hidden.var_names):
            raise InputError(f"{DENSE} and predictions.h5ad are of other genes; complete again with overwrite=true")
        named = {"between the spots, by kriging": between, **named}
    layers = {key: np.concatenate([own.layers[key] for own in named.values()]) for key in (*FINE, "uncertainty")}
    names = np.repeat(list(named), [own.n_obs for own in named.values()])
    spots = np.concatenate([own.obs.get("spot", own.obs_names) for own in named.values()]).astype(str)
    obs = pd.DataFrame({"section": names, "spot": spots}, index=[str(i) for i in range(len(names))])
    parts = ad.AnnData(layers["predicted"], obs=obs, var=pd.DataFrame(index=hidden.var_names), layers=layers)
    parts.obsm["spatial"] = np.concatenate([np.asarray(own.obsm["spatial"]) for own in named.values()])
    parts.uns["spatial"] = {
        name: own.uns["spatial"][result["section"]]
        for name, own in named.items()
        if result["section"] in own.uns.get("spatial", {})
    }
    return parts


def _chart(result: Mapping[str, Any]) -> Any:
    """What makes a chart of one score: methods and floors by worth, and the ceiling."""

    def chart(column: tuple[str, str, bool | None]) -> ScoreChart | None:
        key, title, _ = column
        kinds = {"method": result["methods"], "floor": result["floors"]}
        bars = [Bar(name, kind, own.get(key), []) for kind, part in kinds.items() for name, own in part.items()]
        bars.sort(key=lambda bar: math.inf if bar.value is None else -bar.value)
        ceiling = result["ceiling"].get(key)
        return ScoreChart(f"{title}, hidden part alone", bars, ceiling, *axis_of(bars, ceiling)) if bars else None

    return chart
