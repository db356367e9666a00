"""A contrastive loss beside chance: per epoch in a run's folder, in words in its verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sections import make_data, make_trainer

from stexp.data.datamodule import SpotDataModule
from stexp.evaluation import contrast
from stexp.evaluation.contrast import describe_contrast, read_contrast, summarise
from stexp.evaluation.verdict import verdict
from stexp.models.bleep import BLEEP
from stexp.models.encoders.image import ImageEncoder
from stexp.models.losses import beside_chance, image_targets, info_nce
from stexp.models.mclstexp import MclSTExp
from stexp.models.retrieval_method import RetrievalMethod
from stexp.protocol import Protocol
from stexp.training.callbacks import RecordContrast


def epoch(loss: float, matched: float, *, batch: int = 64, n_spots: int = 1600, number: int = 1) -> contrast.Epoch:
    values = {"loss": loss, "log_batch": math.log(batch), "matched": matched, "chance": 1 / batch}
    return {"epoch": number, "n_spots": n_spots, **values}


@pytest.mark.parametrize("loss", [info_nce, image_targets])
def test_embeddings_that_carry_nothing_have_the_loss_and_the_matches_of_chance(loss):
    same = torch.ones(11, 4)
    beside = beside_chance(loss(same, same), same, same)
    assert float(beside["mean_loss"]) == pytest.approx(math.log(11))
    assert float(beside["log_batch"]) == pytest.approx(math.log(11))
    assert float(beside["matched"]) == pytest.approx(1 / 11) and float(beside["chance"]) == pytest.approx(1 / 11)
    apart = 8 * torch.eye(11)
    assert float(beside_chance(loss(apart, apart), apart, apart)["matched"]) == 1


@pytest.mark.parametrize(
    ("epochs", "left"),
    [
        ([epoch(4.158, 0.016), epoch(4.15, 0.018)], False),
        ([epoch(9.0, 0.010)], False),
        ([epoch(4.158, 0.016), epoch(4.0, 0.016), epoch(4.158, 0.016)], True),  # by its loss, if only for an epoch
        ([epoch(9.0, 0.040)], True),  # by its matches, though embeddings are too long
        ([epoch(4.158, 0.024)], False),  # 38 of 1,600, where 25 are expected
        ([epoch(4.158, 0.024, n_spots=160_000)], True),
    ],
)
def test_a_training_left_chance_by_loss_or_by_matches(epochs, left):
    assert summarise(epochs)["left_chance"] == left


def test_of_trainings_at_chance_at_most_a_few_in_a_thousand_are_said_to_have_left_it():
    draws, left = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        epochs = []
        for _ in range(40):
            image, spot = torch.randn(2, 24, 8, generator=draws)
            matched = float(beside_chance(torch.tensor(math.log(24)), image, spot)["matched"])
            epochs.append(epoch(math.log(24), matched, batch=24, n_spots=24))
        left += summarise(epochs)["left_chance"]
    assert left <= 2


def test_soft_targets_alone_do_not_leave_chance(data, monkeypatch):
    model = BLEEP(ImageEncoder("test_resnet", pretrained=False), len(data.panel), embedding_dim=4)
    draws, logged = torch.Generator().manual_seed(0), []
    monkeypatch.setattr(model, "embed_tiles", lambda batch: (2 + torch.randn(16, 1, generator=draws) / 2).expand(16, 4))
    monkeypatch.setattr(model, "embed_batch_spots", lambda batch: torch.ones(16, 4))  # all spots the same
    monkeypatch.setattr(model, "log", lambda name, value, **_: logged.append((name, float(value))))
    batch, epochs = SimpleNamespace(whole=16), []
    for _ in range(100):
        logged.clear()
        loss, values = model.training_step(batch, 0), dict(logged)
        assert values["train/loss"] == float(loss) < 0.99 * math.log(16), "below it, though spots say nothing"
        epochs.append(epoch(values["train/mean_loss"], values["train/matched"], batch=16, n_spots=16))
    assert not summarise(epochs)["left_chance"]


def test_the_verdict_says_that_a_training_never_left_chance():
    part = {"pearson_acg": 0.3, "pearson_heg50": 0.3}
    floors = {"mean": {"pearson_acg": 0.0, "pearson_heg50": 0.0}}
    metrics = {"scores": part, "floors": floors, "ceiling": {}, "n_genes": 100, "n_spots": 90}
    section = {"scores": part, "floors": floors, "n_spots": 9}
    metrics["sections"] = {f"S{i}": {**section, "patient": f"P{i}"} for i in range(10)}
    assert verdict(metrics).outcome == "win"
    learned = metrics | {"contrast": summarise([epoch(3.0, 0.2)])}
    assert verdict(learned) == verdict(metrics)
    assert describe_contrast(learned).startswith("Contrastive loss 3.000 at its lowest, 4.159 for")
    certain = describe_contrast(metrics | {"contrast": summarise([epoch(9.0, 0.2)])})
    assert "temperature" in certain and "never left chance" not in certain
    assert "temperature" not in describe_contrast(learned)
    judged = verdict(metrics | {"contrast": summarise([epoch(4.158, 0.016)])})
    assert judged.outcome == "unclear" and judged.statement.startswith("The training never left chance: ")
    assert judged.statement.endswith(verdict(metrics).statement)
    assert describe_contrast(metrics) == ""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    return make_data(tmp_path_factory.mktemp("sections"), Protocol("strict"))


@pytest.mark.parametrize("kind", ["mclstexp", "bleep"])
def test_every_epoch_is_kept_with_means_over_its_spots(data, kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    encoder = ImageEncoder("test_resnet", pretrained=False)
    model: RetrievalMethod = (
        BLEEP(encoder, len(data.panel), embedding_dim=16, k=5)
        if kind == "bleep"
        else MclSTExp(encoder, len(data.panel), data.array_size, embedding_dim=16, depth=1, heads=2, head_dim=8, k=5)
    )
    seen, log = [], model.log_beside_chance

    def spy(loss, image, spot) -> None:
        seen.append((len(image), float(loss.detach())))
        log(loss, image, spot)

    monkeypatch.setattr(model, "log_beside_chance", spy)
    trainer = make_trainer(tmp_path, epochs=2, limit_val_batches=0, callbacks=[RecordContrast(tmp_path)])
    trainer.fit(model, datamodule=data)
    kept, n = read_contrast(tmp_path)["epochs"], len(data.rows("train"))
    assert [(each["epoch"], each["n_spots"]) for each in kept] == [(1, n), (2, n)]
    assert len({size for size, _ in seen}) > 1, "the last batch is another one"
    for own, part in zip(kept, np.split(np.array(seen), 2), strict=True):
        sizes, losses = part.T
        assert own["loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-4)
        assert own["log_batch"] == pytest.approx(np.average(np.log(sizes), weights=sizes), rel=1e-4)
        assert own["chance"] == pytest.approx(len(sizes) / n, rel=1e-4)


def test_a_resumed_training_goes_on_behind_the_epochs_that_are_kept(tmp_path: Path):
    rows = [epoch(4.0, 0.02, number=number) for number in (1, 2, 3)]
    (tmp_path / contrast.NAME).write_text(json.dumps({"epochs": rows}))
    logged = {"train/mean_loss": 3.0, "train/log_batch": 4.1, "train/matched": 0.1, "train/chance": 0.02}
    trainer = SimpleNamespace(current_epoch=2, callback_metrics=logged, is_global_zero=True)
    record = RecordContrast(tmp_path)
    record.on_train_start(trainer, None)
    record.on_train_epoch_start(trainer, None)
    record.on_train_batch_end(trainer, None, None, SimpleNamespace(whole=40), 0)
    record.on_train_epoch_end(trainer, None)
    kept = read_contrast(tmp_path)["epochs"]
    assert [(each["epoch"], each["loss"]) for each in kept] == [(1, 4.0), (2, 4.0), (3, 3.0)]
