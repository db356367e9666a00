"""ST-GCHB: HSIC against its definition, graphs against loops, the sum of its terms, that it learns and comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoders import frozen
from sections import make_data, make_trainer

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.models.dependence import hsic
from stexp.models.encoders.image import ImageEncoder
from stexp.models.stgchb import STGCHB, GraphConvolution
from stexp.protocol import Protocol


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    folder = tmp_path_factory.mktemp("sections")
    torch.manual_seed(0)
    encoder = ImageEncoder("test_resnet", pretrained=False)
    return make_data(folder, Protocol("strict"), encoder=frozen(encoder, folder / "cache"))


def make_model(data: SpotDataModule, *, seed: int = 0, **kwargs) -> STGCHB:
    torch.manual_seed(seed)
    model = STGCHB(len(data.panel), data.n_features, **{"embedding_dim": 16, "k": 5} | kwargs).eval()
    model._see(data)
    return model


# dependence


def slow_hsic(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(z: np.ndarray) -> np.ndarray:
        distance = np.array([[np.linalg.norm(a - b) for b in z] for a in z])
        bandwidth = np.sort(distance[~np.eye(len(z), dtype=bool)])[(len(z) * (len(z) - 1) - 1) // 2]
        return np.exp(-(distance**2) / (2 * bandwidth**2))

    n = len(x)
    centre = np.eye(n) - 1 / n
    return np.trace(kernel(x) @ centre @ kernel(y) @ centre) / (n - 1) ** 2


def test_hsic_is_the_trace_of_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), 100 + 3 * rng.normal(size=(9, 2))
    tensors = [torch.from_numpy(z).float() for z in (x, y)]
    assert float(hsic(*tensors)) == pytest.approx(slow_hsic(x, y), rel=1e-4)
    torch.testing.assert_close(hsic(*tensors), hsic(*tensors[::-1]))


def test_hsic_tells_dependent_from_independent_descriptions_that_do_not_correlate():
    draws = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 400, 1, generator=draws)
    independent, dependent = float(hsic(x, other)), float(hsic(x, x.square()))
    assert 0 <= independent < 0.1 * dependent
    torch.testing.assert_close(hsic(x, x.square()), hsic(5 * x - 2, x.square()))  # the bandwidth follows the scale


def test_the_gradient_of_hsic_is_finite_where_spots_are_the_same():
    x = torch.tensor([[0.0], [0.0], [1.0], [2.0]], requires_grad=True)
    hsic(x, torch.zeros(4, 2)).backward()
    assert torch.isfinite(x.grad).all()


# graphs


@torch.no_grad()
def test_an_embedding_reads_a_spot_beside_the_mean_of_its_neighbours(data):
    model, rows = make_model(data), data.rows("test")
    batch = data.batch(SpotIndex(torch.from_numpy(rows), image=False))
    tiles, spots = model.embed_tiles(batch), model.embed_batch_spots(batch)
    for i in range(0, len(rows), 6):
        around = data.neighbours[rows[i]]
        around = around[around >= 0]
        for made, table, graph in (
            (tiles[i], data.tile_features, model.image_graph),
            (spots[i], data.expression, model.spot_graph),
        ):
            read = np.concatenate([table[rows[i]], table[around].mean(axis=0)])
            embedding = graph.head(torch.from_numpy(read)[None])[0]
            torch.testing.assert_close(made, embedding / embedding.norm(), rtol=1e-4, atol=1e-5)
    part = data.batch(SpotIndex(torch.from_numpy(rows[::7]), image=False))
    torch.testing.assert_close(model.embed_tiles(part), tiles[::7], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_absent_neighbours_do_not_count():
    torch.manual_seed(0)
    graph, x = GraphConvolution(3, 4, 0.0), torch.randn(2, 4, 3)
    there = torch.tensor([[True, True, False, True], [True, False, False, False]])
    before = graph(x, there)
    x[~there] = 7.0
    torch.testing.assert_close(graph(x, there), before)
    assert torch.isfinite(before).all()


def test_a_view_leaves_out_features_of_all_spots_and_neighbours_but_never_the_spot(data):
    model = make_model(data, feature_dropout=0.5, edge_dropout=0.5)
    x, there = torch.ones(20, 7, 40), torch.ones(20, 7, dtype=torch.bool)
    there[3, 4:] = False
    seen, edges = model.view(x, there)
    kept = seen[0, 0] != 0
    assert 5 < int(kept.sum()) < 35 and torch.equal(seen, x * kept)
    assert edges[:, 0].all() and not edges[3, 4:].any() and 30 < int(edges[:, 1:].sum()) < 90
    model = make_model(data, feature_dropout=0.0, edge_dropout=0.0)
    same, all_edges = model.view(x, there)
    assert torch.equal(same, x) and torch.equal(all_edges, there)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_loss_is_the_sum_of_its_terms(data):
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:12]), image=False))
    off = {"feature_dropout": 0.0, "edge_dropout": 0.0, "dropout": 0.0}

    def loss(**weights) -> float:
        return float(make_model(data, **off, **weights).training_step(batch, 0).detach())

    alone = loss(graph_weight=0.0, lambda_x=0.0, lambda_y=0.0)
    parts = [
        loss(**{"graph_weight": 0.0, "lambda_x": 0.0, "lambda_y": 0.0, name: 1.0}) - alone
        for name in ("graph_weight", "lambda_x", "lambda_y")
    ]
    assert parts[0] > 0 and parts[1] > 0 > parts[2]
    assert loss(graph_weight=0.5, lambda_x=2.0, lambda_y=3.0) == pytest.approx(
        alone + 0.5 * parts[0] + 2 * parts[1] + 3 * parts[2], rel=1e-4
    )


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_overfits_eight_spots_and_retrieves_the_right_ones(data):
    model = make_model(data, dropout=0.0, lr=3e-3)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8]), image=False))
    optimizer = model.configure_optimizers()
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        similarity = model.embed_tiles(batch) @ model.embed_batch_spots(batch).T
    assert (similarity.argmax(dim=1) == torch.arange(8)).all()


def test_sections_without_an_image_do_not_spoil_gradients(data, monkeypatch):
    features = data.tile_features.copy()
    features[0] = np.nan  # of the first spot of all, which then is of such a section
    monkeypatch.setattr(SpotDataModule, "tile_features", features)
    model = make_model(data)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[-5:]), image=False))
    model.embed_tiles(batch).square().sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.image_graph.parameters())


def test_trains_on_kept_features_alone_and_comes_back(data, tmp_path, monkeypatch):
    monkeypatch.setattr("stexp.data.datamodule.augment", lambda *_: pytest.fail("tiles are gathered"))
    model, trainer = make_model(data), make_trainer(tmp_path)
    trainer.fit(model, datamodule=data)
    predicted = torch.cat([part.predicted for part in trainer.predict(model, datamodule=data)])
    again = make_model(data, seed=1)
    again.load_state_dict(model.state_dict())
    made = torch.cat([part.predicted for part in trainer.predict(again, datamodule=data)])
    torch.testing.assert_close(made, predicted, rtol=1e-5, atol=1e-5)
