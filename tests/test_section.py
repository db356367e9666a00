from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sections import make_section

from stexp.data.join import join
from stexp.data.section import Section, check_counts
from stexp.data.slides.slide import Slide
from stexp.errors import InputError


def spots(counts, ids=None, genes=None, xy=None, array=None) -> ad.AnnData:
    n, g = counts.shape
    array = np.column_stack([np.arange(n), np.zeros(n)]) if array is None else np.asarray(array, float)
    return ad.AnnData(
        counts,
        obs=pd.DataFrame({"array_x": array[:, 0], "array_y": array[:, 1]}, index=ids or [f"s{i}" for i in range(n)]),
        var=pd.DataFrame(index=genes or [f"g{i}" for i in range(g)]),
        obsm={"spatial": np.column_stack([np.arange(n), np.arange(n)]).astype(float) if xy is None else np.asarray(xy)},
    )


def refused(*parts: str, **changed) -> None:
    """Building a section of 4 spots with `changed` fails, and its message holds all `parts`."""
    counts = changed.pop("counts", np.ones((4, 3), np.float32))
    with pytest.raises(InputError) as caught:
        Section("S7", "P", spots(counts, **changed))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("S7", *parts):
        assert part in message, message


def fitted(tmp_path, xy, size=(120, 96)) -> str:
    """The message for positions `xy` on an image of `size` (width, height)."""
    image = np.zeros((size[1], size[0], 3), np.uint8)
    with pytest.raises(InputError) as caught:
        make_section(tmp_path, n=len(xy), xy_px=np.asarray(xy, float), image=image)
    return str(caught.value)


# positions against the image


def test_swapped_x_and_y_are_recognised(tmp_path):
    rng = np.random.default_rng(0)
    xy = np.column_stack([rng.uniform(0, 119, 20), rng.uniform(0, 95, 20)])
    xy[0] = 118, 3
    make_section(tmp_path, n=20, xy_px=xy, image=np.zeros((96, 120, 3), np.uint8))
    message = fitted(tmp_path, xy[:, ::-1])
    assert f"{int((xy[:, 0] >= 96).sum())} of 20 spots lie outside the image (120 x 96 px)" in message
    assert "with x and y swapped all would fit" in message


def test_another_scale_is_recognised_and_the_named_factor_fits(tmp_path):
    xy = np.random.default_rng(1).uniform(5, 90, (20, 2))
    message = fitted(tmp_path, xy * 4)
    assert "another resolution" in message and "swapped" not in message
    factor = float(message.split("positions times ")[1].split()[0])
    assert 0.2 < factor < 0.4
    make_section(tmp_path, n=20, xy_px=xy * 4 * factor * 0.99, image=np.zeros((96, 120, 3), np.uint8))


def test_a_few_spots_outside_are_named_instead_of_a_scale(tmp_path):
    xy = np.random.default_rng(1).uniform(5, 90, (24, 2))
    xy[7], xy[9] = (130, 20), (4000, 20)
    message = fitted(tmp_path, xy)
    assert "2 of 24 spots lie outside" in message and "times" not in message
    assert "other 22" in message and "spot 4x1 at (4000, 20)" in message
    xy[11] = -7000, 8
    assert "times" not in fitted(tmp_path, xy)  # three of 24 may be another resolution, but no factor mends a sign
    xy[7] = xy[9] = 50, 50
    for words in ("other 23", "spot 1x2 at (-7000, 8)", "negative"):
        assert words in fitted(tmp_path, xy)


def test_negative_positions_are_named_for_what_they_are(tmp_path):
    message = fitted(tmp_path, [[-1.0, 5], [3, 4], [7, 8]])
    assert "1 of 3 spots" in message and "negative" in message


@pytest.mark.parametrize(
    ("xy", "inside"),
    [
        ((0.0, 0.0), True),
        ((119.9, 95.9), True),
        ((120.0, 5.0), False),
        ((5.0, 96.0), False),
        ((-0.01, 5.0), False),
    ],
)
def test_the_border_belongs_to_the_image_on_the_low_side_only(tmp_path, xy, inside):
    positions = np.array([xy, (60.0, 40.0)])
    if inside:
        make_section(tmp_path, n=2, xy_px=positions)
    else:
        assert "1 of 2 spots" in fitted(tmp_path, positions)


def test_positions_are_not_judged_without_an_image(tmp_path):
    section = make_section(tmp_path, n=2, xy_px=np.array([[-5.0, 1e6], [0, 0]]), image=False)
    assert section.slide is None and section.xy_px[0, 1] == 1e6


def test_missing_and_unusable_positions():
    refused("2 spots have no pixel position", xy=[[1, 2], [np.nan, 1], [3, 4], [5, np.inf]])
    refused("4 rows of (x, y)", "(4, 3)", xy=np.zeros((4, 3)))
    without = spots(np.ones((4, 3), np.float32))
    del without.obsm["spatial"]
    with pytest.raises(InputError, match="positions must be 4 rows"):
        Section("S7", "P", without)
    without = spots(np.ones((4, 3), np.float32))
    del without.obs["array_y"]
    with pytest.raises(InputError, match="array_y"):
        Section("S7", "P", without)


@pytest.mark.parametrize("bad", [-1, 0.5, np.nan, np.inf])
def test_array_coordinates_must_be_whole_and_not_negative(bad):
    refused("array coordinates must be whole numbers >= 0", array=[[0, 0], [1, bad], [2, 0], [3, 0]])


def test_array_coordinates_read_as_floats_become_integers():
    section = Section("S", "P", spots(np.ones((3, 2), np.float32), array=[[0.0, 5.0], [1.0, 5.0], [2.0, 7.0]]))
    assert section.array_xy.dtype == np.int64
    np.testing.assert_array_equal(section.array_xy, [[0, 5], [1, 5], [2, 7]])


# counts


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (-1, "1 counts are negative"),
        (0.5, "1 counts are fractional (normalised?)"),
        (np.nan, "1 counts are NaN"),
        (np.inf, "1 counts are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_counts_that_are_not_raw(value, what, form):
    counts = np.ones((4, 3), np.float32)
    counts[2, 1] = value
    refused(what, "raw counts are needed", counts=form(counts))


def test_counts_are_judged_whatever_their_type():
    check_counts(np.array([0, 3, 2**40], dtype=np.int64), "here")
    check_counts(np.array([], dtype=np.float32), "here")
    with pytest.raises(InputError, match="2 counts are negative"):
        check_counts(np.array([-3, -2, 5], dtype=np.int64), "here")


def test_duplicate_spots_and_genes_are_counted_and_named():
    refused("1 duplicate spots", "s1", ids=["s0", "s1", "s1", "s2"])
    refused("2 duplicate genes", "a, b", counts=np.ones((4, 5), np.float32), genes=["a", "b", "a", "b", "b"])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_a_section_of_nothing(shape):
    refused(
        f"{shape[0]} spots x {shape[1]} genes",
        counts=np.ones(shape, np.float32),
        xy=np.zeros((shape[0], 2)),
        array=np.zeros((shape[0], 2)),
    )


def test_spots_without_counts_stay_and_are_counted(caplog, tmp_path):
    counts = np.array([[0, 0], [1, 2], [0, 0], [0, 5]])
    with caplog.at_level(logging.WARNING):
        section = make_section(tmp_path, n=4, genes=2, counts=counts)
    assert "2 of 4 spots have no counts" in caplog.text
    assert len(section) == 4
    np.testing.assert_array_equal(section.total_counts, [0, 3, 0, 5])


def test_one_spot_is_a_section(tmp_path):
    section = make_section(tmp_path, n=1)
    assert len(section) == 1 and section.counts(["g01"]).shape == (1, 1)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array])
def test_counts_by_gene_in_the_order_asked_for(form):
    dense = np.arange(12, dtype=np.float32).reshape(4, 3)
    section = Section("S", "P", spots(form(dense), genes=["a", "b", "c"]))
    got = section.counts(["c", "nowhere", "a"])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.column_stack([dense[:, 2], np.full(4, np.nan), dense[:, 0]]))
    np.testing.assert_array_equal(section.total_counts, dense.sum(1))


# join


def positions(ids) -> pd.DataFrame:
    n = len(ids)
    return pd.DataFrame(
        {
            "array_x": np.arange(n),
            "array_y": 10 + np.arange(n),
            "pixel_x": 100.0 + np.arange(n),
            "pixel_y": 200.0 + np.arange(n),
        },
        index=ids,
    )


def test_join_keeps_the_order_of_the_counts_and_says_what_is_left_over(caplog):
    counts = ad.AnnData(np.diag([1.0, 2, 3, 4]).astype(np.float32), obs=pd.DataFrame(index=["d", "b", "x", "a"]))
    with caplog.at_level(logging.INFO):
        joined = join(counts, positions(["a", "b", "c", "d", "e"]), "section Q")
    assert list(joined.obs_names) == ["d", "b", "a"]
    assert joined.X.diagonal().tolist() == [1, 2, 0] and joined.X[2, 3] == 4
    np.testing.assert_array_equal(joined.obsm["spatial"], [[103, 203], [101, 201], [100, 200]])
    assert joined.obs["array_x"].tolist() == [3, 1, 0] and joined.obs["array_y"].tolist() == [13, 11, 10]
    assert "section Q: 3 spots joined; left over: 1 counts without a position" in caplog.text
    assert "2 positions without counts" in caplog.text


def test_join_without_a_common_id_shows_one_of_each_side():
    counts = ad.AnnData(np.ones((2, 1), np.float32), obs=pd.DataFrame(index=["AAAC-1", "AAAG-1"]))
    with pytest.raises(InputError, match=r"no spot id in common: 2 ids like AAAC-1.* 3 like 5x7"):
        join(counts, positions(["5x7", "5x8", "5x9"]), "section Q")


@pytest.mark.parametrize("side", ["counts", "positions"])
def test_join_refuses_an_id_twice(side):
    ids = {"counts": ["a", "b"], "positions": ["a", "b"]}
    ids[side] = ["a", "a"]
    counts = ad.AnnData(np.ones((2, 1), np.float32), obs=pd.DataFrame(index=ids["counts"]))
    with pytest.raises(InputError, match=f"1 spot ids occur twice in the {side} .a."):
        join(counts, positions(ids["positions"]), "section Q")


# the caller's own


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("as_view", [False, True])
def test_the_callers_table_is_left_as_it_is(form, as_view):
    whole = spots(form(np.arange(12, dtype=np.float32).reshape(4, 3)), array=[[0.0, 5], [1, 5], [2, 7], [3, 7]])
    given = whole[:3] if as_view else whole
    before = given.copy()
    section = Section("S", "P", given)
    assert given.is_view is as_view and type(given.X) is type(whole[:3].X if as_view else before.X)
    assert (given.obs.dtypes == before.obs.dtypes).all() and (given.X != before.X).sum() == 0
    assert section.spots.X.format == "csr" and section.array_xy.dtype == np.int64 and not section.spots.is_view
    section.spots.obs["mine"] = 1
    section.spots.obsm["mine"] = np.zeros((len(section), 1))
    assert "mine" not in given.obs and "mine" not in given.obsm


def test_a_table_that_needs_no_change_is_not_copied():
    given = spots(sp.csr_matrix(np.ones((4, 3), np.float32)))
    given.obs[["array_x", "array_y"]] = given.obs[["array_x", "array_y"]].astype(np.int64)
    section = Section("S", "P", given)
    assert section.spots is given and Section("S", "P", section.spots).spots is given


@pytest.mark.parametrize(
    "name",
    [
        "-rf",
        "../x",
        "a/b",
        "a\\b",
        ".x",
        "",
        "a" * 101,
        "a\0b",
        "a\nb",
        "a\x1b[31m",
        "a\u202eb",
        "a\u200fb",
        " a",
        "C:x",
    ],
)
@pytest.mark.parametrize("of", ["name", "patient"])
def test_names_that_cannot_name_a_folder_are_refused(name, of):
    table = spots(np.ones((4, 3), np.float32))
    with pytest.raises(InputError, match="cannot name a folder") as caught:
        Section(**{"name": "S", "patient": "P", of: name}, spots=table)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["A1", "007", "é", "P2_ST_rep1", "x y", "a-b", "(1)", "#3"])
def test_names_that_name_a_folder_stay_as_they_are(name):
    assert Section(name, name, spots(np.ones((4, 3), np.float32))).name == name


@pytest.mark.parametrize("strange", ["a\0", "a\n", "\u202eCD74", "CD\x1b[0m", "\u2066A\u2069"])
def test_names_of_spots_and_genes_can_be_printed(strange):
    refused("1 spots have characters in their name that cannot be printed", ids=["s0", strange, "s2", "s3"])
    refused("1 genes have characters in their name that cannot be printed", genes=["g0", strange, "g2"])


# the image behind it


def test_a_section_with_a_missing_image(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        Slide(tmp_path / "gone.png")
    with pytest.raises(InputError, match="is a folder"):
        Slide(tmp_path)
