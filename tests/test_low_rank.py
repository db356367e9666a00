"""Components, ridges and smoothing against what scikit-learn and loops make of the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from stexp.models import low_rank
from stexp.models.low_rank import Components, Members, ridge_slopes, smooth


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=["more rows", "more columns"])
@pytest.mark.parametrize("standardise", [True, False])
def test_components_are_those_of_scikit_learn_up_to_sign(rng, shape, standardise, monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK", 7)
    x = (rng.normal(size=shape) * rng.choice([0.1, 1, 9], shape[1]) + 3).astype(np.float32)
    z = StandardScaler(with_std=standardise).fit_transform(x.astype(np.float64))
    expected = PCA(5, svd_solver="full").fit_transform(z)
    found = Components.fit(x, 5, standardise=standardise)(torch.from_numpy(x)).numpy()
    sign = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * sign, expected, rtol=1e-3, atol=1e-3)


def test_a_column_that_never_changes_counts_for_nothing(rng):
    x = rng.normal(size=(40, 6)).astype(np.float32)
    constant = np.column_stack([x, np.full(40, 7.1, np.float32)])
    assert np.abs(Components.fit(constant, 6, standardise=True).axes[-1].numpy()).max() == 0
    assert Components.fit(x, 99).axes.shape == (6, 6)


def test_ridges_in_bounded_memory_are_the_direct_ones(rng, monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK", 7)
    z = torch.from_numpy(rng.normal(size=(50, 8)) + 2).float()
    scores = torch.from_numpy(rng.normal(size=(50, 3)) - 5).float()
    unit = float((z - z.mean(0)).square().sum() / 8)
    slopes, intercepts = ridge_slopes(z, scores, [0.5, 20.0])
    for slope, intercept, penalty in zip(slopes, intercepts, (0.5, 20.0), strict=True):
        direct = Ridge(penalty * unit, solver="svd").fit(z.numpy(), scores.numpy())
        np.testing.assert_allclose(z @ slope + intercept, direct.predict(z.numpy()), rtol=1e-4, atol=1e-4)


def test_members_are_ridges_and_means_over_the_nearest(rng, monkeypatch):
    z, scores = (torch.from_numpy(rng.normal(size=(40, n))).float() for n in (6, 2))
    query = torch.from_numpy(rng.normal(size=(9, 6))).float()
    members = Members.fit(z, scores, [1.0, 3.0], [4, 100])
    found, nearest = members(query)
    assert found.shape == (4, 9, 2) and nearest.index.shape == (9, 40)
    rows = NearestNeighbors(n_neighbors=4, metric="cosine").fit(z).kneighbors(query, return_distance=False)
    np.testing.assert_allclose(found[2], scores[rows].mean(dim=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[3], scores.mean(dim=0).expand(9, 2), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(low_rank, "CHUNK", 2)
    torch.testing.assert_close(members(query)[0], found)
    share = members.share_of_neighbours(torch.tensor([0.1, 0.1, 0.6, 0.2]))
    expected = np.full(40, 0.2 / 40)
    expected[:4] += 0.6 / 4
    np.testing.assert_allclose(share, expected / expected.sum(), rtol=1e-5)
    assert members.share_of_neighbours(torch.tensor([0.5, 0.5, 0, 0])) is None


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
