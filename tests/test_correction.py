"""Retrieve and correct: the query's own reference is left out, what is learned adds something and is kept."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from demo_run import run
from sections import make_data, make_trainer

from stexp.data.datamodule import SpotDataModule
from stexp.inference.export import export
from stexp.models import correction
from stexp.models.bleep import BLEEP
from stexp.models.correction import Correction, Retrieved, fit_correction, without_itself
from stexp.models.encoders.image import ImageEncoder
from stexp.models.mclstexp import MclSTExp
from stexp.models.retrieval import ReferenceIndex
from stexp.models.retrieval_method import RetrievalMethod
from stexp.protocol import Protocol
from stexp.training.checkpoints import keep_weights, load_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    return make_data(tmp_path_factory.mktemp("sections"), Protocol("strict"))


def make_model(data: SpotDataModule, kind: str, *, seed: int = 0, **kwargs) -> RetrievalMethod:
    torch.manual_seed(seed)
    encoder = ImageEncoder("test_resnet", pretrained=False)
    kwargs = {"embedding_dim": 16, "k": 5} | kwargs
    if kind == "bleep":
        return BLEEP(encoder, len(data.panel), **kwargs).eval()
    return MclSTExp(encoder, len(data.panel), data.array_size, depth=1, heads=2, head_dim=8, **kwargs).eval()


def index_of(embedding: torch.Tensor) -> ReferenceIndex:
    names = np.repeat("A", len(embedding))
    return ReferenceIndex(embedding, names, names)


def estimate(index: ReferenceIndex, query: torch.Tensor, k: int, expression: torch.Tensor) -> torch.Tensor:
    return index.average(index.search(query, k, "cosine", "similarity"), expression, spread=False)[0]


def test_a_spot_is_estimated_without_itself():
    draws = torch.Generator().manual_seed(0)
    references, own = torch.randn(20, 4, generator=draws), torch.tensor([3, 11, -1])
    query = torch.cat([references[[3, 11]] + 0.01, torch.randn(1, 4, generator=draws)])
    found = without_itself(index_of(references).search(query, 6, "cosine", "similarity"), own)
    for i, itself in enumerate(own.tolist()):
        similarity = torch.nn.functional.cosine_similarity(query[i][None], references)
        ranked = [row for row in similarity.argsort(descending=True).tolist() if row != itself][:5]
        assert found.index[i].tolist() == ranked
        torch.testing.assert_close(found.weight[i], (similarity[ranked] / 0.1).softmax(dim=0), rtol=1e-4, atol=1e-6)


def task(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and expression that no mean over neighbours reaches: it grows with the first coordinate."""
    query = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return query, torch.stack([3 * query[:, 0] + gene for gene in range(4)], dim=1)


@pytest.fixture(scope="module")
def learned() -> tuple[Correction, int, Retrieved]:
    references, expression = task(60, 0)
    index = index_of(references)
    parts = []
    for n, seed in ((200, 1), (60, 2)):
        query, target = task(n, seed)
        parts.append(Retrieved(query, estimate(index, query, 50, expression), target, np.repeat("A", n)))
    model = Correction(6, 4)
    return model, fit_correction(model, *parts, seed=0), parts[1]


def test_the_residual_lowers_error_and_is_left_at_an_epoch(learned):
    model, epoch, spots = learned
    made = spots.estimate
    before, after = ((x - spots.target).square().mean() for x in (made, made + model(spots.query)))
    assert 1 <= epoch <= correction.EPOCHS and float(after) < 0.7 * float(before)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_a_penalty_keeps_the_residual_small(learned, monkeypatch):
    model, _, spots = learned
    monkeypatch.setattr(correction, "PENALTY", 100.0)
    tight = Correction(6, 4)
    fit_correction(tight, spots, None, seed=0)
    assert float(tight(spots.query).square().mean()) < 0.2 * float(model(spots.query).square().mean())


def test_nothing_is_added_where_nothing_helps_on_validation_spots():
    references, expression = task(60, 0)
    index = index_of(references)
    query, target = task(40, 1)
    training = Retrieved(query, estimate(index, query, 5, expression), target.flip(0), np.repeat("A", 40))
    exact = Retrieved(references, estimate(index, references, 1, expression), expression, np.repeat("A", 60))
    model = Correction(6, 4)
    assert fit_correction(model, training, exact, seed=0) == 0
    assert not model(query).any()


@pytest.mark.parametrize("kind", ["mclstexp", "bleep"])
def test_a_method_learns_its_correction_after_training_and_keeps_it(data, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(correction, "EPOCHS", 2)
    model, trainer = make_model(data, kind, correct=True), make_trainer(tmp_path, limit_train_batches=2)
    trainer.fit(model, datamodule=data)
    encoders = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("correction.")}
    plain = torch.cat([part.predicted for part in trainer.predict(model, datamodule=data)])
    assert set(model.finish(data)) == {"correction_epochs"}
    for key, value in encoders.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    with torch.no_grad():
        model.correction.layers[-1].bias += 1.0  # whatever the epoch: something to see
    made = trainer.predict(model, datamodule=data)
    query, corrected = (torch.cat([getattr(part, key) for part in made]) for key in ("image_embedding", "predicted"))
    torch.testing.assert_close(corrected - plain, model.correction(query), rtol=1e-4, atol=1e-4)

    checkpoint = tmp_path / "last.ckpt"
    torch.save({"state_dict": make_model(data, kind, correct=True).state_dict(), "SpotDataModule": {}}, checkpoint)
    keep_weights(checkpoint, model.state_dict())
    again = make_model(data, kind, seed=1, correct=True)
    again.load_state_dict(load_checkpoint(checkpoint)["state_dict"])
    repeated = torch.cat([part.predicted for part in trainer.predict(again.eval(), datamodule=data)])
    torch.testing.assert_close(repeated, corrected, rtol=1e-5, atol=1e-5)


def test_what_is_retrieved_for_training_spots_is_averaged_once(data, tmp_path, monkeypatch):
    model, trainer = make_model(data, "mclstexp", correct=True), make_trainer(tmp_path)
    trainer.predict(model, datamodule=data)  # it needs to know its trainer
    averaged, average = [], ReferenceIndex.average

    def spy(index, neighbours, *args, **kwargs):
        averaged.append(len(neighbours.index))
        return average(index, neighbours, *args, **kwargs)

    monkeypatch.setattr(ReferenceIndex, "average", spy)
    model.finish(data)
    assert averaged == [len(data.rows("train")), len(data.rows("validation"))]


def test_a_run_killed_after_its_correction_was_kept_learns_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(correction, "EPOCHS", 2)
    data = make_data(tmp_path, Protocol("strict", validation=False))  # the last epoch is kept, so that weights moved
    checkpoint, states, predicted = tmp_path / "last.ckpt", [], []
    first = make_model(data, "mclstexp", correct=True)
    torch.save({"state_dict": first.state_dict(), "SpotDataModule": {}}, checkpoint)
    for seed in (1, 2):
        model, trainer = make_model(data, "mclstexp", seed=seed, correct=True), make_trainer(tmp_path)
        model.load_state_dict(load_checkpoint(checkpoint)["state_dict"])
        trainer.predict(model, datamodule=data)  # it needs to know its trainer
        assert model.finish(data) == {"correction_epochs": 2}
        keep_weights(checkpoint, model.state_dict())
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        predicted.append(torch.cat([part.predicted for part in trainer.predict(model, datamodule=data)]))
    assert states[0]["correction.layers.4.weight"].any()
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    torch.testing.assert_close(predicted[1], predicted[0], rtol=0, atol=0)


def test_without_correct_nothing_is_added_and_no_weight_is_there(data):
    model = make_model(data, "mclstexp")
    assert model.finish(data) == {} and model.weighting == "inverse_square"
    assert not any(key.startswith("correction.") for key in model.state_dict())


@pytest.mark.slow
def test_an_exported_model_corrects_as_its_run_does(demo: Path, tmp_path: Path):
    run(demo, tmp_path / "run", "model.correct=true", "model.k=20", "trainer.max_epochs=2", "image_encoder.frozen=true")
    chosen = ad.read_h5ad(tmp_path / "run" / "predictions.h5ad").uns["stexp"]["chosen"]
    assert "correction_epochs" in chosen
    weights = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")["state_dict"]
    assert weights["correction.layers.4.weight"].any()
    assert export(tmp_path / "run", tmp_path / "model", alpha=None)["reproduces"]["largest_difference"] < 1e-3
