from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sections import make_section, slide_pixels

from stexp import InputError
from stexp.data import tiles as tiles_module
from stexp.data.slide import Slide
from stexp.data.tiles import TileBank, TileSpec, cut_tiles, open_tiles

# slides


def encoded(kind: str, pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # what Pillow thinks of them
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_an_image_cut_off_anywhere_is_refused_in_one_line(tmp_path, kind):
    # wide enough that no format can be whole without its last hundred bytes
    whole = encoded(kind, slide_pixels(40, 50))
    path = tmp_path / "cut.img"
    for length in [0, 1, 5, 20, 33, 50, 100, 200, 400, 650, len(whole) // 2, len(whole) - 100]:
        path.write_bytes(whole[:length])
        slide = Slide(path)
        with pytest.raises(InputError, match=r"cut\.img is (not an image|truncated or damaged)"):
            slide.read()
        with pytest.raises(InputError, match=r"cut\.img is (not an image|truncated or damaged)"):
            slide.thumbnail(20)
        with contextlib.suppress(InputError):  # the header may be whole
            assert slide.size == (50, 40)


def test_something_else_is_not_an_image(tmp_path):
    path = tmp_path / "slide.png"
    path.write_text("section,patient\n")
    with pytest.raises(InputError, match=r"slide\.png is not an image that Pillow can read"):
        make_section(tmp_path, image=False)  # the section itself is fine
        Slide(path).size  # noqa: B018


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_slides_read_as_rgb_with_width_first_in_size(tmp_path, mode):
    pixels = slide_pixels(20, 30)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "s.png")
    slide = Slide(tmp_path / "s.png")
    assert slide.size == (30, 20)
    read = slide.read()
    assert read.shape == (20, 30, 3) and read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.asarray(image.convert("RGB")))
    if mode == "RGB":
        np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_thumbnail_shows_the_slide_at_the_scale_it_states(tmp_path, kind):
    pixels = np.full((400, 1000, 3), 255, np.uint8)
    pixels[100:180, 600:720] = (200, 0, 0)
    Image.fromarray(pixels).save(tmp_path / f"s.{kind}", quality=95)
    small, scale = Slide(tmp_path / f"s.{kind}").thumbnail(250)
    assert small.shape == (100, 250, 3) and scale == 0.25
    red = np.argwhere(small[..., 1] < 128)
    np.testing.assert_allclose(red.mean(0), [0.25 * 139.5, 0.25 * 659.5], atol=0.6)
    same, scale = Slide(tmp_path / f"s.{kind}").thumbnail(5000)
    assert scale == 1 and same.shape == pixels.shape


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
    image = np.asarray(Image.fromarray(slide_pixels(12, 16)).resize((160, 120), Image.BICUBIC))
    section = make_section(tmp_path, n=1, image=image, xy_px=np.array([[90.0, 55.0]]), um_per_px=0.25)
    (tile,) = open_tiles(section, TileSpec(px=24, um=16.0), tmp_path)
    assert TileSpec(px=24, um=16.0).side_px(section) == 64
    pillow = np.asarray(Image.fromarray(slow_tile(image, 90, 55, 64)).resize((24, 24), Image.BILINEAR))
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


# the store


def names(cache: Path) -> set[str]:
    return {path.name for path in (cache / "tiles").iterdir()}


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
    others.append(stored(changed, spec, cache))
    assert len({first, *others}) == 6
    assert first.read_bytes() == before
    # physical and raw geometry that come to the same pixels share their tiles
    assert stored(changed, TileSpec(px=8, um=4.0), cache) == others[-1]
    monkeypatch.setattr(tiles_module, "cut_tiles", None)
    np.testing.assert_array_equal(open_tiles(changed, spec, cache), np.load(others[-1]))


def test_an_image_replaced_behind_an_open_section_is_cut_anew(tmp_path):
    section = make_section(tmp_path)
    first = np.array(open_tiles(section, TileSpec(px=8), tmp_path))
    Image.fromarray(255 - slide_pixels(96, 120)).save(section.slide.path)
    again = open_tiles(section, TileSpec(px=8), tmp_path)
    np.testing.assert_array_equal(again, 255 - first)


@pytest.mark.parametrize("at", ["reserve", "cut", "facts", "rename"])
def test_a_full_disk_leaves_no_half_store(tmp_path, monkeypatch, at):
    section, spec = make_section(tmp_path), TileSpec(px=8)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {
        "reserve": (os, "posix_fallocate"),
        "cut": (tiles_module, "cut_tiles"),
        "facts": (Path, "write_text"),
        "rename": (os, "replace"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*where[at], full, raising=False)
        with pytest.raises(InputError, match=r"disk full while cutting tiles of section A1 into .*tiles"):
            open_tiles(section, spec, tmp_path / "cache")
    assert not [name for name in names(tmp_path / "cache") if name.endswith((".npy", ".part"))]
    expected = slow_tile(section.slide.read(), *section.xy_px[5], 8)
    np.testing.assert_array_equal(open_tiles(section, spec, tmp_path / "cache")[5], expected)


def test_too_little_disk_is_said_before_cutting(tmp_path, monkeypatch):
    usage = tiles_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tiles_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(tiles_module, "cut_tiles", None)
    with pytest.raises(InputError, match=r"A1 need 0 MB in .*tiles, 0 MB are free"):
        open_tiles(make_section(tmp_path), TileSpec(px=8), tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from sections import make_section
from stexp.data import tiles

def cut_half_and_die(image, xy_px, side_px, px, out):
    out[: len(out) // 2] = 7
    out.flush()
    os.kill(os.getpid(), signal.SIGKILL)

tiles.cut_tiles = cut_half_and_die
folder = Path(sys.argv[1])
tiles.open_tiles(make_section(folder), tiles.TileSpec(px=8), folder / "cache")
"""


def test_a_kill_while_cutting_is_finished_by_the_next_run(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, check=False)
    assert killed.returncode == -9
    left = names(tmp_path / "cache")
    assert any(name.endswith(".part") for name in left) and not any(name.endswith(".npy") for name in left)
    section = make_section(tmp_path)
    tiles = open_tiles(section, TileSpec(px=8), tmp_path / "cache")
    image = section.slide.read()
    np.testing.assert_array_equal(tiles, np.stack([slow_tile(image, *xy, 8) for xy in section.xy_px]))
    assert not any(name.endswith(".part") for name in names(tmp_path / "cache"))


def _open_together(folder: str, barrier, answers) -> None:
    cuts = []
    cut = tiles_module.cut_tiles
    tiles_module.cut_tiles = lambda *args: cuts.append(1) or cut(*args)
    section = make_section(Path(folder), n=400, image=False)
    section = dataclasses.replace(section, slide=Slide(Path(folder) / "A1.png"), um_per_px=0.5)
    barrier.wait()
    tiles = open_tiles(section, TileSpec(px=32), Path(folder) / "cache")
    answers.put((len(cuts), tiles.filename, int(np.asarray(tiles, np.int64).sum())))


def test_two_processes_on_one_cache_make_one_store(tmp_path):
    section = make_section(tmp_path, n=400)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    both = [context.Process(target=_open_together, args=(str(tmp_path), barrier, answers)) for _ in range(2)]
    for process in both:
        process.start()
    (cuts_a, file_a, sum_a), (cuts_b, file_b, sum_b) = answers.get(timeout=60), answers.get(timeout=60)
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert cuts_a + cuts_b == 1 and file_a == file_b and sum_a == sum_b
    out = np.zeros((400, 32, 32, 3), np.uint8)
    cut_tiles(section.slide.read(), section.xy_px, 32, 32, out)
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


def test_gather_from_mapped_stores_gives_tensors_of_its_own(tmp_path):
    sections = [make_section(tmp_path, name, seed=i, n=9 + i) for i, name in enumerate(["A1", "B1", "C1"])]
    stores = [open_tiles(section, TileSpec(px=8), tmp_path) for section in sections]
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    got = TileBank(stores).gather(index, torch.device("cpu"))
    np.testing.assert_array_equal(got.numpy(), np.concatenate(stores)[index.numpy()])
    got.zero_()  # writes into a read-only mapping would crash
    assert stores[0].max() > 0


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
