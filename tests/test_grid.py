from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from stexp.data.slides.grid import make_grid, read_coordinates
from stexp.data.slides.slide import Slide
from stexp.data.slides.tissue import Tissue
from stexp.errors import InputError


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Slide:
    path = tmp_path_factory.mktemp("slide") / "s.png"
    Image.new("RGB", (900, 600), "white").save(path)
    return Slide(path)


def test_a_hexagonal_grid_is_that_of_visium(slide):
    grid = make_grid(slide, 2.0)
    assert grid.spacing_px == 50 and grid.kind == "hexagonal" and grid.names is None
    distance, _ = cKDTree(grid.xy_px).query(grid.xy_px, k=7)
    x, y = grid.xy_px.T
    inner = (x > 60) & (x < 840) & (y > 60) & (y < 540)
    np.testing.assert_allclose(distance[inner, 1:], 50)  # six neighbours
    column, row = grid.array_xy.T
    assert (column % 2 == row % 2).all() and column.min() == row.min() == 0
    # as in SpaceRanger's table: half a spacing a column, sqrt(3) / 2 of it a row
    np.testing.assert_allclose(x - 25 * column, x[0])
    np.testing.assert_allclose(y - 50 * np.sqrt(3) / 2 * row, y[0])
    assert len(np.unique(grid.array_xy, axis=0)) == len(grid)


def test_a_square_grid_covers_the_image_evenly(slide):
    grid = make_grid(slide, 0.5, "square", 20)
    assert len(grid) == 22 * 15 and grid.spacing_px == 40
    np.testing.assert_allclose(grid.xy_px, [30, 20] + 40.0 * grid.array_xy)
    assert grid.array_xy[:23].tolist() == [*([i, 0] for i in range(22)), [0, 1]]  # row by row


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
@pytest.mark.parametrize("spacing", [7.3, 90.0, 4000.0])
def test_every_place_is_on_the_slide_and_none_is_forgotten(slide, kind, spacing):
    grid = make_grid(slide, 1.0, kind, spacing)
    assert ((grid.xy_px >= 0) & (grid.xy_px < slide.size)).all()
    y, x = np.mgrid[:600:10, :900:10]
    nearest, _ = cKDTree(grid.xy_px).query(np.stack([x.ravel(), y.ravel()], axis=1))
    assert nearest.max() < 1.3 * spacing


def test_a_grid_lies_on_tissue(slide):
    mask = np.zeros((60, 90), dtype=bool)
    mask[20:40, 50:80] = True
    tissue = Tissue(mask, 10.0)
    grid = make_grid(slide, 1.0, "square", 20, tissue)
    assert len(grid) == 15 * 10 and grid.array_xy.min() == 0
    assert grid.xy_px.min(axis=0).tolist() == [510, 210] and grid.xy_px.max(axis=0).tolist() == [790, 390]
    # half on tissue is enough, unless more is asked for
    mask[:, 70:] = False
    mask[20, 75] = True  # the mask still reaches there
    for least, last in ((0.5, 690), (0.0, 750)):
        assert make_grid(slide, 1.0, "square", 20, tissue, least).xy_px[:, 0].max() == last


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "triangular"}, "grid=triangular: choose hexagonal or square, or give coordinates"),
        ({"spacing_um": 0}, "spacing_um=0: a number above 0"),
        ({"um_per_px": float("nan")}, "um_per_px=nan: a number above 0"),
        ({"min_tissue": 1.5}, "min_tissue=1.5: a number from 0 to 1"),
        ({"spacing_um": 0.1}, "9000 x 6928 places where tissue lies, more than 10,000,000; spacing_um=0.25 or more"),
        ({"tissue": Tissue(np.zeros((6, 9), bool), 100.0)}, "no tissue found; if there is some, give its coordinates"),
        ({"tissue": Tissue(np.eye(6, 9, dtype=bool), 100.0), "min_tissue": 1}, "none has a share of 1 of tissue"),
    ],
)
def test_grids_that_cannot_be_are_refused_in_one_line(slide, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        make_grid(slide, **{"um_per_px": 1.0, "spacing_um": 300, **arguments})
    assert "\n" not in str(error.value)


# given coordinates

PLACES = pd.DataFrame(
    {"pixel_x": [10.5, 60.0, 110.0, 35.0], "pixel_y": [20.0, 20.0, 20.0, 63.25]}, index=["a", "NA", "c", "007"]
)
ARRAY = PLACES.assign(array_x=[0, 2, 4, 1], array_y=[0, 0, 0, 1])


def written(folder, kind: str, table: pd.DataFrame = PLACES):
    path = folder / f"places.{kind}"
    if kind == "h5ad":
        obs = table[[name for name in ("array_x", "array_y") if name in table]]
        ad.AnnData(obs=obs, obsm={"spatial": table[["pixel_x", "pixel_y"]].to_numpy()}).write_h5ad(path)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, sep="\t" if kind == "tsv" else ",", index_label="spot")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "parquet", "h5ad"])
@pytest.mark.parametrize("table", [PLACES, ARRAY], ids=["plain", "array"])
def test_coordinates_are_read_from_every_kind_of_file(tmp_path, slide, kind, table):
    grid = read_coordinates(written(tmp_path, kind, table), slide)
    np.testing.assert_array_equal(grid.xy_px, PLACES.to_numpy())
    assert grid.names == ["a", "NA", "c", "007"] and grid.kind == "given"
    assert grid.spacing_px == pytest.approx(49.8, abs=0.2)
    expected = ARRAY[["array_x", "array_y"]].to_numpy() if table is ARRAY else [[0, 0], [1, 0], [2, 0], [0, 1]]
    np.testing.assert_array_equal(grid.array_xy, expected)


def test_coordinates_without_ids_and_with_further_columns(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("pixel_y,score,pixel_x\n20,0.5,10\n30,0.1,15\n")
    grid = read_coordinates(path)
    assert grid.xy_px.tolist() == [[10, 20], [15, 30]] and grid.names is None
    pd.DataFrame({"pixel_x": [1.0, 2.0], "pixel_y": [3.0, 4.0]}).to_csv(path)  # pandas' own numbers are no ids
    assert read_coordinates(path).names is None


def test_tables_of_visium_and_of_spatial_transcriptomics(tmp_path):
    path = tmp_path / "tissue_positions.csv"
    header = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"
    path.write_text(f"{header}\nAA-1,1,4,10,200,100\nBB-1,0,4,12,200,120\nCC-1,1,5,11,217,110\n")
    grid = read_coordinates(path)
    assert grid.names == ["AA-1", "CC-1"] and grid.xy_px.tolist() == [[100, 200], [110, 217]]
    assert grid.array_xy.tolist() == [[10, 4], [11, 5]]
    path = tmp_path / "B4_selection.tsv"
    path.write_text("x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n7\t15\t7.1\t15.0\t2130.5\t4400\t1\n")
    grid = read_coordinates(path)
    assert grid.names == ["7x15"] and grid.array_xy.tolist() == [[7, 15]] and grid.xy_px.tolist() == [[2130.5, 4400]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (PLACES.assign(pixel_x=[10, 950, 110, 35]), "1 of 4 lie outside the image (900 x 600 px); the other 3"),
        (
            PLACES.assign(pixel_y=[20, 800, 100, 850.0]),
            "2 of 4 lie outside the image (900 x 600 px); with x and y",
        ),
        (PLACES.rename(index={"NA": "a"}), "1 ids occur twice (first: a)"),
        (PLACES.assign(pixel_y=[20, np.nan, 20, 1]), "1 rows hold no position (first: NA)"),
        (ARRAY.assign(array_x=[0, -2, 4, 1]), "array coordinates must be whole numbers >= 0, or left out"),
        (ARRAY.assign(array_x=[0, 0.5, 4, 1]), "array coordinates must be whole numbers >= 0, or left out"),
        (ARRAY.drop(columns="array_y"), "have array_x, pixel_x, pixel_y; array_x and array_y go together"),
        (PLACES.iloc[:0], "hold no place"),
        (PLACES.rename(columns={"pixel_x": "pixel_z"}), "lacks array_x, array_y, pixel_x; it needs the spot id first"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused_in_one_line(tmp_path, slide, table, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_coordinates(written(tmp_path, "csv", table), slide)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_coordinates(tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        read_coordinates(tmp_path / "none.csv")
    ad.AnnData(obs=PLACES).write_h5ad(tmp_path / "flat.h5ad")
    with pytest.raises(InputError, match=r"lack obsm\['spatial'\]"):
        read_coordinates(tmp_path / "flat.h5ad")
    for name in ("broken.h5ad", "broken.parquet"):
        (tmp_path / name).write_bytes(b"not at all")
        with pytest.raises(InputError, match="cannot be read"):
            read_coordinates(tmp_path / name)
    (tmp_path / "places.xlsx").write_bytes(b"")
    with pytest.raises(InputError, match=r"ends in \.xlsx"):
        read_coordinates(tmp_path / "places.xlsx")
