from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from cut import cut_tiles
from PIL import Image
from sections import make_section, slide_pixels

from stexp.data.slides import formats as slide_formats
from stexp.data.slides import pixels as limits
from stexp.data.slides import stream as tile_stream
from stexp.data.slides.slide import Slide, SlideReader
from stexp.data.slides.stream import tile_batches
from stexp.data.slides.tiles import TileSpec, open_tiles
from stexp.errors import InputError

SIZE = (400, 300)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 px, so that a little slide has many."""
    for reader in (slide_formats.PillowImage, slide_formats.OpenSlideImage):
        monkeypatch.setattr(reader, "block", (64, 64))
    monkeypatch.setattr(limits, "BLOCK_PX", 64)
    monkeypatch.setattr(tile_stream, "BLOCK_PX", 64)
    monkeypatch.setattr(limits, "STRIP_BYTES", 3 * 400 * 50)


def written(path: Path, kind: str, pixels: np.ndarray) -> Slide:
    write = {"photometric": "rgb", "metadata": None}
    if kind == "png":
        Image.fromarray(pixels).save(path := path / "s.png")
    elif kind.startswith("pyramid"):  # OpenSlide's, and tifffile's for want of a compression that OpenSlide reads
        how = {"compression": "zstd"} if kind.endswith("zstd") else {}
        with tifffile.TiffWriter(path := path / "s.tif") as writer:
            for factor in (1, 2):
                part = np.asarray(Image.fromarray(pixels).reduce(factor))
                writer.write(part, subfiletype=int(factor > 1), tile=(32, 32), **how, **write)
    else:
        how = {"tiled": {"tile": (32, 32)}, "strips": {}, "strips-lzw": {"compression": "lzw", "rowsperstrip": 5}}[kind]
        tifffile.imwrite(path := path / "s.tif", pixels, **how, **write)
    return Slide(path)


def places(n: int = 80, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, (n, 2)) * (np.array(SIZE) - 0.01)


def together(batches, n: int, px: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles in the order of the places, and the order that they came in."""
    order, out = [], np.zeros((n, px, px, 3), dtype=np.uint8)
    for rows, tiles in batches:
        assert tiles.shape == (len(rows), px, px, 3) and tiles.dtype == np.uint8
        order.append(rows)
        out[rows] = tiles
    return out, np.concatenate(order)


@pytest.mark.parametrize("kind", ["tiled", "pyramid", "pyramid-zstd", "strips", "strips-lzw", "png"])
@pytest.mark.parametrize(("side", "px"), [(40, 40), (50, 40), (16, 24)])
@pytest.mark.parametrize("threads", [1, 3])
def test_streamed_tiles_are_those_cut_from_the_whole_image(tmp_path, small_blocks, kind, side, px, threads):
    pixels, xy = slide_pixels(*SIZE[::-1]), places()
    slide = written(tmp_path, kind, pixels)
    tiles, order = together(tile_batches(slide, xy, side, px, 7, threads=threads), 80, px)
    expected = np.zeros_like(tiles)
    assert cut_tiles(pixels, xy, side, px, expected) > 0  # some reach beyond the border
    np.testing.assert_array_equal(tiles, expected)
    assert sorted(order) == list(range(80))


@pytest.mark.parametrize("kind", ["pyramid", "pyramid-zstd"])
@pytest.mark.parametrize("um", [10.0, 20.0, 26.5])  # 20, 40, 53 px at level 0: level 0, 1, 1
def test_streamed_tiles_are_those_that_a_model_was_trained_on(tmp_path, small_blocks, kind, um):
    pixels = np.asarray(Image.fromarray(slide_pixels(40, 50)).resize((401, 301), Image.Resampling.BICUBIC))
    slide = written(tmp_path, kind, pixels)
    section = make_section(tmp_path, n=80, image=pixels, xy_px=places())
    object.__setattr__(section, "slide", slide)
    spec = TileSpec(px=20, um=um)
    trained = np.asarray(open_tiles(section, spec, tmp_path / "cache"))
    side = spec.side_px(section)
    tiles, _ = together(tile_batches(slide, section.xy_px, side, 20, 16), 80, 20)
    np.testing.assert_array_equal(tiles, trained)
    with slide.open() as image:
        assert image.level(side / 20) == int(um >= 20)


def test_every_region_is_read_once_and_no_more_than_once_around(tmp_path, small_blocks, monkeypatch):
    read, boxes = SlideReader.read, []

    def spy(self, x, y, width, height, level=0):
        boxes.append((x, y, width, height))
        return read(self, x, y, width, height, level)

    monkeypatch.setattr(SlideReader, "read", spy)
    slide, side = written(tmp_path, "tiled", slide_pixels(*SIZE[::-1])), 20
    xy = places(2000)
    for _ in tile_batches(slide, xy, side, 20, 16, threads=3):  # many batches share a region
        pass
    cells = {tuple(cell) for cell in (np.floor(xy).astype(int) - side // 2) // 64}
    assert len(boxes) == len(set(boxes)) == len(cells)
    assert max(width * height for _, _, width, height in boxes) <= (64 + side) ** 2


def test_the_order_depends_on_the_arguments_alone_and_can_be_taken_up(tmp_path, small_blocks):
    slide, xy = written(tmp_path, "pyramid", slide_pixels(*SIZE[::-1])), places(50)
    whole = list(tile_batches(slide, xy, 30, 15, 8))
    assert [len(rows) for rows, _ in whole] == [8] * 6 + [2]
    for start in (0, 16, 48):
        rest = list(tile_batches(slide, xy, 30, 15, 8, start=start, threads=2))
        assert len(rest) == len(whole) - start // 8
        for (rows, tiles), (again, same) in zip(whole[start // 8 :], rest, strict=True):
            np.testing.assert_array_equal(rows, again)
            np.testing.assert_array_equal(tiles, same)
    order = np.concatenate([rows for rows, _ in whole])
    other = np.concatenate([rows for rows, _ in tile_batches(slide, xy, 30, 15, 50, start=11)])
    np.testing.assert_array_equal(order[11:], other)
    assert list(tile_batches(slide, xy, 30, 15, 8, start=50)) == []
    assert list(tile_batches(slide, np.empty((0, 2)), 30, 15, 8)) == []


def test_tiles_are_cut_no_further_ahead_than_said(tmp_path, small_blocks, monkeypatch):
    cut, done = tile_stream.cut_tile, []

    def spy(region, corner, *rest):
        done.append(len(corner))
        cut(region, corner, *rest)

    monkeypatch.setattr(tile_stream, "cut_tile", spy)
    slide, xy = written(tmp_path, "tiled", slide_pixels(*SIZE[::-1])), places(1000)
    for ahead, batches in ((0, 2), (3 * 10 * 20 * 20 * 3, 5)):
        monkeypatch.setattr(tile_stream, "AHEAD_BYTES", ahead)
        done.clear()
        stream = tile_batches(slide, xy, 20, 20, 10, threads=4)
        for _ in range(4):
            next(stream)
        stream.close()  # waits for what was begun
        assert 40 <= sum(done) <= 40 + 10 * (batches - 1)


def test_images_that_are_decoded_whole_are_decoded_once(tmp_path, small_blocks, monkeypatch):
    opened = []
    monkeypatch.setattr(slide_formats.PillowImage, "_load", spied(slide_formats.PillowImage._load, opened))
    slide = written(tmp_path, "png", slide_pixels(*SIZE[::-1]))
    for _ in tile_batches(slide, places(), 20, 20, 8, threads=4):
        pass
    assert len(opened) > 4 and len({id(reader) for reader in opened}) == 1


def spied(method, seen: list):
    def call(self):
        seen.append(self)
        return method(self)

    return call


def test_what_cannot_be_streamed_is_refused_in_one_line(tmp_path):
    pixels = slide_pixels(*SIZE[::-1])
    slide = written(tmp_path, "tiled", pixels)
    with pytest.raises(InputError, match="1 of 2 places lie outside of it"):
        next(tile_batches(slide, np.array([[5.0, 5.0], [300.0, 300.0]]), 20, 20, 8))
    with pytest.raises(InputError, match="batch_size=0: a whole number of at least 1"):
        next(tile_batches(slide, places(), 20, 20, 0))
    tifffile.imwrite(tmp_path / "cut.tif", pixels, photometric="rgb", tile=(32, 32), compression="zlib")
    whole = (tmp_path / "cut.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"is (truncated|damaged)"):
        list(tile_batches(Slide(tmp_path / "cut.tif"), places(), 20, 20, 8))
