"""Nine breast cancer sections on Visium: six of Wu et al. 2021 (Zenodo 4739739), three of 10x Genomics."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from stexp.data.kept_sections import read_each
from stexp.data.readers.paths import choose_sections, data_folder
from stexp.data.readers.spaceranger import find_counts
from stexp.data.readers.text import read_table
from stexp.data.readers.visium import read_section
from stexp.data.readers.visium_image import find_image
from stexp.data.section import Section
from stexp.errors import InputError

log = logging.getLogger(__name__)

WU = ("1142243F", "CID4290", "CID4465", "CID44971", "CID4535", "1160920F")

TENX = {
    "block1": "V1_Breast_Cancer_Block_A_Section_1",
    "block2": "V1_Breast_Cancer_Block_A_Section_2",
    "FFPE": "Visium_FFPE_Human_Breast_Cancer",
}
"""The paper's name of each section of 10x, and the data set's."""

PATIENTS = {"block1": "blockA", "block2": "blockA"}
"""Sections 1 and 2 were cut from one block; every other section is the only one of its patient."""


def read_alex10x(
    root: str | Path, sections: list[str] | None = None, gene_table: str | Path | None = None
) -> list[Section]:
    """The sections that are there, in the order of the paper's folds.

    Parameters
    ----------
    root
        Folder of the deposit, ``filtered_count_matrices/<id>_filtered_count_matrix``, ``spatial/<id>_spatial`` and
        ``metadata/<id>_metadata.csv``, and of one folder per section of 10x, called like the data set or like the
        section, which holds the filtered matrix, ``spatial`` and the full-resolution ``<data set>_image.tif``.
    sections
        Of 1142243F, CID4290, CID4465, CID44971, CID4535, 1160920F, block1, block2, FFPE; default all.
    gene_table
        See :func:`~stexp.data.gene_names.harmonise`.

    Returns
    -------
    list of Section
        ``spots.obs["label"]`` is the pathologist's label of the sections of Wu et al., where ``metadata`` has it. The
        deposit has no full-resolution images: ``tissue_hires_image.png`` stands in (a warning says so), unless
        ``spatial/<id>_spatial`` or ``images/<id>.<ending>`` has one.

    Raises
    ------
    InputError
        None of the sections is there, or a file does not hold what it should.
    """
    names = [*WU, *TENX]
    root = data_folder(root, lambda folder: any(_folder(folder, name).is_dir() for name in names), below=("alex10x",))
    wanted = choose_sections(names, sections, "Alex+10x")
    there = [name for name in wanted if _folder(root, name).is_dir()]
    if not there:
        raise InputError(
            f"{root} has none of {', '.join(wanted)}: need filtered_count_matrices/<id>_filtered_count_matrix and "
            f"spatial/<id>_spatial of Zenodo 4739739, or folders such as {TENX['block1']} of 10x (data.root=)"
        )
    if len(there) < len(wanted):
        log.warning("not in %s, left out: %s", root, ", ".join(name for name in wanted if name not in there))

    def read(name: str) -> Section:
        return (_read_wu if name in WU else _read_tenx)(root, name, gene_table)

    return read_each(there, len(there), "reading sections", read)


def _folder(root: Path, name: str) -> Path:
    """Where the counts of a section are."""
    if name in WU:
        return root / "filtered_count_matrices" / f"{name}_filtered_count_matrix"
    return root / TENX[name] if (root / TENX[name]).is_dir() else root / name


def _read_wu(root: Path, name: str, gene_table: str | Path | None) -> Section:
    spatial = root / "spatial" / f"{name}_spatial"
    image = find_image(spatial) or find_image(root / "images", (name,))
    labels = _read_labels(root / "metadata" / f"{name}_metadata.csv")
    return read_section(name, name, _folder(root, name), spatial, image, gene_table, labels)


def _read_labels(file: Path) -> pd.Series | None:
    if not file.is_file():
        return None
    table = read_table(file, "labels", index_col=0, dtype=str)
    if "Classification" not in table:
        raise InputError(f"{file} is no table with a column Classification; it has {', '.join(map(str, table))}")
    labels = table["Classification"]
    return labels[~labels.index.duplicated()]


def _read_tenx(root: Path, name: str, gene_table: str | Path | None) -> Section:
    folder = _folder(root, name)
    image = find_image(folder) or find_image(folder / "spatial") or find_image(root, (name, f"{TENX[name]}_image"))
    return read_section(name, PATIENTS.get(name, name), find_counts(folder), folder / "spatial", image, gene_table)
