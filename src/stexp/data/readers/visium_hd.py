"""10x Visium HD: bins of any size, or segmented cells, as SpaceRanger 3 and 4 write them into ``outs/``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from stexp.arguments import Positive, check
from stexp.data.gene_names import harmonise
from stexp.data.join import join
from stexp.data.kept_sections import read_each
from stexp.data.readers.bins import read_bins, squares_of
from stexp.data.readers.cells import read_cell_centres
from stexp.data.readers.paths import choose_sections, folders_by_section, user_path
from stexp.data.readers.patients import read_patients
from stexp.data.readers.spaceranger import files_of_counts, find_counts, find_positions, read_10x_counts
from stexp.data.readers.sums import read_10x_sums
from stexp.data.readers.visium import read_section
from stexp.data.readers.visium_image import HIRES, image_of, section_on, slide_of
from stexp.data.readers.visium_scale import BIN_FOLDER, FACTORS, bin_size_um, fit_um_per_px, read_factors
from stexp.data.section import Section
from stexp.errors import InputError

log = logging.getLogger(__name__)

BINS, CELLS = "binned_outputs", "segmented_outputs"


def read_visium_hd(
    root: str | Path,
    sections: list[str] | None = None,
    spots: Literal["bins", "cells"] = "bins",
    bin_um: Positive = 16,
    image: str | Path | None = None,
    gene_table: str | Path | None = None,
    cytassist: bool = False,
) -> list[Section]:
    """Sections of Visium HD, in name order.

    Parameters
    ----------
    root
        One ``outs`` folder (with ``binned_outputs`` or ``segmented_outputs`` in it), the folder around it, a file or
        folder in it, or a folder of several, each directly or as ``<section>/outs``. Names and patients are those of
        :func:`~stexp.data.readers.visium.read_visium`.
    sections
        Names to read; default all.
    spots
        ``bins``, or ``cells`` of ``segmented_outputs`` (SpaceRanger 4), each at the centre of its outline.
    bin_um
        Side of a bin in micrometres. A size that has a folder (``square_016um``) is read from it; a multiple of such a
        size is summed from the finest of them that divides it: squares of which half are on tissue, and the counts of
        their bins on tissue.
    image
        The full-resolution image, as in :func:`~stexp.data.readers.visium.read_visium`; None: also
        ``<section>_tissue_image.<ending>``, or the one in ``microscope_image``.
    gene_table
        See :func:`~stexp.data.gene_names.harmonise`.
    cytassist
        See :func:`~stexp.data.readers.visium_image.slide_of`.

    Returns
    -------
    list of Section
        Bins on tissue, or all cells with counts. Array coordinates of bins count bins; those of cells are whole
        micrometres. `um_per_px` is the size of a bin over their fitted pitch, of cells ``microns_per_pixel``.

    Raises
    ------
    InputError
        A file that is missing or does not hold what it should, or a size that the bins there are cannot make up.
    """
    check("data.spots", spots, Literal["bins", "cells"])
    check("data.bin_um", bin_um, Positive)
    root = user_path(root)
    folders = _outs(root)
    names = choose_sections(sorted(folders), sections, root)
    patients = read_patients(root / "patients.csv", names)
    of_all = user_path(image) if image else None

    def read(name: str) -> Section:
        outs = folders[name]
        own = None if cytassist and of_all is None else image_of(of_all, root, outs, name, len(names))
        if spots == "cells":
            return _read_cells(name, patients[name], outs, own, gene_table, cytassist)
        return _read_bins(name, patients[name], outs, bin_um, own, gene_table, cytassist)

    return read_each(
        names, len(names), "reading sections", read, at_most=1
    )  # a whole array takes 3 GB while it is read


def _outs(root: Path) -> dict[str, Path]:
    """Folders of Visium HD, by the section's name."""
    if not root.exists():
        raise InputError(f"folder {root} does not exist (data.root=)")
    folder = root if root.is_dir() else root.absolute().parent
    while _is_within(folder.absolute().name):
        folder = folder.absolute().parent
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for candidates in ((folder,), (folder / "outs",), [each for path in inside for each in (path, path / "outs")]):
        outs = [path for path in candidates if (path / BINS).is_dir() or (path / CELLS).is_dir() or _sizes(path)]
        if outs:
            break
    else:
        other = "; it is of Visium, which data=visium reads" if (folder / "spatial").is_dir() else ""
        raise InputError(f"{root} has no folder {BINS} or {CELLS}, nor has one of its folders{other}")
    return folders_by_section(outs)


def _is_within(name: str) -> bool:
    """Whether a folder of this name lies in ``outs``."""
    return (
        name in (BINS, CELLS, "spatial", "analysis")
        or BIN_FOLDER.fullmatch(name) is not None
        or name.endswith(("_feature_bc_matrix", "_feature_cell_matrix"))
    )


def _sizes(outs: Path) -> dict[int, Path]:
    """Folders of bins by their size in micrometres."""
    within = outs / BINS if (outs / BINS).is_dir() else outs  # as unpacked from one archive a size
    folders = sorted(path for path in within.glob("square_*um") if path.is_dir())
    return {int(match[1]): path for path in folders if (match := BIN_FOLDER.fullmatch(path.name))}


def _read_bins(
    name: str,
    patient: str,
    outs: Path,
    bin_um: float,
    image: Path | None,
    gene_table: str | Path | None,
    cytassist: bool,
) -> Section:
    where, sizes = f"section {name}", _sizes(outs)
    if bin_um in sizes:
        folder = sizes[int(bin_um)]
        spatial = folder / "spatial"
        return read_section(
            name, patient, find_counts(folder), spatial, image, gene_table, None, cytassist, _pictures(spatial, outs)
        )
    fine = next((size for size in sorted(sizes) if bin_um % size == 0), None)
    if fine is None:
        there = ", ".join(map(str, sorted(sizes))) or "none"
        fitting = f"; multiples of {min(sizes)} would fit" if sizes else f" in {outs / BINS}"
        raise InputError(
            f"{where}: data.bin_um={bin_um:g} is no multiple of a size of bins there is ({there}){fitting}"
        )
    folder = sizes[fine]
    counts, file = find_counts(folder), find_positions(folder / "spatial")
    bins, factors = read_bins(file), read_factors(folder / "spatial" / FACTORS)
    factor = int(bin_um // fine)
    squares = squares_of(bins, factor, bin_um)
    log.info(
        "%s: %d bins of %g um on tissue, each the sum of up to %d of %d um", where, len(squares.places), bin_um,
        factor**2, fine,
    )  # fmt: skip
    bin_size_um(pd.DataFrame(), factors, folder, where)  # refuses scale factors of another size
    if "spot_diameter_fullres" in factors:
        factors["spot_diameter_fullres"] *= factor
    um_per_px = fit_um_per_px(squares.places, factors, bin_um, where)
    slide, scale = slide_of(image, _pictures(folder / "spatial", outs), factors, um_per_px, where, cytassist)
    values = read_10x_sums(counts, lambda codes: squares.of(codes, f"{where}: counts {counts}"), squares.places.index)
    spots = join(harmonise(values, gene_table, where), squares.places, where)
    files = [*files_of_counts(counts), file, folder / "spatial" / FACTORS]
    return section_on(slide, scale, name, patient, spots, um_per_px, files)


def _pictures(spatial: Path, outs: Path) -> Path:
    """The folder that has SpaceRanger's pictures: that of a size of bins, or the one for all."""
    return spatial if (spatial / HIRES).is_file() or not (outs / "spatial" / HIRES).is_file() else outs / "spatial"


def _read_cells(
    name: str, patient: str, outs: Path, image: Path | None, gene_table: str | Path | None, cytassist: bool
) -> Section:
    where, folder = f"section {name}", outs / CELLS
    if not folder.is_dir():
        raise InputError(f"{where}: data.spots=cells, but {outs} has no {CELLS}, which SpaceRanger 4 writes")
    counts, outlines = _cell_counts(folder), folder / "cell_segmentations.geojson"
    if not outlines.is_file():
        raise InputError(f"{where}: {folder} has no {outlines.name}, the outlines of its cells")
    centres = read_cell_centres(outlines)
    factors_file = next(
        (file for file in (folder / "spatial" / FACTORS, outs / "spatial" / FACTORS) if file.is_file()), None
    )
    factors = {} if factors_file is None else read_factors(factors_file)
    if "microns_per_pixel" not in factors:
        raise InputError(f"{where}: no microns_per_pixel in {folder / 'spatial' / FACTORS}, which gives cells a scale")
    um_per_px = factors["microns_per_pixel"]
    slide, scale = slide_of(image, _pictures(folder / "spatial", outs), factors, um_per_px, where, cytassist)
    pixels = centres.to_numpy()
    um = (pixels - pixels.min(axis=0)) * um_per_px
    centres["array_x"], centres["array_y"] = np.floor(um).T
    spots = join(harmonise(read_10x_counts(counts), gene_table, where), centres, where)
    files = [*files_of_counts(counts), outlines, *([factors_file] if factors_file else [])]
    return section_on(slide, scale, name, patient, spots, um_per_px, files)


def _cell_counts(folder: Path) -> Path:
    """The matrix of cells: filtered before raw, HDF5 before mtx."""
    for kind in ("filtered", "raw"):
        for pattern in (f"*{kind}_feature_cell_matrix.h5", f"*{kind}_feature_cell_matrix"):
            files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
            if len(files) > 1:
                raise InputError(f"{folder} has {len(files)} matrices: {', '.join(map(str, files))}; keep one")
            if files:
                return files[0]
    raise InputError(f"{folder} has no filtered_feature_cell_matrix.h5, the counts of its cells")
