"""Prototypes stand for spots: learned with the encoders, searched in their place, kept, exported and shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from exported_model import finished_run, slide
from sections import make_data, make_trainer

from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.evaluation.prototype_record import read_prototypes
from stexp.inference.export import export
from stexp.inference.predictor import load_model
from stexp.inference.prototype_bank import PrototypeBank, read_prototype_bank, write_prototype_bank
from stexp.inference.references import compress
from stexp.models import prototypes
from stexp.models.bleep import BLEEP
from stexp.models.encoders.image import ImageEncoder
from stexp.models.mclstexp import MclSTExp
from stexp.models.prototypes import Prototypes, stand_for
from stexp.models.retrieval_method import RetrievalMethod
from stexp.protocol import Protocol
from stexp.runs.finished import FinishedRun
from stexp.runs.folder import RunFolder
from stexp.runs.rescore import predict_again


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    return make_data(tmp_path_factory.mktemp("sections"), Protocol("strict"))


def make_model(data: SpotDataModule, n: int | None, kind: str = "mclstexp", **kwargs) -> RetrievalMethod:
    torch.manual_seed(0)
    encoder = ImageEncoder("test_resnet", pretrained=False)
    kwargs = {"embedding_dim": 16, "k": 3, "prototypes": n} | kwargs
    if kind == "bleep":
        return BLEEP(encoder, len(data.panel), **kwargs).eval()
    return MclSTExp(encoder, len(data.panel), data.array_size, depth=1, heads=2, head_dim=8, **kwargs).eval()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# how they are learned


def test_a_spot_belongs_to_the_most_similar_prototype(monkeypatch):
    monkeypatch.setattr(prototypes, "AT_ONCE", 7)
    points, spots = Prototypes(5, 3), draw(30, 3, seed=1)
    points.start(draw(5, 3))
    cosine = torch.nn.functional.cosine_similarity(spots[:, None], points.embedding[None], dim=2)
    assert points.assign(spots).tolist() == cosine.argmax(dim=1).tolist()


def test_prototypes_follow_a_moving_average_of_their_spots():
    """Sums and numbers of spots, averaged each by itself, batch after batch (VQ-VAE, appendix A.1)."""
    points = Prototypes(3, 4)
    points.start(draw(3, 4))
    sums, numbers = points.embedding.double().clone(), torch.ones(3).double()
    for seed in range(1, 5):
        spots = draw(20, 4, seed=seed)
        own = points.assign(spots)
        for each in range(3):
            belong = spots[own == each].double()
            sums[each] = 0.9 * sums[each] + 0.1 * belong.sum(dim=0)
            numbers[each] = 0.9 * numbers[each] + 0.1 * len(belong)
        points.follow(spots, own)
        torch.testing.assert_close(points.embedding.double(), sums / numbers[:, None], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(points.mass.double(), numbers, rtol=1e-6, atol=1e-6)


def test_dead_prototypes_start_again_at_the_spots_that_fit_least():
    points = Prototypes(4, 2)
    points.start(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-1.0, 0.1]]))
    points.mass[2:] = 1e-3
    spots = torch.tensor([[1.0, 0.0], [1.0, 0.02], [0.0, 1.0], [1.0, 0.9], [1.0, 0.01]])
    points.follow(spots, points.assign(spots))
    assert points.embedding[2:].tolist() == spots[[2, 3]].tolist()
    assert points.mass[2:].tolist() == [1.25, 1.25]


def test_the_loss_is_commitment_and_the_choice_among_all_and_moves_nothing_outside_of_training():
    points = Prototypes(4, 3)
    points.start(draw(4, 3))
    before, image, spot = points.embedding.clone(), draw(6, 3, seed=1), draw(6, 3, seed=2)
    image.requires_grad_(), spot.requires_grad_()
    loss, own = points.eval()(image, spot, 0.5), points.assign(spot)
    expected = sum(0.25 * (spot[i] - before[own[i]]).square().mean() for i in range(6)) / 6
    for i in range(6):
        expected = expected - (image[i] @ before.T / 0.5).log_softmax(dim=0)[own[i]] / 6
    torch.testing.assert_close(loss, expected)
    assert torch.equal(points.embedding, before)
    points.train()(image, spot, 0.5).backward()
    assert not torch.equal(points.embedding, before) and image.grad.any() and spot.grad.any()


# what they stand for


def test_prototypes_are_means_of_their_spots():
    number, embedding, expression = np.array([7, 2, 7, 7, 2, 9]), draw(6, 3), draw(6, 5, seed=1)
    spots = pd.DataFrame({"section": list("ABBBAC"), "patient": list("XXXYXY")})
    standing = stand_for(number, embedding, spots)
    groups = {2: [1, 4], 7: [0, 2, 3], 9: [5]}
    for position, (name, rows) in enumerate(groups.items()):
        assert standing.number[position] == name
        torch.testing.assert_close(standing.embedding[position], embedding[rows].mean(dim=0))
        torch.testing.assert_close(standing.mean(expression)[position], expression[rows].mean(dim=0))
    assert standing.names["section"].tolist() == ["A", "B", "C"]
    assert standing.names["patient"].tolist() == ["X", "X", "Y"]
    assert standing.names["spot"].tolist()[1:] == ["prototype 7 of 3 spots", "prototype 9 of 1 spot"]
    shown = np.array([True, True, False, True, True, True])
    (_, nearest, _) = standing.nearest(embedding, shown)
    cosine = torch.nn.functional.cosine_similarity(embedding, embedding[[0, 2, 3]].mean(dim=0)[None])
    assert nearest.tolist() == sorted([0, 3], key=lambda row: -cosine[row])


def test_as_many_prototypes_as_spots_are_the_spots(data, tmp_path):
    plain, trainer = make_model(data, None), make_trainer(tmp_path)
    expected = torch.cat([part.predicted for part in trainer.predict(plain, datamodule=data)])
    n = len(plain.references.retrieved_rows)
    model = make_model(data, n)
    model.load_state_dict(plain.state_dict(), strict=False)
    model.prototypes.start(plain.references.embedding)
    made = trainer.predict(model, datamodule=data)
    torch.testing.assert_close(torch.cat([part.predicted for part in made]), expected, rtol=1e-4, atol=1e-4)
    assert (
        len(model._searched[0]) == n and made[0].obs["neighbour_section"].isin(data.names("train", "validation")).all()
    )


def test_prototypes_train_with_the_encoders_and_go_on_from_a_checkpoint(data, tmp_path):
    """Stopped after an epoch and gone on with, they end where a training ends that was not stopped."""
    whole, first, again = (make_model(data, 6).train() for _ in range(3))
    assert not whole.prototypes.started
    trainer = make_trainer(tmp_path, 2, limit_train_batches=2)
    trainer.fit(whole, datamodule=data)
    assert float(trainer.callback_metrics["train/prototypes"]) > 0
    half = make_trainer(tmp_path, 1, limit_train_batches=2)
    half.fit(first, datamodule=data)
    half.save_checkpoint(tmp_path / "x.ckpt")
    other = make_trainer(tmp_path, 2, limit_train_batches=2)
    other.fit(again, datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=False)
    torch.testing.assert_close(again.prototypes.embedding, whole.prototypes.embedding, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again.prototypes.embedding, first.prototypes.embedding, atol=1e-5)
    made = trainer.predict(whole, datamodule=data), other.predict(again, datamodule=data)
    torch.testing.assert_close(made[0][0].predicted, made[1][0].predicted, rtol=1e-3, atol=1e-3)
    assert whole.references.prototype.shape == whole.references.rows.shape and len(whole._searched[0]) <= 6


def test_bleep_learns_prototypes_too(data, tmp_path):
    model, trainer = make_model(data, 6, "bleep").train(), make_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(model, datamodule=data)
    assert model.prototypes.started and len(trainer.predict(model, datamodule=data)[0].predicted)
    assert len(model._searched[0]) <= 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"correct": True}, "model.prototypes=null would fit"),
        ({"k": 7}, "model.k=7, but there are 6 prototypes"),
        ({"prototypes": 0}, "model.prototypes=0"),
        ({"prototypes": 2.5}, "model.prototypes=2.5"),
    ],
)
def test_what_does_not_go_with_prototypes_is_refused(data, options, says):
    with pytest.raises(InputError, match=says):
        make_model(data, **{"n": 6} | {("n" if key == "prototypes" else key): value for key, value in options.items()})


def test_more_prototypes_than_training_spots_are_refused(data, tmp_path):
    with pytest.raises(InputError, match=r"model\.prototypes=5000, but"):
        make_trainer(tmp_path).fit(make_model(data, 5000), datamodule=data)


# runs, exported models and the page


@pytest.fixture(scope="module")
def finished() -> Path:
    return finished_run("image_encoder.frozen=true", "model.prototypes=10", "model.k=4", "random_features=0")


@pytest.mark.slow
def test_a_run_says_the_prototype_and_shows_its_tiles(finished):
    adata = ad.read_h5ad(finished / "predictions.h5ad")
    names = adata.uns["references"]
    assert names.index.str.startswith("prototype ").all() and names["spot"].str.contains(" of ").all()
    record = read_prototypes(finished)
    assert record["of"] == len(record["prototypes"]) <= 10
    assert sum(each["spots"] for each in record["prototypes"]) == record["references"]
    assert all(sum(each["sections"].values()) == each["spots"] and each["tiles"] for each in record["prototypes"])
    page = (finished / "prototypes.html").read_text()
    assert page.count('role="img"') == sum(len(each["tiles"]) for each in record["prototypes"])
    assert "<script" not in page and 'href="prototypes.html"' in (finished / "report.html").read_text()


@pytest.mark.slow
def test_retrieving_again_gives_the_same_unless_k_is_another(finished, tmp_path):
    again = predict_again(finished, {}, "panel", str(tmp_path / "same"))
    first, same = (ad.read_h5ad(folder / "predictions.h5ad") for folder in (finished, again))
    np.testing.assert_allclose(same.layers["predicted"], first.layers["predicted"], rtol=1e-3, atol=1e-3)
    assert list(same.uns["references"].index) == list(first.uns["references"].index)
    run = FinishedRun(RunFolder(finished))
    fewer, _ = run.retrieve(run.data, replace(run.for_retrieval[1], k=2))
    assert not np.allclose(fewer.predicted.numpy(), first.layers["predicted"], atol=1e-3)


@pytest.mark.slow
def test_an_exported_model_holds_prototypes_alone_and_predicts_as_its_run(finished, tmp_path):
    facts = export(finished, tmp_path / "model", alpha=None)
    assert facts["reproduces"]["largest_difference"] < 1e-3 and 1 < facts["bank"]["spots"] <= 10 < facts["bank"]["of"]
    assert (tmp_path / "model" / "prototypes.safetensors").is_file()
    assert not (tmp_path / "model" / "bank.safetensors").exists()
    model, spots = load_model(tmp_path / "model"), ad.read_h5ad(finished / "predictions.h5ad")
    assert isinstance(model.bank, PrototypeBank) and set(spots.var_names) < set(model.bank.genes)
    made = model.predict(slide(), um_per_px=1.0, coordinates=spots.obsm["spatial"][:20], genes="all", progress=False)
    assert made.uns["references"].index.str.startswith("prototype ").all()
    lowest, highest = model.bank.values.min(axis=0), model.bank.values.max(axis=0)
    order = [model.bank.genes.index(gene) for gene in made.var_names]
    assert (lowest[order] - 1e-4 <= made.X).all() and (highest[order] + 1e-4 >= made.X).all()
    with pytest.raises(InputError, match="exclude_slide=false would fit"):
        model.bank.without({"A1"})


def test_a_bank_of_prototypes_is_kept_whole_or_refused(tmp_path):
    rng = np.random.default_rng(0)
    names = np.array(["prototype 0 of 2 spots", "prototype 3 of 1 spot"])
    bank = PrototypeBank(
        rng.random((2, 4), dtype=np.float32),
        np.array(["A", "B"]),
        np.array(["X", "X"]),
        names,
        rng.random((2, 3), dtype=np.float32),
        ["g0", "g1", "g2"],
    )
    write_prototype_bank(tmp_path / "x", bank)
    again = read_prototype_bank(tmp_path / "x")
    assert again.spots().equals(bank.spots()) and list(again.spots().index) == ["prototype 0", "prototype 3"]
    np.testing.assert_array_equal(again.expression(["g2", "g0"], Protocol("strict"), []), bank.values[:, [2, 0]])
    for wrong in ({"genes": ["g0", "g0", "g1"]}, {"genes": ["g0"]}, {"spot": names[[0, 0]]}):
        write_prototype_bank(tmp_path / "x", replace(bank, **wrong))
        with pytest.raises(InputError, match="is damaged"):
            read_prototype_bank(tmp_path / "x")
    half = compress(bank, "float16", None)
    np.testing.assert_allclose(half.values, bank.values, rtol=1e-3)
    with pytest.raises(InputError, match="prototypes already"):
        compress(bank, "float32", 1)
    with pytest.raises(InputError, match="take bank=float32"):
        write_prototype_bank(tmp_path / "x", replace(bank, values=bank.values * 1e6), "float16")
