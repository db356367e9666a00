"""The page of a run: scores beside floors and ceiling, audit, maps, genes, provenance."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import anndata as ad

from stexp.data.slides import pictures
from stexp.errors import InputError
from stexp.evaluation.contrast import describe_contrast
from stexp.evaluation.coverage import covered, sentences
from stexp.evaluation.metrics import DEPTH_NOTE
from stexp.evaluation.predictions import CHANGED, OF_RUN, changed_since_run, protocol_of, read
from stexp.evaluation.prototype_record import FACTS
from stexp.evaluation.records import (
    Audit,
    ForeignAudit,
    Provenance,
    read_audit,
    read_genes,
    read_metrics,
    read_provenance,
)
from stexp.evaluation.verdict import best_floor, has_more_than_highest, is_oracle, label, verdict
from stexp.reporting.maps import make_maps
from stexp.reporting.page import render_report, unit
from stexp.reporting.plots import score_chart
from stexp.reporting.prototype_page import NAME

# columns of the score table: key, heading, whether less is better; None: neither less nor more is
COLUMNS: list[tuple[str, str, bool | None]] = [
    ("pearson_acg", "Pearson ACG", False),
    ("pearson_heg50", "Pearson HEG50", False),
    ("pearson_given_depth", "Pearson given depth", False),
    ("spearman_acg", "Spearman", False),
    ("follows_depth", "Follows depth", None),
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


FLOORS = {
    "mean": "mean of the training and validation spots, the same for every spot",
    "nearest_section": "mean of the training section whose colours are nearest",
    "depth_oracle": "log total counts of the test spot itself, the same number for every gene",
    "coordinates": "ridge on the position in the section, no image",
    "colour_ridge": "ridge on nine colour statistics of the tile",
    "knn_features": "mean of the 50 nearest training and validation spots in frozen features",
    "ridge_features": "ridge on frozen image features (256 principal components)",
    "random_features": "the same ridge on the same image encoder at random weights: what texture and colour give",
}


def run_page(run: Path) -> str:
    """The page of a run, from the files in its folder; see :func:`~stexp.reporting.report.write_report`."""
    metrics = read_metrics(run)
    audit = read_audit(run)
    provenance = read_provenance(run)
    genes = read_genes(run / "per_gene.csv", *(key for key, _ in GENE_COLUMNS), "ceiling")
    predictions = covered(read(run / "predictions.h5ad", *OF_RUN))
    again = f"score the run again (stexp-score run={run})"
    if len(genes) != metrics["n_genes"]:
        raise InputError(f"{run / 'per_gene.csv'} has {len(genes)} of {metrics['n_genes']} genes; {again}")
    patient_of = audit["facts"]["patient_of"]  # runs of before had it only there
    sections = {name: {"patient": patient_of.get(name), **section} for name, section in metrics["sections"].items()}
    slides, references = pictures.read(run / pictures.NAME)
    by_worth = sorted(genes, key=lambda row: math.inf if row["pearson"] is None else -row["pearson"])
    return _render(
        {**metrics, "sections": sections},
        audit,
        provenance,
        genes,
        predictions,
        prototypes=NAME if (run / FACTS).is_file() else "",
        maps=make_maps(predictions, slides, references, by_worth=[row["gene"] for row in by_worth]),
        notice=f"{CHANGED}." if changed_since_run(run) else "",
    )


def changes(metrics: dict[str, Any]) -> str:
    """Settings of a run that was retrieved from again, as they are typed: ``k=50, genes=FASN+ERBB2``; else empty."""
    parts = []
    for key, value in metrics.get("chosen", {}).get("changed", {}).items():
        names = value if isinstance(value, list) else [value]
        parts.append(f"{key}={'+'.join(map(str, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    return ", ".join(parts)


def settings(metrics: dict[str, Any]) -> str:
    """Numbers that a method chose besides k: ``radius um 100, scale 1.8``; else empty."""
    chosen = metrics.get("chosen", {})
    numbers = {key: value for key, value in chosen.items() if isinstance(value, int | float) and key != "k"}
    return ", ".join(f"{label(key)} {value:.4g}" for key, value in numbers.items())


def _render(
    metrics: dict,
    audit: Audit | ForeignAudit,
    provenance: Provenance,
    genes: list[dict],
    predictions: ad.AnnData,
    **content: Any,
) -> str:
    best, judged = best_floor(metrics), verdict(metrics)
    heg = "Pearson HEG50" if has_more_than_highest(metrics) else f"Pearson HEG50 (all {metrics['n_genes']})"
    charts = [score_chart(metrics, "pearson_acg", "Pearson, all considered genes (ACG)")]
    if has_more_than_highest(metrics):
        charts.append(score_chart(metrics, "pearson_heg50", "Pearson, 50 highest genes (HEG50)"))
    return render_report(
        "run.html.j2",
        gene_columns=_columns(genes, best),
        gene_rows=genes,
        metrics=metrics,
        audit=audit,
        provenance=provenance,
        unit=unit(protocol_of(predictions)),
        numbers=judged.numbers,
        statement=judged.statement,
        outcome=judged.outcome,
        best=best,
        is_oracle=is_oracle,
        charts=charts,
        columns=[(key, heg if key == "pearson_heg50" else heading, less) for key, heading, less in COLUMNS],
        heg=heg,
        depth_note=DEPTH_NOTE,
        changes=changes(metrics),
        settings=settings(metrics),
        contrast=describe_contrast(metrics),
        elsewhere=sentences(metrics),
        floor_notes=FLOORS | _spreads(metrics),
        config=str(predictions.uns["stexp"]["config"]),
        manifest=hashlib.sha256(json.dumps(provenance["data_manifest"], sort_keys=True).encode()).hexdigest(),
        **content,
    )


def _spreads(metrics: dict) -> dict[str, str]:
    """Notes of floors that several seeds drew, with the spread of their score."""
    return {
        name: f"{FLOORS.get(name, 'of several seeds')}; over seeds, ACG has a spread of {spread['pearson_acg']:.4f}"
        for name, spread in metrics.get("floor_spread", {}).items()
        if spread.get("pearson_acg") is not None
    }


def _columns(genes: list[dict], best: str | None) -> list[dict[str, Any]]:
    """Columns of the gene table; its rows get their gain over the best floor."""
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
