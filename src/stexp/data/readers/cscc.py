"""Cutaneous squamous cell carcinoma of Ji et al. 2020 (GSE144240), as GEO names its files."""

from __future__ import annotations

import gzip
import logging
import os
import re
import shutil
import zlib
from pathlib import Path

import pandas as pd

from stexp.data.gene_names import harmonise
from stexp.data.join import join
from stexp.data.kept_sections import read_each
from stexp.data.readers.formats import read_all_positions, read_counts, um_per_px
from stexp.data.readers.paths import choose_sections, user_path
from stexp.data.section import Section
from stexp.data.slides.slide import Slide
from stexp.errors import InputError
from stexp.files import replacing

log = logging.getLogger(__name__)

STEP_UM = 100.0
"""Distance between neighbouring coordinates of the array with 1,934 spots.

Two square lattices of 200 um pitch, the second between the spots of the first: x + y is even, nearest spots are 141 um
apart. So says the laboratory's own software (STUtility, R/image_processing.R, platform "2k")."""

SECTION = r"(?:.*_)?(P(\d+)_ST_rep(\d+))_stdata\.tsv(?:\.gz)?"


def read_cscc(
    root: str | Path,
    sections: list[str] | None = None,
    gene_table: str | Path | None = None,
    cache_dir: str | Path = "cache",
) -> list[Section]:
    """Sections in the order of the paper: P2_ST_rep1, P2_ST_rep2, ..., P10_ST_rep3.

    Parameters
    ----------
    root
        Folder that holds, in it or below, per section ``*_P2_ST_rep1_stdata.tsv``,
        ``*_spot_data-selection-P2_ST_rep1.tsv`` and, where there is one, ``*_P2_ST_rep1.jpg``; each also as ``.gz``.
        What stands before the first underscore is GEO's number.
    sections
        Names to read, such as ``["P2_ST_rep1"]``; default all. Nothing is opened for the others.
    gene_table
        See `stexp.data.gene_names.harmonise`.
    cache_dir
        A ``.jpg.gz`` is unpacked once, into ``images`` in it.

    Returns
    -------
    list of Section
        Patient is what stands before the first underscore of the name. Counts cover the whole array; spots are those
        of the selection file (inner join). `slide` is None where there is no image. `um_per_px` follows from the
        array (`STEP_UM`), and is None, with a warning, where the spots are not on it.

    Raises
    ------
    InputError
        Folder, section or file that is not there, that is there twice, or that does not hold what it should.
    """
    root = user_path(root)
    root = root.parent if root.is_file() else root
    files = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")) if root.is_dir() else []
    tables = [match for path in files if (match := re.fullmatch(SECTION, path.name))]
    tables.sort(key=lambda match: (int(match[2]), int(match[3])))
    names = list(dict.fromkeys(match[1] for match in tables))
    if not names:
        raise InputError(f"{root} has no <GEO number>_P<patient>_ST_rep<n>_stdata.tsv or .tsv.gz (data.root=)")
    wanted = choose_sections(names, sections, root)
    images = user_path(cache_dir)
    return read_each(
        wanted, len(wanted), "reading sections", lambda name: _read_section(root, files, name, gene_table, images)
    )


def _read_section(root: Path, files: list[Path], name: str, gene_table: str | Path | None, cache_dir: Path) -> Section:
    where = f"section {name}"
    table = _one(files, f"{name}_stdata.tsv")
    selection = _one(files, f"spot_data-selection-{name}.tsv")
    image = _one(files, f"{name}.jpg")
    assert table is not None  # it gave the section its name
    if selection is None:
        raise InputError(f"{where}: {root} has no spot_data-selection-{name}.tsv or .tsv.gz")
    positions = read_all_positions(selection)
    counts = read_counts(table, positions.index)
    on_tissue = counts.obs_names.isin(positions.index)
    spots = harmonise(join(counts[on_tissue], positions, where), gene_table, where)
    return Section(
        name=name,
        patient=name.split("_")[0],
        spots=spots,
        slide=None if image is None else Slide(_unpacked(image, cache_dir)),
        um_per_px=_scale(positions, selection),
        files=tuple(path for path in (table, selection, image) if path is not None),
    )


def _one(files: list[Path], ending: str) -> Path | None:
    """The file of this name, after a GEO number or alone; as it is rather than packed."""
    matching = [path for path in files if re.fullmatch(rf"(.*_)?{re.escape(ending)}(\.gz)?", path.name)]
    plain = [path for path in matching if path.suffix != ".gz"] or matching
    if len(plain) > 1:
        raise InputError(f"{len(plain)} files are called {ending}: {', '.join(map(str, plain))}; keep one")
    return plain[0] if plain else None


def _scale(positions: pd.DataFrame, path: Path) -> float | None:
    parity = (positions["array_x"] + positions["array_y"]) % 2
    if parity.nunique() > 1 or not {"new_x", "new_y"} <= set(positions):
        log.warning(
            "%s: spots are not on the array with 1,934 spots (x + y even); the scale is unknown (data.um_per_px=)",
            path.name,
        )
        return None
    return um_per_px(positions, STEP_UM, path)


def _unpacked(image: Path, cache_dir: Path) -> Path:
    """The image itself, unpacked into the cache unless it is there: named by its checksum, whole or not at all."""
    if image.suffix != ".gz":
        return image
    with image.open("rb") as file:
        file.seek(-min(8, image.stat().st_size), os.SEEK_END)
        trailer = file.read()  # of gzip: checksum and size of what is packed
    target = cache_dir / "images" / f"{image.name.removesuffix('.jpg.gz')}-{trailer.hex()}.jpg"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target) as part, gzip.open(image) as packed, part.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"image {image} cannot be unpacked ({error}); fetch the file again") from None
    return target
