"""Predictions made elsewhere on the scale of a fold's truth: by the word of file or user, never by a silent guess."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd

from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.evaluation.foreign.align import Aligned
from stexp.evaluation.foreign.scales import TARGET, Measured, is_target, recognise, to_protocol, why_unmapped
from stexp.protocol import Protocol

log = logging.getLogger(__name__)


def put_on_scale(
    aligned: Aligned, data: SpotDataModule, named: str | None, by_file: Protocol | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Predictions on the scale of the truth where that goes, else as they are, without errors.

    Parameters
    ----------
    named
        The scale by the user's word; None: that of the file, or what they look like.
    by_file
        Protocol under which the file says that it was made.

    Returns
    -------
    (Q, G) float32
        NaN where nothing is predicted.
    dict
        ``named``; ``looks_like``: see :func:`~stexp.evaluation.foreign.scales.recognise`; ``errors``: whether errors
        count; ``statement``: all that in a sentence.
    """
    protocol = data.protocol
    looks_like = _recognised(aligned, data)
    looks = f"they look like {looks_like}" if looks_like else "they look like no scale that is known"
    facts = {"named": named, "looks_like": looks_like}
    own = f"the scale of protocol {protocol.name}"

    def with_errors(values: np.ndarray, statement: str) -> tuple[np.ndarray, dict[str, Any]]:
        return values, {**facts, "errors": True, "statement": f"Scale: {statement}."}

    def without_errors(reason: str) -> tuple[np.ndarray, dict[str, Any]]:
        statement = f"Scale: correlations count, errors do not, since {reason}."
        return aligned.predicted, {**facts, "errors": False, "statement": statement}

    if named is None and by_file is not None:
        if by_file.scale == protocol.scale:
            return with_errors(aligned.predicted, f"{own}, as the file says")
        return without_errors(f"the file says that they are on the scale of protocol {by_file.name}; scale= overrules")
    if named is None:
        if looks_like == TARGET:
            return with_errors(aligned.predicted, f"not named; their magnitude is that of protocol {protocol.name}")
        return without_errors(f"their scale is not named, and {looks}; scale= names it")
    unmapped = _why_unmapped(named, aligned, data)
    if unmapped is not None:
        return without_errors(f"scale={named} cannot be mapped to that of protocol {protocol.name}: {unmapped}")
    same = is_target(named, protocol)
    doubt = "" if looks_like in (named, TARGET if same else named) else f"; {looks}"
    if doubt:
        log.warning("scale=%s, but %s", named, looks)
    if same:
        return with_errors(aligned.predicted, f"{own}, as named{doubt}")
    return with_errors(_mapped(named, aligned, data), f"{own}, mapped from {named}, as named{doubt}")


def _recognised(aligned: Aligned, data: SpotDataModule) -> str | None:
    genes, total_counts = np.flatnonzero(aligned.panel), data.spots["total_counts"].to_numpy()
    sides = [
        Measured(data.target[rows][:, genes], data.counts[rows][:, genes], total_counts[rows])
        for rows in (data.rows("test")[aligned.spots], data.rows("train", "validation"))
    ]
    return recognise(aligned.predicted[np.ix_(aligned.spots, genes)], sides)


def _why_unmapped(named: str, aligned: Aligned, data: SpotDataModule) -> str | None:
    n_outside = len(_measured(data)) - int(_library(aligned, data).sum())
    whole = bool(aligned.spots.all()) and data.protocol.hold_out != "block"
    return why_unmapped(named, data.protocol, int((~aligned.panel).sum()), n_outside, whole)


def _measured(data: SpotDataModule) -> set[str]:
    """Genes that the test sections measure."""
    test = data.names("test")
    return {gene for section in data.sections if section.name in test for gene in section.genes}


def _library(aligned: Aligned, data: SpotDataModule) -> np.ndarray:
    """Which predicted genes are among those that the counts of a spot are counted over, (H,)."""
    measured = _measured(data)
    whole = ~np.isnan(aligned.every_gene[aligned.spots]).any(axis=0)
    return np.array([gene in measured for gene in aligned.genes]) & whole


def _mapped(named: str, aligned: Aligned, data: SpotDataModule) -> np.ndarray:
    """Predictions on the scale of the truth; InputError where a value has no logarithm there."""
    rows, genes = np.flatnonzero(aligned.spots), np.flatnonzero(aligned.panel)
    panel, every = pd.Index(data.panel)[genes], pd.Index(aligned.genes)
    kept = np.flatnonzero(_library(aligned, data) | every.isin(panel))
    test = data.spots.iloc[data.rows("test")]
    mapped = to_protocol(
        named,
        aligned.every_gene[np.ix_(rows, kept)],
        every[kept].get_indexer(panel),
        data.protocol,
        test["section"].to_numpy(str)[rows],
    )
    below = np.isnan(mapped)
    if below.any():
        row, column = np.argwhere(below)[0]
        value = aligned.predicted[rows[row], genes[column]]
        raise InputError(
            f"scale={named}: {int(below.sum())} values are below what it has (first: {value:.4g} of gene "
            f"{panel[column]}, spot {test.index[rows[row]]}), since counts are not negative; clip them to 0, or name "
            f"another scale"
        )
    values = aligned.predicted.copy()
    values[np.ix_(rows, genes)] = mapped.astype(np.float32)
    return values
