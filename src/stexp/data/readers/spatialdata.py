"""SpatialData: zarr stores of images, shapes or points, and tables of counts, as spatialdata-io writes them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from stexp.data.gene_names import harmonise
from stexp.data.progress import track
from stexp.data.readers.h5ad import counts_of
from stexp.data.readers.paths import choose_sections, user_path
from stexp.data.readers.patients import read_patients
from stexp.data.readers.visium_scale import bin_size_um, fit_um_per_px
from stexp.data.section import Section
from stexp.data.slides.ome_zarr import is_zarr, without_pickles
from stexp.data.slides.slide import Slide
from stexp.errors import InputError, did_you_mean, listed

if TYPE_CHECKING:
    import anndata as ad
    from spatialdata import SpatialData

log = logging.getLogger(__name__)

MICROMETRES = re.compile(r"(?:.*_)?(?:um|microns?|micrometers?|micrometres?)", re.IGNORECASE)
"""Coordinate systems in micrometres, by their name."""
SAME_PX = 1.0  # coordinate systems that place spots within it agree
SAME_SCALE = 1.01  # images whose pixels differ less in size are of one resolution


def read_spatialdata(
    root: str | Path,
    sections: list[str] | None = None,
    table: str | None = None,
    image: str | None = None,
    gene_table: str | Path | None = None,
) -> list[Section]:
    """Sections of SpatialData stores, one for every region that a table of counts annotates, in name order.

    Parameters
    ----------
    root
        A store (``x.zarr``), or a folder of several. A section is called like its store; of a store with several
        regions, like its region. The patient stands in ``patients.csv`` (columns section, patient) in the folder, or
        beside the store; without this file every section counts as a patient of its own.
    sections
        Names to read; default all.
    table
        Of stores with several tables: the one of counts, such as ``square_008um`` of Visium HD.
    image
        The image, by its name or the end of it (``full_image``). None: of the images of H&E in a coordinate system
        with the spots the one of the finest resolution.
    gene_table
        See :func:`~stexp.data.gene_names.harmonise`.

    Returns
    -------
    list of Section
        Spots are centres of shapes, or points, in pixels of the image by the transformations of both. Pixels are read
        by region when they are needed. `um_per_px` follows from the array of Visium and Visium HD (``array_row`` and
        ``array_col``), else from a coordinate system in micrometres (``um``, ``..._um``, ``microns``), else from the
        image's own unit; where nothing says it, ``data.um_per_px`` is asked for when it is needed.

    Raises
    ------
    InputError
        No store, several tables or images that may be meant, a table of labels or without a region, elements that
        have no coordinate system in common, or the package spatialdata is not installed.
    """
    root = user_path(root)
    check_installed("data=spatialdata")
    places = _places(root, table)
    names = choose_sections(sorted(places), sections, root)
    patients = read_patients((root.parent if is_zarr(root) else root) / "patients.csv", names)
    stores: dict[Path, SpatialData] = {}
    read = []
    for name in track(names, len(names), "reading sections"):
        store, own_table, region = places[name]
        if store not in stores:
            stores = {store: open_store(store)}  # that of the last section alone
        where = f"section {name}"
        read.append(_section(stores[store], store, own_table, region, image, gene_table, name, patients[name], where))
    return read


def check_installed(wanted_by: str) -> None:
    """InputError where the package spatialdata is not installed."""
    if find_spec("spatialdata") is None:
        raise InputError(f"{wanted_by} needs a package that is not installed: pip install 'stexp[spatialdata]'")


def open_store(store: Path) -> SpatialData:
    """A store with its images left on disk."""
    from spatialdata import read_zarr  # optional, and slow to import

    try:
        with warnings.catch_warnings(), without_pickles():
            warnings.simplefilter("ignore")  # formats of older versions, and of labels that are not read
            return read_zarr(store, selection=("images", "shapes", "points", "tables"))
    except Exception as error:  # damaged stores make zarr, geopandas and anndata raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{store} cannot be read as SpatialData ({reason})") from error


def choose_table(tables: Mapping[str, Any], table: str | None, place: object) -> str:
    """The table that is named, or the only one; InputError where there is none, or several.

    Parameters
    ----------
    tables
        Those that annotate regions, by name.
    """
    if table is not None and table in tables:
        return table
    if table is not None:
        raise InputError(
            f"{place} has no table {table} of a region; there are {listed(tables, 8)}{_near(table, tables)}"
        )
    if len(tables) == 1:
        return next(iter(tables))
    if not tables:
        raise InputError(f"{place} has no table that annotates shapes or points; counts of regions would fit")
    raise InputError(
        f"{place} has {len(tables)} tables ({listed(tables, 8)}); choose one: data.table={next(iter(tables))}"
    )


def regions_of(stated: object) -> list[str]:
    """Regions of a table as its attributes have them: a name, or a list of names."""
    return [str(name) for name in stated] if isinstance(stated, list | tuple) else [str(stated)]


def _places(root: Path, table: str | None) -> dict[str, tuple[Path, str, str]]:
    """Store, table and region of each section, by its name; nothing but the stores' attributes is read."""
    if not root.is_dir():
        raise InputError(f"folder {root} does not exist (data.root=)" if not root.exists() else f"{root} is no folder")
    stores = [root] if is_zarr(root) else sorted(path for path in root.glob("*.zarr") if is_zarr(path))
    if not stores:
        raise InputError(f"{root} is no SpatialData store, nor holds one; x.zarr, or a folder of them, would fit")
    places: dict[str, tuple[Path, str, str]] = {}
    for store in stores:
        own, regions = _regions(store, table)
        for region in regions:
            name = store.stem if len(regions) == 1 else region
            if name in places:
                raise InputError(f"{places[name][0]} and {store} would both give section {name}; rename one")
            places[name] = store, own, region
    return places


def _regions(store: Path, table: str | None) -> tuple[str, list[str]]:
    """The table of counts of a store, and the regions that it annotates; tables of predictions do not count."""
    import zarr  # optional: spatialdata brings it

    try:
        with without_pickles():
            tables: Any = zarr.open_group(store, mode="r")["tables"]
            of_counts = {name: group for name, group in tables.groups() if not _predicted(group)}
        stated = {name: group.attrs.asdict().get("region") for name, group in of_counts.items()}
    except Exception as error:  # as above
        raise InputError(f"{store} is no SpatialData store, or has no tables ({type(error).__name__})") from error
    own = choose_table({name: region for name, region in stated.items() if region}, table, store)
    return own, regions_of(stated[own])


def _predicted(table: Any) -> bool:
    """Whether a table of a store is one that :func:`stexp.reporting.spatialdata.add_to` added."""
    return "stexp" in table.get("uns", {})


def _section(
    sdata: SpatialData,
    store: Path,
    table: str,
    region: str,
    image: str | None,
    gene_table: str | Path | None,
    name: str,
    patient: str,
    where: str,
) -> Section:
    rows, instances = rows_of(sdata.tables[table], region)
    element = _element(sdata, region, where)
    centres = _centres(element, instances)
    chosen, matrix = _choose_image(sdata, element, centres, image, where)
    xy = _apply(matrix, centres)
    placed = ~np.isnan(xy).any(axis=1)
    if not placed.all():
        log.warning("%s: %d of %d rows of %s have no shape in %s", where, (~placed).sum(), len(placed), table, region)
    in_tissue = rows.obs["in_tissue"].to_numpy() == 1 if "in_tissue" in rows.obs else np.ones(len(placed), bool)
    keep = placed & in_tissue
    if not keep.any():
        raise InputError(f"{where}: none of {len(keep)} rows of table {table} has a shape of {region} on tissue")
    counts = harmonise(counts_of(rows[keep].copy(), f"{where}: table {table}"), gene_table, where)
    array, um_per_px = _array(rows.obs[keep], xy[keep], table, where)
    counts.obs["array_x"], counts.obs["array_y"] = array.T
    counts.obsm["spatial"] = xy[keep]
    counts.uns["spatialdata"] = {"table": table, "region": region}
    slide = None if chosen is None else Slide(store / "images" / chosen)
    if um_per_px is None and chosen is not None:
        um_per_px = _um_per_px(sdata.images[chosen])
    if um_per_px is None and (slide is None or slide.um_per_px is None):
        log.warning("%s: nothing says how large a pixel is; data.um_per_px= does, where tiles have a size in um", where)
    kind = "shapes" if region in sdata.shapes else "points"
    files = [store / kind / region, store / "tables" / table, *([slide.path] if slide else [])]
    return Section(name=name, patient=patient, spots=counts, slide=slide, um_per_px=um_per_px, files=tuple(files))


def rows_of(table: ad.AnnData, region: str) -> tuple[ad.AnnData, pd.Index]:
    """Rows of a table that annotate a region, and which of its instances each is of."""
    attributes = table.uns["spatialdata_attrs"]
    rows = table[(table.obs[attributes["region_key"]].astype(str) == region).to_numpy()]
    return rows, pd.Index(rows.obs[attributes["instance_key"]].to_numpy())


def _element(sdata: SpatialData, region: str, where: str) -> Any:
    if region in sdata.shapes:
        return sdata.shapes[region]
    if region in sdata.points:
        return sdata.points[region]
    raise InputError(
        f"{where}: its table annotates {region}, which is neither shapes nor points of the store; of labels, as "
        f"spatialdata-io writes Visium HD with annotate_table_by_labels=True, the shapes would fit"
    )


def _centres(element: Any, instances: pd.Index) -> np.ndarray:
    """Centres (x, y) of the instances of shapes or points in their own coordinates, (N, 2); NaN of those not there."""
    if "geometry" in element.columns:
        middle = element.geometry.centroid
        places = pd.DataFrame({"x": middle.x, "y": middle.y}, index=element.index)
    else:
        places = element[["x", "y"]].compute()
    return places[~places.index.duplicated()].reindex(instances).to_numpy(np.float64)


def _choose_image(
    sdata: SpatialData, element: Any, centres: np.ndarray, image: str | None, where: str
) -> tuple[str | None, np.ndarray]:
    """An image, and the matrix (3, 3) from an element's coordinates to its pixels; no image and identity of none."""
    others = _named(sdata.images, image, where) if image is not None else _of_tissue(sdata.images, where)
    matrices = {name: _to_pixels(sdata, element, name, centres, where) for name in others}
    common = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    if not common and others:
        raise InputError(f"{where}: no coordinate system has both the spots and an image ({listed(others, 8)})")
    if not common:
        log.warning("%s: the store has no image of H&E; its spots can only be referred to", where)
        return None, np.eye(3)
    finest = max(map(_scale, common.values()))
    best = [name for name, matrix in common.items() if _scale(matrix) * SAME_SCALE > finest]
    if len(best) > 1:
        raise InputError(f"{where}: {listed(best, 8)} are images of one resolution; choose one: data.image={best[0]}")
    if image is None and re.search(r"(?:hires|lowres)_image$", best[0]):
        log.warning("%s: no full-resolution image, so %s is used: tiles show little of it", where, best[0])
    return best[0], common[best[0]]


def _named(images: Mapping[str, Any], image: str, where: str) -> list[str]:
    names = [image] if image in images else [name for name in images if name.endswith(image)]
    if not names:
        raise InputError(f"{where}: there is no image {image}; there are {listed(images, 8)}{_near(image, images)}")
    return names


def _of_tissue(images: Mapping[str, Any], where: str) -> list[str]:
    """Images that may be of H&E: three or four channels of 8 bits, and not the CytAssist's own picture."""
    names = []
    for name, element in images.items():
        if name.endswith("cytassist_image"):
            continue
        pixels = _finest(element)
        if pixels.dtype == np.uint8 and pixels.sizes.get("c") in (3, 4) and "z" not in pixels.sizes:
            names.append(name)
        else:
            log.info("%s: image %s is no H&E: %s of %s", where, name, dict(pixels.sizes), pixels.dtype)
    return names


def _finest(element: Any) -> Any:
    """The pixels of an image, or of the first level of a multiscale one, as a lazy array."""
    from xarray import DataTree  # of spatialdata

    return next(iter(element["scale0"].data_vars.values())) if isinstance(element, DataTree) else element


def _to_pixels(sdata: SpatialData, element: Any, image: str, centres: np.ndarray, where: str) -> np.ndarray | None:
    """The matrix from an element's coordinates to an image's pixels; None without a coordinate system in common.

    Raises
    ------
    InputError
        Coordinate systems that place the spots differently.
    """
    from_element, from_image = _systems(element), _systems(sdata.images[image])
    matrices = {
        name: np.linalg.inv(from_image[name]) @ from_element[name] for name in from_element if name in from_image
    }
    if not matrices:
        return None
    (first, matrix), *others = matrices.items()
    for name, other in others:
        apart = np.abs(_apply(matrix, centres) - _apply(other, centres))
        if np.nanmax(apart, initial=0) > SAME_PX:
            raise InputError(
                f"{where}: the coordinate systems {first} and {name} place the spots up to {np.nanmax(apart):.3g} px "
                f"apart on image {image}; a store with the right one alone would fit"
            )
    return matrix


def _systems(element: Any) -> dict[str, np.ndarray]:
    """Matrices (3, 3) from an element's own (x, y) to its coordinate systems, by their names."""
    from spatialdata.transformations import get_transformation  # optional, and slow to import

    axes = ("x", "y")
    transformations = get_transformation(element, get_all=True)
    return {str(name): np.asarray(each.to_affine_matrix(axes, axes), float) for name, each in transformations.items()}


def _apply(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    return xy @ matrix[:2, :2].T + matrix[:2, 2]


def _scale(matrix: np.ndarray) -> float:
    """How much longer a length becomes, as the square root of how much larger an area does."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def _array(obs: pd.DataFrame, xy: np.ndarray, table: str, where: str) -> tuple[np.ndarray, float | None]:
    """Array coordinates (N, 2), and micrometres per pixel where they are the array of Visium or Visium HD.

    Without ``array_row`` and ``array_col`` spots lie on a square array as wide as they are apart.
    """
    if not {"array_row", "array_col"} <= set(obs):
        nearest, _ = cKDTree(xy).query(xy, k=min(2, len(xy)))
        pitch = float(np.median(nearest[..., -1])) if len(xy) > 1 else 1.0
        return np.round((xy - xy.min(axis=0)) / max(pitch, 1e-9)).astype(np.int64), None
    array = obs[["array_col", "array_row"]].to_numpy(np.float64)
    columns = {"array_x": array[:, 0], "array_y": array[:, 1], "pixel_x": xy[:, 0], "pixel_y": xy[:, 1]}
    positions = pd.DataFrame(columns, index=obs.index.astype(str))
    try:
        return array, fit_um_per_px(positions, {}, bin_size_um(positions, {}, Path(table), where), where)
    except InputError as error:
        log.warning("%s; array_row and array_col say nothing of the scale", error)
        return array, None


def _um_per_px(image: Any) -> float | None:
    """By a coordinate system in micrometres; None without one."""
    scales = {name: _scale(matrix) for name, matrix in _systems(image).items() if MICROMETRES.fullmatch(name)}
    return next(iter(scales.values()), None)


def _near(name: str, names: Any) -> str:
    return did_you_mean(name, list(names))
