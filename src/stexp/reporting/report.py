"""The page of a run: scores beside floors and ceiling, audit, maps, genes, provenance."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import anndata as ad

from stexp.data.slides import pictures as report_pictures
from stexp.errors import InputError
from stexp.evaluation.predictions import read, read_json
from stexp.evaluation.verdict import best_floor, has_more_than_highest, is_oracle, verdict
from stexp.reporting.maps import make_maps
from stexp.reporting.page import LACKING, label, lacking, render, save, unit
from stexp.reporting.plots import score_chart
from stexp.reporting.prediction_page import is_prediction, write_prediction_report

# columns of the score table: key, heading, whether less is better
SCORES = [
    ("pearson_acg", "Pearson ACG", False),
    ("pearson_heg50", "Pearson HEG50", False),
    ("pearson_given_depth", "Pearson given depth", False),
    ("spearman_acg", "Spearman", False),
    ("mse", "MSE", True),
    ("mae", "MAE", True),
    ("rmse", "RMSE", True),
    ("r2", "R2", False),
    ("ccc", "CCC", False),
    ("rvd", "RVD", True),
]


# columns of the gene table that every run has
GENE_COLUMNS = [
    ("gene", "Gene"),
    ("pearson", "Pearson"),
    ("spearman", "Spearman"),
    ("mse", "MSE"),
    ("mean_observed", "Mean"),
    ("heg50", "HEG50"),
    ("n_sections", "Sections"),
]


NEEDED = (
    *(f"layers/{key}" for key in ("observed", "predicted")),
    *(f"obs/{key}" for key in ("section", "patient", "spot")),
    *(f"uns/stexp/{key}" for key in ("protocol", "config")),
    "obsm/spatial",
)
"""What the report reads of ``predictions.h5ad``."""


FLOORS = {
    "mean": "mean of the training and validation spots, the same for every spot",
    "nearest_section": "mean of the training section whose colours are nearest",
    "depth_oracle": "log total counts of the test spot itself, the same number for every gene",
    "coordinates": "ridge on the position in the section, no image",
    "colour_ridge": "ridge on nine colour statistics of the tile",
    "knn_features": "mean of the 50 nearest training and validation spots in frozen features",
    "ridge_features": "ridge on frozen image features (256 principal components)",
}


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into the folder of a run, or of a predicted slide, whole or not at all.

    Parameters
    ----------
    run
        Folder with predictions.h5ad, metrics.json, per_gene.csv, audit.json and provenance.json; of a predicted
        slide with predictions.h5ad and provenance.json.

    Returns
    -------
    Path
        The report.

    Raises
    ------
    InputError
        The folder or one of its files is missing, or is not what its name says.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"{run} is not a folder; give that of a run or of a predicted slide, as in run=runs/x")
    if is_prediction(run):
        return write_prediction_report(run)
    metrics, audit, provenance = (read_json(run / f"{name}.json") for name in ("metrics", "audit", "provenance"))
    genes = _read_genes(run / "per_gene.csv")
    predictions = read(run / "predictions.h5ad", *NEEDED)
    pictures = report_pictures.read(run / report_pictures.NAME)
    try:
        page = _render(metrics, audit, provenance, genes, predictions, pictures)
    except LACKING as error:
        raise lacking(run, error, f"score the run again (stexp-score run={run})") from error
    return save(run, page)


def changes(metrics: dict[str, Any]) -> str:
    """What was changed where a run was retrieved from again, as it is typed: ``k=50, genes=FASN+ERBB2``; else empty."""
    parts = []
    for key, value in metrics.get("chosen", {}).get("changed", {}).items():
        names = value if isinstance(value, list) else [value]
        parts.append(f"{key}={'+'.join(map(str, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    return ", ".join(parts)


def _render(
    metrics: dict, audit: dict, provenance: dict, genes: list[dict], predictions: ad.AnnData, pictures: tuple
) -> str:
    about, best = predictions.uns["stexp"], best_floor(metrics)
    by_worth = sorted(genes, key=lambda row: math.inf if row["pearson"] is None else -row["pearson"])
    maps = make_maps(predictions, *pictures, by_worth=[row["gene"] for row in by_worth])
    numbers, statement, beats = verdict(metrics)
    heg = "Pearson HEG50" if has_more_than_highest(metrics) else f"Pearson HEG50 (all {metrics['n_genes']})"
    charts = [score_chart(metrics, "pearson_acg", "Pearson, all considered genes (ACG)")]
    if has_more_than_highest(metrics):
        charts.append(score_chart(metrics, "pearson_heg50", "Pearson, 50 highest genes (HEG50)"))
    return render(
        "report_run.html.j2",
        maps,
        _columns(genes, best),
        genes,
        metrics=metrics,
        audit=audit,
        provenance=provenance,
        unit=unit(json.loads(about["protocol"])),
        numbers=numbers,
        statement=statement,
        beats=beats,
        best=best,
        is_oracle=is_oracle,
        charts=charts,
        columns=[(key, heg if key == "pearson_heg50" else heading, less) for key, heading, less in SCORES],
        heg=heg,
        changes=changes(metrics),
        floor_notes=FLOORS,
        config=str(about["config"]),
        manifest=hashlib.sha256(json.dumps(provenance["data_manifest"], sort_keys=True).encode()).hexdigest(),
    )


def _columns(genes: list[dict], best: str | None) -> list[dict[str, Any]]:
    """Columns of the gene table, and the gain over the best floor that its rows get here."""
    columns = list(GENE_COLUMNS)
    floor = f"floor_{best}"
    if best and all(floor in row for row in genes):
        for row in genes:
            row["gain"] = None if None in (row["pearson"], row[floor]) else row["pearson"] - row[floor]
        columns += [(floor, f"Floor: {label(best)}"), ("gain", "Above floor")]
    oracles = [key for key in (genes[0] if genes else {}) if is_oracle(key)]
    columns += [(key, label(key.removeprefix("floor_")).capitalize()) for key in oracles]
    columns.append(("ceiling", "Ceiling"))
    kinds = {"gene": "text", "heg50": "flag", "n_sections": "count"}
    return [{"key": key, "label": heading, "kind": kinds.get(key, "number")} for key, heading in columns]


def _read_genes(path: Path) -> list[dict[str, Any]]:
    again = f"score the run again (stexp-score run={path.parent})"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {again}")
    words = {"true": 1.0, "false": 0.0, "": math.nan}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                {key: text if key == "gene" else _finite(words.get(text.lower(), text)) for key, text in row.items()}
                for row in csv.DictReader(file)
            ]
    except (ValueError, AttributeError, csv.Error) as error:
        raise InputError(f"{path} is not a table of numbers ({error}); {again}") from None
    if not rows:
        raise InputError(f"{path} names no gene; {again}")
    absent = [key for key, _ in GENE_COLUMNS if key not in rows[0]]
    if absent:
        raise InputError(f"{path} has no column {', '.join(absent)}; {again}")
    return rows


def _finite(value: float | str) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
