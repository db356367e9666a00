"""Slides and tiles that a report shows: how fine, where, how large."""

from __future__ import annotations

import io
import json
from pathlib import Path
from threading import Thread

import anndata as ad
import h5py
import numpy as np
import pytest
from PIL import Image

from stexp.data.slides.pictures import (
    CELL,
    NAME,
    REFERENCES,
    SHEET_COLUMNS,
    SHEET_PX,
    Sheet,
    SlidePicture,
    picture,
    read,
    share_budget,
    sheet,
    write,
)
from stexp.data.slides.slide import Slide
from stexp.errors import InputError
from stexp.runs.folder import RunFolder

WIDTH, HEIGHT = 2000, 1300
SPOTS = np.array([[700.0, 600.0], [820.0, 640.0]])


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    """Red grows to the right, green downwards; blue is noise, which JPEG cannot shrink."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    blue = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH))
    path = tmp_path_factory.mktemp("slide") / "slide.png"
    Image.fromarray(np.stack([255 * x / WIDTH, 255 * y / HEIGHT, blue], axis=-1).astype(np.uint8)).save(
        path, compress_level=1
    )
    return Slide(path)


@pytest.fixture(scope="module")
def whole(slide: Slide) -> SlidePicture:
    return picture(slide, SPOTS, 224.0)


def decode(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(float)


def test_levels_halve_down_to_the_slides_own_and_show_what_is_there(whole: SlidePicture) -> None:
    assert (whole.width, whole.height, whole.side_px) == (WIDTH, HEIGHT, 224.0)
    assert [level.downsample for level in whole.levels] == [4, 2, 1]
    for level in whole.levels:
        pitch = CELL * level.downsample
        for (column, row), jpeg in level.cells.items():
            cell, (x, y) = decode(jpeg), (column * pitch, row * pitch)
            size = (min(pitch, HEIGHT - y) / level.downsample, min(pitch, WIDTH - x) / level.downsample)
            assert cell.shape[:2] == pytest.approx(size, abs=1)
            middle_x, middle_y = x + cell.shape[1] / 2 * level.downsample, y + cell.shape[0] / 2 * level.downsample
            assert cell[..., 0].mean() == pytest.approx(255 * middle_x / WIDTH, abs=3)
            assert cell[..., 1].mean() == pytest.approx(255 * middle_y / HEIGHT, abs=3)


def test_a_jpeg_is_as_fine_as_its_pixels(tmp_path: Path) -> None:
    pixels = np.zeros((4200, 4200, 3), np.uint8)
    pixels[1600:2600:2] = 255  # lines that any reduction turns grey
    Image.fromarray(pixels).save(tmp_path / "slide.jpg", quality=95)
    finest = picture(Slide(tmp_path / "slide.jpg"), np.array([[2100.0, 2100.0]]), 224.0).levels[-1]
    assert finest.downsample == 1
    assert decode(finest.cells[4, 4]).std() > 100


def test_the_coarsest_level_is_whole_and_the_finest_is_where_tiles_are(whole: SlidePicture) -> None:
    assert set(whole.levels[0].cells) == {(0, 0)}
    # tiles reach from 588 to 932 px and from 488 to 752: the border of cells at 512 is crossed downwards only
    assert set(whole.levels[-1].cells) == {(1, 0), (1, 1)}


def test_a_slide_keeps_within_its_budget_or_to_its_coarsest_level(slide: Slide, whole: SlidePicture) -> None:
    sizes = [level.n_bytes for level in whole.levels]
    for budget in (sum(sizes), sum(sizes) - 1, sum(sizes[:2]) + 1, 1):
        kept = picture(slide, SPOTS, 224.0, budget).levels
        assert sum(level.n_bytes for level in kept) <= budget or len(kept) == 1
    assert len(picture(slide, SPOTS, 224.0, sum(sizes) - 1).levels) < len(sizes)


def test_of_several_slides_the_finest_level_goes_first(whole: SlidePicture) -> None:
    coarse = SlidePicture(WIDTH, HEIGHT, 224.0, whole.levels[:2])
    everything = sum(level.n_bytes for slide in (whole, coarse) for level in slide.levels)
    assert share_budget({"a": whole, "b": coarse}, everything) == {"a": whole, "b": coarse}
    kept = share_budget({"a": whole, "b": coarse}, everything - 1)
    assert kept["a"].levels == whole.levels[:-1] and kept["b"] == coarse
    assert share_budget({"a": whole}, 0) == {}


def test_tiles_lie_where_their_names_say(tmp_path: Path) -> None:
    colours = np.random.default_rng(1).integers(30, 220, (70, 3))
    names = [f"S:{i}" for i in range(70)]
    made = sheet(names, (np.full((64, 64, 3), colour, np.uint8) for colour in colours))

    def check(held: Sheet) -> None:
        pixels = decode(held.jpeg)
        for i, name in enumerate(held.names):
            row, column = divmod(i, SHEET_COLUMNS)
            tile = pixels[row * SHEET_PX :, column * SHEET_PX :][:SHEET_PX, :SHEET_PX]
            # JPEG blends colours where tiles meet
            assert np.abs(tile[2:-2, 2:-2] - colours[names.index(name)]).max() < 12

    check(made)
    some = made.among(["S:69", "no tile", "S:3", "S:40"], most=2)
    assert some.names == ["S:69", "S:3"]
    check(some)
    assert made.among(["no tile"]) is None


def test_a_run_names_the_references_that_count_most_and_keeps_their_tiles(strict: Path) -> None:
    run, kept = ad.read_h5ad(strict / "predictions.h5ad"), ad.read_h5ad(strict / "embeddings.h5ad")
    chosen, model = json.loads(run.uns["stexp"]["chosen"]), RunFolder(strict).config["model"]
    assert (model["distance"], model["weighting"]) == ("l1", "inverse_square")
    reference = kept[~np.isnan(kept.obsm["spot_embedding"]).any(axis=1)]
    spots, table = reference.obsm["spot_embedding"].astype(float), run.uns["references"]
    for i in (0, 7, run.n_obs - 1):
        query = run.obsm["image_embedding"][i].astype(float)
        similarity = spots @ query / np.linalg.norm(spots, axis=1)
        nearest = np.argsort(-similarity)[: chosen["k"]]
        weight = 1 / np.abs(spots[nearest] - query).sum(axis=1) ** 2
        order = np.argsort(-weight)[:5]
        names = table.index.to_numpy()[run.obsm["neighbours"][i]]
        assert list(names) == list(reference.obs_names[nearest[order]])
        np.testing.assert_allclose(run.obsm["neighbour_weights"][i], weight[order] / weight.sum(), rtol=1e-3)
    slides, tiles = read(strict / NAME)
    assert list(slides) == list(run.obs["section"].unique())
    assert set(tiles.names) == set(table.index) and len(tiles.names) <= REFERENCES
    assert (table["section"] + ":" + table["spot"] == table.index).all()


def test_what_is_written_is_read(tmp_path: Path, whole: SlidePicture) -> None:
    path, tiles = tmp_path / "pictures.h5", sheet(["S:é"], [np.zeros((8, 8, 3), np.uint8)])
    assert read(path) == ({}, None)
    write(path, {"a/b <c>": whole}, tiles)
    assert read(path) == ({"a/b <c>": whole}, tiles)
    write(path, {})
    assert read(path) == ({}, None)
    path.write_bytes(b"\x89HDF half")
    with pytest.raises(InputError, match=r"pictures\.h5 cannot be read"):
        read(path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("cells", np.zeros(3)),
        ("cells", np.array([[4, 0, 0, 10**9]])),
        ("cells", np.full((1, 4), -5)),
        ("jpeg", np.zeros((2, 2))),
        ("width", 2.0**60),
        ("side_px", np.nan),
        ("height", "x"),
    ],
)
def test_a_slide_of_another_shape_is_refused(tmp_path: Path, whole: SlidePicture, where: str, value) -> None:
    path = tmp_path / "pictures.h5"
    write(path, {"a": whole})
    with h5py.File(path, "r+") as file:
        group = file["slides/0"]
        if where in group:
            del group[where]
            group[where] = value
        else:
            group.attrs[where] = value
    with pytest.raises(InputError, match=r"pictures\.h5 cannot be read: .*without it the report is made") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_an_error_that_is_kept_keeps_no_other_thread_from_reading(tmp_path: Path, whole: SlidePicture) -> None:
    path = tmp_path / "pictures.h5"
    write(path, {"A1": whole})
    with h5py.File(path, "r+") as file:
        file["slides/0"].attrs["width"] = -1
    with pytest.raises(InputError) as caught:  # as a notebook keeps it
        read(path)
    other: list[list[str]] = []

    def read_beside() -> None:
        with h5py.File(path, "r") as file:
            other.append(list(file))

    thread = Thread(target=read_beside, daemon=True)
    thread.start()
    thread.join(20)
    assert other == [["slides"]] and caught.value.__cause__ is not None


def test_slides_in_another_file_are_refused(tmp_path: Path, whole: SlidePicture) -> None:
    write(tmp_path / "other.h5", {"a": whole})
    write(tmp_path / "pictures.h5", {})
    with h5py.File(tmp_path / "pictures.h5", "r+") as file:
        file["slides"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/slides")
    with pytest.raises(InputError, match=r"pictures\.h5: slides is a link to the file"):
        read(tmp_path / "pictures.h5")
