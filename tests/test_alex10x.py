from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from fakes import alex10x as fake
from fakes.visium import HIRES

from stexp.data.readers.alex10x import TENX, read_alex10x
from stexp.errors import InputError


def test_sections_come_in_the_order_of_the_folds(tmp_path, caplog):
    fake.write(tmp_path)
    sections = read_alex10x(tmp_path)
    assert [(s.name, s.patient) for s in sections] == [
        ("CID4290", "CID4290"),
        ("1160920F", "1160920F"),
        ("block1", "blockA"),
        ("block2", "blockA"),
        ("FFPE", "FFPE"),
    ]
    assert "left out: 1142243F, CID4465, CID44971, CID4535" in caplog.text
    assert [s.name for s in read_alex10x(tmp_path, ["FFPE", "CID4290"])] == ["CID4290", "FFPE"]


def test_the_deposit_has_hires_images_and_10x_the_full_ones(tmp_path, caplog):
    fake.write(tmp_path)
    wu, tenx = read_alex10x(tmp_path, ["CID4290", "block1"])
    assert wu.slide.path.name == "tissue_hires_image.png" and wu.um_per_px == pytest.approx(2.5 / HIRES, rel=1e-3)
    assert tenx.slide.path.name == f"{TENX['block1']}_image.tif" and tenx.um_per_px == pytest.approx(2.5, rel=1e-3)
    assert "section CID4290: no full-resolution image" in caplog.text and "section block1: no full" not in caplog.text
    (tmp_path / "images").mkdir()
    shutil.copy(tenx.slide.path, tmp_path / "images" / "CID4290.tif")
    assert read_alex10x(tmp_path, ["CID4290"])[0].um_per_px == pytest.approx(2.5, rel=1e-3)


@pytest.mark.parametrize("name", ["CID4290", "1160920F"])  # packed and plain
def test_counts_and_labels_join_by_barcode(tmp_path, name):
    fake.write(tmp_path)
    (section,) = read_alex10x(tmp_path, [name])
    metadata = pd.read_csv(tmp_path / "metadata" / f"{name}_metadata.csv", index_col=0)
    np.testing.assert_array_equal(section.total_counts, metadata.loc[section.spots.obs_names, "nCount_RNA"])
    label = section.spots.obs["label"]
    assert label[metadata.index[0]] == "Invasive cancer" and (label == "Stroma").sum() == len(section) - 1
    assert list(section.genes[:2]) == ["G000", "G001"]
    (tmp_path / "metadata" / f"{name}_metadata.csv").write_text(",patientid\nA,1\n")
    with pytest.raises(InputError, match="column Classification"):
        read_alex10x(tmp_path, [name])


def test_folders_called_like_the_section(tmp_path):
    fake.write(tmp_path)
    (tmp_path / TENX["block2"]).rename(tmp_path / "block2")
    assert read_alex10x(tmp_path, ["block2"])[0].slide.path.parent == tmp_path / "block2"


def test_nothing_there_and_nothing_known(tmp_path):
    with pytest.raises(InputError, match=r"has none of 1142243F, CID4290.*Zenodo 4739739"):
        read_alex10x(tmp_path)
    with pytest.raises(InputError, match="no section B1 in Alex"):
        read_alex10x(tmp_path, ["B1"])


def test_a_section_of_which_a_part_is_missing_is_refused(tmp_path):
    fake.write(tmp_path)
    shutil.rmtree(tmp_path / "spatial" / "CID4290_spatial")
    with pytest.raises(InputError, match="CID4290_spatial has none of tissue_positions"):
        read_alex10x(tmp_path)


@pytest.mark.parametrize(
    "place", ["alex10x", "", "alex10x/spatial", "alex10x/filtered_count_matrices", f"alex10x/{TENX['block1']}"]
)
def test_any_natural_place_of_the_data_is_understood(tmp_path, place):
    fake.write(tmp_path / "alex10x")
    assert [section.name for section in read_alex10x(tmp_path / place, ["CID4290"])] == ["CID4290"]
