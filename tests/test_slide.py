from __future__ import annotations

import contextlib
import dataclasses
import io
import struct
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from sections import make_section, slide_pixels

from stexp.data.digests import file_digest
from stexp.data.slides import pixels as limits
from stexp.data.slides.formats import OpenSlideImage, PillowImage, TiffImage, qupath_origin, slide_files, slide_name
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

PIXELS = np.asarray(Image.fromarray(slide_pixels(8, 10)).resize((250, 200), Image.Resampling.BICUBIC))
APERIO = "Aperio Image Library v11.2.1\r\n250x200 [0,0 250x200] (64x64) JPEG/RGB Q=95|AppMag = 40|MPP = 0.2520"


def smaller(pixels: np.ndarray, factor: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).reduce(factor))


def pyramid(path: Path, pixels: np.ndarray = PIXELS, levels=(1, 2, 4), **kwargs) -> Path:
    kwargs = {"tile": (64, 64), "photometric": "rgb", "metadata": None, **kwargs}
    with tifffile.TiffWriter(path) as writer:
        for factor in levels:
            writer.write(smaller(pixels, factor), subfiletype=int(factor > 1), **kwargs)
    return path


def ome(path: Path, axes: str, pixels: np.ndarray = PIXELS, **kwargs) -> Path:
    """Two sub-resolutions; pixels of 0.25 um, said in micrometres across and nanometres down."""
    size = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm"}
    kwargs = {"tile": (64, 64), **kwargs}
    with tifffile.TiffWriter(path, ome=True) as writer:
        for i, factor in enumerate((1, 2, 4)):
            level = smaller(pixels, factor)
            level = level if axes == "YXS" else np.ascontiguousarray(level.transpose(2, 0, 1))
            extra = {"subifds": 2, "metadata": {"axes": axes, **size}} if i == 0 else {"subfiletype": 1}
            writer.write(level, **extra, **kwargs)
    return path


def strips(path: Path, **kwargs) -> Path:
    tifffile.imwrite(path, PIXELS, **{"photometric": "rgb", "metadata": None, **kwargs})
    return path


def pillow(path: Path, **kwargs) -> Path:
    Image.fromarray(PIXELS).save(path, **kwargs)
    return path


def planes(path: Path, **kwargs) -> Path:
    tifffile.imwrite(path, PIXELS.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate", **kwargs)
    return path


FORMATS = {  # how it is written, what reads it, levels, largest error
    "pyramid": (lambda p: pyramid(p / "s.tif"), OpenSlideImage, 3, 0),
    "pyramid-jpeg": (lambda p: pyramid(p / "s.tif", compression="jpeg", subsampling=(1, 1)), OpenSlideImage, 3, 12),
    "pyramid-zstd": (lambda p: pyramid(p / "s.tif", compression="zstd"), TiffImage, 3, 0),
    "svs": (
        lambda p: pyramid(p / "s.svs", compression="jpeg", subsampling=(1, 1), description=APERIO),
        OpenSlideImage,
        3,
        12,
    ),
    "tiled": (lambda p: pyramid(p / "s.tif", levels=(1,), compression="deflate"), TiffImage, 1, 0),
    "bigtiff": (lambda p: strips(p / "s.tif", bigtiff=True, byteorder=">"), TiffImage, 1, 0),
    "strips": (lambda p: strips(p / "s.tif", rowsperstrip=7), TiffImage, 1, 0),
    "strips-lzw": (lambda p: strips(p / "s.tif", rowsperstrip=7, compression="lzw", predictor=True), TiffImage, 1, 0),
    "one-strip-deflate": (lambda p: strips(p / "s.tif", rowsperstrip=200, compression="deflate"), TiffImage, 1, 0),
    "planes": (lambda p: planes(p / "s.tif"), TiffImage, 1, 0),
    "planes-tiled": (lambda p: planes(p / "s.tif", tile=(64, 64), compression="lzw"), TiffImage, 1, 0),
    "ome-yxs": (lambda p: ome(p / "s.ome.tif", "YXS", photometric="rgb"), TiffImage, 3, 0),
    "ome-cyx": (lambda p: ome(p / "s.ome.tif", "CYX", photometric="minisblack", compression="zlib"), TiffImage, 3, 0),
    "ome-syx": (lambda p: ome(p / "s.ome.tif", "SYX", photometric="rgb", planarconfig="separate"), TiffImage, 3, 0),
    "png": (lambda p: pillow(p / "s.png"), PillowImage, 1, 0),
    "jpg": (lambda p: pillow(p / "s.jpg", quality=95, subsampling=0), PillowImage, 1, 12),
    "bmp": (lambda p: pillow(p / "s.bmp"), PillowImage, 1, 0),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same_whole_and_by_region(tmp_path, name, monkeypatch):
    write, reader_class, n_levels, error = FORMATS[name]
    monkeypatch.setattr(limits, "STRIP_BYTES", 3 * 250 * 30)  # so that whole reads have seams
    monkeypatch.setattr(limits, "BLOCK_PX", 100)
    monkeypatch.setattr(OpenSlideImage, "block", (100, 100))
    monkeypatch.setattr(PillowImage, "block", (100, 100))
    slide = Slide(write(tmp_path))
    assert slide.size == (250, 200)
    whole = slide.read()
    assert whole.dtype == np.uint8 and whole.shape == (200, 250, 3)
    assert np.abs(whole.astype(int) - PIXELS).max() <= error
    framed = np.pad(whole, ((300, 300), (300, 300), (0, 0)), constant_values=255)
    with slide.open() as reader:
        assert isinstance(reader._file, reader_class) and len(reader.sizes) == n_levels
        assert reader.downsamples == pytest.approx([1, 2, 4][:n_levels], rel=0.01)
        for x, y, w, h in [(0, 0, 1, 1), (63, 63, 3, 70), (249, 199, 5, 5), (-20, -10, 290, 220), (300, 0, 4, 4)]:
            expected = framed[300 + y : 300 + y + h, 300 + x : 300 + x + w]
            np.testing.assert_array_equal(reader.read(x, y, w, h), expected)
            np.testing.assert_array_equal(reader.read_region(x, y, w, h), expected)
        for level, (width, height) in enumerate(reader.sizes):  # every level shows the same
            pixels = reader.read(0, 0, width, height, level)
            assert np.abs(pixels.astype(float) - smaller(PIXELS, 2**level)).mean() < 4
    reduced = slide.read_region(40, 20, 160, 120, 4.0)
    assert reduced.shape == (30, 40, 3)
    assert np.abs(reduced.astype(float) - smaller(PIXELS[20:140, 40:200], 4)).mean() < 8
    small, scale = slide.thumbnail(50)
    assert small.shape == (40, 50, 3) and scale == 0.2
    assert np.abs(small.astype(float) - smaller(PIXELS, 5)).mean() < 6


def test_an_image_of_the_paper_is_read_by_pillow_as_before(tmp_path):
    slide = Slide(pillow(tmp_path / "s.jpg", quality=80))
    with Image.open(slide.path) as image:
        np.testing.assert_array_equal(slide.read(), np.asarray(image.convert("RGB")))


def test_images_opened_at_once_leave_the_limit_of_pillow_as_it_was(tmp_path, monkeypatch):
    path, limit = pillow(tmp_path / "s.png"), 10
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # fewer than it has
    both, opened = threading.Barrier(2), Image.open

    def open_beside_another(*args, **kwargs):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # for another, which would come in between
        return opened(*args, **kwargs)

    monkeypatch.setattr(Image, "open", open_beside_another)
    with ThreadPoolExecutor(2) as pool:
        sizes = [each.sizes for each in pool.map(PillowImage, [path, path])]
    assert both.broken and sizes[0] == sizes[1] and limit == Image.MAX_IMAGE_PIXELS


def test_levels_are_chosen_at_least_as_fine_as_asked(tmp_path):
    with Slide(pyramid(tmp_path / "s.tif", PIXELS[:199, :249], levels=(1, 2, 8))).open() as reader:
        assert reader.downsamples[1] != 2  # sizes are rounded: 249 / 2 -> 125
        assert [reader.level(factor) for factor in (0.3, 1, 1.9, 2, 7.5, 8.2, 100)] == [0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="downsample=0"):
        Slide(tmp_path / "s.tif").read_region(0, 0, 5, 5, 0)


@pytest.mark.parametrize("alpha", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_transparent_pixels_of_a_tiff_are_glass(tmp_path, alpha, tile):
    rgba = np.dstack([PIXELS, np.full((200, 250), 255, np.uint8)])
    rgba[:50, :70] = 0 if alpha == "assocalpha" else (9, 9, 9, 0)
    rgba[60:80, :70] = (50, 50, 50, 128) if alpha == "assocalpha" else (100, 100, 100, 128)
    tifffile.imwrite(tmp_path / "s.tif", rgba, photometric="rgb", extrasamples=[alpha], tile=tile)
    read = Slide(tmp_path / "s.tif").read()
    assert (read[:50, :70] == 255).all()
    assert np.abs(read[60:80, :70].astype(int) - 177).max() <= 1  # half grey, half glass
    np.testing.assert_array_equal(read[:, 70:], PIXELS[:, 70:])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_other_colours_are_read_as_rgb(tmp_path, mode, suffix):
    if suffix == "png" and mode == "CMYK":
        pytest.skip("PNG has no CMYK")
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / f"s.{suffix}")
    np.testing.assert_array_equal(Slide(tmp_path / f"s.{suffix}").read(), np.asarray(image.convert("RGB")))


# scale

CM = {"resolutionunit": "CENTIMETER"}
INCH = {"resolutionunit": "INCH"}


@pytest.mark.parametrize(
    "write, um",
    [
        (lambda p: pyramid(p / "s.svs", compression="jpeg", description=APERIO), 0.252),
        (lambda p: pyramid(p / "s.tif", resolution=(20000, 20000), **CM), 0.5),
        (lambda p: pyramid(p / "s.tif", resolution=(72, 72), **INCH), None),
        (lambda p: strips(p / "s.tif", resolution=(25400, 25400), **INCH), 1.0),
        (lambda p: strips(p / "s.tif", resolution=(72, 72), **INCH), None),
        (lambda p: strips(p / "s.tif", resolution=(300, 300), **INCH), None),
        (lambda p: strips(p / "s.tif", resolution=(20000, 20000), resolutionunit="NONE"), None),
        (lambda p: strips(p / "s.tif", resolution=(10_000_000, 10_000_000), **CM), None),
        (lambda p: strips(p / "s.tif"), None),
        (lambda p: ome(p / "s.ome.tif", "YXS", photometric="rgb"), 0.25),
        (lambda p: ome(p / "s.ome.tif", "CYX", photometric="minisblack"), 0.25),
        (lambda p: pillow(p / "s.png", dpi=(25400, 25400)), None),
        (lambda p: pillow(p / "s.jpg", dpi=(25400, 25400)), None),
    ],
)
def test_micrometres_per_pixel_come_from_the_file_where_it_means_them(tmp_path, write, um):
    found = Slide(write(tmp_path)).um_per_px
    assert found is None if um is None else found == pytest.approx(um, rel=1e-4)


@pytest.mark.parametrize("unit, um", [("mm", 0.5), ("reference frame", None)])
def test_units_of_ome(tmp_path, unit, um):
    size = {"PhysicalSizeX": 0.0005, "PhysicalSizeXUnit": unit, "PhysicalSizeY": 0.0005, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(tmp_path / "s.ome.tif", PIXELS, photometric="rgb", metadata={"axes": "YXS", **size})
    assert Slide(tmp_path / "s.ome.tif").um_per_px == (um and pytest.approx(um))


def test_pixels_that_are_not_square_have_no_single_scale(tmp_path, caplog):
    assert Slide(strips(tmp_path / "a.tif", resolution=(20000, 20800), **CM)).um_per_px == pytest.approx(
        0.4904, abs=1e-4
    )
    assert Slide(strips(tmp_path / "b.tif", resolution=(20000, 22000), **CM)).um_per_px is None
    assert "b.tif: pixels are 0.5 um wide and 0.4545 um high" in caplog.text and "a.tif" not in caplog.text


def test_a_section_takes_the_scale_of_its_slide_unless_one_is_given(tmp_path, caplog):
    section = make_section(tmp_path, um_per_px=None)
    assert section.um_per_px is None
    slide = Slide(strips(tmp_path / "s.tif", resolution=(20000, 20000), **CM))
    assert dataclasses.replace(section, slide=slide).um_per_px == pytest.approx(0.5)
    assert dataclasses.replace(section, slide=slide, um_per_px=0.53).um_per_px == 0.53
    assert not caplog.records
    assert dataclasses.replace(section, slide=slide, um_per_px=0.25).um_per_px == 0.25
    (record,) = caplog.records
    for words in ("A1", "0.25 was given", "s.tif says 0.5"):
        assert words in record.getMessage()


# what is refused


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind.startswith("pyramid"):
        path = pyramid(buffer, compression="jpeg" if kind == "pyramid-jpeg" else None)
        return path.getvalue()
    Image.fromarray(slide_pixels(40, 50)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")  # what Pillow thinks of them
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "pyramid", "pyramid-jpeg"])
def test_an_image_cut_off_anywhere_is_refused_in_one_line(tmp_path, kind):
    whole = encoded(kind)
    path = tmp_path / "cut.img"
    size = (250, 200) if kind.startswith("pyramid") else (50, 40)
    for length in [0, 1, 5, 20, 33, 50, 100, 200, 400, 650, len(whole) // 4, len(whole) // 2]:
        path.write_bytes(whole[:length])
        slide = Slide(path)
        with pytest.raises(InputError, match=r"cut\.img is (not an image|truncated|damaged)") as raised:
            slide.read()
        assert "\n" not in str(raised.value)
        if not kind.startswith("pyramid"):  # of which the last level may be whole
            with pytest.raises(InputError, match=r"cut\.img is (not an image|truncated|damaged)"):
                slide.thumbnail(20)
        with contextlib.suppress(InputError):  # the header may be whole
            assert slide.size == size


def test_compressed_bytes_that_were_overwritten_are_refused(tmp_path):
    for name in ("pyramid-jpeg", "strips-lzw", "ome-cyx", "png"):
        path = FORMATS[name][0](tmp_path)
        data = bytearray(path.read_bytes())
        middle = len(data) // 3
        data[middle : middle + 4000] = bytes(4000)
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"is damaged, or of a kind that is not read: \S+"):
            Slide(path).read()


def test_something_else_is_not_an_image(tmp_path):
    path = tmp_path / "slide.svs"
    path.write_text("section,patient\n")
    with pytest.raises(InputError, match=r"slide\.svs is not an image that OpenSlide, tifffile or Pillow can read"):
        Slide(path).size  # noqa: B018
    with pytest.raises(InputError, match=r"gone\.svs does not exist"):
        Slide(tmp_path / "gone.svs")


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("name", ["s.tif", "s.ome.tif"])
def test_more_than_8_bits_a_channel_are_refused(tmp_path, tile, dtype, name):
    tifffile.imwrite(tmp_path / name, PIXELS.astype(dtype), photometric="rgb", tile=tile)
    with pytest.raises(InputError, match=r"has (16|32) bits a channel; save it with 8 bits a channel"):
        Slide(tmp_path / name).size  # noqa: B018


def test_a_16_bit_png_is_refused(tmp_path):
    Image.fromarray(PIXELS[..., 0].astype(np.uint16)).save(tmp_path / "s.png")
    with pytest.raises(InputError, match=r"has I;16 pixels; save it with 8 bits a channel"):
        Slide(tmp_path / "s.png").read()


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_a_turned_image_is_refused(tmp_path, tile):
    tifffile.imwrite(tmp_path / "s.tif", PIXELS, photometric="rgb", tile=tile, extratags=[(274, "H", 1, 6, True)])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "s.jpg", exif=exif)
    for name in ("s.tif", "s.jpg"):
        with pytest.raises(InputError, match="is stored turned"):
            Slide(tmp_path / name).size  # noqa: B018


def test_channels_and_planes_that_no_h_and_e_image_has(tmp_path):
    shapes = {"CYX": (5, 40, 50), "ZYXS": (2, 40, 50, 3)}
    for axes, shape in shapes.items():
        kind = {"photometric": "rgb"} if axes.endswith("S") else {"photometric": "minisblack"}
        tifffile.imwrite(tmp_path / "s.ome.tif", np.zeros(shape, np.uint8), metadata={"axes": axes}, **kind)
        with pytest.raises(InputError, match=r"OME-TIFF of [52] [CZ] x 40 Y x 50 X.*one plane of 3 channels"):
            Slide(tmp_path / "s.ome.tif").size  # noqa: B018


def test_planes_of_ome_that_the_file_does_not_hold(tmp_path):
    """As of a set of files, of which one was copied."""
    pixels = 'DimensionOrder="XYCZT" Type="uint8" SizeX="50" SizeY="40" SizeC="3" SizeZ="1" SizeT="1"'
    channels = "".join(f'<Channel ID="Channel:0:{i}" SamplesPerPixel="1"/>' for i in range(3))
    description = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" '
        f'{pixels}>{channels}<TiffData FirstC="0" IFD="0" PlaneCount="1"/></Pixels></Image></OME>'
    )
    grey = np.zeros((40, 50), np.uint8)
    tifffile.imwrite(tmp_path / "s.ome.tif", grey, photometric="minisblack", description=description, metadata=None)
    with pytest.raises(InputError, match="planes that the file does not hold"):
        Slide(tmp_path / "s.ome.tif").size  # noqa: B018


def test_pages_that_are_no_levels_are_said(tmp_path, caplog):
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        writer.write(PIXELS, photometric="rgb", metadata=None)
        writer.write(PIXELS[::-1], photometric="rgb", metadata=None)
        writer.write(PIXELS[:30, :40], photometric="rgb", metadata=None, subfiletype=1)  # a label, not a level
    slide = Slide(tmp_path / "s.tif")
    assert slide.size == (250, 200)
    np.testing.assert_array_equal(slide.read(), PIXELS)
    assert len(caplog.records) == 1
    assert "1 more image" in caplog.text and "(250 x 200 px)" in caplog.text
    with slide.open() as reader:
        assert len(reader.sizes) == 1


def test_memory_is_checked_where_an_image_is_decoded_whole(tmp_path, monkeypatch):
    jpg, tif = Slide(pillow(tmp_path / "s.jpg")), Slide(pyramid(tmp_path / "s.tif"))
    one = Slide(strips(tmp_path / "one.tif", rowsperstrip=200, compression="deflate"))
    monkeypatch.setattr(limits, "free_memory", lambda: 100_000)
    for read in (jpg.read, lambda: jpg.read_region(0, 0, 5, 5), tif.read, lambda: one.read_region(0, 0, 5, 5)):
        with pytest.raises(InputError, match=r"decoded whole needs 0.0 GB of memory, 0.0 GB are free"):
            read()
    assert jpg.size == (250, 200)
    np.testing.assert_array_equal(tif.read_region(30, 40, 50, 60), PIXELS[40:100, 30:80])
    monkeypatch.undo()
    assert 1e8 < limits.free_memory() < 1e14


def test_the_digest_of_a_mirax_slide_covers_its_folder(tmp_path):
    (tmp_path / "s.mrxs").write_bytes(b"stub")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "Data0000.dat").write_bytes(b"pixels")
    before = file_digest(tmp_path / "s.mrxs")
    (tmp_path / "s" / "Data0001.dat").write_bytes(b"more")
    after = file_digest(tmp_path / "s.mrxs")
    assert len({before, after, file_digest(tmp_path / "s" / "Data0000.dat")}) == 3
    (tmp_path / "s" / "Data0001.dat").unlink()
    assert file_digest(tmp_path / "s.mrxs") == before


# folders as they are on people's disks


def test_litter_of_operating_systems_is_no_slide_and_every_ending_is_taken(tmp_path):
    slides = ["a.svs", "b.TIF", "c.ome.tiff", "d.btf", "e.tf8", "f.tf2", "g.ndpi", "h.OME.BTF", "i.mrxs", "j.v2.jpg"]
    litter = ["._a.svs", ".DS_Store", ".hidden.tif", "Thumbs.db", "desktop.ini", "Icon\r", "notes.txt"]
    for name in slides + litter:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "i").mkdir()
    (tmp_path / "folder.tif").mkdir()
    assert [path.name for path in slide_files(tmp_path)] == slides
    assert [slide_name(path) for path in slide_files(tmp_path)] == [*"abcdefghi", "j.v2"]
    assert slide_name(Path(".ome.tif")) == ".ome"


def test_the_parts_of_a_hamamatsu_slide_are_no_slides_of_their_own(tmp_path):
    for name in ("CMU 1.vms", "CMU 1(1,0).jpg", "CMU 1_map2.jpg", "other.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in slide_files(tmp_path)] == ["CMU 1.vms", "other.jpg"]


def test_a_path_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    strips(tmp_path / "s.tif")
    assert Slide("~/s.tif").path == tmp_path / "s.tif"
    with pytest.raises(InputError, match="is a folder"):
        Slide("~")


# metadata that are invalid


def with_orientation(path: Path, value: int) -> Path:
    if path.suffix == ".tif":
        return strips(path, extratags=[(274, "H", 1, value, True)])
    exif = Image.Exif()
    exif[0x0112] = value
    return pillow(path, exif=exif)


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
@pytest.mark.parametrize("value", [0, 1, 3, 9, 255])
def test_an_orientation_that_exif_does_not_define_is_ignored_and_said(tmp_path, suffix, value, caplog):
    caplog.set_level("INFO")
    slide = Slide(with_orientation(tmp_path / f"s.{suffix}", value))
    if value == 3:
        with pytest.raises(InputError, match="stored turned"):
            slide.size  # noqa: B018
        return
    assert slide.size == (250, 200) and slide.read().shape == (200, 250, 3)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("stexp")]
    assert [f"states the orientation {value}," in text for text in ours] == [True] * (value != 1)


def test_exif_that_cannot_be_parsed_is_ignored_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    slide = Slide(pillow(tmp_path / "s.jpg", exif=b"Exif\0\0II*\0" + b"\xff" * 40))
    assert slide.size == (250, 200)
    assert "s.jpg: Corrupt EXIF data" in caplog.text


def rational(tag: int, numerator: int, denominator: int) -> tuple:
    return tag, 5, 1, (numerator, denominator), True


@pytest.mark.parametrize(
    "tags, said",
    [
        ([rational(282, 0, 0), rational(283, 0, 0), (296, 3, 1, 3, True)], True),
        ([rational(282, 72, 1), rational(283, 72, 1), (296, 3, 1, 2, True)], True),
        ([rational(282, 20000, 1), rational(283, 20000, 1), (296, 3, 1, 77, True)], True),
        ([rational(282, 4294967295, 1), rational(283, 4294967295, 1), (296, 3, 1, 3, True)], True),
        ([(282, 2, 3, b"20k", True), (283, 2, 3, b"20k", True), (296, 3, 1, 3, True)], True),
        ([rational(282, 72, 1), rational(283, 72, 1), (296, 3, 1, 1, True)], False),
    ],
)
def test_a_resolution_that_no_slide_has_is_ignored_and_said(tmp_path, tags, said, caplog):
    caplog.set_level("INFO")
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        writer.write(PIXELS, photometric="rgb", metadata=None, resolution=(1, 1), resolutionunit=1, extratags=tags)
    path = tmp_path / "s.tif"
    # tifffile writes its own tags beside: what is first in the file counts
    with tifffile.TiffFile(path, mode="r+") as file:
        for code, kind, _, value, _ in tags:
            file.pages[0].tags[code].overwrite(value, dtype=kind)
    slide = Slide(path)
    assert slide.um_per_px is None
    np.testing.assert_array_equal(slide.read(), PIXELS)
    assert any("as the size of its pixels it states" in text for text in caplog.messages) == said


@pytest.mark.parametrize("size", ["0", "-0.5", "nan", "inf", "half", "1e300"])
def test_a_size_of_ome_that_no_slide_has_is_ignored_and_said(tmp_path, size, caplog):
    caplog.set_level("INFO")
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
    tifffile.imwrite(tmp_path / "s.ome.tif", PIXELS, photometric="rgb", metadata=metadata)
    slide = Slide(tmp_path / "s.ome.tif")
    assert slide.um_per_px is None and slide.size == (250, 200)
    assert "as the size of its pixels it states" in caplog.text


@pytest.mark.parametrize("mpp", ["0", "-1", "1e9"])
def test_a_scale_of_an_svs_that_no_slide_has_is_ignored_and_said(tmp_path, mpp, caplog):
    caplog.set_level("INFO")
    description = APERIO.replace("0.2520", mpp)
    slide = Slide(pyramid(tmp_path / "s.svs", compression="jpeg", description=description))
    assert slide.um_per_px is None and slide.size == (250, 200)
    assert "as the size of its pixels it states" in caplog.text


@pytest.mark.parametrize(
    ("bounds", "origin"),
    [
        ({"x": 300, "y": 100, "width": 2000, "height": 1500}, [300, 100]),
        (
            {"x": 0, "y": 100, "width": 2600, "height": 1500},
            [0, 100],
        ),  # as wide as the slide: QuPath moves it all the same
        ({"x": 300, "y": 100}, [0, 0]),
        ({"x": 300, "y": 100, "width": "?", "height": 1500}, [0, 0]),
        ({}, [0, 0]),
    ],
)
def test_where_qupath_begins_to_count(monkeypatch, bounds, origin):
    stated = {f"openslide.bounds-{key}": str(value) for key, value in bounds.items()}

    class Slide:
        properties = stated
        detect_format = staticmethod(lambda path: "mirax")

        def __init__(self, path):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("openslide.OpenSlide", Slide)
    assert qupath_origin("slide.mrxs") == origin


# headers that the pixels contradict


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("order", [(4, 2, 1), (2, 1, 4), (1, 4, 2)])
@pytest.mark.parametrize("marked", ["but the largest", "all"])
def test_levels_out_of_order_are_read_by_size(tmp_path, tile, order, marked):
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        for factor in order:
            kind = int(factor > 1 or marked == "all")
            resolution = {"resolution": (20000 / factor, 20000 / factor), "resolutionunit": "CENTIMETER"}
            writer.write(
                smaller(PIXELS, factor), photometric="rgb", metadata=None, subfiletype=kind, tile=tile, **resolution
            )
    slide = Slide(tmp_path / "s.tif")
    assert slide.size == (250, 200) and slide.um_per_px == pytest.approx(0.5)
    np.testing.assert_array_equal(slide.read(), PIXELS)
    with slide.open() as reader:
        assert reader.sizes == [(250, 200), (125, 100), (63, 50)]
        for level, factor in enumerate((1, 2, 4)):
            np.testing.assert_array_equal(reader.read(0, 0, 60, 40, level), smaller(PIXELS, factor)[:40, :60])


@pytest.mark.parametrize("kind", ["imagej", "shaped"])
def test_channels_as_pages_are_the_colours_they_are_said_to_be(tmp_path, kind):
    channels = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
    metadata = {"axes": "CYX"}
    tifffile.imwrite(tmp_path / "s.tif", channels, photometric="minisblack", imagej=kind == "imagej", metadata=metadata)
    np.testing.assert_array_equal(Slide(tmp_path / "s.tif").read(), PIXELS)


@pytest.mark.parametrize("metadata", [None, {"axes": "ZYX"}, {"axes": "TYX"}])
def test_grey_pages_of_one_size_are_no_image_of_h_and_e(tmp_path, metadata):
    channels = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "s.tif", channels, photometric="minisblack", metadata=metadata)
    with pytest.raises(InputError, match=r"holds 3 grey images of one size.*save it as one image of RGB"):
        Slide(tmp_path / "s.tif").size  # noqa: B018


def test_channels_of_ome_are_the_colours_it_states(tmp_path):
    signed = [int(np.int32(np.uint32(rgba))) for rgba in (0x0000FFFF, 0xFF0000FF, 0x00FF00FF)]  # blue, red, green
    channels = np.ascontiguousarray(PIXELS[..., [2, 0, 1]].transpose(2, 0, 1))
    for colours, fits in ((signed, True), ([65535, 65535, -1], False)):
        metadata = {"axes": "CYX", "Channel": {"Name": ["b", "r", "g"], "Color": colours}}
        tifffile.imwrite(tmp_path / "s.ome.tif", channels, photometric="minisblack", metadata=metadata)
        if fits:
            np.testing.assert_array_equal(Slide(tmp_path / "s.ome.tif").read(), PIXELS)
        else:
            with pytest.raises(InputError, match="channels are not red, green and blue"):
                Slide(tmp_path / "s.ome.tif").size  # noqa: B018


@pytest.mark.parametrize("change", [{257: 400}, {256: 500}, {257: 200_000}])
@pytest.mark.parametrize(
    "options", [{}, {"rowsperstrip": 7}, {"rowsperstrip": 7, "compression": "zlib"}, {"tile": (64, 64)}]
)
def test_dimensions_that_the_pixels_do_not_fill_are_refused(tmp_path, change, options):
    path = strips(tmp_path / "s.tif", **options)
    with tifffile.TiffFile(path, mode="r+") as file:
        for code, value in change.items():
            file.pages[0].tags[code].overwrite(value, dtype=4)
    with pytest.raises(InputError, match=r"s\.tif") as raised:
        Slide(path).read()
    assert "truncated" not in str(raised.value) and "\n" not in str(raised.value)


def test_planes_that_the_header_takes_for_interleaved_are_refused(tmp_path):
    for options in ({}, {"rowsperstrip": 7, "compression": "zlib"}, {"tile": (64, 64)}):
        path = planes(tmp_path / "s.tif", **options)
        with tifffile.TiffFile(path, mode="r+") as file:
            file.pages[0].tags[284].overwrite(1, dtype=3)
        try:
            read = Slide(path).read()
        except InputError as error:
            assert "contradicts its pixels" in str(error) or "damaged" in str(error)
        else:
            np.testing.assert_array_equal(read, PIXELS)


# causes


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"", "it is empty"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "what macOS keeps beside a file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "pointer of Git LFS"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\x1f\x8b\x08\0" + bytes(50), "compressed: unpack it"),
        (bytes(5000), "begins with zeros"),
    ],
)
@pytest.mark.parametrize("suffix", ["tif", "svs", "jpg", "mrxs"])
def test_what_is_no_image_is_said_to_be_what_it_is(tmp_path, content, cause, suffix):
    path = tmp_path / f"s.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=cause) as raised:
        Slide(path).size  # noqa: B018
    assert "truncated" not in str(raised.value)


@pytest.mark.parametrize("name", ["strips", "strips-lzw", "tiled", "pyramid", "jpg", "png"])
def test_only_an_image_that_lacks_its_end_is_called_truncated(tmp_path, name):
    path = FORMATS[name][0](tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match="is truncated, its end is missing"):
        Slide(path).read()
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) // 3 + 3000] = bytes(3000)
    path.write_bytes(damaged)
    with contextlib.suppress(InputError):  # pixels that are stored as they are can be anything
        Slide(path).read()
        return
    with pytest.raises(InputError, match="is damaged, or of a kind that is not read"):
        Slide(path).read()


def test_a_file_that_may_not_be_read_is_said_to_be(tmp_path, monkeypatch):
    path = strips(tmp_path / "s.tif")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("stexp.data.slides.slide.open_image", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        Slide(path).size  # noqa: B018


# bombs


def png_that_says(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + rows


def tiff_that_says(path: Path, width: int, height: int) -> Path:
    strips(path, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags[256].overwrite(width, dtype=4)
        file.pages[0].tags[257].overwrite(height, dtype=4)
    return path


@pytest.mark.parametrize("size", [(30_000, 30_000), (2_000_000, 2), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_dimensions_that_a_file_cannot_hold_are_refused_before_memory_is_taken(tmp_path, size, suffix):
    path = tmp_path / f"s.{suffix}"
    if suffix == "png":
        path.write_bytes(png_that_says(*size))
    else:
        tiff_that_says(path, *size)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"which no slide has|which cannot hold them|contradicts its pixels"):
        Slide(path).size  # noqa: B018
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def test_exif_does_not_decode_the_image_before_its_size_is_checked(tmp_path, monkeypatch):
    path = pillow(tmp_path / "s.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert Slide(path).size == (250, 200)


def test_a_tile_that_would_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    path = strips(tmp_path / "s.tif", tile=(256, 256), compression="zlib")
    monkeypatch.setattr(limits, "free_memory", lambda: 100_000)
    with pytest.raises(InputError, match="decoded whole needs"):
        Slide(path).size  # noqa: B018


def test_the_thumbnail_of_a_very_long_image_takes_little_memory(tmp_path):
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((4, 200_000, 3), np.uint8), photometric="rgb")
    tracemalloc.start()
    small, _ = Slide(tmp_path / "s.tif").thumbnail(100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert small.shape == (1, 100, 3) and peak < 10 * 4 * 200_000


@pytest.mark.data
def test_the_slide_of_the_mouse_colon(real_data):
    slide = Slide(real_data / "visium_mouse_colon" / "image.tif")
    assert slide.size == (7936, 8192) and slide.um_per_px == pytest.approx(0.97, abs=1e-3)
    with slide.open() as reader:
        assert reader.downsamples == [1, 2, 4, 8, 16]
    small, scale = slide.thumbnail(512)
    assert small.shape == (512, 496, 3) and scale == 1 / 16
    with Image.open(slide.path) as image:
        theirs = np.asarray(image.crop((4000, 4000, 4512, 4512)).convert("RGB"))
    assert np.abs(slide.read_region(4000, 4000, 512, 512).astype(int) - theirs).mean() < 1.5
