"""The page of a slide that was predicted from its image alone: there is no truth to hold it against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.slides import pictures
from stexp.evaluation.predictions import protocol_of, read
from stexp.evaluation.records import SlideProvenance, read_json
from stexp.evaluation.verdict import count, number
from stexp.reporting.maps import make_maps
from stexp.reporting.page import render_report, unit

PREDICTIONS = (
    "layers/predicted",
    "obs/section",
    "obsm/spatial",
    *(f"var/{key}" for key in ("expected_pearson", "beats_floor", "n_held_out_sections")),
    *(f"uns/stexp/{key}" for key in ("protocol", "expected", "model", "data", "slide")),
)
"""What the page shows of the predictions; a file without it is refused where it is read."""

COLUMNS = [
    ("gene", "Gene", "text"),
    ("expected_pearson", "Expected Pearson", "number"),
    ("expected_floor", "Best floor", "number"),
    ("expected_floor_name", "Floor", "text"),
    ("beats_floor", "Above floor", "flag"),
    ("n_held_out_sections", "Held-out sections", "count"),
    ("coverage_measured", "Coverage of interval", "number"),
    ("interval_halfwidth", "Half the interval", "number"),
    ("mean", "Mean here", "number"),
    ("sd", "SD here", "number"),
]
"""Of the gene table, where the prediction has them: key, heading, kind."""


def prediction_page(folder: Path) -> str:
    """The page of a predicted slide; see :func:`~stexp.reporting.report.write_report`."""
    predictions = read(folder / "predictions.h5ad", *PREDICTIONS)
    provenance = read_json(folder / "provenance.json", SlideProvenance)
    slides, references = pictures.read(folder / pictures.NAME)
    about, var = predictions.uns["stexp"], predictions.var
    by_worth = list(var["expected_pearson"].sort_values(ascending=False, na_position="last", kind="stable").index)
    rows = _rows(predictions)
    statement, most = worth(var)
    checks = checks_of(predictions)
    um = float(about.get("um_per_px", math.nan))
    return render_report(
        "prediction.html.j2",
        make_maps(predictions, slides, references, by_worth=by_worth),
        [{"key": key, "label": heading, "kind": kind} for key, heading, kind in COLUMNS if key in rows[0]],
        rows,
        about={key: str(about[key]) for key in ("slide", "model", "data")},
        fold=str(about.get("fold", "")),
        n_spots=predictions.n_obs,
        n_genes=predictions.n_vars,
        um_per_px=um if math.isfinite(um) else None,
        grid=str(about.get("grid", "")),
        unit=unit(protocol_of(predictions)),
        checks=checks,
        verdict=str(about["verdict"]) if "verdict" in about else None,
        statement=statement,
        worst=worst_of(checks, most),
        n_strange=int(predictions.obs["out_of_distribution"].sum())
        if "out_of_distribution" in predictions.obs
        else None,
        expected=json.loads(about["expected"]),
        provenance=provenance,
    )


def checks_of(predictions: ad.AnnData) -> list[dict[str, str]]:
    """Checks of the slide: check, verdict (ok, caution, do_not_trust), text; none where it was not checked."""
    about = predictions.uns["stexp"]
    return json.loads(about["checks"]) if "checks" in about else []


def worst_of(checks: list[dict[str, str]], most_beat_floor: bool) -> str:
    """Colour of the verdict: good, warn or bad."""
    verdicts = {check.get("verdict", "ok") for check in checks}
    if "do_not_trust" in verdicts:
        return "bad"
    return "good" if most_beat_floor and verdicts <= {"ok"} else "warn"


def worth(var: pd.DataFrame) -> tuple[str, bool]:
    """Expected accuracy in words; and whether most genes with a measured one beat their floor."""
    measured = var["expected_pearson"].notna().to_numpy()
    if not measured.any():
        return "No held-out section says how well any of these genes is predicted.", False
    flags = var["beats_floor"][measured].dropna().astype(bool)  # NA where too few patients were held out to say
    typical = number(float(var["expected_pearson"].median()))
    sections = count(int(var["n_held_out_sections"].max()), "held-out section")
    if len(flags):
        text = (
            f"On {sections}, {flags.sum()} of {len(flags)} genes beat the best of their floors; the median Pearson is "
            f"{typical}."
        )
    else:
        text = (
            f"On {sections} the median Pearson is {typical}. Too few patients were held out to say which genes beat "
            f"the best of their floors."
        )
    if (~measured).any():
        text += f" Of {count(int((~measured).sum()), 'gene')} the accuracy is not known."
    return text, bool(len(flags) and flags.mean() > 0.5)


def _rows(predictions: ad.AnnData) -> list[dict[str, Any]]:
    predicted = np.asarray(predictions.layers["predicted"], dtype=np.float64)
    table = predictions.var.assign(mean=predicted.mean(axis=0), sd=predicted.std(axis=0))
    keys = [(key, kind) for key, _, kind in COLUMNS if key in table]
    rows = []
    for gene, values in zip(table.index, table[[key for key, _ in keys]].itertuples(index=False), strict=True):
        row: dict[str, Any] = {"gene": str(gene)}
        for (key, kind), value in zip(keys, values, strict=True):
            if kind == "text":
                row[key] = "" if pd.isna(value) else str(value).replace("_", " ")
            else:
                row[key] = None if pd.isna(value) else float(f"{value:.4g}")
        rows.append(row)
    return rows
