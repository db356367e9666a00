"""The reader of GSE144240: names, joins, scale, packed images."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import cscc as fake

from stexp.data.readers import cscc
from stexp.errors import InputError


@pytest.fixture
def root(tmp_path):
    fake.write(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def read(root, tmp_path):
    return lambda **options: cscc.read_cscc(root, cache_dir=tmp_path / "cache", **options)


def test_sections_come_in_the_order_of_the_paper(read):
    sections = read()
    assert [section.name for section in sections] == ["P2_ST_rep1", "P2_ST_rep2", "P10_ST_rep1"]
    assert [section.patient for section in sections] == ["P2", "P2", "P10"]
    assert [len(section) for section in sections] == [24, 24, 24]


def test_spots_are_those_with_counts_and_selection_joined_by_name(root, read):
    (section,) = read(sections=["P2_ST_rep2"])
    counts = pd.read_csv(root / "GSM4284317_P2_ST_rep2_stdata.tsv", sep="\t", index_col=0)
    chosen = pd.read_csv(root / "GSM4284317_spot_data-selection-P2_ST_rep2.tsv", sep="\t")
    assert "5x7" not in section.spots.obs_names and len(chosen) == 25 and len(counts) == 48
    for x, y, pixel_x, pixel_y in chosen[["x", "y", "pixel_x", "pixel_y"]].itertuples(index=False):
        if f"{x:.0f}x{y:.0f}" == "5x7":
            continue
        spot = section.spots.obs_names.get_loc(f"{x:.0f}x{y:.0f}")
        np.testing.assert_array_equal(section.counts(fake.GENES)[spot], counts.loc[f"{x:.0f}x{y:.0f}"])
        np.testing.assert_allclose(section.xy_px[spot], [pixel_x, pixel_y])
        np.testing.assert_array_equal(section.array_xy[spot], [x, y])


def test_neighbouring_coordinates_are_100_um_apart_on_the_array_of_1934_spots(read):
    (section,) = read(sections=["P10_ST_rep1"])
    assert section.um_per_px == pytest.approx(100 / fake.STEP_PX, rel=0.01)
    gaps = np.linalg.norm(section.xy_px[:, None] - section.xy_px, axis=2) + 1e9 * np.eye(len(section))
    assert np.median(gaps.min(axis=1)) * section.um_per_px == pytest.approx(141, rel=0.1)


def test_spots_between_the_lattice_leave_the_scale_unknown(root, read, caplog):
    path = root / "GSM4284317_spot_data-selection-P2_ST_rep2.tsv"
    table = pd.read_csv(path, sep="\t")
    table.loc[0, "x"] += 1
    table.to_csv(path, sep="\t", index=False)
    (section,) = read(sections=["P2_ST_rep2"])
    assert section.um_per_px is None and "scale is unknown" in caplog.text


def test_a_packed_section_is_the_unpacked_one(root, read, tmp_path):
    (packed,) = read(sections=["P2_ST_rep1"])
    assert packed.slide.path.parent == tmp_path / "cache" / "images"
    assert all(file.parent == root and file.suffix == ".gz" for file in packed.files) and len(packed.files) == 3
    for file in root.glob("*P2_ST_rep1*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
    (plain,) = read(sections=["P2_ST_rep1"])
    assert plain.slide.path == root / "GSM4284316_P2_ST_rep1.jpg"
    np.testing.assert_array_equal(plain.slide.read(), packed.slide.read())
    assert (plain.spots.X != packed.spots.X).nnz == 0
    np.testing.assert_array_equal(plain.xy_px, packed.xy_px)


def test_an_image_is_unpacked_once_and_again_when_it_changes(root, read, tmp_path):
    (first,) = read(sections=["P2_ST_rep1"])
    written = first.slide.path.stat().st_mtime_ns
    assert read(sections=["P2_ST_rep1"])[0].slide.path.stat().st_mtime_ns == written
    other = (root / "GSM4284317_P2_ST_rep2.jpg").read_bytes()
    (root / "GSM4284316_P2_ST_rep1.jpg.gz").write_bytes(gzip.compress(other))
    (second,) = read(sections=["P2_ST_rep1"])
    assert second.slide.path != first.slide.path and second.slide.path.read_bytes() == other


def test_a_truncated_image_is_refused_and_leaves_nothing(root, read, tmp_path):
    path = root / "GSM4284316_P2_ST_rep1.jpg.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"P2_ST_rep1.jpg.gz cannot be unpacked .*; fetch the file again"):
        read(sections=["P2_ST_rep1"])
    assert list((tmp_path / "cache" / "images").iterdir()) == []


def test_a_folder_below_and_a_section_without_image(root, read):
    below = root / "GSE144239_RAW"
    below.mkdir()
    for file in [path for path in root.iterdir() if path.is_file()]:
        file.rename(below / file.name)
    (below / "GSM4284325_P10_ST_rep1.jpg").unlink()
    assert [section.slide is None for section in read()] == [False, False, True]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: [path.unlink() for path in root.iterdir()], "has no <GEO number>_P<patient>_ST_rep<n>_stdata"),
        (lambda root: _copy(root, "GSM4284317_P2_ST_rep2_stdata.tsv", "GSM1_P2_ST_rep2_stdata.tsv"), "2 files are"),
        (
            lambda root: (root / "GSM4284317_spot_data-selection-P2_ST_rep2.tsv").unlink(),
            "section P2_ST_rep2: .* has no spot_data-selection-P2_ST_rep2.tsv or .tsv.gz",
        ),
        (
            lambda root: _copy(root, "GSM4284325_P10_ST_rep1.jpg", "GSM4284317_spot_data-selection-P2_ST_rep2.tsv"),
            "selection-P2_ST_rep2.tsv are not text",
        ),
    ],
)
def test_what_is_missing_twice_or_wrong_is_refused(root, read, spoil, message):
    spoil(root)
    with pytest.raises(InputError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


def _copy(root: Path, source: str, target: str) -> None:
    (root / target).write_bytes((root / source).read_bytes())


def test_an_unknown_section_is_refused(read):
    with pytest.raises(InputError, match=r"no section P3_ST_rep1 in .*; there are P2_ST_rep1, P2_ST_rep2, P10_ST_rep1"):
        read(sections=["P3_ST_rep1"])


def test_ids_become_symbols(root, read, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = root / "GSM4284325_P10_ST_rep1_stdata.tsv"
    path.write_text(path.read_text().replace("KRT5", "ENSG00000186081.12"))
    (tmp_path / "genes.csv").write_text("gene_id,name\nENSG00000186081,KRT5\n")
    (section,) = read(sections=["P10_ST_rep1"], gene_table=tmp_path / "genes.csv")
    assert "KRT5" in section.genes and "1 in genes.csv and 0 not" in caplog.text
