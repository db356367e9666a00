"""HER2+ breast tumours of Andersson et al. 2021, as github.com/almaan/her2st lays them out."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stexp.data.readers import formats as tables
from stexp.data.section import Section, join
from stexp.data.slides.slide import Slide
from stexp.errors import InputError

PITCH_UM = 200.0
"""Distance between neighbouring spots of the legacy Spatial Transcriptomics array, centre to centre."""

IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}


def read(root: str | Path, sections: list[str] | None = None) -> list[Section]:
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
    root = _data_folder(Path(root))
    counts = {path.name.split(".")[0]: path for path in _files(root / "ST-cnts") if ".tsv" in path.suffixes}
    if not counts:
        raise InputError(f"no counts in {root / 'ST-cnts'}: need <section>.tsv.gz or <section>.tsv")
    unknown = sorted(set(sections or ()) - set(counts))
    if unknown:
        raise InputError(f"no section {', '.join(unknown)} in {root}; there are {', '.join(sorted(counts))}")
    return [_read_section(root, name, counts[name]) for name in sorted(counts if sections is None else set(sections))]


def _data_folder(root: Path) -> Path:
    for folder in (root, root / "data"):
        if (folder / "ST-cnts").is_dir() and (folder / "ST-spotfiles").is_dir():
            return folder
    raise InputError(
        f"{root} is not HER2+: need the folders ST-cnts and ST-spotfiles in it; name the folder that has them with "
        f"data.root=, or set STEXP_DATA to the folder that holds her2st"
    )


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _read_section(root: Path, name: str, table: Path) -> Section:
    selection = root / "ST-spotfiles" / f"{name}_selection.tsv"
    labels = root / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv"
    image = _find_image(root / "ST-imgs", name)

    positions = _read_columns(selection, ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y"])
    positions.index = tables.spot_ids(positions["x"], positions["y"])
    um_per_px = tables.um_per_px(positions, PITCH_UM, selection)
    positions = positions.rename(columns={"x": "array_x", "y": "array_y"})
    spots = join(tables.read_counts(table), positions, f"section {name}")
    if labels.is_file():
        spots.obs["label"] = _read_labels(labels).reindex(spots.obs_names)
    return Section(
        name=name,
        patient=name[0],
        spots=spots,
        slide=None if image is None else Slide(image),
        um_per_px=um_per_px,
        files=tuple(path for path in (table, selection, image, labels) if path is not None and path.is_file()),
    )


def _find_image(folder: Path, name: str) -> Path | None:
    """The image of a section: the only one in a folder named like it, else a file named like it."""
    for parent in (folder / name[0], folder):
        inside = [path for path in _files(parent / name) if path.suffix.lower() in IMAGES]
        images = inside or [path for path in _files(parent) if path.stem == name and path.suffix.lower() in IMAGES]
        if len(images) > 1:
            found = ", ".join(path.name for path in images)
            raise InputError(f"section {name}: {len(images)} images ({found}) in {images[0].parent}; need one")
        if images:
            return images[0]
    return None


def _read_columns(path: Path, columns: list[str]) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"{path} does not exist; every section with counts needs it")
    try:
        table = pd.read_csv(path, sep="\t")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a tab-separated table: {error}") from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    return table


def _read_labels(path: Path) -> pd.Series:
    """Pathologist's label by spot id.

    ``x`` and ``y`` are the ``new_x`` and ``new_y`` of the spot file and name the spot when rounded; ``Row.names``,
    ``pixel_x`` and ``pixel_y`` belong to a smaller, upside-down picture and join with nothing. Rows without
    coordinates (one in F1, eight in G2) name no spot and are left out.
    """
    table = _read_columns(path, ["x", "y", "label"]).dropna(subset=["x", "y"])
    labels = table["label"].set_axis(tables.spot_ids(table["x"], table["y"]))
    if not labels.index.is_unique:
        raise InputError(f"{path}: {int(labels.index.duplicated().sum())} labels for spots that have one already")
    return labels
