from __future__ import annotations

import logging
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from fakes import visium as fake

from stexp.data.readers.spaceranger import read_10x_counts, read_visium_positions
from stexp.errors import InputError


@pytest.mark.parametrize("layout", ["v2", "v3", "mtx", "mtx.gz", "genes.tsv"])
def test_counts_of_every_layout_are_the_same(tmp_path, layout):
    counts = fake.draw_counts(fake.array())
    path = tmp_path / "m"
    if layout.startswith("v"):
        fake.write_h5(path, counts, version=int(layout[1]) - 1)
    else:
        fake.write_mtx(path, counts, packed=layout == "mtx.gz")
    if layout == "genes.tsv":  # before 10x wrote types
        table = pd.read_csv(path / "features.tsv", sep="\t", header=None)
        table[[0, 1]].to_csv(path / "genes.tsv", sep="\t", header=False, index=False)
        (path / "features.tsv").unlink()
    found = read_10x_counts(path)
    assert list(found.obs_names) == list(counts.index) and list(found.var_names) == list(counts.columns)
    assert list(found.var["gene_ids"]) == fake.gene_ids(counts.columns)
    assert found.X.format == "csr" and found.X.dtype == np.float32
    np.testing.assert_array_equal(found.X.toarray(), counts.to_numpy())


def test_only_gene_expression_is_kept(tmp_path, caplog):
    counts = fake.draw_counts(fake.array(), n_genes=5)
    types = ["Gene Expression", "Antibody Capture", "Gene Expression", "Antibody Capture", "Custom"]
    fake.write_h5(tmp_path / "m.h5", counts, types=types)
    caplog.set_level(logging.INFO)
    found = read_10x_counts(tmp_path / "m.h5")
    assert list(found.var_names) == ["G000", "G002"]
    np.testing.assert_array_equal(found.X.toarray(), counts[["G000", "G002"]].to_numpy())
    assert "3 features are not Gene Expression" in caplog.text
    fake.write_h5(tmp_path / "m.h5", counts, types=["Antibody Capture"] * 5)
    with pytest.raises(InputError, match="no feature of type Gene Expression, only Antibody Capture"):
        read_10x_counts(tmp_path / "m.h5")


def damage_h5(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop(key):
    def change(path):
        with h5py.File(path, "a") as file:
            del file[key]

    return change


def replace(key, values):
    def change(path):
        with h5py.File(path, "a") as file:
            del file[key]
            file[key] = values

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (damage_h5, "no complete 10x HDF5 file"),
        (lambda path: path.write_bytes(b"not hdf5"), "no complete 10x HDF5 file"),
        (drop("matrix"), "hold nothing; the group matrix, or one genome, would fit"),
        (drop("matrix/features/id"), "no complete 10x HDF5 file"),
        (drop("matrix/indptr"), "no complete 10x HDF5 file"),
        (replace("matrix/shape", [3, 34]), "hold 3 features x 34 barcodes, but 80 features"),
        (replace("matrix/barcodes", np.array(["A-1"], dtype="S")), "80 features and 1 barcodes are named"),
        (lambda path: path.unlink(), "do not exist"),
    ],
)
def test_damaged_h5_is_one_clear_error(tmp_path, change, says):
    path = tmp_path / "m.h5"
    fake.write_h5(path, fake.draw_counts(fake.array().iloc[:34]))
    change(path)
    with pytest.raises(InputError, match=says):
        read_10x_counts(path)


def test_two_genomes_of_version_2_are_refused(tmp_path):
    counts = fake.draw_counts(fake.array())
    fake.write_h5(tmp_path / "m.h5", counts, version=1)
    with h5py.File(tmp_path / "m.h5", "a") as file:
        file.copy("GRCh38", "mm10")
    with pytest.raises(InputError, match=r"2 genomes \(GRCh38, mm10\); .* would fit"):
        read_10x_counts(tmp_path / "m.h5")


@pytest.mark.parametrize("packed", [False, True])
def test_damaged_mtx_is_one_clear_error(tmp_path, packed):
    ending = ".gz" if packed else ""
    counts = fake.draw_counts(fake.array())
    fake.write_mtx(tmp_path / "m", counts, packed)
    good = {path: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    matrix, features = tmp_path / "m" / f"matrix.mtx{ending}", tmp_path / "m" / f"features.tsv{ending}"
    for path in (matrix, features):
        path.unlink()
        with pytest.raises(InputError, match=f"has no {path.name.split('.')[0]}"):
            read_10x_counts(tmp_path / "m")
        path.write_bytes(good[path])
    matrix.write_bytes(good[matrix][: len(good[matrix]) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read_10x_counts(tmp_path / "m")
    fake.write_mtx(tmp_path / "other", counts.T, packed)
    shutil.copy(tmp_path / "other" / matrix.name, matrix)
    with pytest.raises(InputError, match="36 features x 80 barcodes, but 80 features and 36 barcodes are named"):
        read_10x_counts(tmp_path / "m")


def test_positions_name_rows_first(tmp_path):
    path = tmp_path / "tissue_positions_list.csv"
    path.write_text("A-1,1,3,10,300,1000\nB-1,0,4,11,400.5,1100\n")
    table = read_visium_positions(path)
    assert table.loc["A-1"].to_dict() == {
        "in_tissue": True, "array_x": 10, "array_y": 3, "pixel_x": 1000, "pixel_y": 300,
    }  # fmt: skip
    assert table.loc["B-1", "pixel_y"] == 400.5 and table["in_tissue"].dtype == bool
    # a header is seen whatever the file is called
    path.write_text(
        "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\nA-1,1,3,10,300,1000\n"
    )
    pd.testing.assert_frame_equal(read_visium_positions(path), table.iloc[:1])


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.csv", "spot,x,y\nA-1,1,2\n", "lack barcode, in_tissue, array_row.* would fit"),
        ("p.csv", "A-1,1,3,10,300\n", "lack barcode"),
        ("p.csv", "A-1,1,3,10,300,\n", "1 rows hold no number"),
        ("p.csv", "", "cannot be read as a table"),
        ("p.parquet", "PAR1 and nothing more", "cannot be read as a table"),
    ],
)
def test_wrong_tables_of_positions(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        read_visium_positions(tmp_path / name)
