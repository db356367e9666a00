"""Counts and positions are joined only where they are of the same spots."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from stexp.data.join import join, split_ids
from stexp.errors import InputError

RNG = np.random.default_rng(5)
BARCODES = ["".join(RNG.choice(list("ACGT"), 16)) for _ in range(40)]
BINS = [f"s_008um_{i:05d}_{j:05d}" for i in range(8) for j in range(5)]
LEGACY = [f"{i}x{j}" for i in range(8) for j in range(5)]


def counts_of(names) -> ad.AnnData:
    values = np.arange(1, len(names) + 1, dtype=np.float32)[:, None]
    return ad.AnnData(values, obs=pd.DataFrame(index=list(names)))


def positions_of(names, in_tissue=None) -> pd.DataFrame:
    n = np.arange(len(names))
    table = pd.DataFrame({"array_x": n, "array_y": n, "pixel_x": 10.0 * n, "pixel_y": 20.0 * n}, index=list(names))
    return table if in_tissue is None else table.assign(in_tissue=in_tissue)


def named(places, suffix="-1", prefix=""):
    return [f"{prefix}{place}{suffix}" for place in places]


AGGREGATED = [*named(BARCODES), *named(BARCODES[:30], "-2")]


@pytest.mark.parametrize("places", [BARCODES, BINS, LEGACY], ids=["barcodes", "bins", "legacy"])
@pytest.mark.parametrize(("suffix", "prefix"), [("-1", ""), ("-2", ""), ("", "S1_"), ("-1-0", ""), ("-1_S1", "")])
def test_ids_say_sample_and_place(places, suffix, prefix):
    tags, found = split_ids(pd.Index(named(places, suffix, prefix)))
    assert set(tags) == {(prefix, suffix)} and list(found) == places


def test_ids_of_another_kind_are_places():
    tags, places = split_ids(pd.Index(["007", "NA", "A-1", "spot 3", "CATTAG"]))
    assert set(tags) == {("", "")} and list(places) == ["007", "NA", "A-1", "spot 3", "CATTAG"]


def test_counts_of_several_samples_are_refused_where_nothing_says_which_one():
    for own in (BARCODES, BARCODES[:35]):
        with pytest.raises(InputError, match=r"several samples .\.\.\.-1: 40, \.\.\.-2: 30., and nothing says which"):
            join(counts_of(AGGREGATED), positions_of(named(own)), "section S2")


def test_counts_of_several_samples_are_taken_where_only_one_lies_on_the_tissue(caplog):
    counts = counts_of([*named(BARCODES[10:]), *named(BARCODES[:25], "-2")])
    first = positions_of(named(BARCODES), in_tissue=np.arange(40) >= 10)
    second = positions_of(named(BARCODES), in_tissue=np.arange(40) < 25)
    one, two = join(counts, first, "section S1"), join(counts, second, "section S2")
    assert list(one.obs_names) == named(BARCODES[10:]) and list(two.obs_names) == named(BARCODES[:25], "-2")
    np.testing.assert_array_equal(two.X.ravel(), np.arange(31, 56))
    np.testing.assert_array_equal(two.obsm["spatial"][:, 0], 10.0 * np.arange(25))
    for words in ("section S2", "...-1: 30, ...-2: 25", "those of ...-2"):
        assert words in caplog.text


@pytest.mark.parametrize(("suffix", "prefix"), [("-2", ""), ("-1", "S2_"), ("-1-S2", "")])
def test_positions_named_like_a_sample_take_its_counts(suffix, prefix):
    counts = counts_of([*named(BARCODES), *named(BARCODES[:30], suffix, prefix)])
    joined = join(counts, positions_of(named(BARCODES[:30], suffix, prefix)), "section S2")
    np.testing.assert_array_equal(joined.X.ravel(), np.arange(41, 71))


def test_positions_of_several_samples_are_refused():
    positions = positions_of([*named(BARCODES), *named(BARCODES, "-2")])
    for counts in (counts_of(AGGREGATED), counts_of(named(BARCODES))):
        with pytest.raises(InputError, match="the positions are of several samples"):
            join(counts, positions, "section S2")


@pytest.mark.parametrize(
    ("of_counts", "of_positions"),
    [(("", ""), ("-1", "")), (("-1", ""), ("", "")), (("-1", "S1_"), ("-1", "")), (("-2", ""), ("-1", ""))],
)
def test_a_tag_on_one_side_is_disregarded_where_all_places_agree(caplog, of_counts, of_positions):
    counts = counts_of(named(BARCODES[::-1], *of_counts))
    joined = join(counts, positions_of(named(BARCODES, *of_positions)), "section S")
    assert list(joined.obs_names) == list(counts.obs_names)
    np.testing.assert_array_equal(joined.obsm["spatial"][:, 0], 10.0 * np.arange(40)[::-1])
    assert "joined without what stands before and after" in caplog.text


@pytest.mark.parametrize(
    ("counts", "positions"),
    [
        (named(BARCODES, "-1", "S1_"), named(BARCODES, "-1", "S2_")),  # another sample, by name
        (named(BARCODES, "-2"), named(BARCODES, "-3")),
        (named(BARCODES[5:], "-1", "S1_"), named(BARCODES)),  # the same barcodes are in every slide
        (named(BARCODES), named(BARCODES[5:], "-1", "S1_")),
    ],
)
def test_a_tag_is_not_disregarded_where_places_or_samples_differ(counts, positions):
    with pytest.raises(InputError, match="agree but for what stands before or after, which is no proof"):
        join(counts_of(counts), positions_of(positions), "section S")


@pytest.mark.parametrize("side", ["counts", "positions"])
@pytest.mark.parametrize(
    ("n_left", "level"), [(40, None), (39, "INFO"), (38, "INFO"), (37, "WARNING"), (21, "WARNING")]
)
def test_what_a_join_leaves_over_is_said_by_how_much_it_is(caplog, side, n_left, level):
    caplog.set_level(logging.INFO)
    few, all_names = named(BARCODES[:n_left]), named(BARCODES)
    joined = join(
        counts_of(few if side == "positions" else all_names),
        positions_of(few if side == "counts" else all_names),
        "section S",
    )
    assert len(joined) == n_left and [record.levelname for record in caplog.records] == ([level] if level else [])


@pytest.mark.parametrize("side", ["counts", "positions"])
def test_a_join_that_drops_half_is_refused_with_both_numbers(side):
    few, all_names = named(BARCODES[:20]), named(BARCODES)
    counts, positions = (few, all_names) if side == "positions" else (all_names, few)
    message = (
        rf"20 spots would be joined of {len(counts)} with counts .* and {len(positions)} with a position on tissue"
    )
    with pytest.raises(InputError, match=message):
        join(counts_of(counts), positions_of(positions), "section S")


def test_spots_beside_the_tissue_are_not_dropped_but_known(caplog):
    caplog.set_level(logging.INFO)
    in_tissue = np.arange(40) % 10 == 0
    joined = join(counts_of(named(BARCODES)), positions_of(named(BARCODES), in_tissue), "section S")
    assert list(joined.obs_names) == named(BARCODES[::10])
    assert [record.levelname for record in caplog.records] == ["INFO"]
    with pytest.raises(InputError, match="none of 40 spots is in tissue"):
        join(counts_of(named(BARCODES)), positions_of(named(BARCODES), in_tissue & False), "section S")
