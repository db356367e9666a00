"""ST-Net: its architecture against torchvision's, its start, its symmetries, what a checkpoint brings back."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from sections import make_trainer

from stexp.data.batches import SpotIndex
from stexp.errors import InputError
from stexp.models.encoders.image import ImageEncoder
from stexp.models.stnet import STNet


def make_model(n_genes: int = 30, *, seed: int = 0, **kwargs) -> STNet:
    torch.manual_seed(seed)
    return STNet(ImageEncoder("test_resnet", pretrained=False), n_genes, **kwargs).eval()


def test_published_size():
    with torch.device("meta"):
        model = STNet(ImageEncoder("densenet121", pretrained=False), 250)
    # DenseNet-121 has 7,978,856 parameters with its 1,000 classes (Huang et al. 2017)
    assert sum(p.numel() for p in model.parameters()) == 7_978_856 - 1025 * 1000 + 1025 * 250 == 7_210_106
    assert model.head.weight.shape == (250, 1024)


@torch.no_grad()
def test_output_is_that_of_the_published_architecture():
    torch.manual_seed(1)
    theirs = torchvision.models.densenet121(num_classes=20).eval()
    for name, tensor in theirs.state_dict().items():  # untrained statistics of 0 and 1 would hide an order that differs
        if "running" in name:
            tensor.uniform_(*((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)))
    encoder = ImageEncoder("densenet121", pretrained=False, mean=[0, 0, 0], std=[1, 1, 1])
    ours = STNet(encoder, 20, symmetries=False).eval()
    state = theirs.state_dict()
    ours.image_encoder.model.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.")})
    ours.head.load_state_dict(
        {k.removeprefix("classifier."): v for k, v in state.items() if k.startswith("classifier.")}
    )
    ours.mean.copy_(torch.tensor([0.6, 0.4, 0.5]).view(1, 3, 1, 1))
    ours.std.copy_(torch.tensor([0.2, 0.3, 0.1]).view(1, 3, 1, 1))
    image = torch.rand(2, 3, 64, 64)
    normalised = torchvision.transforms.functional.normalize(image, [0.6, 0.4, 0.5], [0.2, 0.3, 0.1])
    expected = theirs(normalised)
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(image), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("input_scale", ["train", "image_encoder"])
def test_starts_as_the_training_mean_and_scales_colours_by_the_training_tiles(data, input_scale):
    model = make_model(len(data.panel), input_scale=input_scale)
    model.start_from(data)
    rows = data.rows("train")
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("test"))))
    expected = data.target[rows].mean(axis=0)
    np.testing.assert_allclose(model.predict_step(batch).predicted, np.tile(expected, (50, 1)), rtol=1e-5)
    pixels = data.tiles(rows).numpy().reshape(-1, 3) / 255.0
    if input_scale == "train":
        np.testing.assert_allclose(model.mean.view(3), pixels.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(model.std.view(3), pixels.std(axis=0), rtol=1e-4)
    else:
        assert torch.equal(model.mean, model.image_encoder.mean) and torch.equal(model.std, model.image_encoder.std)


@torch.no_grad()
def test_prediction_is_the_mean_over_the_eight_symmetries(data):
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("test")[:5])))
    plain, averaged = make_model(symmetries=False), make_model(symmetries=True)
    for model in (plain, averaged):
        torch.manual_seed(2)
        torch.nn.init.normal_(model.head.weight)
    pixels = batch.image.numpy()
    seen = []
    for mirrored in (pixels, pixels[..., ::-1], pixels[..., ::-1, :], pixels[..., ::-1, ::-1]):
        seen += [mirrored, mirrored.swapaxes(2, 3)]
    assert len({image.tobytes() for image in seen}) == 8
    expected = np.mean([plain(torch.from_numpy(image.copy())).numpy() for image in seen], axis=0)
    np.testing.assert_allclose(averaged.predict_step(batch).predicted, expected, rtol=1e-4, atol=1e-5)
    batch.image = batch.image.rot90(1, (2, 3))
    np.testing.assert_allclose(averaged.predict_step(batch).predicted, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(plain.predict_step(batch).predicted.numpy() - expected).max() > 1e-2


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_loss_is_summed_over_spots_and_averaged_over_genes(data):
    model = make_model(len(data.panel))
    whole, first, rest = (
        data.batch(SpotIndex(torch.from_numpy(data.rows("train")[part])))
        for part in (slice(0, 8), slice(0, 3), slice(3, 8))
    )
    expected = sum(((0 - row) ** 2).mean() for row in whole.target.numpy())
    assert float(model.training_step(whole, 0).detach()) == pytest.approx(expected, rel=1e-5)
    parts = [float(model.training_step(batch, 0).detach()) for batch in (first, rest)]
    assert sum(parts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_overfits_eight_spots(data):
    model = make_model(len(data.panel), lr=5e-3, symmetries=False)
    model.start_from(data)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.9
    model.train()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def test_a_checkpoint_brings_back_start_and_predictions(tmp_path, data):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="x", enable_version_counter=False)
    model = make_model(len(data.panel), lr=1e-3)
    make_trainer(tmp_path, callbacks=[saving], enable_checkpointing=True).fit(model, datamodule=data)
    again = make_model(len(data.panel), seed=1)
    again.load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    first, second = (
        torch.cat([output.predicted for output in make_trainer(tmp_path).predict(m, datamodule=data)])
        for m in (model, again)
    )
    assert first.std(dim=0).max() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)

    resumed = make_model(len(data.panel), seed=1)
    make_trainer(tmp_path).fit(resumed, datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    torch.testing.assert_close(resumed.head.bias, model.head.bias, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_scale": "imagenet"}, "model.input_scale=imagenet: choose train or image_encoder"),
        ({"lr": 0.0}, "model.lr=0.0: a number above 0, up to 1 would fit"),
        ({"momentum": 1.0}, "model.momentum=1.0: a number from 0 to below 1 would fit"),
        ({"weight_decay": -1.0}, "model.weight_decay=-1.0: a number of at least 0 would fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)
