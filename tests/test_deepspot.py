"""DeepSpot: its size, its output against loops over spots and layers, what it sees, that it learns and comes back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from encoders import frozen
from sections import make_data, make_trainer

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.models.deepspot import DeepSpot, Phi
from stexp.models.encoders.image import ImageEncoder
from stexp.protocol import Protocol


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    folder = tmp_path_factory.mktemp("sections")
    torch.manual_seed(0)
    encoder = ImageEncoder("test_resnet", pretrained=False)
    return make_data(folder, Protocol("strict"), encoder=frozen(encoder, folder / "cache"))


def make_model(data: SpotDataModule, *, seed: int = 0, **kwargs) -> DeepSpot:
    torch.manual_seed(seed)
    model = DeepSpot(len(data.panel), data.n_features, **{"dim": 16} | kwargs).eval()
    model._trainer = SimpleNamespace(datamodule=data, ckpt_path=None)
    model.on_fit_start()
    model._trainer = None
    return model


def predict(model: DeepSpot, data: SpotDataModule, rows: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return model.predict_step(data.batch(SpotIndex(torch.from_numpy(rows), image=False))).predicted


def test_published_size():
    with torch.device("meta"):
        model = DeepSpot(5000, 1536)
    phi, rho = 10 * (1536 + 1) * 512, 10 * (3 * 512 + 1) * 5000
    assert sum(parameter.numel() for parameter in model.parameters()) == phi + rho


@torch.no_grad()
@pytest.mark.parametrize("n_parallel", [1, 3, 4, 10])
def test_phi_is_the_element_wise_median_of_its_layers(n_parallel):
    torch.manual_seed(0)
    phi = Phi(5, 7, n_parallel, 0.3).eval()
    x = torch.randn(2, 6, 5)
    weight, bias = phi.linear.weight.double().numpy(), phi.linear.bias.double().numpy()
    for value, row in zip(phi(x).reshape(-1, 7), x.reshape(-1, 5).double().numpy(), strict=True):
        layers = [np.maximum(weight[7 * i : 7 * i + 7] @ row + bias[7 * i : 7 * i + 7], 0) for i in range(n_parallel)]
        expected = np.sort(layers, axis=0)[(n_parallel - 1) // 2]  # of an even number the lower one
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_equals_a_loop_over_spots(data):
    model = make_model(data, n_parallel=4)
    model.scale.uniform_(0.5, 2)
    rows, parts = data.rows("test"), data.subtiles(3)
    pitch = np.linalg.norm(data.xy_px[rows[0]] - data.xy_px[rows[5]])  # one row down, the shorter way
    for row, found in zip(rows[::3], predict(model, data, rows)[::3], strict=True):
        same = (data.spots["section"] == data.spots["section"].iloc[row]).to_numpy()
        apart = np.linalg.norm(data.xy_px - data.xy_px[row], axis=1)
        near = np.flatnonzero(same & (apart > 0) & (apart <= 1.6 * pitch))
        beside = [torch.from_numpy(data.tile_features[i]) for i in near]
        assert len(beside) in (2, 3, 4, 5, 8)
        tile = model.phi(torch.from_numpy(data.tile_features[row]))
        of_parts = sum(model.phi(torch.from_numpy(part)) for part in parts[np.array([row])][0])
        largest = torch.stack([model.phi(features) for features in beside]).max(dim=0).values
        seen = torch.cat([tile, of_parts, largest])
        expected = sum(layer[2](seen.clamp(min=0)) for layer in model.rho) / 4 * model.scale + model.mean
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sections_without_an_image_do_not_spoil_gradients(data, tmp_path, monkeypatch):
    features = data.tile_features.copy()
    features[0] = np.nan  # of the first spot of all, which then is of such a section
    monkeypatch.setattr(SpotDataModule, "tile_features", features)
    model = make_model(data)
    rows = data.rows("train")[-5:]
    batch = data.batch(SpotIndex(torch.from_numpy(rows), image=False))
    model.standardised(batch).square().mean().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())


def test_a_spot_alone_in_its_section_has_no_neighbours_and_is_predicted(data):
    model = make_model(data)
    tile, parts = torch.randn(2, data.n_features), torch.randn(2, 9, data.n_features)
    alone = torch.full((2, 8), -1)
    with torch.no_grad():
        first, second = (model(tile, parts, torch.randn(1, data.n_features), alone) for _ in range(2))
    assert torch.equal(first, second)


def test_a_prediction_does_not_depend_on_the_batch(data):
    model, rows = make_model(data), data.rows("test")
    whole = predict(model, data, rows)
    alone = torch.cat([predict(model, data, rows[i : i + 1]) for i in range(0, len(rows), 7)])
    torch.testing.assert_close(alone, whole[::7], rtol=1e-5, atol=1e-5)
    assert float(whole.std(dim=0).mean()) > 1e-3


def test_targets_are_standardised_by_the_training_spots(data):
    model, target = make_model(data), data.target[data.rows("train")]
    np.testing.assert_allclose(model.mean, target.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(model.scale, target.std(axis=0), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_training_that_goes_on_keeps_the_scale_of_its_weights(data):
    model = make_model(data)
    model.mean.fill_(7.0)  # as of a model that it began at
    model._trainer = SimpleNamespace(datamodule=data, ckpt_path="last.ckpt")
    model.on_fit_start()
    assert (model.mean == 7).all()


def test_overfits_a_few_spots_with_the_published_optimizer(data):
    model = make_model(data, dim=64, dropout=0.0, output_dropout=0.0, lr=5e-3)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["weight_decay"] == 1e-6
    rows = data.rows("train")[:8]
    batch = data.batch(SpotIndex(torch.from_numpy(rows), image=False))
    model.train()
    for _ in range(250):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    model.eval()
    residual = predict(model, data, rows) - batch.target
    assert float(residual.square().mean()) < 0.05 * float((batch.target - model.mean).square().mean())


def test_trains_on_kept_features_alone_and_comes_back(data, tmp_path, monkeypatch):
    model, trainer = make_model(data), make_trainer(tmp_path)
    data.augmentation = "dihedral"  # of tiles, which nothing reads
    monkeypatch.setattr("stexp.data.datamodule.augment", lambda *_: pytest.fail("tiles are gathered"))
    try:
        trainer.fit(model, datamodule=data)
        made = trainer.predict(model, datamodule=data)
    finally:
        data.augmentation = "none"
    again = make_model(data, seed=1)
    again.load_state_dict(model.state_dict())
    predicted = torch.cat([part.predicted for part in made])
    torch.testing.assert_close(predict(again.eval(), data, data.rows("test")), predicted, rtol=1e-5, atol=1e-5)
