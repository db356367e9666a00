"""Frozen features: of which tiles, under which key, computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sections import make_section, make_sections

from stexp.data.datamodule import SpotDataModule
from stexp.data.slides.formats import WHITE
from stexp.data.slides.tiles import TileSpec, around, open_tiles, tiles_around
from stexp.errors import InputError
from stexp.models.encoders import frozen as frozen_module
from stexp.models.encoders.frozen import FrozenEncoder
from stexp.models.encoders.image import ImageEncoder
from stexp.protocol import Protocol

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder("test_resnet", pretrained=False)


def forbidden(*args, **kwargs):
    raise LookupError("computed again")


def make_data(folder: Path, encoder: ImageEncoder, context=None, **kwargs) -> SpotDataModule:
    sections = make_sections(folder, patients=2, n_spots=12)
    # between the others: its spots have no tiles, and none around them
    sections.insert(1, make_section(folder, "A9", "A", 12, seed=9, image=False))
    panel = [f"g{i:02d}" for i in range(30)]
    sizes = {"tile_px": 16, "eval_batch_size": 5, "augmentation": "none"}
    sizes |= {"cache_dir": str(folder / "cache"), "encoder": FrozenEncoder(encoder, CPU, context, folder / "cache", 5)}
    return SpotDataModule(sections, Protocol("strict"), "B", panel=panel, **sizes | kwargs)


def pixels_around(image: np.ndarray, x: int, y: int, side: int, k: int) -> tuple[list[np.ndarray], list[bool]]:
    """The k x k tiles around the pixel (x, y), white beyond the image, and the original's masking table.

    That one works from the outermost ring of tiles inwards: where the window of so many tiles crosses a border of the
    image, the row or column of the ring at that border is masked.
    """
    far = side * k
    padded = np.full((image.shape[0] + 2 * far, image.shape[1] + 2 * far, 3), WHITE, dtype=np.uint8)
    padded[far:-far, far:-far] = image
    left, top = x - side // 2 - side * (k // 2) + far, y - side // 2 - side * (k // 2) + far
    tiles = [
        padded[top + side * row : top + side * (row + 1), left + side * column : left + side * (column + 1)]
        for row in range(k)
        for column in range(k)
    ]
    seen = np.ones((k, k), dtype=bool)
    for ring in range(k // 2):
        half = side / 2 * (k - 2 * ring)
        if y - half < 0:
            seen[ring] = False
        if y + half > image.shape[0]:
            seen[k - 1 - ring] = False
        if x - half < 0:
            seen[:, ring] = False
        if x + half > image.shape[1]:
            seen[:, k - 1 - ring] = False
    return tiles, seen.ravel().tolist()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_tiles_around_a_spot_meet_edge_to_edge_and_are_masked_as_the_original_masks(tmp_path, k):
    section, spec = make_section(tmp_path, n=30), TileSpec(px=16)
    image = section.slide.read()
    found = np.full((30 * k * k, 16, 16, 3), 77, dtype=np.uint8)
    _, inside = around(section, spec, k)
    cut = []
    for rows, tiles in tiles_around(section, spec, k):
        found[rows] = tiles
        cut.extend(rows)
    assert sorted(cut) == np.flatnonzero(inside).tolist() and inside[:, k * k // 2].all()
    for spot, (x, y) in enumerate(np.floor(section.xy_px).astype(int)):
        expected, seen = pixels_around(image, x, y, 16, k)
        assert inside[spot].tolist() == seen
        for place in np.flatnonzero(seen):
            np.testing.assert_array_equal(found[spot * k * k + place], expected[place])
    assert k == 1 or 0.3 < inside.mean() < 0.9


def test_tiles_around_have_the_scale_of_the_spots_own(tmp_path):
    section, spec = make_section(tmp_path, image_px=200, um_per_px=0.5), TileSpec(px=8, um=12.0)
    store = open_tiles(section, spec, tmp_path)
    found = dict(pair for rows, tiles in tiles_around(section, spec, 3) for pair in zip(rows, tiles, strict=True))
    for spot in range(len(section)):
        np.testing.assert_array_equal(found[spot * 9 + 4], store[spot])
    corner, _ = around(section, spec, 3)
    assert (corner[:, 5] - corner[:, 4] == (24, 0)).all() and (corner[:, 7] - corner[:, 4] == (0, 24)).all()


def test_of_wider_tiles_fewer_are_encoded_at_once(tmp_path, encoder, monkeypatch):
    forward, counts = ImageEncoder.forward, []
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, image: counts.append(len(image)) or forward(self, image))
    section = make_section(tmp_path, n=10)
    features = []
    for usual in (16, 8):
        monkeypatch.setattr(frozen_module, "USUAL_PX", usual)
        frozen = FrozenEncoder(encoder, CPU, None, tmp_path / str(usual), 8)
        with frozen:
            features.append(frozen.of_tiles(section, open_tiles(section, TileSpec(px=16), tmp_path)))
    assert counts == [8, 2, *[2] * 5]
    np.testing.assert_allclose(features[1], features[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_surroundings_are_encoded_once_and_served_by_spot(tmp_path, encoder, monkeypatch):
    data = make_data(tmp_path, encoder)
    found = data.surroundings(3)
    assert data.surroundings(3) is found
    with_image = np.flatnonzero(data.spots["section"] != "A9")
    assert not found.inside[data.spots["section"] == "A9"].any()
    rows = np.random.default_rng(0).permutation(with_image)[:20]
    served = found[rows]
    encoder.eval()
    for row, features in zip(rows, served, strict=True):
        section = next(s for s in data.sections if s.name == data.spots["section"].iloc[row])
        x, y = np.floor(data.xy_px[row]).astype(int)
        tiles, seen = pixels_around(section.slide.read(), x, y, 16, 3)
        assert found.inside[row].tolist() == seen
        image = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2) / 255
        np.testing.assert_allclose(features[seen], encoder(image).numpy()[seen], rtol=1e-4, atol=1e-5)
        assert not features[~np.array(seen)].any()
    own = data.features
    np.testing.assert_allclose(served[:, 4], own[rows], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(ImageEncoder, "forward", forbidden)
    again = make_data(tmp_path, encoder)
    np.testing.assert_array_equal(again.surroundings(3)[rows], served)
    np.testing.assert_array_equal(again.features, own)
    with pytest.raises(LookupError, match="computed again"):
        again.surroundings(5)


@torch.no_grad()
def test_parts_of_a_tile_are_encoded_as_they_are_cut_by_hand(tmp_path, encoder, monkeypatch):
    data = make_data(tmp_path, encoder)
    rows = np.flatnonzero(data.spots["section"] != "A9")[::-3]
    served = data.subtiles(3)[rows]
    encoder.eval()
    for tile, features in zip(data.tiles(rows), served, strict=True):
        parts = [tile[y : y + 5, x : x + 5] for y in (0, 6, 11) for x in (0, 6, 11)]  # of 16 px
        expected = encoder(torch.stack(parts).permute(0, 3, 1, 2) / 255).numpy()
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data.subtiles(1)[rows][:, 0], data.features[rows], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(ImageEncoder, "forward", forbidden)
    np.testing.assert_array_equal(make_data(tmp_path, encoder).subtiles(3)[rows], served)
    with pytest.raises(InputError, match="16 px has no 17 x 17 parts"):
        data.subtiles(17)


@pytest.mark.slow
def test_surroundings_have_the_stain_of_the_tiles(tmp_path, encoder):
    from stexp.data.demo import write_demo
    from stexp.data.readers.samplesheet import read_samplesheet

    sections = read_samplesheet(write_demo(tmp_path / "demo", patients=3, sections_per_patient=1))
    sizes = {"tile_px": 16, "tile_um": 60, "cache_dir": str(tmp_path), "panel": list(sections[0].genes[:5])}
    sizes["encoder"] = FrozenEncoder(encoder, CPU, None, tmp_path)
    data = SpotDataModule(sections, Protocol("strict"), "A", stain="macenko", **sizes)
    plain = SpotDataModule(sections, Protocol("strict"), "A", **sizes)
    rows = data.rows("test")
    own, around = data.features[rows], data.surroundings(3)[rows]
    np.testing.assert_allclose(around[:, 4], own, rtol=1e-4, atol=1e-4)
    assert np.abs(plain.surroundings(3)[rows][:, 4] - own).max() > 1e-3


def test_what_weights_do_not_show_is_part_of_the_key(tmp_path):
    def key(**model_args) -> str:
        torch.manual_seed(0)
        vit = ImageEncoder("test_vit", pretrained=False, model_args=model_args)
        return FrozenEncoder(vit, CPU, None, tmp_path).key

    keys = [key(global_pool="avg"), key(global_pool="max"), key(global_pool="avg", num_heads=1)]
    assert len(set(keys)) == 3 and key(global_pool="avg") == keys[0]


def test_tiles_of_a_size_that_the_encoder_does_not_take_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"vit_tiny_patch16_224 does not take tiles of 3x16x16.*input_size"):
        make_data(tmp_path, ImageEncoder("vit_tiny_patch16_224", pretrained=False)).setup()


def test_precision_is_part_of_the_key(tmp_path, encoder):
    """An autocast that is switched off computes in float32, whatever type it was made with."""
    contexts = {
        "none": None,
        "off": torch.autocast("cpu", torch.bfloat16, enabled=False),
        "bf16": torch.autocast("cpu", torch.bfloat16),
    }
    found = {}
    for name, context in contexts.items():
        data = make_data(tmp_path, encoder, context)
        found[name] = data.features[data.rows("train")]
        assert FrozenEncoder(encoder, CPU, context, tmp_path).key in {
            path.stem.split("-")[-1] for path in (tmp_path / "cache" / "features").glob("*.npy")
        }
    np.testing.assert_array_equal(found["none"], found["off"])
    assert 0 < np.abs(found["bf16"] - found["none"]).max() < 0.1 * found["none"].std()
    assert len(list((tmp_path / "cache" / "features").glob("*.npy"))) == 2 * 4


def test_the_encoder_comes_back_as_it_was(tmp_path, encoder):
    for training in (True, False):
        encoder.train(training)
        make_data(tmp_path, encoder).setup()
        assert encoder.training is training


def test_a_measure_of_tiles_is_calculated_once_of_tiles_as_methods_see_them(tmp_path: Path) -> None:
    def brightness(tiles: np.ndarray) -> np.ndarray:
        return tiles.mean(axis=(2, 3), dtype=np.float64)[:, :3]

    plain = SpotDataModule(
        make_sections(tmp_path, patients=2, n_spots=150),  # more than are measured at once
        Protocol("strict"),
        "B",
        tile_px=16,
        cache_dir=str(tmp_path / "cache"),
        augmentation="none",
    )
    kept = []
    for part in plain.tiled():
        kept.append(part.measured("brightness", 3, brightness))
        np.testing.assert_array_equal(kept[-1], brightness(plain.tiles(part.rows).numpy()))
        np.testing.assert_array_equal(part.measured("brightness", 3, forbidden), kept[-1])
        inverted = replace(part, stain=("inverted", lambda tiles: 255 - tiles))
        np.testing.assert_allclose(inverted.measured("brightness", 3, brightness), 255 - kept[-1])
    assert len(kept) == len(plain.sections)
