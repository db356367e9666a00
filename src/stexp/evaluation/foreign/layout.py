"""Spots x genes of predictions, with the section and spot of every row, whatever they came from."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.data.readers.memory import check_fits
from stexp.errors import InputError

log = logging.getLogger(__name__)

SECTION = "section"
SPOT = ("spot", "spot_id", "barcode")
"""What the column of the section is called, and that of the spot, in any case."""
FITS = (
    "an h5ad (spots x genes, obs with section and spot, or rows named section:spot), or a csv, tsv or parquet table, "
    "wide (section, spot, a column a gene) or long (section, spot, gene, value)"
)


@dataclass(frozen=True)
class DataNames:
    """Names of a data set that predictions are matched with.

    Parameters
    ----------
    sections
        All of its sections.
    genes
        Genes that they measure.
    ids
        Gene id without version -> the name of that gene in the data set.
    """

    sections: Collection[str]
    genes: Collection[str]
    ids: dict[str, str]

    def has_gene(self, name: str) -> bool:
        """Whether a name, or an id with or without version, is that of a gene."""
        return name in self.genes or name.partition(".")[0] in self.ids


def lay_out(values: np.ndarray, obs: pd.DataFrame, var: pd.DataFrame, where: str) -> ad.AnnData:
    """Predictions as AnnData with rows by number; InputError where a gene occurs twice.

    Parameters
    ----------
    values : (n_spots, n_genes) float32
    obs
        Section and spot, see `locate`.
    var
        Index: the names of the genes.
    """
    twice = var.index[var.index.duplicated()].unique()
    if len(twice):
        raise InputError(f"{where}: {len(twice)} genes occur twice ({', '.join(map(str, twice[:3]))}); once would fit")
    obs = obs.set_axis(pd.RangeIndex(len(obs)).astype(str), axis=0)
    return ad.AnnData(values, obs=obs, var=var.set_axis(var.index.astype(str), axis=0))


def locate(
    obs: pd.DataFrame, rows: Iterable[Any], where: str, sections: Collection[str], stem: str | None = None
) -> pd.DataFrame:
    """Section and spot of every row: from columns, from rows named ``section:spot``, or from a file's name.

    Parameters
    ----------
    obs
        What is said of the rows.
    rows
        Their names.
    where
        What they are of, for messages.
    stem
        Name of the file, which may hold that of a section.
    """
    columns = {str(column).lower(): column for column in obs.columns[::-1]}
    index = [str(name) for name in rows]
    spot_column = next((columns[name] for name in SPOT if name in columns), None)
    spots = None if spot_column is None else texts(obs[spot_column], where)
    if SECTION in columns:
        section = texts(obs[columns[SECTION]], where)
        if spots is None:
            spots = [name.removeprefix(f"{own}:") for own, name in zip(section, index, strict=True)]
    elif (named := index if spots is None else spots) and all(":" in name for name in named):
        section, spots = ([name.partition(":")[i] for name in named] for i in (0, 2))
    else:
        section = [_section_of_file(stem, where, sections)] * len(index)
        spots = index if spots is None else spots
    return pd.DataFrame({"section": section, "spot": spots}, dtype=object)


def dense(values: Any, where: str) -> np.ndarray:
    """A matrix of numbers as dense float32; InputError for anything else."""
    shape, kind = getattr(values, "shape", ()), getattr(values, "dtype", None)
    if len(shape) != 2 or not (kind is not None and (np.issubdtype(kind, np.number) or kind == np.bool_)):
        raise InputError(f"{where} holds no matrix of numbers ({kind or 'nothing'}); spots x genes would fit")
    check_fits(4 * int(np.prod(shape)), where)
    return np.asarray(values.toarray() if sp.issparse(values) else values, dtype=np.float32)


def refuse_transposed(rows: Iterable[Any], columns: Iterable[Any], names: DataNames, where: str) -> None:
    """InputError where the rows are genes and the columns are not."""
    rows, columns = [str(name) for name in rows], [str(name) for name in columns]
    in_rows, in_columns = (sum(names.has_gene(name) for name in side) for side in (rows, columns))
    if in_rows > 0.5 * len(rows) and in_columns < 0.1 * max(1, len(columns)):
        raise InputError(
            f"{where} is genes x spots: its rows are genes ({', '.join(rows[:3])}), its columns are not "
            f"({', '.join(columns[:3])}); transposed, as spots x genes, it would fit"
        )


def texts(column: pd.Series, where: str) -> list[str]:
    """A column as text; InputError where a row has none."""
    missing = column.isna().to_numpy()
    if missing.any():
        raise InputError(
            f"{where}: {int(missing.sum())} rows have no {column.name} (first: row {int(missing.argmax()) + 1})"
        )
    return [str(value) for value in column]


def _section_of_file(stem: str | None, where: str, sections: Collection[str]) -> str:
    """The section that a file is called by, as a whole or between other signs than letters and digits."""
    if stem is not None and stem in sections:
        return stem
    inside = [name for name in sections if stem and re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", stem)]
    if len(inside) == 1:
        log.info("%s: taken for section %s, by the name of the file", where, inside[0])
        return inside[0]
    by_file = ", and the file is not called by one" if stem else ""
    raise InputError(
        f"{where}: nothing says the section of its rows{by_file}; a column section (of the data set: "
        f"{', '.join(list(sections)[:5])}), or rows named section:spot, would fit"
    )
