"""HER2+ breast tumours of Andersson et al. 2021, as github.com/almaan/her2st lays them out."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stexp.data.join import join
from stexp.data.kept_sections import read_each
from stexp.data.readers.formats import read_all_positions, read_counts, spot_ids, um_per_px
from stexp.data.readers.paths import choose_sections, data_folder
from stexp.data.readers.text import read_table
from stexp.data.section import Section
from stexp.data.slides.formats import SUFFIXES, is_litter, slide_name
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

PITCH_UM = 200.0
"""Distance between neighbouring spots of the legacy Spatial Transcriptomics array, centre to centre."""


def read_her2st(root: str | Path, sections: list[str] | None = None) -> list[Section]:
    """Sections of HER2+, in name order.

    Parameters
    ----------
    root
        Folder that holds ``ST-cnts`` and ``ST-spotfiles``, and ``ST-imgs`` and ``ST-pat/lbl`` where there are any
        (the ``data`` folder of the source repository, or a folder with that folder in it).
    sections
        Names to read, such as ``["B1", "C2"]``; default all. Nothing is opened for the others.

    Returns
    -------
    list of Section
        Patient is the first letter of the name. `slide` is None where ``ST-imgs`` has no image of the section.
        ``spots.obs["label"]`` is the pathologist's label, where the section has a table of them, and missing
        for spots without one.

    Raises
    ------
    InputError
        Folder or section that is not there, or a file that does not hold what it should.
    """
    root = data_folder(root, _is_data, below=("data", "her2st", "her2st/data"))
    if not _is_data(root):
        raise InputError(
            f"{root} is not HER2+: need the folders ST-cnts and ST-spotfiles in it; name the folder that has them with "
            f"data.root=, or set STEXP_DATA to the folder that holds her2st"
        )
    counts = {path.name.split(".")[0]: path for path in _files(root / "ST-cnts") if ".tsv" in path.suffixes}
    if not counts:
        raise InputError(f"no counts in {root / 'ST-cnts'}: need <section>.tsv.gz or <section>.tsv")
    names = choose_sections(sorted(counts), sections, root)
    return read_each(names, len(names), "reading sections", lambda name: _read_section(root, name, counts[name]))


def _is_data(folder: Path) -> bool:
    return (folder / "ST-cnts").is_dir() and (folder / "ST-spotfiles").is_dir()


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not is_litter(path))


def _read_section(root: Path, name: str, table: Path) -> Section:
    selection = root / "ST-spotfiles" / f"{name}_selection.tsv"
    labels = root / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv"
    image = _find_image(root / "ST-imgs", name)

    if not selection.is_file():
        raise InputError(f"{selection} does not exist; every section with counts needs it")
    positions = read_all_positions(selection)
    if not {"new_x", "new_y"} <= set(positions):
        raise InputError(f"spots {selection} lacks new_x and new_y, of which the scale is fitted")
    spots = join(read_counts(table, positions.index), positions, f"section {name}")
    if labels.is_file():
        spots.obs["label"] = _read_labels(labels).reindex(spots.obs_names)
    return Section(
        name=name,
        patient=name[0],
        spots=spots,
        slide=None if image is None else Slide(image),
        um_per_px=um_per_px(positions, PITCH_UM, selection),
        files=tuple(path for path in (table, selection, image, labels) if path is not None and path.is_file()),
    )


def _find_image(folder: Path, name: str) -> Path | None:
    """The image of a section: the only one in a folder named like it, else a file named like it."""
    for parent in (folder / name[0], folder):
        inside = [path for path in _files(parent / name) if path.suffix.lower() in SUFFIXES]
        images = inside or [
            path for path in _files(parent) if slide_name(path) == name and path.suffix.lower() in SUFFIXES
        ]
        if len(images) > 1:
            names = ", ".join(path.name for path in images)
            raise InputError(f"section {name}: {len(images)} images ({names}) in {images[0].parent}; need one")
        if images:
            return images[0]
    return None


def _read_labels(path: Path) -> pd.Series:
    """Pathologist's label by spot id.

    ``x`` and ``y`` are the ``new_x`` and ``new_y`` of the spot file and name the spot when rounded; ``Row.names``,
    ``pixel_x`` and ``pixel_y`` belong to a smaller, upside-down picture and join with nothing. Rows without
    coordinates (one in F1, eight in G2) name no spot and are left out.
    """
    table = read_table(path, "labels")
    missing = [column for column in ("x", "y", "label") if column not in table]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    table = table.dropna(subset=["x", "y"])
    labels = table["label"].set_axis(spot_ids(table["x"], table["y"]))
    if not labels.index.is_unique:
        raise InputError(f"{path}: {int(labels.index.duplicated().sum())} labels for spots that have one already")
    return labels
