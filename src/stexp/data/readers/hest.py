"""HEST-1k (Jaume et al. 2024, huggingface.co/datasets/MahmoodLab/hest): Visium, Visium HD, Xenium and legacy ST."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from stexp.data.gene_names import harmonise
from stexp.data.kept_sections import read_each
from stexp.data.readers.h5ad import counts_of, read_h5ad
from stexp.data.readers.paths import choose_sections, data_folder
from stexp.data.readers.text import read_table
from stexp.data.section import Section
from stexp.data.slides.slide import Slide
from stexp.errors import InputError, listed

log = logging.getLogger(__name__)

COLUMNS = ("id", "dataset_title", "species", "organ", "patient", "st_technology", "pixel_size_um_estimated")


def read_hest(
    root: str | Path,
    sections: list[str] | None = None,
    species: str | Sequence[str] | None = None,
    technology: str | Sequence[str] | None = None,
    organ: str | Sequence[str] | None = None,
    gene_table: str | Path | None = None,
) -> list[Section]:
    """The sections whose counts are there, in the order of their ids.

    Parameters
    ----------
    root
        Folder with ``st/<id>.h5ad``, ``wsis/<id>.tif`` and ``HEST_v<version>.csv`` (the newest is used). ``patches``
        are not read: tiles are cut from the slide. A section without a slide can be referred to, not predicted.
    sections
        Ids, such as ``["TENX99"]``.
    species, technology, organ
        Values of the metadata's columns species, st_technology, organ to keep, in any case; one or several.
    gene_table
        See :func:`~stexp.data.gene_names.harmonise`.

    Returns
    -------
    list of Section
        Patients are called by the first id of theirs, since the metadata number patients anew in every study. See
        :func:`donors` for who counts as one. Array coordinates are those of the file where they fit the pixel
        positions, else derived from these; see :func:`array_coordinates`.

    Raises
    ------
    InputError
        Nothing passes the filters, more than one species does, or a file does not hold what it should.
    """
    root = data_folder(root, lambda folder: (folder / "st").is_dir(), below=("hest",))
    if not (root / "st").is_dir():
        raise InputError(f"{root} is not HEST-1k: need the folders st and wsis, and HEST_v<version>.csv (data.root=)")
    table = read_metadata(root)
    patients = donors(table)
    there = {path.stem for path in (root / "st").glob("*.h5ad") if not path.name.startswith(".")}
    wanted = choose_sections(sorted(there, key=_id_order), sections, root / "st")
    unlisted = set(wanted) - set(table.index)
    if unlisted:
        absent, choices = (sorted(names, key=_id_order) for names in (unlisted, there & set(table.index)))
        raise InputError(f"no section {listed(absent)} in the metadata; there are {listed(choices)}")
    rows = table.loc[wanted]
    for key, column, values in (
        ("species", "species", species),
        ("technology", "st_technology", technology),
        ("organ", "organ", organ),
    ):
        rows = _keep(rows, key, column, values)
    n = rows["species"].value_counts()
    if len(n) != 1 or not n.index[0]:
        counted = ", ".join(f"{name or 'none given'} ({count} sections)" for name, count in n.items())
        raise InputError(f"sections of {len(n)} species: {counted or 'none'}; choose one with data.species=")
    log.info("%d sections of %s pass the filters; %d have counts in %s", len(rows), n.index[0], len(there), root / "st")

    def read(row: pd.Series) -> Section:
        return _read_section(root, row, patients[row.name], gene_table)

    return read_each((row for _, row in rows.iterrows()), len(rows), "reading sections", read)


def read_metadata(root: Path) -> pd.DataFrame:
    """The newest ``HEST_v<version>.csv``, all cells as text, indexed by id."""
    files = sorted(root.glob("HEST_v*.csv"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)])
    if not files:
        raise InputError(f"{root} has no HEST_v<version>.csv, which says species, patient and scale of the sections")
    table = read_table(files[-1], "metadata", dtype=str, keep_default_na=False)
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputError(f"{files[-1]} lacks {', '.join(missing)}")
    table = table[list(COLUMNS)].apply(lambda column: column.str.strip())
    twice = table["id"][table["id"].duplicated()]
    if len(twice):
        raise InputError(f"{files[-1]} lists {listed(sorted(set(twice), key=_id_order))} more than once")
    return table.set_index("id", drop=False)


def donors(table: pd.DataFrame) -> dict[str, str]:
    """Who counts as one patient: the first id of the same donor, by id.

    Notes
    -----
    "Patient 1" is another person in every study, so that the title belongs to the name. Where no patient is given,
    the sections of a study count as one patient. 10x Genomics published one tissue under several titles (TENX95 and
    TENX97), but numbers the patients of an organ: in ids that begin with TENX, the organ stands for the title. All
    three rather hold out too much than leave a patient on both sides.
    """
    numbered = table["patient"].str.lower().str.replace(" ", "")
    by_organ = table["id"].str.startswith("TENX") & (numbered != "")
    study = table["dataset_title"].where(~by_organ, "10x: " + table["organ"])
    study = study.where(study != "", table["id"])
    first = table.groupby([study, numbered])["id"].transform(lambda ids: min(ids, key=_id_order))
    return first.to_dict()


def _id_order(name: str) -> tuple:
    """NCBI9 before NCBI10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _keep(rows: pd.DataFrame, key: str, column: str, values: str | Sequence[str] | None) -> pd.DataFrame:
    if values is None:
        return rows
    wanted = {value.lower() for value in ([values] if isinstance(values, str) else values)}
    kept = rows[rows[column].str.lower().isin(wanted)]
    if kept.empty:
        there = ", ".join(f"{name} ({count})" for name, count in rows[column].value_counts().items())
        raise InputError(f"no section left with data.{key}={values}; of those before this filter there are {there}")
    return kept


def _read_section(root: Path, row: pd.Series, patient: str, gene_table: str | Path | None) -> Section:
    name, file = row["id"], root / "st" / f"{row['id']}.h5ad"
    where = f"section {name}"
    stored = read_h5ad(file, f"{where}: counts")
    if "spatial" not in stored.obsm:
        raise InputError(f"{where}: {file} has no obsm spatial, the positions of the spots")
    xy = np.asarray(stored.obsm["spatial"], dtype=np.float64)
    spots = counts_of(stored, where)
    if xy.shape != (spots.n_obs, 2) or not np.isfinite(xy).all():
        raise InputError(f"{where}: obsm spatial of {file} must be {spots.n_obs} finite rows of (x, y), got {xy.shape}")
    spots.obsm["spatial"] = xy
    spots.obs[["array_x", "array_y"]] = array_coordinates(xy, stored.obs, where)
    slide = root / "wsis" / f"{name}.tif"
    if not slide.is_file():
        log.warning("%s: no %s; its spots can only be referred to", where, slide)
    return Section(
        name=name,
        patient=patient,
        spots=harmonise(spots, gene_table, where),
        slide=Slide(slide) if slide.is_file() else None,
        um_per_px=_um_per_px(row["pixel_size_um_estimated"], where),
        files=tuple(path for path in (file, slide) if path.is_file()),
    )


def _um_per_px(cell: str, where: str) -> float | None:
    if not cell:
        return None
    value = pd.to_numeric(cell, errors="coerce")
    if not 0 < value < np.inf:
        raise InputError(f"{where}: pixel_size_um_estimated {cell!r} of the metadata is no size")
    return float(value)


def array_coordinates(xy: np.ndarray, obs: pd.DataFrame, where: str) -> np.ndarray:
    """Whole array coordinates (n_spots, 2), array_x along the image's x.

    ``array_col`` and ``array_row`` of the file where they follow the pixel positions to within half a step. HEST's
    legacy ST has them the other way round (``array_row`` counts along x), so that the axis is chosen by the pixels;
    in its pooled Visium HD they were numbered after empty bins had been dropped, and follow nothing. There, and where
    they are missing, the coordinates are cells of a raster half as wide as the two nearest spots are apart, which
    keeps any two spots apart.
    """
    columns = ["array_col", "array_row"]
    if set(columns) <= set(obs.columns):
        array = obs[columns].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        if np.isfinite(array).all() and (array >= 0).all() and (array == np.round(array)).all():
            design = np.column_stack([array, np.ones(len(array))])
            fit, _, rank, _ = np.linalg.lstsq(design, xy, rcond=None)
            off = np.abs(design @ fit - xy).max()
            if rank == 3 and off < np.linalg.norm(fit[:2], axis=1).min() / 2:
                turned = abs(fit[0, 0]) < abs(fit[1, 0])
                return array[:, ::-1] if turned else array
    apart = cKDTree(xy).query(xy, k=2)[0][:, 1].min() if len(xy) > 1 else 1.0
    if apart == 0:
        raise InputError(f"{where}: spots lie on top of each other")
    log.info("%s: no array coordinates that follow the pixel positions; derived from these", where)
    return np.floor((xy - xy.min(axis=0)) / (apart / 2))
