"""Visium HD: bins of every size, put together exactly, and segmented cells."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pandas as pd
import pytest
from fakes import visium as visium_layout
from fakes import visium_hd as fake

from stexp.data.readers import sums
from stexp.data.readers.visium import read_visium
from stexp.data.readers.visium_hd import read_visium_hd
from stexp.errors import InputError


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """A folder of one section, the counts of its 2 um bins and their positions."""
    root = tmp_path_factory.mktemp("hd") / "S"
    return root, *fake.write_section(root / "outs", "S")


def put_together(counts, positions, size):
    """Name -> (counts, centre, array place) of squares of which half is on tissue, a bin at a time."""
    side = size // 2
    of_square = {}
    for row in positions.itertuples():
        key = row.array_row // side, row.array_col // side
        of_square.setdefault(key, []).append(row)
    out = {}
    for (r, c), own in of_square.items():
        on_tissue = [row for row in own if row.in_tissue]
        if len(on_tissue) * 2 >= side * side:
            names = [row.barcode for row in on_tissue]
            x, y = (c + 0.5) * size * fake.BIN_PX / 2, (r + 0.5) * size * fake.BIN_PX / 2
            centre = fake.MARGIN_PX + x + 0.02 * y, fake.MARGIN_PX + y - 0.02 * x
            out[f"s_{size:03d}um_{r:05d}_{c:05d}-1"] = counts.loc[names].sum().to_numpy(), centre, (c, r)
    return out


@pytest.mark.parametrize(("size", "blocks"), [(4, 1 << 24), (24, 1 << 24), (24, 700), (56, 700)])
def test_bins_of_any_size_are_exact_sums_of_those_of_2_um(section, size, blocks, monkeypatch, caplog):
    root, counts, positions = section
    monkeypatch.setattr(sums, "ENTRIES_AT_ONCE", blocks)
    caplog.set_level("INFO")
    (read,) = read_visium_hd(root, bin_um=size)
    expected = put_together(counts, positions, size)
    assert list(read.spots.obs_names) == sorted(expected) and f"{len(expected)} bins of {size} um" in caplog.text
    values, centres, places = (np.array(part) for part in zip(*map(expected.get, read.spots.obs_names), strict=True))
    np.testing.assert_array_equal(read.counts(fake.GENES), values)
    np.testing.assert_allclose(read.xy_px, centres, atol=1e-6)  # of squares that the edge cuts, too
    np.testing.assert_array_equal(read.array_xy, places)
    assert read.um_per_px == pytest.approx(0.5, rel=1e-3) and read.slide.path.name == "S_tissue_image.tif"
    assert read.spots.X.format == "csr" and read.spots.X.dtype == np.float32


@pytest.mark.parametrize("size", [8, 16])
def test_a_size_with_a_folder_is_read_from_it_and_says_what_the_sum_says(section, size, tmp_path):
    root, counts, positions = section
    (read,) = read_visium_hd(root, bin_um=size)
    assert {file.parent.name for file in read.files if file.suffix == ".h5"} == {f"square_{size:03d}um"}
    expected = put_together(counts, positions, size)
    shared = [name for name in read.spots.obs_names if name in expected]
    assert len(shared) > 0.75 * len(read)  # the edges of tissue and of the array are judged another way
    of = read.spots.obs_names.get_indexer(shared)
    np.testing.assert_array_equal(read.counts(fake.GENES)[of], [expected[name][0] for name in shared])
    np.testing.assert_allclose(read.xy_px[of], [expected[name][1] for name in shared], atol=1e-6)


def test_without_bins_of_2_um_those_of_8_do(section, tmp_path):
    for size in (8, 16):
        own = fake.bins(size)
        values = fake.sums(section[1], size, set(own.loc[own["in_tissue"] == 1, "barcode"]))
        fake.write_bins(tmp_path / "S" / "binned_outputs" / f"square_{size:03d}um", size, own, values)
    (read,) = read_visium_hd(tmp_path / "S", bin_um=24)
    (whole,) = read_visium_hd(section[0], bin_um=24)
    shared = read.spots.obs_names.intersection(whole.spots.obs_names)
    assert len(shared) > 0.9 * len(whole)
    inner = [name for name in shared if "_00000" not in name]  # away from what is off tissue
    of = [read.spots.obs_names.get_indexer(inner), whole.spots.obs_names.get_indexer(inner)]
    np.testing.assert_array_equal(read.counts(fake.GENES)[of[0]], whole.counts(fake.GENES)[of[1]])
    with pytest.raises(
        InputError, match=r"bin_um=12 is no multiple of a size .*there is .8, 16.; multiples of 8 would"
    ):
        read_visium_hd(tmp_path / "S", bin_um=12)
    # bins alone, without the folder around them
    (tmp_path / "S" / "binned_outputs" / "square_016um").rename(tmp_path / "S" / "square_016um")
    (tmp_path / "S" / "binned_outputs" / "square_008um").rename(tmp_path / "S" / "square_008um")
    (tmp_path / "S" / "binned_outputs").rmdir()
    assert len(read_visium_hd(tmp_path / "S")[0]) == len(read_visium_hd(section[0])[0])


@pytest.mark.parametrize("place", ["..", "", "outs", "outs/binned_outputs", "outs/binned_outputs/square_008um/spatial"])
def test_any_natural_place_is_understood(section, place):
    (read,) = read_visium_hd(section[0] / place)
    assert read.name == "S" and read.spots.obs_names[0].startswith("s_016um")


@pytest.mark.parametrize("size", [5, 3, 17, 0.5])
def test_sizes_that_bins_cannot_make_up_are_refused(section, size):
    with pytest.raises(InputError, match=f"data.bin_um={size:g} is no multiple .* multiples of 2 would fit"):
        read_visium_hd(section[0], bin_um=size)


def test_cells_lie_at_the_centres_of_their_outlines(tmp_path):
    fake.write_section(tmp_path / "S" / "outs", "S")
    counts, centres = fake.write_cells(tmp_path / "S" / "outs" / "segmented_outputs")
    (read,) = read_visium_hd(tmp_path / "S", spots="cells")
    assert list(read.spots.obs_names) == list(counts.index)  # one outline has no counts
    np.testing.assert_array_equal(read.counts(fake.GENES), counts)
    np.testing.assert_allclose(read.xy_px, centres[: len(counts)])
    assert read.um_per_px == 0.5 and read.slide.path.name == "S_tissue_image.tif"
    least = centres.min(axis=0)
    np.testing.assert_array_equal(read.array_xy, np.floor((centres[: len(counts)] - least) / 2))
    # outlines of odd forms: an L of two squares of area 4 and 1, and a hole of the area of the second
    shapes = tmp_path / "S" / "outs" / "segmented_outputs" / "cell_segmentations.geojson"
    document = json.loads(shapes.read_text())
    square = [[100, 100], [102, 100], [102, 102], [100, 102], [100, 100]]
    other = [[[110, 100], [110, 101], [111, 101], [111, 100], [110, 100]]]
    document["features"][0]["geometry"] = {"type": "MultiPolygon", "coordinates": [[square], other]}
    hole = [[101, 101], [102, 101], [102, 102], [101, 102], [101, 101]]
    document["features"][1]["geometry"]["coordinates"] = [square, hole]
    shapes.write_text(json.dumps(document))
    (read,) = read_visium_hd(tmp_path / "S", spots="cells")
    np.testing.assert_allclose(read.xy_px[0], [(4 * 101 + 110.5) / 5, (4 * 101 + 100.5) / 5])
    np.testing.assert_allclose(read.xy_px[1], [(4 * 101 - 101.5) / 3] * 2)


def drop_scale(outs):
    for folder in (outs / "spatial", outs / "segmented_outputs" / "spatial"):
        (folder / "scalefactors_json.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda outs: (outs / "segmented_outputs").rename(outs / "x"), "no segmented_outputs, which SpaceRanger 4"),
        (lambda outs: (outs / "segmented_outputs" / "cell_segmentations.geojson").unlink(), "outlines of its cells"),
        (lambda outs: (outs / "segmented_outputs" / "cell_segmentations.geojson").write_text('{"features": [{"ty'),
         "no collection of polygons"),
        (lambda outs: (outs / "segmented_outputs" / "cell_segmentations.geojson").write_text('{"features": []}'),
         "hold no cell"),
        (lambda outs: (outs / "segmented_outputs" / "filtered_feature_cell_matrix.h5").unlink(), "counts of its cells"),
        (drop_scale, "no microns_per_pixel"),
    ],
)  # fmt: skip
def test_cells_without_what_they_need_are_refused(tmp_path, change, says):
    fake.write_section(tmp_path / "outs", "S")
    change(tmp_path / "outs")
    with pytest.raises(InputError, match=says):
        read_visium_hd(tmp_path / "outs", spots="cells")


def positions_of(outs):
    return outs / "binned_outputs" / "square_002um" / "spatial" / "tissue_positions.parquet"


def rewrite(change):
    def rewritten(outs):
        change(pd.read_parquet(positions_of(outs))).to_parquet(positions_of(outs), index=False)

    return rewritten


def name_other_bins(outs):
    with h5py.File(outs / "binned_outputs" / "square_002um" / "filtered_feature_bc_matrix.h5", "a") as file:
        names = file["matrix/barcodes"][:]
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.array([name.replace(b"s_", b"t_") for name in names])


def claim_other_size(outs):
    file = outs / "binned_outputs" / "square_002um" / "spatial" / "scalefactors_json.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bin_size_um": 8}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rewrite(lambda t: t.drop(columns="array_row")), "lack array_row"),
        (rewrite(lambda t: t[t["array_row"] < 60]), r"are not in the table of positions .*is it cut"),
        (rewrite(lambda t: t.assign(in_tissue=0)), "none of 4356 bins is in tissue"),
        (rewrite(lambda t: t.assign(in_tissue=(t["array_row"] == 7).astype(int))), "has half of its bins on tissue"),
        (rewrite(lambda t: t.assign(in_tissue=3)), "in_tissue other than"),
        (rewrite(lambda t: t.rename(columns={"array_row": "array_col", "array_col": "array_row"})),
         "are other than its name says"),
        (rewrite(lambda t: t.assign(pxl_col_in_fullres=np.nan)), "4356 rows hold no number"),
        (name_other_bins, "are none of bins .first: 't_002um"),
        (claim_other_size, "contradict each other about the size of a bin"),
        (lambda outs: positions_of(outs).write_bytes(b"PAR1"), "cannot be read as a table"),
    ],
)  # fmt: skip
def test_bins_that_do_not_fit_each_other_are_refused(tmp_path, change, says):
    fake.write_section(tmp_path / "outs", "S", cells=False)
    change(tmp_path / "outs")
    with pytest.raises(InputError, match=says):
        read_visium_hd(tmp_path / "outs", bin_um=24)


def test_what_is_not_of_visium_hd_is_refused(tmp_path, section):
    visium_layout.write_section(tmp_path / "S1", 2)
    with pytest.raises(InputError, match=r"no folder binned_outputs or segmented_outputs.*data=visium reads"):
        read_visium_hd(tmp_path / "S1")
    with pytest.raises(InputError, match=r"choose one size of bins: data=visium_hd data.bin_um="):
        read_visium(section[0])
    with pytest.raises(InputError, match=r"data\.spots=cell.*did you mean cells\?"):
        read_visium_hd(section[0], spots="cell")
    with pytest.raises(InputError, match=r"data\.bin_um=-8"):
        read_visium_hd(section[0], bin_um=-8)
