"""Methods that are one calculation: the training mean, and the probe of HEST-Benchmark."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from encoders import MadeUpFeatures
from sections import make_data
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.evaluation.metrics import pearson_per_gene
from stexp.evaluation.ridge import RidgeProbe
from stexp.models.closed_form import ClosedForm
from stexp.models.hest_ridge import HestRidge
from stexp.models.mean import Mean
from stexp.protocol import Protocol
from stexp.runs.comparison import floors_under
from stexp.training.callbacks import VALIDATION, ScoreValidation
from stexp.training.fit import fit
from stexp.training.machine import Machine

F = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    """Sections A1, A2, B1, B2 train, C1, C2 are held out; made-up features on three scales, some of the target."""
    rng = np.random.default_rng(0)
    encoder = MadeUpFeatures(rng.normal(size=(150, F)).astype(np.float32))
    protocol = Protocol("strict", validation=False)
    module = make_data(tmp_path_factory.mktemp("sections"), protocol, encoder=encoder)
    encoder.table[:, :5] = module.target[:, :5] + 0.1 * encoder.table[:, :5]
    encoder.table[:] = encoder.table * rng.choice([0.01, 1, 30], F) + rng.normal(size=F)
    return module


def fitted(model: ClosedForm, data: SpotDataModule) -> ClosedForm:
    model.fit_to(data)
    return model


def predict(model: ClosedForm, data: SpotDataModule) -> np.ndarray:
    return model.predict_step(data.batch(SpotIndex(torch.from_numpy(data.rows("test"))))).predicted.numpy()


def make_trainer(tmp_path, **kwargs) -> pl.Trainer:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    return pl.Trainer(
        max_epochs=1, limit_train_batches=1, accelerator="cpu", default_root_dir=tmp_path, **quiet | kwargs
    )


@pytest.mark.parametrize("n_components", [8, 256])
@pytest.mark.parametrize("penalty", ["hest", 5.0])
@pytest.mark.parametrize("intercept", [True, False])
def test_hest_ridge_against_scikit_learn(data, n_components, penalty, intercept):
    model = fitted(HestRidge(len(data.panel), F, n_components=n_components, penalty=penalty, intercept=intercept), data)
    train, kept = data.rows("train"), min(n_components, F)
    alpha = 100 / (kept * len(data.panel)) if penalty == "hest" else penalty
    steps = StandardScaler(), PCA(kept, svd_solver="full"), Ridge(alpha, fit_intercept=intercept, solver="svd")
    x = data.features.astype(np.float64)
    expected = make_pipeline(*steps).fit(x[train], data.target[train]).predict(x[data.rows("test")])
    np.testing.assert_allclose(predict(model, data), expected, rtol=1e-3, atol=1e-4)


def test_without_intercept_the_training_mean_is_missing_and_nothing_else(data):
    with_it, without = (
        predict(fitted(HestRidge(len(data.panel), F, intercept=intercept), data), data) for intercept in (True, False)
    )
    mean = data.target[data.rows("train")].mean(axis=0)
    np.testing.assert_allclose(with_it - without, np.tile(mean, (50, 1)), rtol=1e-4, atol=1e-5)
    truth = data.target[data.rows("test")]
    np.testing.assert_allclose(pearson_per_gene(truth, with_it), pearson_per_gene(truth, without), atol=1e-5)


def test_as_methods_they_are_the_floors_of_the_same_spots(data):
    floors = floors_under(data.protocol, data, data.features, None)
    ridge = fitted(HestRidge(len(data.panel), F, penalty="gcv"), data)
    np.testing.assert_allclose(predict(ridge, data), floors["ridge_features"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(predict(fitted(Mean(len(data.panel)), data), data), floors["mean"], rtol=1e-5)


def test_features_that_tell_of_a_gene_predict_it_and_others_do_not(data):
    found = predict(fitted(HestRidge(len(data.panel), F, penalty="gcv"), data), data)
    r = pearson_per_gene(data.target[data.rows("test")], found)
    assert r[:5].min() > 0.8 and abs(r[5:].mean()) < 0.3


def test_a_feature_that_never_changes_is_left_out():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 6)), rng.normal(size=(60, 3))
    constant = np.column_stack([x, np.full(60, 7.0)])
    expected = RidgeProbe.fit(x, y, penalty=1.0).predict(x)
    np.testing.assert_allclose(RidgeProbe.fit(constant, y, penalty=1.0).predict(constant), expected, atol=1e-8)


@pytest.mark.parametrize("make", [lambda genes: Mean(genes), lambda genes: HestRidge(genes, F)])
def test_validation_spots_train_as_they_do_for_floors_and_test_spots_do_not(data, monkeypatch, make):
    before = predict(fitted(make(len(data.panel)), data), data)
    spots, target = data.spots.copy(), data.target.copy()
    spots.loc[spots["section"] == "A2", "role"] = "validation"
    monkeypatch.setattr(data, "spots", spots)
    target[data.rows("test")] = np.nan
    monkeypatch.setattr(data, "target", target)
    np.testing.assert_array_equal(predict(fitted(make(len(data.panel)), data), data), before)


@pytest.mark.filterwarnings("ignore:.*returned .None.")
@pytest.mark.parametrize("make", [lambda genes: Mean(genes), lambda genes: HestRidge(genes, F)])
def test_one_step_fits_and_a_checkpoint_brings_it_back(tmp_path, data, make):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="x", enable_version_counter=False)
    model, again = make(len(data.panel)), make(len(data.panel))
    make_trainer(tmp_path, callbacks=[saving]).fit(model, datamodule=data)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    again.load_state_dict(checkpoint["state_dict"])
    expected = predict(fitted(make(len(data.panel)), data), data)
    np.testing.assert_array_equal(predict(again, data), expected)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(predict(again, data), expected)


def test_spots_that_are_learnt_from_have_no_validation_score(tmp_path):
    """It would be in sample: the training mean of each section's own spots, say."""
    data = make_data(tmp_path, Protocol("strict"), encoder=MadeUpFeatures(np.ones((150, 4), np.float32)))
    assert len(data.rows("validation"))
    machine = Machine({"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": 1}, "32-true")
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "checkpoints", filename="last", monitor=None)
    model = Mean(len(data.panel))
    trainer = fit(model, data, tmp_path, machine, callbacks=[keep, ScoreValidation()])
    assert VALIDATION not in trainer.callback_metrics
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt"}
    np.testing.assert_allclose(
        predict(model, data)[0], data.target[data.rows("train", "validation")].mean(0), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_components": 0}, "model.n_components=0: a whole number of at least 1 would fit"),
        ({"penalty": "cv"}, "model.penalty=cv: hest, gcv or a number above 0"),
        ({"penalty": -1}, "model.penalty=-1: hest, gcv or a number above 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        HestRidge(3, 4, **arguments)
