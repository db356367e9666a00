"""Several predicted slides on one page and in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from stexp.evaluation.predictions import is_of_a_slide, read_annotations
from stexp.evaluation.records import SlideProvenance, read_json
from stexp.files import write_atomically, write_csv
from stexp.reporting.maps import thumbnail
from stexp.reporting.page import render
from stexp.reporting.prediction_page import checks_of

PREDICTIONS = (
    *("obs/section", "var/expected_pearson", "var/beats_floor"),
    *(f"uns/stexp/{key}" for key in ("slide", "model")),
)
OUTCOMES = ("do_not_trust", "caution", "ok")
"""Verdicts of the checks of a slide, the worst first."""
PICTURE_PX = 240


def write_index(folder: Path, failed: Mapping[str, str] | None = None) -> list[Path]:
    """Write ``index.html`` and ``summary.csv`` into a folder of predicted slides.

    Parameters
    ----------
    folder
        Its folders hold what was predicted, in this call or before.
    failed
        Slides that could not be predicted -> why.

    Returns
    -------
    list of Path
        The two files; none where the folder has fewer than two slides.
    """
    predicted = sorted(path.parent for path in folder.glob("*/predictions.h5ad") if is_of_a_slide(path))
    slides = [_summary(path) for path in predicted if (path / "provenance.json").is_file()]
    columns = dict.fromkeys(key for slide in slides for key in slide)
    slides += [
        {**columns, "slide": name, "outcome": "failed", "verdict": reason} for name, reason in (failed or {}).items()
    ]
    if len(slides) < 2:
        return []
    table = pd.DataFrame(slides).drop(columns="picture", errors="ignore")
    write_csv(table, folder / "summary.csv")
    page = render(
        "index.html.j2",
        name=folder.resolve().name,
        slides=slides,
        models=sorted({slide["model"] for slide in slides if slide.get("model")}),
        outcomes=Counter(slide["outcome"] for slide in slides),
    )
    write_atomically(folder / "index.html", page)
    return [folder / "index.html", folder / "summary.csv"]


def _summary(folder: Path) -> dict[str, Any]:
    """A row of the table, and a small picture of the slide as a data URI."""
    adata = read_annotations(folder / "predictions.h5ad", *PREDICTIONS)
    provenance = read_json(folder / "provenance.json", SlideProvenance)
    about, var, checks = adata.uns["stexp"], adata.var, checks_of(adata)
    measured = var["expected_pearson"].notna()
    flags = var.loc[measured, "beats_floor"].dropna()  # NA where too few patients were held out to say
    verdicts = {check["check"]: check.get("verdict", "ok") for check in checks}
    picture = thumbnail(adata, str(adata.obs["section"].iloc[0]), PICTURE_PX)
    return {
        "slide": str(about["slide"]),
        "folder": folder.name,
        "model": str(about["model"]),
        "outcome": next((outcome for outcome in OUTCOMES if outcome in verdicts.values()), "not checked"),
        "verdict": str(about.get("verdict", "")),
        "n_spots": adata.n_obs,
        "n_unlike_training": _sum(adata.obs, "out_of_distribution"),
        "n_genes": adata.n_vars,
        "n_genes_measured": int(measured.sum()),
        "n_genes_above_floor": int(flags.astype(bool).sum()) if len(flags) else None,
        "median_expected_pearson": float(var["expected_pearson"].median()) if measured.any() else None,
        "um_per_px": about.get("um_per_px"),
        **verdicts,
        "date": provenance["date"],
        "seconds": provenance["seconds"],
        "picture": picture and picture["uri"],
    }


def _sum(obs: pd.DataFrame, column: str) -> int | None:
    return int(obs[column].sum()) if column in obs else None
