"""Components, ridges and smoothing against what scikit-learn and loops make of the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from stexp.models import low_rank
from stexp.models.low_rank import Components, Members, Moments, project, smooth


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def blocks(x: np.ndarray) -> low_rank.Blocks:
    return lambda: np.array_split(x, 3)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=["more rows", "more columns"])
@pytest.mark.parametrize("standardise", [True, False])
def test_components_are_those_of_scikit_learn_up_to_sign(rng, shape, standardise, monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK", 7)
    x = (rng.normal(size=shape) * rng.choice([0.1, 1, 9], shape[1]) + 3).astype(np.float32)
    z = StandardScaler(with_std=standardise).fit_transform(x.astype(np.float64))
    expected = PCA(5, svd_solver="full").fit_transform(z)
    found = Components.fit(blocks(x), 5, standardise=standardise)(torch.from_numpy(x)).numpy()
    sign = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * sign, expected, rtol=1e-3, atol=1e-3)


def test_a_column_that_never_changes_counts_for_nothing(rng):
    x = rng.normal(size=(40, 6)).astype(np.float32)
    constant = np.column_stack([x, np.full(40, 7.1, np.float32)])
    assert np.abs(Components.fit(blocks(constant), 6, standardise=True).axes[-1].numpy()).max() == 0
    assert Components.fit(blocks(x), 99).axes.shape == (6, 6)


@pytest.mark.parametrize("standardise", [True, False])
def test_of_many_rows_and_columns_the_components_hold_as_much_variance(rng, standardise, monkeypatch):
    """Found by passes over blocks, without a square matrix, they are those of the eigenvectors."""
    x = (rng.normal(size=(300, 20)) * np.geomspace(9, 0.5, 20) @ rng.normal(size=(20, 90))).astype(np.float32)
    x += rng.normal(size=x.shape).astype(np.float32) + 3
    exact = Components.fit(blocks(x), 6, standardise=standardise)
    monkeypatch.setattr(low_rank, "EXACT", 50)
    monkeypatch.setattr(low_rank, "SPARE", 4)
    monkeypatch.setattr(low_rank, "_largest", lambda matrix, n, real=low_rank._largest: real(_small(matrix), n))
    found = Components.fit(blocks(x), 6, standardise=standardise)
    scores, expected = (each(torch.from_numpy(x)).numpy() for each in (found, exact))
    np.testing.assert_allclose(scores.var(axis=0).sum(), expected.var(axis=0).sum(), rtol=1e-3)
    np.testing.assert_allclose(np.abs(np.corrcoef(scores.T, expected.T)[:3, 6:9].diagonal()), 1, atol=1e-3)


def _small(matrix: np.ndarray) -> np.ndarray:
    assert len(matrix) == 10, "no more than the axes and those to spare"
    return matrix


def test_ridges_from_sums_over_parts_are_the_direct_ones(rng):
    z = torch.from_numpy(rng.normal(size=(50, 8)) + 2).float()
    scores = torch.from_numpy(rng.normal(size=(50, 3)) - 5).float()
    unit = float((z - z.mean(0)).square().sum() / 8)
    moments = Moments(8, 3)
    for part, of_part in zip(z.split(7), scores.split(7), strict=True):
        moments.add(part, of_part)
    slopes, intercepts = moments.ridges([0.5, 20.0])
    for slope, intercept, penalty in zip(slopes, intercepts, (0.5, 20.0), strict=True):
        direct = Ridge(penalty * unit, solver="svd").fit(z.numpy(), scores.numpy())
        np.testing.assert_allclose(z @ slope + intercept, direct.predict(z.numpy()), rtol=1e-4, atol=1e-4)


def test_members_are_ridges_and_means_over_the_nearest(rng, monkeypatch):
    z, scores = (torch.from_numpy(rng.normal(size=(40, n))).float() for n in (6, 2))
    query = torch.from_numpy(rng.normal(size=(9, 6))).float()
    members = Members.fit(zip(z.split(7), scores.split(7), strict=True), 40, [1.0, 3.0], [4, 100])
    found, ((_, nearest),) = members(query), members.blocks(query)
    assert found.shape == (4, 9, 2) and nearest.index.shape == (9, 40)
    rows = NearestNeighbors(n_neighbors=4, metric="cosine").fit(z).kneighbors(query, return_distance=False)
    np.testing.assert_allclose(found[2], scores[rows].mean(dim=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[3], scores.mean(dim=0).expand(9, 2), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(low_rank, "CHUNK", 2)
    torch.testing.assert_close(members(query), found)
    share = members.share_of_neighbours(torch.tensor([0.1, 0.1, 0.6, 0.2]))
    expected = np.full(40, 0.2 / 40)
    expected[:4] += 0.6 / 4
    np.testing.assert_allclose(share, expected / expected.sum(), rtol=1e-5)
    assert members.share_of_neighbours(torch.tensor([0.5, 0.5, 0, 0])) is None


def test_of_very_many_rows_an_even_part_is_searched_and_all_make_the_ridges(rng, monkeypatch):
    z, scores = (torch.from_numpy(rng.normal(size=(100, n))).float() for n in (6, 2))
    whole = Members.fit([(z, scores)], 100, [1.0], [4])
    monkeypatch.setattr(low_rank, "REFERENCES", 30)
    some = Members.fit(zip(z.split(7), scores.split(7), strict=True), 100, [1.0], [4])
    torch.testing.assert_close(some.slopes, whole.slopes)
    rows = low_rank.reference_rows(100)
    assert len(np.unique(rows)) == 30 and set(np.diff(rows)) == {3, 4}
    torch.testing.assert_close(some.reference, z[rows])
    torch.testing.assert_close(some.scores, scores[rows])


def test_least_squares_on_all_scores_of_components_are_their_axes(rng, monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK", 7)
    y = (rng.normal(size=(60, 4)) @ rng.normal(size=(4, 12)) + rng.normal(size=(60, 12)) + 5).astype(np.float32)
    components = Components.fit(blocks(y), 5)
    mean, slopes = project(components(torch.from_numpy(y)), torch.from_numpy(y))
    torch.testing.assert_close(slopes, components.axes.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, components.centre, rtol=1e-5, atol=1e-5)
    some = components(torch.from_numpy(y[::3]))
    mean, slopes = project(some, torch.from_numpy(y[::3]))
    direct = LinearRegression().fit(some.numpy(), y[::3])
    np.testing.assert_allclose(mean, direct.intercept_, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(slopes, direct.coef_.T, rtol=1e-4, atol=1e-4)


def test_smoothing_is_a_gaussian_mean_by_distance(rng, monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK", 20)
    values, xy = rng.normal(size=(30, 3)), rng.uniform(0, 500, (30, 2))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    weight = np.where(distance <= 300, np.exp(-((distance / 100) ** 2) / 2), 0)
    np.testing.assert_allclose(smooth(values, xy, 100.0), weight @ values / weight.sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(smooth(values, xy, 0.0), values)


def test_a_dense_grid_is_smoothed_as_a_sparse_one_is():
    """A field without noise looks the same, however many spots sample it: distance counts, not the number."""
    fields = {}
    for step in (20, 40):
        axis = np.arange(0, 2001, step)
        xy = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2).astype(float)
        field = smooth(np.sin(xy[:, :1] / 200), xy, 100.0)
        fields[step] = dict(zip(map(tuple, xy), field[:, 0], strict=True))
    both = [(fields[20][place], value) for place, value in fields[40].items()]
    np.testing.assert_allclose(*zip(*both, strict=True), atol=0.03)


def test_points_far_denser_than_the_radius_are_smoothed_from_cells(rng):
    """Close to the sum over all points, and of few neighbours each."""
    xy = rng.uniform(0, 1000, (20_000, 2))
    values = np.column_stack([np.sin(xy[:, 0] / 200), rng.normal(size=20_000)])
    count, sums, _ = low_rank._cells(values, xy, 25.0)
    assert len(count) < 1700 and count.sum() == 20_000
    np.testing.assert_allclose(sums.sum(axis=0), values.sum(axis=0))
    some = rng.choice(20_000, 50, replace=False)
    distance = np.linalg.norm(xy[some, None] - xy[None], axis=2)
    weight = np.where(distance <= 300, np.exp(-((distance / 100) ** 2) / 2), 0)
    expected = weight @ values / weight.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(smooth(values, xy, 100.0)[some], expected, atol=0.01)
