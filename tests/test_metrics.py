from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from stexp.errors import InputError
from stexp.evaluation.metrics import (
    SCORES,
    mean_over_sections,
    pearson_given_depth,
    pearson_per_gene,
    score_section,
    spearman_per_gene,
    top_genes,
)

RNG = np.random.default_rng(0)


def counts_like(q: int = 60, g: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Expression with many zeros, hence ties, and predictions related to it."""
    observed = np.log1p(RNG.poisson(RNG.uniform(0.3, 3.0, g), (q, g))).astype(np.float32)
    return observed, (0.3 * observed + RNG.normal(size=(q, g))).astype(np.float32)


def test_correlations_are_those_of_scipy():
    observed, predicted = counts_like()
    pearson = [stats.pearsonr(o, p).statistic for o, p in zip(observed.T, predicted.T, strict=True)]
    spearman = [stats.spearmanr(o, p).statistic for o, p in zip(observed.T, predicted.T, strict=True)]
    np.testing.assert_allclose(pearson_per_gene(observed, predicted), pearson, atol=1e-6)
    np.testing.assert_allclose(spearman_per_gene(observed, predicted), spearman, atol=1e-12)


@pytest.mark.parametrize("correlation", [pearson_per_gene, spearman_per_gene])
def test_constant_and_unmeasured_genes(correlation):
    observed, predicted = counts_like()
    observed[:, 0] = 0.7
    observed[:, 1] = np.nan
    predicted[:, 1] = np.nan  # nothing to predict where nothing was measured
    predicted[:, 2] = 3.0
    predicted[::2, 3] = np.nextafter(np.float32(3.0), np.float32(4.0))  # rounding of a mean over neighbours
    predicted[1::2, 3] = 3.0
    r = correlation(observed, predicted)
    assert np.isnan(r[:2]).all()
    assert (r[2:4] == 0).all()
    assert np.isfinite(r[4:]).all() and (r[4:] != 0).all()


def test_a_section_of_one_spot_has_no_correlation():
    scores = score_section(np.ones((1, 3)), np.zeros((1, 3)), np.array([0]))
    assert scores["pearson_acg"] is scores["spearman_acg"] is scores["r2"] is None
    assert scores["mse"] == 1 and scores["n_constant_genes"] == 3


@given(
    arrays(np.float64, (7, 2), elements=st.floats(-100, 100).map(lambda x: round(x, 3))),
    arrays(np.float64, (7, 2), elements=st.floats(-100, 100).map(lambda x: round(x, 3))),
    st.floats(0.1, 50),
    st.floats(-50, 50),
)
def test_bounded_symmetric_and_affine_invariant(observed, predicted, scale, shift):
    for correlation in (pearson_per_gene, spearman_per_gene):
        r = correlation(observed, predicted)
        varies = np.ptp(observed, axis=0) > 0
        assert (np.isnan(r) == ~varies).all()
        assert (np.abs(r[varies]) <= 1).all()
        np.testing.assert_allclose(correlation(observed, -predicted), -r, atol=1e-9)
    both = varies & (np.ptp(predicted, axis=0) > 0)
    r = pearson_per_gene(observed, predicted)[both]
    np.testing.assert_allclose(pearson_per_gene(predicted, observed)[both], r, atol=1e-9)
    np.testing.assert_allclose(pearson_per_gene(observed, scale * predicted + shift)[both], r, atol=1e-6)
    np.testing.assert_allclose(
        spearman_per_gene(observed, np.exp(predicted / 50))[both],
        spearman_per_gene(observed, predicted)[both],
        atol=1e-9,
    )


def test_scores_of_a_section_against_slow_versions():
    observed, predicted = counts_like()
    observed[:, 0], observed[:, 1] = np.nan, 0.5
    heg = top_genes(observed.mean(axis=0), n=3)
    total = np.random.default_rng(5).integers(50, 5000, len(observed))
    scores = score_section(observed, predicted, heg, total_counts=total)
    line = np.stack([np.ones(len(total)), np.log1p(total)], axis=1)

    slow = {key: [] for key in ("pearson", "heg", "depth", "spearman", "r2", "ccc", "rvd", "squared", "absolute")}
    for gene in range(1, 12):
        o, p = observed[:, gene].astype(float), predicted[:, gene].astype(float)
        slow["squared"] += list((o - p) ** 2)
        slow["absolute"] += list(abs(o - p))
        slow["rvd"].append(((p.var() - o.var()) / (o.var() + 0.01)) ** 2)
        if gene == 1:
            continue
        slow["pearson"].append(stats.pearsonr(o, p).statistic)
        o_rest, p_rest = (values - line @ np.linalg.lstsq(line, values, rcond=None)[0] for values in (o, p))
        slow["depth"].append(stats.pearsonr(o_rest, p_rest).statistic)
        slow["spearman"].append(stats.spearmanr(o, p).statistic)
        if gene in heg:
            slow["heg"].append(slow["pearson"][-1])
        slow["r2"].append(1 - ((o - p) ** 2).sum() / ((o - o.mean()) ** 2).sum())
        covariance = np.cov(o, p, ddof=0)
        slow["ccc"].append(2 * covariance[0, 1] / (covariance[0, 0] + covariance[1, 1] + (o.mean() - p.mean()) ** 2))
    mean = {key: np.mean(values) for key, values in slow.items()}
    expected = {
        "pearson_acg": mean["pearson"],
        "pearson_heg50": mean["heg"],
        "pearson_given_depth": mean["depth"],
        "spearman_acg": mean["spearman"],
        "follows_depth": stats.pearsonr(predicted[:, 1:].mean(axis=1), np.log1p(total)).statistic,
        "mse": mean["squared"],
        "mse_gene_mean": np.mean((observed[:, 1:].mean(axis=0) - predicted[:, 1:].mean(axis=0)) ** 2),
        "mse_within_gene": np.mean((predicted[:, 1:] - observed[:, 1:]).var(axis=0)),
        "mae": mean["absolute"],
        "rmse": mean["squared"] ** 0.5,
        "r2": mean["r2"],
        "ccc": mean["ccc"],
        "rvd": mean["rvd"],
        "n_constant_genes": 1,
    }
    assert scores == pytest.approx(expected, abs=1e-6)
    assert set(scores) == {*SCORES, "n_constant_genes"}


def test_perfect_prediction():
    observed, _ = counts_like()
    total = np.arange(len(observed))
    scores = score_section(observed, observed, np.ones(12, bool), total_counts=total)
    follows = stats.pearsonr(observed.astype(float).mean(axis=1), np.log1p(total)).statistic
    assert scores.pop("follows_depth") == pytest.approx(follows)
    assert scores == pytest.approx(
        dict.fromkeys(("pearson_acg", "pearson_heg50", "pearson_given_depth", "spearman_acg", "r2", "ccc"), 1.0)
        | dict.fromkeys(("mse", "mse_gene_mean", "mse_within_gene", "mae", "rmse", "rvd", "n_constant_genes"), 0.0)
    )


def test_depth_alone_predicts_nothing_once_depth_is_given():
    """Genes that are shares of the counts of a spot, and a prediction that is its depth, in float32 as runs keep it."""
    draws = np.random.default_rng(0)
    total = draws.integers(20, 20_000, 300)
    share = draws.uniform(0.001, 0.01, 40) * np.exp(draws.normal(0, 0.5, (300, 40)))
    observed = np.log1p(1e4 * draws.poisson(share * total[:, None]) / total[:, None])
    depth = np.broadcast_to(3 * np.log1p(total)[:, None], observed.shape).astype(np.float32)
    assert pearson_per_gene(observed, depth).mean() > 0.15
    assert np.array_equal(pearson_given_depth(observed, depth, total), np.zeros(40))
    # what follows the shares keeps its skill, with depth mixed in or not
    skill = pearson_given_depth(observed, share, total)
    assert skill.mean() > 0.3
    np.testing.assert_allclose(pearson_given_depth(observed, share + depth, total), skill, atol=1e-4)
    # where depth does not vary it explains nothing
    same = np.full(300, 1000)
    np.testing.assert_allclose(
        pearson_given_depth(observed, share, same), pearson_per_gene(observed, share), atol=1e-12
    )


def test_predictions_without_scale_have_no_errors():
    observed, predicted = counts_like()
    scores = score_section(observed, predicted, np.arange(3), errors=False)
    assert [scores[key] for key in ("mse", "mae", "rmse", "r2", "ccc", "rvd")] == [None] * 6
    assert scores["pearson_acg"] == score_section(observed, predicted, np.arange(3))["pearson_acg"]


def test_sections_are_averaged_and_not_pooled():
    """A prediction that knows only which section is deep scores nothing, though pooled it looks good."""
    sections = [(RNG.normal(level, 1, (40, 5)), level + 0.01 * RNG.normal(size=(40, 5))) for level in (0, 10)]
    scores = mean_over_sections([score_section(o, p, np.arange(5)) for o, p in sections])
    pooled = pearson_per_gene(*(np.concatenate(each) for each in zip(*sections, strict=True)))
    assert pooled.mean() > 0.9
    assert abs(scores["pearson_acg"]) < 0.25
    assert "n_constant_genes" not in scores


def test_mean_over_sections_of_missing_scores():
    scores = [{"pearson_acg": 0.2, "mse": None}, {"pearson_acg": None, "mse": None}, {"pearson_acg": 0.4, "mse": None}]
    assert mean_over_sections(scores) == {"pearson_acg": pytest.approx(0.3), "mse": None}
    with pytest.raises(InputError, match="no section"):
        mean_over_sections([])


def test_top_genes_are_stable():
    assert top_genes(np.array([1.0, 3.0, np.nan, 3.0, 2.0]), n=3).tolist() == [1, 3, 4]
    assert top_genes(np.zeros(60)).tolist() == list(range(50))


def test_what_cannot_be_scored_is_refused():
    observed, predicted = counts_like()
    with pytest.raises(InputError, match="must both be spots x genes"):
        pearson_per_gene(observed, predicted[:, :-1])
    predicted[3, 4] = np.nan
    with pytest.raises(InputError, match="predictions of 1 of 12 measured genes are NaN"):
        score_section(observed, predicted, np.arange(3))
