"""SpatialData stores: read as what SpaceRanger wrote, images by region, and results put back."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

spatialdata = pytest.importorskip("spatialdata")

from fakes import spatialdata as fake  # noqa: E402
from fakes import visium  # noqa: E402
from spatialdata.models import Image2DModel, PointsModel, ShapesModel  # noqa: E402
from spatialdata.transformations import Affine, Identity, Scale, Translation  # noqa: E402

from stexp.cli.prediction import find_slides  # noqa: E402
from stexp.data.readers.spatialdata import read_spatialdata  # noqa: E402
from stexp.data.readers.visium import read_visium  # noqa: E402
from stexp.data.slides.ome_zarr import ZarrImage  # noqa: E402
from stexp.data.slides.slide import Slide  # noqa: E402
from stexp.errors import InputError  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    fake.write(root)
    return root


def circles(xy, systems, n=None):
    return ShapesModel.parse(np.asarray(xy, float), geometry=0, radius=5.0, transformations=systems)


def test_a_store_of_visium_is_the_section_that_spaceranger_wrote(root, tmp_path):
    visium.write_section(tmp_path / "a", 2, seed=0)
    (own,), (other,) = read_visium(tmp_path / "a"), read_spatialdata(root, ["a"])
    assert other.name == "a" and other.patient == "P1"
    assert list(own.spots.obs_names) == list(other.spots.obs_names)
    assert list(own.genes) == list(other.genes)
    np.testing.assert_array_equal(own.spots.X.toarray(), other.spots.X.toarray())
    np.testing.assert_array_equal(own.xy_px, other.xy_px)
    np.testing.assert_array_equal(own.array_xy, other.array_xy)
    assert other.um_per_px == pytest.approx(own.um_per_px, rel=1e-4)  # fitted on tissue alone
    np.testing.assert_array_equal(own.image.read(), other.image.read())
    assert {path.name for path in other.files} == {"a", "table", "a_full_image"}


def test_an_image_of_levels_is_read_by_region(root, monkeypatch):
    (section,) = read_spatialdata(root / "a.zarr")
    whole = np.asarray(visium.picture(0))
    with section.image.open() as reader:
        assert reader.sizes == [(330, 250), (165, 125), (82, 62)]
        np.testing.assert_array_equal(reader.read(300, 10, 60, 20)[:, :30], whole[10:30, 300:])
        assert (reader.read(300, 10, 60, 20)[:, 30:] == 255).all(), "white beyond the border"
        assert reader.level(2.0) == 1 and reader.read(0, 0, 5, 4, level=2).shape == (4, 5, 3)
    small, scale = section.image.thumbnail(83)
    assert small.shape[1] == 83 and scale == pytest.approx(83 / 330)


def test_without_a_full_image_positions_and_scale_are_of_hires(root, caplog):
    (section,) = read_spatialdata(root, ["d"])
    (reference,) = read_spatialdata(root, ["a"])
    assert section.image.path.name == "d_hires_image" and "no full-resolution image" in caplog.text
    assert section.um_per_px == pytest.approx(fake.UM_PER_PX / visium.HIRES, rel=1e-3)
    np.testing.assert_allclose(section.xy_px.max(0), reference.xy_px.max(0) * visium.HIRES)
    (lowres,) = read_spatialdata(root, ["a"], image="lowres_image")
    np.testing.assert_allclose(lowres.xy_px, reference.xy_px * visium.HIRES / 3)


def test_bins_of_visium_hd_are_chosen_by_their_table(tmp_path):
    fake.write_visium_hd(tmp_path / "hd.zarr")
    with pytest.raises(InputError, match=r"2 tables \(square_008um, square_016um\); choose one: data.table=square_008"):
        read_spatialdata(tmp_path)
    with pytest.raises(InputError, match=r"no table square_08um .* did you mean square_008um"):
        read_spatialdata(tmp_path, table="square_08um")
    for um, n in ((8, 144), (16, 36)):
        (section,) = read_spatialdata(tmp_path, table=f"square_{um:03}um")
        assert len(section) == n and section.um_per_px == pytest.approx(2.0)
        np.testing.assert_allclose(section.xy_px[0], 60 + um / 4)
        assert section.name == "hd" and section.image.path.name == "hd_full_image"


def test_coordinates_go_through_the_transformations_of_both_elements(tmp_path):
    """Shapes in micrometres, turned, on an image that is shifted and scaled in the common system."""
    table = fake.visium_table()
    pixels = table.obsm["spatial"]
    turn = np.array([[0.0, -1, 400], [1, 0, -30], [0, 0, 1]])  # pixels of the image -> the common system
    to_common = Affine(turn, input_axes=("x", "y"), output_axes=("x", "y"))
    um = (np.column_stack([pixels, np.ones(len(pixels))]) @ turn.T)[:, :2] * 2.5
    image = Image2DModel.parse(fake.planes(visium.picture()), dims=("c", "y", "x"), transformations={"mine": to_common})
    changes = {
        "images": {"he": image},
        "shapes": {"t": circles(um, {"mine": Scale([0.4, 0.4], axes=("x", "y"))})},
    }
    fake.write_visium(tmp_path / "t.zarr", **changes)
    (section,) = read_spatialdata(tmp_path)
    np.testing.assert_allclose(section.xy_px, pixels, atol=1e-6)


def test_scale_without_an_array_is_that_of_a_system_in_micrometres(tmp_path, caplog):
    table = fake.visium_table()
    pixels = table.obsm["spatial"]
    del table.obs["array_row"], table.obs["array_col"]
    systems = {"px": Identity(), "sample_um": Scale([0.3, 0.3], axes=("x", "y"))}
    elements = {"tables": {"table": fake.annotate(table, "t", "spot_id")}, "shapes": {"t": circles(pixels, systems)}}
    for name, own in (("um", systems), ("px", {"px": Identity()})):
        image = Image2DModel.parse(fake.planes(visium.picture()), dims=("c", "y", "x"), transformations=own)
        fake.write_visium(tmp_path / name / "t.zarr", **elements, images={"he": image})
    (section,) = read_spatialdata(tmp_path / "um")
    assert section.um_per_px == pytest.approx(0.3)
    nearest = np.sort(np.linalg.norm(section.array_xy[:, None] - section.array_xy, axis=-1), axis=1)[:, 1]
    assert np.median(nearest) == pytest.approx(1), "neighbours are neighbours on the array"
    assert "data.um_per_px" not in caplog.text
    (section,) = read_spatialdata(tmp_path / "px")
    assert section.um_per_px is None and "data.um_per_px= does" in caplog.text


def test_points_are_spots_and_rows_without_a_place_are_left_out(tmp_path, caplog):
    table = fake.visium_table()
    pixels = pd.DataFrame(table.obsm["spatial"], columns=["x", "y"])[:-2]
    points = PointsModel.parse(pixels, transformations={"t": Identity()})
    fake.write_visium(tmp_path / "t.zarr", shapes={}, points={"t": points})
    (section,) = read_spatialdata(tmp_path)
    assert list(section.spots.obs_names) == list(table.obs_names[:-2])
    np.testing.assert_allclose(section.xy_px, table.obsm["spatial"][:-2])
    assert "2 of 34 rows of table have no shape" in caplog.text


def test_features_are_treated_as_in_every_container(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    table = fake.visium_table()
    table.var["feature_types"] = ["Antibody Capture", *["Gene Expression"] * (table.n_vars - 1)]
    fake.write_visium(tmp_path / "t.zarr", tables={"table": fake.annotate(table, "t", "spot_id")})
    (section,) = read_spatialdata(tmp_path)
    assert "G000" not in section.genes and len(section.genes) == 79 and "not Gene Expression" in caplog.text


def test_a_table_of_two_regions_is_two_sections(tmp_path):
    from spatialdata.models import TableModel

    table = fake.visium_table()
    pixels = table.obsm["spatial"]
    half = np.arange(table.n_obs) < 20
    table.obs["region"] = pd.Categorical(np.where(half, "left", "right"))
    model = TableModel.parse(table, region=["left", "right"], region_key="region", instance_key="spot_id")
    image = Image2DModel.parse(fake.planes(visium.picture()), dims=("c", "y", "x"), transformations={"t": Identity()})
    shapes = {}
    for name, rows in (("left", half), ("right", ~half)):
        shapes[name] = ShapesModel.parse(
            pixels[rows], geometry=0, radius=5.0, index=table.obs["spot_id"][rows], transformations={"t": Identity()}
        )
    fake.write_visium(tmp_path / "t.zarr", images={"he": image}, shapes=shapes, tables={"table": model})
    left, right = read_spatialdata(tmp_path)
    assert (left.name, right.name, len(left), len(right)) == ("left", "right", 20, table.n_obs - 20)
    np.testing.assert_allclose(right.xy_px, pixels[~half])
    assert [section.name for section in read_spatialdata(tmp_path, ["right"])] == ["right"]


def test_what_is_missing_or_ambiguous_is_one_line(root, tmp_path):
    def refused(pattern: str, place: Path, **options) -> None:
        with pytest.raises(InputError, match=pattern) as error:
            read_spatialdata(place, **options)
        assert "\n" not in str(error.value)

    refused(r"does not exist", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused(r"no SpatialData store", tmp_path / "empty")
    refused(r"no section e in .* there are a, b, c, d", root, sections=["e"])
    refused(r"no image fullimage; there are .*a_full_image", root, sections=["a"], image="fullimage")
    shutil.copytree(root / "a.zarr", tmp_path / "cut" / "a.zarr")
    shutil.rmtree(tmp_path / "cut" / "a.zarr" / "shapes" / "a")
    refused(r"a.zarr cannot be read as SpatialData|annotates a, which is neither", tmp_path / "cut")
    he = fake.planes(visium.picture())

    def image(**systems) -> object:
        return Image2DModel.parse(he, dims=("c", "y", "x"), transformations=systems)

    fake.write_visium(tmp_path / "two" / "t.zarr", images={"x": image(t=Identity()), "y": image(t=Identity())})
    refused(r"x, y are images of one resolution; choose one: data.image=x", tmp_path / "two")
    fake.write_visium(tmp_path / "apart" / "t.zarr", images={"x": image(other=Identity())})
    refused(r"no coordinate system has both the spots and an image \(x\)", tmp_path / "apart")
    shift = Translation([50, 0], axes=("x", "y"))
    fake.write_visium(tmp_path / "differ" / "t.zarr", images={"x": image(t=Identity(), t_downscaled_hires=shift)})
    refused(r"systems t and t_downscaled_hires place the spots up to", tmp_path / "differ")


def test_a_folder_of_zarr_that_is_no_image_is_refused_as_a_slide(root):
    with pytest.raises(InputError, match=r"no image of OME-Zarr; it holds .*images/a_full_image"):
        Slide(root / "a.zarr").size  # noqa: B018
    with pytest.raises(InputError, match="no image of OME-Zarr"):
        Slide(root / "a.zarr" / "tables" / "table").size  # noqa: B018


def test_an_image_of_a_store_is_a_slide_to_predict(root):
    image = root / "a.zarr" / "images" / "a_full_image"
    assert find_slides(str(image)) == {"a_full_image": image}


@pytest.mark.parametrize(
    ("of_all", "expected"),
    [
        (None, (0.5, 0.25)),
        ([{"type": "scale", "scale": [1, 3, 2]}], (1.0, 0.75)),
        ([{"type": "scale", "scale": [1, 3, 2]}, {"type": "translation", "translation": [0, 9, 9]}], (1.0, 0.75)),
        ([{"type": "scale", "scale": [1, 4, 4], "output": {"name": "global"}}], (0.5, 0.25)),
        ([{"type": "scale", "path": "scales"}], None),
    ],
)
def test_micrometres_are_those_of_a_level_then_of_all_levels(tmp_path, of_all, expected):
    """OME-NGFF 0.4: the transformations of a data set first, then those of the multiscale; axes c, y, x."""
    import zarr

    group = zarr.open_group(tmp_path / "i.zarr", mode="w", zarr_format=2)
    group["0"], group["1"] = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 4, 4), np.uint8)
    units = [{"name": name, "unit": "micrometer"} for name in "yx"]
    datasets = [
        {"path": path, "coordinateTransformations": [{"type": "scale", "scale": [1, 0.25 * side, 0.5 * side]}]}
        for path, side in (("1", 2), ("0", 1))
    ]
    multiscale = {"version": "0.4", "axes": [{"name": "c"}, *units], "datasets": datasets}
    group.attrs["multiscales"] = [multiscale | ({} if of_all is None else {"coordinateTransformations": of_all})]
    assert ZarrImage(tmp_path / "i.zarr").um_xy == expected


def test_an_image_of_other_pixels_is_not_taken_for_one_of_tissue(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    stain = Image2DModel.parse(
        np.zeros((2, 250, 330), np.uint16), dims=("c", "y", "x"), transformations={"t": Identity()}
    )
    fake.write_visium(tmp_path / "t.zarr", images={"if": stain})
    (section,) = read_spatialdata(tmp_path)
    assert section.slide is None and "its spots can only be referred to" in caplog.text
    with pytest.raises(InputError, match=r"2 c x 250 y x 330 x of uint16; an image of H&E has 3 channels"):
        read_spatialdata(tmp_path, image="if")


def test_pixels_that_are_pickled_are_not_unpickled(tmp_path):
    """zarr 2 has a codec that runs what a store from anyone holds."""

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    image = tmp_path / "image"
    (image / "0").mkdir(parents=True)
    axes = [{"name": axis} for axis in "cyx"]
    scales = {"multiscales": [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}]}
    array = {"zarr_format": 2, "shape": [3, 8, 8], "chunks": [3, 8, 8], "dtype": "|u1", "order": "C", "fill_value": 0}
    array |= {"compressor": None, "filters": [{"id": "pickle", "protocol": 5}]}
    (image / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    (image / ".zattrs").write_text(json.dumps(scales))
    (image / "0" / ".zarray").write_text(json.dumps(array))
    (image / "0" / "0.0.0").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match="is damaged, or of a kind that is not read"):
        Slide(image).read()
    assert not (tmp_path / "run").exists()
    (image / "0" / ".zarray").write_text(json.dumps(array | {"filters": None}))
    (image / "0" / "0.0.0").write_bytes(bytes(range(192)))
    np.testing.assert_array_equal(Slide(image).read()[0, 1], [1, 65, 129])
