"""Tiles at several magnifications: one store for all views, said in sides of a tile or in micrometres."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoders import frozen
from sections import make_section, make_sections

from stexp.api.settings import run_config
from stexp.data.augment import augment
from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.data.slides.scales import tile_and_scales
from stexp.data.slides.tiles import TileSpec, open_tiles
from stexp.errors import InputError
from stexp.models.encoders.image import ImageEncoder, at_scales
from stexp.protocol import Protocol


def test_micrometres_say_the_same_as_sides_of_a_tile():
    assert tile_and_scales(112, None, [56, 112, 224]) == tile_and_scales(112, [0.5, 1, 2], None)
    assert tile_and_scales(None, None, [112, 56, 224]) == (56, [2, 1, 4]), "the smallest has the pixels of a tile"
    assert tile_and_scales(None, None, None) == (None, None)
    assert TileSpec.of(32, None, None, [56, 112, 224]) == TileSpec(128, 224.0)
    assert TileSpec.of(32, 100.0, None, [50]) == TileSpec(32, 100.0), "never less than the tile itself"
    assert TileSpec.of(32, None, [0.5, 2], None) == TileSpec(64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, [1, 2], [56.0]), r"data\.scales_um=\[56\] and data\.scales=\[1,2\].*null would fit"),
        ((None, None, []), r"data\.scales_um=\[\]"),
        ((None, [], None), r"data\.scales=\[\]"),
        ((None, None, [56, -1]), r"data\.scales_um"),
        ((0, None, [56]), r"data\.tile_um=0"),
    ],
)
def test_views_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        tile_and_scales(*arguments)


def test_what_is_said_of_the_data_is_what_the_image_encoder_sees():
    def seen(changes: dict) -> tuple:
        config = run_config({"model": changes.pop("model", "stnet")}, changes)
        return config["image_encoder"]["scales"], config["model"].get("image_encoder", {}).get("scales")

    assert seen({}) == (None, None)
    assert seen({"data.scales": [0.5, 1]}) == ([0.5, 1],) * 2
    assert seen({"data.tile_um": 112, "data.scales_um": [56, 224]}) == ([0.5, 2],) * 2
    assert seen({"model": "consensus"})[0] == [0.5, 1, 2]
    assert seen({"model": "consensus", "model.scales": None, "data.tile_um": 8, "data.scales_um": [4]})[0] == [0.5]
    with pytest.raises(InputError, match=r"^data\.scales_um=.*model\.scales=null"):
        seen({"model": "consensus", "data.scales_um": [56]})


@pytest.mark.parametrize("um_per_px", [0.5, 0.2])
def test_views_of_one_store_are_what_is_cut_at_each_scale_by_itself(tmp_path, um_per_px):
    """At 0.5 um/px the smallest view is pixels of the slide as they are; at 0.2 um/px all are resampled."""
    y, x = np.mgrid[:400, :500]  # smooth: resampling in two steps is not that in one, where pixels differ from the next
    image = np.stack([120 + 100 * np.sin(x / a) * np.cos(y / b) for a, b in ((31, 47), (53, 29), (97, 71))], axis=-1)
    section = make_section(tmp_path, n=9, image=image.round().astype(np.uint8), image_px=400, um_per_px=um_per_px)
    sides, px = [8.0, 16.0, 32.0], 16
    spec = TileSpec.of(px, None, None, sides)
    store = open_tiles(section, spec, tmp_path / "cache")
    assert store.shape == (9, 64, 64, 3)
    views = at_scales(augment(torch.from_numpy(np.array(store)), "none", 0), tile_and_scales(None, None, sides)[1])
    for side, view in zip(sides, views, strict=True):
        alone = np.array(open_tiles(section, TileSpec(px, side), tmp_path / "cache"))
        made = (255 * view.permute(0, 2, 3, 1)).round().numpy()
        off = np.abs(made - alone)
        if um_per_px == 0.5:
            assert off.max() <= (side > 8)
        else:  # at its border a view cut by itself ends, and one from the store goes on
            assert off[:, 1:-1, 1:-1].max() <= 3
    assert len(list((tmp_path / "cache" / "tiles").glob("*.npy"))) == 4, "one for all views, and those of this test"


def test_a_section_of_unknown_scale_is_refused(tmp_path):
    sections = make_sections(tmp_path, um_per_px=None)
    size = {"tile_px": 8, "scales_um": [8, 16], "cache_dir": tmp_path / "cache"}
    data = SpotDataModule(sections, Protocol("strict"), "C", panel=["g00"], **size)
    with pytest.raises(InputError, match=r"A1.*16.* um.*um_per_px.*scales_um"):
        data.setup()


def test_batches_and_features_are_of_all_views(tmp_path):
    torch.manual_seed(0)
    encoder = ImageEncoder("test_resnet", pretrained=False, frozen=True, scales=[1, 2])
    plain = ImageEncoder("test_resnet", pretrained=False, frozen=True)
    plain.load_state_dict(encoder.state_dict())
    sections = make_sections(tmp_path, patients=2, per_patient=2, n_spots=9)
    size = {"tile_px": 16, "scales_um": [8, 16], "cache_dir": tmp_path / "cache", "augmentation": "none"}
    panel = sections[0].genes.tolist()
    data = SpotDataModule(
        sections, Protocol("strict"), "B", panel=panel, encoder=frozen(encoder, tmp_path / "cache"), **size
    )
    rows = data.rows("test")
    image = data.batch(SpotIndex(torch.from_numpy(rows))).tiles
    assert image.shape == (len(rows), 3, 32, 32) and data.tile == TileSpec(32, 16.0)
    with torch.no_grad():
        expected = torch.cat([plain(view) for view in at_scales(image, [1, 2])], dim=1)
    torch.testing.assert_close(torch.from_numpy(data.tile_features[rows]), expected, rtol=1e-3, atol=1e-4)
