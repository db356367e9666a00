"""Tiles are strange where they lie farther from training's than these from those of other patients."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from exported_model import exported

from stexp.data.splits import spatial_blocks
from stexp.inference import model_folder
from stexp.inference.out_of_distribution import LIMIT, NEIGHBOURS, KnownTiles, learn


def slow(query: np.ndarray, known: np.ndarray, k: int) -> float:
    return np.sort(np.linalg.norm(known - query, axis=1))[:k].mean()


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)


def test_distances_are_those_to_the_nearest_of_other_groups():
    rng = np.random.default_rng(0)
    embedding, groups = rng.normal(size=(60, 6)), np.repeat(["a", "b", "c"], 20)
    known = KnownTiles.of(embedding, groups)
    x = unit(embedding)
    expected = sorted(slow(x[i], x[groups != groups[i]], NEIGHBOURS) for i in range(60))
    np.testing.assert_allclose(known.distance, expected, atol=2e-3)
    query = rng.normal(size=(7, 6))
    distance, percentile = known.score(query)
    np.testing.assert_allclose(distance, [slow(q, x, NEIGHBOURS) for q in unit(query)], atol=2e-3)
    np.testing.assert_allclose(percentile, [(known.distance <= d).mean() for d in distance])


def test_a_tile_is_no_neighbour_of_its_own_patient():
    rng = np.random.default_rng(1)
    # each patient's tiles are alike, and unlike those of the others
    centres = 5 * np.eye(6)[:3]
    embedding = np.concatenate([centre + 0.1 * rng.normal(size=(50, 6)) for centre in centres])
    new = np.array([[0, 0, 0, 5.0, 0, 0]]) + 0.1 * rng.normal(size=(50, 6))
    apart = KnownTiles.of(embedding, np.repeat([0, 1, 2], 50))
    assert (apart.score(new)[1] <= LIMIT).mean() > 0.5, "a fourth patient is as far as the three from each other"
    mixed = KnownTiles.of(embedding, np.arange(150))
    assert (mixed.score(new)[1] > LIMIT).all(), "against tiles of the same patient it would be strange"


def test_tiles_like_those_of_training_are_rarely_strange_and_others_are():
    rng = np.random.default_rng(2)
    known = KnownTiles.of(rng.normal(size=(2000, 8)) + 3, np.arange(2000) % 4)
    percentile = known.score(rng.normal(size=(2000, 8)) + 3)[1]
    # a new tile has the tiles of all groups for neighbours: a little nearer
    assert 0.35 < percentile.mean() < 0.55 and (percentile > LIMIT).mean() < 0.02
    assert (known.score(rng.normal(size=(200, 8)) - 3)[1] > LIMIT).mean() > 0.9


def test_few_tiles_of_others_are_neighbours_enough():
    known = KnownTiles.of(np.random.default_rng(3).normal(size=(12, 4)), np.array([0] * 8 + [1] * 4))
    assert known.k == 4 and np.isfinite(known.distance).all()


def test_a_model_knows_its_training_tiles():
    found = model_folder.read(exported())
    about, known = found.facts["known_tiles"], found.known
    assert about["apart"] == "patient" and about["spots"] == len(known.embedding) == len(found.bank)
    assert known.k == NEIGHBOURS and known.embedding.shape[1] == found.bank.embedding.shape[1]
    assert 0 <= about["held_out_share"] < 0.1
    assert (np.diff(known.distance) >= 0).all() and known.distance[0] > 0
    assert np.linalg.norm(known.embedding.astype(float), axis=1) == pytest.approx(1, abs=1e-3)


def test_of_one_section_its_blocks_are_compared():
    rng = np.random.default_rng(4)
    tiles, xy = rng.normal(size=(100, 6)).astype(np.float32), rng.random((100, 2))
    spots = pd.DataFrame({"patient": "A", "section": "A1"}, index=range(100))
    known, about = learn(lambda rows: tiles[rows], spots, xy, np.arange(80), np.arange(80, 100))
    assert about["apart"] == "block" and about["spots"] == 80
    groups = spatial_blocks(xy[:80], 4)
    np.testing.assert_array_equal(known.distance, KnownTiles.of(tiles[:80], groups).distance)
    assert about["held_out_share"] == pytest.approx((known.score(tiles[80:])[1] > LIMIT).mean())
    assert learn(lambda rows: None, spots, xy, np.arange(80), np.arange(80, 100)) == (None, None)


def test_training_tiles_know_themselves():
    rng = np.random.default_rng(5)
    embedding = rng.normal(size=(200, 16)).astype(np.float32)
    known = KnownTiles.of(embedding, np.arange(200) % 2)
    others = rng.normal(size=(50, 16)).astype(np.float32)
    assert known.share_of_same(embedding) == 1 and known.share_of_same(others) == 0
    assert known.share_of_same(np.concatenate([3 * embedding[:50], others])) == 0.5, "lengths tell nothing"
