"""The sample-sheet reader: what it reads, and what it says when something does not fit."""

import gzip

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stexp import InputError
from stexp.data.readers import samplesheet

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
        samplesheet.read(folder / "sheet.csv")
    assert "\n" not in str(caught.value)


def test_reads_image_counts_and_positions(folder):
    (section,) = samplesheet.read(str(folder / "sheet.csv"))
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
    (section,) = samplesheet.read(folder / "sheet.csv")
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
    (section,) = samplesheet.read(folder / "sheet.csv")
    np.testing.assert_array_equal(section.counts(["ACTB", "CD3E"]), table)
    assert list(section.spots.obs_names) == list(table.index)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("um_per_px", "mpp", "lacks um_per_px; it needs the columns section, patient"),
        ("S1,P1", "S1,", "sheet.csv line 2: column patient is empty; only image and um_per_px may be"),
        ("s1.png", "gone.png", r"sheet.csv line 2: column image: .*gone.png does not exist; paths are relative to /"),
        ("s1.tsv", "s1.xlsx", "line 2: column counts: .*s1.xlsx does not exist"),
        ("s1.tsv", "s1.png", "line 2: counts .*s1.png ends in .png; .csv, .tsv, .csv.gz, .tsv.gz, .h5ad would fit"),
        (",0.5", ",half", "line 2: column um_per_px: 'half' is not a size; a number above 0"),
        (",0.5", ",-1", "line 2: column um_per_px: '-1' is not a size"),
        ("S1,P1,s1.png,s1.tsv,s1.csv,0.5\n", "", "lists no section"),
        ("0.5\n", "0.5\nS1,P2,,s1.tsv,s1.csv,\n", "lists S1 more than once"),
        (SHEET, "", "cannot be read as a table: No columns"),
    ],
)
def test_a_sheet_that_does_not_fit_is_refused(folder, old, new, message):
    (folder / "sheet.csv").write_text(SHEET.replace(old, new))
    refused(folder, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("CD3E", "ACTB", "line 2: section S1: 1 duplicate genes .ACTB."),
        ("1x2", "007", "line 2: section S1: 1 spot ids occur twice in the counts .007."),
        ("\t5", "\tfive", "line 2: counts .*s1.tsv: 1 gene columns hold text .first: CD3E."),
        ("\t5", "\t", "line 2: section S1: 1 counts are NaN"),
        ("\t5", "\t0.5", "line 2: section S1: 1 counts are fractional"),
        ("\t5", "\t-5", "line 2: section S1: 1 counts are negative"),
        ("\t5", "\t5\t5\t5", "line 2: counts .*s1.tsv cannot be read as a table: .*line 3"),
        (COUNTS, "\t007\tNA\nACTB\t1\t2\n", "line 2: column counts: .*s1.tsv has spots as columns; transpose it"),
        (COUNTS, "\tACTB\nAAAC-1\t1\n", "no spot id in common: 1 ids like AAAC-1"),
    ],
)
def test_counts_that_do_not_fit_are_refused(folder, old, new, message):
    (folder / "s1.tsv").write_text(COUNTS.replace(old, new))
    refused(folder, message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("array_y,pixel_x", "row,x", "line 2: spots .*s1.csv lacks array_y, pixel_x; it needs the spot id first"),
        ("30.5", "right", "1 rows hold a position that is not a number .first: 1x2."),
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
    refused(folder, "cut.tsv.gz cannot be read as a table")
    (folder / "broken.h5ad").write_bytes(b"not hdf5")
    (folder / "sheet.csv").write_text(SHEET.replace("s1.tsv", "broken.h5ad"))
    refused(folder, "broken.h5ad cannot be read as h5ad")
    (folder / "s1.png").write_text("not an image")
    (folder / "sheet.csv").write_text(SHEET)
    refused(folder, "not an image")


def test_a_sheet_that_is_missing_is_refused(folder):
    with pytest.raises(InputError, match="does not exist; write one with the columns section, patient"):
        samplesheet.read(folder / "other.csv")


def test_ids_that_are_all_numbers_stay_text(folder):
    (folder / "s1.tsv").write_text("\tACTB\tCD3E\n007\t3\t0\n8\t0\t5\n")
    (folder / "s1.csv").write_text("spot,array_x,array_y,pixel_x,pixel_y\n8,1,2,30.5,10\n007,0,0,10,12\n")
    (section,) = samplesheet.read(folder / "sheet.csv")
    assert list(section.spots.obs_names) == ["007", "8"]
    np.testing.assert_array_equal(section.xy_px, [[10, 12], [30.5, 10]])


@pytest.mark.parametrize(("mode", "message"), [("I;16", "8 bits a channel"), ("F", "8 bits a channel")])
def test_images_of_more_than_eight_bits_are_refused(folder, mode, message):
    Image.new(mode, (40, 20)).save(folder / "s1.tif")
    (folder / "sheet.csv").write_text(SHEET.replace("s1.png", "s1.tif"))
    refused(folder, message)


def test_what_is_transparent_is_glass(folder):
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(folder / "s1.png")
    (section,) = samplesheet.read(folder / "sheet.csv")
    assert (section.slide.read() == 255).all()
