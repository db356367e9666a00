"""The graph network behind multimodal domains, against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stexp.models import multimodal
from stexp.models.multimodal import (
    Discriminator,
    GraphConvolution,
    as_tensor,
    infomax,
    nearest_graph,
    propagation,
    reconstruct_modalities,
    with_itself,
)


@pytest.fixture(scope="module")
def places() -> np.ndarray:
    return np.random.default_rng(0).random((14, 2))


def test_the_graph_joins_each_spot_with_its_three_nearest_of_its_group(places):
    group = np.array([0] * 9 + [1] * 3 + [2] * 2)
    graph = nearest_graph(places, group).toarray()
    for i in range(14):
        others = [j for j in range(14) if j != i and group[j] == group[i]]
        nearest = sorted(others, key=lambda j: np.linalg.norm(places[i] - places[j]))[:3]
        assert set(np.flatnonzero(graph[i])) == set(nearest)
    assert nearest_graph(places[:1]).nnz == 0
    same = nearest_graph(np.zeros((6, 2))).toarray()
    assert (same.sum(axis=1) == 3).all() and not same.diagonal().any()


def test_a_convolution_is_the_sum_over_edges(places):
    """Every spot gets itself, and each spot that it has an edge with over the root of both degrees (Kipf & Welling)."""
    graph = nearest_graph(places)
    near = (graph + graph.T).toarray() > 0
    torch.manual_seed(0)
    layer, values = GraphConvolution(5, 3), torch.randn(14, 5)
    made = layer(values, as_tensor(propagation(graph)))
    projected, degree = values @ layer.weight, near.sum(axis=1) + 1
    for i in range(14):
        expected = projected[i] + projected[i] / degree[i]
        for j in np.flatnonzero(near[i]):
            expected = expected + projected[j] / math.sqrt(degree[i] * degree[j])
        torch.testing.assert_close(made[i], expected)


def test_infomax_is_its_definition(places):
    graph = nearest_graph(places)
    torch.manual_seed(0)
    own, other, discriminator = torch.rand(14, 4), torch.rand(14, 4), Discriminator(4)
    loss = infomax(discriminator, own, other, as_tensor(with_itself(graph)))
    expected = 0.0
    for real, corrupted in ((own, other), (other, own)):
        for i in range(14):
            rows = [i, *np.flatnonzero(graph.toarray()[i])]
            mean = sum(real[j] for j in rows) / len(rows)
            surroundings = torch.sigmoid(mean / mean.norm())
            scores = [x @ discriminator.weight @ surroundings + discriminator.bias for x in (real[i], corrupted[i])]
            belongs, does_not = (torch.sigmoid(score) for score in scores)
            expected += (-belongs.log() - (1 - does_not).log()) / 28
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.nn.init.zeros_(discriminator.weight)
    untold = infomax(discriminator, own, other, as_tensor(with_itself(graph)))
    assert untold.item() == pytest.approx(2 * math.log(2))


def small() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)
    x, y = (each.ravel() for each in np.mgrid[:6, :6])
    expression = rng.normal(size=(36, 7)) + 2 * (x < 3)[:, None]
    expression[:, 2] = 5.0  # constant
    return expression, rng.normal(size=(36, 4)), np.column_stack([x, y]).astype(float), np.repeat(["A", "B"], 18)


def test_the_same_seed_gives_the_same_and_leaves_the_generator_alone(monkeypatch):
    monkeypatch.setattr(multimodal, "EPOCHS", 20)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    (first, share), (again, _), (other, _) = (reconstruct_modalities(*small(), seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert [each.shape for each in first] == [(36, 7), (36, 4)] and 0 < share < 1
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not np.allclose(first[0], other[0])


def test_without_an_image_expression_is_reconstructed_alone(monkeypatch):
    monkeypatch.setattr(multimodal, "EPOCHS", 150)
    expression, _, xy, section = small()
    (made,), share = reconstruct_modalities(expression, None, xy, section)
    scaled = multimodal.standardised(expression)
    assert share == 1 and made.shape == (36, 7)
    assert ((made - scaled) ** 2).mean() < 0.8 * (scaled**2).mean()
