"""Floors, ceilings and pictures are kept by all that they depend on, and made anew where any of it differs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sections import make_data, make_section

from stexp.data import digests
from stexp.data.digests import code_digest, content_digest
from stexp.data.slides import pictures
from stexp.evaluation.floors import predict_floors
from stexp.protocol import Protocol
from stexp.runs import comparison as module
from stexp.runs import results
from stexp.runs.comparison import Comparison, reduced

STRICT = Protocol("strict", hold_out="patient", panel="train", validation=True)


class Inputs:
    """What a comparison is made of: 150 spots with features, two random features, and colours."""

    def __init__(self, folder: Path, **kwargs) -> None:
        self.data = make_data(folder, kwargs.pop("protocol", STRICT), **kwargs)
        draw, n = np.random.default_rng(0), len(self.data.spots)
        self.features = draw.normal(size=(n, 12)).astype(np.float32)
        self.raw = [draw.normal(size=(n, 10)).astype(np.float32) for _ in range(2)]
        self.colour = draw.normal(size=(n, 9))
        self.unpredicted: np.ndarray | None = None

    def compare(self) -> Comparison:
        random = reduced(self.data, self.raw)
        return Comparison.of(self.data, self.features, self.colour, random, self.unpredicted)


@pytest.fixture
def floors_made(monkeypatch) -> list[int]:
    """Grows whenever floors are calculated."""
    made: list[int] = []

    def noted(*args, **kwargs):
        made.append(1)
        return predict_floors(*args, **kwargs)

    monkeypatch.setattr(module, "predict_floors", noted)
    return made


def assert_same(one: Comparison, other: Comparison) -> None:
    assert one.gene_sets == other.gene_sets
    for ours, theirs in ((one.floors, other.floors), (one.ceiling, other.ceiling)):
        assert {name: list(parts) for name, parts in ours.items()} == {
            name: list(parts) for name, parts in theirs.items()
        }
        for protocol, parts in ours.items():
            for name, values in parts.items():
                np.testing.assert_array_equal(values, theirs[protocol][name], err_msg=f"{protocol} {name}")


def test_the_same_is_calculated_once(tmp_path, floors_made):
    first = Inputs(tmp_path).compare()
    n = len(floors_made)
    assert n == len(first.floors) > 1  # once for each protocol
    assert {"mean", "ridge_features", "random_features_seed1"} <= set(first.floors["strict"])
    again = Inputs(tmp_path).compare()
    assert len(floors_made) == n
    assert_same(first, again)
    for ours, theirs in zip(first.random, again.random, strict=True):
        np.testing.assert_array_equal(ours[:], theirs[:])


def other_counts(inputs: Inputs) -> Inputs:
    section = inputs.data.sections[-1]
    section.spots.X = section.spots.X.copy()
    section.spots.X[3, 4] += 1
    return make_again(inputs)


def make_again(inputs: Inputs, **kwargs) -> Inputs:
    data = inputs.data
    inputs.data = type(data)(
        data.sections, data.protocol, data.fold, cache_dir=data.cache_dir, tile_px=16, panel=data.panel, **kwargs
    )
    return inputs


def set_to(name: str, change):
    def changed(inputs: Inputs) -> Inputs:
        setattr(inputs, name, change(getattr(inputs, name)))
        return inputs

    return changed


def bumped(table: np.ndarray) -> np.ndarray:
    table = table.copy()
    table[5, 3] += 1e-3
    return table


def of_other_patients(inputs: Inputs) -> Inputs:
    inputs.data.spots["patient"] = inputs.data.spots["patient"].replace("A", "Z")
    return inputs


CHANGES = {
    "counts": other_counts,
    "features": set_to("features", bumped),
    "no features": set_to("features", lambda _: None),
    "colour": set_to("colour", bumped),
    "random features": set_to("raw", lambda raw: [raw[0], bumped(raw[1])]),
    "fewer random features": set_to("raw", lambda raw: raw[:1]),
    "patients": of_other_patients,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_differs_is_made_anew(tmp_path, floors_made, change):
    make_again(Inputs(tmp_path)).compare()
    n = len(floors_made)
    CHANGES[change](make_again(Inputs(tmp_path))).compare()
    assert len(floors_made) > n


def test_runs_of_several_seeds_stand_beside_the_same(tmp_path, floors_made):
    first, n = make_again(Inputs(tmp_path)).compare(), len(floors_made)
    assert_same(first, make_again(Inputs(tmp_path), seed=7).compare())
    assert len(floors_made) == n


def test_ceilings_are_of_the_spots_that_are_predicted_and_floors_of_all(tmp_path, floors_made):
    inputs = make_again(Inputs(tmp_path))
    first, n = inputs.compare(), len(floors_made)
    inputs.unpredicted = inputs.data.rows("test")[:10]
    other = inputs.compare()
    assert len(floors_made) == n
    np.testing.assert_array_equal(other.floors["strict"]["coordinates"], first.floors["strict"]["coordinates"])
    assert not np.array_equal(other.ceiling["strict"]["C1"], first.ceiling["strict"]["C1"])


def test_another_protocol_and_another_version_of_the_code_make_it_anew(tmp_path, floors_made, monkeypatch):
    Inputs(tmp_path).compare()
    n = len(floors_made)
    Inputs(tmp_path, protocol=replace(STRICT, target_sum=2e4)).compare()
    assert len(floors_made) > n
    n = len(floors_made)
    monkeypatch.setattr(module, "code_digest", lambda: "of tomorrow")
    Inputs(tmp_path).compare()
    assert len(floors_made) > n


def test_code_that_changed_since_it_was_imported_is_no_key(tmp_path, monkeypatch):
    package = tmp_path / "stexp"
    package.mkdir()
    source = package / "__init__.py"
    source.write_text("version = 1")
    (package / ".#open_in_an_editor.py").symlink_to("user@host.1234:5678")
    monkeypatch.setattr(digests.stexp, "__file__", str(source))
    fresh = digests.code_digest.__wrapped__
    long_ago = digests.IMPORTED - 1000
    os.utime(source, (long_ago, long_ago))
    first = fresh()
    assert fresh() == first
    source.write_text("version = 2")
    os.utime(source, (long_ago, long_ago))
    assert fresh() != first and fresh() == fresh()
    os.utime(source)  # edited while this process runs: it was imported as it was before
    assert fresh() != fresh()
    monkeypatch.setattr(digests, "LIBRARIES", ("numpy", "not installed"))
    os.utime(source, (long_ago, long_ago))
    assert fresh() != fresh()


def test_a_damaged_file_is_made_anew_and_no_file_at_all_stops_nothing(tmp_path, floors_made):
    first = Inputs(tmp_path).compare()
    n = len(floors_made)
    files = sorted((tmp_path / "cache" / "comparisons").glob("*.npz"))
    assert len(files) == 5  # floors, ceilings, and components of three tables of features
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert_same(first, Inputs(tmp_path).compare())
    assert len(floors_made) == 2 * n
    elsewhere = Inputs(tmp_path)
    elsewhere.data.cache_dir = tmp_path / "file"
    elsewhere.data.cache_dir.write_text("no folder")
    assert_same(first, elsewhere.compare())


def test_pictures_are_kept_by_slide_and_spots(tmp_path, monkeypatch):
    drawn, picture = [], pictures.picture

    def noted(*args):
        drawn.append(1)
        return picture(*args)

    monkeypatch.setattr(pictures, "picture", noted)
    first = results.slide_pictures(Inputs(tmp_path).data)
    assert results.slide_pictures(Inputs(tmp_path).data) == first and list(first) == ["C1", "C2"]
    assert len(drawn) == 2
    data = Inputs(tmp_path).data
    make_section(tmp_path, "C1", "C", seed=99)  # another image in the place of that slide
    results.slide_pictures(data)
    assert len(drawn) == 3
    data.xy_px = data.xy_px + 1
    results.slide_pictures(data)
    assert len(drawn) == 5


def test_a_digest_differs_where_values_types_shapes_or_bounds_do():
    table = np.arange(6.0)
    variants = [
        (table,),
        (table.reshape(2, 3),),
        (table.reshape(3, 2),),
        (table.astype(np.float32),),
        (table[:3], table[3:]),
        (table, "a"),
        ("a", table),
        ("ab",),
        ("a", "b"),
        (np.array(["a", "b"]),),
        (np.array([]),),
        (),
    ]
    assert len({content_digest(*parts) for parts in variants}) == len(variants)
    assert content_digest(table, "a") == content_digest(table.copy(), "a")
    large = np.zeros((40_000, 1))  # read in blocks
    other = large.copy()
    other[-1] = 1
    assert content_digest(large) != content_digest(other)
    with pytest.raises(TypeError, match="str arrays"):
        content_digest(np.array([object()]))
    assert code_digest() == code_digest() and len(code_digest()) == 32
