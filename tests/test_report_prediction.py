"""The report of a predicted slide: what it claims and what it does not."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from fake_run import write_prediction, write_run
from test_report import page_of

from stexp.cli.report import main
from stexp.errors import InputError
from stexp.evaluation.predictions import is_of_a_slide
from stexp.reporting.prediction_page import worth
from stexp.reporting.report import write_report


def test_a_prediction_is_told_from_a_run_and_from_nothing(tmp_path: Path) -> None:
    assert is_of_a_slide(write_prediction(tmp_path / "slide", spots=20, genes=5) / "predictions.h5ad")
    assert not is_of_a_slide(write_run(tmp_path / "run", spots=20, genes=5) / "predictions.h5ad")
    assert not is_of_a_slide(tmp_path / "predictions.h5ad")


def test_it_shows_what_is_known_and_claims_no_truth(tmp_path: Path) -> None:
    folder = write_prediction(tmp_path / "slide", genes=40)
    predictions, report = ad.read_h5ad(folder / "predictions.h5ad"), write_report(folder)
    text, page = report.read_text(), page_of(report)
    assert "<title>S1.svs, predicted by mclstexp · stexp</title>" in text
    assert "<strong>Do not trust this prediction.</strong>" in text and "&lt;b&gt;training&lt;/b&gt;" in text
    assert "on held-out sections B1, B2" in text and 'id="scores"' not in text
    (section,) = page["sections"]
    assert section["layers"] == ["predicted", "uncertainty"] and section["patient"] is None
    rows = {row["gene"]: row for row in page["table"]["rows"]}
    predicted = predictions.layers["predicted"]
    for i, gene in enumerate(predictions.var_names):
        assert rows[gene]["mean"] == pytest.approx(predicted[:, i].mean(), rel=1e-3)
        assert rows[gene]["sd"] == pytest.approx(predicted[:, i].std(), rel=1e-3)
    first, unknown = rows["GENE0"], rows["GENE2"]
    assert first["expected_pearson"] == pytest.approx(predictions.var["expected_pearson"].iloc[0], abs=1e-3)
    assert first["expected_floor_name"] == "colour ridge"
    assert unknown["expected_pearson"] is None and not unknown["beats_floor"]


def test_without_checks_it_says_that_nothing_was_measured(tmp_path: Path) -> None:
    text = write_report(write_prediction(tmp_path / "slide", spots=20, genes=5, checks=False)).read_text()
    assert "Nothing was measured on this slide" in text and 'id="checks"' not in text


@pytest.mark.parametrize(("above", "most"), [([True, True, False], True), ([True, False, False], False)])
def test_worth_counts_genes_that_beat_their_floor(above: list[bool], most: bool) -> None:
    var = pd.DataFrame(
        {
            "expected_pearson": [0.1, 0.2, 0.4, np.nan],
            "beats_floor": [*above, False],
            "n_held_out_sections": [3, 3, 2, 0],
        }
    )
    text, good = worth(var)
    assert good == most
    assert f"On 3 held-out sections, {sum(above)} of 3 genes beat" in text and "median Pearson is 0.200" in text
    assert text.endswith("Of 1 gene the accuracy is not known.")
    assert worth(var.iloc[3:]) == ("No held-out section says how well any of these genes is predicted.", False)


def test_intervals_give_their_width(tmp_path: Path) -> None:
    folder = write_prediction(tmp_path / "slide", spots=30, genes=5)
    predictions = ad.read_h5ad(folder / "predictions.h5ad")
    predictions.layers["lower"] = predictions.layers["predicted"] - 0.5
    predictions.layers["upper"] = predictions.layers["predicted"] + 1
    predictions.var["coverage_measured"] = 0.87
    predictions.write_h5ad(folder / "predictions.h5ad")
    page = page_of(write_report(folder))
    assert page["sections"][0]["layers"] == ["predicted", "uncertainty", "interval"]
    assert page["table"]["rows"][0]["coverage_measured"] == pytest.approx(0.87)


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_prediction(tmp_path / "slide", spots=20, genes=5)
    (folder / "provenance.json").unlink()
    assert main([f"run={folder}"]) == 2
    assert "provenance.json does not exist" in capsys.readouterr().err
    predictions = ad.read_h5ad(folder / "predictions.h5ad")
    del predictions.var["expected_pearson"]
    predictions.write_h5ad(folder / "predictions.h5ad")
    with pytest.raises(InputError, match="has no var/expected_pearson"):
        write_report(folder)
