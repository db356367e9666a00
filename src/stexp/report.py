"""``stexp-report run=runs/x``: one HTML file that shows what was predicted and what that is worth."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import anndata as ad

from stexp import InputError, report_pictures
from stexp.plots import is_oracle, score_chart
from stexp.predictions import read, read_json
from stexp.report_maps import make_maps
from stexp.report_page import LACKING, label, lacking, number, render, save, unit
from stexp.report_prediction import is_prediction, write_prediction_report

HELP = """\
usage: stexp-report run=<folder>

Writes <folder>/report.html: one file, which opens from disk without a network.

Of a run, scores beside floors and ceiling, audit, maps, genes, provenance. It needs what stexp-train
and stexp-score leave in the folder: predictions.h5ad, metrics.json, per_gene.csv, audit.json,
provenance.json. Of a slide that stexp-predict predicted, maps, genes with the accuracy to expect,
provenance. It needs predictions.h5ad and provenance.json. From pictures.h5, where that is there, come
the slide to zoom into and the tiles of the spots retrieved from.

examples: stexp-report run=runs/x
          stexp-report run=predictions/slide
"""

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


def verdict(metrics: dict[str, Any]) -> tuple[str, str, bool]:
    """What the numbers say, in words.

    Returns
    -------
    numbers
        The method's Pearson beside best floor, oracles and ceiling.
    statement
        Which floors it does not beat, on all genes and on the 50 highest.
    beats
        Whether it beats every floor on both; oracles do not count.
    """
    scores, floors, ceiling = metrics["scores"], metrics["floors"], metrics["ceiling"]
    acg, best = scores.get("pearson_acg"), best_floor(metrics)
    parts = [f"Pearson {number(acg)} over {metrics['n_genes']} genes"]
    parts += [f"best floor: {label(best)} {number(floors[best]['pearson_acg'])}"] if best else ["no floor"]
    parts += [f"{label(name)} {number(own.get('pearson_acg'))}" for name, own in floors.items() if is_oracle(name)]
    parts.append(f"counting-noise ceiling {number(ceiling.get('pearson_acg'))}")
    numbers = "; ".join(parts) + "."
    if best is None or acg is None:
        return numbers, "Without a score and a floor nothing can be said about skill.", False

    lost, asked = {}, [("pearson_acg", "all genes"), ("pearson_heg50", "the 50 highest")]
    for score, where in asked if _highest(metrics) else asked[:1]:
        own = scores.get(score)
        there = {
            name: values[score]
            for name, values in floors.items()
            if not is_oracle(name) and values.get(score) is not None
        }
        if not there:
            continue
        above = [name for name in sorted(there, key=lambda name: -there[name]) if own is None or there[name] >= own]
        lost[where] = ", ".join(f"{label(name)} ({number(there[name])})" for name in above)
    if not any(lost.values()):
        statement = f"It beats every floor (oracles aside), on {' and on '.join(lost)}."
    else:
        statement = " ".join(
            f"On {where} it does not beat {names}." if names else f"On {where} it beats every floor (oracles aside)."
            for where, names in lost.items()
        )
    pairs = [
        (section["scores"].get("pearson_acg"), section["floors"].get(best, {}).get("pearson_acg"))
        for section in metrics["sections"].values()
    ]
    pairs = [pair for pair in pairs if None not in pair]
    if len(pairs) > 1:
        wins = sum(own > floor for own, floor in pairs)
        statement += f" It is above {label(best)} in {wins} of {len(pairs)} sections."
    return numbers, statement, not any(lost.values())


def best_floor(metrics: dict[str, Any]) -> str | None:
    """Name of the floor with the highest Pearson over all genes, oracles left out."""
    there = {
        name: scores["pearson_acg"]
        for name, scores in metrics["floors"].items()
        if not is_oracle(name) and scores.get("pearson_acg") is not None
    }
    return max(there, key=there.__getitem__, default=None)


def changes(metrics: dict[str, Any]) -> str:
    """What was changed where a run was retrieved from again, as it is typed: ``k=50, genes=FASN+ERBB2``; else empty."""
    parts = []
    for key, value in metrics.get("chosen", {}).get("changed", {}).items():
        names = value if isinstance(value, list) else [value]
        parts.append(f"{key}={'+'.join(map(str, names[:3]))}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    return ", ".join(parts)


def _highest(metrics: dict[str, Any]) -> bool:
    """Whether the 50 highest genes are others than all genes."""
    return metrics["n_genes"] > 50


def _render(
    metrics: dict, audit: dict, provenance: dict, genes: list[dict], predictions: ad.AnnData, pictures: tuple
) -> str:
    about, best = predictions.uns["stexp"], best_floor(metrics)
    by_worth = sorted(genes, key=lambda row: math.inf if row["pearson"] is None else -row["pearson"])
    maps = make_maps(predictions, *pictures, by_worth=[row["gene"] for row in by_worth])
    numbers, statement, beats = verdict(metrics)
    heg = "Pearson HEG50" if _highest(metrics) else f"Pearson HEG50 (all {metrics['n_genes']})"
    charts = [score_chart(metrics, "pearson_acg", "Pearson, all considered genes (ACG)")]
    if _highest(metrics):
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


def main(argv: list[str] | None = None) -> int:
    """``stexp-report run=<folder>``: 0, or 2 after one line on what would fit."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0
    try:
        if len(argv) != 1 or not argv[0].removeprefix("run="):
            raise InputError("which run? give its folder and nothing else, as in: stexp-report run=runs/x")
        if not argv[0].startswith("run="):
            raise InputError(f"{argv[0]!r} is not understood; give run=<folder>, as in: stexp-report run=runs/x")
        report = write_report(argv[0].removeprefix("run="))
    except (InputError, OSError) as error:
        print(f"stexp-report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {report} ({report.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
