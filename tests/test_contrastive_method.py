"""Contrastive methods with each objective, with a memory of negatives and with a mask: in training, and resumed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from encoders import frozen
from sections import make_data, make_sections, make_trainer

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.encoders.image import ImageEncoder
from stexp.models.mclstexp import MclSTExp
from stexp.protocol import Protocol

OBJECTIVES = ["infonce", "soft", "jsd", "dv", "nwj"]


def make_encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder("test_resnet", pretrained=False, frozen=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    folder = tmp_path_factory.mktemp("sections")
    return make_data(folder, Protocol("strict"), encoder=frozen(make_encoder(), folder / "cache"))


def make_model(data: SpotDataModule, *, seed: int = 0, **kwargs) -> MclSTExp:
    encoder = make_encoder()
    torch.manual_seed(seed)
    shared = {"embedding_dim": 16, "k": 5, "normalise": True, "temperature": 0.1, "lr": 3e-3} | kwargs
    return MclSTExp(encoder, len(data.panel), data.array_size, depth=1, heads=2, head_dim=8, **shared)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_overfits_eight_spots(data, objective):
    model = make_model(data, objective=objective, negatives_memory=0 if objective == "soft" else 5)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8]), image=False))
    # the encoder of the tests, which has random weights, says nearly the same of all tiles
    batch.features = torch.randn(8, data.n_features, generator=torch.Generator().manual_seed(0))
    optimizer = model.configure_optimizers()
    for _ in range(40):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        similarity = model.embed_tiles(batch) @ model.embed_batch_spots(batch).T
    assert (similarity.argmax(dim=1) == torch.arange(8)).all()


def test_beside_log_of_the_batch_stands_infonce_whatever_is_trained_with(data, monkeypatch):
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8]), image=False))
    logged: dict[str, dict[str, float]] = {}
    for name, kwargs in {
        "infonce": {},
        "jsd": {"objective": "jsd"},
        "soft": {"objective": "soft"},
        "masked": {"mask_within_um": 1e6},
    }.items():
        model, own = make_model(data, **kwargs), logged.setdefault(name, {})
        monkeypatch.setattr(model, "log", lambda key, value, own=own, **_: own.update({key: float(value.detach())}))
        model.training_step(batch, 0)
    for name, own in logged.items():
        assert own["train/mean_loss"] == pytest.approx(logged["infonce"]["train/loss"], rel=1e-5), name
        assert own["train/log_batch"] == pytest.approx(2.0794415)
    levels = {name: own.get("train/loss_by_chance") for name, own in logged.items()}
    # all spots of a section are masked: those that are left are of the other two
    assert levels == {"infonce": None, "soft": None, "jsd": pytest.approx(1.3862944), "masked": levels["masked"]}
    assert 0 <= levels["masked"] < 2.0794415


def test_a_resumed_training_with_a_memory_is_one_that_was_never_stopped(data, tmp_path):
    def fit(model, epochs: int, ckpt_path=None):
        trainer = make_trainer(tmp_path, epochs=epochs, limit_val_batches=0)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    kwargs = {"negatives_memory": 40, "mask_within_um": 5.0}
    whole = make_model(data, **kwargs)
    fit(whole, 2)
    assert (whole.negatives.rows >= 0).all() and whole.negatives.image.norm(dim=1).min() > 0
    fit(make_model(data, **kwargs), 1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_model(data, seed=1, **kwargs)
    fit(resumed, 2, tmp_path / "half.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    other = make_model(data)
    fit(other, 2)
    assert not torch.allclose(other.image_projection.fc.weight, whole.image_projection.fc.weight)


def test_a_training_that_begins_at_other_weights_forgets_their_memory(data, tmp_path):
    model = make_model(data, negatives_memory=40)
    model.negatives.rows.fill_(0)
    make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(model, datamodule=data)
    assert (model.negatives.rows >= 0).sum() == data.batch_size


def test_a_mask_needs_the_scale_of_the_training_sections(data, tmp_path):
    sections = [dataclasses.replace(section, um_per_px=None) for section in make_sections(tmp_path, n_spots=25)]
    unmeasured = SpotDataModule(sections, data.protocol, "C", tile_px=16, batch_size=16, panel=data.panel)
    with pytest.raises(InputError, match=r"mask_within_um=100: the scale of section A1 .*data.um_per_px="):
        make_trainer(tmp_path).fit(make_model(data, mask_within_um=100.0), datamodule=unmeasured)
