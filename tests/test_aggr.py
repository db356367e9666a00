"""Matrices of several samples, as spaceranger aggr writes them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from fakes import visium as fake

from stexp.data.readers.visium import read_visium
from stexp.errors import InputError


@pytest.mark.parametrize("place", ["", "outs", "outs/filtered_feature_bc_matrix.h5"])
def test_each_sample_is_a_section_with_its_own_counts_places_and_image(tmp_path, place, caplog):
    (tmp_path / "agg" / "outs").mkdir(parents=True)
    samples = fake.write_aggr(tmp_path / "agg" / "outs")
    caplog.set_level("INFO")
    sections = read_visium(tmp_path / "agg" / place)
    assert [(s.name, s.patient) for s in sections] == [("LV1", "P1"), ("LB2", "P2"), ("LP3", "P1")]
    assert "patients by the column Donor" in caplog.text
    for section in sections:
        counts, positions = samples[section.name]
        assert section.slide.path.name == f"{section.name}.png" and section.um_per_px == pytest.approx(2.5, rel=1e-2)
        assert set(section.spots.obs_names) == set(counts.index)
        np.testing.assert_array_equal(section.counts(counts.columns), counts.loc[section.spots.obs_names])
        place_of = positions.set_index("barcode").loc[section.spots.obs_names]
        np.testing.assert_array_equal(section.xy_px, place_of[["pxl_col_in_fullres", "pxl_row_in_fullres"]])
        assert {"aggregation.csv", "aggr_tissue_positions.csv"} <= {path.name for path in section.files}
    assert [s.name for s in read_visium(tmp_path / "agg" / place, ["LB2"])] == ["LB2"]


def test_positions_of_the_samples_own_folders_do_and_so_does_patients_csv(tmp_path):
    outs = tmp_path / "outs"
    outs.mkdir()
    samples = fake.write_aggr(outs)
    expected = {section.name: section.xy_px for section in read_visium(outs)}
    (outs / "aggr_tissue_positions.csv").unlink()
    for name, (_, positions) in samples.items():
        own = positions.assign(barcode=positions["barcode"].str.replace(r"-\d$", "-1", regex=True))
        # as SpaceRanger 1 calls and writes it
        own.to_csv(outs / "spatial" / name / "tissue_positions_list.csv", index=False, header=False)
    (outs / "aggregation.csv").rename(outs / "aggregation_csv.csv")
    (outs / "patients.csv").write_text("section,patient\nLV1,A\nLB2,A\nLP3,B\n")
    sections = read_visium(outs)
    assert [section.patient for section in sections] == ["A", "A", "B"]
    for section in sections:
        np.testing.assert_array_equal(section.xy_px, expected[section.name])


def change_samples(outs, change):
    file = outs / "aggregation.csv"
    change(pd.read_csv(file)).to_csv(file, index=False)


def change_gem_id(outs):
    file = outs / "spatial" / "LB2" / "scalefactors_json.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"gem_id": 3}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda outs: change_samples(outs, lambda t: t[:2]), "barcodes end in none of -1 to -2 .first: .*-3"),
        (lambda outs: change_samples(outs, lambda t: t.drop(columns="library_id")), "library_id would fit"),
        (lambda outs: change_samples(outs, lambda t: t.assign(library_id="LV1")), "stands there twice"),
        (lambda outs: change_samples(outs, lambda t: t.assign(Donor="")), "names no patient for LV1, LB2, LP3"),
        (lambda outs: change_samples(outs, lambda t: t.iloc[[0, 2, 1]]), "row 2 of the table.* gem_id of .* is 3"),
        (change_gem_id, "row 2 of the table of samples, but gem_id of .* is 3"),
        (lambda outs: (outs / "spatial" / "LP3").rename(outs / "LP3"), "LP3: .*no folder .*spatial/LP3"),
        (lambda outs: (outs / "aggr_tissue_positions.csv").unlink(), "has none of tissue_positions"),
    ],
)  # fmt: skip
def test_samples_that_do_not_fit_are_refused(tmp_path, change, says):
    (tmp_path / "outs").mkdir()
    fake.write_aggr(tmp_path / "outs")
    change(tmp_path / "outs")
    with pytest.raises(InputError, match=says):
        read_visium(tmp_path / "outs")


def test_an_aggr_among_other_sections_is_refused(tmp_path):
    (tmp_path / "agg").mkdir()
    fake.write_aggr(tmp_path / "agg")
    fake.write_section(tmp_path / "S1", 2)
    with pytest.raises(InputError, match="agg is of spaceranger aggr, beside others; read it alone"):
        read_visium(tmp_path)
