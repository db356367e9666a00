"""HECLIP: its loss against loops, naming and sizes of the published code, that it learns and retrieves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sections import make_data, make_trainer

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.models.encoders.image import ImageEncoder
from stexp.models.heclip import HECLIP
from stexp.models.losses import image_targets
from stexp.protocol import Protocol


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    return make_data(tmp_path_factory.mktemp("sections"), Protocol("strict"))


def make_model(n_genes: int = 30, **kwargs) -> HECLIP:
    torch.manual_seed(0)
    return HECLIP(ImageEncoder("test_resnet", pretrained=False), n_genes, **kwargs).eval()


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_loss_equals_a_loop_over_pairs(temperature):
    image, spot = np.random.default_rng(0).normal(size=(2, 6, 4))
    target = [softmax([image[i] @ image[j] / temperature for j in range(6)]) for i in range(6)]
    expected = 0.0
    for i in range(6):  # a tile among the spots; targets of the other tiles for it, as in the published code
        share = softmax([image[i] @ spot[j] / temperature for j in range(6)])
        expected -= sum(target[j][i] * math.log(share[j]) for j in range(6)) / 6
    computed = image_targets(*(torch.from_numpy(x).float() for x in (image, spot)), temperature)
    assert float(computed) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ["hvg", "heg"])
def test_published_size_and_names(variant):
    with torch.device("meta"):
        model = HECLIP(ImageEncoder("resnet50", pretrained=False), 3467, variant=variant)

    def head(n: int, dims: int) -> int:
        return (n + 1) * dims + (dims + 1) * dims + 2 * dims

    heads = {"hvg": head(2048, 3467), "heg": head(2048, 256) + head(3467, 256)}
    # ResNet-50 has 25,557,032 parameters with its 1,000 classes
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 - 2049 * 1000 + heads[variant]
    sides = {name.split("_projection.")[0] for name in model.state_dict() if "_projection." in name}
    assert sides == ({"image"} if variant == "hvg" else {"image", "spot"})


def test_a_spot_of_hvg_is_its_expression(data):
    batch = data.batch(SpotIndex(torch.arange(9), image=False))
    assert torch.equal(make_model(len(data.panel)).embed_batch_spots(batch), batch.expression)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("variant", ["hvg", "heg"])
def test_overfits_eight_spots_and_retrieves_the_right_ones(data, variant):
    model = make_model(len(data.panel), variant=variant, embedding_dim=16, lr=3e-3, dropout=0.0)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["weight_decay"] == 1e-3
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        similarity = model.embed_tiles(batch) @ model.embed_batch_spots(batch).T
    assert (similarity.argmax(dim=1) == torch.arange(8)).float().mean() >= 7 / 8


def test_predicts_the_mean_of_the_most_similar_training_spots(tmp_path, data):
    model = make_model(len(data.panel), k=7)
    predicted = torch.cat([part.predicted for part in make_trainer(tmp_path).predict(model, datamodule=data)])
    side, test = data.rows("train", "validation"), data.rows("test")
    reference = data.expression[side] / np.linalg.norm(data.expression[side], axis=1, keepdims=True)
    with torch.no_grad():
        query = model.embed_image(data.batch(SpotIndex(torch.from_numpy(test))).image).numpy()
    for q, made in zip(query, predicted, strict=True):
        expected = data.target[side[np.argsort(-(reference @ q))[:7]]].mean(axis=0)
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
