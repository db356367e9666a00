"""Several Visium sections in one matrix, as ``spaceranger aggr`` writes them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd

from stexp.data.gene_names import harmonise
from stexp.data.join import join
from stexp.data.progress import track
from stexp.data.readers.formats import TEXT
from stexp.data.readers.paths import choose_sections
from stexp.data.readers.patients import read_patients
from stexp.data.readers.spaceranger import (
    files_of_counts,
    find_counts,
    find_positions,
    read_10x_counts,
    read_visium_positions,
)
from stexp.data.readers.text import read_table
from stexp.data.readers.visium_image import find_image, image_of, section_on, slide_of, stems_of
from stexp.data.readers.visium_scale import FACTORS, fit_um_per_px, read_factors
from stexp.data.section import Section
from stexp.errors import InputError, listed

log = logging.getLogger(__name__)

SAMPLES = ("aggregation.csv", "aggregation_csv.csv")
"""Copy of the table that ``aggr`` was given; the second is that of SpaceRanger 1."""
POSITIONS = ("aggr_tissue_positions.csv", "aggr_tissue_positions_list.csv")
NAME = "library_id"
PATIENT = ("patient", "patient_id", "donor", "donor_id", "individual", "subject")
"""Columns that name the patient, in small letters; users add what columns they like."""
SUFFIX = re.compile(r".*-(\d+)", re.DOTALL)


def is_aggr(folder: Path) -> bool:
    """Whether a folder is ``outs`` of ``spaceranger aggr``: a table of samples, and a folder ``spatial`` of folders."""
    spatial = folder / "spatial"
    return (
        _first(folder, SAMPLES) is not None
        and spatial.is_dir()
        and any(path.is_dir() for path in spatial.iterdir())
        and not any(spatial.glob("tissue_positions*"))
    )


def read_aggr(
    folder: Path,
    sections: list[str] | None,
    image: Path | None = None,
    gene_table: str | Path | None = None,
) -> list[Section]:
    """Every sample of ``spaceranger aggr`` as a section, in the order of the table of samples.

    Parameters
    ----------
    folder
        ``outs``: ``aggregation.csv`` (``library_id``, and columns of the user's), the matrix, whose barcodes end in
        ``-1`` for the first row of that table, ``-2`` for the second and so on, ``aggr_tissue_positions.csv`` of the
        same barcodes, and ``spatial/<library_id>``. Where there is no such table of positions, that of
        ``spatial/<library_id>`` counts.
    sections
        Values of ``library_id``; default all.
    image
        See :func:`~stexp.data.readers.visium.read_visium`; None: the image in ``spatial/<library_id>``, or
        ``<library_id>.<ending>`` in `folder` or beside it.

    Returns
    -------
    list of Section
        The patient stands in ``patients.csv``, else in a column ``patient`` or ``donor`` of the table of samples.

    Raises
    ------
    InputError
        Samples, barcodes, positions and folders that do not fit each other.

    Notes
    -----
    ``aggr`` thins out the counts of deeper samples unless it ran with ``--normalize=none``.
    """
    table = _first(folder, SAMPLES)
    assert table is not None
    samples = _read_samples(table)
    names = choose_sections(samples["name"], sections, folder)
    patients = _patients(folder, samples, names)
    matrix = find_counts(folder)
    counts = read_10x_counts(matrix)
    number = _numbers(counts.obs_names, len(samples), f"counts {matrix}", table)
    file = _first(folder, POSITIONS)
    positions = None if file is None else read_visium_positions(file)
    number_of_position = None if positions is None else _numbers(positions.index, len(samples), str(file), table)
    read = []
    for name in track(names, len(names), "reading sections"):
        own = list(samples["name"]).index(name) + 1
        where, spatial = f"section {name}", folder / "spatial" / name
        if not spatial.is_dir():
            raise InputError(f"{where}: {table} lists it, but there is no folder {spatial}")
        _check_number(spatial / FACTORS, own, where)
        place = positions[number_of_position == own] if positions is not None else _own_positions(spatial, own)
        if place.empty:
            raise InputError(f"{where}: {file} has no barcode that ends in -{own}, its row in {table.name}")
        factors = read_factors(spatial / FACTORS)
        um_per_px = fit_um_per_px(place, factors, None, where)
        slide, scale = slide_of(_image(image, folder, name, len(names)), spatial, factors, um_per_px, where)
        own_counts = counts[number == own].copy()
        if own_counts.n_obs == 0:
            raise InputError(f"{where}: counts {matrix} have no barcode that ends in -{own}, its row in {table.name}")
        spots = join(harmonise(own_counts, gene_table, where), place, where, complete=True)
        files = [*files_of_counts(matrix), table, file or find_positions(spatial), spatial / FACTORS]
        read.append(section_on(slide, scale, name, patients[name], spots, um_per_px, files))
    return read


def _image(image: Path | None, folder: Path, name: str, n_sections: int) -> Path | None:
    own = image_of(image, folder, folder / "spatial" / name, name, n_sections)
    return own or find_image(folder.absolute().parent, stems_of(name))


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_samples(file: Path) -> pd.DataFrame:
    """Rows of the table of samples: name, and patient where a column has it."""
    table = read_table(file, "samples", **TEXT).fillna("")
    table = table.apply(lambda column: column.str.strip()).set_axis(table.columns.str.strip(), axis=1)
    if NAME not in table:
        raise InputError(f"samples {file} have the columns {', '.join(table.columns)}; {NAME} would fit")
    twice = table[NAME][table[NAME].duplicated() | (table[NAME] == "")]
    if len(twice):
        raise InputError(f"samples {file}: {NAME} {listed(map(repr, twice))} is empty, or stands there twice")
    samples = pd.DataFrame({"name": table[NAME]})
    columns = {column.lower().replace(" ", "_"): column for column in table.columns}
    own = next((columns[name] for name in PATIENT if name in columns), None)
    if own is not None:
        log.info("patients by the column %s of %s", own, file)
        samples["patient"] = table[own]
    return samples


def _patients(folder: Path, samples: pd.DataFrame, names: list[str]) -> dict[str, str]:
    stated = folder / "patients.csv"
    if stated.is_file() or "patient" not in samples:
        return read_patients(stated, names)
    patients = dict(zip(samples["name"], samples["patient"], strict=True))
    missing = [name for name in names if not patients[name]]
    if missing:
        raise InputError(f"{folder}: the table of samples names no patient for {', '.join(missing)}")
    return patients


def _numbers(barcodes: pd.Index, n_samples: int, subject: str, table: Path) -> np.ndarray:
    """The row of the table of samples, from 1, that each barcode ends in."""
    matches = [SUFFIX.fullmatch(name) for name in barcodes]
    number = np.array([int(match[1]) if match else 0 for match in matches])
    wrong = (number < 1) | (number > n_samples)
    if wrong.any():
        raise InputError(
            f"{subject}: {int(wrong.sum())} barcodes end in none of -1 to -{n_samples} (first: {barcodes[wrong][0]}), "
            f"the rows of {table}"
        )
    return number


def _check_number(factors: Path, own: int, where: str) -> None:
    """Refuse a folder of another row: ``gem_id`` of its scale factors says which suffix its barcodes have."""
    if not factors.is_file():
        return
    try:
        stated = json.loads(factors.read_text(encoding="utf-8-sig")).get("gem_id", own)
    except (ValueError, AttributeError) as error:
        raise InputError(f"scale factors {factors} are no JSON object: {error}") from error
    if stated != own:
        raise InputError(f"{where}: row {own} of the table of samples, but gem_id of {factors} is {stated}")


def _own_positions(spatial: Path, own: int) -> pd.DataFrame:
    """Positions of a sample's own folder, under the barcodes that the joint matrix has."""
    positions = read_visium_positions(find_positions(spatial))
    positions.index = pd.Index([re.sub(r"-\d+$", f"-{own}", name) for name in positions.index], name="barcode")
    return positions
