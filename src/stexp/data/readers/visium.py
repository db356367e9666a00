"""10x Visium: what SpaceRanger 1, 2 and 3 write into ``outs/``."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.gene_names import harmonise
from stexp.data.readers.spaceranger import files_of_counts, read_10x_counts, read_visium_positions
from stexp.data.section import Section, join
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

log = logging.getLogger(__name__)

PITCH_UM = 100.0
"""Centre to centre of neighbouring spots, each with six neighbours: columns of the array are half of it apart."""

NOMINAL_SPOT_UM = 65.0
"""What SpaceRanger takes for the diameter of a spot in ``spot_diameter_fullres``; the printed spot has 55 um."""

IMAGES = {".tif", ".tiff", ".btf", ".svs", ".ndpi", ".mrxs", ".scn", ".jpg", ".jpeg", ".png"}

HIRES = "tissue_hires_image.png"

WRITTEN_BY_SPACERANGER = {
    HIRES,
    "tissue_lowres_image.png",
    "aligned_fiducials.jpg",
    "aligned_tissue_image.jpg",
    "detected_tissue_image.jpg",
    "cytassist_image.tiff",
}


def read(
    root: str | Path,
    sections: list[str] | None = None,
    image: str | Path | None = None,
    gene_table: str | Path | None = None,
) -> list[Section]:
    """Sections as SpaceRanger 1, 2, 3 left them, in name order.

    Parameters
    ----------
    root
        One ``outs`` folder (with ``spatial`` in it), or a folder of several, each directly or as ``<section>/outs``.
        Of Visium HD, one folder ``binned_outputs/square_<n>um``. A section is called like its folder, ``outs`` like
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
    root = Path(root)
    folders = _section_folders(root)
    unknown = sorted(set(sections or ()) - set(folders))
    if unknown:
        raise InputError(f"no section {', '.join(unknown)} in {root}; there are {', '.join(sorted(folders))}")
    names = sorted(folders if sections is None else set(sections))
    patients = _read_patients(root / "patients.csv", names)
    return [
        read_section(
            name,
            patients[name],
            find_counts(folders[name]),
            folders[name] / "spatial",
            _given_image(Path(image), name, len(names)) if image else _find_image(root, folders[name], name),
            gene_table,
        )
        for name in names
    ]


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
    positions_file = _find_positions(spatial)
    positions = read_visium_positions(positions_file)
    factors_file = spatial / "scalefactors_json.json"
    factors = _read_factors(factors_file)
    um_per_px = _um_per_px(positions, factors, where)
    scale = 1.0
    if image is None and (spatial / HIRES).is_file():
        image, scale = spatial / HIRES, factors.get("tissue_hires_scalef")
        if scale is None:
            raise InputError(f"{where}: without tissue_hires_scalef in {factors_file} positions do not fit {HIRES}")
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
    spots = _in_tissue(harmonise(read_10x_counts(counts), gene_table, where), positions, where)
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


def _section_folders(root: Path) -> dict[str, Path]:
    """Folders that hold ``spatial``, by the section's name."""
    if not root.is_dir():
        raise InputError(f"folder {root} does not exist (data.root=)")
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    candidates = [root, root / "outs"] + [path for folder in inside for path in (folder, folder / "outs")]
    for folder in candidates:
        bins = folder if folder.name == "binned_outputs" else folder / "binned_outputs"
        if bins.is_dir():
            sizes = ", ".join(path.name for path in sorted(bins.glob("square_*")))
            raise InputError(f"{folder} is Visium HD; choose one size of bins: data.root={bins}/ and one of {sizes}")
    found = [folder for folder in candidates if (folder / "spatial").is_dir()]
    if root in found:
        found = [root]  # what lies deeper belongs to it
    if not found:
        raise InputError(f"{root} has no folder spatial, nor has one of its folders; outs of SpaceRanger would fit")
    folders: dict[str, Path] = {}
    for folder in found:
        name = _name(folder)
        if name in folders:
            raise InputError(f"{folders[name]} and {folder} would both be section {name}; rename one")
        folders[name] = folder
    return folders


def _name(folder: Path) -> str:
    folder = folder.absolute()
    while folder.name in ("outs", "binned_outputs") or folder.name.startswith("square_"):
        folder = folder.parent
    return folder.name


def _read_patients(file: Path, names: list[str]) -> dict[str, str]:
    if not file.is_file():
        if len(names) > 1:
            log.warning("no %s (section,patient): each of %d sections counts as a patient of its own", file, len(names))
        return {name: name for name in names}
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read as a table: {' '.join(str(error).split())}") from error
    if not {"section", "patient"} <= set(table.columns):
        raise InputError(f"{file} has the columns {', '.join(table.columns)}; it needs section and patient")
    patients = dict(zip(table["section"].str.strip(), table["patient"].str.strip(), strict=True))
    if len(patients) < len(table):
        raise InputError(f"{file} names a section twice: {len(table)} rows, {len(patients)} sections")
    missing = [name for name in names if not patients.get(name)]
    if missing:
        raise InputError(f"{file} names no patient for section {', '.join(missing)}")
    return patients


def find_counts(folder: Path) -> Path:
    """The matrix of a folder: filtered before raw (only spots in tissue are used of either), HDF5 before mtx."""
    for kind in ("filtered", "raw"):
        # files as 10x offers them for download start with the name of the data set
        files = sorted(path for path in folder.glob(f"*{kind}_feature_bc_matrix.h5") if not path.name.startswith("."))
        if len(files) > 1:
            raise InputError(f"{folder} has {len(files)} matrices: {', '.join(path.name for path in files)}; keep one")
        files += [path for path in sorted(folder.glob(f"*{kind}_feature_bc_matrix")) if path.is_dir()]
        if files:
            return files[0]
    raise InputError(f"{folder} has no filtered_feature_bc_matrix.h5, nor a folder filtered_feature_bc_matrix")


def _find_positions(spatial: Path) -> Path:
    names = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
    for name in names:
        if (spatial / name).is_file():
            return spatial / name
    raise InputError(f"{spatial} has none of {', '.join(names)}")


def find_image(folder: Path, stems: tuple[str, ...] = ()) -> Path | None:
    """The only image of a folder that SpaceRanger did not write; with `stems`, of those called so."""
    found = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if path.suffix.lower() in IMAGES and path.is_file() and not path.name.startswith(".")
        if path.name not in WRITTEN_BY_SPACERANGER and (not stems or path.stem in stems)
    ]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(f"{folder} has {len(found)} images ({names}); keep one, or name it (data=visium data.image=)")
    return found[0] if found else None


def _find_image(root: Path, folder: Path, name: str) -> Path | None:
    around = [find_image(folder), find_image(folder / "spatial")]
    if folder.name == "outs" and folder != root:
        around.append(find_image(folder.parent))
    beside = folder.absolute().parent if folder == root else root
    around.append(find_image(beside, (name, f"{name}_image")))
    return next((path for path in around if path is not None), None)


def _given_image(image: Path, name: str, n_sections: int) -> Path:
    if image.is_dir():
        found = find_image(image, (name, f"{name}_image"))
        if found is None:
            raise InputError(f"data.image={image} has no image called {name}")
        return found
    if n_sections > 1:
        raise InputError(
            f"data.image={image} is one file for {n_sections} sections; a folder of <section>.tif would fit"
        )
    return image


def _read_factors(file: Path) -> dict[str, float]:
    if not file.is_file():
        log.warning("%s does not exist: nothing to compare the pitch of the spots with", file)
        return {}
    try:
        factors = json.loads(file.read_text())
        return {key: float(value) for key, value in factors.items() if isinstance(value, int | float) and value > 0}
    except (ValueError, AttributeError) as error:
        raise InputError(f"scale factors {file} are no JSON object: {error}") from error


def _um_per_px(positions: pd.DataFrame, factors: dict[str, float], where: str) -> float:
    """Scale of the full-resolution image, from an affine fit of pixel to array positions.

    Raises
    ------
    InputError
        The spots lie in one line, their pixel positions do not follow the array, or its axes are swapped.
    """
    bin_um = factors.get("bin_size_um")  # Visium HD, on a square array
    step_um = np.array([bin_um, bin_um] if bin_um else [PITCH_UM / 2, PITCH_UM * np.sqrt(3) / 2])
    array = np.column_stack([positions[["array_x", "array_y"]], np.ones(len(positions))])
    pixels = positions[["pixel_x", "pixel_y"]].to_numpy()
    fit, _, rank, _ = np.linalg.lstsq(array, pixels, rcond=None)
    step_px = np.linalg.norm(fit[:2], axis=1)
    if rank < 3 or not step_px.all():
        raise InputError(
            f"{where}: {len(positions)} spots in one line, or at one place; a Visium array has rows and columns"
        )
    off_px = float(np.sqrt(np.square(array @ fit - pixels).sum(axis=1).mean()))
    if off_px > step_px.min():
        raise InputError(
            f"{where}: pixel positions do not follow the array; they are {off_px:.0f} px off a regular one"
        )
    along_x, along_y = step_um / step_px
    if not 1 / 2 < along_x / along_y < 2:
        raise InputError(
            f"{where}: {along_x:.3g} um/px along the array's columns, {along_y:.3g} along its rows: "
            f"are array_row and array_col swapped?"
        )
    um_per_px = float(np.sqrt(along_x * along_y))
    if np.linalg.det(fit[:2]) < 0:
        log.warning(
            "%s: the positions mirror the array: unless the picture is mirrored, pixel row and column are swapped",
            where,
        )
    if "spot_diameter_fullres" in factors:
        stated = (bin_um or NOMINAL_SPOT_UM) / factors["spot_diameter_fullres"]
        if not 0.95 < stated / um_per_px < 1.05:
            log.warning(
                "%s: the pitch of the spots gives %.3g um/px, spot_diameter_fullres %.3g; the pitch counts",
                where,
                um_per_px,
                stated,
            )
    return um_per_px


def _in_tissue(counts: ad.AnnData, positions: pd.DataFrame, where: str) -> ad.AnnData:
    inside = positions[positions["in_tissue"]]
    if inside.empty:
        raise InputError(f"{where}: none of {len(positions)} spots is in tissue")
    outside = counts.obs_names.isin(positions.index[~positions["in_tissue"]])
    if outside.all():
        raise InputError(f"{where}: all {len(outside)} spots with counts are outside the tissue")
    nowhere = ~counts.obs_names.isin(positions.index)
    if nowhere.any() and not nowhere.all():
        raise InputError(
            f"{where}: {int(nowhere.sum())} of {len(nowhere)} barcodes with counts are not in the table of positions "
            f"(first: {counts.obs_names[nowhere][0]}), which lists every place of an array: is it cut?"
        )
    if outside.any():
        log.info("%s: %d spots with counts are outside the tissue and left out", where, int(outside.sum()))
        counts = counts[~outside]
    return join(counts, inside, where)


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
