"""10x Visium: what SpaceRanger 1 to 4 write into ``outs/``."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pandas as pd

from stexp.data.gene_names import harmonise
from stexp.data.join import join
from stexp.data.kept_sections import read_each
from stexp.data.readers.aggr import is_aggr, read_aggr
from stexp.data.readers.paths import choose_sections, user_path
from stexp.data.readers.patients import read_patients
from stexp.data.readers.spaceranger import (
    files_of_counts,
    find_counts,
    find_positions,
    read_10x_counts,
    read_visium_positions,
)
from stexp.data.readers.visium_image import image_of, section_on, slide_of
from stexp.data.readers.visium_scale import FACTORS, bin_size_um, fit_um_per_px, read_factors
from stexp.data.section import Section
from stexp.errors import InputError

log = logging.getLogger(__name__)


def read_visium(
    root: str | Path,
    sections: list[str] | None = None,
    image: str | Path | None = None,
    gene_table: str | Path | None = None,
    cytassist: bool = False,
) -> list[Section]:
    """Sections as SpaceRanger 1 to 4 left them, in name order.

    Parameters
    ----------
    root
        One ``outs`` folder (with ``spatial`` in it), the folder around it, a file or folder in it, or a folder of
        several, each directly or as ``<section>/outs``; or ``outs`` of ``aggr``, see
        :func:`~stexp.data.readers.aggr.read_aggr`. Of Visium HD, one folder ``binned_outputs/square_<n>um``, or
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
    cytassist
        Cut tiles from the CytAssist's own picture, where positions are pixels of it; it shows no nuclei.

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
    image = user_path(image) if image else None
    joint = _joint(root)
    if joint is not None:
        if cytassist:
            raise InputError(f"data.cytassist=true, but {joint} of aggr keeps no picture by the CytAssist")
        return read_aggr(joint, sections, image, gene_table)
    folders = _section_folders(root)
    names = choose_sections(sorted(folders), sections, root)
    patients = read_patients(root / "patients.csv", names)

    def read(name: str) -> Section:
        return read_section(
            name,
            patients[name],
            find_counts(folders[name]),
            folders[name] / "spatial",
            None if cytassist and image is None else image_of(image, root, folders[name], name, len(names)),
            gene_table,
            cytassist=cytassist,
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
    cytassist: bool = False,
    pictures: Path | None = None,
) -> Section:
    """One section from its counts, its folder ``spatial``, and its full-resolution image where there is one.

    `labels`, by barcode, become ``spots.obs["label"]``; for `cytassist` see
    :func:`~stexp.data.readers.visium_image.slide_of`. `pictures` is the folder of SpaceRanger's pictures, where that
    is not `spatial`.
    """
    where = f"section {name}"
    positions_file = find_positions(spatial)
    positions = read_visium_positions(positions_file)
    factors = read_factors(spatial / FACTORS)
    bin_um = bin_size_um(positions, factors, Path(os.path.abspath(spatial)).parent, where)
    um_per_px = fit_um_per_px(positions, factors, bin_um, where)
    slide, scale = slide_of(image, pictures or spatial, factors, um_per_px, where, cytassist)
    spots = join(harmonise(read_10x_counts(counts), gene_table, where), positions, where, complete=True)
    if labels is not None:
        spots.obs["label"] = labels.reindex(spots.obs_names)
    files = [*files_of_counts(counts), positions_file, spatial / FACTORS]
    return section_on(slide, scale, name, patient, spots, um_per_px, files)


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


def _places(root: Path) -> list[Path]:
    """Where ``outs`` may be: a folder, those in it, and each one's ``outs``."""
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [each for folder in (root, *inside) for each in (folder, folder / "outs")]


def _has_spatial(folder: Path) -> bool:
    return (folder / "spatial").is_dir()


def _joint(root: Path) -> Path | None:
    """``outs`` of aggr, where there is nothing else; None where there is none."""
    folders = list(dict.fromkeys(filter(_has_spatial, _places(root))))
    joint = [folder for folder in folders if is_aggr(folder)]
    if folders and folders[0] in (root, root / "outs"):
        folders = folders[:1]  # what lies deeper belongs to it
        joint = joint[:1] if joint[:1] == folders else []
    if joint and folders != joint:
        raise InputError(f"{joint[0]} is of spaceranger aggr, beside others; read it alone: data.root={joint[0]}")
    return joint[0] if joint else None


def _section_folders(root: Path) -> dict[str, Path]:
    """Folders that hold ``spatial``, by the section's name."""
    with_spatial = list(dict.fromkeys(folder for folder in map(_only_bins, _places(root)) if _has_spatial(folder)))
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
        f"{folder} is Visium HD; choose one size of bins: data=visium_hd data.bin_um=, or data.root={bins}/ and one of "
        f"{', '.join(path.name for path in sizes)}"
    )


def _name(folder: Path) -> str:
    folder = Path(os.path.abspath(folder))  # resolve() would call a link by what it leads to
    while folder.name in ("outs", "binned_outputs") or folder.name.startswith("square_"):
        folder = folder.parent
    return folder.name
