"""SEPAL: its graphs and layers against slow ones, its size, its two stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sections import make_trainer

from stexp.data.batches import SpotIndex
from stexp.errors import InputError
from stexp.models.blocks import local_graphs
from stexp.models.encoders.image import ImageEncoder
from stexp.models.sepal import SEPAL, LocalGraphNet, offset_encoding

SPATIAL_TRANSCRIPTOMICS = {"before": [], "hidden": [], "head": False, "operator": "graph", "position": "sum"}
"""The published values for that array; the defaults are those for Visium."""


def make_model(n_genes: int = 30, *, seed: int = 0, **kwargs) -> SEPAL:
    torch.manual_seed(seed)
    return SEPAL(ImageEncoder("test_resnet", pretrained=False), n_genes, **kwargs).eval()


@pytest.mark.parametrize(
    ("arguments", "graph"),
    [
        (
            {},
            # 2 x 768 -> 512, -> 256 -> 128, score of a node and its neighbours, 128 -> 256 genes
            (1536 * 512 + 512) + (512 * 256 + 256) + (256 * 128 + 128) + (2 * 128 + 1) + (128 * 256 + 256),
        ),
        (SPATIAL_TRANSCRIPTOMICS, (2 * 768 * 256 + 256) + (2 * 256 + 1)),
    ],
)
def test_published_size(arguments, graph):
    with torch.device("meta"):
        model = SEPAL(ImageEncoder("vit_base_patch16_224", pretrained=False), 256, **arguments)
    # ViT-B/16 has 86,567,656 parameters with its 1,000 classes (torchvision)
    image = 86_567_656 - 769 * 1000 + 769 * 256
    assert sum(p.numel() for p in model.graph.parameters()) == graph
    assert sum(p.numel() for p in model.parameters()) == image + graph


def test_graphs_of_a_square_array():
    place = np.array([(x, y) for x in range(5) for y in range(4) if (x, y) != (2, 2)], dtype=float)
    shifted = np.concatenate([place, place + 0.5])  # another section, in the same place
    jitter = np.random.default_rng(0).normal(0, 0.04, shifted.shape)
    nodes, reach = local_graphs(100 * (shifted + jitter), np.repeat([0, 1], len(place)))
    np.testing.assert_allclose(reach, 160, rtol=0.1)
    for row, at in enumerate(shifted):
        half = slice(0, 19) if row < 19 else slice(19, 38)
        steps = np.abs(shifted[half] - at).max(axis=1)
        assert nodes[row, 0] == row
        assert set(nodes[row, 1:][nodes[row, 1:] >= 0] - half.start) == set(np.flatnonzero(steps == 1))


def test_graphs_of_a_hexagonal_array():
    place = np.array([(x, y) for y in range(8) for x in range(16) if (x + y) % 2 == 0])
    nodes, _ = local_graphs(place * (50, 50 * math.sqrt(3)), np.zeros(len(place)))
    for row, (x, y) in enumerate(place):
        near = {(x + dx, y + dy) for dx, dy in ((2, 0), (-2, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))}
        assert {tuple(place[i]) for i in nodes[row, 1:] if i >= 0} == near & {tuple(at) for at in place}


def test_a_spot_alone_is_a_graph_of_one():
    nodes, reach = local_graphs(np.array([(0.0, 0.0), (5.0, 5.0)]), np.array([0, 1]))
    assert (nodes[:, 1:] == -1).all() and (nodes[:, 0] == (0, 1)).all() and (reach == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("n", [8, 10])
def test_offsets_become_sines_and_cosines(n):
    half = 2 * math.ceil(n / 4)
    offset = torch.tensor([[0, 0], [1, -2]])
    for (x, y), row in zip(offset.tolist(), offset_encoding(offset, n), strict=True):
        expected = []
        for position in (y + 2, x + 2):
            for i in range(half // 2):
                angle = position / 10000 ** (2 * i / half)
                expected += [math.sin(angle), math.cos(angle)]
        np.testing.assert_allclose(row, expected[:n], atol=1e-6)


def slow_graph_net(net: LocalGraphNet, features: np.ndarray, offset: np.ndarray, near: list[set]) -> np.ndarray:
    """One graph: nodes (L, F), offsets (L, 2), the neighbours of each, to (G,), a node at a time."""

    def linear(layer, x):
        return layer.weight.double().numpy() @ x + (0 if layer.bias is None else layer.bias.double().numpy())

    def elu(x):
        return np.where(x > 0, x, np.expm1(x))

    def graph(layer, x):
        return [
            linear(layer.itself, x[i]) + linear(layer.neighbours, sum((x[j] for j in near[i]), np.zeros_like(x[i])))
            for i in range(len(x))
        ]

    def gcn(layer, x):
        out = []
        for i in range(len(x)):
            total = sum(x[j] / math.sqrt((len(near[i]) + 1) * (len(near[j]) + 1)) for j in {i, *near[i]})
            out.append(linear(layer.linear, total))
        return out

    place = offset_encoding(torch.from_numpy(offset), features.shape[1]).double().numpy()
    x = list(features + place if net.position == "sum" else np.hstack([features, place]))
    for layer in net.before:
        x = [elu(linear(layer, v)) for v in x]
    for layer in net.convolutions:
        x = [elu(v) for v in (gcn if hasattr(layer, "linear") else graph)(layer, x)]
    score = [float(s[0]) for s in graph(net.score, x)]
    best = max(range(len(x)), key=lambda i: score[i])
    made = x[best] * math.tanh(score[best])
    return made if net.head is None else elu(linear(net.head, made))


@torch.no_grad()
@pytest.mark.parametrize(
    "arguments",
    [
        {"before": [9], "hidden": [8, 6], "head": True, "operator": "gcn", "position": "concat"},
        SPATIAL_TRANSCRIPTOMICS,
    ],
)
def test_the_graph_net_is_that_of_the_definitions(arguments):
    torch.manual_seed(0)
    net = LocalGraphNet(8, 5, **arguments).double()
    rng = np.random.default_rng(0)
    features, offset = rng.normal(size=(6, 7, 8)), rng.integers(-2, 3, (6, 7, 2))
    is_node = np.arange(7) < np.array([7, 7, 7, 4, 2, 1])[:, None]
    edges = np.triu(rng.random((6, 7, 7)) < 0.5, 1)
    edges = (edges | edges.swapaxes(1, 2)) & is_node[:, :, None] & is_node[:, None]
    made = net(*map(torch.from_numpy, (features, offset, edges, is_node))).numpy()
    best = set()
    for i, n in enumerate(is_node.sum(axis=1)):
        near = [set(np.flatnonzero(row[:n])) for row in edges[i, :n]]
        np.testing.assert_allclose(made[i], slow_graph_net(net, features[i, :n], offset[i, :n], near), rtol=1e-6)
        best.add(round(float(np.abs(made[i]).sum()), 6))
    assert len(best) == 6


@torch.no_grad()
def test_the_correction_of_a_spot_is_that_of_its_own_graph(tmp_path, data):
    model = make_model()
    trainer = make_trainer(tmp_path, 1)
    model.corrects.fill_(True)
    rows = data.rows("test")
    predicted = torch.cat([output.predicted for output in trainer.predict(model, datamodule=data)])
    batch = data.batch(SpotIndex(torch.from_numpy(rows)))
    embedding = model.image_encoder(batch.image).double().numpy()
    alone = model.image_head(model.image_encoder(batch.image)).numpy()
    array, section = batch.array_xy.numpy(), batch.section.numpy()
    net = model.graph.double()
    for i in range(0, len(rows), 7):
        # the pitch of these sections is a quarter larger in x, and diagonals are out of reach
        steps = np.abs(array - array[i]).sum(axis=1)
        nodes = [i, *np.flatnonzero((steps == 1) & (section == section[i]))]
        near = [{b for b, q in enumerate(nodes) if np.abs(array[p] - array[q]).sum() == 1} for p in nodes]
        correction = slow_graph_net(net, embedding[nodes], array[nodes] - array[i], near)
        assert np.abs(correction).max() > 1e-3
        np.testing.assert_allclose(predicted[i], alone[i] + correction, rtol=1e-3, atol=1e-4)


def test_one_stage_stands_still_while_the_other_trains(tmp_path, data):
    model, seen = make_model(image_epochs=1, image_lr=1e-3, lr=1e-3).train(), []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, model):
            self.keep(model)

        def on_train_end(self, trainer, model):
            self.keep(model)

        def keep(self, model):
            seen.append({key: value.clone() for key, value in model.state_dict().items()})

    make_trainer(tmp_path, 3, callbacks=[Watch()]).fit(model, datamodule=data)

    def changed(before, after):
        return {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}

    start, image, _, end = seen
    assert changed(start, image) == {"image_encoder", "image_head"}
    assert changed(image, end) == {"graph", "corrects"}, "not even the running means of a norm"
    np.testing.assert_allclose(start["mean"], data.target[data.rows("train")].mean(axis=0), rtol=1e-5)


def test_resumed_in_the_second_stage_is_uninterrupted(tmp_path, data):
    whole, part, again = (make_model(image_epochs=1, lr=1e-3, seed=seed).train() for seed in (0, 0, 1))
    make_trainer(tmp_path, 3).fit(whole, datamodule=data)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="x", enable_version_counter=False)
    make_trainer(tmp_path, 2, callbacks=[saving], enable_checkpointing=True).fit(part, datamodule=data)
    make_trainer(tmp_path, 3).fit(again, datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert whole.corrects and not torch.equal(whole.graph.head.weight, part.graph.head.weight)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_a_training_without_the_second_stage_says_so_and_predicts_by_the_tile(tmp_path, data, caplog):
    model = make_model(image_epochs=1).train()
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(model, datamodule=data)
    assert "the graph network of sepal is not trained" in caplog.text
    model.eval()
    predicted = torch.cat([output.predicted for output in trainer.predict(model, datamodule=data)])
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("test"))))
    with torch.no_grad():
        expected = model.mean + model.image_head(model.image_encoder(batch.image))
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("stage", [1, 2])
def test_overfits_eight_spots(data, stage):
    model = make_model(image_lr=5e-3, lr=1e-2)
    model.set_graphs(data)
    rows = data.rows("train")[:8]
    model.mean.copy_(torch.from_numpy(data.target[rows].mean(axis=0)))
    if stage == 2:
        model.corrects.fill_(True)
        torch.nn.init.zeros_(model.image_head.weight)
        torch.nn.init.zeros_(model.image_head.bias)
        model._embedding = torch.randn(len(data.spots), model.image_encoder.num_features)
    batch = data.batch(SpotIndex(torch.from_numpy(rows)))
    batch.target = batch.target.maximum(model.mean - 0.9)  # the last ELU leaves no correction below -1
    optimizer = model.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 1e-2]
    model.train()
    losses = []
    for _ in range(150 if stage == 2 else 40):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operator": "gat"}, "model.operator=gat: choose gcn or graph"),
        ({"position": "none"}, "model.position=none: choose concat or sum"),
        ({"hidden": []}, r"model.hidden=\[\]: with model.head=true there must be a graph convolution"),
        ({"before": [0]}, r"model.before=\[0\]: a list, each a whole number of at least 1"),
        ({"image_epochs": -1}, "model.image_epochs=-1: a whole number of at least 0 would fit"),
        ({"lr": 0.0}, "model.lr=0.0: a number above 0, up to 1 would fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)
