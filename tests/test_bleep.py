"""BLEEP: loss against loops, naming and sizes of the published code, retrieval, re-scoring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sections import make_trainer

from stexp.data.batches import SpotIndex
from stexp.errors import InputError
from stexp.models.bleep import BLEEP
from stexp.models.encoders.image import ImageEncoder
from stexp.models.objectives import Candidates, contrastive_loss


def make_model(n_genes: int = 30, *, seed: int = 0, **kwargs) -> BLEEP:
    torch.manual_seed(seed)
    encoder = ImageEncoder("test_resnet", pretrained=False, frozen=kwargs.pop("frozen", False))
    return BLEEP(encoder, n_genes, **{"embedding_dim": 16} | kwargs).eval()


# loss


def soft_info_nce(image, spot, temperature=1.0, target_temperature="multiply") -> torch.Tensor:
    return contrastive_loss("soft", Candidates.of_batch(image, spot), temperature, 0.5, target_temperature)


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def slow_loss(image: np.ndarray, spot: np.ndarray, temperature: float, multiply: bool) -> float:
    n, factor = len(image), temperature if multiply else 1 / temperature
    target = [softmax([(image[i] @ image[j] + spot[i] @ spot[j]) / 2 * factor for j in range(n)]) for i in range(n)]
    logits = [[spot[i] @ image[j] / temperature for j in range(n)] for i in range(n)]
    loss = 0.0
    for i in range(n):
        by_spot = softmax(logits[i])
        by_image = softmax([logits[j][i] for j in range(n)])
        for j in range(n):
            loss -= target[i][j] * math.log(by_spot[j]) / (2 * n)
            loss -= target[j][i] * math.log(by_image[j]) / (2 * n)
    return loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("target_temperature", ["multiply", "divide"])
def test_loss_equals_a_loop_over_pairs(temperature, target_temperature):
    rng = np.random.default_rng(0)
    image, spot = rng.normal(size=(2, 6, 4))
    expected = slow_loss(image, spot, temperature, target_temperature == "multiply")
    found = soft_info_nce(*(torch.from_numpy(x).float() for x in (image, spot)), temperature, target_temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_targets_are_soft_where_spots_are_alike():
    apart = 8 * torch.eye(6)
    assert float(soft_info_nce(apart, apart)) == pytest.approx(0, abs=1e-6)
    twins = apart[[0, 0, 2, 3, 4, 5]]  # two spots that are the same: neither is the other's negative
    assert float(soft_info_nce(twins, twins)) == pytest.approx(2 / 6 * math.log(2), rel=1e-4)
    assert float(soft_info_nce(apart, apart.roll(1, 0))) > 10


def test_loss_is_in_float32_under_autocast_and_its_gradient_goes_through_the_targets():
    draws = torch.Generator().manual_seed(0)
    image, spot = (torch.randn(8, 64, generator=draws).requires_grad_() for _ in range(2))
    expected = soft_info_nce(image, spot)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(soft_info_nce(image, spot), expected, rtol=0, atol=0)
    expected.backward()
    with torch.no_grad():
        step = 1e-2 * torch.nn.functional.normalize(image.grad)
        slope = (soft_info_nce(image + step, spot) - soft_info_nce(image - step, spot)) / 2
        assert float((image.grad * step).sum()) == pytest.approx(float(slope), rel=1e-2)


# the published model


def test_published_size_and_names():
    with torch.device("meta"):
        model = BLEEP(ImageEncoder("resnet50", pretrained=False), 3467)

    def head(n):
        return (n + 1) * 256 + 257 * 256 + 2 * 256

    # ResNet-50 has 25,557,032 parameters with its 1,000 classes
    assert sum(p.numel() for p in model.parameters()) == 25_557_032 - 2049 * 1000 + head(2048) + head(3467)
    names = {name for name in model.state_dict() if not name.startswith("image_encoder.model.")}
    parts = ("projection.weight", "projection.bias", "fc.weight", "fc.bias", "layer_norm.weight", "layer_norm.bias")
    assert names == {f"{side}_projection.{part}" for side in ("image", "spot") for part in parts}
    assert "image_encoder.model.layer4.2.conv3.weight" in model.state_dict()


@torch.no_grad()
def test_heads_equal_their_formula_on_weights_under_the_published_names(data):
    rng, model = np.random.default_rng(0), make_model(len(data.panel))
    state = model.state_dict()
    for name in state:
        if "_projection." in name:
            state[name] = torch.from_numpy(rng.normal(size=state[name].shape)).float()
    model.load_state_dict(state)
    batch = data.batch(SpotIndex(torch.arange(9)))

    def head(x, side):
        weights = {k.split(".", 1)[1]: v.double().numpy() for k, v in state.items() if k.startswith(f"{side}_")}
        p = x @ weights["projection.weight"].T + weights["projection.bias"]
        gelu = p * np.vectorize(lambda v: (1 + math.erf(v / math.sqrt(2))) / 2)(p)
        y = gelu @ weights["fc.weight"].T + weights["fc.bias"] + p
        y = (y - y.mean(axis=1, keepdims=True)) / np.sqrt(y.var(axis=1, keepdims=True) + 1e-5)
        return y * weights["layer_norm.weight"] + weights["layer_norm.bias"]

    spot = head(batch.expression.double().numpy(), "spot")
    np.testing.assert_allclose(model.embed_batch_spots(batch), spot, rtol=1e-3, atol=1e-4)
    image = head(model.image_encoder(batch.image).double().numpy(), "image")
    np.testing.assert_allclose(model.embed_image(batch.image), image, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_dim": 0}, "model.embedding_dim=0: a whole number of at least 1 would fit"),
        ({"target_temperature": "none"}, "model.target_temperature=none: choose multiply or divide"),
        ({"temperature": 0.0}, "model.temperature=0.0: a number above 0 would fit"),
        ({"dropout": 2.0}, "model.dropout=2.0: a number from 0 to 1 would fit"),
        ({"weighting": "gaussian"}, "model.weighting=gaussian: choose"),
        ({"k": 0}, "model.k=0: a whole number of at least 1 or auto"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)


# training and retrieval


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_overfits_eight_spots_and_retrieves_the_right_ones(data):
    model = make_model(len(data.panel), lr=3e-3, dropout=0.0)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["weight_decay"] == 1e-3
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        tile, spot = model.embed_image(batch.image), model.embed_batch_spots(batch)
    similarity = torch.nn.functional.normalize(tile) @ torch.nn.functional.normalize(spot).T
    assert (similarity.argmax(dim=1) == torch.arange(8)).all()


def test_a_spot_embeds_by_its_expression_alone(data):
    model = make_model(len(data.panel))
    few, many = (data.batch(SpotIndex(torch.arange(n), image=False)) for n in (3, 60))
    torch.testing.assert_close(model.embed_batch_spots(few), model.embed_batch_spots(many)[:3], rtol=1e-5, atol=1e-5)


def test_predicts_the_mean_of_the_k_most_similar_training_spots(tmp_path, data):
    model = make_model(len(data.panel), k=7)
    outputs = make_trainer(tmp_path).predict(model, datamodule=data)
    predicted = torch.cat([output.predicted for output in outputs]).numpy()
    side, test = data.rows("train", "validation"), data.rows("test")
    with torch.no_grad():
        reference = model.embed_batch_spots(data.batch(SpotIndex(torch.from_numpy(side)))).double().numpy()
        query = model.embed_image(data.batch(SpotIndex(torch.from_numpy(test))).image).double().numpy()
    for q, found in zip(query, predicted, strict=True):
        cosine = reference @ q / np.linalg.norm(reference, axis=1)
        expected = data.target[side[np.argsort(-cosine)[:7]]].mean(axis=0)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_more_neighbours_than_references_are_refused_before_training(tmp_path, data):
    with pytest.raises(InputError, match="k=1000, but there are"):
        make_trainer(tmp_path).fit(make_model(len(data.panel), k=1000), datamodule=data)
