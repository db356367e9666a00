"""Predictions put into a SpatialData object: beside the counts of the same shapes, or as spots of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.readers.spatialdata import choose_table, regions_of, rows_of
from stexp.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from spatialdata import SpatialData


def add_to(
    sdata: SpatialData,
    adata: ad.AnnData,
    *,
    table: str | None = None,
    section: str | None = None,
    image: str | None = None,
    name: str = "predicted",
) -> None:
    """Add predictions to a SpatialData object, as a table that annotates its shapes or points.

    Parameters
    ----------
    sdata
        Changed in place; ``sdata.write_element(name)`` puts the table into its store.
    adata
        Predictions of a run, or of ``Model.predict``.
    table
        The table of counts whose spots were predicted; None: the only one.
    section
        Of predictions of several sections, the one that this object is of; a region of the table that is called like
        a section is its own.
    image
        An image that was predicted on, for spots that are in no table, as on a grid: they become the circles
        ``<name>_spots``, in its coordinate systems.
    name
        Of the new table.

    Raises
    ------
    InputError
        A name that is taken, a table or image that is not there, or spots that the table does not hold.
    """
    from spatialdata.models import TableModel  # optional, and slow to import

    if name in sdata:
        raise InputError(f"the object holds {name} already; another name= would fit, or del sdata['{name}'] before")
    rows = _of_section(adata, section)
    if image is not None:
        region, key = _add_circles(sdata, rows, image, f"{name}_spots"), "instance"
        regions, instances = np.full(rows.n_obs, region, dtype=object), np.arange(rows.n_obs)
    else:
        regions, instances, key = _annotated(sdata, rows, table)
    layers = {key: rows.layers[key] for key in rows.layers if key is not None}  # None is X
    out = ad.AnnData(rows.X, obs=rows.obs.copy(), var=rows.var.copy(), layers=layers)
    out.uns = {"stexp": rows.uns["stexp"]} if "stexp" in rows.uns else {}
    out.obs["region"], out.obs[key] = pd.Categorical(regions), instances
    of = sorted(set(regions))
    sdata[name] = TableModel.parse(out, region=of, region_key="region", instance_key=key)


def _of_section(adata: ad.AnnData, section: str | None) -> ad.AnnData:
    if section is None:
        return adata
    names = adata.obs["section"].astype(str)
    if section not in set(names):
        raise InputError(f"nothing is predicted of section {section}{did_you_mean(section, names.unique())}")
    return adata[(names == section).to_numpy()]


def _annotated(sdata: SpatialData, adata: ad.AnnData, table: str | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Region and instance of every predicted spot, and the key of instances."""
    tables = {name: each for name, each in sdata.tables.items() if "spatialdata_attrs" in each.uns}
    counted = {name: each for name, each in tables.items() if "stexp" not in each.uns}
    own = tables[choose_table(counted if table is None else tables, table, "the object")]
    attributes = own.uns["spatialdata_attrs"]
    spots = (adata.obs["spot"] if "spot" in adata.obs else adata.obs_names.to_series()).astype(str).to_numpy()
    sections = adata.obs["section"].astype(str).to_numpy()
    regions = regions_of(attributes["region"])
    if len(regions) == 1 and len(set(sections)) > 1:
        raise InputError(
            f"predictions of {len(set(sections))} sections ({', '.join(sorted(set(sections))[:5])}) and one region "
            f"{regions[0]}; section= says which of them it is"
        )
    of_region = {region: rows_of(own, region) for region in regions}
    places, where = np.empty(len(spots), dtype=object), np.empty(len(spots), dtype=object)
    lacking: list[str] = []
    for section in sorted(set(sections)):
        region = section if section in of_region else regions[0]
        if section not in of_region and len(regions) > 1:
            raise InputError(f"no region is called {section}; there are {', '.join(regions)}: section= names one")
        rows, instances = of_region[region]
        mine = np.flatnonzero(sections == section)
        at = pd.Index(rows.obs_names.astype(str)).get_indexer(spots[mine])
        lacking += spots[mine][at < 0].tolist()
        places[mine], where[mine] = instances.to_numpy(object)[at], region
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(spots)} predicted spots are in no row of the table (like {lacking[0]}); "
            f"predictions of its own spots would fit, or image= for spots of their own"
        )
    return where, np.array(places.tolist()), str(attributes["instance_key"])


def _add_circles(sdata: SpatialData, adata: ad.AnnData, image: str, name: str) -> str:
    """Add the places of predictions as circles in the coordinate systems of an image; returns their name."""
    from spatialdata.models import ShapesModel  # optional, and slow to import
    from spatialdata.transformations import get_transformation

    if image not in sdata.images:
        raise InputError(f"the object has no image {image}{did_you_mean(image, list(sdata.images))}")
    if name in sdata:
        raise InputError(f"the object holds {name} already; another name= would fit")
    systems = get_transformation(sdata.images[image], get_all=True)
    side = float(adata.uns["stexp"]["tile_side_px"])
    spacing = float(adata.uns["stexp"]["spacing_px"])
    xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)
    sdata[name] = ShapesModel.parse(xy, geometry=0, radius=min(side, spacing) / 2, transformations=systems)
    return name
