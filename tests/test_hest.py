from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from fakes import hest as fake

from stexp.data.readers.hest import array_coordinates, donors, read_hest, read_metadata
from stexp.errors import InputError


def test_sections_are_read_as_laid_out(tmp_path):
    fake.write(tmp_path)
    sections = read_hest(tmp_path)
    assert [s.name for s in sections] == ["NCBI9", "NCBI10", "NCBI11", "TENX95"]
    for section in sections:
        stored = ad.read_h5ad(tmp_path / "st" / f"{section.name}.h5ad")
        genes = [gene for gene in stored.var_names if gene.startswith("G")]
        np.testing.assert_array_equal(section.counts(genes), stored[section.spots.obs_names, genes].X.toarray())
        np.testing.assert_array_equal(section.xy_px, stored.obsm["spatial"])
        assert section.slide.path == tmp_path / "wsis" / f"{section.name}.tif" and section.um_per_px == 2.5
        # array_x counts along the image's x, also where the file has it in array_row
        assert np.corrcoef(section.array_xy.T[0], section.xy_px.T[0])[0, 1] > 0.99
        assert len({tuple(xy) for xy in section.array_xy}) == len(section)
    assert list(sections[2].array_xy[:, 0]) == list(ad.read_h5ad(tmp_path / "st" / "NCBI11.h5ad").obs["array_row"])


def test_controls_are_no_genes(tmp_path, caplog):
    fake.write(tmp_path)
    caplog.set_level(logging.INFO)
    (section,) = read_hest(tmp_path, technology="xenium")
    assert len(section.genes) == 80 and "section TENX95: 2 control features" in caplog.text


def test_patients_are_people(tmp_path):
    fake.write(tmp_path)
    patients = {s.name: s.patient for s in read_hest(tmp_path)}
    # "Patient 1" and "patient1" of one study; "Patient 2" of two studies are two people
    assert patients == {"NCBI9": "NCBI9", "NCBI10": "NCBI9", "NCBI11": "NCBI11", "TENX95": "TENX95"}


def test_donors_rather_merge_than_leak():
    rows = [
        ("t1", "TENX95", "Breast", "patient 2"),
        ("t2", "TENX97", "Breast", "Patient2"),
        ("t3", "TENX99", "Lung", "patient 2"),
        ("t4", "TENX100", "Breast", ""),
        ("t5", "SPA1", "Brain", ""),
        ("t5", "SPA10", "Brain", ""),
        ("t6", "SPA2", "Brain", ""),
        ("", "INT1", "Brain", ""),
        ("", "INT2", "Brain", ""),
    ]
    table = pd.DataFrame(rows, columns=["dataset_title", "id", "organ", "patient"]).set_index("id", drop=False)
    assert donors(table) == {
        "TENX95": "TENX95", "TENX97": "TENX95", "TENX99": "TENX99", "TENX100": "TENX100",
        "SPA1": "SPA1", "SPA10": "SPA1", "SPA2": "SPA2", "INT1": "INT1", "INT2": "INT2",
    }  # fmt: skip


def test_species_is_never_guessed(tmp_path):
    fake.write(tmp_path)
    fake.write_section(tmp_path, "SPA3", 9)
    with pytest.raises(
        InputError, match=r"2 species: Homo sapiens \(4 sections\), Mus musculus \(1 sections\); choose"
    ):
        read_hest(tmp_path)
    assert [s.name for s in read_hest(tmp_path, species="mus musculus")] == ["SPA3"]
    assert len(read_hest(tmp_path, species="Homo sapiens")) == 4
    assert [s.name for s in read_hest(tmp_path, ["SPA3"])] == ["SPA3"]


def test_filters(tmp_path):
    fake.write(tmp_path)
    assert [s.name for s in read_hest(tmp_path, technology=["Visium", "Xenium"], organ="Skin")] == ["NCBI9", "NCBI10"]
    with pytest.raises(InputError, match=r"no section left with data.organ=Liver; .* Skin \(3\), Breast \(1\)"):
        read_hest(tmp_path, organ="Liver")
    with pytest.raises(InputError, match=r"no section TENX97 in .*st; there are NCBI9, NCBI10, NCBI11, TENX95"):
        read_hest(tmp_path, ["TENX97"])


def test_counts_that_the_metadata_do_not_know_are_refused(tmp_path):
    fake.write(tmp_path)
    fake.write_section(tmp_path, "MISC1")
    with pytest.raises(InputError, match="no section MISC1 in the metadata"):
        read_hest(tmp_path)
    assert len(read_hest(tmp_path, ["NCBI9"])) == 1


def test_the_newest_metadata_count(tmp_path):
    fake.write(tmp_path)
    table = pd.read_csv(tmp_path / "HEST_v1_1_0.csv")
    table.assign(pixel_size_um_estimated=0.5).to_csv(tmp_path / "HEST_v1_10_0.csv", index=False)
    table.assign(pixel_size_um_estimated=0.7).to_csv(tmp_path / "HEST_v1_9_0.csv", index=False)
    assert set(read_metadata(tmp_path)["pixel_size_um_estimated"]) == {"0.5"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.drop(columns=["species", "patient"]), "lacks species, patient"),
        (lambda t: pd.concat([t, t[:1]]), "lists NCBI10 more than once"),
        (lambda t: t.assign(pixel_size_um_estimated=-1), "pixel_size_um_estimated '-1' of the metadata is no size"),
        (lambda t: t.assign(species=""), "1 species: none given"),
    ],
)
def test_metadata_that_do_not_fit(tmp_path, change, says):
    fake.write(tmp_path)
    file = tmp_path / "HEST_v1_1_0.csv"
    change(pd.read_csv(file)).to_csv(file, index=False)
    with pytest.raises(InputError, match=says):
        read_hest(tmp_path)


def test_missing_and_damaged_files(tmp_path, caplog):
    with pytest.raises(InputError, match="is not HEST-1k"):
        read_hest(tmp_path)
    fake.write(tmp_path)
    (tmp_path / "wsis" / "NCBI9.tif").unlink()
    assert read_hest(tmp_path, ["NCBI9"])[0].slide is None and "can only be referred to" in caplog.text
    file = tmp_path / "st" / "NCBI9.h5ad"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"section NCBI9: .*NCBI9.h5ad cannot be read as h5ad"):
        read_hest(tmp_path, ["NCBI9"])
    stored = ad.read_h5ad(tmp_path / "st" / "NCBI10.h5ad")
    del stored.obsm["spatial"]
    stored.write_h5ad(file)
    with pytest.raises(InputError, match="obsm spatial"):
        read_hest(tmp_path, ["NCBI9"])
    (tmp_path / "HEST_v1_1_0.csv").unlink()
    with pytest.raises(InputError, match=r"has no HEST_v<version>.csv"):
        read_hest(tmp_path, ["NCBI9"])


def test_array_coordinates_that_follow_nothing_are_derived(caplog):
    caplog.set_level(logging.INFO)
    column, row = (grid.ravel() for grid in np.meshgrid(np.arange(7), np.arange(5)))
    keep = np.random.default_rng(0).permutation(35)[:25]
    keep.sort()
    xy = np.column_stack([column, row])[keep] * 50.0 + 1000
    good = pd.DataFrame({"array_col": column[keep], "array_row": row[keep]})
    np.testing.assert_array_equal(array_coordinates(xy, good, "s"), good.to_numpy())
    assert not caplog.text
    # numbered after bins were dropped, as in pooled Visium HD
    numbered = pd.DataFrame({"array_col": np.arange(25) % 7, "array_row": np.arange(25) // 7})
    for obs in (numbered, good + 0.5, good - 3, good.drop(columns="array_row"), good.astype(float).replace(2, np.nan)):
        derived = array_coordinates(xy, obs, "s")
        np.testing.assert_array_equal(derived - derived.min(axis=0), 2 * (good - good.min()).to_numpy())
    assert caplog.text.count("derived from these") == 5
    with pytest.raises(InputError, match="on top of each other"):
        array_coordinates(np.vstack([xy, xy[:1]]), pd.DataFrame(index=range(26)), "s")


def test_derived_coordinates_keep_hexagonal_spots_apart():
    row, column = (grid.ravel() for grid in np.mgrid[0:20, 0:20])
    xy = np.column_stack([100.0 * column + 50.0 * (row % 2), 86.6 * row]) @ [[0.8, 0.6], [-0.6, 0.8]]
    derived = array_coordinates(xy, pd.DataFrame(index=range(400)), "s")
    assert len({tuple(place) for place in derived}) == 400


@pytest.mark.parametrize("place", ["hest", "", "hest/st", "hest/st/NCBI9.h5ad", "hest/HEST_v1_1_0.csv"])
def test_any_natural_place_of_the_data_is_understood(tmp_path, place):
    fake.write(tmp_path / "hest")
    assert [section.name for section in read_hest(tmp_path / place, ["NCBI9"])] == ["NCBI9"]


def test_antibodies_are_no_genes(tmp_path):
    fake.write(tmp_path)
    file = tmp_path / "st" / "NCBI9.h5ad"
    stored = ad.read_h5ad(file)
    before = read_hest(tmp_path, ["NCBI9"])[0]
    stored.var["feature_types"] = ["Antibody Capture"] * 2 + ["Gene Expression"] * (stored.n_vars - 2)
    stored.write_h5ad(file)
    (section,) = read_hest(tmp_path, ["NCBI9"])
    assert list(section.genes) == list(before.genes[2:])
