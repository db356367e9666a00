"""Predictions in the formats of other programs: QuPath, tables, viewers of large images, SpatialData."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from stexp.errors import InputError
from stexp.evaluation import predictions

FORMATS = ("geojson", "csv", "ome_tiff", "h5ad", "spatialdata")
FEW, BEST = 50, 20  # genes that QuPath and viewers of images get where none are named: all of few, else the best
LAYERS = {"predicted": "", "uncertainty": " sd", "lower": " lower", "upper": " upper", "observed": " observed"}
"""What is exported of a gene, and what its measurements in QuPath are called after its name."""

POSITIONS = ("pixel_x", "pixel_y", "array_x", "array_y")
REACH = 0.75  # of the spacing: no place between neighbours of a hexagonal or square grid is further from a spot
CORNERS = 24  # of the polygon that stands for a round spot
MOST_PX = 4096  # longest side of a heat map
TILE_PX = 256
# Okabe and Ito's, told apart by colour-blind readers, then lighter ones
COLOURS = [
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233), (240, 228, 66)),
    *((120, 120, 120), (136, 34, 85), (68, 170, 153), (153, 153, 51), (51, 34, 136)),
]


@dataclass(frozen=True)
class Place:
    """A section of the predictions on its slide; lengths in level-0 pixels.

    Parameters
    ----------
    rows : (n,) int
    xy : (n, 2)
    spacing, diameter
        Of its spots.
    um_per_px
        None where nobody says.
    image : (h, w, 3) uint8 or None
        The whole slide, reduced by `scale`.
    """

    name: str
    rows: np.ndarray
    xy: np.ndarray
    spacing: float
    diameter: float
    um_per_px: float | None
    image: np.ndarray | None
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the slide; of a section without one, what its spots take up."""
        if self.image is None:
            right, bottom = np.ceil(self.xy.max(axis=0) + self.spacing)
            return int(right), int(bottom)
        return round(self.image.shape[1] / self.scale), round(self.image.shape[0] / self.scale)


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
            written += [write_csv(adata, layer, every, folder / f"{layer}.csv.gz") for layer in _layers(adata)]
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
    """InputError for a format that is not known or cannot be written here."""
    unknown = [str(name) for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"exports={','.join(unknown)}: choose of {', '.join(FORMATS)}")
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
                if unknown
                else "export_genes names a gene twice, or none"
            )
        return names
    if adata.n_vars <= FEW:
        return list(adata.var_names)
    key = next((key for key in ("expected_pearson", "mean_train") if key in adata.var), None)
    by = adata.var[key] if key else pd.Series(np.asarray(adata.layers["predicted"]).mean(axis=0), adata.var_names)
    return list(by.sort_values(ascending=False, na_position="last", kind="stable").index[:BEST])


def places(adata: ad.AnnData) -> list[Place]:
    """The sections in their order."""
    section, found = adata.obs["section"].to_numpy(str), []
    for name in pd.unique(section):
        rows = np.flatnonzero(section == name)
        xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)[rows]
        entry = adata.uns.get("spatial", {}).get(name, {})
        factors, pitch = entry.get("scalefactors", {}), predictions.spacing(xy)
        um = factors.get("microns_per_pixel", adata.uns["stexp"].get("um_per_px"))
        found.append(
            Place(
                name=str(name),
                rows=rows,
                xy=xy,
                spacing=pitch,
                diameter=float(factors.get("spot_diameter_fullres", pitch / 2)),
                um_per_px=float(um) if um is not None and np.isfinite(um) else None,
                image=entry.get("images", {}).get("hires"),
                scale=float(factors.get("tissue_hires_scalef", 1)),
            )
        )
    return found


def write_geojson(adata: ad.AnnData, place: Place, genes: Sequence[str], path: Path) -> Path:
    """The spots of a section as detections that QuPath 0.4 and later imports, with their measurements.

    A square grid becomes squares that touch; other spots are round. Coordinates are level-0 pixels, counted from
    where QuPath does. What is NaN is left out, since JSON has no word for it.

    Notes
    -----
    Structure as QuPath's PathObjectTypeAdapters read it: a feature's id is a UUID, ``properties`` have objectType,
    name, classification (name and colour) and measurements (an object of numbers).
    """
    here = adata[place.rows]
    about = adata.uns["stexp"]
    values = _measurements(here, genes)
    names, table = list(values), np.column_stack(list(values.values()))
    classes, colours = _classes(here.obs)
    if about.get("grid") == "square":
        outline = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * place.spacing / 2
    else:
        angle = 2 * np.pi * np.arange(CORNERS) / CORNERS
        outline = np.column_stack([np.cos(angle), np.sin(angle)]) * place.diameter / 2
    outline = np.concatenate([outline, outline[:1]])
    corner = np.asarray(about.get("qupath_origin_px", (0, 0)))
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for i, (spot, xy, row) in enumerate(zip(here.obs_names, place.xy - corner, table, strict=True)):
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{place.name}:{spot}")),
                "geometry": {"type": "Polygon", "coordinates": [np.round(xy + outline, 1).tolist()]},
                "properties": {
                    "objectType": "detection",
                    "name": str(spot),
                    "classification": {"name": classes[i], "color": colours[i]},
                    "measurements": {
                        key: float(f"{value:.6g}")
                        for key, value in zip(names, row, strict=True)
                        if math.isfinite(value)
                    },
                },
            }
            file.write((",\n" if i else "\n") + json.dumps(feature, allow_nan=False))
        file.write("\n]}\n")
    os.replace(part, path)
    return path


def qupath_origin(path: str | Path) -> list[int]:
    """Where QuPath begins to count, in level-0 pixels: the corner of what was scanned, as mrxs files state it."""
    import openslide

    if openslide.OpenSlide.detect_format(path) is None:
        return [0, 0]
    with openslide.OpenSlide(path) as slide:
        try:
            keys = ("x", "y", "width", "height")
            x, y, width, height = (int(slide.properties[f"openslide.bounds-{key}"]) for key in keys)
        except (KeyError, ValueError):
            return [0, 0]
        # QuPath takes an image for cropped where both differ
        cropped = width != slide.dimensions[0] and height != slide.dimensions[1]
        return [x, y] if cropped else [0, 0]


def write_csv(adata: ad.AnnData, layer: str, genes: Sequence[str], path: Path) -> Path:
    """A row a spot: section, position in level-0 pixels and on the array, then the genes; gzip."""
    head = pd.DataFrame({"section": adata.obs["section"].astype(str)}, index=pd.Index(adata.obs_names, name="spot"))
    head["pixel_x"], head["pixel_y"] = np.round(np.asarray(adata.obsm["spatial"], dtype=np.float64), 2).T
    for key in ("array_x", "array_y"):
        head[key] = adata.obs[key]
    columns, values = adata.var_names.get_indexer(genes), adata.layers[layer]
    part = path.with_name(f".{path.name}.part")
    with (
        part.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,  # without a time the same table is the same bytes
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        for start in range(0, len(head), 1000):
            rows = slice(start, start + 1000)
            table = pd.DataFrame(np.asarray(values[rows])[:, columns], index=head.index[rows], columns=list(genes))
            pd.concat([head.iloc[rows], table], axis=1).to_csv(
                text, header=start == 0, float_format="%.6g", lineterminator="\n"
            )
    os.replace(part, path)
    return path


def write_ome_tiff(adata: ad.AnnData, place: Place, genes: Sequence[str], path: Path) -> Path:
    """Heat maps, a channel a gene, as a pyramidal OME-TIFF of float32 that covers the whole slide.

    A pixel is a quarter of the spacing wide (more where the longer side would pass `MOST_PX`), a whole number of
    level-0 pixels, and has the prediction of the nearest spot; it is NaN further from all spots than `REACH`
    spacings. Viewers that place images by their physical size lay it over the slide. One plane is held at a time.
    """
    import tifffile

    factor = max(1, round(place.spacing / 4), math.ceil(max(place.size) / MOST_PX))
    nearest = _nearest(place, factor)
    n_levels = max(1, math.ceil(math.log2(max(1, max(nearest.shape) / TILE_PX))) + 1)
    values = np.asarray(adata.layers["predicted"][place.rows][:, adata.var_names.get_indexer(genes)], dtype=np.float32)

    def planes(level: int) -> Iterator[np.ndarray]:
        for gene in range(len(genes)):
            plane = np.where(nearest < 0, np.float32(np.nan), values[nearest, gene])
            for _ in range(level):
                plane = _halve(plane)
            height, width = plane.shape
            plane = np.pad(plane, ((0, -height % TILE_PX), (0, -width % TILE_PX)), constant_values=np.nan)
            for y in range(0, height, TILE_PX):
                for x in range(0, width, TILE_PX):
                    yield plane[y : y + TILE_PX, x : x + TILE_PX]

    about = {"axes": "CYX", "Name": place.name, "Channel": {"Name": list(genes)}}
    um = None if place.um_per_px is None else place.um_per_px * factor
    if um is not None:
        about |= {"PhysicalSizeX": um, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": um, "PhysicalSizeYUnit": "µm"}
    part = path.with_name(f".{path.name.removesuffix('.ome.tiff')}.part.ome.tiff")
    with tifffile.TiffWriter(part, bigtiff=True, ome=True) as file:
        height, width = nearest.shape
        for level in range(n_levels):
            scale = {} if um is None else {"resolution": [1e4 / (um * 2**level)] * 2, "resolutionunit": "CENTIMETER"}
            file.write(
                planes(level),
                shape=(len(genes), -(-height // 2**level), -(-width // 2**level)),
                dtype=np.float32,
                tile=(TILE_PX, TILE_PX),
                photometric="minisblack",
                compression="zlib",
                predictor=True,
                subifds=n_levels - 1 if level == 0 else None,
                subfiletype=0 if level == 0 else 1,
                metadata=about if level == 0 else None,
                **scale,
            )
    os.replace(part, path)
    return path


def write_spatialdata(adata: ad.AnnData, genes: Sequence[str], path: Path) -> Path:
    """A SpatialData zarr store: per section the image and the spots as circles, and one table of all spots.

    Every section has a coordinate system of its name, in level-0 pixels, and where the scale is known
    ``<section>_um``, in micrometres.
    """
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
    part = path.with_name(f".{path.stem}.part.zarr")
    shutil.rmtree(part, ignore_errors=True)
    SpatialData(images=images, shapes=shapes, tables={"predictions": model}).write(part)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)
    return path


def _layers(adata: ad.AnnData) -> list[str]:
    """Those of `LAYERS` that hold anything."""
    return [key for key in LAYERS if key in adata.layers and np.isfinite(np.asarray(adata.layers[key])).any()]


def _measurements(adata: ad.AnnData, genes: Sequence[str]) -> dict[str, np.ndarray]:
    columns, out = adata.var_names.get_indexer(genes), {}
    layers = {key: np.asarray(adata.layers[key][:, columns]) for key in _layers(adata)}
    for i, gene in enumerate(genes):
        out |= {f"{gene}{LAYERS[key]}": values[:, i] for key, values in layers.items()}
    for key, values in adata.obs.items():
        if key not in POSITIONS and pd.api.types.is_numeric_dtype(values):
            out[str(key).replace("_", " ")] = values.to_numpy(np.float64)
    return out


def _classes(obs: pd.DataFrame) -> tuple[list[str], list[list[int]]]:
    """A spot's class and its colour: the domain where there are any, else whether it is like the training tiles."""
    if "domain" in obs:
        names = obs["domain"].astype(str)
        order = {name: i for i, name in enumerate(sorted(set(names), key=lambda name: (len(name), name)))}
        return [f"Domain {name}" for name in names], [list(COLOURS[order[name] % len(COLOURS)]) for name in names]
    strange = obs["out_of_distribution"].to_numpy(bool) if "out_of_distribution" in obs else np.zeros(len(obs), bool)
    kinds = [("Out of distribution", list(COLOURS[4])) if there else ("Spot", list(COLOURS[0])) for there in strange]
    return [name for name, _ in kinds], [colour for _, colour in kinds]


def _nearest(place: Place, factor: int) -> np.ndarray:
    """The nearest spot of every pixel, (h, w) int32; -1 where none is near."""
    width, height = (-(-side // factor) for side in place.size)
    tree, out = cKDTree(place.xy), np.empty((height, width), dtype=np.int32)
    x = (np.arange(width) + 0.5) * factor
    for start in range(0, height, 64):
        y = (np.arange(start, min(start + 64, height)) + 0.5) * factor
        points = np.stack(np.broadcast_arrays(x[None], y[:, None]), axis=-1)
        _, found = tree.query(points, distance_upper_bound=REACH * place.spacing)
        out[start : start + 64] = np.where(found == len(place.xy), -1, found)
    return out


def _halve(plane: np.ndarray) -> np.ndarray:
    """Mean of every 2 x 2 pixels that are not NaN."""
    height, width = plane.shape
    blocks = np.pad(plane, ((0, height % 2), (0, width % 2)), constant_values=np.nan)
    blocks = blocks.reshape(-(-height // 2), 2, -(-width // 2), 2)
    there = np.isfinite(blocks)
    count = there.sum(axis=(1, 3), dtype=np.float32)
    total = np.where(there, blocks, 0).sum(axis=(1, 3))
    return np.divide(total, count, out=np.full(count.shape, np.nan, np.float32), where=count > 0)
