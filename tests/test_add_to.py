"""Predictions in a SpatialData object: on the shapes of its counts, or on circles of their own."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

spatialdata = pytest.importorskip("spatialdata")

from fakes import spatialdata as fake  # noqa: E402

from stexp.data.readers.spatialdata import open_store, read_spatialdata  # noqa: E402
from stexp.errors import InputError  # noqa: E402
from stexp.reporting.spatialdata import add_to  # noqa: E402


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    fake.write_visium(path)
    return path


def predictions(store: Path, n_sections: int = 1) -> ad.AnnData:
    """As a run writes them: other genes, spots in another order, named by section and spot."""
    (section,) = read_spatialdata(store)
    order = np.random.default_rng(0).permutation(len(section))[:20]
    parts = []
    for name in ("a", "z")[:n_sections]:
        spots = section.spots.obs_names[order]
        obs = pd.DataFrame({"section": name, "spot": spots}, index=[f"{name}:{spot}" for spot in spots])
        values = np.column_stack([section.xy_px[order], order]).astype(np.float32)
        part = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=["at_x", "at_y", "row"]))
        part.layers["predicted"] = part.X.copy()
        part.obsm["spatial"] = section.xy_px[order]
        parts.append(part)
    adata = ad.concat(parts, merge="same")
    adata.uns["stexp"] = {"kind": "run", "tile_side_px": 30.0, "spacing_px": 40.0}
    return adata


def test_predictions_annotate_the_shapes_of_the_counts(store):
    sdata = open_store(store)
    add_to(sdata, predictions(store))
    assert set(sdata.tables) == {"table", "predicted"}
    for axis, gene in (("x", "at_x"), ("y", "at_y")):
        values = spatialdata.get_values(gene, element_name="a", sdata=sdata, table_name="predicted")
        centres = getattr(sdata.shapes["a"].geometry.centroid, axis)
        np.testing.assert_allclose(values[gene], centres[values.index], rtol=1e-6)
    assert len(values) == 20
    with pytest.raises(InputError, match="holds predicted already"):
        add_to(sdata, predictions(store))


def test_what_was_added_is_written_and_read_back(tmp_path):
    store = tmp_path / "a.zarr"
    fake.write_visium(store)
    sdata = open_store(store)
    adata = predictions(store)
    add_to(sdata, adata, name="stnet")
    sdata.write_element("stnet")
    again = open_store(store)
    np.testing.assert_array_equal(again.tables["stnet"].X, adata.X)
    (section,) = read_spatialdata(store)
    assert section.spots.n_vars == 80, "what was predicted is no table of counts"
    add_to(again, adata, name="twice")


def test_a_spot_that_the_table_does_not_hold_is_named(store):
    adata = predictions(store)
    adata.obs["spot"] = [*adata.obs["spot"].astype(str)[:19], "elsewhere"]
    with pytest.raises(InputError, match=r"1 of 20 predicted spots are in no row of the table \(like elsewhere\)"):
        add_to(open_store(store), adata)


def test_spots_of_a_grid_become_circles_on_the_image(store):
    sdata = open_store(store)
    adata = predictions(store)
    del adata.obs["spot"]
    adata.obs_names = [f"{i}x0" for i in range(20)]
    with pytest.raises(InputError, match=r"20 of 20 predicted spots are in no row"):
        add_to(sdata, adata)
    add_to(sdata, adata, image="a_hires_image", name="grid")
    spots = sdata.shapes["grid_spots"]
    assert (spots["radius"] == 15).all()
    np.testing.assert_allclose(spots.geometry.x, adata.obsm["spatial"][:, 0])
    moved = spatialdata.transform(spots, to_coordinate_system="a")  # hires pixels to those of the full image
    np.testing.assert_allclose(moved.geometry.x, adata.obsm["spatial"][:, 0] * 4)
    assert len(spatialdata.get_values("row", element_name="grid_spots", sdata=sdata, table_name="grid")) == 20
    with pytest.raises(InputError, match=r"no image a_hires; did you mean a_hires_image"):
        add_to(sdata, adata, image="a_hires", name="more")


def test_which_section_it_is_is_asked_where_it_is_open(store):
    adata = predictions(store, 2)
    with pytest.raises(InputError, match=r"predictions of 2 sections \(a, z\) and one region a; section="):
        add_to(open_store(store), adata)
    sdata = open_store(store)
    add_to(sdata, adata, section="z")
    assert sdata.tables["predicted"].n_obs == 20 and set(sdata.tables["predicted"].obs["section"]) == {"z"}
    with pytest.raises(InputError, match="nothing is predicted of section y"):
        add_to(open_store(store), adata, section="y")
