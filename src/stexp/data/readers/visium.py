"""10x Visium: what SpaceRanger 1, 2 and 3 write into ``outs/``."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pandas as pd

from stexp.data.gene_names import harmonise
from stexp.data.join import join
from stexp.data.kept_sections import read_each
from stexp.data.readers.formats import TEXT
from stexp.data.readers.paths import choose_sections, user_path
from stexp.data.readers.spaceranger import (
    files_of_counts,
    find_counts,
    find_positions,
    read_10x_counts,
    read_visium_positions,
)
from stexp.data.readers.text import read_table
from stexp.data.readers.visium_scale import bin_size_um, fit_um_per_px, read_factors
from stexp.data.section import Section
from stexp.data.slides.formats import SUFFIXES, is_litter, slide_name
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

log = logging.getLogger(__name__)

HIRES = "tissue_hires_image.png"

WRITTEN_BY_SPACERANGER = {
    HIRES,
    "tissue_lowres_image.png",
    "aligned_fiducials.jpg",
    "aligned_tissue_image.jpg",
    "detected_tissue_image.jpg",
    "cytassist_image.tiff",
}


def read_visium(
    root: str | Path,
    sections: list[str] | None = None,
    image: str | Path | None = None,
    gene_table: str | Path | None = None,
) -> list[Section]:
    """Sections as SpaceRanger 1, 2, 3 left them, in name order.

    Parameters
    ----------
    root
        One ``outs`` folder (with ``spatial`` in it), the folder around it, a file or folder in it, or a folder of
        several, each directly or as ``<section>/outs``. Of Visium HD, one folder ``binned_outputs/square_<n>um``, or
        what is around it where it is the only one. A section is called like its folder, ``outs`` like
        the folder around it. The patient stands in ``root/patients.csv`` (columns section, patient); without this
        file every section counts as a patient of its own.
    sections
        Names to read; default all. Nothing is opened for the others.
    image
        The full-resolution image of the only section, or a folder with ``<section>.<ending>`` for each. None: the
        image that lies in the section's folder or in its ``spatial``, beside its ``outs``, or in `root` as
        ``<section>.<ending>`` or ``<section>_image.<ending>``; where there is none, ``tissue_hires_image.png``, with
        positions and scale to match, which a warning says.
    gene_table
        See :func:`~stexp.data.gene_names.harmonise`.

    Returns
    -------
    list of Section
        Spots in tissue only. `um_per_px` is 100 um over the fitted pitch of the spots (of HD: the size of a bin);
        the scale factors are compared with it.

    Raises
    ------
    InputError
        A file that is missing or does not hold what it should, or several that could be the image.
    """
    root = _folder_around(user_path(root))
    folders = _section_folders(root)
    names = choose_sections(sorted(folders), sections, root)
    patients = read_patients(root / "patients.csv", names)

    def read(name: str) -> Section:
        return read_section(
            name,
            patients[name],
            find_counts(folders[name]),
            folders[name] / "spatial",
            _given_image(user_path(image), name, len(names)) if image else _find_image(root, folders[name], name),
            gene_table,
        )

    return read_each(names, len(names), "reading sections", read)


def read_section(
    name: str,
    patient: str,
    counts: Path,
    spatial: Path,
    image: Path | None,
    gene_table: str | Path | None = None,
    labels: pd.Series | None = None,
) -> Section:
    """One section from its counts, its folder ``spatial``, and its full-resolution image where there is one.

    `labels`, by barcode, become ``spots.obs["label"]``.
    """
    where = f"section {name}"
    positions_file = find_positions(spatial)
    positions = read_visium_positions(positions_file)
    factors_file = spatial / "scalefactors_json.json"
    factors = read_factors(factors_file)
    bin_um = bin_size_um(positions, factors, Path(os.path.abspath(spatial)).parent, where)
    um_per_px = fit_um_per_px(positions, factors, bin_um, where)
    scale = 1.0
    if image is None and (spatial / HIRES).is_file():
        if "tissue_hires_scalef" not in factors:
            raise InputError(f"{where}: without tissue_hires_scalef in {factors_file} positions do not fit {HIRES}")
        image, scale = spatial / HIRES, factors["tissue_hires_scalef"]
        log.warning(
            "%s: no full-resolution image, so %s is used: %.3g um/px instead of %.3g; data.tile_um= lets "
            "tiles show as much tissue as elsewhere",
            where,
            HIRES,
            um_per_px / scale,
            um_per_px,
        )
    elif image is None:
        log.warning("%s: neither a full-resolution image nor %s; its spots can only be referred to", where, HIRES)
    spots = join(harmonise(read_10x_counts(counts), gene_table, where), positions, where, complete=True)
    spots.obsm["spatial"] = spots.obsm["spatial"] * scale
    if labels is not None:
        spots.obs["label"] = labels.reindex(spots.obs_names)
    slide = None if image is None else Slide(image)
    if slide is not None and scale == 1:
        _check_full_size(slide, spatial / HIRES, factors.get("tissue_hires_scalef"), where)
    files = [*files_of_counts(counts), positions_file, factors_file, image]
    return Section(
        name=name,
        patient=patient,
        spots=spots,
        slide=slide,
        um_per_px=um_per_px / scale,
        files=tuple(file for file in files if file is not None and file.is_file()),
    )


def _folder_around(root: Path) -> Path:
    """The folder of a section where `root` is a file or folder that SpaceRanger wrote into it; else `root`."""
    if not root.exists():
        raise InputError(f"folder {root} does not exist (data.root=)")
    folder = root if root.is_dir() else root.absolute().parent
    while folder.name == "spatial" or folder.name.endswith("_feature_bc_matrix") or folder.name == "analysis":
        folder = folder.absolute().parent
    if folder != root:
        log.info("data.root=%s: the section lies in %s", root, folder)
    return folder


def _section_folders(root: Path) -> dict[str, Path]:
    """Folders that hold ``spatial``, by the section's name."""
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    candidates = [root, root / "outs"] + [path for folder in inside for path in (folder, folder / "outs")]
    candidates = [_only_bins(folder) for folder in dict.fromkeys(candidates)]
    with_spatial = [folder for folder in dict.fromkeys(candidates) if (folder / "spatial").is_dir()]
    for own in (_only_bins(root), _only_bins(root / "outs")):
        if own in with_spatial:
            with_spatial = [own]  # what lies deeper belongs to it
            break
    if not with_spatial:
        raise InputError(f"{root} has no folder spatial, nor has one of its folders; outs of SpaceRanger would fit")
    folders: dict[str, Path] = {}
    for folder in with_spatial:
        name = _name(folder)
        if name in folders:
            raise InputError(f"{folders[name]} and {folder} would both be section {name}; rename one")
        folders[name] = folder
    return folders


def _only_bins(folder: Path) -> Path:
    """Where the bins of Visium HD lie, if they have one size; `folder` itself if it is none of Visium HD."""
    bins = folder if folder.name == "binned_outputs" else folder / "binned_outputs"
    if not bins.is_dir():
        return folder
    sizes = sorted(path for path in bins.glob("square_*") if path.is_dir())
    if len(sizes) == 1:
        log.info("%s is Visium HD with one size of bins: %s", folder, sizes[0].name)
        return sizes[0]
    raise InputError(
        f"{folder} is Visium HD; choose one size of bins: data.root={bins}/ and one of "
        f"{', '.join(path.name for path in sizes)}"
    )


def _name(folder: Path) -> str:
    folder = Path(os.path.abspath(folder))  # resolve() would call a link by what it leads to
    while folder.name in ("outs", "binned_outputs") or folder.name.startswith("square_"):
        folder = folder.parent
    return folder.name


def read_patients(file: Path, names: list[str]) -> dict[str, str]:
    if not file.is_file():
        if len(names) > 1:
            log.warning("no %s (section,patient): each of %d sections counts as a patient of its own", file, len(names))
        return {name: name for name in names}
    table = read_table(file, "patients", skipinitialspace=True, **TEXT).fillna("")
    table.columns = table.columns.str.strip()
    if not {"section", "patient"} <= set(table.columns):
        raise InputError(f"{file} has the columns {', '.join(table.columns)}; it needs section and patient")
    patients = dict(zip(table["section"].str.strip(), table["patient"].str.strip(), strict=True))
    if len(patients) < len(table):
        raise InputError(f"{file} names a section twice: {len(table)} rows, {len(patients)} sections")
    missing = [name for name in names if not patients.get(name)]
    if missing:
        raise InputError(f"{file} names no patient for section {', '.join(missing)}")
    return patients


def find_image(folder: Path, stems: tuple[str, ...] = ()) -> Path | None:
    """The only image of a folder that SpaceRanger did not write; with `stems`, of those called so."""
    images = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if path.suffix.lower() in SUFFIXES and path.is_file() and not is_litter(path)
        if path.name not in WRITTEN_BY_SPACERANGER and (not stems or slide_name(path) in stems)
    ]
    if len(images) > 1:
        names = ", ".join(path.name for path in images)
        raise InputError(f"{folder} has {len(images)} images ({names}); keep one, or name it (data=visium data.image=)")
    return images[0] if images else None


def _find_image(root: Path, folder: Path, name: str) -> Path | None:
    around = [find_image(folder), find_image(folder / "spatial")]
    if folder.name == "outs" and folder != root:
        around.append(find_image(folder.parent))
    beside = folder.absolute().parent if folder == root else root
    around.append(find_image(beside, (name, f"{name}_image")))
    return next((path for path in around if path is not None), None)


def _given_image(image: Path, name: str, n_sections: int) -> Path:
    if image.is_dir():
        own = find_image(image, (name, f"{name}_image"))
        if own is None:
            raise InputError(f"data.image={image} has no image called {name}")
        return own
    if n_sections > 1:
        raise InputError(
            f"data.image={image} is one file for {n_sections} sections; a folder of <section>.tif would fit"
        )
    return image


def _check_full_size(slide: Slide, hires: Path, scale: float | None, where: str) -> None:
    """Refuse an image that is not the one SpaceRanger reduced: positions are pixels of that one."""
    if scale is None or not hires.is_file():
        return
    expected = [n / scale for n in Slide(hires).size]
    if any(abs(n - e) * scale > 2 for n, e in zip(slide.size, expected, strict=True)):
        raise InputError(
            f"{where}: {slide.path} has {slide.size[0]} x {slide.size[1]} px, the full-resolution image about "
            f"{expected[0]:.0f} x {expected[1]:.0f} (by {HIRES} and tissue_hires_scalef); give that, or leave "
            f"data.image out"
        )
