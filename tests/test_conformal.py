"""Intervals hold as often as they say on spots like those that calibrate, and say how often they do on others."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from exported_model import PANEL, exported, finished_run

from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.inference import model_folder
from stexp.inference.export import export
from stexp.inference.intervals import (
    Groups,
    calibrate,
    fit,
    group_spots,
    interval,
    measure_coverage,
)


def test_the_quantile_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    residual, spread = rng.exponential(size=(57, 5)), rng.random((57, 5))
    missing = rng.random((57, 5)) < 0.2
    residual[missing] = spread[missing] = np.nan
    spread[:, 3] = np.where(missing[:, 3], np.nan, 0)  # a gene without any spread
    quantile, offset = fit(residual, spread, 0.1)
    for gene in range(5):
        known = ~missing[:, gene]
        s0 = spread[known, gene].mean() or 1.0
        scores = sorted(residual[known, gene] / (spread[known, gene] + s0))
        assert offset[gene] == pytest.approx(s0)
        assert quantile[gene] == pytest.approx(scores[math.ceil((known.sum() + 1) * 0.9) - 1])


@pytest.mark.parametrize(("n", "known"), [(8, False), (9, True)])
def test_nine_spots_are_needed_for_nine_in_ten(n, known):
    quantile, _ = fit(np.arange(1.0, n + 1)[:, None], np.zeros((n, 1)), 0.1)
    assert quantile[0] == n if known else np.isnan(quantile[0])


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_new_spots_of_the_same_kind_are_covered_as_promised(alpha):
    # the bounds of Lei et al. 2018, theorem 2.2, for the mean over draws of both samples
    rng, n, genes = np.random.default_rng(1), 40, 4000
    spread = rng.gamma(2.0, size=(2, n, genes))
    residual = np.abs(rng.standard_t(4, size=(2, n, genes))) * spread
    quantile, offset = fit(residual[0], spread[0], alpha)
    inside = (residual[1] <= quantile * (spread[1] + offset)).mean()
    assert 1 - alpha - 0.005 < inside < 1 - alpha + 1 / (n + 1) + 0.005


def test_spread_makes_intervals_wide_where_errors_are_large():
    rng = np.random.default_rng(2)
    spread = np.where(np.arange(40_000) % 2, 1.0, 2.0)[:, None]
    residual = np.abs(rng.normal(size=spread.shape)) * spread
    inside = {}
    for name, known in (("spread", spread), ("residual", np.zeros_like(spread))):
        quantile, offset = fit(residual[:20_000], known[:20_000], 0.1)
        inside[name] = (residual <= quantile * (known + offset))[20_000:][spread[20_000:] == 2].mean()
    assert inside["residual"] < 0.82 < 0.84 < inside["spread"]


def test_coverage_of_a_group_is_measured_with_the_others():
    rng = np.random.default_rng(3)
    groups = np.repeat(["a", "b", "c"], 200)
    residual = np.abs(rng.normal(size=(600, 50)))
    spread = np.ones_like(residual)
    even = measure_coverage(residual, spread, groups, 0.1)
    assert np.abs(even.mean(axis=1) - 0.9).max() < 0.02
    residual[groups == "b"] *= 100
    shifted = measure_coverage(residual, spread, groups, 0.1).mean(axis=1)
    assert shifted[1] < 0.05, "its own errors had no part in its interval"
    assert shifted[[0, 2]].min() == 1, "those of the others had"
    quantile, offset = fit(residual, spread, 0.1)
    pooled = (residual <= quantile * (spread + offset))[groups == "b"].mean()
    assert pooled > 0.6, "which intervals that have seen the group do not show"


def test_an_interval_lies_around_its_prediction_and_never_below_nothing():
    genes = pd.DataFrame({"interval_quantile": [2.0, 2.0, np.nan], "interval_offset": [0.5, 0.1, 0.1]})
    predicted, spread = np.array([[3.0, 0.1, 1.0]]), np.array([[0.25, 0.0, 0.0]])
    lower, upper = interval(predicted, spread, genes, with_spread=True)
    np.testing.assert_allclose(lower, [[1.5, 0, np.nan]], rtol=1e-6)
    np.testing.assert_allclose(upper, [[4.5, 0.3, np.nan]], rtol=1e-6)
    lower, upper = interval(predicted, np.full((1, 3), np.nan), genes, with_spread=False)
    np.testing.assert_allclose(upper - lower, [[2.0, 0.3, np.nan]], rtol=1e-6)


def made_up(patients: str, sections: list[str], hold_out: str = "patient") -> Groups:
    """Groups of 100 held-out spots of each section; the letter of each section's patient."""
    xy = np.random.default_rng(0).random((100 * len(sections), 2))
    return group_spots(np.repeat(list(patients), 100), np.repeat(sections, 100), xy, hold_out)


@pytest.mark.parametrize(
    ("groups", "kind", "names", "note"),
    [
        (made_up("AABC", ["A1", "A2", "B1", "C1"]), "patients", ["A", "B", "C"], "3 patients"),
        (made_up("AA", ["A1", "A2"]), "sections", ["A1", "A2"], "one patient; a new patient may be covered less"),
        (made_up("A", ["A1"]), "halves", ["A1 (one half)", "A1 (other half)"], "optimistic for any other"),
        (
            made_up("AA", ["A1 (block1)", "A1 (block2)"], "block"),
            "sections",
            ["A1 (block1)", "A1 (block2)"],
            "trained on",
        ),
        (made_up("ABC", ["A1", "B1", "C1"], "section"), "patients", ["A", "B", "C"], "optimistic for a new one"),
    ],
)
def test_groups_are_patients_where_there_are_enough_else_sections_else_halves(groups, kind, names, note):
    rng, n = np.random.default_rng(1), len(groups.labels)
    arrays = rng.random((n, 3)), rng.random((n, 3)), np.full((n, 3), np.nan)
    table, facts = calibrate(
        lambda genes: tuple(x[:, : len(genes)] for x in arrays), ["X", "Y"], ["X", "Y", "Z"], groups, 0.1, False
    )
    assert facts["groups"] == kind and list(facts["coverage_by_group"]) == names
    assert note in facts["note"] and facts["spread"] is False
    assert table["coverage_measured"].between(0.7, 1).all() and facts["n_spots"] == n


@pytest.mark.parametrize("alpha", [1, 0, True, "0.1"])
def test_alpha_is_a_share(alpha):
    with pytest.raises(InputError, match=r"alpha=.*a number between 0 and 1 would fit"):
        calibrate(lambda genes: (), ["X"], ["X"], made_up("A", ["A1"]), alpha, False)


def test_a_model_keeps_the_intervals_of_its_held_out_section():
    found, before = model_folder.read(exported()), predictions.read(finished_run() / "predictions.h5ad")
    genes = found.genes.loc[found.facts["panel"]]
    quantile, offset = genes["interval_quantile"].to_numpy(), genes["interval_offset"].to_numpy()
    spread, truth = before.layers["uncertainty"], before.layers["observed"]
    np.testing.assert_allclose(offset, spread.mean(axis=0), rtol=1e-5)
    score = np.abs(truth - before.layers["predicted"]) / (spread + offset)
    rank = math.ceil((before.n_obs + 1) * 0.9)
    assert (np.abs((score <= quantile * (1 + 1e-5)).sum(axis=0) - rank) <= 1).all()
    assert found.facts["interval"]["groups"] == "halves" and "optimistic" in found.facts["interval"]["note"]
    outside = found.genes[~found.genes["in_panel"]]
    assert len(outside) == 200 - PANEL and outside["interval_quantile"].notna().all()
    assert abs(outside["coverage_measured"].mean() - 0.9) < 0.06


@pytest.mark.slow
def test_further_folds_calibrate_together_and_measure_between_their_sections(tmp_path):
    a, b = finished_run(), finished_run(fold="B")
    facts = export(a, tmp_path / "m", folds=[str(b)], alpha=0.2)
    assert facts["interval"]["alpha"] == 0.2 and facts["interval"]["groups"] == "sections"
    assert facts["interval"]["n_spots"] == sum(predictions.read(x / "predictions.h5ad").n_obs for x in (a, b))
    # what B1 shows of an interval from A1 alone, a slow way
    panels = [predictions.read(run / "predictions.h5ad").var_names for run in (a, b)]
    gene = panels[0].intersection(panels[1])[0]
    (truth_a, made_a, spread_a), (truth_b, made_b, spread_b) = (
        [x[gene].to_numpy() for x in (read.to_df("observed"), read.to_df("predicted"), read.to_df("uncertainty"))]
        for read in (predictions.read(run / "predictions.h5ad") for run in (a, b))
    )

    def covered(calibrating, covering):
        (truth, made, spread), (new_truth, new_made, new_spread) = calibrating, covering
        score = np.sort(np.abs(truth - made) / (spread + spread.mean()))
        q = score[math.ceil((len(score) + 1) * 0.8 - 1e-9) - 1]
        return (np.abs(new_truth - new_made) <= q * (new_spread + spread.mean())).mean()

    first, second = (truth_a, made_a, spread_a), (truth_b, made_b, spread_b)
    expected = (covered(first, second) + covered(second, first)) / 2
    assert model_folder.read(tmp_path / "m").genes.loc[gene, "coverage_measured"] == pytest.approx(expected, abs=1e-4)


def test_without_alpha_there_are_no_intervals(tmp_path):
    facts = export(finished_run(), tmp_path / "m", alpha=None)
    assert facts["interval"] is None
    assert "interval_quantile" not in model_folder.read(tmp_path / "m").genes
