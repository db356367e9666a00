"""Predictions laid out as the test spots and the panel of a fold; what is left over on either side."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from stexp.data.join import split_ids
from stexp.errors import InputError, did_you_mean, listed

log = logging.getLogger(__name__)

EXAMPLES = 5


@dataclass(frozen=True)
class Aligned:
    """Predictions of the test spots of a fold.

    Attributes
    ----------
    predicted : (Q, G) float32
        Of all test spots and the panel; NaN throughout for spots and genes that are not predicted, finite elsewhere.
    every_gene : (Q, H) float32
        The same of all genes that were predicted, in the panel or not; NaN for other spots.
    genes : list of str
        The H genes.
    left_over : dict
        What has no counterpart, plain values: counts and examples by kind.
    """

    predicted: np.ndarray
    every_gene: np.ndarray
    genes: list[str]
    left_over: dict[str, Any] = field(default_factory=dict)

    @property
    def spots(self) -> np.ndarray:
        """Which test spots are predicted, (Q,)."""
        return ~np.isnan(self.predicted).all(axis=1)

    @property
    def panel(self) -> np.ndarray:
        """Which genes of the panel are predicted, (G,)."""
        return ~np.isnan(self.predicted).all(axis=0)


def align(
    predicted: ad.AnnData, spots: pd.DataFrame, panel: Sequence[str], unit_of: Mapping[str, str], fold: str
) -> Aligned:
    """Join predictions with the test spots on section and spot, and with the panel on the gene.

    Parameters
    ----------
    predicted : AnnData, spots x genes
        ``obs`` section and spot; genes called as in the data set.
    spots
        Every spot of the fold, as :func:`~stexp.data.splits.spot_table` makes it.
    unit_of
        Section of the data set -> the name of the fold that tests it.
    fold
        For messages.

    Returns
    -------
    Aligned
        What is left over is logged, too.

    Raises
    ------
    InputError
        A spot twice; a section whose spots have nothing in common with the data; no test spot or no panel gene
        predicted; or values that are infinite, or NaN beside others of their spot and gene.
    """
    _refuse_twice(predicted.obs)
    test = spots[spots["role"] == "test"]
    rows, left_over = _rows(predicted.obs, spots, test, unit_of, fold)
    columns = predicted.var_names.get_indexer(pd.Index(panel))
    if not (columns >= 0).any():
        raise InputError(
            f"predictions: none of their {predicted.n_vars} genes (like {', '.join(predicted.var_names[:3])}) is in "
            f"the panel of {len(panel)} genes (like {', '.join(panel[:3])}); genes=predicted scores theirs"
        )
    every_gene = np.full((len(test), predicted.n_vars), np.nan, dtype=np.float32)
    every_gene[rows >= 0] = np.asarray(predicted.X, dtype=np.float32)[rows[rows >= 0]]
    infinite = np.isinf(every_gene)  # outside the panel, too: a spot's total may be counted over those genes
    if infinite.any():
        raise InputError(
            f"predictions: {_cells(infinite, test, predicted.var_names)} infinite; finite numbers would fit"
        )
    values = np.full((len(test), len(panel)), np.nan, dtype=np.float32)
    values[:, columns >= 0] = every_gene[:, columns[columns >= 0]]
    values = _whole(values, test, panel)
    genes = [str(gene) for gene in predicted.var_names]
    aligned = Aligned(values, every_gene, genes, left_over)
    if not aligned.spots.any():
        raise InputError("predictions: every value of a test spot and panel gene is NaN; numbers would fit")
    _refuse_single(aligned.spots, test)
    left_over |= _counted("spots_not_predicted", test.index[~aligned.spots])
    left_over |= _counted(
        "genes_not_predicted", [gene for gene, there in zip(panel, aligned.panel, strict=True) if not there]
    )
    left_over |= _counted("genes_not_in_panel", pd.Index(genes).difference(pd.Index(panel), sort=False))
    for kind, text in SENTENCES.items():
        if kind in left_over:
            level = logging.INFO if kind == "genes_not_in_panel" else logging.WARNING
            log.log(
                level,
                "predictions: %s",
                text.format(
                    left_over[kind]["n"], listed(left_over[kind]["examples"], EXAMPLES, of=left_over[kind]["n"])
                ),
            )
    return aligned


SENTENCES = {
    "rows_of_unknown_sections": "{} rows are of sections that the data set does not have, and are left out: {}",
    "rows_not_held_out": "{} rows are of spots that this fold does not test, and are left out: {}",
    "rows_without_spot": "{} rows of tested sections are of no spot of the data, and are left out: {}",
    "spots_not_predicted": "{} test spots are not predicted, and are not scored: {}",
    "genes_not_predicted": "{} genes of the panel are not predicted, and are not scored: {}",
    "genes_not_in_panel": "{} genes are not in the panel, and are not scored: {}",
}
"""What is logged of each kind of `Aligned.left_over`."""


def _rows(
    obs: pd.DataFrame, spots: pd.DataFrame, test: pd.DataFrame, unit_of: Mapping[str, str], fold: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Row of the predictions of each test spot, -1 where there is none, and the rows left over."""
    sections = obs["section"].to_numpy(str)
    tested = list(test["section"].unique())
    in_test, in_data = np.isin(sections, tested), np.isin(sections, list(unit_of))
    if not in_test.any():
        raise InputError(_no_test_section(sections, tested, unit_of, fold))
    rows, used = np.full(len(test), -1), np.zeros(len(obs), dtype=bool)
    untested = spots[spots["role"] != "test"]
    elsewhere = in_data & ~in_test
    for name in tested:
        at, own = np.flatnonzero(test["section"] == name), np.flatnonzero(sections == name)
        if not len(own):
            continue
        match = _match(obs["spot"].to_numpy(str)[own], test["spot"].to_numpy(str)[at], name)
        rows[at] = np.where(match >= 0, own[match], -1)
        used[own[match[match >= 0]]] = True
        of_block = untested.loc[untested["section"] == name, "spot"].to_numpy(str)  # of a section tested in part
        elsewhere[own] = ~used[own] & np.isin(obs["spot"].to_numpy(str)[own], of_block)
    labels = np.char.add(np.char.add(sections, ":"), obs["spot"].to_numpy(str))
    left_over = _counted("rows_of_unknown_sections", labels[~in_data])
    left_over |= _counted("rows_not_held_out", labels[elsewhere])
    return rows, left_over | _counted("rows_without_spot", labels[in_test & ~used & ~elsewhere])


def _match(predicted: np.ndarray, spots: np.ndarray, section: str) -> np.ndarray:
    """Position in `predicted` of each spot of a section, -1 where there is none.

    Ids are compared as they stand; where none is common, the ``-1`` behind barcodes and the like is disregarded.
    """
    match = pd.Index(predicted).get_indexer(pd.Index(spots))
    if (match >= 0).any():
        return match
    (_, theirs), (_, ours) = split_ids(pd.Index(predicted)), split_ids(pd.Index(spots))
    if theirs.is_unique and ours.is_unique:
        match = theirs.get_indexer(ours)
    if not (match >= 0).any():
        raise InputError(
            f"predictions of section {section} have no spot in common with the data: they are called like "
            f"{', '.join(predicted[:3])}, there like {', '.join(spots[:3])}"
        )
    log.warning(
        "predictions of section %s: spots (%s) are joined with those of the data (%s) without what stands before and "
        "after the barcode",
        *(section, predicted[0], spots[0]),
    )
    return match


def _no_test_section(sections: np.ndarray, tested: list[str], unit_of: Mapping[str, str], fold: str) -> str:
    names = list(dict.fromkeys(sections))
    text = f"predictions are of section {listed(names, 8)}; fold={fold} tests {listed(tested, 8)}"
    others = list(dict.fromkeys(unit_of[name] for name in names if name in unit_of))
    if others:
        return f"{text}; fold={others[0]} would fit"
    return f"{text}, and the data set has {listed(list(unit_of), 8)}{did_you_mean(names[0], unit_of)}"


def _refuse_twice(obs: pd.DataFrame) -> None:
    twice = obs.duplicated(["section", "spot"]).to_numpy()
    if twice.any():
        first = obs[twice].iloc[0]
        raise InputError(
            f"predictions: {int(twice.sum())} rows are of a spot that has one already (first: section "
            f"{first['section']}, spot {first['spot']}); one row a spot would fit"
        )


def _refuse_single(predicted: np.ndarray, test: pd.DataFrame) -> None:
    n = test["section"][predicted].value_counts()
    if (n == 1).any():
        raise InputError(f"predictions: 1 spot of section {n.index[n == 1][0]} is predicted; a correlation needs 2")


def _whole(values: np.ndarray, test: pd.DataFrame, panel: Sequence[str]) -> np.ndarray:
    """The values where every spot and gene is predicted wholly or not at all, NaN throughout what is not.

    A gene is predicted where every section that is predicted has it.
    """
    missing = np.isnan(values)
    spots, sections = ~missing.all(axis=1), test["section"].to_numpy(str)
    lacking = np.zeros(len(panel), dtype=bool)
    for name in dict.fromkeys(sections[spots]):
        lacking |= missing[spots & (sections == name)].all(axis=0)
    holes = missing & spots[:, None] & ~lacking
    if holes.any():
        raise InputError(
            f"predictions: {_cells(holes, test, panel)} NaN while others of the gene are numbers; numbers, or no such "
            f"spot or gene, would fit"
        )
    return np.where(lacking | ~spots[:, None], np.nan, values).astype(np.float32)


def _cells(mask: np.ndarray, test: pd.DataFrame, panel: Sequence[str]) -> str:
    row, column = np.argwhere(mask)[0]
    n = int(mask.sum())
    return (
        f"{n} value{'s' if n != 1 else ''} of {int(mask.any(axis=0).sum())} genes at {int(mask.any(axis=1).sum())} "
        f"spots (first: gene {panel[column]}, spot {test.index[row]}) {'is' if n == 1 else 'are'}"
    )


def _counted(kind: str, names: Iterable[str]) -> dict[str, Any]:
    names = [str(name) for name in names]
    return {kind: {"n": len(names), "examples": names[:EXAMPLES]}} if names else {}
