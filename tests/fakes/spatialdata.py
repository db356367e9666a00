"""Four small sections as SpatialData stores in the layouts that spatialdata-io writes of Visium and Visium HD."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from fakes.visium import HIRES, PITCH_PX, array, draw_counts, gene_ids, picture

UM_PER_PX = 100 / PITCH_PX


def write(root: Path, seed: int = 0) -> None:
    """Sections a and b of patient P1, c of P2, and d of P3 with its hires image only."""
    pytest.importorskip("spatialdata")
    for i, name in enumerate("abcd"):
        write_visium(root / f"{name}.zarr", seed + i, full=name != "d")
    (root / "patients.csv").write_text("section,patient\na,P1\nb,P1\nc,P2\nd,P3\n")


def write_visium(path: Path, seed: int = 0, full: bool = True, **changes: Any) -> ad.AnnData:
    """A store as of ``spatialdata_io.visium``; returns its table. `changes`: further elements, or others."""
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity, Scale

    name, table = path.stem, visium_table(seed)
    xy = table.obsm["spatial"]
    systems = {name: Identity()}
    for kind, scale in (("hires", HIRES), ("lowres", HIRES / 3)):
        systems[f"{name}_downscaled_{kind}"] = Scale([scale] * 2, axes=("y", "x"))
    index = table.obs["spot_id"].copy()
    circles = ShapesModel.parse(xy, geometry=0, radius=65 * PITCH_PX / 200, index=index, transformations=systems)
    table = annotate(table, name, "spot_id")
    save(path, **{"images": images(name, seed, full), "shapes": {name: circles}, "tables": {"table": table}} | changes)
    return table


def visium_table(seed: int = 0) -> ad.AnnData:
    """Spots on tissue in the order of the matrix, without the pixel positions, which go into the shapes."""
    positions = array(seed)
    positions = positions[positions["in_tissue"] == 1].set_index("barcode")
    counts = draw_counts(positions.reset_index(), seed)
    obs = positions.loc[counts.index, ["in_tissue", "array_row", "array_col"]].copy()
    obs["spot_id"] = np.arange(len(obs))
    var = pd.DataFrame({"gene_ids": gene_ids(counts.columns)}, index=counts.columns)
    var["feature_types"], var["genome"] = "Gene Expression", "GRCh38"
    table = ad.AnnData(sp.csr_matrix(counts.to_numpy(np.float32)), obs=obs, var=var)
    pixels = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    table.obsm["spatial"] = positions.loc[counts.index, pixels].to_numpy()
    return table


def annotate(table: ad.AnnData, region: str, key: str) -> ad.AnnData:
    from spatialdata.models import TableModel

    table.obs["region"] = pd.Categorical([region] * table.n_obs)
    return TableModel.parse(table, region=region, region_key="region", instance_key=key)


def images(name: str, seed: int = 0, full: bool = True) -> dict[str, Any]:
    """``_full_image`` in levels, ``_hires_image`` and ``_lowres_image``."""
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity, Scale

    whole, made = picture(seed), {}
    if full:
        made[f"{name}_full_image"] = Image2DModel.parse(
            planes(whole), dims=("c", "y", "x"), scale_factors=[2, 2], transformations={name: Identity()}
        )
    for kind, scale in (("hires", HIRES), ("lowres", HIRES / 3)):
        small = whole.resize((round(whole.width * scale), round(whole.height * scale)))
        systems = {f"{name}_downscaled_{kind}": Identity(), name: Scale([1 / scale] * 2, axes=("y", "x"))}
        made[f"{name}_{kind}_image"] = Image2DModel.parse(planes(small), dims=("c", "y", "x"), transformations=systems)
    return made


def write_visium_hd(path: Path, seed: int = 0, side: int = 12, sizes: tuple[int, ...] = (8, 16)) -> None:
    """A store as of ``spatialdata_io.visium_hd``: squares, and a table for every size of bins; 2 um a pixel."""
    from geopandas import GeoDataFrame
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    name, shapes, tables = path.stem, {}, {}
    for um in sizes:
        n = side * sizes[0] // um
        row, column = (grid.ravel() for grid in np.mgrid[0:n, 0:n])
        xy = 60 + (np.column_stack([column, row]) + 0.5) * um / 2
        rng = np.random.default_rng([seed, um])
        barcodes = [f"s_{um:03}um_{r:05}_{c:05}-1" for r, c in zip(row, column, strict=True)]
        obs = pd.DataFrame({"in_tissue": 1, "array_row": row, "array_col": column}, index=barcodes)
        obs["location_id"] = np.arange(n * n)
        table = ad.AnnData(sp.csr_matrix(rng.poisson(3.0, (n * n, 40)).astype(np.float32)), obs=obs)
        table.var_names = [f"G{i:03d}" for i in range(40)]
        circles = ShapesModel.parse(xy, geometry=0, radius=um / 4, index=pd.Index(obs["location_id"]))
        squares = GeoDataFrame(geometry=circles.buffer(um / 4, cap_style=3))
        shapes[f"{name}_square_{um:03}um"] = ShapesModel.parse(squares, transformations={name: Identity()})
        tables[f"square_{um:03}um"] = annotate(table, f"{name}_square_{um:03}um", "location_id")
    save(path, images=images(name, seed), shapes=shapes, tables=tables)


def planes(image: Any) -> np.ndarray:
    return np.moveaxis(np.asarray(image), -1, 0)


def save(path: Path, **elements: dict[str, Any]) -> None:
    spatialdata = pytest.importorskip("spatialdata")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spatialdata.SpatialData(**elements).write(path)
