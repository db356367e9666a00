from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from stexp.data.genes import normalise, read_panel
from stexp.data.readers import her2st
from stexp.errors import InputError
from stexp.evaluation.floors import (
    NO_SCALE,
    ORACLES,
    SpotTable,
    ceiling_per_gene,
    colour_statistics,
    mean_over_seeds,
    predict_floors,
    spread_over_seeds,
    unit_square,
)
from stexp.evaluation.metrics import mean_over_sections, pearson_per_gene, score_section, top_genes
from stexp.evaluation.ridge import Projection, RidgeProbe, ridge_slope
from stexp.protocol import Protocol

STRICT = Protocol("strict")
PAPER = Protocol("paper", library="panel", log="log10", truth="gene")


def spot_table(sections: dict[str, int], seed: int) -> SpotTable:
    """Expression that follows colour and features, except in the last gene."""
    rng = np.random.default_rng(seed)
    n = sum(sections.values())
    colour, features, xy = rng.normal(size=(n, 9)), rng.normal(size=(n, 20)), rng.random((n, 2))
    signal = np.stack([colour[:, 0], features[:, 1], (xy[:, 0] - 0.5) ** 2 * 12, np.zeros(n)], axis=1)
    names = np.repeat(list(sections), list(sections.values()))
    return SpotTable(
        expression=(2 + signal + 0.3 * rng.normal(size=(n, 4))).astype(np.float32),
        log_depth=rng.normal(8, 1, n),
        section=names,
        patient=np.array([name[0] for name in names]),
        xy=xy,
        colour=colour,
        features=features,
    )


@pytest.fixture(scope="module")
def tables() -> tuple[SpotTable, SpotTable]:
    return spot_table({"A1": 300, "A2": 200}, seed=0), spot_table({"B1": 90, "B2": 60}, seed=1)


def test_each_floor_finds_what_it_looks_at(tables):
    train, test = tables
    floors = predict_floors(train, test)
    assert set(floors) == {
        "mean",
        "nearest_section",
        "depth_oracle",
        "coordinates",
        "colour_ridge",
        "knn_features",
        "ridge_features",
    }
    assert {ORACLES, NO_SCALE} == {frozenset({"depth_oracle"})}
    assert all(values.shape == (150, 4) and values.dtype == np.float32 for values in floors.values())
    r = {name: pearson_per_gene(test.expression, values) for name, values in floors.items()}
    assert r["colour_ridge"][0] > 0.9 > 0.5 > r["ridge_features"][0]
    assert min(r["ridge_features"][1], r["knn_features"][1]) > 0.8 > 0.5 > r["colour_ridge"][1]
    assert r["coordinates"][2] > 0.9
    assert max(abs(values[3]) for values in r.values()) < 0.3
    np.testing.assert_allclose(floors["mean"], np.tile(train.expression.mean(axis=0), (150, 1)), rtol=1e-6)
    np.testing.assert_allclose(floors["depth_oracle"], np.tile(test.log_depth[:, None], 4), rtol=1e-6)


def test_no_floor_looks_at_test_expression_and_only_the_oracle_at_depth(tables):
    train, test = tables
    floors = predict_floors(train, test)
    others = predict_floors(train, replace(test, expression=test.expression * 0 - 1, log_depth=test.log_depth[::-1]))
    differ = {name for name in floors if not np.array_equal(floors[name], others[name])}
    assert differ == ORACLES


def test_nearest_section_is_by_mean_colour(tables):
    train, test = tables
    colour = train.colour.copy()
    colour[train.section == "A2"] += 5
    query = test.colour.copy()
    query[test.section == "B2"] += 4
    floor = predict_floors(replace(train, colour=colour), replace(test, colour=query))["nearest_section"]
    for here, nearest in (("B1", "A1"), ("B2", "A2")):
        expected = train.expression[train.section == nearest].mean(axis=0)
        np.testing.assert_allclose(
            floor[test.section == here], np.tile(expected, ((test.section == here).sum(), 1)), rtol=1e-5
        )


def test_only_floors_whose_inputs_exist(tables):
    train, test = tables
    floors = predict_floors(replace(train, colour=None), replace(test, features=None))
    assert set(floors) == {"mean", "depth_oracle", "coordinates"}


def test_knn_against_scikit_learn(tables):
    train, test = tables
    scaler = StandardScaler().fit(train.features)
    search = NearestNeighbors(n_neighbors=50, metric="cosine").fit(scaler.transform(train.features))
    neighbours = search.kneighbors(scaler.transform(test.features), return_distance=False)
    expected = train.expression[neighbours].mean(axis=1)
    np.testing.assert_allclose(predict_floors(train, test)["knn_features"], expected, rtol=1e-5)


def test_ridge_is_a_ridge_with_a_sensible_penalty(tables):
    train, test = tables
    x = StandardScaler().fit_transform(train.features)
    x_test, y = test.features, train.expression.astype(float)
    ours = y.mean(axis=0) + x_test @ ridge_slope(x, y)
    grid = len(x) * np.logspace(-6, 4, 41)
    distance = [np.abs(Ridge(alpha).fit(x, y).predict(x_test) - ours).max() for alpha in grid]
    assert min(distance) < 1e-8

    def left_out(alpha: float) -> float:
        design = np.c_[np.ones(len(x)), x]
        hat = design @ np.linalg.solve(design.T @ design + alpha * np.diag([0.0] + [1.0] * x.shape[1]), design.T)
        return (((y - hat @ y) / (1 - np.diag(hat))[:, None]) ** 2).mean()

    # leave-one-out, done slowly, agrees with the penalty that generalised cross-validation chose
    errors = np.array([left_out(alpha) for alpha in grid])
    assert errors[np.argmin(distance)] < 1.001 * errors.min()


def test_ridge_on_noise_falls_back_to_the_mean():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 60)), rng.normal(size=(40, 30))
    predicted = y.mean(axis=0) + rng.normal(size=(50, 60)) @ ridge_slope(x - x.mean(axis=0), y)
    assert np.abs(predicted - y.mean(axis=0)).mean() < 0.2  # against 0.8 of ordinary least squares


def test_genes_not_measured_in_a_training_section(tables):
    train, test = tables
    expression = train.expression.copy()
    expression[train.section == "A2", 0] = np.nan
    expression[:, 1] = np.nan
    floors = predict_floors(replace(train, expression=expression), test)
    assert all(np.isfinite(values).all() for values in floors.values())
    assert floors["mean"][0, 0] == pytest.approx(train.expression[train.section == "A1", 0].mean(), rel=1e-5)
    assert (floors["mean"][:, 1] == 0).all()


def test_tables_that_do_not_fit_are_refused(tables):
    train, test = tables
    with pytest.raises(InputError, match="4 genes in training, 3 in test"):
        predict_floors(train, replace(test, expression=test.expression[:, :3]))
    with pytest.raises(InputError, match="150 spots have expression, 149 have colour"):
        replace(test, colour=test.colour[1:])


def test_unit_square():
    assert unit_square(np.array([[10, 4], [20, 4], [15, 4]])).tolist() == [[0, 0], [1, 0], [0.5, 0]]


def test_colour_statistics_against_scipy():
    tiles = np.random.default_rng(0).integers(0, 256, (4, 9, 11, 3)).astype(np.uint8) // np.array([1, 2, 5], np.uint8)
    tiles[3] = (200, 100, 255)
    pixels = tiles.reshape(4, -1, 3).astype(float)
    found = colour_statistics(tiles)
    np.testing.assert_allclose(found[:, :3], pixels.mean(axis=1))
    np.testing.assert_allclose(found[:, 3:6], pixels.std(axis=1), atol=1e-12)
    np.testing.assert_allclose(found[:3, 6:], stats.skew(pixels[:3], axis=1))
    assert found[3].tolist() == [200, 100, 255, 0, 0, 0, 0, 0, 0]
    with pytest.raises(InputError, match="uint8"):
        colour_statistics(tiles.astype(float))


def test_ceiling_is_what_a_perfect_model_reaches():
    """On simulated counts the true rates correlate with the observed expression as highly as the ceiling says."""
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(0, 0.6, (600, 40))) * np.geomspace(0.05, 60, 40)
    rest = rng.poisson(30_000, 600)
    counts = rng.poisson(rate).astype(float)
    total = counts.sum(axis=1) + rest
    reached = pearson_per_gene(normalise(counts, total, STRICT), normalise(rate, rate.sum(axis=1) + 30_000, STRICT))
    ceiling = ceiling_per_gene(counts, total, STRICT)
    frequent = counts.mean(axis=0) > 1  # counts of 0 and 1 leave the halves too little to agree on
    assert np.abs(ceiling - reached)[frequent].max() < 0.06
    assert ceiling[-1] > 0.95 and ceiling[0] < 0.5


def test_ceiling_of_constant_missing_and_noise_genes():
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (400, 4)).astype(float)
    counts[:, 0], counts[:, 1] = 0, np.nan
    total = np.full(400, 1000.0)
    ceiling = ceiling_per_gene(counts, total, STRICT)
    assert np.isnan(ceiling[:2]).all()
    assert (ceiling[2:] < 0.35).all() and (ceiling[2:] >= 0).all()
    np.testing.assert_array_equal(ceiling, ceiling_per_gene(counts, total, STRICT))
    with pytest.raises(InputError, match="more counts in the panel"):
        ceiling_per_gene(counts, total * 0, STRICT)


@pytest.fixture(scope="module")
def her2st_sections():
    root = Path(os.environ["STEXP_DATA"])
    sizes = dict(A=6, B=6, C=6, D=6, E=3, F=3, G=3)
    names = [f"{patient}{i}" for patient, n in sizes.items() for i in range(1, n + 1)]
    sections = her2st.read_her2st(root / "her2st", names[1:])
    assert len(sections) == 32 and sum(map(len, sections)) == 11_548
    panel = read_panel(root / "gene_lists" / "her2st_785.txt")
    return [(section.name, section.counts(panel), section.total_counts) for section in sections]


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    ("truth", "acg", "heg", "mse", "mae"),
    [("gene", 0.3037, 0.5810, 0.7115, 0.6716), ("spot", 0.2028, 0.2784, 0.3203, 0.4410)],
)
def test_depth_and_mean_on_her2st(her2st_sections, truth, acg, heg, mse, mae):
    """What sequencing depth and the training mean score on the paper's 32 sections and 785 genes.

    Depth is over the transcriptome, the 50 highest genes are by the section's own truth, the training mean is over
    the spots of the other 31 sections.
    """
    observed = [normalise(counts, total, PAPER, truth) for _, counts, total in her2st_sections]
    sums, sizes = sum(y.sum(axis=0, dtype=float) for y in observed), sum(map(len, observed))
    depth_scores, mean_scores = [], []
    for (_, _, total), y in zip(her2st_sections, observed, strict=True):
        highest = top_genes(y.mean(axis=0))
        depth = np.repeat(np.log1p(total)[:, None], y.shape[1], axis=1)
        mean = np.tile((sums - y.sum(axis=0, dtype=float)) / (sizes - len(y)), (len(y), 1))
        depth_scores.append(score_section(y, depth, highest, errors=False))
        mean_scores.append(score_section(y, mean, highest))
    depth, mean = mean_over_sections(depth_scores), mean_over_sections(mean_scores)
    found = [depth["pearson_acg"], depth["pearson_heg50"], mean["mse"], mean["mae"]]
    assert found == pytest.approx([acg, heg, mse, mae], abs=6e-5)
    assert mean["pearson_acg"] == 0


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "gene_wise", "spot_wise"),
    [
        ("B4", (0.504, 0.712), (0.221, 0.289)),
        ("C2", (0.371, 0.680), (0.144, 0.162)),
        ("C3", (0.365, 0.641), (0.1313, 0.1251)),
    ],
)
def test_depth_on_single_sections(her2st_sections, name, gene_wise, spot_wise):
    counts, total = next((counts, total) for each, counts, total in her2st_sections if each == name)
    depth = np.repeat(np.log1p(total)[:, None], counts.shape[1], axis=1)
    for protocol, expected in ((PAPER, gene_wise), (STRICT, spot_wise)):
        truth = normalise(counts, total, protocol)
        scores = score_section(truth, depth, top_genes(truth.mean(axis=0)), errors=False)
        assert (scores["pearson_acg"], scores["pearson_heg50"]) == pytest.approx(expected, abs=6e-4)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "acg", "heg"),
    [
        ("B4", 0.40, 0.63),
        ("C2", 0.41, 0.72),
        ("C3", 0.42, 0.75),
        ("C6", 0.40, 0.75),
        ("A2", 0.35, 0.58),
        ("D1", 0.36, 0.63),
        ("F1", 0.30, 0.46),
    ],
)
def test_ceiling_on_her2st(her2st_sections, name, acg, heg):
    counts, total = next((counts, total) for each, counts, total in her2st_sections if each == name)
    ceiling = ceiling_per_gene(counts, total, STRICT)
    highest = top_genes(normalise(counts, total, STRICT).mean(axis=0))
    assert (np.nanmean(ceiling), np.nanmean(ceiling[highest])) == pytest.approx((acg, heg), abs=0.02)


def test_the_command_leaves_its_table(tmp_path, monkeypatch, capsys) -> None:
    from stexp.cli import floors as command

    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    arguments = [f"data.root={tmp_path / 'demo'}", "data.reader.patients=2", "data.reader.sections_per_patient=1"]
    monkeypatch.setattr("sys.argv", ["stexp-floors", *arguments, f"output_dir={tmp_path / 'out'}"])
    command.main()
    facts = json.loads((tmp_path / "out" / "floors.json").read_text())
    assert facts["sections"] == ["A1", "B1"] and facts["protocol"]["name"] == "strict"
    table = pd.read_csv(tmp_path / "out" / "floors.csv", index_col="floor")
    assert list(table.index) == list(facts["scores"]) and "ceiling" in table.index
    assert table.loc["mean", "mse"] == pytest.approx(facts["scores"]["mean"]["mse"], rel=1e-5)
    assert f"{facts['scores']['mean']['mse']:.4f}" in capsys.readouterr().out


def test_random_features_are_the_probe_of_ridge_features_a_prediction_for_each_seed(tables):
    train, test = tables
    rng = np.random.default_rng(2)
    whole = [(rng.normal(3, 5, (500, 30)), rng.normal(3, 5, (150, 30))) for _ in range(2)]
    seen = replace(train, random=[Projection.fit(a, 10).of(a) for a, _ in whole])
    floors = predict_floors(seen, replace(test, random=[Projection.fit(a, 10).of(b) for a, b in whole]))
    for seed, (a, b) in enumerate(whole):
        expected = RidgeProbe.fit(a, train.expression.astype(np.float64), 10).predict(b)
        np.testing.assert_allclose(floors[f"random_features_seed{seed}"], expected, rtol=1e-4)
    with pytest.raises(InputError, match="random features"):
        replace(train, random=[whole[0][1]])


def test_a_floor_of_several_seeds_has_their_mean_and_spread():
    scores = {
        "mean": {"mse": 2.0},
        "random_features_seed0": {"mse": 1.0},
        "random_features_seed1": {"mse": 4.0},
        "random_features_seed2": {"mse": 1.0},
    }
    assert mean_over_seeds(scores) == {"mean": {"mse": 2.0}, "random_features": {"mse": 2.0}}
    assert spread_over_seeds(scores) == {"random_features": {"mse": pytest.approx(3**0.5)}}
