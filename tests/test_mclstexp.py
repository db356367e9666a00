"""mclSTExp: what a spot's embedding depends on, what training learns, how k is chosen, what a checkpoint holds."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sections import make_section, make_sections, make_trainer

from stexp.data.batches import SpotBatch, SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.spot import Position, SpotEncoder, sinusoid
from stexp.models.mclstexp import MclSTExp
from stexp.models.retrieval_method import K_CANDIDATES
from stexp.protocol import Protocol

STRICT = Protocol("strict", n_hvg=30, min_spots=0.0)


def make_data(tmp_path, sections=None, fold="C", **kwargs) -> SpotDataModule:
    sections = sections or make_sections(tmp_path, n_spots=25)
    defaults = {"tile_px": 16, "batch_size": 16, "eval_batch_size": 20, "augmentation": "none"}
    return SpotDataModule(sections, STRICT, fold, cache_dir=str(tmp_path / "cache"), **defaults | kwargs)


def make_model(n_genes: int = 30, n_positions: int = 8, *, seed: int = 0, **kwargs) -> MclSTExp:
    torch.manual_seed(seed)
    defaults = {"embedding_dim": 16, "heads": 2, "head_dim": 8}
    encoder = ImageEncoder("test_resnet", pretrained=False, frozen=kwargs.pop("frozen", False))
    return MclSTExp(encoder, n_genes, n_positions, **defaults | kwargs).eval()


def grid(across: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(across), torch.arange(across))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    """Sections A1, A2, B1 on the training side, one of them for validation; C1, C2 held out."""
    return make_data(tmp_path_factory.mktemp("sections"))


# what an embedding depends on


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [7, 1000])
@pytest.mark.parametrize("position", ["learnable", "sinusoid"])
def test_a_spot_embeds_alike_in_its_section_and_in_any_batch(data, batch_size, position):
    model = make_model(len(data.panel), data.array_size, position=position)
    rows = torch.from_numpy(np.random.default_rng(batch_size).permutation(len(data.spots)))
    parts = [model.embed_batch_spots(data.batch(SpotIndex(part, image=False))) for part in rows.split(batch_size)]
    batched = torch.empty(len(rows), 16)
    batched[rows] = torch.cat(parts)
    for section in data.sections:
        here = np.flatnonzero(data.spots["section"] == section.name)
        whole = model.embed_spots(
            torch.from_numpy(data.expression[here]), torch.from_numpy(section.array_xy), torch.from_numpy(section.xy_px)
        )
        torch.testing.assert_close(batched[here], whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_order_of_a_sections_spots_does_not_matter():
    model, xy = make_model(n_neighbours=6), grid(6)  # 6 of 8 on a square array: two of the four at the corners
    expression = torch.rand(36, 30)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    shuffled, plain = model.embed_spots(expression[order], xy[order]), model.embed_spots(expression, xy)
    torch.testing.assert_close(shuffled, plain[order], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_a_spots_neighbours_change_its_embedding():
    model, xy = make_model(n_neighbours=4), grid(6)
    expression = torch.rand(36, 30)
    before = model.embed_spots(expression, xy)
    spot = 14  # at (2, 2)
    expression[spot] = torch.rand(30)
    moved = (model.embed_spots(expression, xy) - before).abs().amax(dim=1) > 1e-5
    assert moved.tolist() == ((xy - xy[spot]).abs().sum(dim=1) <= 1).tolist()


@torch.no_grad()
def test_another_sections_expression_does_not_matter(tmp_path):
    def embed(seed):
        sections = [
            make_section(tmp_path, "A1", "A", seed=1),
            make_section(tmp_path, "B1", "B", seed=2),
            make_section(tmp_path, "C1", "C", seed=seed),
        ]
        data = make_data(tmp_path, sections, "B", panel=[f"g{i:02d}" for i in range(30)])
        batch = data.batch(SpotIndex(torch.arange(len(data.spots)), image=False))
        return make_model().embed_batch_spots(batch), (data.spots["section"] == "A1").to_numpy()

    (first, here), (second, _) = embed(3), embed(4)
    torch.testing.assert_close(first[here], second[here], rtol=0, atol=0)
    assert not torch.allclose(first[~here], second[~here])


@torch.no_grad()
@pytest.mark.parametrize("n", [2, 4])
def test_a_section_with_fewer_spots_than_neighbours_is_padded_without_effect(tmp_path, n):
    sections = [make_section(tmp_path, name, name[0], n=size) for name, size in (("A1", 24), ("B1", 24), ("C1", n))]
    data = make_data(tmp_path, sections)
    model = make_model(len(data.panel), data.array_size)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("test")), image=False))
    assert batch.context_mask.sum(dim=1).tolist() == [n] * n
    expected = model.embed_spots(batch.expression, batch.array_xy, torch.from_numpy(sections[2].xy_px))
    torch.testing.assert_close(model.embed_batch_spots(batch), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_more_neighbours_than_there_are_spots_are_the_whole_section(data, tmp_path):
    model = make_model(len(data.panel), data.array_size, n_neighbours=10**9)
    wide = make_data(tmp_path, n_neighbours=10**9, panel=data.panel)
    assert wide.neighbours.shape[1] == 24
    batch = wide.batch(SpotIndex(torch.from_numpy(wide.rows("test")[:25]), image=False))
    (section,) = (section for section in wide.sections if section.name == "C1")
    expected = model.embed_spots(batch.expression, batch.array_xy, torch.from_numpy(section.xy_px))
    torch.testing.assert_close(model.embed_batch_spots(batch), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_in_batch_context_an_embedding_depends_on_its_company(data):
    model = make_model(len(data.panel), data.array_size, spot_context="batch")
    alone, among, others = (
        model.embed_batch_spots(data.batch(SpotIndex(torch.tensor(rows), image=False)))[0]
        for rows in ([0], [0, 1, 2], [0, 30, 60])
    )
    assert (alone - among).abs().max() > 1e-3 and (among - others).abs().max() > 1e-3


# positions


@torch.no_grad()
@pytest.mark.parametrize("position", get_args(Position))
def test_each_position_encoding_says_what_it_should(position):
    model, expression = make_model(position=position, n_neighbours=0), torch.rand(1, 30).expand(3, 30)
    here, there, swapped = model.embed_spots(expression, torch.tensor([[1, 2], [1, 3], [2, 1]]))
    assert torch.allclose(here, there, atol=1e-6) == torch.allclose(here, swapped, atol=1e-6) == (position == "none")


@pytest.mark.parametrize("n_genes", [8, 9])
def test_sinusoid_against_its_formula(n_genes):
    def slow(p, n):
        return [(math.sin, math.cos)[i % 2](p / 10000 ** (2 * (i // 2) / n)) for i in range(n)]

    np.testing.assert_allclose(sinusoid(torch.tensor([0, 3, 500]), 7), [slow(p, 7) for p in (0, 3, 500)], atol=1e-4)
    encoder = SpotEncoder(n_genes, 10, position="sinusoid", depth=0)
    half = (n_genes + 1) // 2
    np.testing.assert_allclose(
        encoder(torch.ones(1, 1, n_genes), torch.tensor([[[5, 2]]]))[0, 0],
        np.array(slow(5, half) + slow(2, n_genes - half)) + 1,
        atol=1e-5,
    )


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_first_tokens_alone_are_those_of_all(depth):
    encoder = SpotEncoder(12, 10, depth=depth, heads=2, head_dim=4)
    expression, array_xy = torch.rand(5, 7, 12), torch.randint(0, 10, (5, 7, 2))
    mask = torch.rand(5, 7) > 0.4
    mask[:, 0] = True
    for given in (None, mask):
        whole = encoder(expression, array_xy, given)
        for n in (1, 3):
            torch.testing.assert_close(encoder(expression, array_xy, given, n_out=n), whole[:, :n])


@torch.no_grad()
def test_a_learned_table_adds_its_rows_and_refuses_larger_arrays():
    encoder = SpotEncoder(4, 10, depth=0)
    made = encoder(torch.zeros(1, 1, 4), torch.tensor([[[3, 9]]]))[0, 0]
    torch.testing.assert_close(made, encoder.x_embed.weight[3] + encoder.y_embed.weight[9])
    with pytest.raises(InputError, match=r"coordinate 10 does not fit the learned position table of 10 rows.*sinusoid"):
        encoder(torch.zeros(1, 1, 4), torch.tensor([[[10, 0]]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position": "learned"}, "model.position=learned: choose none, sinusoid, naive or learnable"),
        ({"spot_context": "section"}, "model.spot_context=section: choose neighbours or batch"),
        ({"optimizer": "sgd"}, "model.optimizer=sgd: choose adam or adamw"),
        ({"k": 0}, "model.k=0: a whole number of at least 1 or auto would fit"),
        ({"depth": -1}, "model.depth=-1: a whole number of at least 0 would fit"),
        ({"heads": 0}, "model.heads=0: a whole number of at least 1 would fit"),
        ({"head_dim": 0.5}, "model.head_dim=0.5: a whole number of at least 1 would fit"),
        ({"embedding_dim": 0}, "model.embedding_dim=0: a whole number of at least 1 would fit"),
        ({"n_neighbours": -1}, "model.n_neighbours=-1: a whole number of at least 0 would fit"),
        ({"temperature": 0.0}, "model.temperature=0.0: a number above 0 would fit"),
        ({"lr": 0.0}, "model.lr=0.0: a number above 0, up to 1 would fit"),
        ({"lr": math.nan}, "model.lr=nan: a number above 0, up to 1 would fit"),
        ({"weight_decay": -0.1}, "model.weight_decay=-0.1: a number of at least 0 would fit"),
        ({"dropout": 1.5}, "model.dropout=1.5: a number from 0 to 1 would fit"),
        ({"image_weight": -0.5}, "model.image_weight=-0.5: a number from 0 to 1 would fit"),
    ],
)
def test_options_that_do_not_exist_and_numbers_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)


# training


def eight_spots(data: SpotDataModule) -> SpotBatch:
    return data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))


def fit_batch(model: MclSTExp, batch: SpotBatch, steps: int) -> float:
    optimizer = model.configure_optimizers()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    model.eval()
    return float(loss.detach())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("spot_context", ["neighbours", "batch"])
def test_overfits_eight_spots_and_retrieves_the_right_ones(data, spot_context):
    model = make_model(len(data.panel), data.array_size, spot_context=spot_context, lr=3e-3, weight_decay=0.0)
    batch = eight_spots(data)
    assert fit_batch(model, batch, 30) < 0.1 * math.log(8)
    with torch.no_grad():
        similarity = (
            torch.nn.functional.normalize(model.embed_image(batch.image))
            @ torch.nn.functional.normalize(model.embed_batch_spots(batch)).T
        )
    assert (similarity.argmax(dim=1) == torch.arange(8)).all()


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_reaches_all_that_trains(data, frozen):
    model = make_model(len(data.panel), data.array_size, frozen=frozen, learn_temperature=True)
    fit_batch(model, eight_spots(data), 1)  # residual branches start at zero and hold back gradients once
    model.zero_grad()
    model.train().training_step(eight_spots(data), 0).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("image_encoder.") and frozen:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("learn", [False, True])
def test_temperature_moves_only_where_it_is_learned(data, learn):
    model = make_model(len(data.panel), data.array_size, temperature=0.5, learn_temperature=learn)
    assert float(model.log_temperature.detach().exp()) == pytest.approx(0.5)
    fit_batch(model, eight_spots(data), 3)
    assert (float(model.log_temperature.detach().exp()) == pytest.approx(0.5, rel=1e-6)) is not learn


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_optimizer_is_the_one_asked_for(name, kind):
    model = make_model(optimizer=name, lr=2e-4, weight_decay=0.02, frozen=True)
    optimizer = model.configure_optimizers()
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (2e-4, 0.02)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


@torch.no_grad()
def test_normalise_gives_unit_norm_and_the_same_direction(data):
    batch = eight_spots(data)
    for embed in ("embed_image", "embed_batch_spots"):
        plain, unit = (
            getattr(make_model(len(data.panel), data.array_size, normalise=normalise), embed)(
                batch.image if embed == "embed_image" else batch
            )
            for normalise in (False, True)
        )
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(8))
        torch.testing.assert_close(unit, torch.nn.functional.normalize(plain))
        assert (plain.norm(dim=1) - 1).abs().min() > 0.1


# retrieval and k


def predictions_with(model: MclSTExp, data: SpotDataModule, k: int) -> np.ndarray:
    """Validation spots from the training spots, one at a time: cosine search, 1 / d^2, L2."""
    train, validation = data.rows("train"), data.rows("validation")
    with torch.no_grad():
        reference, query = (
            embed(data.batch(SpotIndex(torch.from_numpy(rows)))).double().numpy()
            for embed, rows in (
                (model.embed_batch_spots, train),
                (lambda batch: model.embed_image(batch.image), validation),
            )
        )
    out = []
    for q in query:
        cosine = reference @ q / np.linalg.norm(reference, axis=1) / np.linalg.norm(q)
        rows = np.argsort(-cosine)[:k]
        weight = 1 / ((reference[rows] - q) ** 2).sum(axis=1)
        out.append(weight @ data.target[train[rows]] / weight.sum())
    return np.array(out)


def test_auto_k_is_the_best_of_the_candidates_on_validation(tmp_path, data):
    model = make_model(len(data.panel), data.array_size, k="auto")
    model.trainer = make_trainer(tmp_path)
    rows = data.rows("validation")
    section = data.spots["section"].to_numpy(str)[rows]
    expected = {
        k: mean_pearson(data.target[rows], predictions_with(model, data, k), section)
        for k in K_CANDIDATES
        if k <= len(data.rows("train"))
    }
    assert len(expected) > 2
    chosen = model.tune(data)
    assert chosen["k"] == model.k == max(expected, key=expected.get)
    for k, value in chosen["k_validation_pearson"].items():
        assert value == pytest.approx(expected[int(k)], abs=2e-3)


def test_auto_k_with_fewer_references_than_the_smallest_candidate_takes_all(tmp_path):
    sections = [
        make_section(tmp_path, "A1", "A", n=3, seed=1),
        make_section(tmp_path, "B1", "B", n=6, seed=2),
        make_section(tmp_path, "C1", "C", n=6, seed=3),
    ]
    data = make_data(tmp_path, sections)
    model = make_model(len(data.panel), data.array_size, k="auto")
    model.trainer = make_trainer(tmp_path)
    assert model.tune(data)["k"] == len(data.rows("train")) < min(K_CANDIDATES)


def test_a_given_k_stays(data):
    assert make_model(k=7).tune(data) == {"k": 7}


def test_predictions_come_from_the_training_side_alone(tmp_path, data):
    model = make_model(len(data.panel), data.array_size, k=4, weighting="mean")
    outputs = make_trainer(tmp_path).predict(model, datamodule=data)
    assert set(model.references.sections) == {"A1", "A2", "B1", "B2"}
    obs = [name for output in outputs for name in output.obs["neighbour_section"]]
    assert len(obs) == 50 and set(obs) <= {"A1", "A2", "B1", "B2"}
    training = data.target[data.rows("train", "validation")]
    for output in outputs:
        assert output.predicted.shape[1] == len(data.panel)
        assert (output.predicted.numpy() <= training.max(0) + 1e-5).all()
        assert (output.predicted.numpy() >= training.min(0) - 1e-5).all()


# checkpoints


def test_a_checkpoint_holds_tensors_and_plain_values_and_gives_equal_predictions(tmp_path, data):
    model = make_model(len(data.panel), data.array_size, k=5, learn_temperature=True)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="x", enable_version_counter=False)
    make_trainer(tmp_path, epochs=2, callbacks=[saving], enable_checkpointing=True).fit(model.train(), datamodule=data)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    kept = checkpoint["SpotDataModule"]
    assert kept["panel"] == data.panel and kept["array_size"] == data.array_size and kept["tile_px"] == 16
    assert kept["protocol"]["library"] == "transcriptome"

    again = make_model(len(data.panel), data.array_size, k=5, seed=1)
    again.load_state_dict(checkpoint["state_dict"])
    first, second = (
        torch.cat([output.predicted for output in make_trainer(tmp_path).predict(m, datamodule=data)])
        for m in (model, again)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.std(dim=0).max() > 0
