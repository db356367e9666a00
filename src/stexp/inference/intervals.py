"""How far a prediction is off: intervals that held-out spots calibrate, and how often they held where that is new."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stexp.arguments import Between, check
from stexp.data.splits import spatial_blocks

log = logging.getLogger(__name__)

COLUMNS = ("interval_quantile", "interval_offset", "coverage_measured")
PATIENTS = 3  # held out, from which on coverage is measured between them, and a gene is said to beat its floor
AT_ONCE = 2048  # genes


HeldOut = Callable[[list[str]], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Observed, predicted and spread, each (n, genes), of n held-out spots: NaN where a gene was not measured, and in the
spread of a method that has none."""


@dataclass(frozen=True)
class Groups:
    """Held-out spots that are new to each other.

    Parameters
    ----------
    labels : (n,) str
        The group of each spot.
    kind
        ``patients``, ``sections`` or ``halves``.
    note
        What coverage that is measured between them is worth.
    """

    labels: np.ndarray
    kind: str
    note: str


def calibrate(
    held_out: HeldOut, genes: list[str], panel: list[str], groups: Groups, alpha: float, with_spread: bool
) -> tuple[pd.DataFrame, dict]:
    """Split-conformal intervals from held-out spots.

    Parameters
    ----------
    held_out
        Of all folds of a method.
    genes
        Which get an interval.
    panel
        Those of them that the coverage as a whole is measured on.
    groups
        Of the held-out spots, see `group_spots`.
    alpha
        Share of spots that may lie outside, 0..1.
    with_spread
        Whether the method says how much it is in doubt.

    Returns
    -------
    DataFrame
        Index `genes`. ``interval_quantile`` q and ``interval_offset`` s0: the interval of a spot is its prediction
        plus and minus q (spread + s0). ``coverage_measured``: share of held-out spots inside, see Notes. NaN where
        too few spots calibrate, or none.
    dict
        Plain values: ``alpha``; ``spread``, whether the method has one; ``groups``, their kind; ``n_spots``;
        ``coverage`` of the panel, mean over genes and groups, and ``coverage_by_group``; ``note`` on what the
        coverage is worth.

    Notes
    -----
    Nonconformity |observed - predicted| / (spread + s0), with s0 the mean spread of the gene over the calibrating
    spots (locally weighted split conformal prediction, Lei et al. 2018, doi 10.1080/01621459.2017.1307116), so that
    an interval is never less than half as wide as on average; the plain residual for methods without spread. q is
    the ceil((n + 1)(1 - alpha))-th smallest of n. That guarantees 1 - alpha for spots that are exchangeable with the
    held-out ones, which spots of another slide are not: hence coverage is measured, in each group of held-out spots
    with s0 and q from the other groups, and averaged over groups. Groups are patients where there are three, else
    sections, else the two halves of the one section.
    """
    check("alpha", alpha, Between)
    parts, by_group, in_panel = [], [], set(panel)
    for start in range(0, len(genes), AT_ONCE):
        part = genes[start : start + AT_ONCE]
        if start:
            log.info("intervals: %d of %d genes", start, len(genes))
        observed, predicted, spread = held_out(part)
        residual = np.abs(observed - predicted)
        spread = np.where(np.isfinite(residual), spread if with_spread else 0.0, np.nan)
        quantile, offset = fit(residual, spread, alpha)
        coverage = measure_coverage(residual, spread, groups.labels, alpha)
        table = pd.DataFrame({"interval_quantile": quantile, "interval_offset": offset}, index=part)
        table["coverage_measured"] = _mean(coverage)
        parts.append(table)
        by_group.append(coverage[:, [gene in in_panel for gene in part]])
    per_group = _mean(np.concatenate(by_group, axis=1).T)
    names = [str(name) for name in np.unique(groups.labels)]
    facts = {
        "alpha": float(alpha),
        "spread": with_spread,
        "groups": groups.kind,
        "n_spots": len(groups.labels),
        "coverage": _plain(np.nanmean(per_group) if np.isfinite(per_group).any() else np.nan),
        "coverage_by_group": dict(zip(names, map(_plain, per_group), strict=True)),
        "note": groups.note,
    }
    return pd.concat(parts), facts


def fit(residual: np.ndarray, spread: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """q and s0 of every gene, (G,), from absolute residuals and spreads (n, G); see `calibrate`.

    NaN are spots in which a gene was not measured. q is NaN where fewer than 1 / alpha - 1 spots are left.
    """
    offset = _mean(spread)
    offset = np.where(offset > 0, offset, np.where(np.isnan(offset), np.nan, 1.0))  # no spread at all: the residual
    scores = np.sort(residual / (spread + offset), axis=0)  # NaN last
    n = np.isfinite(scores).sum(axis=0)
    # what is a whole number on paper may lie a little above it
    rank = np.ceil((n + 1) * (1 - alpha) - 1e-9).astype(int)
    quantile = np.full(scores.shape[1], np.nan)
    enough = (rank <= n) & (n > 0)
    columns = np.flatnonzero(enough)
    quantile[columns] = scores[np.maximum(rank[columns], 1) - 1, columns]
    return quantile, offset


def measure_coverage(residual: np.ndarray, spread: np.ndarray, groups: np.ndarray, alpha: float) -> np.ndarray:
    """Share of the spots of each group inside the interval that the others calibrate, (groups in order, G)."""
    names = np.unique(groups)
    out = np.full((len(names), residual.shape[1]), np.nan)
    for i, name in enumerate(names):
        of_group = groups == name
        quantile, offset = fit(residual[~of_group], spread[~of_group], alpha)
        measured = np.isfinite(residual[of_group]) & np.isfinite(quantile)
        inside = measured & (residual[of_group] <= quantile * (spread[of_group] + offset))
        with np.errstate(invalid="ignore"):
            out[i] = inside.sum(axis=0) / measured.sum(axis=0)  # 0 / 0 is NaN
    return out


def interval(
    predicted: np.ndarray, spread: np.ndarray, genes: pd.DataFrame, with_spread: bool, lowest: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end for predictions (N, G), float32; NaN for genes without calibration.

    Parameters
    ----------
    genes
        G rows with `COLUMNS`.
    with_spread
        Whether the calibration knows the spread.
    lowest
        That the truth can be: 0, or minus infinity for residuals. An interval is cut there, which costs no coverage.
    """
    quantile, offset = (genes[name].to_numpy(np.float32) for name in COLUMNS[:2])
    half = quantile * (spread + offset) if with_spread else np.broadcast_to(quantile * offset, predicted.shape)
    ends = predicted - half, predicted + half
    return np.maximum(ends[0], lowest, dtype=np.float32), np.maximum(ends[1], lowest, dtype=np.float32)


def group_spots(patient: np.ndarray, section: np.ndarray, xy_px: np.ndarray, hold_out: str) -> Groups:
    """Patients where there are `PATIENTS`, else sections, else the two halves of the one section.

    Parameters
    ----------
    patient, section : (n,) str
        Of the held-out spots; a section that several folds hold out a block of has a name for each.
    xy_px : (n, 2)
        Used where all are of one section.
    hold_out
        What a fold held out, see :class:`stexp.protocol.Protocol`.
    """
    seen = "" if hold_out in ("patient", "cohort") else ", whose other spots or sections were trained on"
    n = len(np.unique(patient))
    if n >= PATIENTS:
        note = f"measured between {n} patients{seen}" + ("; optimistic for a new one" if seen else "")
        return Groups(patient, "patients", note)
    if len(np.unique(section)) > 1:
        of = "one patient" if n == 1 else f"{n} patients"
        note = f"measured between held-out sections of {of}{seen}; a new patient may be covered less"
        return Groups(section, "sections", note)
    half = spatial_blocks(xy_px, 2)
    labels = np.char.add(section, np.where(half == half.min(), " (one half)", " (other half)"))
    return Groups(labels, "halves", "measured between the halves of one section: optimistic for any other")


def _mean(values: np.ndarray) -> np.ndarray:
    """Over rows, NaN left out; NaN where nothing is left."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0, dtype=np.float64) / known.sum(axis=0)


def _plain(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
