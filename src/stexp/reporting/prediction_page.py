"""The report of a slide that was predicted from its image alone: there is no truth to hold it against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from stexp.data.slides import pictures as report_pictures
from stexp.evaluation.predictions import read, read_json
from stexp.evaluation.verdict import number
from stexp.reporting.maps import make_maps
from stexp.reporting.page import LACKING, lacking, render, save, unit

NEEDED = (
    "layers/predicted",
    "obs/section",
    "obsm/spatial",
    "var/expected_pearson",
    *(f"uns/stexp/{key}" for key in ("protocol", "expected", "model", "data", "slide")),
)
"""What the report reads of ``predictions.h5ad``."""

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


def is_prediction(folder: Path) -> bool:
    """Whether a folder holds the prediction of a slide, not a run."""
    try:
        with h5py.File(folder / "predictions.h5ad") as file:
            return file["uns/stexp/kind"].asstr()[()] == "prediction"
    except (OSError, KeyError, AttributeError, TypeError):
        return False  # missing or damaged: what reads it next says so


def write_prediction_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a predicted slide; see :func:`~stexp.reporting.report.write_report`."""
    predictions, provenance = read(folder / "predictions.h5ad", *NEEDED), read_json(folder / "provenance.json")
    pictures = report_pictures.read(folder / report_pictures.NAME)
    try:
        page = _render(predictions, provenance, pictures)
    except LACKING as error:
        raise lacking(folder, error, "predict the slide again (overwrite=true)") from error
    return save(folder, page)


def worth(var: pd.DataFrame) -> tuple[str, bool]:
    """What is known of the accuracy, in words; and whether most genes with a known one beat their floor."""
    known = var["expected_pearson"].notna().to_numpy()
    if not known.any():
        return "No held-out section says how well any of these genes is predicted.", False
    beats = var["beats_floor"].to_numpy(bool)[known]
    typical = number(float(var["expected_pearson"].median()))
    sections = int(var["n_held_out_sections"].max())
    text = (
        f"On {sections} held-out section{'s' if sections != 1 else ''}, {beats.sum()} of {known.sum()} genes beat the "
        f"best of their floors; the median Pearson is {typical}."
    )
    if (~known).any():
        text += f" Of {(~known).sum()} genes the accuracy is not known."
    return text, bool(beats.mean() > 0.5)


def _render(predictions: ad.AnnData, provenance: dict, pictures: tuple) -> str:
    about, var = predictions.uns["stexp"], predictions.var
    by_worth = list(var["expected_pearson"].sort_values(ascending=False, na_position="last", kind="stable").index)
    rows = _rows(predictions)
    statement, most = worth(var)
    checks = json.loads(about["checks"]) if "checks" in about else []
    said = str(about["verdict"]) if "verdict" in about else None
    found = {check.get("verdict", "ok") for check in checks}
    worst = "bad" if "do_not_trust" in found else "good" if most and found <= {"ok"} else "warn"
    um = float(about.get("um_per_px", math.nan))
    return render(
        "report_prediction.html.j2",
        make_maps(predictions, *pictures, by_worth=by_worth),
        [{"key": key, "label": heading, "kind": kind} for key, heading, kind in COLUMNS if key in rows[0]],
        rows,
        about={key: str(about[key]) for key in ("slide", "model", "data")},
        fold=str(about.get("fold", "")),
        n_spots=predictions.n_obs,
        n_genes=predictions.n_vars,
        um_per_px=um if math.isfinite(um) else None,
        grid=str(about.get("grid", "")),
        unit=unit(json.loads(about["protocol"])),
        checks=checks,
        said=said,
        statement=statement,
        worst=worst,
        strange=int(predictions.obs["out_of_distribution"].sum()) if "out_of_distribution" in predictions.obs else None,
        expected=json.loads(about["expected"]),
        provenance=provenance,
    )


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
