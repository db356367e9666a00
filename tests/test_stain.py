from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from encoders import frozen
from sections import make_section
from torch import nn

from stexp.data.augment import augment
from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.data.readers import her2st
from stexp.data.section import Section
from stexp.data.slides import stain as module
from stexp.data.slides.stain import METHODS, StainNormaliser, intensity, optical_density
from stexp.errors import InputError
from stexp.protocol import Protocol

STRICT = Protocol("strict", n_hvg=12, panel_size=10, min_spots=0)
PURPLE = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # haematoxylin, eosin
RED = np.array([[0.55, 0.76, 0.34], [0.18, 0.93, 0.30]])  # the same stains in another laboratory


def stained(
    vectors: np.ndarray, strength: float = 1.0, n: int = 12, px: int = 32, seed: int = 0, glass=(255, 255, 255)
) -> np.ndarray:
    """Tiles (n, px, px, 3) of two stains: mixtures, nuclei of one alone, stroma of the other, and glass."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(4.0, 0.12, (n * px * px, 2)) + 0.1
    kind = rng.choice(4, len(amounts), p=[0.6, 0.1, 0.1, 0.2])
    amounts *= np.array([[1, 1], [1, 0], [0, 1], [0, 0]])[kind]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pixels = (np.array(glass) + 1) * np.exp(-strength * amounts @ vectors) - 1
    return pixels.round().clip(0, 255).astype(np.uint8).reshape(n, px, px, 3)


def fit(method: str, *stores: np.ndarray, trained_on: int = 1) -> StainNormaliser:
    """The first `trained_on` sections train."""
    training = [np.full(len(tiles), i < trained_on) for i, tiles in enumerate(stores)]
    return StainNormaliser.fit(method, [f"S{i}" for i in range(len(stores))], stores, training)


def mapped(normaliser: StainNormaliser, tiles: np.ndarray, section: int) -> np.ndarray:
    return normaliser(torch.from_numpy(tiles), torch.full((len(tiles),), section)).numpy()


def degrees(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Between the rows of two arrays."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    return np.rad2deg(np.arccos((a * b).sum(1).clip(-1, 1)))


# the definitions, one pixel after the other


def glass_and_tissue(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pixels = module._sample(tiles, np.arange(len(tiles))).astype(float)
    glass = np.array([np.percentile(channel, 95) for channel in pixels.T])
    return glass, pixels[pixels.mean(1) < glass.mean() * np.exp(-0.15)]


def slow_macenko_parameters(tiles: np.ndarray) -> list[np.ndarray]:
    """Glass, stain vectors, 99th percentiles of their amounts."""
    glass, tissue = glass_and_tissue(tiles)
    density = -np.log((tissue + 1) / (glass + 1))
    first, second, _ = np.linalg.svd(density, full_matrices=False)[2]
    first = first if first.sum() > 0 else -first
    angles = [np.arctan2(row @ second, row @ first) for row in density]
    vectors = [np.cos(angle) * first + np.sin(angle) * second for angle in np.percentile(angles, [1, 99])]
    vectors = np.array(sorted(vectors, key=lambda vector: -vector[0]))
    amounts = np.array([np.linalg.lstsq(vectors.T, row, rcond=None)[0] for row in density])
    return [glass, vectors, np.percentile(amounts, 99, axis=0)]


def slow_macenko(pixels: np.ndarray, own: list[np.ndarray], target: list[np.ndarray]) -> np.ndarray:
    out = []
    for pixel in pixels.astype(float):
        amounts = np.linalg.lstsq(own[1].T, -np.log((pixel + 1) / (own[0] + 1)), rcond=None)[0]
        out.append((target[0] + 1) * np.exp(-(amounts / own[2] * target[2]) @ target[1]) - 1)
    return np.array(out)


def test_macenko_equals_a_loop_over_pixels():
    stores = [stained(PURPLE, n=4), stained(RED, 0.7, n=4, seed=1, glass=(225, 205, 220))]
    normaliser = fit("macenko", *stores)
    target, own = (slow_macenko_parameters(tiles) for tiles in stores)
    for key, value in zip(("glass", "stains", "strength"), target, strict=True):
        np.testing.assert_allclose(normaliser.target[key], value, atol=1e-6)
    expected = slow_macenko(stores[1][0].reshape(-1, 3), own, target).clip(0, 255)
    np.testing.assert_allclose(mapped(normaliser, stores[1][:1], 1).reshape(-1, 3), expected, atol=0.51)


def test_density_and_intensity_are_inverse():
    levels = torch.arange(256.0)
    density = optical_density(levels)
    assert density[255] == 0 and density[0] == pytest.approx(np.log(256))
    torch.testing.assert_close(intensity(density), levels, atol=1e-3, rtol=0)


# what they are for


@pytest.mark.parametrize("vectors", [PURPLE, RED])
@pytest.mark.parametrize("glass", [(255, 255, 255), (223, 197, 222)])
def test_macenko_finds_the_stains(vectors, glass):
    target = fit("macenko", stained(vectors, 1.3, glass=glass)).target
    np.testing.assert_allclose(target["glass"], glass, atol=1)
    np.testing.assert_allclose(np.linalg.norm(target["stains"], axis=1), 1)
    assert degrees(target["stains"], vectors).max() < 2
    half = fit("macenko", stained(vectors, 0.65, glass=glass)).target
    np.testing.assert_allclose(half["strength"], target["strength"] / 2, rtol=0.05)


def test_a_model_of_a_method_that_left_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"reinhard is no longer there; data\.stain=macenko"):
        StainNormaliser.towards({"method": "reinhard", "target": {}}, "slide", {}, 0)


def test_macenko_maps_one_laboratory_onto_another():
    first, second = stained(PURPLE), stained(RED, 0.7, glass=(225, 205, 220))  # the same tissue
    got = mapped(fit("macenko", first, second), second, 1)
    before, after = (np.abs(x.astype(float) - first).mean() for x in (second, got))
    assert before > 15 and after < 2


@pytest.mark.parametrize("method", METHODS)
def test_a_section_that_is_the_target_stays_as_it_is(method):
    tiles = stained(PURPLE, glass=(240, 230, 238))
    assert np.abs(mapped(fit(method, tiles), tiles, 0).astype(int) - tiles).max() <= 2


@pytest.mark.parametrize("method", METHODS)
def test_glass_becomes_the_glass_of_the_target(method):
    for there in ((255, 255, 255), (240, 228, 236)):
        normaliser = fit(method, stained(PURPLE, glass=there), stained(RED, 0.7, glass=(225, 205, 220)))
        glass = np.broadcast_to(np.uint8([225, 205, 220]), (1, 4, 4, 3)).copy()
        assert np.abs(mapped(normaliser, glass, 1).astype(int) - there).max() <= 2
        white = np.full((1, 4, 4, 3), 255, np.uint8)
        assert mapped(normaliser, white, 1).min() >= 250


@pytest.mark.parametrize("method", METHODS)
def test_the_target_is_the_median_over_sections_however_large(method):
    stores = [stained(PURPLE, n=20), stained(RED, seed=1), stained(RED, seed=2)]
    target = fit(method, *stores, trained_on=3).target
    alone = [fit(method, tiles).target for tiles in stores]
    for key, value in target.items():
        np.testing.assert_allclose(value, np.median([one[key] for one in alone], axis=0), rtol=1e-3)
    odd, usual = (max(np.abs(target[key] - one[key]).max() for key in target) for one in alone[:2])
    assert odd > 5 * usual


@pytest.mark.parametrize("method", METHODS)
def test_only_tiles_that_train_make_the_target(method):
    train, other, third = stained(PURPLE), stained(RED, 0.6, seed=1), stained(RED, 1.3, seed=2)
    some, none = np.arange(24) < 12, np.zeros(12, bool)

    def fitted(used: np.ndarray, rest: np.ndarray, held_out: np.ndarray) -> StainNormaliser:
        return StainNormaliser.fit(method, ["A", "B"], [np.concatenate([train, rest]), held_out], [used, none])

    mixed, swapped = fitted(some, other, third), fitted(some, third, other)
    assert mixed.state() == swapped.state()
    assert mixed.key(0) != swapped.key(0)  # while a section's own map follows all its tiles
    whole = fitted(~none.repeat(2), other, third).target
    assert max(np.abs(whole[key] - mixed.target[key]).max() for key in whole) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_tile_is_mapped_alike_in_any_batch_and_nothing_is_drawn_from_the_global_streams(method):
    stores = [stained(PURPLE), stained(RED, 0.7)]
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    normaliser, drawn = fit(method, *stores), (np.random.rand(), torch.rand(1))  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    assert drawn == (np.random.rand(), torch.rand(1))  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    again = fit(method, *stores)
    assert torch.equal(again.matrix, normaliser.matrix) and torch.equal(again.offset, normaliser.offset)
    tiles, section = torch.from_numpy(np.concatenate(stores)), torch.arange(24) // 12
    before = tiles.clone()
    together = normaliser(tiles, section)
    assert torch.equal(tiles, before) and together.dtype == torch.uint8
    for i in (0, 5, 12, 23):
        assert torch.equal(normaliser(tiles[i : i + 1], section[i : i + 1])[0], together[i])
    assert not torch.equal(together[12:], normaliser(tiles[12:], section[:12]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_gives_what_the_cpu_gives(method):
    normaliser, tiles = fit(method, stained(PURPLE), stained(RED, 0.7)), torch.from_numpy(stained(RED, 0.7))
    section = torch.ones(len(tiles), dtype=torch.int64)
    difference = (normaliser(tiles.cuda(), section).cpu().int() - normaliser(tiles, section).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_sections_without_a_stain_are_refused(method):
    good, glass = stained(PURPLE), np.full((4, 32, 32, 3), 243, np.uint8)
    with pytest.raises(InputError, match=r"section S1: 0 of 4096 sampled pixels show tissue.*data\.stain=null"):
        fit(method, good, glass)
    gray = np.random.default_rng(0).integers(20, 200, (4, 32, 32, 1), dtype=np.uint8).repeat(3, axis=3)
    with pytest.raises(InputError, match="section S1: the colours of its tissue do not determine its stain"):
        fit(method, good, gray)


# in a data set


def section_of(tmp_path, name: str, vectors: np.ndarray, strength: float = 1.0, seed: int = 0) -> Section:
    image = stained(vectors, strength, 1, 120, seed)[0]
    return make_section(tmp_path, name, name[0], 25, image=image, seed=seed)


@pytest.fixture
def sections(tmp_path) -> list[Section]:
    """Two patients that train (one validates), one that is tested, and one without an image."""
    made = [section_of(tmp_path, "A1", RED, 0.7, 1), section_of(tmp_path, "B1", PURPLE, 1.0, 2)]
    made += [section_of(tmp_path, "C1", RED, 1.2, 3), make_section(tmp_path, "D1", "D", 9, image=False, seed=4)]
    return made


def data_of(sections, tmp_path, **kwargs) -> SpotDataModule:
    kwargs = {"tile_px": 16, "batch_size": 8, "eval_batch_size": 10, **kwargs}
    return SpotDataModule(sections, STRICT, "A", cache_dir=str(tmp_path / "cache"), **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_the_target_of_a_fold_knows_neither_validation_nor_test(sections, tmp_path, method):
    data = data_of(sections, tmp_path, stain=method)
    data.setup()
    assert (data.names("train"), data.names("validation"), data.names("test")) == (["B1"], ["C1"], ["A1"])
    assert data.normaliser.state() == fit(method, data.bank.stores[1]).state()
    for i, target_moves in ((0, False), (2, False), (1, True)):
        changed = list(sections)
        (tmp_path / f"other{i}").mkdir()
        changed[i] = section_of(tmp_path / f"other{i}", sections[i].name, RED, 0.9, 8)
        other = data_of(changed, tmp_path, stain=method).normaliser
        assert (other.state() != data.normaliser.state()) == target_moves
        moved = [other.key(section) != data.normaliser.key(section) for section in range(3)]
        # the section that trains is its own target; Macenko still drops what is outside its plane
        assert moved == [i != 2, i == 1 and method == "macenko", i != 0]


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_normalised_before_they_are_augmented(sections, tmp_path, method):
    data, plain = data_of(sections, tmp_path, stain=method), data_of(sections, tmp_path)
    rows = torch.from_numpy(np.concatenate([data.rows(role)[:4] for role in ("test", "train", "validation")]))
    raw, code = plain.tiles(rows.numpy()), torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    expected = data.normaliser(raw, code)
    assert torch.equal(data.tiles(rows.numpy()), expected)
    torch.testing.assert_close(data.batch(SpotIndex(rows)).image, augment(expected, "none", 0), rtol=0, atol=0)
    torch.testing.assert_close(data.batch(SpotIndex(rows, 7)).image, augment(expected, "paper", 7), rtol=0, atol=0)
    tested, target = (augment(expected, "none", 0)[where].mean((0, 2, 3)) for where in (slice(4), slice(4, 8)))
    assert (tested - target).abs().max() < 0.5 * (raw[:4].float().mean((0, 1, 2)) / 255 - target).abs().max()


def test_hed_takes_its_strength_from_the_config(sections, tmp_path):
    data = data_of(sections, tmp_path, augmentation="hed", hed_sigma=0.2)
    rows = torch.from_numpy(data.rows("train"))
    expected = augment(data.tiles(rows.numpy()), "hed", 3, 0.2)
    torch.testing.assert_close(data.batch(SpotIndex(rows, 3)).image, expected, rtol=0, atol=0)


def test_a_checkpoint_of_another_stain_is_refused(sections, tmp_path):
    settings = {stain: data_of(sections, tmp_path, stain=stain) for stain in (None, *METHODS)}
    assert len({data.digest for data in settings.values()}) == 2
    for saved, data in settings.items():
        state = data.state_dict()
        assert state["stain"] == (saved and data.normaliser.state())
        assert json.loads(json.dumps(state["stain"])) == state["stain"]
        for loaded, other in settings.items():
            if loaded == saved:
                other.load_state_dict(state)
                continue
            with pytest.raises(InputError, match=f"with data.stain={saved or 'null'}, not {loaded or 'null'}"):
                other.load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stain": "vahadane"}, r"data\.stain=vahadane: choose macenko, or null"),
        ({"stain": "reinhard"}, r"data\.stain=reinhard is no longer there; data\.stain=macenko, or null"),
        ({"hed_sigma": 1.5}, r"data\.hed_sigma=1\.5: a number from 0 to below 1"),
        ({"hed_sigma": "much"}, r"data\.hed_sigma=much: a number"),
    ],
)
def test_arguments_that_do_not_fit(sections, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        data_of(sections, tmp_path, **wrong)


class MeanColour(nn.Module):
    """Stands in for an image encoder."""

    name, num_features, output, input_size = "mean colour", 3, "pooled", None

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(3, 3)
        self.mean = self.std = torch.ones(1)
        self.built_as = "mean"
        self.tiles = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.tiles += len(image)
        return self.model(image.mean((2, 3)))


def test_frozen_features_are_of_normalised_tiles_and_kept_apart(sections, tmp_path):
    encoder, found = MeanColour(), {}
    for stain in (None, *METHODS, None, *METHODS):
        data = data_of(sections, tmp_path, stain=stain, encoder=frozen(encoder, tmp_path))
        rows, got = data.rows("train", "validation", "test"), data.features
        expected = encoder.model(data.batch(SpotIndex(torch.from_numpy(rows))).image.mean((2, 3))).detach()
        np.testing.assert_allclose(got[rows], expected, atol=1e-6)
        assert np.isnan(got[data.rows("reference")]).all()
        found.setdefault(stain, got[rows])
        np.testing.assert_array_equal(found[stain], got[rows])
    assert encoder.tiles == 2 * 75  # the second round reads what the first has kept
    assert all(np.abs(found[None] - found[method]).max() > 0.01 for method in METHODS)


@pytest.mark.slow
@pytest.mark.data
def test_a_section_of_another_patient_measures_like_the_target(real_data, tmp_path):
    sections = her2st.read_her2st(real_data / "her2st", ["B4", "C2"])
    cut = {"tile_px": 64, "tile_um": 154, "panel": sections[0].genes[:20], "cache_dir": str(tmp_path)}
    for method in METHODS:
        data = SpotDataModule(sections, Protocol("strict", validation=False), "B", stain=method, **cut)
        rows = data.rows("test")
        mapped = data.tiles(rows).numpy()
        raw, pixels = (module._sample(tiles, np.arange(len(rows))) for tiles in (data.bank.stores[0], mapped))
        glass, target = np.percentile(pixels, 95, axis=0), data.normaliser.target
        np.testing.assert_allclose(glass, target["glass"], atol=3)
        tissue = raw.mean(1) < np.percentile(raw, 95, axis=0).mean() * np.exp(-0.15)
        before = module._macenko(raw[tissue], np.percentile(raw, 95, axis=0))
        after = module._macenko(pixels[tissue], glass)
        for key, value in after.items():
            assert np.abs(value - target[key]).max() < 0.4 * np.abs(before[key] - target[key]).max(), (method, key)
