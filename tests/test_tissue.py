from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from stexp.data.readers.formats import read_positions
from stexp.data.slides.slide import Slide
from stexp.data.slides.tissue import Tissue, find_tissue, tissue_mask
from stexp.errors import InputError

UM = 4.0  # of the pictures drawn here
GLASS = {"white": (243, 242, 244), "grey": (168, 168, 170), "pinkish": (240, 220, 236)}
HAEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.14, 0.80, 0.38])


def drawn(height: int = 420, width: int = 600, glass=GLASS["white"], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A picture of an oval piece of stained tissue left of the middle, and where it is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    tissue = ((x - 0.35 * width) / (0.25 * width)) ** 2 + ((y - 0.5 * height) / (0.35 * height)) ** 2 < 1
    nuclei = rng.random((height, width)) < 0.15
    density = (0.2 + 0.05 * rng.standard_normal((height, width)))[..., None] * EOSIN + nuclei[..., None] * HAEMATOXYLIN
    light = np.array(glass) * 10 ** -(tissue[..., None] * density.clip(0))
    return np.clip(light + 1.5 * rng.standard_normal(light.shape), 0, 255).astype(np.uint8), tissue


def overlap(found: np.ndarray, tissue: np.ndarray) -> float:
    """Intersection over union."""
    return (found & tissue).sum() / (found | tissue).sum()


@pytest.mark.parametrize("glass", list(GLASS))
@pytest.mark.parametrize("um", [4.0, 8.0])
def test_tissue_is_told_from_glass_of_any_tint(glass, um):
    image, tissue = drawn(glass=GLASS[glass])
    assert overlap(find_tissue(image, um), tissue) > 0.93


def test_what_a_scanner_left_black_is_no_tissue_and_neither_is_its_border():
    image, tissue = drawn()
    outside = np.ones(tissue.shape, dtype=bool)
    outside[25:-25, 25:-40] = False
    image[outside] = 0
    found = find_tissue(image, UM)
    assert overlap(found, tissue) > 0.93 and not found[outside].any()
    assert not found[:, -60:].any()


@pytest.mark.parametrize("ink", [(40, 60, 160), (40, 130, 70), (15, 15, 18)])
def test_strokes_of_a_pen_are_no_tissue(ink):
    image, tissue = drawn()
    image[60:85, 400:560] = ink  # 100 um wide
    image[100:380, 500:530] = ink
    found = find_tissue(image, UM)
    assert overlap(found, tissue) > 0.93 and not found[:, 390:].any()


def test_dust_and_the_frame_of_a_visium_slide_are_no_tissue():
    image, tissue = drawn()
    rng = np.random.default_rng(1)
    for x, y in rng.integers((400, 10), (580, 400), (30, 2)):  # specks of 20 um
        image[y : y + 5, x : x + 5] = (90, 80, 85)
    y, x = np.mgrid[:420, :600]
    for middle in range(20, 420, 40):  # rings of 105 um, 160 um apart
        ring = np.abs(np.hypot(x - 585, y - middle) - 12) < 1.2
        image[ring] = (160, 120, 160)
    found = find_tissue(image, UM)
    assert overlap(found, tissue) > 0.93 and not found[:, 390:].any()


def test_eosin_that_bled_into_glass_is_no_tissue():
    image, tissue = drawn()
    y, x = np.mgrid[:420, :600]
    bled = 0.2 * np.exp(-(((x - 420) / 60) ** 2) - ((y - 200) / 90) ** 2)  # as strong as the tissue's own
    faded = (image * 10 ** -(np.where(tissue, 0, bled)[..., None] * EOSIN)).astype(np.uint8)
    assert faded[200, 420, 1] < 175 < image[200, 420, 1]  # a threshold of colour would take it
    assert overlap(find_tissue(faded, UM), tissue) > 0.93


def test_fat_is_filled_and_wide_gaps_are_not():
    image, _ = drawn()
    y, x = np.mgrid[:420, :600]
    fat, gap = np.hypot(x - 150, y - 200) < 12, np.hypot(x - 260, y - 200) < 35  # 96 and 280 um across
    image[fat | gap] = GLASS["white"]
    found = find_tissue(image, UM)
    assert found[fat].all() and found[gap].mean() < 0.2


def test_dense_tissue_without_texture_counts_and_bare_glass_does_not():
    glass, _ = drawn()
    glass[:] = np.random.default_rng(0).normal(240, 1.5, glass.shape).astype(np.uint8)
    assert not find_tissue(glass, UM).any()
    lake = glass.copy()
    lake[100:300, 100:300] = (glass[100:300, 100:300] * 10 ** -(0.5 * EOSIN)).astype(np.uint8)
    found = find_tissue(lake, UM)
    assert found[105:295, 105:295].all() and found.sum() < 1.1 * 200 * 200
    lake[100:300, 100:300] = 130  # a shadow or a label is grey
    assert not find_tissue(lake, UM)[120:280, 120:280].any()


def test_a_slide_full_of_tissue_is_found_whole():
    image, _ = drawn()
    assert find_tissue(image[100:300, 120:300], UM).mean() > 0.98


def test_an_image_of_other_kinds_is_refused():
    with pytest.raises(InputError, match=r"must be \(height, width, 3\) uint8, got \(4, 4\) float64"):
        find_tissue(np.zeros((4, 4)), UM)


def test_the_mask_of_a_slide_lies_where_its_tissue_is(tmp_path):
    image, tissue = drawn()
    large = np.asarray(Image.fromarray(image).resize((1200, 840), Image.Resampling.BICUBIC))
    Image.fromarray(large).save(tmp_path / "slide.png")
    slide = Slide(tmp_path / "slide.png")
    found = tissue_mask(slide, 2.0)
    assert found.mask.shape == (420, 600) and found.downsample == pytest.approx(2)
    assert overlap(found.mask, tissue) > 0.93
    guessed = tissue_mask(slide)  # 1,200 px for 10 mm: 8.3 um/px, reduced no further
    assert guessed.downsample == 1 and overlap(guessed.mask, np.kron(tissue, np.ones((2, 2), bool))) > 0.9


def test_the_share_of_tissue_equals_that_of_an_enlarged_mask():
    rng = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.standard_normal((12, 17)), 1) > 0
    tissue = Tissue(mask, 10.0)
    full = np.pad(np.kron(mask, np.ones((10, 10))), 60)  # beyond the border there is none
    xy, side = np.stack([rng.integers(0, 170, 60), rng.integers(0, 120, 60)], axis=1), 26
    slow = [full[y + 60 - 13 : y + 60 + 13, x + 60 - 13 : x + 60 + 13].mean() for x, y in xy]
    np.testing.assert_allclose(tissue.share(xy, side), slow, atol=1e-12)
    inside = mask.repeat(10, 0).repeat(10, 1)[xy[:, 1], xy[:, 0]]
    np.testing.assert_allclose(tissue.share(xy + 0.5, 0.1), inside, atol=1e-9)


@pytest.mark.data
@pytest.mark.parametrize("name", ["B4", "C3", "colon"])
def test_measured_spots_lie_on_the_tissue_that_is_found(real_data, name):
    if name == "colon":
        folder, um = real_data / "visium_mouse_colon", 0.97
        image, spots = folder / "image.tif", folder / "spatial" / "tissue_positions.csv"
    else:
        (image,) = (real_data / "her2st" / "ST-imgs" / name[0] / name).glob("*.jpg")
        um, spots = 0.688, real_data / "her2st" / "ST-spotfiles" / f"{name}_selection.tsv"
    xy = read_positions(spots)[["pixel_x", "pixel_y"]].to_numpy()
    tissue = tissue_mask(Slide(image), um)
    assert (tissue.share(xy, 100 / um) >= 0.5).mean() > 0.995
    place = np.zeros(tissue.mask.shape, dtype=bool)
    place[tuple((xy.T[::-1] / tissue.downsample).astype(int))] = True
    far = ndimage.distance_transform_edt(~place) * tissue.downsample
    pitch = 103 if name == "colon" else 290
    assert (far[tissue.mask] < pitch).mean() > 0.99
