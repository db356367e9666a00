from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree

from stexp.evaluation import chance
from stexp.evaluation.chance import beyond_chance
from stexp.evaluation.compare import bootstrap_interval
from stexp.evaluation.evidence import _gene_sets
from stexp.evaluation.intervals import covers, over_blocks, over_sections
from stexp.evaluation.metrics import CORRELATIONS, FOLLOWS_DEPTH, error_parts, pearson_per_gene, score_section
from stexp.evaluation.programmes import co_expressed_modules, set_scores
from stexp.evaluation.spatial import structural_similarity, structure
from stexp.evaluation.strata import strata

SIDE = 24
XY = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2) * 100.0


def smooth_maps(n: int, seed: int, sigma: float = 3.0) -> np.ndarray:
    """Maps over the grid of `XY` with spatial order, (Q, n)."""
    rng = np.random.default_rng(seed)
    maps = [ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), sigma).ravel() for _ in range(n)]
    return np.stack([each / each.std() for each in maps], axis=1)


def test_the_two_parts_of_an_error_are_those_of_the_definition_and_sum_to_it():
    rng = np.random.default_rng(0)
    y, p = rng.normal(2, 1, (50, 7)), rng.normal(1, 2, (50, 7))
    gene_mean, within = error_parts(y, p)
    for g in range(7):
        assert gene_mean[g] == pytest.approx((y[:, g].mean() - p[:, g].mean()) ** 2)
        centred = (p[:, g] - p[:, g].mean()) - (y[:, g] - y[:, g].mean())
        assert within[g] == pytest.approx(np.mean([c**2 for c in centred]))
    scores = score_section(y, p, np.arange(3))
    assert scores["mse_gene_mean"] + scores["mse_within_gene"] == pytest.approx(scores["mse"])
    exact = score_section(y, np.broadcast_to(y.mean(axis=0), y.shape), np.arange(3))
    assert exact["mse_gene_mean"] == pytest.approx(0) and exact["mse_within_gene"] == pytest.approx(
        y.var(axis=0).mean()
    )


def test_a_prediction_of_depth_alone_follows_depth():
    rng = np.random.default_rng(1)
    counts = rng.integers(10, 5000, 80)
    y, noise = rng.random((80, 5)), rng.random((80, 5))
    depth = np.log1p(counts)[:, None] * np.array([1, 2, 3, 4, 5.0])
    assert score_section(y, depth, np.arange(2), total_counts=counts)["follows_depth"] == pytest.approx(1)
    mean = noise.mean(axis=1)
    expected = np.corrcoef(mean, np.log1p(counts))[0, 1]
    assert score_section(y, noise, np.arange(2), total_counts=counts)["follows_depth"] == pytest.approx(expected)
    constant = np.broadcast_to(y.mean(axis=0), y.shape)
    assert score_section(y, constant, np.arange(2), total_counts=counts)["follows_depth"] == 0
    assert score_section(y, noise, np.arange(2), total_counts=np.full(80, 7))["follows_depth"] is None
    assert score_section(y, noise, np.arange(2))["follows_depth"] is None and FOLLOWS_DEPTH not in CORRELATIONS


def test_smooth_maps_that_have_nothing_to_do_with_each_other_are_not_beyond_chance():
    truth = smooth_maps(60, 0)
    unrelated, related = smooth_maps(60, 1), 0.6 * truth + 0.8 * smooth_maps(60, 2)
    none, some = beyond_chance([(truth, unrelated, XY)]), beyond_chance([(truth, related, XY)])
    assert none is not None and some is not None
    # spots as independent units call a third of the unrelated maps significant
    r = pearson_per_gene(truth, unrelated)
    naive = np.abs(r) * np.sqrt(len(XY)) > 1.96
    assert naive.mean() > 0.3
    assert (none.p < 0.05).mean() < 0.12
    assert (none.q < 0.05).sum() <= 1
    assert (some.q < 0.05).mean() > 0.5
    assert np.median(some.z) > 1.5


def test_moved_maps_correlate_as_the_score_says_constant_ones_too():
    truth, guess = smooth_maps(8, 3), smooth_maps(8, 4).astype(np.float32)
    guess[:, 1] = 0.5
    guess[:, 2] = np.float32(1) + np.where(np.arange(len(XY)) % 2, np.float32(1e-7), 0)  # constant but for rounding
    guess[:, 3], truth[:, 4] = 0, 0
    guess[7, 3] = truth[9, 4] = 1  # constant where a motion leaves that spot out
    outcome = beyond_chance([(truth, guess, XY)], n_draws=40, seed=3)
    assert outcome is not None
    sources = chance._motions(XY, 40, np.random.default_rng(3))
    assert sources is not None and any((source < 0).any() for source in sources)
    moved = [np.nan_to_num(pearson_per_gene(truth[at >= 0], guess[at[at >= 0]])) for at in sources]
    np.testing.assert_allclose(outcome.mean, np.mean(moved, axis=0), atol=1e-12)
    own = pearson_per_gene(truth, guess)
    np.testing.assert_allclose(outcome.p, (1 + (np.array(moved) >= own - 1e-12).sum(axis=0)) / 41, atol=1e-12)
    assert (outcome.mean[[1, 2]] == 0).all()


def test_chance_over_sections_is_of_the_mean_and_leaves_out_what_is_not_measured():
    truth, guess = smooth_maps(4, 3), smooth_maps(4, 4)
    lacking = truth.copy()
    lacking[:, 1] = np.nan
    outcome = beyond_chance([(truth, guess, XY), (lacking, guess, XY)])
    assert outcome is not None
    own = pearson_per_gene(truth, guess)
    np.testing.assert_allclose(outcome.pearson, own)
    flat = beyond_chance([(truth, np.zeros_like(guess), XY)])
    assert flat is not None and (flat.p == 1).all() and (flat.z == 0).all()
    everywhere = np.full_like(truth, np.nan)
    assert beyond_chance([(everywhere, guess, XY)]) is None
    assert beyond_chance([(truth[:3], guess[:3], XY[:3])]) is None


def test_the_interval_of_one_section_covers_the_score_and_narrows_with_spots():
    rng = np.random.default_rng(5)
    truth = smooth_maps(30, 6, sigma=1.0)
    guess = truth + rng.normal(size=truth.shape)
    interval = over_blocks([(truth, guess, XY)])
    assert interval is not None
    score = np.nanmean(pearson_per_gene(truth, guess))
    assert interval["low"] < score < interval["high"] and interval["high"] - interval["low"] < 0.2
    few = slice(0, 4 * SIDE)
    wider = over_blocks([(truth[few], guess[few], XY[few])])
    assert wider is not None
    assert wider["high"] - wider["low"] > interval["high"] - interval["low"]
    assert over_blocks([(truth, guess, XY), (truth[:20], guess[:20], XY[:20])]) is None
    two = over_blocks([(truth, guess, XY), (truth[few], guess[few], XY[few])])
    assert two is not None and two["high"] - two["low"] < wider["high"] - wider["low"]


def test_sums_of_blocks_give_the_correlation_of_the_spots_drawn():
    """Against the slow way: spots of the drawn blocks put together, and correlated."""
    from stexp.evaluation import intervals

    rng = np.random.default_rng(7)
    y, p, xy = rng.normal(size=(90, 3)), rng.normal(size=(90, 3)), rng.random((90, 2))
    blocks = intervals.KMeans(11, n_init=1, random_state=0).fit_predict(xy)
    times = np.random.default_rng(0).multinomial(11, np.full(11, 1 / 11), size=200)
    slow = []
    for each in times:
        rows = np.concatenate([np.tile(np.flatnonzero(blocks == b), n) for b, n in enumerate(each) if n])
        slow.append(np.mean([np.corrcoef(y[rows, g], p[rows, g])[0, 1] for g in range(3)]))
    interval = over_blocks([(y, p, xy)], n_draws=200)
    assert interval is not None
    np.testing.assert_allclose([interval["low"], interval["high"]], np.quantile(slow, [0.025, 0.975]), atol=1e-9)


def test_intervals_over_sections_are_of_patients_where_three_or_more_are():
    values = {f"S{n}": 0.1 * n for n in range(6)}
    patients = {f"S{n}": f"P{n // 2}" for n in range(6)}
    interval = over_sections(values, patients)
    low, high = bootstrap_interval(np.array(list(values.values())), np.array(list(patients.values())))
    assert interval == {"low": low, "high": high, "over": "patients", "n_units": 3, "covers": 0.75}
    one = over_sections({"S0": 0.1, "S1": 0.3, "S2": 0.2, "S3": None}, dict.fromkeys(["S0", "S1", "S2"], "P"))
    assert one is not None and (one["over"], one["n_units"], one["covers"]) == ("sections", 3, 0.75)
    two = over_sections({f"S{n}": 0.1 * n for n in range(4)}, {f"S{n}": "PQ"[n // 2] for n in range(4)})
    assert two is not None and (two["over"], two["n_units"]) == ("sections", 4) and two["covers"] < 0.75
    assert over_sections({"S0": 0.1, "S1": 0.2, "S2": None}, {}) is None


@pytest.mark.parametrize(("n", "kept"), [(3, False), (6, False), (3, True)], ids=str)
def test_how_often_an_interval_of_few_units_covers_the_truth(n, kept):
    """Against simulated normal values; the two patients that are kept have three sections each."""
    rng, held = np.random.default_rng(0), 0
    patients = np.repeat(["P", "Q"], n) if kept else np.arange(n).astype(str)
    for _ in range(600):
        low, high = bootstrap_interval(rng.normal(size=len(patients)), patients, n_draws=400)
        held += low <= 0 <= high
    expected = covers(len(patients), len(patients) - (2 if kept else 1))
    assert abs(held / 600 - expected) < 0.05 and expected < 0.9


def test_strata_hold_every_scored_gene_once_and_shares_leave_out_noise():
    rng = np.random.default_rng(8)
    ceiling = np.concatenate([np.full(10, 0.02), np.full(10, 0.2), np.full(10, 0.4), np.full(10, 0.8)])
    pearson = ceiling / 2
    pearson[0] = np.nan
    sections = {name: factor * pearson for name, factor in {"A": 0.9, "B": 1.0, "C": 1.1}.items()}
    genes, patients = pd.DataFrame({"pearson": pearson, "ceiling": ceiling}), {"A": "P", "B": "P", "C": "P"}
    rows = strata(genes, rng.random(40), sections, patients)
    for by in ("expression", "ceiling"):
        assert sum(row["n_genes"] for row in rows if row["by"] == by) == 39
    by_ceiling = [row for row in rows if row["by"] == "ceiling"]
    assert [row["n_genes"] for row in by_ceiling] == [9, 10, 10, 10]
    assert by_ceiling[0]["share"] is None and by_ceiling[0]["share_over"] is None
    for row in by_ceiling[1:]:
        assert row["share"] == pytest.approx(0.5) and row["share_over"] == "sections"
        assert row["share_covers"] < 0.8, "three sections are few"
        assert (row["share_low"], row["share_high"]) == pytest.approx((0.45, 0.55)), "sections are drawn, 0.9 to 1.1"
    for row in strata(genes, rng.random(40), {"A": sections["A"], "B": sections["B"]}, patients):
        assert row["share_low"] is None and row["share_over"] is None, "however many genes there are"


def test_modules_are_the_groups_that_expression_was_made_of():
    rng = np.random.default_rng(9)
    section = np.repeat(["a", "b"], 150)
    driver = rng.normal(size=(300, 3))
    group = np.repeat([0, 1, 2], 40)
    expression = driver[:, group] + 0.5 * rng.normal(size=(300, 120))
    expression[section == "b"] += 10 * rng.random(120)  # a difference between sections is no module
    expression[:, 5] = 1.0
    modules = co_expressed_modules(expression, section)
    assert modules[5] == 0
    pairs = {(g, m) for g, m in zip(np.delete(group, 5), np.delete(modules, 5), strict=True)}
    assert len(pairs) == 3


def test_a_set_scores_the_mean_of_its_standardised_genes():
    rng = np.random.default_rng(10)
    expression = rng.normal(size=(40, 6)) * [1, 100, 1, 1, 1, 1]
    expression[:, 3] = 2.0
    expression[:, 4] = np.nan
    genes = np.array([True, True, True, True, False, False])
    sets = {"two": [0, 1, 5], "flat": [3], "half": [2, 3], "unmeasured": [4]}
    scores = set_scores(expression, sets, genes)
    z = [(expression[:, g] - expression[:, g].mean()) / expression[:, g].std() for g in range(3)]
    np.testing.assert_allclose(scores[:, 0], (z[0] + z[1]) / 2)
    assert (scores[:, 1] == 0).all()
    np.testing.assert_allclose(scores[:, 2], z[2] / 2)
    assert np.isnan(scores[:, 3]).all()


def test_both_sides_of_a_set_have_the_same_genes():
    """Genes that one side lacks, full of another pattern on the other one, change no score of a set."""
    rng = np.random.default_rng(12)
    truth = rng.normal(size=(60, 4))
    guess = truth + 0.5 * rng.normal(size=truth.shape)
    genes = [f"g{n}" for n in range(4)]
    clean = _gene_sets({"set": genes[:2]}, genes, [(truth, guess, XY[:60])], {})
    truth[:, 2], guess[:, 3] = np.nan, np.nan
    for flat in (np.nan, 1.0):
        truth[:, 2] = flat
        (row,) = _gene_sets({"set": genes}, genes, [(truth, guess, XY[:60])], {"mean": [guess]})
        assert row["pearson"] == pytest.approx(clean[0]["pearson"]) == row["floors"]["mean"]
    (row,) = _gene_sets({"set": genes[2:]}, genes, [(truth, guess, XY[:60])], {})
    assert row["pearson"] is None


def test_blur_has_no_concordance_of_spatial_order():
    rng = np.random.default_rng(11)
    order = rng.uniform(0, 1, 40)
    truth = smooth_maps(40, 12) * order + rng.normal(size=(len(XY), 40)) * (1 - order)
    right = truth + 0.1 * rng.normal(size=truth.shape)
    tree = cKDTree(XY)
    near = tree.query(XY, k=60)[1]
    blurred = truth[near].mean(axis=1)
    same, blur = structure(truth, right, XY), structure(truth, blurred, XY)
    assert same["moran_concordance"] > 0.95 > 0.3 > blur["moran_concordance"]
    assert blur["moran_predicted"] > same["moran_predicted"]
    assert structure(np.ones((9, 2)), np.ones((9, 2)), XY[:9])["moran_concordance"] is None


def test_structural_similarity_is_its_formula():
    rng = np.random.default_rng(13)
    y, p = rng.random((60, 3)), rng.random((60, 3))
    y[:, 2] = 0
    got = structural_similarity(y, p)
    for g in range(2):
        a, b = y[:, g] / y[:, g].max(), p[:, g] / p[:, g].max()
        cov = np.cov(a, b, bias=True)
        want = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
        want *= (2 * cov[0, 1] + 9e-4) / (cov[0, 0] + cov[1, 1] + 9e-4)
        assert got[g] == pytest.approx(want)
    assert np.isnan(got[2]) and structural_similarity(y, y)[0] == pytest.approx(1)
    upside_down = structural_similarity(y, -y)
    assert (upside_down[:2] < 0.01).all(), "a negative of the map is no likeness"
    shifted = np.where(y > 0.5, y, -1.0)
    np.testing.assert_array_equal(structural_similarity(y, shifted), structural_similarity(y, shifted.clip(min=0)))
    assert np.isnan(structural_similarity(y - 0.5, p)).all(), "residuals have no maps from 0 to 1"
