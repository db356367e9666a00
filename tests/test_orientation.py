"""Images that lie another way than their spots, and those that do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stexp.data.demo import write_demo
from stexp.data.readers import her2st, samplesheet, visium
from stexp.data.section import Section
from stexp.data.slides import orientation
from stexp.data.slides.orientation import AS_IT_IS, OTHERS, Symmetry, doubt_of_picture, doubt_of_spots, doubts
from stexp.data.slides.slide import Slide
from stexp.data.slides.tissue import Tissue, tissue_mask

WAYS = {way.name: way for way in (AS_IT_IS, *OTHERS)}


def pillow(name: str) -> Image.Transpose | None:
    """What Pillow calls it."""
    transpose = Image.Transpose
    return {
        "as it is": None,
        "turned by 90 degrees clockwise": transpose.ROTATE_270,  # Pillow's turn the other way
        "turned by 180 degrees": transpose.ROTATE_180,
        "turned by 90 degrees counter-clockwise": transpose.ROTATE_90,
        "mirrored left to right": transpose.FLIP_LEFT_RIGHT,
        "mirrored top to bottom": transpose.FLIP_TOP_BOTTOM,
        "mirrored with x and y swapped": transpose.TRANSPOSE,
        "mirrored with x and y swapped, and turned by 180 degrees": transpose.TRANSVERSE,
    }[name]


def turned(image: np.ndarray, name: str) -> np.ndarray:
    method = pillow(name)
    return image if method is None else np.asarray(Image.fromarray(image).transpose(method))


@pytest.mark.parametrize("name", WAYS)
def test_a_way_turns_images_as_pillow_does_and_positions_with_them(name):
    image = np.zeros((40, 60), np.uint8)
    image[3, 50] = 255  # x 50, y 3
    now = turned(image, name)
    np.testing.assert_array_equal(WAYS[name].turn(image), now)
    (y,), (x,) = now.nonzero()
    np.testing.assert_allclose(WAYS[name].place(np.array([[50.5, 3.5]]), now.shape[::-1]), [[x + 0.5, y + 0.5]])


@pytest.fixture(scope="module")
def section():
    """A section of 60 x 40 spots whose tissue has no symmetry: mask, spots on it."""
    y, x = np.mgrid[:80, :120]
    mask = ((x - 45) / 40) ** 2 + ((y - 32) / 25) ** 2 < 1
    mask |= (x > 60) & (x < 110) & (y > 30) & (y < 40)
    places = np.stack(np.mgrid[1:119:2, 1:79:2], axis=-1).reshape(-1, 2) * 10.0 + 5
    return mask, places[mask[(places[:, 1] // 10).astype(int), (places[:, 0] // 10).astype(int)]]


@pytest.mark.parametrize("name", WAYS)
def test_made_up_tissue_that_was_turned_is_noticed(section, name):
    mask, xy = section
    now = turned(mask.astype(np.uint8), name).astype(bool)
    size = (10 * now.shape[1], 10 * now.shape[0])
    inside = ((xy >= 0) & (xy < size)).all(axis=1)  # others are refused before
    doubt = doubt_of_spots(xy[inside], np.ones(inside.sum()), Tissue(now, 10.0), size)
    if name == "as it is":
        assert doubt is None
    else:
        assert f"its image looks {name} against the spots" in doubt and "of its spots lie off tissue" in doubt


@pytest.mark.parametrize("name", WAYS)
def test_counts_tell_where_spots_cover_the_whole_image(section, name):
    mask, _ = section
    xy = np.stack(np.mgrid[:80:2, :80:2], axis=-1).reshape(-1, 2) * 10.0 + 10
    square = mask[:, :80]
    counts = np.where(square[(xy[:, 1] // 10).astype(int), (xy[:, 0] // 10).astype(int)], 3000, 40)
    doubt = doubt_of_spots(xy, counts, Tissue(turned(square.astype(np.uint8), name).astype(bool), 10.0), (800, 800))
    if name == "as it is":
        assert doubt is None
    else:
        assert f"its image looks {name} against the spots" in doubt and "of its counts lie off tissue" in doubt


def test_what_fits_no_way_much_better_is_left_alone():
    rng = np.random.default_rng(0)
    for _ in range(200):  # spots of one half on tissue by chance
        mask = np.repeat(np.repeat(rng.random((10, 10)) < 0.9, 10, 0), 10, 1)
        xy = np.stack(np.mgrid[:20, :20], axis=-1).reshape(-1, 2) * 50.0 + 25
        assert doubt_of_spots(xy, rng.poisson(1000, 400), Tissue(mask, 10.0), (1000, 1000)) is None
    few = np.array([[5.0, 5], [15, 5], [25, 5], [35, 5]])
    mask = np.zeros((10, 10), bool)
    mask[:, 5:] = True
    assert doubt_of_spots(few, np.ones(4), Tissue(mask, 10.0), (100, 100)) is None
    assert doubt_of_spots(few, np.zeros(4), Tissue(~mask, 10.0), (100, 100)) is None


def when_turned(section: Section) -> Iterator[tuple[Symmetry, str | None]]:
    """The other symmetries of the square, and what is said of a section whose image is turned so."""
    tissue, (width, height) = tissue_mask(section.slide, section.um_per_px), section.slide.size
    for way in OTHERS:
        size = (height, width) if way.swapped else (width, height)
        turned = Tissue(way.turn(tissue.mask), tissue.downsample)
        yield way, doubt_of_spots(section.xy_px, section.total_counts, turned, size)


@pytest.mark.slow
def test_demo_sections_lie_right_and_are_noticed_when_turned(tmp_path):
    sections = samplesheet.read_samplesheet(write_demo(tmp_path / "demo", patients=4, sections_per_patient=1))
    noticed = 0
    for section in sections:
        assert doubts(section) == []
        for way, doubt in when_turned(section):
            assert doubt is None or f"looks {way.name} against" in doubt
            noticed += doubt is not None
    assert noticed >= 24  # of 28: some tissue is nearly its own mirror image


# pictures


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(60, 250, (5, 7, 3), dtype=np.uint8))
    path = tmp_path_factory.mktemp("picture") / orientation.HIRES
    coarse.resize((700, 500), Image.Resampling.BICUBIC).save(path)
    return path


def saved(image: np.ndarray, path: Path) -> Slide:
    Image.fromarray(image).save(path)
    return Slide(path)


@pytest.mark.parametrize("name", WAYS)
def test_an_image_is_compared_with_the_picture_by_its_content(tmp_path, picture, name):
    square = name in ("as it is",) or not WAYS[name].swapped
    image = np.asarray(Image.open(picture))
    if not square:  # of other sides it is no reduced copy, which the reader refuses
        image = image[:, :500]
        picture = saved(image, tmp_path / orientation.HIRES).path
    doubt = doubt_of_picture(saved(turned(image, name), tmp_path / "image.png"), Slide(picture))
    if name == "as it is":
        assert doubt is None
    else:
        assert f"its image looks {name} against {orientation.HIRES}" in doubt


def test_another_image_is_not_taken_for_the_picture(tmp_path, picture):
    other = np.random.default_rng(4).integers(60, 250, (5, 7, 3), dtype=np.uint8)
    other = np.asarray(Image.fromarray(other).resize((700, 500), Image.Resampling.BICUBIC))
    assert "does not look like" in doubt_of_picture(saved(other, tmp_path / "other.png"), Slide(picture))
    blank = np.full((500, 700, 3), 200, np.uint8)
    assert doubt_of_picture(saved(blank, tmp_path / "blank.png"), Slide(picture)) is None
    jpeg = tmp_path / "paler.jpg"  # compressed, paler, of another size
    Image.open(picture).resize((1400, 1000)).point(lambda level: 100 + level // 2).save(jpeg, quality=40)
    assert doubt_of_picture(Slide(jpeg), Slide(picture)) is None


@pytest.mark.slow
@pytest.mark.data
def test_real_sections_lie_right(real_data):
    sections = her2st.read_her2st(real_data / "her2st", sections=["B4", "C3"])
    sections += visium.read_visium(real_data / "visium_mouse_colon")
    for section in sections:
        assert doubts(section) == []
        for way, doubt in when_turned(section):
            assert doubt is not None and f"looks {way.name} against" in doubt
