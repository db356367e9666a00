from __future__ import annotations

import errno
import multiprocessing
import os
import tracemalloc
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import torch
from cut import cut_tiles
from PIL import Image
from sections import make_section, slide_pixels

from stexp.data.slides import formats as slide_formats
from stexp.data.slides import store as tile_store
from stexp.data.slides import tiles as tiles_module
from stexp.data.slides.store import JpegTiles, StoreInTheMaking
from stexp.data.slides.tiles import TileSpec, open_tiles
from stexp.errors import InputError
from stexp.evaluation.floors import colour_statistics

SPEC = TileSpec(px=16)
KINDS = ["raw", "jpeg"]


@pytest.fixture
def section(tmp_path, monkeypatch):
    """24 smooth tiles in 9 or more regions."""
    monkeypatch.setattr(slide_formats.PillowImage, "block", (32, 32))
    pixels = np.asarray(Image.fromarray(slide_pixels(12, 15)).resize((120, 96), Image.Resampling.BICUBIC))
    return make_section(tmp_path, image=pixels)


def expected(section) -> np.ndarray:
    out = np.zeros((len(section), 16, 16, 3), np.uint8)
    cut_tiles(section.slide.read(), section.xy_px, 16, 16, out)
    return out


def assert_right(tiles, section, kind: str) -> None:
    error = np.abs(np.asarray(tiles).astype(int) - expected(section))
    assert error.max() == 0 if kind == "raw" else error.mean() < 2 and error.mean(axis=(1, 2, 3)).max() < 4


def left(cache: Path) -> set[str]:
    return {path.suffix for path in (cache / "tiles").iterdir()}


# the compressed store


def test_jpeg_tiles_are_indexed_like_the_array_they_stand_for(section, tmp_path):
    store = open_tiles(section, SPEC, tmp_path, "jpeg")
    raw = open_tiles(section, SPEC, tmp_path)
    assert isinstance(store, JpegTiles)
    array = np.asarray(store)
    assert_right(store, section, "jpeg")
    assert (len(store), store.shape, store.dtype, store.ndim, store.nbytes) == (
        len(raw),
        raw.shape,
        raw.dtype,
        raw.ndim,
        raw.nbytes,
    )
    odd = np.arange(24) % 2 == 1
    for index in (0, -1, np.int64(5), slice(3, 9), slice(None, None, -5), [2, 2, 0], np.array([23, -24]), odd, []):
        got = store[np.array(index, int) if index == [] else index] if isinstance(index, list) else store[index]
        np.testing.assert_array_equal(got, array[np.array(index, int) if isinstance(index, list) else index])
        assert got.dtype == np.uint8
    np.testing.assert_array_equal(list(store), array)
    np.testing.assert_array_equal(colour_statistics(store), colour_statistics(array))
    for bad in (24, -25, np.array([0, 24])):
        with pytest.raises(IndexError):
            store[bad]


def test_threads_decode_to_the_same_tiles(section, tmp_path):
    store = open_tiles(section, SPEC, tmp_path, "jpeg")
    alone, threads = store[:], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        np.testing.assert_array_equal(store[:], alone)
    finally:
        torch.set_num_threads(threads)


def test_jpeg_takes_a_fraction_of_the_disk_on_tissue_like_tiles(tmp_path):
    pixels = np.asarray(Image.fromarray(slide_pixels(60, 75)).resize((600, 480), Image.Resampling.BICUBIC))
    section = make_section(tmp_path, image=pixels)
    raw, store = (Path(open_tiles(section, TileSpec(px=64), tmp_path, kind).filename) for kind in KINDS)
    assert store.stat().st_size < tile_store._JPEG_SHARE * raw.stat().st_size


# what a kill leaves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 1, 4, 7])
def test_work_that_broke_off_is_taken_up_where_it_was(section, tmp_path, monkeypatch, caplog, kind, after):
    put, n_puts = StoreInTheMaking.put, []

    def break_off(self, rows, tiles):
        if len(n_puts) == after:
            put(self, rows[:1], tiles[:1] // 2)  # what was put and not committed is worth nothing
            raise KeyboardInterrupt
        n_puts.append(len(rows))
        put(self, rows, tiles)

    with monkeypatch.context() as patch:
        patch.setattr(StoreInTheMaking, "put", break_off)
        with pytest.raises(KeyboardInterrupt):
            open_tiles(section, SPEC, tmp_path, kind)
    assert left(tmp_path) == {".part", ".done", ".lock"}
    cut, again = tiles_module.cut_tile, []
    monkeypatch.setattr(tiles_module, "cut_tile", lambda *args: again.append(len(args[1])) or cut(*args))
    with caplog.at_level("INFO"):
        tiles = open_tiles(section, SPEC, tmp_path, kind)
    assert sum(again) == 24 - sum(n_puts)
    assert (f"{sum(n_puts)} of 24 tiles are there already" in caplog.text) == (after > 0)
    assert_right(tiles, section, kind)
    assert left(tmp_path) == {tile_store.SUFFIXES[kind], ".json", ".lock"}


def _die(section, cache: str, kind: str, at: str) -> None:
    """Cut the tiles in a process that ends without a word at a chosen point."""
    replace, fsync, commit, put = os.replace, os.fsync, StoreInTheMaking.commit, StoreInTheMaking.put
    count = []

    def die_in_a_tile(self, rows, tiles):
        count.append(1)
        if len(count) == 5:
            self._file.seek(self._start + int(rows[0]) * self._tile_bytes if self._raw else 0, 0 if self._raw else 2)
            self._file.write(bytes(100))
            self._file.flush()
            os._exit(9)
        put(self, rows, tiles)

    def die_before_the_journal(fd):
        fsync(fd)
        count.append(1)
        if len(count) == 3:
            os._exit(9)

    def die_in_the_journal(self):
        commit(self)
        count.append(1)
        if len(count) == 3:
            with self._journal.open("ab") as journal:
                journal.write(np.array([23, 0], np.int64).tobytes()[:11])
            os._exit(9)

    def die_around_replace(source, target):
        if at == "after the rename":
            replace(source, target)
        os._exit(9)

    if at == "in a tile":
        StoreInTheMaking.put = die_in_a_tile
    elif at == "before the journal":
        os.fsync = die_before_the_journal
    elif at == "in the journal":
        StoreInTheMaking.commit = die_in_the_journal
    elif at == "before the journal exists":
        Path.touch = lambda self, *args: os._exit(9)
    elif at == "before reserving":
        tile_store._reserve = lambda path: os._exit(9)
    else:
        os.replace = die_around_replace
    open_tiles(section, SPEC, cache, kind)


POINTS = ["before the journal exists", "in a tile", "before the journal", "in the journal", "before the rename"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [*POINTS, "after the rename", "before reserving"])
def test_a_kill_at_any_point_leaves_no_wrong_tile(section, tmp_path, kind, at):
    if kind == "jpeg" and at == "before reserving":
        pytest.skip("JPEG reserves nothing")
    process = multiprocessing.get_context("fork").Process(target=_die, args=(section, str(tmp_path), kind, at))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    finished = tile_store.SUFFIXES[kind] in left(tmp_path)
    assert finished == (at == "after the rename")
    tiles = open_tiles(section, SPEC, tmp_path, kind)
    assert_right(tiles, section, kind)
    assert ".part" not in left(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_journal_without_its_tiles_is_not_believed(section, tmp_path, kind):
    path = Path(open_tiles(section, SPEC, tmp_path, kind).filename)
    journal = np.array([(row, 200, 50) for row in range(24)], np.int64)
    path.with_suffix(".done").write_bytes(journal.tobytes())
    path.unlink()
    assert_right(open_tiles(section, SPEC, tmp_path, kind), section, kind)
    path.rename(path.with_suffix(".part"))  # entries that point beyond the file, at no row or nowhere
    journal[:, 1], journal[3], journal[4] = 10**9, (99, 0, 5), (0, 0, 0)
    path.with_suffix(".done").write_bytes(journal.tobytes())
    assert_right(open_tiles(section, SPEC, tmp_path, kind), section, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "no facts"])
def test_a_damaged_store_is_cut_again(section, tmp_path, caplog, kind, damage):
    path = Path(open_tiles(section, SPEC, tmp_path, kind).filename)
    whole = path.read_bytes()
    if damage == "no facts":
        path.with_suffix(".json").unlink()
    else:
        path.write_bytes({"cut": whole[:-100], "empty": b"", "other": b"x" * len(whole)}[damage])
    assert_right(open_tiles(section, SPEC, tmp_path, kind), section, kind)
    assert ("is damaged; cutting it again" in caplog.text) == (damage != "no facts")


def test_a_damaged_jpeg_names_its_file(section, tmp_path):
    path = Path(open_tiles(section, SPEC, tmp_path, "jpeg").filename)
    offset, length = JpegTiles(path)._places[7]
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(int(length))
    path.write_bytes(data)
    store = open_tiles(section, SPEC, tmp_path, "jpeg")
    with pytest.raises(InputError, match=rf"tile 7 of .*{path.name} is damaged .*delete the file"):
        store[5:9]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_image_leaves_nothing_behind(section, tmp_path, kind):
    whole = section.slide.path.read_bytes()
    section.slide.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is truncated"):
        open_tiles(section, SPEC, tmp_path, kind)
    assert left(tmp_path) <= {".lock"}


# the disk


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", ["reserve", "commit", "facts", "rename"])
def test_a_full_disk_leaves_no_half_store(section, tmp_path, monkeypatch, kind, at):
    if kind == "jpeg" and at == "reserve":
        pytest.skip("JPEG reserves nothing")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {
        "reserve": (os, "posix_fallocate"),
        "commit": (os, "fsync"),
        "facts": (Path, "write_text"),
        "rename": (os, "replace"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[at], full, raising=False)
        with pytest.raises(InputError, match=r"disk full while cutting tiles of section A1 into .*tiles"):
            open_tiles(section, SPEC, tmp_path, kind)
    assert tile_store.SUFFIXES[kind] not in left(tmp_path)
    assert at != "reserve" or ".part" not in left(tmp_path)
    assert_right(open_tiles(section, SPEC, tmp_path, kind), section, kind)


def test_too_little_disk_is_said_before_cutting(tmp_path, monkeypatch):
    usage = tile_store.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tile_store.shutil, "disk_usage", lambda path: usage._replace(free=60e9))
    shape = (2_000_000, 224, 224, 3)
    with pytest.raises(InputError, match=r"2000000 tiles need 301 GB in .*, 60 GB are free; data\.tile_store=jpeg"):
        StoreInTheMaking(tmp_path / "s.npy", shape)
    with pytest.raises(InputError, match=r"2000000 tiles need 75 GB in .*, 60 GB are free$"):
        StoreInTheMaking(tmp_path / "s.jpegs", shape)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("facts", ["", "[]", "junk"])
def test_a_store_whose_facts_are_damaged_is_cut_again(section, tmp_path, kind, facts):
    tiles = open_tiles(section, SPEC, tmp_path, kind)
    beside = Path(tiles.filename).with_suffix(".json")
    whole = beside.read_text()
    beside.write_text(facts)
    assert_right(open_tiles(section, SPEC, tmp_path, kind), section, kind)
    assert beside.read_text() == whole


def test_a_stub_of_a_jpeg_store_is_cut_again(section, tmp_path):
    path = Path(open_tiles(section, SPEC, tmp_path, "jpeg").filename)
    path.write_bytes(b"12345678")
    assert_right(open_tiles(section, SPEC, tmp_path, "jpeg"), section, "jpeg")


def test_a_tile_that_says_it_is_huge_takes_no_memory(tmp_path):
    """The header of the first tile, or of another one, is patched to 65,500 px."""
    jpeg = imagecodecs.jpeg8_encode(np.zeros((40, 40, 3), np.uint8), level=95, subsampling="444")
    frame = jpeg.index(b"\xff\xc0") + 5
    huge = jpeg[:frame] + (65_500).to_bytes(2, "big") * 2 + jpeg[frame + 4 :]
    for first, second in ((jpeg, huge), (huge, jpeg)):
        places = np.array([[0, len(first)], [len(first), len(second)]], np.int64).tobytes()
        path = tmp_path / "a.jpegs"
        path.write_bytes(first + second + places + np.int64(2).tobytes() + b"stexptil")
        path.with_suffix(".json").write_text("{}")
        tracemalloc.start()
        store = tile_store.open_store(path, (2, 40, 40, 3))
        if store is not None:
            with pytest.raises(InputError, match=r"tile 1 of .* is damaged"):
                store[1]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (store is None) == (first is huge) and peak < 50_000_000
