"""Consensus: learned on spots that are left out, the same in any batch, and what its parts make of obvious numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from encoders import MadeUpFeatures, settings
from scipy.spatial import cKDTree
from sections import make_data

from stexp.config import build, to_plain
from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.data.slides.tiles import TileSpec
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.models import consensus
from stexp.models import table as table_module
from stexp.models.choice import fit_weights, leave_out
from stexp.models.consensus import Consensus
from stexp.models.low_rank import smooth
from stexp.models.table import Table
from stexp.protocol import Protocol

F, G = 24, 20
SMALL = {
    "n_components": 10,
    "penalties": [0.1, 3.0],
    "neighbours": [3, 8],
    "ranks": [1, 2, 4],
    "radii_um": [0, 60],
    "trust": 1.0,
}


@pytest.fixture(scope="module")
def table() -> Table:
    """Three patients of 40 spots on a square array; two hidden fields make the genes, and noisy features tell them."""
    rng = np.random.default_rng(0)
    place = np.stack(np.meshgrid(np.arange(8), np.arange(5)), axis=-1).reshape(-1, 2)
    xy = np.tile(place * 50.0, (3, 1)).astype(np.float32)
    hidden = np.column_stack([np.sin(xy[:, 0] / 90 + np.repeat([0, 1, 2], 40)), np.cos(xy[:, 1] / 70)])
    features = hidden @ rng.normal(size=(2, F)) + 1.5 * rng.normal(size=(120, F))
    expression = hidden @ rng.normal(size=(2, G)) + 0.5 * rng.normal(size=(120, G)) + 5
    names = np.repeat(["A1", "B1", "C1"], 40)
    return Table(features.astype(np.float32), expression.astype(np.float32), xy, names, names)


def fitted(table: Table, **changes) -> Consensus:
    method = Consensus(G, F, **SMALL | changes)
    method.fit_table(table)
    return method


def predict(method: Consensus, table: Table) -> np.ndarray:
    features = torch.from_numpy(table.read(table.features))
    return method.predict_together(method.embed_features(features), torch.tensor(table.xy_um)).predicted.numpy()


def observed(table: Table) -> np.ndarray:
    return table.read(table.expression)


def test_it_predicts_a_patient_that_it_never_saw(table):
    rows = {name: np.flatnonzero(table.section == name) for name in ["A1", "B1", "C1"]}
    train, test = table.take(np.concatenate([rows["A1"], rows["B1"]])), table.take(rows["C1"])
    method = fitted(train)
    found, mean = predict(method, test), observed(train).mean(axis=0)
    assert mean_pearson(observed(test), found, test.section) > 0.6
    assert np.square(observed(test) - found).mean() < 0.7 * np.square(observed(test) - mean).mean()
    assert method.tune(None)["radius_um"] == 60, "noise of single spots is smoothed"


def test_what_is_predicted_is_the_weighted_mean_of_its_members(table):
    method = fitted(table)
    z = method.embed_features(torch.from_numpy(table.features[:40]))
    members = method.members(z)
    radius, scale, _ = method.chosen.tolist()
    loadings = method.loadings.numpy()
    by_member = [
        method.mean.numpy() + scale * smooth(scores, table.xy_um[:40].astype(float), radius) @ loadings
        for scores in members.numpy()
    ]
    weights = method.weights.numpy()
    expected = np.einsum("m,mqg->qg", weights, np.stack(by_member))
    spread = np.sqrt(np.einsum("m,mqg->qg", weights, np.square(np.stack(by_member) - expected)))
    made = method.predict_together(z, torch.from_numpy(table.xy_um[:40]))
    np.testing.assert_allclose(made.predicted, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(made.uncertainty, spread, rtol=1e-3, atol=1e-4)
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-5)


def test_ranks_are_averaged(table):
    """One rank after the other, and their mean, is what the tapered loadings make at once."""
    z = torch.from_numpy(table.features)
    made = fitted(table).fit_members(table)
    scores = made.members(made.space(z)).mean(dim=0)
    each = [scores[:, :rank] @ made.expression.axes.T[:rank] for rank in SMALL["ranks"]]
    found = scores @ made.loadings
    torch.testing.assert_close(found, torch.stack(each).mean(dim=0), rtol=1e-4, atol=1e-4)


def test_a_group_is_predicted_by_what_never_saw_it(table):
    """Whatever the left-out group measures, its predictions are the same; and those of others change."""
    method, changed = Consensus(G, F, **SMALL), table.expression.copy()
    own = table.group == "B1"
    changed[own] = np.random.default_rng(1).permutation(changed[own]) * 3
    before, after = (
        {tuple(part.rows): part for part in leave_out(each, method.fit_members)}
        for each in (table, replace(table, expression=changed))
    )
    for rows, part in before.items():
        predicted, again = (p.mean + p.members.mean(axis=0) @ p.loadings for p in (part, after[rows]))
        if own[list(rows)].all():
            np.testing.assert_array_equal(predicted, again)
        else:
            assert np.abs(predicted - again).max() > 0.1


def test_groups_are_patients_else_sections_else_blocks(tmp_path):
    protocol, encoder = Protocol("strict", validation=False), MadeUpFeatures(np.ones((150, 4), np.float32))
    data = make_data(tmp_path, protocol, encoder=encoder)
    spots = data.spots
    rows = data.rows("train")
    assert set(Table.of(data, rows).group) == set(spots["section"].iloc[rows]), "two patients are too few"
    assert set(Table.of(data, np.arange(len(spots))).group) == {"A", "B", "C"}
    only = np.flatnonzero(spots["section"] == "A1")
    blocks = Table.of(data, only).group
    assert sorted(np.unique(blocks, return_counts=True)[1]) == [6, 6, 6, 7] and len(set(blocks)) == 4
    with pytest.raises(InputError, match="5 spots to learn from are too few"):
        Table.of(data, only[:5])


def test_weights_are_drawn_to_equal_ones_and_follow_the_better_member(table):
    parts = list(leave_out(table, Consensus(G, F, **SMALL).fit_members))
    np.testing.assert_allclose(fit_weights(parts, 1e6), 0.25, atol=1e-3)
    best = [replace(part, members=np.stack([part.scores, *part.members[1:]])) for part in parts]
    assert fit_weights(best, 1e-6)[0] > 0.99
    np.testing.assert_allclose(fitted(table, trust=1e6).weights, 0.25, atol=1e-3)
    np.testing.assert_array_equal(fitted(table, trust=None).weights, 0.25)
    assert np.ptp(fitted(table, trust=1e-6).weights.numpy()) > 0.1
    with pytest.raises(InputError, match=r"model\.trust=0"):
        Consensus(G, F, **SMALL | {"trust": 0})


@pytest.mark.parametrize("seed", range(4))
def test_features_that_tell_nothing_end_at_the_training_mean(table, seed):
    """The scale learned on spots left out takes away what does not hold there; other patients are no worse for it."""
    rng = np.random.default_rng(seed)
    expression = (rng.normal(size=(400, G)) + 5).astype(np.float32)
    names = np.repeat(["A1", "B1", "C1", "D1"], 100)
    noise, xy = rng.normal(size=(400, F)).astype(np.float32), rng.uniform(0, 900, (400, 2)).astype(np.float32)
    everything = Table(noise, expression, xy, names, names)
    train, test = (everything.take(np.flatnonzero(rows)) for rows in (names != "D1", names == "D1"))
    method, mean = fitted(train), observed(train).mean(axis=0)
    made, truth = predict(method, test), observed(test)
    assert np.square(made - truth).mean() < 1.01 * np.square(mean - truth).mean()
    assert np.sqrt(np.square(made - mean).mean()) < 0.05 * truth.std()


def test_where_neighbours_have_no_weight_no_reference_is_named(tmp_path, table):
    method = fitted(table)
    weights = torch.tensor([0.5, 0.5, 0, 0])
    method.weights.copy_(weights)
    z = method.embed_features(torch.from_numpy(table.features))
    assert method.predict_together(z, torch.from_numpy(table.xy_um)).obs is None
    encoder = MadeUpFeatures(np.random.default_rng(0).normal(size=(150, F)).astype(np.float32))
    data = make_data(tmp_path, Protocol("strict", validation=False), encoder=encoder)
    of_data = Consensus(len(data.panel), F, **SMALL)
    of_data.fit_to(data)
    of_data.weights.copy_(weights)
    of_data.predict_spots(data, "test")
    made = of_data.predict_step(data.batch(SpotIndex(torch.from_numpy(data.rows("test")), image=False)))
    assert made.obs is None and made.neighbours is None and made.neighbour_weights is None
    assert torch.isfinite(made.predicted).all()


def test_without_a_scale_nothing_is_smoothed(table):
    nowhere = replace(table, xy_um=np.full_like(table.xy_um, np.nan))
    method = fitted(nowhere)
    assert method.tune(None)["radius_um"] == 0
    np.testing.assert_allclose(predict(method, nowhere), predict(method, table), rtol=1e-5)
    smoothing = fitted(table)
    assert np.isfinite(predict(smoothing, nowhere)).all()


def test_a_state_of_any_size_is_taken(table):
    method, again = fitted(table), Consensus(G, F, **SMALL)
    again.load_state_dict(method.state_dict())
    np.testing.assert_array_equal(predict(again, table), predict(method, table))
    assert again.tune(None) == method.tune(None)


@pytest.mark.parametrize("changes", [{"neighbours": []}, {"penalties": []}])
def test_either_kind_of_member_does_alone(table, changes):
    method = fitted(table, **changes)
    assert mean_pearson(table.expression, predict(method, table), table.section) > 0.6
    with pytest.raises(InputError, match="one number at least"):
        Consensus(G, F, **SMALL | {"penalties": [], "neighbours": []})


def test_many_spots_are_thinned_for_the_choice_and_all_are_searched(table, monkeypatch):
    monkeypatch.setattr(consensus, "AT_MOST", 50)
    assert 25 < len(table.thinned(50)) < 75 and set(table.thinned(50).section) == set(table.section)
    assert fitted(table).reference.shape == (120, 10)


@pytest.mark.parametrize("known", [True, False])
def test_thinning_takes_compact_blocks_of_each_section(monkeypatch, known):
    """Spots keep their neighbours, whose distance a radius of smoothing is judged at."""
    monkeypatch.setattr(table_module, "SPOTS_OF_A_BLOCK", 100)
    xy = np.stack(np.meshgrid(np.arange(50), np.arange(40)), axis=-1).reshape(-1, 2).astype(np.float32)
    section = np.repeat(["A", "B"], [1400, 600])
    nothing = np.zeros((2000, 1), np.float32)
    whole = Table(nothing, nothing, xy if known else np.full_like(xy, np.nan), section, section)
    part = whole.thinned(500)
    assert 400 <= len(part) <= 510
    np.testing.assert_allclose((part.section == "A").mean(), 0.7, atol=0.05)
    if known:
        nearest = cKDTree(part.xy_um).query(part.xy_um, k=5)[0]
        assert (nearest[:, 1:] == 1).mean() > 0.8, "of the four that touch a spot, nearly all are there"
        centre = whole.xy_um[section == "A"].mean(axis=0)
        np.testing.assert_allclose(part.xy_um[part.section == "A"].mean(axis=0), centre, atol=8)


@pytest.mark.parametrize("sizes", [[378] * 36, [3400] * 5, [2800] * 3, [20_000] + [300] * 4, [1_500_000, 180]])
def test_thinning_keeps_what_it_may_of_every_section(sizes):
    section = np.repeat([f"S{i:02d}" for i in range(len(sizes))], sizes)
    nothing = np.zeros((len(section), 1), np.float32)
    part = Table(nothing, nothing, np.full((len(section), 2), np.nan, np.float32), section, section).thinned(8192)
    assert 0.85 * 8192 < len(part) < 1.15 * 8192
    share = 8192 / len(section)
    for name, size in zip(np.unique(section), sizes, strict=True):
        kept = (part.section == name).sum()
        assert kept >= min(16, size) and (abs(kept / size - share) < 0.15 * share or kept < 40)


def test_spots_are_predicted_with_their_section_in_any_batch(tmp_path):
    rng = np.random.default_rng(0)
    protocol = Protocol("strict", validation=False)
    encoder = MadeUpFeatures(rng.normal(size=(150, F)).astype(np.float32))
    data: SpotDataModule = make_data(tmp_path, protocol, encoder=encoder)
    method = Consensus(len(data.panel), F, **SMALL)
    method.fit_to(data)
    method.predict_spots(data, "test")
    rows = data.rows("test")
    whole = method.predict_step(data.batch(SpotIndex(torch.from_numpy(rows), image=False)))
    parts = [method.predict_step(data.batch(SpotIndex(torch.from_numpy(rows[i::3]), image=False))) for i in range(3)]
    for i, part in enumerate(parts):
        torch.testing.assert_close(part.predicted, whole.predicted[i::3])
        assert list(part.obs["neighbour_section"]) == list(whole.obs["neighbour_section"][i::3])
    learnt = set(data.rows("train").tolist())
    assert set(whole.neighbours.flatten().tolist()) <= learnt
    section = data.spots["section"].to_numpy(str)
    own = rows[section[rows] == data.names("test")[0]]
    alone = method.predict_together(
        method.embed_features(torch.from_numpy(data.tile_features[own])), torch.from_numpy(data.xy_um[own])
    )
    torch.testing.assert_close(alone.predicted, whole.predicted[: len(own)])


# views of a tile


def test_an_encoder_sees_the_middle_at_every_scale_and_turned():
    plain = build(to_plain(settings("tiny", frozen=True)))
    views = build(to_plain(settings("tiny", frozen=True, scales=[0.5, 1, 2], turns=2)))
    views.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = torch.nn.functional.interpolate(image, size=(32, 32), mode="bilinear", antialias=True)
    expected = [
        (plain(view) + plain(torch.rot90(view, 1, (2, 3)))) / 2
        for view in (image[..., 24:40, 24:40], image[..., 16:48, 16:48], small)
    ]
    torch.testing.assert_close(views(image), torch.cat(expected, dim=1))
    assert views.num_features == 3 * plain.num_features
    assert views.built_as != plain.built_as


def test_tiles_are_cut_as_wide_as_the_widest_view():
    assert TileSpec(224, 112.0).wide([0.5, 1, 2]) == TileSpec(448, 224.0)
    assert TileSpec(224).wide(None) == TileSpec(224) == TileSpec(224).wide([0.5])


def test_members_that_tell_no_spot_from_another_are_not_scaled_up(table):
    method = fitted(table, penalties=[], neighbours=[1000])
    assert method.chosen[1] == 0
    np.testing.assert_allclose(predict(method, table), np.broadcast_to(method.mean, observed(table).shape), atol=1e-5)
