from __future__ import annotations

import json
import logging

import h5py
import numpy as np
import pandas as pd
import pytest
from fakes import visium as fake
from PIL import Image

from stexp.data.readers.visium import read_visium
from stexp.errors import InputError


def expected(folder, counts, positions):
    """Counts and positions of every spot in tissue, joined one barcode at a time."""
    for row in positions[positions["in_tissue"] == 1].itertuples():
        yield (
            row.barcode,
            counts.loc[row.barcode].to_numpy(),
            (row.array_col, row.array_row),
            (row.pxl_col_in_fullres, row.pxl_row_in_fullres),
        )


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_version_gives_each_barcode_its_counts_and_place(tmp_path, version):
    counts, positions = fake.write_section(tmp_path / "S1" / "outs", version)
    (section,) = read_visium(tmp_path / "S1" / "outs")
    assert (section.name, section.patient, section.slide.path.name) == ("S1", "S1", "image.png")
    assert len(section) == len(counts) == 34
    for barcode, of, array_xy, xy_px in expected(tmp_path, counts, positions):
        i = section.spots.obs_names.get_loc(barcode)
        np.testing.assert_array_equal(section.counts(counts.columns)[i], of)
        assert tuple(section.array_xy[i]) == array_xy and tuple(section.xy_px[i]) == xy_px
    assert section.um_per_px == pytest.approx(100 / fake.PITCH_PX, rel=1e-3)
    assert list(section.spots.var["gene_ids"]) == fake.gene_ids(counts.columns)
    assert section.spots.X.format == "csr" and section.spots.X.dtype == np.float32
    names = [path.name for path in section.files]
    assert len(names) == (6 if version == 1 else 4) and "scalefactors_json.json" in names and "image.png" in names


def test_several_sections_with_patients(tmp_path, caplog):
    fake.write(tmp_path)
    sections = read_visium(tmp_path)
    assert [(s.name, s.patient) for s in sections] == [("a", "P1"), ("b", "P1"), ("c", "P2"), ("d", "P3")]
    images = [s.slide.path.relative_to(tmp_path).as_posix() for s in sections]
    assert images == ["a/a_HE.png", "b/image.png", "c/outs/image.png", "d/spatial/tissue_hires_image.png"]
    assert [s.name for s in read_visium(tmp_path, ["c", "a"])] == ["a", "c"]
    with pytest.raises(InputError, match=r"no section x in .*; there are a, b, c, d"):
        read_visium(tmp_path, ["x"])
    (tmp_path / "patients.csv").write_text("section,patient\na,P1\n")
    with pytest.raises(InputError, match="names no patient for section b, c, d"):
        read_visium(tmp_path)
    (tmp_path / "patients.csv").unlink()
    caplog.clear()
    assert [s.patient for s in read_visium(tmp_path, ["a", "b"])] == ["a", "b"]
    assert "each of 2 sections counts as a patient of its own" in caplog.text


def test_sections_not_asked_for_are_not_opened(tmp_path):
    fake.write(tmp_path)
    (tmp_path / "b" / "filtered_feature_bc_matrix.h5").write_bytes(b"")
    assert len(read_visium(tmp_path, ["c"])) == 1


def test_hires_image_stands_in_at_its_own_scale(tmp_path, caplog):
    fake.write(tmp_path)
    full, hires = read_visium(tmp_path, ["c", "d"])
    assert hires.slide.size == (82, 62)
    by_place = {tuple(a): xy for a, xy in zip(full.array_xy, full.xy_px, strict=True)}
    for array_xy, xy in zip(hires.array_xy, hires.xy_px, strict=True):
        np.testing.assert_allclose(xy, by_place[tuple(array_xy)] * fake.HIRES)
    assert hires.um_per_px == pytest.approx(full.um_per_px / fake.HIRES)
    said = [record.message for record in caplog.records if "tissue_hires_image" in record.message]
    assert len(said) == 1 and "10 um/px instead of 2.5" in said[0] and said[0].startswith("section d")


def test_where_the_image_is_looked_for(tmp_path):
    fake.write_section(tmp_path / "x" / "S1" / "outs", 2)
    folder = tmp_path / "x" / "S1" / "outs"
    places = [folder / "HE.TIF", folder / "spatial" / "HE.jpg", folder.parent / "HE.tiff", tmp_path / "x" / "S1.png"]
    (folder / "image.png").unlink()
    for place in places:
        fake.picture().save(place, format="PNG")
        assert read_visium(tmp_path / "x")[0].slide.path == place
        given = tmp_path / "S1_image.png"
        fake.picture().save(given)
        assert read_visium(tmp_path / "x", image=given)[0].slide.path == given
        assert read_visium(tmp_path / "x", image=tmp_path)[0].slide.path == given
        place.unlink()
    fake.picture().save(folder / "one.png")
    fake.picture().save(folder / "two.jpg")
    with pytest.raises(InputError, match=r"2 images \(one.png, two.jpg\).*data.image="):
        read_visium(tmp_path / "x")


def test_one_image_for_several_sections_is_refused(tmp_path):
    fake.write(tmp_path)
    with pytest.raises(InputError, match=r"one file for 2 sections; a folder of <section>.tif would fit"):
        read_visium(tmp_path, ["b", "c"], image=tmp_path / "b" / "image.png")


def test_hires_given_as_full_resolution_is_told_apart_from_swapped_axes(tmp_path):
    _, positions = fake.write_section(tmp_path, 2)
    with pytest.raises(InputError, match=r"82 x 62 px, the full-resolution image about 328 x 248"):
        read_visium(tmp_path, image=tmp_path / "spatial" / "tissue_hires_image.png")
    columns = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    positions[columns] = positions[columns[::-1]].to_numpy()
    positions.to_csv(tmp_path / "spatial" / "tissue_positions.csv", index=False)
    with pytest.raises(InputError, match="with x and y swapped all would fit"):
        read_visium(tmp_path)


def test_an_image_of_another_size_is_refused(tmp_path):
    fake.write_section(tmp_path, 2)
    image = Image.open(tmp_path / "image.png")
    image.resize((round(image.width * 0.93), round(image.height * 0.93))).save(tmp_path / "image.png")
    with pytest.raises(InputError, match="the full-resolution image about 328 x 248"):
        read_visium(tmp_path)


def test_a_cut_table_of_positions_is_refused(tmp_path):
    _, positions = fake.write_section(tmp_path, 2)
    positions[:20].to_csv(tmp_path / "spatial" / "tissue_positions.csv", index=False)
    with pytest.raises(InputError, match=r"barcodes with counts are not in the table of positions .*is it cut\?"):
        read_visium(tmp_path)


def test_a_section_of_two_patients_is_refused(tmp_path):
    fake.write(tmp_path)
    (tmp_path / "patients.csv").write_text("section,patient\na,P1\nb,P1\nc,P2\nd,P3\na,P2\n")
    with pytest.raises(InputError, match="names a section twice: 5 rows, 4 sections"):
        read_visium(tmp_path)


def test_swapped_pixels_inside_a_square_image_are_said(tmp_path, caplog):
    _, positions = fake.write_section(tmp_path, 2)
    (tmp_path / "spatial" / "tissue_hires_image.png").unlink()
    Image.new("RGB", (400, 400), "pink").save(tmp_path / "image.png")
    read_visium(tmp_path)
    assert "mirror" not in caplog.text
    columns = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    positions[columns] = positions[columns[::-1]].to_numpy()
    positions.to_csv(tmp_path / "spatial" / "tissue_positions.csv", index=False)
    read_visium(tmp_path)
    assert "pixel row and column are swapped" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.rename(columns={"array_row": "array_col", "array_col": "array_row"}), "array_col swapped"),
        (lambda t: t.assign(pxl_row_in_fullres=t["pxl_row_in_fullres"].sample(frac=1, random_state=1).to_numpy()), "do "
         "not follow the array"),
        (lambda t: t[t["array_row"] == 3], "spots in one line"),
        (lambda t: t.assign(in_tissue=0), "none of 36 spots is in tissue"),
        (lambda t: t.assign(in_tissue=2), "in_tissue other than"),
        (lambda t: t.assign(barcode=[f"x{i}" for i in range(len(t))]), "no spot id in common: 34 ids like"),
        (lambda t: t.assign(barcode="S2_" + t["barcode"]).query("array_row > 0"), "counts are named like .* no proof"),
        (lambda t: t.rename(columns={"array_col": "column"}), "lack array_col"),
        (lambda t: t.astype({"array_row": object}).replace({"array_row": {2: "two"}}), "6 rows hold no number"),
        (lambda t: pd.concat([t, t[:3]]), "3 spot ids occur twice in the positions"),
    ],
)  # fmt: skip
def test_positions_that_do_not_fit_are_refused(tmp_path, change, says):
    _, positions = fake.write_section(tmp_path, 2)
    change(positions).to_csv(tmp_path / "spatial" / "tissue_positions.csv", index=False)
    with pytest.raises(InputError, match=says):
        read_visium(tmp_path)


def test_scale_is_checked_against_the_scale_factors(tmp_path, caplog):
    fake.write_section(tmp_path, 2)
    file = tmp_path / "spatial" / "scalefactors_json.json"
    factors = json.loads(file.read_text())
    read_visium(tmp_path)
    assert "spot_diameter_fullres" not in caplog.text
    file.write_text(json.dumps(factors | {"spot_diameter_fullres": 55 * fake.PITCH_PX / 100}))
    assert read_visium(tmp_path)[0].um_per_px == pytest.approx(2.5, rel=1e-3)
    assert "the pitch of the spots gives 2.5 um/px, spot_diameter_fullres 2.95" in caplog.text
    file.write_text(json.dumps(factors | {"spot_diameter_fullres": 4 * factors["spot_diameter_fullres"]}))
    with pytest.raises(InputError, match="are positions and scale factors of one section, and of one image"):
        read_visium(tmp_path)
    file.unlink()
    caplog.clear()
    assert read_visium(tmp_path)[0].um_per_px == pytest.approx(2.5, rel=1e-3)
    assert "nothing to compare the pitch" in caplog.text
    (tmp_path / "image.png").unlink()
    with pytest.raises(InputError, match="without tissue_hires_scalef"):
        read_visium(tmp_path)
    file.write_text("[1, 2")
    with pytest.raises(InputError, match="no JSON object"):
        read_visium(tmp_path)


def test_a_turned_and_skewed_picture_keeps_its_scale(tmp_path):
    """The pitch of a rotated array is the distance to the nearest spot, whatever way it lies."""
    _, positions = fake.write_section(tmp_path, 3)
    columns = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    angle = np.deg2rad(65)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    positions[columns] = positions[columns].to_numpy() @ turn * 1.7 + (400, 20)
    positions.to_parquet(tmp_path / "spatial" / "tissue_positions.parquet", index=False)
    Image.new("RGB", (1000, 1000), "pink").save(tmp_path / "image.png")
    (tmp_path / "spatial" / "tissue_hires_image.png").unlink()
    section = read_visium(tmp_path)[0]
    xy = section.xy_px
    nearest = np.sqrt(np.square(xy[:, None] - xy).sum(-1) + np.eye(len(xy)) * 1e9).min(1)
    assert section.um_per_px == pytest.approx(100 / np.median(nearest), rel=1e-3)


def test_raw_matrix_gives_the_same_spots_in_tissue(tmp_path, caplog):
    counts, positions = fake.write_section(tmp_path, 3)
    (tmp_path / "filtered_feature_bc_matrix.h5").unlink()
    outside = positions.loc[positions["in_tissue"] == 0, "barcode"]
    raw = pd.concat([pd.DataFrame(1, index=list(outside), columns=counts.columns), counts])
    fake.write_h5(tmp_path / "raw_feature_bc_matrix.h5", raw)
    caplog.set_level(logging.INFO)
    (section,) = read_visium(tmp_path)
    assert set(section.spots.obs_names) == set(counts.index)
    assert "2 spots with counts are outside the tissue" in caplog.text


def test_spots_without_counts_are_counted(tmp_path, caplog):
    counts, _ = fake.write_section(tmp_path, 3)
    fake.write_h5(tmp_path / "filtered_feature_bc_matrix.h5", counts.iloc[3:])
    caplog.set_level(logging.INFO)
    assert len(read_visium(tmp_path)[0]) == 31
    for words in ("31 spots", "0 counts without", "3 positions without"):
        assert words in caplog.text


def write_bins(folder, factors, size="008", bin_px=30.0):
    """Visium HD: 6 x 6 bins on a square array, without pictures."""
    counts, positions = fake.write_section(folder, 3)
    positions = positions.sort_values(["array_row", "array_col"])
    positions["array_col"] = positions["array_col"] // 2
    names = [
        f"s_{size}um_{r:05d}_{c:05d}-1" for r, c in zip(positions["array_row"], positions["array_col"], strict=True)
    ]
    renamed = dict(zip(positions["barcode"], names, strict=True))
    fake.write_h5(folder / "filtered_feature_bc_matrix.h5", counts.rename(index=renamed))
    positions["barcode"] = names
    for place, index in (("pxl_row_in_fullres", "array_row"), ("pxl_col_in_fullres", "array_col")):
        positions[place] = 20 + bin_px * positions[index]
    positions.to_parquet(folder / "spatial" / "tissue_positions.parquet", index=False)
    (folder / "spatial" / "tissue_hires_image.png").unlink()  # of another scale
    file = folder / "spatial" / "scalefactors_json.json"
    file.unlink()
    if factors is not None:
        file.write_text(json.dumps(factors))


def test_visium_hd_is_read_one_bin_size_at_a_time(tmp_path):
    bins = tmp_path / "HD1" / "outs" / "binned_outputs"
    factors = {"bin_size_um": 8.0, "spot_diameter_fullres": 30.0, "tissue_hires_scalef": 0.1}
    write_bins(bins / "square_008um", factors)
    for root in (tmp_path, tmp_path / "HD1", bins.parent, bins, bins / "square_008um"):  # the only size
        (section,) = read_visium(root)
        assert section.name == "HD1" and len(section) == 34
        assert section.um_per_px == pytest.approx(8 / 30)
    write_bins(bins / "square_016um", factors | {"bin_size_um": 16.0}, "016")
    for root in (tmp_path, bins.parent, bins):
        with pytest.raises(InputError, match=r"Visium HD; choose one size of bins: .*square_008um, square_016um"):
            read_visium(root)
    assert read_visium(bins / "square_016um")[0].um_per_px == pytest.approx(16 / 30)


@pytest.mark.parametrize("factors", [None, {}, {"microns_per_pixel": 8 / 30}, {"spot_diameter_fullres": 30.0}])
@pytest.mark.parametrize("place", ["square_008um", "mine"])
def test_bins_are_as_large_as_any_file_says(tmp_path, caplog, factors, place):
    write_bins(tmp_path / place, factors)
    assert read_visium(tmp_path / place)[0].um_per_px == pytest.approx(8 / 30)
    assert "bins of 8 um, by barcodes like s_008um_" in caplog.text  # which scale factors should say


def test_bins_that_nothing_measures_are_refused_and_stated_pixels_count(tmp_path, caplog):
    write_bins(tmp_path / "mine", None)
    rows = pd.read_parquet(tmp_path / "mine" / "spatial" / "tissue_positions.parquet")
    plain = rows["barcode"].str.replace("s_008um_", "bin_")
    rows.assign(barcode=plain).to_parquet(tmp_path / "mine" / "spatial" / "tissue_positions.parquet", index=False)
    with h5py.File(tmp_path / "mine" / "filtered_feature_bc_matrix.h5", "r+") as file:
        names = [name.decode().replace("s_008um_", "bin_") for name in file["matrix/barcodes"][:]]
        file["matrix/barcodes"][:] = np.array(names, dtype="S")
    with pytest.raises(InputError, match="a square array, as of Visium HD, and nothing says how large its bins are"):
        read_visium(tmp_path / "mine")
    factors = tmp_path / "mine" / "spatial" / "scalefactors_json.json"
    factors.write_text('{"microns_per_pixel": 0.25}')
    assert read_visium(tmp_path / "mine")[0].um_per_px == 0.25
    assert "by microns_per_pixel 0.25" in caplog.text
    # the folder tells the size of a bin
    factors.write_text("{}")
    (tmp_path / "mine").rename(tmp_path / "square_016um")
    assert read_visium(tmp_path / "square_016um")[0].um_per_px == pytest.approx(16 / 30)


@pytest.mark.parametrize(
    ("place", "factors", "says"),
    [
        ("square_016um", {}, "contradict each other about the size of a bin in um: barcodes .* 8, .*square_016um 16"),
        ("square_008um", {"bin_size_um": 2}, "bin_size_um of the scale factors 2, barcodes like s_008um.* 8"),
        ("square_008um", {"microns_per_pixel": 0.5}, "bins of 8 um give 0.267 um/px, microns_per_pixel .* says 0.5"),
    ],
)
def test_statements_about_bins_that_contradict_each_other_are_refused(tmp_path, place, factors, says):
    write_bins(tmp_path / place, factors)
    with pytest.raises(InputError, match=says):
        read_visium(tmp_path / place)


def test_spots_are_checked_against_the_pixels_that_are_stated(tmp_path):
    fake.write_section(tmp_path / "S", 2)
    file = tmp_path / "S" / "spatial" / "scalefactors_json.json"
    factors = json.loads(file.read_text())
    file.write_text(json.dumps(factors | {"microns_per_pixel": 2.5}))
    assert read_visium(tmp_path / "S")[0].um_per_px == pytest.approx(2.5, rel=1e-3)
    file.write_text(json.dumps(factors | {"microns_per_pixel": 0.5}))
    with pytest.raises(
        InputError, match=r"100 um apart give 2\.5 um/px, microns_per_pixel of the scale factors says 0\.5"
    ):
        read_visium(tmp_path / "S")
    file.write_text(json.dumps(factors | {"bin_size_um": 8}))
    with pytest.raises(InputError, match="this is not the array of bins of 8 um"):
        read_visium(tmp_path / "S")


@pytest.mark.parametrize(
    "place",
    [
        "", "S1", "S1/outs", "S1/outs/spatial", "S1/outs/filtered_feature_bc_matrix.h5", "S1/outs/image.png",
        "S1/outs/spatial/tissue_positions.csv",
    ],
)  # fmt: skip
def test_any_natural_place_of_a_section_is_understood(tmp_path, place):
    counts, _ = fake.write_section(tmp_path / "S1" / "outs", 2)
    (section,) = read_visium(tmp_path / place)
    assert (section.name, len(section), section.slide.path.name) == ("S1", len(counts), "image.png")


def test_a_section_is_called_like_its_folder_from_within(tmp_path, monkeypatch):
    fake.write_section(tmp_path / "S1" / "outs", 2)
    monkeypatch.chdir(tmp_path / "S1" / "outs")
    assert [read_visium(place)[0].name for place in (".", "..", "../outs", "spatial/..")] == ["S1"] * 4


def test_a_folder_of_an_mtx_matrix_is_a_place_of_its_section(tmp_path):
    fake.write_section(tmp_path / "S1" / "outs", 1)
    (section,) = read_visium(tmp_path / "S1" / "outs" / "filtered_feature_bc_matrix")
    assert section.name == "S1"


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    fake.write_section(tmp_path / "home" / "S1", 2)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert read_visium("~/S1", image="~/S1/image.png")[0].name == "S1"


def test_names_are_compared_as_typed(tmp_path):
    fake.write_section(tmp_path / "007" / "outs", 2)
    assert [section.name for section in read_visium(tmp_path, ["007"])] == ["007"]
    for wanted in ([7], ["7"]):
        with pytest.raises(InputError, match=r"looks like a number needs quotes|no section 7 in"):
            read_visium(tmp_path, wanted)


def test_barcodes_without_the_suffix_are_those_with_it(tmp_path, caplog):
    counts, positions = fake.write_section(tmp_path, 2)
    positions["barcode"] = positions["barcode"].str.removesuffix("-1")
    positions.to_csv(tmp_path / "spatial" / "tissue_positions.csv", index=False)
    (section,) = read_visium(tmp_path)
    assert "are joined without what stands before and after" in caplog.text
    np.testing.assert_array_equal(section.counts(counts.columns), counts.loc[section.spots.obs_names])


def test_one_symbol_of_two_genes_is_summed(tmp_path):
    counts, _ = fake.write_section(tmp_path, 3)
    doubled = counts.set_axis(["TBCE", "TBCE", *counts.columns[2:]], axis=1)
    fake.write_h5(tmp_path / "filtered_feature_bc_matrix.h5", doubled)
    (section,) = read_visium(tmp_path)
    assert list(section.genes) == ["TBCE", *counts.columns[2:]]
    of = counts.loc[section.spots.obs_names]
    np.testing.assert_array_equal(section.counts(["TBCE"])[:, 0], of["G000"] + of["G001"])


def test_a_gene_table_names_the_genes(tmp_path):
    counts, _ = fake.write_section(tmp_path, 3)
    table = tmp_path / "genes.csv"
    pd.DataFrame({"id": fake.gene_ids(counts.columns), "symbol": [f"S{g}" for g in counts.columns]}).to_csv(
        table, index=False
    )
    assert list(read_visium(tmp_path, gene_table=table)[0].genes[:2]) == ["SG000", "SG001"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_visium(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no folder spatial"):
        read_visium(tmp_path)
    fake.write_section(tmp_path, 2)
    (tmp_path / "spatial" / "tissue_positions.csv").unlink()
    with pytest.raises(InputError, match=r"has none of tissue_positions.parquet"):
        read_visium(tmp_path)
    (tmp_path / "filtered_feature_bc_matrix.h5").unlink()
    with pytest.raises(InputError, match=r"has no filtered_feature_bc_matrix.h5"):
        read_visium(tmp_path)


@pytest.mark.data
def test_the_mouse_colon(real_data):
    (section,) = read_visium(real_data / "visium_mouse_colon")
    assert (section.name, len(section), len(section.genes)) == ("visium_mouse_colon", 2604, 4338)
    assert section.slide.path.name == "image.tif" and section.slide.size == (7936, 8192)
    assert section.um_per_px == pytest.approx(0.97, abs=0.005)
    # rows of the matrix and of the positions are in other orders: values by barcode, straight from the files
    with h5py.File(real_data / "visium_mouse_colon" / "filtered_feature_bc_matrix.h5") as file:
        matrix = {key: file["matrix"][key][:] for key in ("data", "indices", "indptr", "barcodes")}
        symbols = [name.decode() for name in file["matrix/features/name"][:]]
    with open(real_data / "visium_mouse_colon" / "spatial" / "tissue_positions.csv") as file:
        place = {line.split(",")[0]: line.strip().split(",")[2:] for line in file}
    genes = ["Myh11", "Cd74"]
    found = section.counts(genes)
    assert (found.sum(axis=0) > 1000).all()
    for i in range(0, 2604, 100):
        barcode = matrix["barcodes"][i].decode()
        entries = slice(matrix["indptr"][i], matrix["indptr"][i + 1])
        of = dict(zip(matrix["indices"][entries], matrix["data"][entries], strict=True))
        at = section.spots.obs_names.get_loc(barcode)
        assert list(found[at]) == [of.get(symbols.index(gene), 0) for gene in genes]
        row, column, y, x = (float(value) for value in place[barcode])
        assert tuple(section.array_xy[at]) == (column, row) and tuple(section.xy_px[at]) == (x, y)
