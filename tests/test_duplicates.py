from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from PIL import Image
from sections import make_section

from stexp.data import duplicates
from stexp.data.datamodule import SpotDataModule
from stexp.data.duplicates import copies_by_counts as by_counts
from stexp.data.duplicates import (
    copies_by_tiles,
    copies_in_fold,
    count_prints,
    record_spots,
    spots_on_record,
    tile_prints,
)
from stexp.errors import InputError
from stexp.protocol import Protocol
from stexp.training.duplicates import compare_tiles, training_record


class Named:
    """What is read of a section."""

    def __init__(self, name: str, counts: np.ndarray) -> None:
        self.name, self.spots = name, type("Spots", (), {"X": sp.csr_matrix(counts.astype(np.float32))})

    def made(self, what: str, make) -> dict[str, np.ndarray]:
        return make()


def counts_of(seed: int, n_spots: int = 60, n_genes: int = 300) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.5, 4.0, n_genes), (n_spots, n_genes))


CHANGES = {
    "identical": lambda x, rng: x,
    "spots in another order": lambda x, rng: x[rng.permutation(len(x))],
    "genes in another order": lambda x, rng: x[:, rng.permutation(x.shape[1])],
    "cropped to a third": lambda x, rng: x[:20],
    "rare genes left out": lambda x, rng: x[:, x.sum(axis=0) > np.quantile(x.sum(axis=0), 0.6)],
    "joined with another section": lambda x, rng: np.concatenate([x, counts_of(9)]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_copy_is_seen_however_it_was_changed(change):
    first = counts_of(0)
    copies = by_counts(
        [Named("A", first), Named("B", counts_of(1)), Named("C", change(first, np.random.default_rng(2)))]
    )
    assert [(pair.first, pair.second) for pair in copies] == [("A", "C")]
    assert copies[0].share > 0.9


def shallow(seed: int, n_spots: int = 3000, depth: int = 500, n_genes: int = 1000) -> np.ndarray:
    """Spots of one tissue, at a depth at which the largest counts of many agree by chance."""
    share = np.random.default_rng(0).gamma(0.5, 1, n_genes)
    return np.random.default_rng(seed).poisson(depth * share / share.sum(), (n_spots, n_genes))


@pytest.mark.parametrize("depth", [200, 500, 1000])
def test_independent_shallow_sections_are_no_copies(depth):
    first, second = (count_prints(sp.csr_matrix(shallow(seed, depth=depth).astype(np.float32))) for seed in (1, 2))
    assert len(np.intersect1d(first[first > 0], second[second > 0])) <= 2
    assert by_counts([Named("A", shallow(1, depth=depth)), Named("B", shallow(2, depth=depth))]) == []
    record = record_spots(first, None)
    assert spots_on_record(record, second) is None


def test_spots_that_look_like_another_of_their_section_tell_nothing():
    counts = counts_of(0)
    prints = count_prints(sp.csr_matrix(np.concatenate([counts, counts[:5]]).astype(np.float32)))
    assert not prints[:5].any() and not prints[60:].any() and (prints[5:60] > 0).mean() > 0.7


def test_a_copy_of_a_deep_part_of_a_shallow_section_is_seen():
    first = np.concatenate([shallow(1, n_genes=300), counts_of(0)])
    record = record_spots(count_prints(sp.csr_matrix(counts_of(0)[:30].astype(np.float32))), None)
    copies = by_counts([Named("A", first), Named("B", counts_of(0)[10:40])])
    assert [(pair.first, pair.second) for pair in copies] == [("A", "B")]
    assert spots_on_record(record, count_prints(sp.csr_matrix(first.astype(np.float32)))) == "counts"


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low = Image.fromarray(rng.integers(60, 220, (6, 6, 3), dtype=np.uint8))
    return np.asarray(low.resize((112, 112), Image.Resampling.BICUBIC))


def encoded_anew(tile: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(tile).resize((96, 96), Image.Resampling.BILINEAR).save(file, "JPEG", quality=60)
    return np.clip(np.asarray(Image.open(file)).astype(int) * 0.9 + 12, 0, 255).astype(np.uint8)


def test_tiles_encoded_anew_are_recognised_and_others_are_not():
    first = [picture(n) for n in range(40)]
    prints = {
        "A": tile_prints(first),
        "B": tile_prints([picture(n) for n in range(100, 140)]),
        "C": tile_prints([encoded_anew(tile) for tile in first[:12]]),
        "blank": tile_prints([np.full((64, 64, 3), 240, np.uint8)] * 30),
        "blank too": tile_prints([np.full((64, 64, 3), 240, np.uint8)] * 30),
    }
    assert [(copy.first, copy.second, copy.by) for copy in copies_by_tiles(prints)] == [("A", "C", "tiles")]


def test_tiles_are_compared_a_part_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    bits = rng.random((40, 112)) < 0.5
    changed = bits ^ (rng.random((40, 112)) < 0.02)
    slow = sum(int((row != changed).sum(axis=1).min() <= duplicates.BITS) for row in bits)
    for pairs in (1, 100, duplicates.AT_ONCE):
        monkeypatch.setattr(duplicates, "AT_ONCE", pairs)
        assert duplicates._alike(bits, changed) == slow > 30


def fold(**roles: str) -> pd.DataFrame:
    return pd.DataFrame({"section": list(roles), "role": list(roles.values())})


def test_copies_are_refused_only_where_one_is_held_out_and_the_other_trains():
    copies = by_counts([Named("A", counts_of(0)), Named("B", counts_of(0)), Named("C", counts_of(1))])
    for roles in ({"A": "train", "B": "validation", "C": "test"}, {"A": "test", "B": "test", "C": "train"}):
        assert copies_in_fold(copies, fold(**roles), allowed=False) == []
    for roles in ({"A": "train", "B": "test", "C": "train"}, {"A": "test", "B": "reference", "C": "train"}):
        assert copies_in_fold(copies, fold(**roles), allowed=True) == copies
        with pytest.raises(InputError, match=r"A and B are copies by their counts .*allow_duplicates"):
            copies_in_fold(copies, fold(**roles), allowed=False)


def module(folder: Path, allowed: bool) -> SpotDataModule:
    """Three patients, of whom C is A in other colours and with other names of genes and spots."""
    rng = np.random.default_rng(4)
    image = np.asarray(Image.fromarray(rng.integers(20, 235, (12, 15, 3), dtype=np.uint8)).resize((120, 96)))
    counts = counts_of(5, 24, 200)
    sections = [
        make_section(folder, "A1", "A", genes=200, counts=counts, image=image),
        make_section(folder, "B1", "B", genes=200, seed=1),
        make_section(folder, "C1", "C", genes=200, counts=counts[::-1], image=(image * 0.9 + 10).astype(np.uint8)),
    ]
    protocol = Protocol("strict", validation=False)
    options = {"tile_px": 24, "cache_dir": folder / "cache", "augmentation": "none"}
    return SpotDataModule(sections, protocol, "C", allow_duplicates=allowed, **options)


def test_a_fold_with_a_copy_is_refused_or_has_it_on_record(tmp_path):
    with pytest.raises(InputError, match=r"A1 and C1 are copies by their counts"):
        module(tmp_path, allowed=False)
    data = module(tmp_path, allowed=True)
    assert [(copy.first, copy.second, copy.by) for copy in data.copies] == [("A1", "C1", "counts")]
    compare_tiles(data)
    assert len(data.copies) == 1  # each pair once
    data.copies.clear()
    compare_tiles(data)
    assert [(copy.first, copy.second, copy.by) for copy in data.copies] == [("A1", "C1", "tiles")]
    data.allow_duplicates = False
    with pytest.raises(InputError, match="copies by their tiles"):
        compare_tiles(data)


def test_tiles_are_read_once_for_their_hashes(tmp_path, monkeypatch, caplog):
    calculated = compare_tiles(module(tmp_path, allowed=True))
    monkeypatch.setattr("stexp.training.duplicates.tile_prints", lambda tiles: pytest.fail("read again"))
    monkeypatch.setattr("stexp.training.duplicates.MOST_TILES", 0)
    data = module(tmp_path, allowed=True)
    data.copies.clear()
    kept = compare_tiles(data)
    assert list(kept) == ["A1", "B1", "C1"] and kept["A1"].dtype == bool and kept["A1"].any()
    for name, prints in kept.items():
        np.testing.assert_array_equal(prints, calculated[name])
        tiles = data.tiles(data.rows_of(data.sections[list(kept).index(name)])).numpy()
        np.testing.assert_array_equal(prints, tile_prints(tiles))
    assert [copy.by for copy in data.copies] == ["tiles"], "of kept hashes there are never too many to be compared"
    next((tmp_path / "cache" / "measures").glob("B1-*prints*")).unlink()
    with caplog.at_level("INFO"):
        assert compare_tiles(data) == {} and "among the counts only" in caplog.text


def test_sections_that_are_retrieved_from_are_on_record(tmp_path: Path) -> None:
    sections = [
        make_section(tmp_path, name, name[0], seed=i, image=name != "D1")
        for i, name in enumerate(("A1", "B1", "C1", "D1"))
    ]
    data = SpotDataModule(sections, Protocol("strict", min_spots=0.0), "A", tile_px=16, cache_dir=tmp_path / "cache")
    assert set(training_record(data, {})) == {"B1", "C1"}
    assert set(training_record(data, {}, ["B1", "D1"])) == {"B1", "C1", "D1"}
