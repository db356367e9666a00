from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stexp.data.readers.count_tables import parse_any, parse_digits
from stexp.data.readers.formats import read_counts
from stexp.data.readers.her2st import read_her2st
from stexp.errors import InputError

GENES = ["FO538757.1", "ERBB2", "CD74", "COL1A1"]
PIXELS = 30.0


def write_section(root: Path, name: str, image: str | None = None, labels: bool = False, seed: int = 0) -> pd.DataFrame:
    """One section as the source lays it out; returns its counts."""
    rng = np.random.default_rng(seed)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(4, 9), np.arange(10, 14)))
    new_x, new_y = x + rng.uniform(-0.1, 0.1, 20).round(3), y + rng.uniform(-0.1, 0.1, 20).round(3)
    selection = pd.DataFrame(
        {
            "x": x,
            "y": y,
            "new_x": new_x,
            "new_y": new_y,
            "pixel_x": PIXELS * new_x,
            "pixel_y": PIXELS * new_y - 100,
            "selected": 1,
        }
    )
    ids = [f"{i}x{j}" for i, j in zip(x, y, strict=True)]
    counts = pd.DataFrame(rng.poisson(3.0, (20, 4)) * rng.choice([1, 7, 100, 1234], (20, 4)), index=ids, columns=GENES)
    counts = counts.sample(frac=1, random_state=1).iloc[:-1]  # another order, and one spot without counts
    for folder in ("ST-cnts", "ST-spotfiles"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with gzip.open(root / "ST-cnts" / f"{name}.tsv.gz", "wt") as file:
        counts.to_csv(file, sep="\t")
    selection.to_csv(root / "ST-spotfiles" / f"{name}_selection.tsv", sep="\t", index=False)
    if image:
        path = root / "ST-imgs" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 320), (230, 200, 220)).save(path)
    if labels:
        (root / "ST-pat" / "lbl").mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame(
            {
                "Row.names": "7x7",
                "x": new_x,
                "y": new_y,
                "pixel_x": new_x * 13,
                "pixel_y": 999 - new_y * 13,
                "label": [f"type {spot}" for spot in ids],
            }
        )
        table.loc[len(table)] = ["1379x6121", np.nan, np.nan, np.nan, np.nan, "immune infiltrate"]
        table.iloc[1:].to_csv(root / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv", sep="\t", index=False)
    return counts


def test_sections_are_read_as_laid_out(tmp_path):
    write_section(tmp_path, "C2", image="C/C2/5714_HE.jpg", seed=1)
    counts = write_section(tmp_path, "B1", labels=True)
    b1, c2 = read_her2st(tmp_path)
    assert (b1.name, b1.patient, b1.slide) == ("B1", "B", None)
    assert (c2.name, c2.patient, c2.slide.path.name, c2.slide.size) == ("C2", "C", "5714_HE.jpg", (300, 320))
    assert list(b1.spots.obs_names) == list(counts.index) and list(b1.genes) == GENES
    assert b1.spots.X.format == "csr" and b1.spots.X.dtype == np.float32
    np.testing.assert_array_equal(b1.spots.X.toarray(), counts.to_numpy())
    assert [f"{x}x{y}" for x, y in b1.array_xy] == list(counts.index)
    assert np.abs(b1.xy_px - (b1.array_xy * PIXELS - (0, 100))).max() < 0.11 * PIXELS
    assert b1.um_per_px == pytest.approx(200 / PIXELS)
    assert [path.name for path in b1.files] == ["B1.tsv.gz", "B1_selection.tsv", "B1_labeled_coordinates.tsv"]
    assert "5714_HE.jpg" in [path.name for path in c2.files]


def test_labels_join_by_rounded_corrected_coordinates(tmp_path):
    write_section(tmp_path, "B1", labels=True)
    labels = read_her2st(tmp_path)[0].spots.obs["label"]
    assert labels.isna().sum() == 1 and labels.index[labels.isna()] == ["4x10"]  # the row left out
    assert (labels.dropna() == "type " + labels.dropna().index).all()


@pytest.mark.parametrize("image", ["B/B1/x.jpg", "B1/x.png", "B/B1.jpg", "B1.tif"])
def test_images_nested_or_direct(tmp_path, image):
    write_section(tmp_path, "B1", image=image)
    (tmp_path / "ST-imgs" / "._B1.jpg").write_bytes(b"finder")
    assert read_her2st(tmp_path)[0].slide.path == tmp_path / "ST-imgs" / image


def test_two_images_are_one_too_many(tmp_path):
    write_section(tmp_path, "B1", image="B/B1/x.jpg")
    write_section(tmp_path, "B1", image="B/B1/y.jpg")
    with pytest.raises(InputError, match=r"section B1: 2 images \(x.jpg, y.jpg\)"):
        read_her2st(tmp_path)


def test_plain_counts_in_a_clone_of_the_repository(tmp_path):
    counts = write_section(tmp_path / "data", "B1")
    packed = tmp_path / "data" / "ST-cnts" / "B1.tsv.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    np.testing.assert_array_equal(read_her2st(tmp_path)[0].spots.X.toarray(), counts.to_numpy())


def test_only_the_sections_asked_for_are_opened(tmp_path):
    write_section(tmp_path, "B1")
    write_section(tmp_path, "B2")
    (tmp_path / "ST-cnts" / "B2.tsv.gz").write_bytes(b"\x1f\x8bnot gzip")
    assert [section.name for section in read_her2st(tmp_path, ["B1"])] == ["B1"]
    with pytest.raises(InputError, match=r"B2.tsv.gz cannot be read"):
        read_her2st(tmp_path)


def test_unknown_section_or_folder(tmp_path):
    write_section(tmp_path, "B1")
    with pytest.raises(InputError, match=r"no section Z9 in .*; there are B1"):
        read_her2st(tmp_path, ["B1", "Z9"])
    with pytest.raises(InputError, match=r"need the folders ST-cnts and ST-spotfiles.*data.root=, or set STEXP_DATA"):
        read_her2st(tmp_path / "elsewhere")
    (tmp_path / "ST-spotfiles" / "B1_selection.tsv").unlink()
    with pytest.raises(InputError, match=r"B1_selection.tsv does not exist"):
        read_her2st(tmp_path)


@pytest.mark.parametrize("place", ["", "her2st", "her2st/data", "her2st/data/ST-cnts", "her2st/data/ST-cnts/B1.tsv.gz"])
def test_any_natural_place_of_the_data_is_understood(tmp_path, place):
    write_section(tmp_path / "her2st" / "data", "B1")
    assert [section.name for section in read_her2st(tmp_path / place)] == ["B1"]


def test_flags_that_are_neither_0_nor_1_are_refused_and_spots_not_selected_left_out(tmp_path):
    counts = write_section(tmp_path, "B1")
    file = tmp_path / "ST-spotfiles" / "B1_selection.tsv"
    table = pd.read_csv(file, sep="\t")
    table.assign(selected=np.where(table.index == 3, 0, 1)).to_csv(file, sep="\t", index=False)
    left_out = "{x:.0f}x{y:.0f}".format(**table.iloc[3])
    assert list(read_her2st(tmp_path)[0].spots.obs_names) == [name for name in counts.index if name != left_out]
    for value in ("2", "yes", "", "0.5"):
        table.assign(selected=[value, *["1"] * 19]).to_csv(file, sep="\t", index=False)
        with pytest.raises(InputError, match=r"selected of 1 spots is neither 0 nor 1 .first: spot 4x10"):
            read_her2st(tmp_path)


def test_spot_file_that_is_another_table(tmp_path):
    write_section(tmp_path, "B1")
    (tmp_path / "ST-spotfiles" / "B1_selection.tsv").write_text("x\ty\n1\t2\n")
    with pytest.raises(InputError, match="lacks pixel_x, pixel_y; it needs"):
        read_her2st(tmp_path)


def keep_two_spots(root: Path) -> None:
    """Cut the spot file to the spots of `ROWS`."""
    file = root / "ST-spotfiles" / "B1_selection.tsv"
    table = pd.read_csv(file, sep="\t")
    table[(table["y"] == 10) & table["x"].isin([4, 5])].to_csv(file, sep="\t", index=False)


HEADER = "\t" + "\t".join(GENES) + "\n"
ROWS = "4x10\t0\t12\t3\t1000000\n5x10\t00\t0\t07\t9999999\n"


def test_digits_are_read_as_pandas_reads_them():
    fast_ids, fast = parse_digits(ROWS.encode(), 4)
    slow_ids, slow = parse_any(ROWS.encode(), GENES, Path("x"))
    assert fast_ids == slow_ids == ["4x10", "5x10"]
    assert fast.toarray().tolist() == slow.toarray().tolist() == [[0, 12, 3, 1e6], [0, 0, 7, 9999999]]
    assert fast.nnz == 5


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        ROWS.rstrip("\n"),
        ROWS + "\n",
        ROWS.replace("\n", "\r\n"),
        ROWS.replace("12", "12.0"),
        ROWS.replace("1000000", "1e6"),
    ],
)
def test_ways_to_write_the_same_counts(tmp_path, rows):
    path = tmp_path / "c.tsv"
    path.write_bytes((HEADER.replace("\n", "\r\n") if "\r" in rows else HEADER).encode() + rows.encode())
    counts = read_counts(path)
    assert counts.X.toarray().tolist() == [[0, 12, 3, 1e6], [0, 0, 7, 9999999]]
    assert list(counts.var_names) == GENES


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("4x10\t0", "4x10\t0.5", "hold fractions amid counts"),
        ("4x10\t0", "4x10\t-1", "1 counts are negative"),
        ("4x10\t0", "4x10\tNaN", "1 counts are NaN"),
        ("4x10\t0", "4x10\t", "1 counts are NaN"),
        ("4x10\t0", "4x10\tmany", "not a table of numbers"),
        ("4x10\t0\t12", "4x10\t12", "5 names in the header .*, 4 cells in the row"),
        ("5x10\t00\t0", "5x10\t00", "1 counts are NaN"),
        ("5x10\t00", "5x10\t00\t1", "not a table of numbers: .*line 2"),
        ("4x10\t0", "\n4x10\t0\t0", "5 names in the header .*, 6 cells in the row|not a table of numbers"),
        ("5x10", "4x10", "1 spot ids occur twice in the counts"),
    ],
)
def test_malformed_counts_end_in_one_line(tmp_path, before, after, message):
    write_section(tmp_path, "B1")
    keep_two_spots(tmp_path)
    (tmp_path / "ST-cnts" / "B1.tsv.gz").unlink()
    (tmp_path / "ST-cnts" / "B1.tsv").write_bytes((HEADER + ROWS).replace(before, after, 1).encode())
    with pytest.raises(InputError, match=message) as error:
        read_her2st(tmp_path)
    assert "\n" not in str(error.value).strip()


def test_duplicate_genes_are_refused(tmp_path):
    write_section(tmp_path, "B1")
    keep_two_spots(tmp_path)
    (tmp_path / "ST-cnts" / "B1.tsv.gz").write_bytes((HEADER.replace("CD74", "ERBB2") + ROWS).encode())
    with pytest.raises(InputError, match="1 duplicate genes"):
        read_her2st(tmp_path)


@pytest.mark.parametrize("content", [b"", HEADER.encode(), b"\n\n"])
def test_empty_counts(tmp_path, content):
    path = tmp_path / "c.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match="are empty"):
        read_counts(path)


@pytest.mark.parametrize("content", [b"\tCD74\ncaf\x81\t2\n", b"\tCD74\n1x\x00\xff\t2\n"])
def test_counts_that_are_not_text(tmp_path, content):
    path = tmp_path / "c.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match="are not text"):
        read_counts(path)


def test_truncated_counts(tmp_path):
    write_section(tmp_path, "B1")
    path = tmp_path / "ST-cnts" / "B1.tsv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read"):
        read_counts(path)


@pytest.mark.data
def test_real_sections():
    b4, e1 = read_her2st(Path(os.environ["STEXP_DATA"]) / "her2st", ["E1", "B4"])
    assert (len(b4), len(b4.genes), len(e1), len(e1.genes)) == (283, 15_289, 587, 15_701)
    assert (np.median(b4.total_counts), np.median(e1.total_counts)) == (648, 1962)
    assert (round(b4.um_per_px, 3), round(e1.um_per_px, 3)) == (0.688, 0.686)
    assert b4.slide is not None and e1.slide is None and "label" not in b4.spots.obs
    assert e1.spots.obs["label"].value_counts().to_dict() == {
        "invasive cancer": 340,
        "immune infiltrate": 177,
        "undetermined": 53,
        "connective tissue": 17,
    }
