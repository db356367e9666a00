"""What is shown of a section and what is not, interpolation, and the methods that complete it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sections import make_section, make_sections

from stexp.completion.genes import knn_reference, reference_mean, ridge_genes, ridge_neighbours
from stexp.completion.graph import masked_genes, masked_graph
from stexp.completion.image import retrieval, ridge_features, ridge_kriging
from stexp.completion.interpolation import interpolate
from stexp.completion.kriging import Kriging, Variogram, in_folds, kriging_weights
from stexp.completion.methods import FLOORS, METHODS, chosen_methods, complete
from stexp.completion.problem import Problem, gene_problem, other_sections, spot_problem
from stexp.completion.score import judge, score
from stexp.completion.shown import shown_genes, shown_spots, square_array
from stexp.completion.spots import kriging, nearest
from stexp.completion.tasks import Completed, GeneTask, SpotTask, choose, out_of_fold
from stexp.completion.transformer import grid_transformer
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson, pearson_per_gene, score_section
from stexp.protocol import Protocol

STRICT = Protocol("strict")
PANEL = [f"g{i:02d}" for i in range(30)]
SQUARE = np.stack(np.meshgrid(np.arange(12), np.arange(10)), axis=-1).reshape(-1, 2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[Section]:
    """A1, A2, B1, B2; 64 spots each, without images."""
    return make_sections(tmp_path_factory.mktemp("cohort"), patients=2, n_spots=64, image=False)


def looks(sections: list[Section]) -> dict[str, np.ndarray]:
    """Features of the tiles of all sections, made up."""
    rng = np.random.default_rng(5)
    return {section.name: rng.normal(size=(len(section), 8)) for section in sections}


def posed(sections: list[Section], known: str, **options) -> Problem:
    others = other_sections(sections[0], sections, "patients")
    if known == "genes":
        return gene_problem(sections[0], others, STRICT, PANEL, share=0.5, **options)
    return spot_problem(sections[0], others, STRICT, PANEL, features=looks(sections), share=0.4, **options)


def field_of(seed: int = 0, noise: float = 0.2, genes: int = 20) -> np.ndarray:
    """Smooth maps on `SQUARE`, (120, genes)."""
    rng = np.random.default_rng(seed)
    covariance = np.exp(-np.square(cdist(SQUARE, SQUARE)) / (2 * 2.0**2)) + 1e-6 * np.eye(len(SQUARE))
    return np.linalg.cholesky(covariance) @ rng.normal(size=(len(SQUARE), genes)) + noise * rng.normal(
        size=(len(SQUARE), genes)
    )


def spot_task(values: np.ndarray, shown: np.ndarray, features: np.ndarray | None = None, **more) -> SpotTask:
    """A task on `SQUARE` without references."""
    task = SpotTask(
        SQUARE.astype(float),
        SQUARE,
        shown,
        values[shown],
        features,
        np.empty((0, values.shape[1])),
        None,
        np.empty(0, str),
        np.empty((0, 2)),
    )
    return replace(task, **more)


# ---- what is shown


@pytest.mark.parametrize("pattern", ["random", "corner", "strip"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_spots_is_shown(pattern: str, share: float) -> None:
    shown = shown_spots(SQUARE, pattern, share, seed=3)
    assert shown.shape == (120,) and shown.sum() == round(share * 120)
    assert np.array_equal(shown, shown_spots(SQUARE, pattern, share, seed=3))


def test_seeds_draw_other_spots_and_genes() -> None:
    assert len({shown_spots(SQUARE, "random", 0.5, seed).tobytes() for seed in range(5)}) == 5
    assert len({shown_genes(40, 0.5, seed).tobytes() for seed in range(5)}) == 5
    assert shown_genes(40, 0.25, 0).sum() == 10


def test_a_grid_is_every_second_row_and_column() -> None:
    shown = shown_spots(SQUARE, "grid", None, seed=0)
    assert shown.sum() == 30
    assert all(np.unique(np.diff(np.unique(SQUARE[shown][:, axis]))).tolist() == [2] for axis in (0, 1))


def test_a_hexagonal_array_is_a_square_one_with_moved_rows() -> None:
    hexagonal = np.array([(2 * column + row % 2, row) for row in range(6) for column in range(9)])
    expected = np.array([(column, row) for row in range(6) for column in range(9)])
    assert np.array_equal(square_array(hexagonal), expected)
    assert np.array_equal(square_array(SQUARE), SQUARE)


def test_a_corner_or_a_strip_is_hidden_in_one_piece() -> None:
    corner = SQUARE[~shown_spots(SQUARE, "corner", 0.75, seed=1)]
    assert np.ptp(corner, axis=0).max() <= 6 and any(
        np.array_equal(corner.min(axis=0) == SQUARE.min(axis=0), at) for at in ([a, b] for a in (0, 1) for b in (0, 1))
    )
    hidden = ~shown_spots(SQUARE, "strip", 0.7, seed=1)
    extents = np.ptp(SQUARE[hidden], axis=0) / np.ptp(SQUARE, axis=0)
    assert extents.max() == 1 and extents.min() < 0.5
    across = extents.argmin()
    beside = SQUARE[~hidden][:, across]
    assert beside.min() < SQUARE[hidden][:, across].min() and beside.max() > SQUARE[hidden][:, across].max()


@pytest.mark.parametrize(
    ("pattern", "share", "says"), [("grid", 0.5, "pattern=grid"), ("random", 0.02, "8 and 3"), ("random", 0.999, "8")]
)
def test_shares_that_show_nearly_none_or_all_are_refused(pattern: str, share: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        shown_spots(SQUARE, pattern, share, 0)


def test_shown_and_asked_for_are_disjoint_and_all(cohort: list[Section]) -> None:
    of_spots, of_genes = posed(cohort, "spots"), posed(cohort, "genes")
    rows = np.concatenate([np.flatnonzero(of_spots.shown), of_spots.truth.rows])
    assert sorted(rows) == list(range(64))
    assert sorted([*of_genes.shown_genes, *of_genes.truth.genes]) == PANEL and len(of_genes.shown_genes) == 15
    assert of_spots.references == of_genes.references == ["B1", "B2"]


# ---- nothing of what is hidden is seen


def same(one: SpotTask | GeneTask, other: SpotTask | GeneTask) -> bool:
    return all(np.array_equal(getattr(one, each.name), getattr(other, each.name)) for each in fields(one))


@settings(max_examples=10, deadline=None)
@given(factor=st.integers(0, 50), seed=st.integers(0, 9))
def test_hidden_counts_change_nothing_that_methods_get(cohort: list[Section], factor: int, seed: int) -> None:
    for known in ("spots", "genes"):
        before = posed(cohort, known, seed=seed)
        spots = cohort[0].spots.copy()
        counts = spots.X.toarray()
        rng = np.random.default_rng(seed)
        if known == "spots":
            rows = before.truth.rows
            counts[rows] = factor * counts[rows] + rng.integers(0, 5, counts[rows].shape)
        else:
            columns = spots.var_names.get_indexer(before.truth.genes)
            counts[:, columns] = factor * counts[:, columns] + rng.integers(0, 5, (len(counts), len(columns)))
        spots.X = type(spots.X)(counts)
        after = posed([replace(cohort[0], spots=spots), *cohort[1:]], known, seed=seed)
        assert same(before.task, after.task)
        assert not np.array_equal(before.truth.observed, after.truth.observed)


def test_the_panel_is_chosen_without_hidden_counts(tmp_path: Path) -> None:
    own, *_ = make_sections(tmp_path, patients=1, n_spots=100, n_genes=60, image=False)
    protocol = replace(STRICT, min_spots=0.01, n_hvg=10)
    options = {"features": {}, "share": 0.5}
    before = spot_problem(own, [], protocol, None, **options)
    spots = own.spots.copy()
    counts = spots.X.toarray()
    counts[before.truth.rows] = np.random.default_rng(0).integers(0, 90, (len(before.truth.rows), 60))
    spots.X = type(spots.X)(counts)
    after = spot_problem(replace(own, spots=spots), [], protocol, None, **options)
    assert before.truth.genes == after.truth.genes and 0 < len(before.truth.genes) < 60


def test_genes_are_shares_of_the_shown_genes(cohort: list[Section]) -> None:
    problem = posed(cohort, "genes")
    counts = cohort[0].counts(problem.shown_genes).astype(np.float64)
    expected = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(problem.task.expression, expected, rtol=1e-5)


@pytest.mark.parametrize("fields_", [{"truth": "gene"}, {"truth": "residuals"}, {"library": "panel"}])
def test_truths_that_mix_shown_and_hidden_are_refused(cohort: list[Section], fields_: dict[str, str]) -> None:
    with pytest.raises(InputError, match="hidden"):
        spot_problem(cohort[0], [], replace(STRICT, **fields_), PANEL, features={})


def test_parts_that_are_held_out_are_out_of_sight() -> None:
    task = spot_task(field_of(), shown_spots(SQUARE, "random", 0.5, 0), features=SQUARE.astype(float))
    for compact in (False, True):
        own = replace(task, compact=compact)
        assert np.array_equal(np.sum(own.folds, axis=0), np.ones(60))
        inner = own.without(own.folds[1])
        assert np.array_equal(inner.expression, own.expression[~own.folds[1]])
        assert np.array_equal(inner.xy[inner.shown], own.xy[own.shown][~own.folds[1]])
    pieces = [SQUARE[task.shown][fold] for fold in replace(task, compact=True).folds]
    assert max(np.ptp(piece, axis=0).min() for piece in pieces) <= 3  # stripes


# ---- interpolation and kriging


def slow_kriging(xy: np.ndarray, values: np.ndarray, query: np.ndarray, variogram: Variogram) -> tuple[float, float]:
    """One estimate and its variance, the system written out."""
    n = len(xy)
    system, right = np.zeros((n + 1, n + 1)), np.zeros(n + 1)
    for i in range(n):
        for j in range(n):
            system[i, j] = float(variogram(np.linalg.norm(xy[i] - xy[j])))
        system[i, n] = system[n, i] = 1
        right[i] = float(variogram(np.linalg.norm(xy[i] - query)))
    right[n] = 1
    solution = np.linalg.solve(system, right)
    return float(solution[:n] @ values), float(solution @ right)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), nugget=st.sampled_from([0.0, 0.3, 0.9]), reach=st.floats(0.5, 10))
def test_kriging_is_the_solution_of_its_system(seed: int, nugget: float, reach: float) -> None:
    rng = np.random.default_rng(seed)
    xy, queries, values = rng.random((7, 2)) * 5, rng.random((4, 2)) * 5, rng.normal(size=7)
    weights, variance = kriging_weights(xy, queries, Variogram(nugget, reach))
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-9)
    slow = np.array([slow_kriging(xy, values, query, Variogram(nugget, reach)) for query in queries])
    np.testing.assert_allclose(weights @ values, slow[:, 0], atol=1e-8)
    np.testing.assert_allclose(variance, slow[:, 1], atol=1e-8)
    at_data, nothing = kriging_weights(xy, xy, Variogram(nugget, reach))
    np.testing.assert_allclose(at_data, np.eye(7), atol=1e-8)
    np.testing.assert_allclose(nothing, 0, atol=1e-8)


def test_kriging_of_two_points_by_hand() -> None:
    # halfway: weights of one half each, and the variance 2 g(1) - g(2) / 2
    variogram = Variogram(0.0, 1.0)
    weights, variance = kriging_weights(np.array([[0.0, 0], [2, 0]]), np.array([[1.0, 0]]), variogram)
    np.testing.assert_allclose(weights, [[0.5, 0.5]])
    np.testing.assert_allclose(variance, 2 * (1 - np.exp(-1)) * 0.5 * 2 - (1 - np.exp(-2)) / 2, rtol=1e-9)


def test_held_out_data_are_kriged_from_the_others() -> None:
    rng = np.random.default_rng(0)
    xy, values, variogram = rng.random((12, 2)) * 4, rng.normal(size=(12, 1)), Variogram(0.3, 2)
    folds = [np.arange(12) % 3 == i for i in range(3)]
    estimate, variance = in_folds(xy, values, folds, variogram)
    for i in range(12):
        others = np.arange(12) % 3 != i % 3
        slow = slow_kriging(xy[others], values[others, 0], xy[i], variogram)
        np.testing.assert_allclose((estimate[i, 0], variance[i]), slow, atol=1e-9)


def test_variograms_are_chosen_by_what_the_data_are() -> None:
    shown = shown_spots(SQUARE, "random", 0.6, 0)
    smooth, noise = field_of(noise=0.05), np.random.default_rng(1).normal(size=(120, 20))
    task = spot_task(np.hstack([smooth, noise]), shown)
    fitted = Kriging.fit(task.xy[shown], task.expression, task.folds, per_gene=True)
    nuggets = np.array([(0.0, 0.3, 0.6, 0.8, 0.9, 0.95)[i // 4] for i in fitted.chosen])
    assert nuggets[:20].mean() < 0.3 < 0.7 < nuggets[20:].mean()
    mean, sd = fitted.predict(task.xy[shown], task.expression, task.xy[~shown])
    within = np.abs(np.hstack([smooth, noise])[~shown] - mean) < 1.96 * sd
    assert 0.88 < within[:, :20].mean() < 0.99 and 0.9 < within[:, 20:].mean() < 0.98
    assert sd[:, :20].mean() < 0.6 < sd[:, 20:].mean()
    # of noise, errors of held-out data are no smaller than its variance, however many variograms were tried
    rest = np.square(fitted.held_out - task.expression).mean(axis=0) / task.expression.var(axis=0)
    assert rest[:20].mean() < 0.4 and rest[20:].mean() > 0.99
    one = kriging(task)
    assert set(one.settings) == {"nugget", "reach"} and np.isfinite(one.held_out).all()


def test_interpolation_is_what_it_is_called() -> None:
    rng = np.random.default_rng(0)
    xy, queries = rng.random((30, 2)), rng.random((50, 2)) * 1.4 - 0.2
    values = rng.normal(size=(30, 3))
    brute = values[[np.argmin([np.linalg.norm(query - own) for own in xy]) for query in queries]]
    np.testing.assert_array_equal(interpolate(xy, values, queries, "nearest"), brute)
    plane = xy @ np.array([[2.0, -1], [0.5, 3]]) + 1
    inside = rng.dirichlet(np.ones(30), 20) @ xy
    for kind in ("linear", "cubic"):
        at = inside @ np.array([[2.0, -1], [0.5, 3]]) + 1
        np.testing.assert_allclose(interpolate(xy, plane, inside, kind), at, atol=1e-4)
        np.testing.assert_allclose(interpolate(xy, values, xy, kind), values, atol=1e-9)
        outside = np.array([[5.0, 5], [-3, 0.4]])
        np.testing.assert_array_equal(
            interpolate(xy, values, outside, kind), interpolate(xy, values, outside, "nearest")
        )
        on_a_line = np.column_stack([np.arange(5.0), np.zeros(5)])
        assert np.array_equal(interpolate(on_a_line, np.eye(5), np.array([[2.2, 0.3]]), kind), np.eye(5)[[2]])


# ---- methods of spots


def test_settings_are_chosen_by_what_is_held_out() -> None:
    values = field_of(noise=0.05)
    task = spot_task(values, shown_spots(SQUARE, "random", 0.6, 0))

    def predict(own: SpotTask, k: int) -> np.ndarray:
        order = np.argsort(cdist(own.xy[~own.shown], own.xy[own.shown]), axis=1)[:, :k]
        return own.expression[order].mean(axis=1)

    choice = choose(task, [1, 3, 40], predict)
    assert choice.setting == 3
    np.testing.assert_array_equal(choice.held_out, out_of_fold(task, lambda own: predict(own, 3)))


def test_the_image_fills_in_what_it_shows() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 6))
    of_image, of_place = features @ rng.normal(size=(6, 20)), field_of(1, noise=0.1)
    shown = shown_spots(SQUARE, "random", 0.5, 0)
    scores = {}
    for name, values in (("image", of_image), ("both", of_image + 2 * of_place)):
        task = spot_task(values, shown, features)
        for method in (nearest, kriging, retrieval, ridge_features, ridge_kriging):
            own = method(task)
            assert own.mean.shape == own.sd.shape == (60, 20) and (own.sd > 0).all()
            scores[name, method.__name__] = mean_pearson(values[~shown], own.mean, np.zeros(60))
    assert scores["image", "ridge_features"] > 0.99 > scores["image", "retrieval"] > 0.4 > scores["image", "kriging"]
    assert scores["both", "ridge_kriging"] > max(scores["both", "kriging"], scores["both", "ridge_features"]) + 0.05


def test_networks_learn_what_neighbours_tell() -> None:
    values = field_of(2, noise=0.1, genes=40)
    shown = shown_spots(SQUARE, "random", 0.6, 0)
    task = spot_task(values, shown)
    for method, least in (
        (lambda own: grid_transformer(own, steps=50), 0.3),
        (lambda own: masked_graph(own, epochs=10), 0.6),
    ):
        own = method(task)
        assert own.mean.shape == own.sd.shape == (48, 40) and np.isfinite(own.held_out).any(axis=1).sum() == 15
        assert mean_pearson(values[~shown], own.mean, np.zeros(48)) > least
        within = np.abs(values[~shown] - own.mean) < 1.96 * own.sd
        assert 0.8 < within.mean() <= 1


# ---- methods of genes


@pytest.fixture(scope="module")
def gene_task() -> tuple[GeneTask, np.ndarray]:
    """Hidden genes that follow shown ones, one of the neighbours' among them; and the truth."""
    rng = np.random.default_rng(0)
    slope = rng.normal(size=(12, 5))

    def table(section: int) -> tuple[np.ndarray, np.ndarray]:
        shown = rng.normal(size=(120, 12)) + section  # sections differ in level
        order = np.argsort(cdist(SQUARE, SQUARE), axis=1, kind="stable")[:, 1:7]
        around = shown[order].mean(axis=1)
        hidden = np.column_stack([shown @ slope, 3 * around[:, 0]]) + 0.1 * rng.normal(size=(120, 6))
        return shown, hidden + 2 * section

    (own, truth), *references = [table(section) for section in range(4)]
    names = np.repeat(["R1", "R2", "R3"], 120)
    places = np.tile(SQUARE.astype(float), (3, 1))
    shown, hidden = (np.concatenate(part) for part in zip(*references, strict=True))
    return GeneTask(SQUARE.astype(float), own, shown, hidden, names, places), truth


def test_gene_methods_read_what_they_say(gene_task: tuple[GeneTask, np.ndarray]) -> None:
    task, truth = gene_task
    np.testing.assert_allclose(reference_mean(task).mean, np.tile(task.reference_hidden.mean(axis=0), (120, 1)))
    of = {method.__name__: method(task) for method in (knn_reference, ridge_genes, ridge_neighbours, masked_genes)}
    r = {name: pearson_per_gene(truth, own.mean) for name, own in of.items()}
    assert r["ridge_genes"][:5].min() > 0.99 and r["ridge_neighbours"][:5].min() > 0.98
    assert r["ridge_neighbours"][5] > 0.7 > 0.5 > r["ridge_genes"][5]
    assert r["knn_reference"][:5].mean() > 0.6 and r["masked_genes"][:5].mean() > 0.6
    for own in of.values():
        assert own.mean.shape == own.sd.shape == truth.shape and (own.sd > 0).all()
    assert np.isfinite(of["ridge_genes"].held_out).all()


def test_nearest_of_the_reference_by_brute_force(gene_task: tuple[GeneTask, np.ndarray]) -> None:
    task, _ = gene_task
    own = knn_reference(task)
    centred = [task.reference_shown[task.reference_section == name] for name in ("R1", "R2", "R3")]
    reference = np.concatenate([part - part.mean(axis=0) for part in centred])
    scale = reference.std(axis=0)
    hidden = np.concatenate(
        [part - part.mean(axis=0) for part in np.split(task.reference_hidden, 3)]
    )  # 12 genes have 12 components: nothing is lost
    query = (task.expression - task.expression.mean(axis=0)) / scale
    order = np.argsort(cdist(query, reference / scale), axis=1)[:, : own.settings["k"]]
    np.testing.assert_allclose(own.mean, task.reference_hidden.mean(axis=0) + hidden[order].mean(axis=1), atol=1e-8)


def test_cells_without_places_teach_without_neighbours(gene_task: tuple[GeneTask, np.ndarray]) -> None:
    task, truth = gene_task
    cells = replace(task, reference_xy=None, reference_section=np.full(360, "cells"))
    assert "ridge_neighbours" not in chosen_methods("genes", None, cells)
    with pytest.raises(InputError, match="places; masked_graph would fit"):
        chosen_methods("genes", ["ridge_neighbours"], cells)
    assert pearson_per_gene(truth, masked_genes(cells, epochs=10).mean)[:5].mean() > 0.5


# ---- scores


def test_only_what_was_hidden_is_scored(cohort: list[Section]) -> None:
    problem = posed(cohort, "spots")
    own = complete("spots", "kriging", problem.task)
    scores = score(problem.truth, own)
    rows = np.flatnonzero(~problem.shown)
    counts = cohort[0].counts(PANEL)[rows].astype(np.float64)
    truth = np.log1p(1e4 * counts / cohort[0].total_counts[rows][:, None])
    expected = score_section(truth, own.mean, np.arange(30), True, cohort[0].total_counts[rows])
    assert own.mean.shape == (len(rows), 30)
    for key in ("pearson_acg", "mse", "pearson_given_depth"):
        assert scores[key] == pytest.approx(expected[key], rel=1e-4)
    assert scores["coverage_95"] == np.mean(np.abs(problem.truth.observed - own.mean) <= 1.96 * own.sd)


@pytest.mark.parametrize(("noise", "outcome"), [(0.1, "win"), (1.0, "unclear"), (3.0, "loss")])
def test_a_method_is_judged_beside_the_best_floor(cohort: list[Section], noise: float, outcome: str) -> None:
    problem = posed(cohort, "spots")
    truth = problem.truth.observed

    def predicted(size: float, seed: int) -> Completed:
        mean = truth + size * np.random.default_rng(seed).normal(size=truth.shape)
        return Completed(mean, np.ones_like(mean), np.full(problem.task.expression.shape, np.nan))

    completed = {"kriging": predicted(1.0, 0), "nearest": predicted(9.0, 1), "retrieval": predicted(noise, 3)}
    scores = {name: score(problem.truth, own) for name, own in completed.items()}
    judged = judge(
        problem, completed, {name: scores[name] for name in ("kriging", "nearest")}, {"retrieval": scores["retrieval"]}
    )
    assert (judged["best_floor"], judged["best_method"], judged["outcome"]) == ("kriging", "retrieval", outcome)
    assert judged["difference"]["low"] <= judged["difference"]["value"] <= judged["difference"]["high"]
    assert ("no better than the floor" in judged["verdict"]) == (outcome == "unclear")


def test_methods_that_there_are_not_are_refused(cohort: list[Section]) -> None:
    problem = posed(cohort, "spots")
    assert chosen_methods("spots", None, problem.task) == [*FLOORS["spots"], *METHODS["spots"]]
    with pytest.raises(InputError, match="did you mean retrieval"):
        chosen_methods("spots", ["retrival"], problem.task)
    blind = replace(problem.task, features=None)
    assert "ridge_features" not in chosen_methods("spots", [], blind)
    with pytest.raises(InputError, match="image"):
        chosen_methods("spots", ["retrieval"], blind)


def test_sections_of_one_patient_teach_only_where_asked(tmp_path: Path) -> None:
    sections = [make_section(tmp_path, name, name[0], image=False) for name in ("A1", "A2", "B1")]
    names = {
        which: [own.name for own in other_sections(sections[0], sections, which)]
        for which in ("patients", "sections", "none")
    }
    assert names == {"patients": ["B1"], "sections": ["A2", "B1"], "none": []}
    with pytest.raises(InputError, match="reference=sections"):
        gene_problem(sections[0], [], STRICT, PANEL)
