"""10x Xenium: transcripts in squares, or cells, on an H&E image of the same tissue."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd

from stexp.arguments import NotNegative, Positive, check
from stexp.data.gene_names import harmonise
from stexp.data.join import join
from stexp.data.kept_sections import read_each
from stexp.data.readers.alignment import read_alignment, scale_of, to_image
from stexp.data.readers.paths import choose_sections, folders_by_section, user_path
from stexp.data.readers.patients import read_patients
from stexp.data.readers.spaceranger import Features, read_10x_counts, read_10x_features
from stexp.data.readers.text import read_table
from stexp.data.readers.transcripts import count_in_cells, count_in_squares
from stexp.data.section import Section, n_outside
from stexp.data.slides.formats import SUFFIXES, is_litter, slide_name
from stexp.data.slides.slide import Slide
from stexp.errors import InputError, listed

log = logging.getLogger(__name__)

EXPERIMENT = "experiment.xenium"
MATRIX = "cell_feature_matrix.h5"
OF_10X_QV = 20.0
"""Quality from which on 10x counts transcripts in cells."""
MOST_OUTSIDE = 0.05
"""Share of spots that may lie beside the image; they are left out."""


def read_xenium(
    root: str | Path,
    sections: list[str] | None = None,
    spots: Literal["bins", "cells"] = "bins",
    bin_um: Positive = 55,
    image: str | Path | None = None,
    alignment: str | Path | None = None,
    min_qv: NotNegative = OF_10X_QV,
    gene_table: str | Path | None = None,
) -> list[Section]:
    """Sections of Xenium, in name order.

    Parameters
    ----------
    root
        One folder with ``experiment.xenium`` in it, the folder around it, or a folder of several, each directly or as
        ``<section>/outs``. A section is called like its folder, ``outs`` like the folder around it. The patient stands
        in ``root/patients.csv`` (columns section, patient); without this file every section counts as a patient of its
        own.
    sections
        Names to read; default all.
    spots
        ``bins``: transcripts in squares of `bin_um` micrometres, those squares that have any; or ``cells`` at their
        centroids.
    image
        The H&E image of the only section, or a folder of ``<section>_he_image.<ending>``. None: the image called
        ``..._he_image`` in or beside the section's folder; where there is none, the section can only be referred to.
    alignment
        Matrix from the pixels of the image to those of Xenium, see
        :func:`~stexp.data.readers.alignment.read_alignment`; a file, or a folder of
        ``<section>_he_imagealignment.csv``. None: that beside the image, ``<image>alignment.csv``.
    min_qv
        Transcripts of lower quality do not count. Cells at the 20 of 10x are those of ``cell_feature_matrix.h5``;
        else, and where that is missing, their transcripts are counted. Controls and unassigned codewords never count.
    gene_table
        See :func:`~stexp.data.gene_names.harmonise`.

    Returns
    -------
    list of Section
        Positions in pixels of the H&E image. Array coordinates count squares; those of cells are whole micrometres.
        `um_per_px` is ``pixel_size`` of ``experiment.xenium`` times the scale of the matrix.

    Raises
    ------
    InputError
        A file that is missing or does not hold what it should, an image without a matrix, or one beside which more
        than 1 spot of 20 lies.
    """
    check("data.spots", spots, Literal["bins", "cells"])
    check("data.bin_um", bin_um, Positive)
    check("data.min_qv", min_qv, NotNegative)
    root = user_path(root)
    folders = _folders(root)
    names = choose_sections(sorted(folders), sections, root)
    patients = read_patients(root / "patients.csv", names)

    def read(name: str) -> Section:
        folder, where = folders[name], f"section {name}"
        pixel_um = _pixel_um(folder / EXPERIMENT)
        own_image = _image(user_path(image) if image else None, root, folder, name, len(names))
        given = user_path(alignment) if alignment else None
        own_alignment = None if own_image is None else _alignment(given, own_image, name, len(names))
        if spots == "cells":
            counts, files = _cells(folder, min_qv, where)
        else:
            counts, files = _squares(folder, bin_um, min_qv, where)
        counts.obsm["spatial"] = counts.obsm["spatial"] / pixel_um
        counts = harmonise(counts, gene_table, where)
        files = (folder / EXPERIMENT, *files)
        if own_image is None or own_alignment is None:
            log.warning("%s: no H&E image (..._he_image.ome.tif); its spots can only be referred to", where)
            return Section(name, patients[name], counts, None, pixel_um, files)
        matrix, slide = read_alignment(own_alignment), Slide(own_image)
        counts = _on_image(counts, matrix, slide, own_alignment, where)
        um_per_px = pixel_um * scale_of(matrix)
        return Section(name, patients[name], counts, slide, um_per_px, (*files, own_alignment, own_image))

    return read_each(names, len(names), "reading sections", read, at_most=1)  # which takes a gigabyte


def _folders(root: Path) -> dict[str, Path]:
    """Folders of Xenium, by the section's name."""
    if not root.exists():
        raise InputError(f"folder {root} does not exist (data.root=)")
    folder = root if root.is_dir() else root.absolute().parent
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for candidates in ((folder,), (folder / "outs",), [each for path in inside for each in (path, path / "outs")]):
        outs = [path for path in candidates if (path / EXPERIMENT).is_file()]
        if outs:
            break
    else:
        raise InputError(f"{root} has no {EXPERIMENT}, nor has one of its folders; the output of a Xenium would fit")
    return folders_by_section(outs)


def _pixel_um(file: Path) -> float:
    try:
        size = json.loads(file.read_text(encoding="utf-8-sig"))["pixel_size"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no JSON object with pixel_size, in micrometres") from error
    check(f"pixel_size of {file}", size, Positive)
    return float(size)


def _image(image: Path | None, root: Path, folder: Path, name: str, n_sections: int) -> Path | None:
    """The H&E image of a section: the given one, or the one in or beside its folder."""
    if image is not None and image.is_file():
        if n_sections > 1:
            raise InputError(
                f"data.image={image} is one file for {n_sections} sections; a folder of <section>_he_image.<ending> "
                f"would fit"
            )
        return image
    if image is not None:
        own = _he_images(image, name) or (_he_images(image) if n_sections == 1 else [])
        if not own:
            raise InputError(f"data.image={image} has no image called {name}_he_image")
        return _only(own, image)
    if within := _he_images(folder):
        return _only(within, folder)
    around = folder.absolute().parent
    for place in dict.fromkeys((around, around.parent if folder.name == "outs" else around, root.absolute())):
        alone = folder.name == "outs" and place == around
        if own := _he_images(place, None if alone else name):
            return _only(own, place)
    return None


def _he_images(folder: Path, name: str | None = None) -> list[Path]:
    """Images of a folder called ``..._he_image``; with `name`, those called so before it."""
    stem = None if name is None else name.removesuffix("_outs")
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    images = [path for path in files if path.suffix.lower() in SUFFIXES and path.is_file() and not is_litter(path)]
    return [
        path
        for path in images
        if slide_name(path).lower().endswith("he_image") and (stem is None or slide_name(path) == f"{stem}_he_image")
    ]


def _only(images: list[Path], folder: Path) -> Path:
    if len(images) > 1:
        raise InputError(f"{folder} has {len(images)} H&E images ({listed(path.name for path in images)}); data.image=")
    return images[0]


def _alignment(alignment: Path | None, image: Path, name: str, n_sections: int) -> Path:
    """The file of the matrix: the given one, or the one beside an image."""
    own = f"{slide_name(image)}alignment.csv"
    if alignment is not None and not alignment.is_dir():
        if n_sections > 1:
            raise InputError(
                f"data.alignment={alignment} is one file for {n_sections} sections; a folder of "
                f"<section>_he_imagealignment.csv would fit"
            )
        return alignment
    folder = image.parent if alignment is None else alignment
    for file in (folder / own, folder / f"{name.removesuffix('_outs')}_he_imagealignment.csv"):
        if file.is_file():
            return file
    raise InputError(
        f"section {name}: {image} has no matrix beside it ({folder / own}), which says where it lies on the Xenium; "
        f"Xenium Explorer exports one (data.alignment=)"
    )


def _panel(folder: Path) -> Features | None:
    return read_10x_features(folder / MATRIX) if (folder / MATRIX).is_file() else None


def _squares(folder: Path, bin_um: float, min_qv: float, where: str) -> tuple[ad.AnnData, tuple[Path, ...]]:
    """Counts of squares, their centres in micrometres in ``obsm["spatial"]``, and the files behind them."""
    file = folder / "transcripts.parquet"
    counts, centres = count_in_squares(file, bin_um, min_qv, _panel(folder), where)
    counts.obs["array_x"], counts.obs["array_y"] = centres["array_x"], centres["array_y"]
    counts.obsm["spatial"] = centres[["x_um", "y_um"]].to_numpy(np.float64)
    log.info("%s: %d squares of %g um with transcripts", where, len(centres), bin_um)
    return counts, (file, *([folder / MATRIX] if (folder / MATRIX).is_file() else []))


def _cells(folder: Path, min_qv: float, where: str) -> tuple[ad.AnnData, tuple[Path, ...]]:
    """Counts of cells, their centroids in micrometres in ``obsm["spatial"]``, and the files behind them."""
    table = next((folder / name for name in CELLS if (folder / name).is_file()), None)
    if table is None:
        raise InputError(f"{where}: {folder} has none of {', '.join(CELLS)}, the places of its cells")
    cells = read_cells(table)
    if min_qv == OF_10X_QV and (folder / MATRIX).is_file():
        file = folder / MATRIX
        counts = read_10x_counts(file)
    else:
        file = folder / "transcripts.parquet"
        counts = count_in_cells(file, cells.index, min_qv, _panel(folder), where)
    cells["array_x"], cells["array_y"] = np.floor(cells.to_numpy() - np.minimum(cells.min().to_numpy(), 0)).T
    return join(counts, cells, where), (table, file)


CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")


def read_cells(file: Path) -> pd.DataFrame:
    """Centroids of cells in micrometres: pixel_x and pixel_y (as joins call them), by cell_id."""
    columns = ["cell_id", "x_centroid", "y_centroid"]
    try:
        if file.suffix == ".parquet":
            table = pd.read_parquet(file)
        else:
            table = read_table(file, "cells", dtype={"cell_id": str}, keep_default_na=False)
    except InputError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"cells {file} cannot be read as a table: {' '.join(str(error).split())}") from error
    missing = [name for name in columns if name not in table]
    if missing:
        raise InputError(f"cells {file} lack {', '.join(missing)}; {', '.join(columns)} would fit")
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in table["cell_id"]]
    places = table[columns[1:]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if not np.isfinite(places).all():
        raise InputError(f"cells {file}: {int((~np.isfinite(places)).any(axis=1).sum())} have no centroid")
    return pd.DataFrame(places, index=pd.Index(names, dtype=object), columns=["pixel_x", "pixel_y"])


def _on_image(counts: ad.AnnData, matrix: np.ndarray, slide: Slide, file: Path, where: str) -> ad.AnnData:
    """Spots of Xenium's pixels on an H&E image, without the few beside it."""
    xenium = counts.obsm["spatial"]
    xy, (width, height) = to_image(matrix, xenium), slide.size
    outside = ((xy < 0) | (xy >= (width, height))).any(axis=1)
    if outside.mean() > MOST_OUTSIDE:
        homogeneous = np.column_stack([xenium, np.ones(len(xenium))])
        other_way = n_outside((homogeneous @ matrix.T)[:, :2], width, height)
        hint = "" if other_way > MOST_OUTSIDE * len(xy) else "; the inverse of the matrix would put them inside"
        raise InputError(
            f"{where}: {int(outside.sum())} of {len(xy)} spots lie beside the image {slide.path} ({width} x {height} "
            f"px) by {file}; are they of one section?{hint}"
        )
    if outside.any():
        log.warning("%s: %d of %d spots lie beside the image and are left out", where, int(outside.sum()), len(xy))
    counts.obsm["spatial"] = xy
    return counts[~outside].copy() if outside.any() else counts
