from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from cut import cut_tiles
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sections import make_section, slide_pixels

from stexp.data.slides import formats as slide_formats
from stexp.data.slides import pixels as limits
from stexp.data.slides import tiles as tiles_module
from stexp.data.slides.slide import Slide, SlideReader
from stexp.data.slides.tiles import TileBank, TileSpec, open_tiles
from stexp.errors import InputError

# what a tile shows


def slow_tile(image: np.ndarray, x: float, y: float, side: int) -> np.ndarray:
    out = np.full((side, side, 3), 255, np.uint8)
    for row in range(side):
        for column in range(side):
            at_x, at_y = int(np.floor(x)) - side // 2 + column, int(np.floor(y)) - side // 2 + row
            if 0 <= at_x < image.shape[1] and 0 <= at_y < image.shape[0]:
                out[row, column] = image[at_y, at_x]
    return out


def test_a_tile_shows_what_was_drawn_at_its_x_y(tmp_path):
    image = np.full((90, 140, 3), 128, np.uint8)
    image[20, 100] = (255, 0, 0)  # x = 100, y = 20
    image[20, 103] = (0, 255, 0)  # to its right
    image[25, 100] = (0, 0, 255)  # below it
    section = make_section(tmp_path, n=2, image=image, xy_px=np.array([[100.0, 20.0], [20.0, 60.0]]))
    tile, other = open_tiles(section, TileSpec(px=16), tmp_path / "cache")
    assert tile[8, 8].tolist() == [255, 0, 0]
    assert tile[8, 11].tolist() == [0, 255, 0]
    assert tile[13, 8].tolist() == [0, 0, 255]
    assert (other == 128).all()


@given(
    xy=st.lists(st.tuples(st.floats(0, 31.99), st.floats(0, 22.99)), min_size=1, max_size=5),
    side=st.integers(1, 60),
)
def test_raw_tiles_equal_a_loop_over_pixels(xy, side):
    image = slide_pixels(23, 32)
    out = np.zeros((len(xy), side, side, 3), np.uint8)
    padded = cut_tiles(image, np.array(xy), side, side, out)
    expected = np.stack([slow_tile(image, x, y, side) for x, y in xy])
    np.testing.assert_array_equal(out, expected)
    # the image holds no white, so white is padding
    assert padded == sum((tile == 255).all(-1).any() for tile in expected)


def test_a_tile_in_micrometres_covers_that_much_tissue(tmp_path):
    image = np.full((200, 260, 3), 200, np.uint8)
    image[60:100, 100:140] = (40, 80, 120)  # 40 px = 20 um at 0.5 um/px, centred on (120, 80)
    section = make_section(tmp_path, n=1, image=image, xy_px=np.array([[120.0, 80.0]]), um_per_px=0.5)
    (exact,) = open_tiles(section, TileSpec(px=20, um=20.0), tmp_path)
    assert (exact == (40, 80, 120)).all()
    (wide,) = open_tiles(section, TileSpec(px=20, um=40.0), tmp_path)
    dark = wide[..., 0] < 120
    assert dark[5:15, 5:15].all() and dark.sum() == 100  # a quarter of the area, in the middle
    (up,) = open_tiles(section, TileSpec(px=160, um=40.0), tmp_path)  # more pixels than the slide has
    assert up.shape == (160, 160, 3) and (up[50:110, 50:110] == (40, 80, 120)).all() and (up[:30] == 200).all()


def test_resampling_equals_pillows_and_keeps_the_sides_apart(tmp_path):
    image = np.asarray(Image.fromarray(slide_pixels(12, 16)).resize((160, 120), Image.Resampling.BICUBIC))
    section = make_section(tmp_path, n=1, image=image, xy_px=np.array([[90.0, 55.0]]), um_per_px=0.25)
    (tile,) = open_tiles(section, TileSpec(px=24, um=16.0), tmp_path)
    assert TileSpec(px=24, um=16.0).side_px(section) == 64
    pillow = np.asarray(Image.fromarray(slow_tile(image, 90, 55, 64)).resize((24, 24), Image.Resampling.BILINEAR))
    assert np.abs(tile.astype(int) - pillow).max() <= 1
    for symmetry in (tile[::-1], tile[:, ::-1], tile.transpose(1, 0, 2)):
        assert np.abs(symmetry.astype(int) - pillow).max() > 20


def test_tiles_beyond_the_border_are_white_there_and_counted(tmp_path, caplog):
    image = slide_pixels(96, 120)
    xy = np.array([[2.0, 50.0], [60.0, 50.0], [119.0, 95.0], [8.0, 8.0]])
    section = make_section(tmp_path, n=4, image=image, xy_px=xy)
    with caplog.at_level("INFO"):
        tiles = open_tiles(section, TileSpec(px=16), tmp_path)
    assert "2 reach beyond the image" in caplog.text
    facts = json.loads(Path(tiles.filename).with_suffix(".json").read_text())
    assert facts["padded"] == 2 and facts["n"] == 4
    assert (tiles[0][:, :6] == 255).all() and not (tiles[0][:, 6:] == 255).all(-1).any()
    np.testing.assert_array_equal(tiles[2], slow_tile(image, 119, 95, 16))


def test_a_tile_in_micrometres_needs_a_scale(tmp_path):
    with pytest.raises(InputError, match=r"A1: tiles of 112.0 um need um_per_px"):
        TileSpec(um=112.0).side_px(make_section(tmp_path, um_per_px=None))
    with pytest.raises(InputError, match=r"a tile of 0.1 um is 0 px"):
        TileSpec(um=0.1).side_px(make_section(tmp_path))
    with pytest.raises(InputError, match="A1 has no image"):
        open_tiles(make_section(tmp_path, image=False), TileSpec(), tmp_path)


# by region, and from the level that is fine enough


def on_slide(section, path: Path):
    return dataclasses.replace(section, slide=Slide(path))


@pytest.mark.parametrize("kind", ["tiled", "pyramid", "strips", "strips-lzw", "png"])
@pytest.mark.parametrize("spec", [TileSpec(px=40), TileSpec(px=24, um=30.0)])
def test_tiles_cut_by_region_are_those_of_the_whole_image(tmp_path, monkeypatch, kind, spec):
    for reader in (slide_formats.PillowImage, slide_formats.OpenSlideImage):
        monkeypatch.setattr(reader, "block", (64, 64))
    monkeypatch.setattr(limits, "BLOCK_PX", 64)
    monkeypatch.setattr(limits, "STRIP_BYTES", 3 * 400 * 50)
    monkeypatch.setattr(tiles_module, "_AT_ONCE", 3)
    pixels = slide_pixels(300, 400)
    rng = np.random.default_rng(1)
    section = make_section(tmp_path, n=80, image=pixels, xy_px=rng.uniform(0, 1, (80, 2)) * [399.9, 299.9])
    path = tmp_path / "s.tif"
    write = {"photometric": "rgb", "metadata": None}
    if kind == "pyramid":
        with tifffile.TiffWriter(path) as writer:
            for factor in (1, 4):  # finer than neither spec needs
                writer.write(pixels[::factor, ::factor], subfiletype=int(factor > 1), tile=(32, 32), **write)
    elif kind == "png":
        path = section.slide.path
    else:
        how = {"tiled": {"tile": (32, 32)}, "strips": {}, "strips-lzw": {"compression": "lzw", "rowsperstrip": 5}}[kind]
        tifffile.imwrite(path, pixels, **how, **write)
    largest, read = [], SlideReader.read

    def spy(self, x, y, width, height, level=0):
        largest.append(width * height)
        return read(self, x, y, width, height, level)

    monkeypatch.setattr(SlideReader, "read", spy)
    tiles = open_tiles(on_slide(section, path), spec, tmp_path)
    side = spec.side_px(section)
    expected = np.zeros_like(tiles)
    padded = cut_tiles(pixels, section.xy_px, side, spec.px, expected)
    np.testing.assert_array_equal(tiles, expected)
    assert json.loads(Path(tiles.filename).with_suffix(".json").read_text())["padded"] == padded > 0
    block = (400, 50) if kind == "strips-lzw" else (64, 64)
    assert len(largest) > 3 and max(largest) <= (block[0] + side) * (block[1] + side)


def test_tiles_in_micrometres_come_from_the_coarsest_level_that_is_fine_enough(tmp_path):
    path = tmp_path / "s.tif"
    colours = {1: (255, 0, 0), 2: (0, 255, 0), 8: (0, 0, 255)}
    with tifffile.TiffWriter(path) as writer:
        for factor, colour in colours.items():
            level = np.full((600 // factor, 800 // factor, 3), colour, np.uint8)
            writer.write(level, subfiletype=int(factor > 1), tile=(32, 32), photometric="rgb", metadata=None)
    section = on_slide(make_section(tmp_path, image=np.zeros((600, 800, 3), np.uint8), n=4, image_px=600), path)

    def colour(spec):
        tiles = np.asarray(open_tiles(section, spec, tmp_path)).reshape(-1, 3)
        assert (tiles == tiles[0]).all()
        return tuple(tiles[0].tolist())

    assert colour(TileSpec(px=16)) == colours[1]
    # 0.5 um/px: sides of 8, 16, 31, 32, 100, 128 px at level 0
    for um, factor in [(4.0, 1), (8.0, 1), (15.5, 1), (16.0, 2), (50.0, 2), (64.0, 8)]:
        assert colour(TileSpec(px=16, um=um)) == colours[factor]


def test_a_tile_from_a_level_shows_the_place_that_level_0_shows(tmp_path):
    pixels = np.asarray(Image.fromarray(slide_pixels(15, 20)).resize((799, 601), Image.Resampling.BICUBIC))
    section = make_section(tmp_path, image=pixels, n=16, image_px=601)
    path = tmp_path / "s.tif"
    with tifffile.TiffWriter(path) as writer:
        for factor in (1, 4):
            level = np.asarray(Image.fromarray(pixels).reduce(factor))
            writer.write(level, subfiletype=int(factor > 1), tile=(32, 32), photometric="rgb", metadata=None)
    spec = TileSpec(px=32, um=70.0)
    whole = np.asarray(open_tiles(section, spec, tmp_path), float)
    tiles = open_tiles(on_slide(section, path), spec, tmp_path)
    assert json.loads(Path(tiles.filename).with_suffix(".json").read_text())["downsample"] == pytest.approx(4, rel=0.01)
    inner = np.abs(tiles - whole)[:, 1:-1, 1:-1].mean()
    shifted = np.abs(tiles[:, 1:] - whole[:, :-1]).mean()
    assert inner < 4 and 2.5 * inner < shifted


# the store


def stored(section, spec, cache) -> Path:
    return Path(open_tiles(section, spec, cache).filename)


def test_the_store_is_cut_once_and_its_key_changes_with_what_it_shows(tmp_path, monkeypatch):
    section, spec, cache = make_section(tmp_path), TileSpec(px=8), tmp_path / "cache"
    first = stored(section, spec, cache)
    assert stored(make_section(tmp_path), spec, cache) == first
    moved = section.xy_px.copy()
    moved[3, 0] += 1
    others = [
        stored(make_section(tmp_path, xy_px=moved), spec, cache),
        stored(section, TileSpec(px=9), cache),
        stored(section, TileSpec(px=8, um=8.0), cache),
        stored(dataclasses.replace(section, um_per_px=0.25), TileSpec(px=8, um=8.0), cache),
    ]
    before = first.read_bytes()
    pixels = slide_pixels(96, 120)
    pixels[0, 0] ^= 1
    changed = make_section(tmp_path, image=pixels)
    others += [stored(changed, spec, cache), Path(open_tiles(section, spec, cache, "jpeg").filename)]
    assert len({path.stem for path in (first, *others)}) == 7
    assert first.read_bytes() == before
    # physical and raw geometry that come to the same pixels share their tiles
    assert stored(changed, TileSpec(px=8, um=4.0), cache) == others[-2]
    monkeypatch.setattr(tiles_module, "cut_tile", None)
    np.testing.assert_array_equal(open_tiles(changed, spec, cache), np.load(others[-2]))
    with pytest.raises(InputError, match=r"data\.tile_store=webp: choose raw or jpeg"):
        open_tiles(section, spec, cache, "webp")


def test_an_image_replaced_behind_an_open_section_is_cut_anew(tmp_path):
    section = make_section(tmp_path)
    first = np.array(open_tiles(section, TileSpec(px=8), tmp_path))
    Image.fromarray(255 - slide_pixels(96, 120)).save(section.slide.path)
    again = open_tiles(section, TileSpec(px=8), tmp_path)
    np.testing.assert_array_equal(again, 255 - first)


def _open_together(folder: str, store: str, barrier, answers) -> None:
    cuts = []
    cut = tiles_module.cut_tile
    tiles_module.cut_tile = lambda *args: cuts.append(len(args[1])) or cut(*args)
    section = make_section(Path(folder), n=400, image=False)
    section = dataclasses.replace(section, slide=Slide(Path(folder) / "A1.png"), um_per_px=0.5)
    barrier.wait()
    tiles = open_tiles(section, TileSpec(px=32), Path(folder) / "cache", store)
    answers.put((sum(cuts), tiles.filename, int(np.asarray(tiles, np.int64).sum())))


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_two_processes_on_one_cache_make_one_store(tmp_path, store):
    section = make_section(tmp_path, n=400)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    both = [context.Process(target=_open_together, args=(str(tmp_path), store, barrier, answers)) for _ in range(2)]
    for process in both:
        process.start()
    (cuts_a, file_a, sum_a), (cuts_b, file_b, sum_b) = answers.get(timeout=60), answers.get(timeout=60)
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert cuts_a + cuts_b == 400 and file_a == file_b and sum_a == sum_b
    out = np.zeros((400, 32, 32, 3), np.uint8)
    cut_tiles(section.slide.read(), section.xy_px, 32, 32, out)
    if store == "raw":
        np.testing.assert_array_equal(np.load(file_a), out)


# the bank


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), data=st.data())
def test_gather_equals_direct_indexing(sizes, data):
    rng = np.random.default_rng(sum(sizes))
    stores = [rng.integers(0, 256, (n, 3, 3, 3), dtype=np.uint8) for n in sizes]
    bank, whole = TileBank(stores), np.concatenate(stores)
    assert len(bank) == len(whole)
    index = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=12)), dtype=np.int64)
    got = bank.gather(torch.from_numpy(index), torch.device("cpu"))
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), whole[index])


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_gather_from_mapped_stores_gives_tensors_of_its_own(tmp_path, store):
    sections = [make_section(tmp_path, name, seed=i, n=9 + i) for i, name in enumerate(["A1", "B1", "C1"])]
    stores = [open_tiles(section, TileSpec(px=8), tmp_path, store) for section in sections]
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    got = TileBank(stores).gather(index, torch.device("cpu"))
    np.testing.assert_array_equal(got.numpy(), np.concatenate([s[:] for s in stores])[index.numpy()])
    got.zero_()  # writes into a read-only mapping would crash
    assert stores[0][:].max() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("placement", ["auto", "device", "pinned", "disk"])
def test_gather_on_a_gpu_equals_the_cpu(placement):
    stores = [np.random.default_rng(n).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8) for n in (5, 7)]
    index = torch.tensor([11, 0, 4, 5, 5])
    got = TileBank(stores, placement).gather(index, torch.device("cuda"))
    assert got.is_cuda
    np.testing.assert_array_equal(got.cpu().numpy(), np.concatenate(stores)[index.numpy()])


def test_unknown_placement():
    with pytest.raises(InputError, match=r"data\.placement=gpu: choose auto, device, pinned or disk"):
        TileBank([], "gpu")
