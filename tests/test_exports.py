"""Exports, read back with what users open them with, or held against the documented structure."""

from __future__ import annotations

import gzip
import json
import uuid
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from fake_run import write_run
from predicted import SIZE, UM, predicted

from stexp.errors import InputError
from stexp.reporting import exports, heat_maps
from stexp.reporting.exports import choose_genes, export
from stexp.reporting.places import places

GENES = ["G3", "G0"]


@pytest.fixture(scope="module")
def slide() -> ad.AnnData:
    return predicted()


def strictly(text: str) -> dict:
    """JSON as the standard has it: no NaN."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def ring(feature: dict) -> np.ndarray:
    assert feature["geometry"]["type"] == "Polygon"
    (corners,) = np.array(feature["geometry"]["coordinates"])
    assert (corners[0] == corners[-1]).all() and len(corners) >= 5
    return corners


def area(corners: np.ndarray) -> float:
    (x, y), (x1, y1) = corners[:-1].T, corners[1:].T
    return abs((x * y1 - x1 * y).sum()) / 2


def test_geojson_is_what_qupath_imports(slide, tmp_path):
    (path,) = export(slide, tmp_path, ["geojson"], GENES)
    assert path == tmp_path / "slide.geojson"
    made = strictly(path.read_text())
    assert made["type"] == "FeatureCollection" and len(made["features"]) == slide.n_obs
    assert len({uuid.UUID(feature["id"]) for feature in made["features"]}) == slide.n_obs
    (place,) = places(slide)
    for i, feature in enumerate(made["features"]):
        properties = feature["properties"]
        assert feature["type"] == "Feature" and properties["objectType"] == "detection"
        assert properties["name"] == slide.obs_names[i]
        kind = properties["classification"]
        assert kind["name"] == ("Out of distribution" if i == slide.n_obs - 1 else "Spot")
        assert len(kind["color"]) == 3 and all(isinstance(part, int) and 0 <= part < 256 for part in kind["color"])
        numbers = properties["measurements"]
        assert all(isinstance(value, float) for value in numbers.values())
        assert set(numbers) >= {"G3", "G0", "G3 sd", "neighbour distance", "out of distribution"} - {"G0 sd"}
        assert ("G0 sd" in numbers) == (i > 0)  # which is NaN in the first spot
        assert numbers["G3"] == pytest.approx(slide.layers["predicted"][i, 3], rel=1e-5)
        corners = ring(feature)
        np.testing.assert_allclose(corners[:-1].mean(axis=0), slide.obsm["spatial"][i], atol=0.06)
        assert area(corners) == pytest.approx(np.pi * place.diameter**2 / 4, rel=0.02)
    assert place.diameter == pytest.approx(100 / UM)


def test_geojson_is_valid_to_other_readers(slide, tmp_path):
    geojson, shapely = pytest.importorskip("geojson"), pytest.importorskip("shapely.geometry")
    (path,) = export(slide, tmp_path, ["geojson"])
    made = geojson.loads(path.read_text())
    assert made.is_valid and made["type"] == "FeatureCollection"
    assert all(shapely.shape(feature["geometry"]).is_valid for feature in made["features"])


def test_a_square_grid_becomes_squares_that_touch(tmp_path):
    adata = predicted("square")
    (path,) = export(adata, tmp_path, ["geojson"], ["G0"])
    first, second = (ring(feature) for feature in strictly(path.read_text())["features"][:2])
    assert area(first) == pytest.approx((100 / UM) ** 2, rel=1e-3)
    assert first[:, 0].max() == pytest.approx(second[:, 0].min(), abs=0.11) and first[0, 1] == second[0, 1]


def test_geojson_counts_from_where_qupath_does_and_names_domains(slide, tmp_path):
    moved = slide.copy()
    moved.uns["stexp"]["qupath_origin_px"] = np.array([300, 100])
    moved.obs["domain"] = pd.Categorical(["2"] + ["1"] * (slide.n_obs - 1))
    (path,) = export(moved, tmp_path, ["geojson"], ["G0"])
    first, second = strictly(path.read_text())["features"][:2]
    np.testing.assert_allclose(ring(first)[:-1].mean(axis=0), slide.obsm["spatial"][0] - [300, 100], atol=0.06)
    kinds = [feature["properties"]["classification"] for feature in (first, second)]
    assert [kind["name"] for kind in kinds] == ["Domain 2", "Domain 1"] and kinds[0]["color"] != kinds[1]["color"]


def test_tables_hold_every_layer_and_are_the_same_bytes_twice(slide, tmp_path):
    paths = export(slide, tmp_path, ["csv"])
    assert [path.name for path in paths] == ["predicted.csv.gz", "uncertainty.csv.gz"]
    table = pd.read_csv(paths[0], index_col="spot")
    assert list(table.index) == list(slide.obs_names)
    assert list(table) == ["section", "pixel_x", "pixel_y", "array_x", "array_y", *slide.var_names]
    np.testing.assert_allclose(table[slide.var_names], slide.layers["predicted"], rtol=1e-5)
    np.testing.assert_allclose(table[["pixel_x", "pixel_y"]], slide.obsm["spatial"], atol=0.006)
    spread = pd.read_csv(paths[1], index_col="spot")
    np.testing.assert_allclose(spread[slide.var_names], slide.layers["uncertainty"], rtol=1e-5)
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in export(slide, tmp_path, ["csv"])] == before


def test_names_that_a_spreadsheet_would_compute_are_defused_in_tables_only(tmp_path):
    slide = predicted(name="@slide")
    slide.var_names = ["=CMD()", *slide.var_names[1:]]
    slide.obs_names = ["-1+1", *slide.obs_names[1:]]
    table, _, h5ad = export(slide, tmp_path, ["csv", "h5ad"])
    with gzip.open(table, "rt") as file:
        head, first = file.readline().split(","), file.readline().split(",")
    assert head[6] == "'=CMD()" and first[:2] == ["'-1+1", "'@slide"]
    assert [float(cell) for cell in first[2:]]  # numbers are numbers, negative ones too
    kept = ad.read_h5ad(h5ad)
    assert (kept.var_names[0], kept.obs_names[0], kept.obs["section"].iloc[0]) == ("=CMD()", "-1+1", "@slide")


def test_heat_maps_lie_on_the_slide(slide, tmp_path):
    (path,) = export(slide, tmp_path, ["ome_tiff"], GENES)
    with tifffile.TiffFile(path) as file:
        assert file.is_ome and file.is_bigtiff and len(file.series) == 1
        levels = [level.asarray() for level in file.series[0].levels]
        assert all(level.keyframe.is_tiled for level in file.series[0].levels) and file.series[0].axes == "CYX"
        root = ElementTree.fromstring(file.ome_metadata)
    factor = 50  # a quarter of 100 um at 0.5 um/px
    height, width = levels[0].shape[1:]
    assert (width, height) == (-(-SIZE[0] // factor), -(-SIZE[1] // factor)) and levels[0].dtype == np.float32
    (pixels,) = root.findall(".//{*}Pixels")
    assert float(pixels.get("PhysicalSizeX")) == float(pixels.get("PhysicalSizeY")) == factor * UM
    assert pixels.get("PhysicalSizeXUnit") == "µm"
    assert [channel.get("Name") for channel in root.findall(".//{*}Channel")] == GENES
    column, row = (slide.obsm["spatial"] // factor).astype(int).T
    for channel, gene in enumerate(GENES):
        np.testing.assert_array_equal(levels[0][channel, row, column], slide[:, gene].layers["predicted"][:, 0])


def test_every_pixel_is_that_of_the_nearest_spot_and_levels_are_means(tmp_path, monkeypatch):
    monkeypatch.setattr(heat_maps, "TILE_PX", 16)
    adata = predicted("square")[::3].copy()  # with holes
    (path,) = export(adata, tmp_path, ["ome_tiff"], ["G1"])
    with tifffile.TiffFile(path) as file:
        levels = [level.asarray().squeeze() for level in file.series[0].levels]
        (pixels,) = ElementTree.fromstring(file.ome_metadata).findall(".//{*}Pixels")
    assert len(levels) == 3 and max(levels[-1].shape) <= 16
    (place,) = places(adata)
    factor = float(pixels.get("PhysicalSizeX")) / UM
    values = adata[:, "G1"].layers["predicted"][:, 0]
    seen = 0
    for (row, column), value in np.ndenumerate(levels[0]):
        apart = np.hypot(*(place.xy - (np.array([column, row]) + 0.5) * factor).T)
        if apart.min() > 0.75 * place.spacing:
            assert np.isnan(value)
            seen += 1
        else:
            assert value in values[np.isclose(apart, apart.min())]
    assert seen > 10
    for fine, coarse in pairwise(levels):
        for (row, column), value in np.ndenumerate(coarse):
            block = fine[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            known = block[~np.isnan(block)]
            assert np.isnan(value) if not known.size else value == pytest.approx(known.mean(), rel=1e-5)


def test_ome_types_reads_the_metadata(slide, tmp_path):
    ome_types = pytest.importorskip("ome_types")
    (path,) = export(slide, tmp_path, ["ome_tiff"], GENES)
    (image,) = ome_types.from_tiff(path).images
    assert [channel.name for channel in image.pixels.channels] == GENES and image.pixels.physical_size_x == 25


def test_a_heat_map_stays_small(slide, monkeypatch, tmp_path):
    monkeypatch.setattr(heat_maps, "MOST_PX", 20)
    (path,) = export(slide, tmp_path, ["ome_tiff"], ["G0"])
    with tifffile.TiffFile(path) as file:
        assert max(file.series[0].shape) == 20
        assert f'PhysicalSizeX="{SIZE[0] / 20 * UM}"' in file.ome_metadata


def test_scanpy_draws_the_h5ad_on_the_image_as_it_is(slide, tmp_path):
    sc = pytest.importorskip("scanpy")
    slide, xy = slide.copy(), slide.obsm["spatial"] / 10
    slide.obs["domain"] = pd.Categorical(["1"] * slide.n_obs)
    (path,) = export(slide, tmp_path, ["h5ad"], GENES)
    read = ad.read_h5ad(path)
    assert list(read.var_names) == GENES and "domain" in read.obs
    for colour in ("G3", "domain"):
        (axes,) = sc.pl.spatial(read, color=colour, show=False)
        (image,), (circles, *_) = axes.get_images(), axes.collections
        assert image.get_array().shape[:2] == (201, 260)
        centres = [(path.vertices.min(axis=0) + path.vertices.max(axis=0)) / 2 for path in circles.get_paths()]
        np.testing.assert_allclose(sorted(np.round(centres, 4).tolist()), sorted(np.round(xy, 4).tolist()), atol=1e-3)


def test_squidpy_draws_it_too(slide, tmp_path):
    sq = pytest.importorskip("squidpy")
    (path,) = export(slide, tmp_path, ["h5ad"])
    axes = sq.pl.spatial_scatter(ad.read_h5ad(path), color="G3", return_ax=True)
    assert len(axes.get_images()) == 1


def test_spatialdata_puts_spots_and_image_into_one_place(slide, tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    (path,) = export(slide, tmp_path, ["spatialdata"])
    assert export(slide, tmp_path, ["spatialdata"]) == [path]  # in place of the one before
    read = spatialdata.read_zarr(path)
    assert set(read.coordinate_systems) == {"slide", "slide_um"}
    for system, scale in (("slide", 1), ("slide_um", UM)):
        extent = spatialdata.get_extent(read["slide_image"], coordinate_system=system)
        np.testing.assert_allclose([extent["x"][1], extent["y"][1]], np.multiply(SIZE, scale))
        spots = spatialdata.transform(read["slide_spots"], to_coordinate_system=system)
        np.testing.assert_allclose(spots.geometry.x, scale * slide.obsm["spatial"][:, 0])
        np.testing.assert_allclose(spots.radius, scale * 50 / UM)
    table = read["predictions"]
    np.testing.assert_array_equal(table.layers["predicted"], slide.layers["predicted"])
    values = spatialdata.get_values("G3", element_name="slide_spots", sdata=read, table_name="predictions")
    np.testing.assert_array_equal(values.loc[slide.obs_names, "G3"], slide.X[:, 3])


def test_a_run_is_exported_section_by_section(tmp_path):
    run = ad.read_h5ad(write_run(tmp_path / "run", spots=40, genes=5) / "predictions.h5ad")
    paths = export(run, tmp_path / "out", ["geojson", "ome_tiff", "csv"])
    assert [path.name for path in paths] == [
        *("B1.geojson", "B2.geojson", "B1.ome.tiff", "B2.ome.tiff"),
        *("predicted.csv.gz", "uncertainty.csv.gz", "observed.csv.gz"),
    ]
    features = strictly(paths[1].read_text())["features"]
    assert len(features) == 40
    assert "GENE0 observed" in features[0]["properties"]["measurements"]
    assert "GENE1 observed" not in features[0]["properties"]["measurements"]  # not measured in B2


def test_genes_are_all_of_few_and_the_best_of_many():
    adata = predicted(n_genes=60)
    adata.var.loc["G7", "expected_pearson"] = np.nan
    best = adata.var["expected_pearson"].drop("G7").sort_values(ascending=False).index[:20]
    assert choose_genes(adata) == list(best)
    assert choose_genes(adata[:, :50]) == list(adata.var_names[:50])
    assert choose_genes(adata, ["G7", "G1"]) == ["G7", "G1"] and choose_genes(adata, "G7") == ["G7"]
    adata.var = pd.DataFrame({"mean_train": np.arange(60)}, index=adata.var_names)
    assert choose_genes(adata)[:3] == ["G59", "G58", "G57"]
    with pytest.raises(InputError, match="1 of 2 genes are not predicted here: X"):
        choose_genes(adata, ["G7", "X"])
    with pytest.raises(InputError, match="twice"):
        choose_genes(adata, ["G7", "G7"])


def test_formats_are_judged_before_anything_is_written(slide, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"exports=xlsx: choose of geojson, csv"):
        export(slide, tmp_path / "out", ["csv", "xlsx"])
    monkeypatch.setattr(exports, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'stexp\[spatialdata\]'"):
        export(slide, tmp_path / "out", ["csv", "spatialdata"])
    assert not (tmp_path / "out").exists()
