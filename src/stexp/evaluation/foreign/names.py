"""Genes of predictions by the names that a data set has for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import anndata as ad
import pandas as pd

from stexp.data.gene_names import ENSEMBL, read_gene_table
from stexp.data.section import Section
from stexp.errors import InputError, UnknownName
from stexp.evaluation.foreign.layout import DataNames


def names_of(sections: Sequence[Section], measured: Sequence[Section] | None = None) -> DataNames:
    """What predictions of some sections are matched with.

    Parameters
    ----------
    sections
        All of the data set.
    measured
        Those whose genes count; None: all.
    """
    measured = sections if measured is None else measured
    genes = dict.fromkeys(str(gene) for section in measured for gene in section.genes)
    ids: dict[str, str] = {}
    for section in measured:
        if "gene_ids" in section.spots.var:
            for name, behind in section.spots.var["gene_ids"].items():
                ids |= dict.fromkeys((gene_id for gene_id in str(behind).split(";") if gene_id), str(name))
    return DataNames([section.name for section in sections], genes.keys(), ids)


def check_sections(key: str, stated: Sequence[str] | None, names: Sequence[str]) -> None:
    """InputError where a statement names a section that the data set does not have."""
    unknown = [name for name in stated or [] if name not in names]
    if unknown:
        no = "is no section" if len(unknown) == 1 else "are no sections"
        raise UnknownName(
            f"{key}: {', '.join(unknown)} {no} of the data set; there are {', '.join(names)}, and [] states none",
            *(unknown, names),
            typed=f"{key}=[{{}}]",
        )


def rename_genes(predicted: ad.AnnData, names: DataNames, table: str | Path | None = None) -> tuple[ad.AnnData, int]:
    """Predictions whose genes are called as in the data set, and how many were called otherwise.

    A name that the data set has stays. Else the table of ids and symbols counts, then the Ensembl id that the name
    is or that ``var["gene_ids"]`` gives, by the ids that the data set has; an Ensembl id loses its version. Neither
    species nor case is guessed.

    Parameters
    ----------
    table
        See :func:`~stexp.data.gene_names.read_gene_table`.

    Raises
    ------
    InputError
        Two genes of the predictions are one in the data set; or none is in it.
    """
    symbols = {} if table is None else read_gene_table(table)
    behind = predicted.var.get("gene_ids", pd.Series("", index=predicted.var_names)).astype(str)
    renamed = [_renamed(str(name), own, names, symbols) for name, own in zip(predicted.var_names, behind, strict=True)]
    index = pd.Index(renamed, dtype=object)
    twice = index[index.duplicated()].unique()
    if len(twice):
        both = " and ".join(str(name) for name in predicted.var_names[index == twice[0]])
        more = f" ({len(twice)} such)" if len(twice) > 1 else ""
        raise InputError(f"predictions: {both} are one gene of the data set, {twice[0]}{more}; each once would fit")
    if not set(renamed) & set(names.genes):
        raise InputError(_nothing_in_common(renamed, names))
    out = predicted.copy()
    out.var = pd.DataFrame(index=index)
    return out, sum(new != str(old) for new, old in zip(renamed, predicted.var_names, strict=True))


def _renamed(name: str, behind: str, names: DataNames, symbols: dict[str, str]) -> str:
    if name in names.genes:
        return name
    own_id = _without_version(name)
    ids = [each for each in (own_id, *map(_without_version, behind.split(";")), name) if each]
    choices = [symbols[each] for each in ids if each in symbols]
    choices += [names.ids[each] for each in ids if each in names.ids]
    choices += [each for each in ids if each in names.genes]
    return next((each for each in choices if each in names.genes), own_id or name)


def _without_version(name: str) -> str | None:
    match = re.match(ENSEMBL, name)
    return match[1] if match else None


def _nothing_in_common(genes: Iterable[str], names: DataNames) -> str:
    genes = list(genes)
    text = (
        f"predictions: none of {len(genes)} genes is in the data set: they are called like "
        f"{', '.join(genes[:3])}, there like {', '.join(list(names.genes)[:3])}"
    )
    folded = {gene.casefold(): gene for gene in names.genes}
    alike = [gene for gene in genes if gene.casefold() in folded]
    if alike:
        both = f"{alike[0]}, {folded[alike[0].casefold()]}"
        text += f"; {len(alike)} agree but for case ({both}): are they of another species?"
    return f"{text}; gene_table=FILE with columns id and symbol maps names"
