"""The demo data: the same bytes every time, and images that tell what they are said to tell."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import scale

from stexp.data import demo
from stexp.data.readers import demo as reader
from stexp.data.readers import samplesheet
from stexp.errors import InputError
from stexp.inference.slide_sheet import read_slide_sheet

SMALL = {"patients": 1, "sections_per_patient": 1, "image_px": 500}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def two_patients(tmp_path_factory):
    sheet = demo.write_demo(tmp_path_factory.mktemp("data") / "demo", patients=2, sections_per_patient=1)
    return samplesheet.read_samplesheet(sheet), pd.read_csv(sheet.parent / "genes.csv", index_col="gene")


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    """Small sections A1, A2, B1, B2, C1, C2."""
    sheet = demo.write_demo(tmp_path_factory.mktemp("data") / "demo", patients=3, sections_per_patient=2, image_px=700)
    return {section.name: section for section in samplesheet.read_samplesheet(sheet)}


def squares(section, image, side_um):
    """The image around each spot, (n_spots, px, px, 3)."""
    reach = int(side_um / section.um_per_px / 2)
    image = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    return np.stack([image[y : y + 2 * reach, x : x + 2 * reach] for x, y in section.xy_px.astype(int)])


def expression(section, genes):
    return np.log1p(1e4 * section.counts(genes) / section.total_counts[:, None])


def pearson(a, b):
    return (scale(a) * scale(b)).mean(axis=0)


def test_same_arguments_same_bytes(tmp_path):
    first, again, other = (
        demo.write_demo(tmp_path / name, seed=seed, **SMALL).parent
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert files(first) == files(again)
    assert files(first)["images/A1.jpg"] != files(other)["images/A1.jpg"]
    assert files(first)["counts/A1.tsv.gz"] != files(other)["counts/A1.tsv.gz"]


def test_a_section_does_not_change_with_the_number_of_others(tmp_path):
    alone = files(demo.write_demo(tmp_path / "alone", **SMALL).parent)
    among = files(demo.write_demo(tmp_path / "among", **SMALL | {"patients": 2, "sections_per_patient": 2}).parent)
    for name in ("images/A1.jpg", "counts/A1.tsv.gz", "spots/A1.csv", "genes.csv"):
        assert alone[name] == among[name]


def test_simple_image_statistics_explain_the_first_family_and_not_the_third(two_patients):
    sections, genes = two_patients

    def statistics(section):
        tiles = squares(section, section.slide.read(), 120)
        density = -np.log((tiles.reshape(len(tiles), -1, 3) + 1.0) / 256)
        dark = (density[..., 0] > 0.5).mean(axis=1, keepdims=True)
        return scale(np.hstack([density.mean(axis=1), density.std(axis=1), dark]))

    image = [statistics(section) for section in sections]
    observed = [expression(section, genes.index) for section in sections]
    explained = np.mean(
        [
            pearson(Ridge(10.0).fit(image[train], observed[train]).predict(image[test]), observed[test])
            for train, test in ((0, 1), (1, 0))
        ],
        axis=0,
    )
    of_family = pd.Series(explained).groupby(genes["family"].to_numpy()).mean()
    assert of_family["full"] > 0.4
    assert 0.1 < of_family["part"] < of_family["full"] - 0.1
    assert abs(of_family["none"]) < 0.07


def test_depth_does_not_give_the_third_family_away(two_patients):
    sections, genes = two_patients
    share = [
        section.counts(genes.index)[:, genes["family"] == "none"].sum(axis=1) / section.total_counts
        for section in sections
    ]
    for section, none in zip(sections, share, strict=True):
        tumour = section.counts([f"TUMOUR{i:02}" for i in range(1, 19)]).sum(axis=1) / section.total_counts
        assert abs(np.corrcoef(none, tumour)[0, 1]) < 0.2
        assert none.mean() == pytest.approx(demo.SHARE["none"], rel=0.1)


def test_spots_lie_on_tissue_at_the_pitch_of_their_array(two_patients):
    sections, _ = two_patients
    for section, array in zip(sections, demo.ARRAYS, strict=True):
        assert section.um_per_px == array.um_per_px
        assert 130 <= len(section) <= 350
        xy = section.xy_px * section.um_per_px
        distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(len(xy))
        assert np.median(distance.min(axis=1)) == pytest.approx(array.pitch, rel=0.01)
        not_white = (squares(section, section.slide.read(), array.diameter).min(axis=-1) < 225).mean(axis=(1, 2))
        assert (not_white > 0.02).all()  # the walls of fat vacuoles are thin


def test_sections_of_one_patient_resemble_each_other(two_blocks):
    def profile(name):
        section = two_blocks[name]
        return np.log(section.counts(section.genes).sum(axis=0) + 1)

    def unlike(a, b):
        return np.std(profile(a) - profile(b))

    assert unlike("A1", "A2") < 0.6 * unlike("A1", "C1")
    assert unlike("B1", "B2") < 0.6 * unlike("A2", "B2")
    images = {name: section.slide.read().astype(float).mean(axis=-1) for name, section in two_blocks.items()}
    alike = {name: np.corrcoef(images["A1"].ravel(), images[name].ravel())[0, 1] for name in ("A2", "C1")}
    assert alike["A2"] > alike["C1"] + 0.1


def test_its_slides_can_be_predicted_at_their_own_scales(tmp_path):
    folder = demo.write_demo(tmp_path / "demo", **SMALL | {"patients": 2}).parent
    slides = read_slide_sheet(folder / "slides.csv")
    sections = samplesheet.read_samplesheet(folder / "sheet.csv")
    stated = {section.name: (section.slide.path, section.um_per_px) for section in sections}
    assert stated == {name: (path.resolve(), um) for name, (path, um) in slides.items()}
    assert len({um for _, um in slides.values()}) > 1, "one um_per_px= for all would be wrong"


def test_an_interrupted_write_leaves_no_folder(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_section", full_disk)
        with pytest.raises(InputError, match=r"cannot be written .*No space left"):
            demo.write_demo(tmp_path / "demo", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} <= {".demo.lock"}
    (tmp_path / ".demo.part" / "new").mkdir(parents=True)  # what a killed run leaves
    assert demo.write_demo(tmp_path / "demo", **SMALL).is_file()
    assert not (tmp_path / ".demo.part").exists()


def test_two_at_once_write_once(tmp_path, monkeypatch):
    calls, write = [], demo._write
    monkeypatch.setattr(demo, "_write", lambda *args: (calls.append(args), write(*args)))
    with ThreadPoolExecutor(2) as pool:
        sheets = list(pool.map(lambda _: demo.write_demo(tmp_path / "demo", **SMALL), range(2)))
    assert len(calls) == 1
    assert sheets[0] == sheets[1] and sheets[0].is_file()


def test_demos_of_other_arguments_lie_side_by_side(tmp_path):
    root = tmp_path / "demo"
    first = demo.write_demo(root, **SMALL)
    before = files(root)
    sections = reader.read_demo(root, seed=1, patients=1, sections_per_patient=2)
    assert [section.name for section in sections] == ["A1", "A2"]
    assert sections[0].files[0].is_relative_to(root / "1x2-seed1")
    assert {name: files(root)[name] for name in before} == before
    kept = files(root)
    reader.read_demo(root, seed=1, patients=1, sections_per_patient=2)
    assert files(root) == kept and demo.write_demo(root, **SMALL) == first


def test_no_demo_is_written_beside_the_data_sets_of_others(tmp_path, monkeypatch):
    (tmp_path / "her2st").mkdir()
    monkeypatch.setenv("STEXP_DATA", str(tmp_path))
    size = {"patients": 1, "sections_per_patient": 1}
    with pytest.raises(InputError, match=r"STEXP_DATA=.* holds her2st; give data\.root=data/demo"):
        reader.read_demo(tmp_path / "demo", **size)
    assert [path.name for path in tmp_path.iterdir()] == ["her2st"]
    (tmp_path / "her2st").rmdir()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match="is read-only"):
        reader.read_demo(tmp_path / "demo", **size)
    monkeypatch.undo()
    assert len(reader.read_demo(tmp_path / "demo", **size)) == 1
    monkeypatch.setenv("STEXP_DATA", str(tmp_path))
    (tmp_path / "her2st").mkdir()  # which came later: the demo is there
    assert len(reader.read_demo(tmp_path / "demo", **size)) == 1


@pytest.mark.parametrize("name", ["thesis.docx", "demo.json"])
def test_files_that_are_not_demo_data_are_kept(tmp_path, name):
    (tmp_path / name).write_text("[1]")
    with pytest.raises(InputError, match="not demo data"):
        demo.write_demo(tmp_path, **SMALL)
    assert (tmp_path / name).read_text() == "[1]"


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"patients 1\.\.26"):
        demo.write_demo(tmp_path / "demo", patients=27)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="give another folder"):
        demo.write_demo(tmp_path / "file" / "demo", **SMALL)
