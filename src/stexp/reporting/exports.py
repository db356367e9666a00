"""Predictions in the formats of other programs: QuPath, tables, viewers of large images, SpatialData."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import numpy as np
import pandas as pd

from stexp.errors import InputError, did_you_mean
from stexp.evaluation import predictions
from stexp.files import append_csv, naming, table_file
from stexp.reporting.heat_maps import write_ome_tiff
from stexp.reporting.places import places
from stexp.reporting.qupath import layers_of, write_geojson

FORMATS = ("geojson", "csv", "ome_tiff", "h5ad", "spatialdata")
FEW, BEST = 50, 20  # genes that QuPath and viewers of images get where none are named: all of few, else the best


def export(adata: ad.AnnData, folder: Path, formats: Sequence[str], genes: Sequence[str] | None = None) -> list[Path]:
    """Write predictions in several formats.

    Parameters
    ----------
    adata
        Of a slide or of a run.
    folder
        Where ``<section>.geojson``, ``<section>.ome.tiff``, ``<layer>.csv.gz``, ``spots.h5ad`` and
        ``spatialdata.zarr`` go.
    formats
        Of `FORMATS`.
    genes
        None: all of them in tables, h5ad and SpatialData, and those of `choose_genes` in the others.

    Raises
    ------
    InputError
        An unknown format or gene, or a package that is not installed.
    """
    check(formats)
    few, every = choose_genes(adata, genes), list(adata.var_names) if genes is None else choose_genes(adata, genes)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in formats:
        if name == "csv":
            written += [write_table(adata, layer, every, folder / f"{layer}.csv.gz") for layer in layers_of(adata)]
        elif name == "h5ad":
            written.append(folder / "spots.h5ad")
            predictions.write(adata[:, every].copy(), written[-1])
        elif name == "spatialdata":
            written.append(write_spatialdata(adata, every, folder / "spatialdata.zarr"))
        else:
            write, suffix = (write_geojson, "geojson") if name == "geojson" else (write_ome_tiff, "ome.tiff")
            for place in places(adata):
                path = folder / f"{place.name.replace('/', '_')}.{suffix}"
                written.append(write(adata, place, few, path))
    return written


def check(formats: Sequence[str]) -> None:
    """InputError for a format that does not exist, or lacks its package."""
    unknown = [str(name) for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(
            f"exports={','.join(unknown)}: choose of {', '.join(FORMATS)}{did_you_mean(unknown[0], FORMATS)}"
        )
    if "spatialdata" in formats and find_spec("spatialdata") is None:
        raise InputError(
            "exports=[spatialdata] needs a package that is not installed: pip install 'stexp[spatialdata]'"
        )


def choose_genes(adata: ad.AnnData, genes: Sequence[str] | None = None) -> list[str]:
    """The genes named; else all of 50 or fewer; else the 20 with the best expected accuracy, in a run the highest.

    A run's genes are not chosen by how well they were predicted: shown alone, those would flatter it.
    """
    if genes is not None:
        names = [genes] if isinstance(genes, str) else [str(name) for name in genes]
        unknown = [name for name in names if name not in adata.var_names]
        if unknown or not names or len(set(names)) < len(names):
            raise InputError(
                f"export_genes: {len(unknown)} of {len(names)} genes are not predicted here: {', '.join(unknown[:5])}"
                + did_you_mean(unknown[0], adata.var_names)
                if unknown
                else "export_genes names a gene twice, or none"
            )
        return names
    if adata.n_vars <= FEW:
        return list(adata.var_names)
    key = next((key for key in ("expected_pearson", "mean_train") if key in adata.var), None)
    by = adata.var[key] if key else pd.Series(np.asarray(adata.layers["predicted"]).mean(axis=0), adata.var_names)
    return list(by.sort_values(ascending=False, na_position="last", kind="stable").index[:BEST])


def write_table(adata: ad.AnnData, layer: str, genes: Sequence[str], path: Path) -> Path:
    """A row a spot: section, position in level-0 pixels and on the array, then the genes; gzip."""
    head = pd.DataFrame({"section": adata.obs["section"].astype(str)}, index=pd.Index(adata.obs_names, name="spot"))
    head["pixel_x"], head["pixel_y"] = np.round(np.asarray(adata.obsm["spatial"], dtype=np.float64), 2).T
    for key in ("array_x", "array_y"):
        head[key] = adata.obs[key]
    columns, values = adata.var_names.get_indexer(genes), adata.layers[layer]
    with table_file(path) as file:
        for start in range(0, len(head), 1000):
            rows = slice(start, start + 1000)
            table = pd.DataFrame(np.asarray(values[rows])[:, columns], index=head.index[rows], columns=list(genes))
            append_csv(pd.concat([head.iloc[rows], table], axis=1), file, index="spot", header=start == 0)
    return path


def write_spatialdata(adata: ad.AnnData, genes: Sequence[str], path: Path) -> Path:
    """A SpatialData zarr store: per section the image and the spots as circles, and one table of all spots.

    Every section has a coordinate system of its name, in level-0 pixels, and where the scale is known
    ``<section>_um``, in micrometres.
    """
    # optional, and slow to import
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity, Scale
    from spatialdata.transformations import Sequence as Chain

    table = adata[:, list(genes)].copy()
    table.uns = {"stexp": table.uns["stexp"]}  # images are elements of their own
    images, shapes, region = {}, {}, np.empty(adata.n_obs, dtype=object)
    for place in places(adata):
        # names of elements: letters, digits, _ . -
        name = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in place.name)
        to_um = None if place.um_per_px is None else Scale([place.um_per_px] * 2, axes=("x", "y"))
        systems = {name: Identity(), **({} if to_um is None else {f"{name}_um": to_um})}
        circles = {"geometry": 0, "radius": place.diameter / 2, "index": pd.Index(adata.obs_names[place.rows])}
        shapes[f"{name}_spots"] = ShapesModel.parse(place.xy, **circles, transformations=systems)
        region[place.rows] = f"{name}_spots"
        if place.image is not None:
            up = Scale([1 / place.scale] * 2, axes=("x", "y"))
            images[f"{name}_image"] = Image2DModel.parse(
                np.moveaxis(place.image, -1, 0),
                dims=("c", "y", "x"),
                c_coords=["r", "g", "b"],
                transformations={name: up, **({} if to_um is None else {f"{name}_um": Chain([up, to_um])})},
            )
    table.obs["region"], table.obs["instance"] = pd.Categorical(region), adata.obs_names.to_numpy(str)
    model = TableModel.parse(table, region=sorted(shapes), region_key="region", instance_key="instance")
    with (
        naming(path),
        TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent, ignore_cleanup_errors=True) as work,
        naming(path, part := Path(work) / path.name),
    ):
        SpatialData(images=images, shapes=shapes, tables={"predictions": model}).write(part)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    return path
