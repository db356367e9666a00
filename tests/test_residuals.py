"""A run whose truth is analytic Pearson residuals, with floors, ceiling and audit on it."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from demo_run import run

from stexp.errors import InputError
from stexp.evaluation.score import summary
from stexp.inference.references import bank_of
from stexp.runs.finished import FinishedRun
from stexp.runs.folder import RunFolder
from stexp.runs.scoring import score_run


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "residuals"
    run(demo, out, "protocol.truth=residuals", "image_encoder.frozen=true", "data.augmentation=none")
    return out


@pytest.mark.slow
def test_truth_floors_and_ceiling_are_those_of_residuals(folder: Path) -> None:
    section = next(section for section in FinishedRun(RunFolder(folder)).sections if section.name == "A1")
    whole = sc.experimental.pp.normalize_pearson_residuals(ad.AnnData(section.spots.X), inplace=False)["X"]
    predictions = ad.read_h5ad(folder / "predictions.h5ad")
    expected = whole[:, section.genes.get_indexer(predictions.var_names)]
    np.testing.assert_allclose(predictions.layers["observed"], expected, rtol=1e-3, atol=1e-4)
    level = np.log1p(1e4 * section.counts(predictions.var_names) / section.total_counts[:, None]).mean(axis=0)
    top = predictions.var["heg50_test"].to_numpy()
    assert top.sum() == 50 and level[top].min() >= level[~top].max() - 1e-5
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0.2 < metrics["ceiling"]["pearson_acg"] < 1
    assert all("follows_depth" in scores for scores in (metrics["scores"], *metrics["floors"].values()))
    again = score_run(folder)
    assert again["scores"] == pytest.approx(metrics["scores"]) and again["floors"].keys() == metrics["floors"].keys()
    report = (folder / "report.html").read_text()
    assert "truth <b>residuals</b>" in report and "truth residuals" in summary(metrics)
    assert "Pearson residual" in report and "Follows depth" in report
    items = {item["name"]: item for item in json.loads((folder / "audit.json").read_text())["items"]}
    assert not items["truth_scaled_by_test_section"]["leak"]


def test_single_references_do_not_hold_what_residuals_are_of(folder: Path) -> None:
    with pytest.raises(InputError, match="retrieves residuals"):
        bank_of(FinishedRun(RunFolder(folder)), {})
