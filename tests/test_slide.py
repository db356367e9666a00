from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from sections import make_section, slide_pixels

from stexp.data.slides import formats as slide_formats
from stexp.data.slides.formats import OpenSlideImage, PillowImage, TiffImage
from stexp.data.slides.slide import Slide
from stexp.data.slides.tiles import file_digest
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
    monkeypatch.setattr(slide_formats, "STRIP_BYTES", 3 * 250 * 30)  # so that whole reads have seams
    monkeypatch.setattr(slide_formats, "BLOCK_PX", 100)
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
    assert "A1: um_per_px 0.25 was given, the file s.tif says 0.5; the given one counts" in record.getMessage()


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
        with pytest.raises(InputError, match=r"cut\.img is (not an image|truncated or damaged)") as raised:
            slide.read()
        assert "\n" not in str(raised.value)
        if not kind.startswith("pyramid"):  # of which the last level may be whole
            with pytest.raises(InputError, match=r"cut\.img is (not an image|truncated or damaged)"):
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
        with pytest.raises(InputError, match=r"is truncated or damaged: \S+"):
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


def test_pages_that_are_no_levels_are_said(tmp_path, caplog):
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        writer.write(PIXELS, photometric="rgb", metadata=None)
        writer.write(PIXELS[::-1], photometric="rgb", metadata=None)
        writer.write(PIXELS[:30, :40], photometric="rgb", metadata=None, subfiletype=1)  # a label, not a level
    slide = Slide(tmp_path / "s.tif")
    assert slide.size == (250, 200)
    np.testing.assert_array_equal(slide.read(), PIXELS)
    assert len(caplog.records) == 1
    assert "holds 1 more image(s), which are no reduced copies of the first; the first is used (250 x 200 px)" in (
        caplog.text
    )
    with slide.open() as reader:
        assert len(reader.sizes) == 1


def test_memory_is_checked_where_an_image_is_decoded_whole(tmp_path, monkeypatch):
    jpg, tif = Slide(pillow(tmp_path / "s.jpg")), Slide(pyramid(tmp_path / "s.tif"))
    one = Slide(strips(tmp_path / "one.tif", rowsperstrip=200, compression="deflate"))
    monkeypatch.setattr(slide_formats, "free_memory", lambda: 100_000)
    for read in (jpg.read, lambda: jpg.read_region(0, 0, 5, 5), tif.read, lambda: one.read_region(0, 0, 5, 5)):
        with pytest.raises(InputError, match=r"decoded whole needs 0.0 GB of memory, 0.0 GB are free"):
            read()
    assert jpg.size == (250, 200)
    np.testing.assert_array_equal(tif.read_region(30, 40, 50, 60), PIXELS[40:100, 30:80])
    monkeypatch.undo()
    assert 1e8 < slide_formats.free_memory() < 1e14


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
