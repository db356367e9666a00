"""Xenium: transcripts in squares and cells, on an H&E image by its matrix."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from fakes import xenium as fake
from PIL import Image

from stexp.data.readers import transcripts as transcripts_file
from stexp.data.readers.alignment import read_alignment, to_image
from stexp.data.readers.xenium import read_xenium
from stexp.errors import InputError


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """A folder of the sections a, b_outs and c, and the transcripts and cells of a."""
    root = tmp_path_factory.mktemp("xenium")
    fake.write(root)
    return root, *fake.draw(0)


@pytest.fixture
def copied(sections, tmp_path):
    """A section that a test may change."""
    shutil.copytree(sections[0] / "a", tmp_path / "a")
    return tmp_path / "a"


def in_squares(transcripts, bin_um, min_qv=20):
    """Name -> (counts, place in the image), a transcript at a time."""
    out = {}
    for row in transcripts.itertuples():
        if row.qv >= min_qv and row.feature_name in fake.GENES:
            c, r = int(np.float64(row.x_location) // bin_um), int(np.float64(row.y_location) // bin_um)
            centre = fake.place(np.array([[(c + 0.5) * bin_um, (r + 0.5) * bin_um]]))[0]
            counts, *_ = out.setdefault(f"s_{bin_um:g}um_{r:05d}_{c:05d}", (np.zeros(len(fake.GENES)), centre, (c, r)))
            counts[fake.GENES.index(row.feature_name)] += 1
    return out


@pytest.mark.parametrize(("bin_um", "min_qv", "rows"), [(55, 20, 1 << 20), (12.5, 30, 1000)])
def test_squares_hold_the_transcripts_within_them(sections, bin_um, min_qv, rows, monkeypatch, caplog):
    root, transcripts, _ = sections
    monkeypatch.setattr(transcripts_file, "ROWS_AT_ONCE", rows)
    caplog.set_level("INFO")
    (section,) = read_xenium(root / "a", bin_um=bin_um, min_qv=min_qv)
    expected = in_squares(transcripts, bin_um, min_qv)
    assert list(section.spots.obs_names) == sorted(expected) and section.name == "a"
    values, xy, places = (np.array(part) for part in zip(*map(expected.get, section.spots.obs_names), strict=True))
    np.testing.assert_array_equal(section.counts(fake.GENES), values)
    inside = ((xy >= 0) & (xy < fake.SIZE)).all(axis=1)
    assert inside.all()
    np.testing.assert_allclose(section.xy_px, xy, atol=1e-6)
    np.testing.assert_array_equal(section.array_xy, places)
    assert section.um_per_px == pytest.approx(fake.HE_UM) and section.slide.path.name == "a_he_image.ome.tif"
    assert list(section.genes) == fake.GENES  # a panel gene without a transcript would be one, too
    # what does not count is said
    poor = transcripts["qv"] < min_qv
    kinds = transcripts.loc[~poor, "feature_name"].str.split("_").str[0].value_counts()
    assert f"{int(values.sum())} of {len(transcripts)} transcripts count" in caplog.text
    assert f"{poor.sum()} below a quality of {min_qv}" in caplog.text
    for kind in ("NegControlProbe", "UnassignedCodeword"):
        assert f"{kinds[kind]} of {kind}" in caplog.text


def test_a_place_of_the_image_shows_what_was_drawn_there(sections):
    """The ramp of the image runs along Xenium's x, which the array's columns count."""
    (section,) = read_xenium(sections[0] / "a")
    with Image.open(section.slide.path) as image:
        red = np.asarray(image)[..., 0].astype(float)
    shown = [red[int(y) - 4 : int(y) + 5, int(x) - 4 : int(x) + 5].mean() for x, y in section.xy_px]
    assert np.corrcoef(shown, section.array_xy[:, 0])[0, 1] > 0.98
    assert abs(np.corrcoef(shown, section.array_xy[:, 1])[0, 1]) < 0.1


def test_cells_are_those_of_the_matrix_and_of_their_transcripts(sections):
    root, transcripts, cells = sections
    (of_matrix,) = read_xenium(root / "a", spots="cells")
    expected = fake.by_cell(transcripts, cells, 20)[fake.GENES]
    assert list(of_matrix.spots.obs_names) == list(cells["cell_id"])
    np.testing.assert_array_equal(of_matrix.counts(fake.GENES), expected)
    um = cells[["x_centroid", "y_centroid"]].to_numpy()
    np.testing.assert_allclose(of_matrix.xy_px, fake.place(um), atol=1e-6)
    np.testing.assert_array_equal(of_matrix.array_xy, np.floor(um))
    (of_transcripts,) = read_xenium(root / "a", spots="cells", min_qv=32)
    np.testing.assert_array_equal(of_transcripts.counts(fake.GENES), fake.by_cell(transcripts, cells, 32)[fake.GENES])
    np.testing.assert_array_equal(of_transcripts.xy_px, of_matrix.xy_px)


def test_versions_of_the_software_give_the_same(sections, tmp_path):
    """Numbers as cell ids, names as bytes, no column that tells genes; and no matrix that lists the panel."""
    root, transcripts, _ = sections
    fake.write_section(tmp_path / "old", 0, old=True)
    squares = in_squares(transcripts, 55)
    for folder, remove in ((tmp_path / "old", ["cell_feature_matrix.h5", "cells.parquet"]), (root / "c", [])):
        for name in remove:
            (folder / name).unlink()
        (section,) = read_xenium(folder)
        if remove:
            counts = section.counts(fake.GENES)
            np.testing.assert_array_equal(counts, [squares[name][0] for name in section.spots.obs_names])
            assert set(section.genes) == set(fake.GENES) and section.slide is None
            assert section.um_per_px == fake.PIXEL_UM
    (by_transcripts,) = read_xenium(tmp_path / "old", spots="cells")
    old, cells = fake.draw(0, old=True)
    np.testing.assert_array_equal(by_transcripts.counts(fake.GENES), fake.by_cell(old, cells, 20)[fake.GENES])
    shutil.copytree(root / "a", tmp_path / "new")
    (tmp_path / "new" / "outs" / "cell_feature_matrix.h5").unlink()
    (new,) = read_xenium(tmp_path / "new", image=root / "a", alignment=root / "a")
    assert set(new.genes) == set(fake.GENES)  # is_gene tells
    np.testing.assert_array_equal(new.counts(fake.GENES), [squares[name][0] for name in new.spots.obs_names])


def test_sections_images_and_matrices_are_found_where_10x_puts_them(sections):
    root, *_ = sections
    read = read_xenium(root, bin_um=110)
    assert [section.name for section in read] == ["a", "b_outs", "c"]
    images = [section.slide.path.relative_to(root).as_posix() for section in read]
    assert images == ["a/a_he_image.ome.tif", "b_he_image.ome.tif", "c/c_he_image.ome.tif"]
    (alone,) = read_xenium(root / "b_outs", bin_um=110)
    assert alone.slide.path.name == "b_he_image.ome.tif"
    assert [s.name for s in read_xenium(root / "a" / "outs" / "experiment.xenium", bin_um=110)] == ["a"]
    with pytest.raises(InputError, match="one file for 3 sections"):
        read_xenium(root, image=root / "b_he_image.ome.tif")
    with pytest.raises(InputError, match="no section x in"):
        read_xenium(root, ["x"])


def test_a_few_spots_beside_the_image_are_left_out_and_many_refused(copied, caplog):
    with Image.open(copied / "a_he_image.ome.tif") as image:
        whole = image.copy()
    cells = pd.read_parquet(copied / "outs" / "cells.parquet")
    x = fake.place(cells[["x_centroid", "y_centroid"]].to_numpy())[:, 0]
    width = int(np.sort(x)[-3])
    whole.crop((0, 0, width, whole.height)).save(copied / "a_he_image.ome.tif", format="TIFF")
    (section,) = read_xenium(copied, spots="cells")
    assert f"{(x >= width).sum()} of 110 spots lie beside the image" in caplog.text
    assert set(section.spots.obs_names) == set(cells["cell_id"][x < width])
    whole.crop((0, 0, whole.width // 2, whole.height)).save(copied / "a_he_image.ome.tif", format="TIFF")
    with pytest.raises(InputError, match=r"spots lie beside the image .* are they of one section"):
        read_xenium(copied, spots="cells")


def test_a_matrix_the_wrong_way_round_is_told(copied):
    fake.write_alignment(copied / "a_he_imagealignment.csv", np.linalg.inv(fake.MATRIX))
    with pytest.raises(InputError, match="the inverse of the matrix would put them inside"):
        read_xenium(copied)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no matrix beside it .*a_he_imagealignment.csv.*data.alignment="),
        ("1,2,3\n4,5,6\n", r"no table of 3 x 3 numbers .*\(2 x 3\)"),
        ("a,b,c\n1,0,0\n0,1,0\n", "no table of 3 x 3 numbers"),
        ("1,0,0\n0,1,0\n0,0.1,1\n", "last row is 0, 0.1, 1"),
        ("1,2,0\n2,4,0\n0,0,1\n", "is singular"),
        ("0,0,5\n0,0,5\n0,0,1\n", "is singular"),
        ("1,0,0\n0,2,0\n0,0,1\n", "stretches the image 2 times"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(copied, text, says):
    file = copied / "a_he_imagealignment.csv"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(InputError, match=says):
        read_xenium(copied)


def test_the_matrix_takes_the_image_to_xenium(tmp_path):
    """The example of 10x: the image's corner (0, 0) is the pixel (807.98, 73097.66) of Xenium."""
    example = [[0.011071028838929093, 1.2895790134339569, 807.9788953065927],
               [-1.2895790134339569, 0.011071028838929093, 73097.655174759], [0, 0, 1]]  # fmt: skip
    fake.write_alignment(tmp_path / "m.csv", np.array(example))
    corner = to_image(read_alignment(tmp_path / "m.csv"), np.array([[807.9788953065927, 73097.655174759]]))
    np.testing.assert_allclose(corner, [[0, 0]], atol=1e-6)


def rewrite(change):
    def rewritten(outs):
        file = outs / "transcripts.parquet"
        change(pd.read_parquet(file)).to_parquet(file, index=False)

    return rewritten


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda outs: (outs / "experiment.xenium").unlink(), "has no experiment.xenium"),
        (lambda outs: (outs / "experiment.xenium").write_text("{}"), "no JSON object with pixel_size"),
        (lambda outs: (outs / "experiment.xenium").write_text('{"pixel_size": -1}'), "pixel_size of .*=-1"),
        (lambda outs: (outs / "transcripts.parquet").unlink(), "transcripts .* do not exist"),
        (lambda outs: (outs / "transcripts.parquet").write_bytes(b"PAR1"), "cannot be read"),
        (rewrite(lambda t: t.drop(columns="qv")), "lack qv"),
        (rewrite(lambda t: t.assign(qv=3.0)), "none of 9000 transcripts .* counts .9000 below data.min_qv=20"),
        (rewrite(lambda t: t.assign(x_location=np.nan)), "9000 have no place"),
        (rewrite(lambda t: t[:0]), "hold none"),
    ],
)
def test_squares_without_what_they_need_are_refused(copied, change, says):
    change(copied / "outs")
    with pytest.raises(InputError, match=says):
        read_xenium(copied)


def remove_cells(outs):
    for file in outs.glob("cells*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (remove_cells, "has none of cells.parquet, cells.csv.gz"),
        (lambda outs: pd.DataFrame({"cell_id": ["x"]}).to_parquet(outs / "cells.parquet"), "lack x_centroid"),
        (lambda outs: (outs / "cells.parquet").write_bytes(b"PAR1"), "cells .* cannot be read"),
        (rewrite(lambda t: t.assign(cell_id="zzzz-1")), "are of cells that are not in the table: zzzz-1"),
    ],
)
def test_cells_without_what_they_need_are_refused(copied, change, says):
    change(copied / "outs")
    with pytest.raises(InputError, match=says):
        read_xenium(copied, spots="cells", min_qv=10)


def test_pixels_are_as_large_as_the_experiment_says(copied):
    file = copied / "outs" / "experiment.xenium"
    file.write_text(json.dumps({"pixel_size": 0.425}))
    fake.write_alignment(copied / "a_he_imagealignment.csv", np.diag([0.5, 0.5, 1]) @ fake.MATRIX)
    (section,) = read_xenium(copied)
    assert section.um_per_px == pytest.approx(fake.HE_UM)
