"""The sample-sheet reader: what it reads, and what it says when something does not fit."""

from __future__ import annotations

import gzip
import logging

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from PIL import Image

from stexp.data.readers import samplesheet
from stexp.data.readers.formats import read_counts
from stexp.errors import InputError

SHEET = "section,patient,image,counts,spots,um_per_px\nS1,P1,s1.png,s1.tsv,s1.csv,0.5\n"
COUNTS = "\tACTB\tCD3E\n007\t3\t0\nNA\t0\t5\n1x2\t1\t1\n"
SPOTS = "spot,array_x,array_y,pixel_x,pixel_y\n1x2,1,2,30.5,10\n007,0,0,10,12\nNA,1,0,30,12\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sheet.csv").write_text(SHEET)
    (tmp_path / "s1.tsv").write_text(COUNTS)
    (tmp_path / "s1.csv").write_text(SPOTS)
    Image.new("RGB", (40, 20), "white").save(tmp_path / "s1.png")
    return tmp_path


def refused(folder, match):
    with pytest.raises(InputError, match=match) as caught:
        samplesheet.read_samplesheet(folder / "sheet.csv")
    assert "\n" not in str(caught.value)


def test_reads_image_counts_and_positions(folder):
    (section,) = samplesheet.read_samplesheet(str(folder / "sheet.csv"))
    assert (section.name, section.patient, section.um_per_px) == ("S1", "P1", 0.5)
    assert list(section.spots.obs_names) == ["007", "NA", "1x2"]  # ids stay text, in the order of the counts
    assert list(section.genes) == ["ACTB", "CD3E"]
    np.testing.assert_array_equal(section.counts(["CD3E", "ACTB"]), [[0, 3], [5, 0], [1, 1]])
    np.testing.assert_array_equal(section.xy_px, [[10, 12], [30, 12], [30.5, 10]])
    np.testing.assert_array_equal(section.array_xy, [[0, 0], [1, 0], [1, 2]])
    assert section.slide.size == (40, 20)
    assert section.files == (folder / "s1.png", folder / "s1.tsv", folder / "s1.csv")


def test_image_and_scale_may_be_empty_and_other_columns_and_lines_do_not_matter(folder):
    (folder / "sheet.csv").write_text(
        "\ufeffpatient,section,image,counts,spots,um_per_px,notes\n\nP1, S1,,s1.tsv,s1.csv,,frozen\n,,,,,,\n", "utf-8"
    )
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert (section.name, section.slide, section.um_per_px) == ("S1", None, None)
    assert section.files == (folder / "s1.tsv", folder / "s1.csv")


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv.gz", "h5ad", "write.table"])
def test_counts_of_every_kind_are_the_same(folder, kind):
    table = pd.DataFrame([[3, 0], [0, 5], [1, 1]], index=["007", "NA", "1x2"], columns=["ACTB", "CD3E"])
    name = "counts.tsv" if kind == "write.table" else f"counts.{kind}"
    if kind == "h5ad":
        ad.AnnData(table, layers={"scaled": table.to_numpy() / 7}).write_h5ad(folder / name)
    elif kind == "write.table":  # of R: no name above the row names
        (folder / name).write_text(COUNTS[1:])
    else:
        table.to_csv(folder / name, sep="," if "csv" in kind else "\t")
    (folder / "sheet.csv").write_text(SHEET.replace("s1.tsv", name))
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    np.testing.assert_array_equal(section.counts(["ACTB", "CD3E"]), table)
    assert list(section.spots.obs_names) == list(table.index)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("patient", "donor", "lacks patient; it needs the columns section, patient, .*, and has section, donor, image"),
        ("patient", "section", "has more than one column section"),
        ("0.5\n", "0.5,frozen\n", "cannot be read as a table: .*line 2"),
        ("um_per_px\n", "um_per_px,\n", None),
        ("S1,P1", "S1,", "sheet.csv line 2: column patient is empty; only image and um_per_px may be"),
        ("s1.png", "gone.png", r"sheet.csv line 2: column image: .*gone.png does not exist; paths are relative to /"),
        ("s1.tsv", "s1.xlsx", "line 2: column counts: .*s1.xlsx does not exist"),
        (
            "s1.tsv",
            "s1.png",
            "line 2: column counts: counts .*s1.png ends in .png; .csv, .tsv, .csv.gz, .tsv.gz, .h5ad, .h5, a folder",
        ),
        (",0.5", ",half", "line 2: column um_per_px: 'half' is not a size; a number above 0"),
        (",0.5", ",-1", "line 2: column um_per_px: '-1' is not a size"),
        ("S1,P1,s1.png,s1.tsv,s1.csv,0.5\n", "", "lists no section"),
        ("0.5\n", "0.5\nS1,P2,,s1.tsv,s1.csv,\n", "lists S1 more than once"),
        (SHEET, "", "cannot be read as a table: No columns"),
    ],
)
def test_a_sheet_that_does_not_fit_is_refused(folder, old, new, message):
    (folder / "sheet.csv").write_text(SHEET.replace(old, new))
    if message is None:
        assert samplesheet.read_samplesheet(folder / "sheet.csv")[0].spots.uns["metadata"] == {}
    else:
        refused(folder, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("CD3E", "ACTB", "line 2: section S1: 1 duplicate genes .ACTB."),
        ("1x2", "007", "line 2: section S1: 1 spot ids occur twice in the counts .007."),
        (
            "\t5",
            "\tfive",
            "line 2: column counts: counts .*s1.tsv are not a table of numbers: 1 columns hold text "
            ".first: 'five' in the row NA, column CD3E.",
        ),
        ("\t5", "\t", "line 2: section S1: 1 counts are NaN"),
        ("\t5", "\t0.5", "line 2: section S1: 1 counts are fractional"),
        ("\t5", "\t-5", "line 2: section S1: 1 counts are negative"),
        (
            "\t5",
            "\t5\t5\t5",
            "line 2: column counts: counts .*s1.tsv are not a table of numbers: .*line 2.*not counting",
        ),
        (
            COUNTS,
            "\tACTB\nAAAC-1\t1\n",
            r"s1.tsv: 0 of 1 rows \(first: AAAC-1\) and 0 of 1 columns \(first: ACTB\) are named like one of the 3 "
            r"spots that have a position \(first: 1x2\); either the rows or the columns must be spots",
        ),
        (COUNTS, "\t007\tCD3E\nNA\t3\t0\n1x2\t1\t2\n", r"2 of 2 rows .* and 1 of 2 columns \(first: 007\)"),
        (COUNTS, "", "column counts: counts .*s1.tsv are empty"),
    ],
)
def test_counts_that_do_not_fit_are_refused(folder, old, new, message):
    (folder / "s1.tsv").write_text(COUNTS.replace(old, new))
    refused(folder, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "array_y,pixel_x",
            "row,left",
            "line 2: column spots: spots .*s1.csv lacks array_y, pixel_x; it needs the spot id first, then array_x, "
            "array_y, pixel_x, pixel_y; x, y, pixel_x, pixel_y; or the columns of SpaceRanger",
        ),
        ("array_x,array_y", "x,row", "column spots: spots .*s1.csv lacks y; "),
        ("30.5", "right", "1 rows hold a position that is not a number .first: spot 1x2, pixel_x 'right'."),
        ("spot,array_x", "array_x,spot", "starts with the column array_x; the spot id must come first"),
        ("pixel_x,pixel_y", "pixel_x,pixel_x", "more than one column pixel_x"),
        ("30.5,10", "10,30.5", "line 2: section S1: 1 of 3 spots lie outside the image"),
        ("1x2,1,", "1x2,0.5,", "array coordinates must be whole numbers"),
    ],
)
def test_positions_that_do_not_fit_are_refused(folder, old, new, message):
    (folder / "s1.csv").write_text(SPOTS.replace(old, new))
    refused(folder, message)


def test_damaged_files_are_refused(folder):
    with gzip.open(folder / "cut.tsv.gz", "wt") as file:
        file.write(COUNTS * 50)
    whole = (folder / "cut.tsv.gz").read_bytes()
    (folder / "cut.tsv.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "sheet.csv").write_text(SHEET.replace("s1.tsv", "cut.tsv.gz"))
    refused(folder, "column counts: counts .*cut.tsv.gz cannot be read .*; fetch the file again")
    (folder / "broken.h5ad").write_bytes(b"not hdf5")
    (folder / "sheet.csv").write_text(SHEET.replace("s1.tsv", "broken.h5ad"))
    refused(folder, "broken.h5ad cannot be read as h5ad")
    (folder / "s1.png").write_text("not an image")
    (folder / "sheet.csv").write_text(SHEET)
    refused(folder, "line 2: column image: image .*not an image")


def test_a_sheet_that_is_missing_is_refused(folder):
    with pytest.raises(InputError, match="does not exist; write one with the columns section, patient"):
        samplesheet.read_samplesheet(folder / "other.csv")


def test_ids_that_are_all_numbers_stay_text(folder):
    (folder / "s1.tsv").write_text("\tACTB\tCD3E\n007\t3\t0\n8\t0\t5\n")
    (folder / "s1.csv").write_text("spot,array_x,array_y,pixel_x,pixel_y\n8,1,2,30.5,10\n007,0,0,10,12\n")
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert list(section.spots.obs_names) == ["007", "8"]
    np.testing.assert_array_equal(section.xy_px, [[10, 12], [30.5, 10]])


@pytest.mark.parametrize(("mode", "message"), [("I;16", "8 bits a channel"), ("F", "8 bits a channel")])
def test_images_of_more_than_eight_bits_are_refused(folder, mode, message):
    Image.new(mode, (40, 20)).save(folder / "s1.tif")
    (folder / "sheet.csv").write_text(SHEET.replace("s1.png", "s1.tif"))
    refused(folder, message)


def test_what_is_transparent_is_glass(folder):
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(folder / "s1.png")
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert (section.slide.read() == 255).all()


def test_columns_that_may_be_left_out_and_columns_that_are_kept(folder, caplog):
    (folder / "sheet.csv").write_text(
        "stage,section,patient,counts,spots,age\nII,S1,P1,s1.tsv,s1.csv,047\n,S2,P1,s1.tsv,s1.csv,\n"
    )
    one, two = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert (one.slide, one.um_per_px, two.slide) == (None, None, None)
    assert one.spots.uns["metadata"] == {"stage": "II", "age": "047"}
    assert two.spots.uns["metadata"] == {"stage": "", "age": ""}
    assert "has no column image, um_per_px; none of its sections has one" in caplog.text


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("quoted", [False, True])
def test_genes_in_rows_are_found_and_said(folder, caplog, separator, quoted):
    caplog.set_level(logging.INFO)
    (plain,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert "s1.tsv: spots are rows, 3 of 3 with a position" in caplog.text
    table = pd.DataFrame(plain.counts(["ACTB", "CD3E"]), plain.spots.obs_names, ["ACTB", "CD3E"]).astype(int).T
    name = "turned.csv" if separator == "," else "turned.tsv"
    table.to_csv(folder / name, sep=separator, quoting=2 if quoted else 0)
    (folder / "sheet.csv").write_text(SHEET.replace("s1.tsv", name))
    (turned,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert "spots are columns, 3 of 3 with a position" in caplog.text
    assert (turned.spots.X != plain.spots.X).nnz == 0 and turned.spots.X.format == "csr"
    assert list(turned.spots.obs_names) == list(plain.spots.obs_names) and list(turned.genes) == list(plain.genes)


def test_counts_of_10x(folder):
    matrix = folder / "filtered_feature_bc_matrix"
    matrix.mkdir()
    scipy.io.mmwrite(matrix / "matrix.mtx", sp.coo_matrix([[3, 0, 1], [0, 5, 1]]))
    (matrix / "features.tsv").write_text("ENSG1\tACTB\tGene Expression\nENSG2\tCD3E\tGene Expression\n")
    (matrix / "barcodes.tsv").write_text("007\nNA\n1x2\n")
    (folder / "sheet.csv").write_text(SHEET.replace("s1.tsv", matrix.name))
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    np.testing.assert_array_equal(section.counts(["ACTB", "CD3E"]), [[3, 0], [0, 5], [1, 1]])
    assert [file.name for file in section.files[1:4]] == ["matrix.mtx", "features.tsv", "barcodes.tsv"]
    (matrix / "barcodes.tsv").unlink()
    refused(folder, "line 2: column counts: .*has no barcodes.tsv")


def test_normalised_values_in_h5ad_name_the_raw_counts_beside_them(folder):
    counts = pd.DataFrame([[3, 0], [0, 5], [1, 1]], ["007", "NA", "1x2"], ["ACTB", "CD3E"])
    ad.AnnData(np.log1p(counts), layers={"counts": counts.to_numpy()}).write_h5ad(folder / "c.h5ad")
    (folder / "sheet.csv").write_text(SHEET.replace("s1.tsv", "c.h5ad"))
    refused(
        folder, r"fractional .normalised.*; raw counts are needed in X; if layers\['counts'\] holds them, save it as X"
    )


SELECTION = "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"
ROWS = "1\t2\t1.02\t2.01\t30.5\t10\t1\n0\t0\t0.01\t0\t10\t12\t1\n1\t0\t1\t0\t30\t12\t0\n"


@pytest.mark.parametrize("named", [False, True])
def test_spot_files_of_spatial_transcriptomics(folder, caplog, named):
    caplog.set_level(logging.INFO)
    text = SELECTION + ROWS
    ids = ["spot", "A", "B", "C"] if named else []
    if named:
        text = "\n".join(f"{name}\t{line}" for name, line in zip(ids, text.splitlines(), strict=True))
    (folder / "s1.tsv").write_text(
        COUNTS.replace("007", "B" if named else "0x0").replace("1x2", "A" if named else "1x2")
    )
    (folder / "selection.tsv").write_text(text)
    (folder / "sheet.csv").write_text(SHEET.replace("s1.csv", "selection.tsv"))
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert list(section.spots.obs_names) == (["B", "A"] if named else ["0x0", "1x2"])
    np.testing.assert_array_equal(section.array_xy, [[0, 0], [1, 2]])
    np.testing.assert_array_equal(section.xy_px, [[10, 12], [30.5, 10]])
    assert "selection.tsv: 1 of 3 are not on tissue and left out" in caplog.text


@pytest.mark.parametrize("header", [False, True])
def test_positions_of_spaceranger(folder, header):
    lines = "007,1,0,4,12,10\nNA,1,0,6,12,30\n1x2,0,1,5,10,31\n"  # row before column, y before x
    text = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n" + lines if header else lines
    (folder / "tissue_positions.csv").write_text(text)
    (folder / "sheet.csv").write_text(SHEET.replace("s1.csv", "tissue_positions.csv"))
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert list(section.spots.obs_names) == ["007", "NA"]
    np.testing.assert_array_equal(section.array_xy, [[4, 0], [6, 0]])
    np.testing.assert_array_equal(section.xy_px, [[10, 12], [30, 12]])


def test_ids_become_symbols_by_a_table(folder):
    (folder / "s1.tsv").write_text(COUNTS.replace("ACTB", "ENSG00000075624.17").replace("CD3E", "ENSG00000198851"))
    (folder / "genes.tsv").write_text("symbol\tid\nACTB\tENSG00000075624\nCD3E\tENSG00000198851\n")
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv", gene_table=folder / "genes.tsv")
    assert list(section.genes) == ["ACTB", "CD3E"] and section.spots.uns["gene_names"]["matched"] == 2
    assert list(samplesheet.read_samplesheet(folder / "sheet.csv")[0].genes) == ["ENSG00000075624", "ENSG00000198851"]


def test_two_species_in_a_section_are_refused_with_line_and_column(folder):
    (folder / "s1.tsv").write_text(COUNTS.replace("ACTB", "ENSG00000075624").replace("CD3E", "ENSMUSG00000032093"))
    refused(folder, "line 2: column counts: section S1: gene ids of 2 species")


@pytest.mark.parametrize(("column", "meant"), [("img", "image"), ("MPP", "um_per_px")])
def test_a_column_that_means_an_optional_one_is_not_metadata(tmp_path, column, meant):
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"section,patient,counts,spots,{column}\nS1,P1,c.csv,s.csv,x\n")
    with pytest.raises(InputError, match=f"has a column {column}, but none called {meant}; rename it"):
        samplesheet.read_samplesheet(sheet)


def test_indices_that_point_outside_are_refused(tmp_path):
    path = tmp_path / "c.h5ad"
    ad.AnnData(sp.csr_matrix(np.eye(6, dtype=np.float32))).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][3] = 10**6
    with pytest.raises(InputError, match="cannot be read as h5ad"):
        read_counts(path)


def test_the_sheet_is_found_where_a_user_points(folder):
    for place in (folder, folder / "sheet.csv", folder / "sheet.csv" / "sheet.csv"):  # the last: data.root=sheet.csv
        assert [section.name for section in samplesheet.read_samplesheet(place)] == ["S1"]
    (folder / "sheet.csv").rename(folder / "mine.csv")
    with pytest.raises(InputError, match=r"in .* there are mine\.csv"):
        samplesheet.read_samplesheet(folder)


def test_a_sheet_of_a_spreadsheet_in_europe(folder, caplog):
    (folder / "sheet.csv").write_bytes(SHEET.replace(",", ";").replace("0.5", "0,5").encode("utf-16"))
    (section,) = samplesheet.read_samplesheet(folder / "sheet.csv")
    assert section.um_per_px == 0.5 and "semicolons" in caplog.text and "decimal commas" in caplog.text


def test_empty_lines_above_the_header_count_as_lines(folder):
    (folder / "sheet.csv").write_text("\n,,,,,\n" + SHEET)
    assert len(samplesheet.read_samplesheet(folder / "sheet.csv")) == 1
    (folder / "s1.tsv").unlink()
    refused(folder, "line 4: column counts")


def test_tildes_in_a_sheet_are_the_home_folder(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "sheet.csv").write_text(SHEET.replace("s1.", "~/s1."))
    assert len(samplesheet.read_samplesheet(elsewhere / "sheet.csv")[0]) == 3


def test_sections_with_the_counts_of_the_same_spots_are_named(folder, caplog):
    (folder / "sheet.csv").write_text(SHEET + "S2,P2,,s1.tsv,s1.csv,\n")
    samplesheet.read_samplesheet(folder / "sheet.csv")
    assert "sections S1 and S2 have the counts of the same 3 spots" in caplog.text


@pytest.mark.parametrize("stated", ["", "1.0", "4"])
def test_the_array_of_spaceranger_says_the_scale(tmp_path, caplog, stated):
    from fakes import visium

    visium.write_section(tmp_path / "outs", 2)
    image, counts = "outs/image.png", "outs/filtered_feature_bc_matrix.h5"
    row = f"S1,P1,{image},{counts},outs/spatial/tissue_positions.csv,{stated}\n"
    (tmp_path / "sheet.csv").write_text(SHEET.splitlines()[0] + "\n" + row)
    (section,) = samplesheet.read_samplesheet(tmp_path / "sheet.csv")
    assert section.um_per_px == pytest.approx(float(stated or 2.5), rel=1e-3) and len(section) == 34
    said = "um_per_px is empty; 2.5 follows from the array" if not stated else "the array of the positions says 2.5"
    assert said in caplog.text


@pytest.mark.parametrize("value", ["2", "", "maybe", "0.5"])
def test_flags_that_are_not_understood_are_refused(folder, value):
    (folder / "s1.csv").write_text(
        f"spot,array_x,array_y,pixel_x,pixel_y,in_tissue\n1x2,1,2,30.5,10,{value}\n007,0,0,10,12,1\nNA,1,0,30,12,TRUE\n"
    )
    refused(folder, "line 2: column spots: .*in_tissue of 1 spots is neither 0 nor 1 .first: spot 1x2")
    (folder / "s1.csv").write_text((folder / "s1.csv").read_text().replace(f"30.5,10,{value}", "30.5,10,False"))
    assert list(samplesheet.read_samplesheet(folder / "sheet.csv")[0].spots.obs_names) == ["007", "NA"]


@pytest.mark.parametrize(
    ("counts", "spots"),
    [
        ("outs", "outs/spatial"), ("outs/filtered_feature_bc_matrix", "outs/spatial/tissue_positions_list.csv"),
        ("outs/filtered_feature_bc_matrix/matrix.mtx.gz", "outs/spatial"), (".", "outs/spatial"),
    ],
)  # fmt: skip
def test_folders_of_spaceranger_are_what_lies_in_them(tmp_path, counts, spots):
    from fakes import visium

    visium.write_section(tmp_path / "outs", 1)
    header = SHEET.splitlines()[0]
    (tmp_path / "sheet.csv").write_text(f"{header}\nS1,P1,outs/image.png,{counts},{spots},2.5\n")
    (section,) = samplesheet.read_samplesheet(tmp_path / "sheet.csv")
    names = [path.name for path in section.files]
    assert len(section) == 34
    assert names == ["image.png", "matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz", "tissue_positions_list.csv"]


def test_matrices_as_geo_names_them(tmp_path):
    from fakes import visium

    counts = visium.draw_counts(visium.array())
    visium.write_mtx(tmp_path / "m", counts)
    for path in list((tmp_path / "m").iterdir()):
        path.rename(path.with_name(f"GSM1_A_{path.name}"))
    np.testing.assert_array_equal(read_counts(tmp_path / "m").X.toarray(), counts.to_numpy())
    (tmp_path / "m" / "GSM2_B_matrix.mtx.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"2 matrices .GSM1_A_matrix.mtx.gz, GSM2_B_matrix.mtx.gz.; keep one"):
        read_counts(tmp_path / "m")


def test_cells_of_visium_hd_are_spots_and_those_of_xenium_are_sent_to_their_reader(tmp_path):
    from fakes import visium_hd, xenium

    counts, centres = visium_hd.write_cells(tmp_path / "segmented_outputs")
    visium_hd.picture().save(tmp_path / "he.png")
    row = "A,P,he.png,segmented_outputs/filtered_feature_cell_matrix.h5,{},0.5\n"
    sheet = tmp_path / "sheet.csv"
    header = "section,patient,image,counts,spots,um_per_px\n"
    sheet.write_text(header + row.format("segmented_outputs/cell_segmentations.geojson"))
    (section,) = samplesheet.read_samplesheet(sheet)
    np.testing.assert_array_equal(section.counts(counts.columns), counts)
    np.testing.assert_allclose(section.xy_px, centres[: len(counts)])
    xenium.write_section(tmp_path / "X")
    for name in ("cells.parquet", "cells.csv.gz"):
        sheet.write_text(header + row.format(f"X/{name}"))
        with pytest.raises(InputError, match=r"column spots: .* are cells of Xenium in micrometres.*data=xenium"):
            samplesheet.read_samplesheet(sheet)
