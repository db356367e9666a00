"""HER2+ breast tumours of Andersson et al. 2021, as github.com/almaan/her2st lays them out."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp import InputError
from stexp.data.section import Section, join
from stexp.data.slide import Slide

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
    tables = {path.name.split(".")[0]: path for path in _files(root / "ST-cnts") if ".tsv" in path.suffixes}
    if not tables:
        raise InputError(f"no counts in {root / 'ST-cnts'}: need <section>.tsv.gz or <section>.tsv")
    unknown = sorted(set(sections or ()) - set(tables))
    if unknown:
        raise InputError(f"no section {', '.join(unknown)} in {root}; there are {', '.join(sorted(tables))}")
    return [_read_section(root, name, tables[name]) for name in sorted(tables if sections is None else set(sections))]


def _data_folder(root: Path) -> Path:
    for folder in (root, root / "data"):
        if (folder / "ST-cnts").is_dir() and (folder / "ST-spotfiles").is_dir():
            return folder
    raise InputError(f"{root} is not HER2+: need the folders ST-cnts and ST-spotfiles in it (data.root=)")


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _read_section(root: Path, name: str, table: Path) -> Section:
    selection = root / "ST-spotfiles" / f"{name}_selection.tsv"
    labels = root / "ST-pat" / "lbl" / f"{name}_labeled_coordinates.tsv"
    image = _find_image(root / "ST-imgs", name)

    positions = _read_columns(selection, ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y"])
    positions.index = _spot_ids(positions["x"], positions["y"])
    um_per_px = _um_per_px(positions, selection)
    positions = positions.rename(columns={"x": "array_x", "y": "array_y"})
    spots = join(read_counts(table), positions, f"section {name}")
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


def _spot_ids(x: pd.Series, y: pd.Series) -> pd.Index:
    """``"{x}x{y}"``, the names of the rows of counts; "nan" stands where a coordinate is missing."""
    whole = [pd.to_numeric(values, errors="coerce").round().map("{:.0f}".format) for values in (x, y)]
    return pd.Index(whole[0] + "x" + whole[1])


def _um_per_px(positions: pd.DataFrame, path: Path) -> float | None:
    """Micrometres per pixel: the array's pitch over the fitted one.

    The fit is to the corrected coordinates, because spots were printed slightly off their places. The pitch is the
    mean over x and y, which differ by up to 1.1 %. None where the spots lie in one row or column.
    """
    pitch = []
    for corrected, pixel in (("new_x", "pixel_x"), ("new_y", "pixel_y")):
        table = positions[[corrected, pixel]].apply(pd.to_numeric, errors="coerce").dropna()
        if table[corrected].nunique() < 2:
            return None
        pitch.append(np.polyfit(table[corrected], table[pixel], 1)[0])
    if min(pitch) <= 0:
        raise InputError(f"{path}: pixel positions fall where array coordinates rise; was the image turned?")
    return PITCH_UM / float(np.mean(pitch))


def _read_labels(path: Path) -> pd.Series:
    """Pathologist's label by spot id.

    ``x`` and ``y`` are the ``new_x`` and ``new_y`` of the spot file and name the spot when rounded; ``Row.names``,
    ``pixel_x`` and ``pixel_y`` belong to a smaller, upside-down picture and join with nothing. Rows without
    coordinates (one in F1, eight in G2) name no spot and are left out.
    """
    table = _read_columns(path, ["x", "y", "label"]).dropna(subset=["x", "y"])
    labels = table["label"].set_axis(_spot_ids(table["x"], table["y"]))
    if not labels.index.is_unique:
        raise InputError(f"{path}: {int(labels.index.duplicated().sum())} labels for spots that have one already")
    return labels


def read_counts(path: str | Path) -> ad.AnnData:
    """Dense tab-separated counts (header: an empty cell, then genes; rows: spot id, then counts).

    Parameters
    ----------
    path
        Plain or gzip text.

    Returns
    -------
    AnnData, n_spots x n_genes
        ``X`` CSR float32.

    Raises
    ------
    InputError
        Truncated file, rows of different length, or cells that are not numbers. Numbers that are not counts are
        left for `Section` to refuse.

    Notes
    -----
    A section has up to ten million cells, most of them "0". Array operations on the text read all 36 in six seconds,
    pandas takes seven times as long; whatever is not digits and tabs goes to pandas, whose messages say where.
    """
    path = Path(path)
    try:
        text = path.read_bytes()
        text = gzip.decompress(text) if text[:2] == b"\x1f\x8b" else text
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"counts {path} cannot be read ({error}); fetch the file again") from None
    header, _, body = text.partition(b"\n")
    try:
        genes = header.decode().rstrip("\r").split("\t")[1:]
    except UnicodeDecodeError:
        raise InputError(f"counts {path} are not text; need tab-separated counts, plain or gzip") from None
    if not genes or not body.strip():
        raise InputError(f"counts {path} are empty; need a header of genes and one row per spot")
    ids, counts = _parse_digits(body, len(genes)) or _parse_slowly(body, len(genes), path)
    return ad.AnnData(counts, obs=pd.DataFrame(index=ids), var=pd.DataFrame(index=genes))


def _parse_digits(body: bytes, n_genes: int) -> tuple[list[str], sp.csr_matrix] | None:
    """Spot ids and counts, or None where the text is anything but rows of an id and `n_genes` whole numbers."""
    if not body.endswith(b"\n"):
        body += b"\n"
    text = np.frombuffer(body, dtype=np.uint8)
    ends = np.flatnonzero((text == 9) | (text == 10))  # tab, newline: where each cell ends
    if ends.size % (n_genes + 1):
        return None
    ends = ends.reshape(-1, n_genes + 1)
    n_rows = len(ends)
    # every row ends in the only newline of its row
    if np.count_nonzero(text == 10) != n_rows or not (text[ends[:, -1]] == 10).all():
        return None
    starts = np.concatenate([[0], ends[:-1, -1] + 1])
    ids = [body[start:end] for start, end in zip(starts, ends[:, 0], strict=True)]
    digit = text - np.uint8(ord("0"))  # wraps round, so that only digits come out as 0..9
    names = b"".join(ids)
    not_digits = ends.size + sum(not 48 <= byte <= 57 for byte in names)
    lengths = np.diff(ends, axis=1) - 1
    if np.count_nonzero(digit > 9) != not_digits or not names.isascii():
        return None
    if lengths.min() < 1 or lengths.max() > 7:  # up to seven digits float32 is exact
        return None
    cells = np.flatnonzero((digit[ends[:, 1:] - 1] != 0) | (lengths > 1))
    last, length = ends[:, 1:].ravel()[cells] - 1, lengths.ravel()[cells]
    values = digit[last].astype(np.float32)
    for place in range(1, int(length.max(initial=1))):
        longer = np.flatnonzero(length > place)
        values[longer] += np.float32(10**place) * digit[last[longer] - place]
    row, column = np.divmod(cells, n_genes)
    indptr = np.searchsorted(row, np.arange(n_rows + 1))
    counts = sp.csr_matrix((values, column.astype(np.int32), indptr.astype(np.int32)), shape=(n_rows, n_genes))
    counts.eliminate_zeros()  # "00"
    return [spot.decode() for spot in ids], counts


def _parse_slowly(body: bytes, n_genes: int, path: Path) -> tuple[list[str], sp.csr_matrix]:
    try:
        table = pd.read_csv(io.BytesIO(body), sep="\t", header=None, index_col=0, dtype={0: str})
        if table.shape[1] != n_genes:
            raise InputError(f"counts {path}: {n_genes} genes in the header, {table.shape[1]} counts in a row")
        counts = table.to_numpy(np.float32)
    except (ValueError, pd.errors.ParserError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"counts {path} are not a table of numbers: {error}") from None
    return list(table.index.astype(str)), sp.csr_matrix(counts)
