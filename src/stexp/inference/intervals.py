"""How far a prediction is off: intervals that held-out spots calibrate, and how often they held where that is new."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from stexp.data.splits import spatial_blocks
from stexp.errors import InputError

if TYPE_CHECKING:
    from stexp.runs.finished import Run

log = logging.getLogger(__name__)

COLUMNS = ("interval_quantile", "interval_offset", "coverage_measured")
PATIENTS = 3  # from which on coverage is measured between patients
AT_ONCE = 2048  # genes


def calibrate(runs: list[Run], genes: list[str], alpha: float = 0.1) -> tuple[pd.DataFrame, dict]:
    """Split-conformal intervals from the held-out spots of finished runs.

    Parameters
    ----------
    runs
        Folds of one method, whose held-out spots together calibrate.
    genes
        Those outside a run's panel are retrieved from its embeddings.
    alpha
        Share of spots that may lie outside, 0..1.

    Returns
    -------
    DataFrame
        Index `genes`. ``interval_quantile`` q and ``interval_offset`` s0: the interval of a spot is its prediction
        plus and minus q (spread + s0). ``coverage_measured``: share of held-out spots inside, see Notes. NaN where
        too few spots calibrate, or none.
    dict
        Plain values: ``alpha``; ``spread``, whether the method has one; ``groups``, their kind; ``n_spots``;
        ``coverage`` of the panel of the first run, mean over genes and groups, and ``coverage_by_group``; ``note``
        on what the coverage is worth.

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
    if not (isinstance(alpha, int | float) and 0 < alpha < 1):
        raise InputError(f"alpha={alpha}: a number between 0 and 1 would fit; 0.1 makes intervals of 90 %")
    spread = all(np.isfinite(run.before.layers["uncertainty"]).all() for run in runs)
    labels, kind, note = _groups(runs)
    parts, by_group = [], []
    panel = set(runs[0].panel)
    for start in range(0, len(genes), AT_ONCE):
        part = genes[start : start + AT_ONCE]
        if start:
            log.info("intervals: %d of %d genes", start, len(genes))
        arrays = [run.held_out(part) for run in runs]
        observed, predicted, deviation = (np.concatenate(each) for each in zip(*arrays, strict=True))
        residual = np.abs(observed - predicted)
        deviation = np.where(np.isfinite(residual), deviation if spread else 0.0, np.nan)
        quantile, offset = fit(residual, deviation, alpha)
        coverage = measure_coverage(residual, deviation, labels, alpha)
        table = pd.DataFrame({"interval_quantile": quantile, "interval_offset": offset}, index=part)
        table["coverage_measured"] = _mean(coverage)
        parts.append(table)
        by_group.append(coverage[:, [gene in panel for gene in part]])
    table = pd.concat(parts)
    per_group = _mean(np.concatenate(by_group, axis=1).T)
    facts = {
        "alpha": float(alpha),
        "spread": spread,
        "groups": kind,
        "n_spots": len(labels),
        "coverage": _plain(np.nanmean(per_group) if np.isfinite(per_group).any() else np.nan),
        "coverage_by_group": {
            str(name): _plain(value) for name, value in zip(np.unique(labels), per_group, strict=True)
        },
        "note": note,
    }
    return table, facts


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
        here = groups == name
        quantile, offset = fit(residual[~here], spread[~here], alpha)
        known = np.isfinite(residual[here]) & np.isfinite(quantile)
        inside = known & (residual[here] <= quantile * (spread[here] + offset))
        with np.errstate(invalid="ignore"):
            out[i] = inside.sum(axis=0) / known.sum(axis=0)  # 0 / 0 is NaN
    return out


def interval(
    predicted: np.ndarray, spread: np.ndarray, genes: pd.DataFrame, with_spread: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end for predictions (N, G), float32; NaN for genes without calibration.

    Parameters
    ----------
    genes
        G rows with `COLUMNS`.
    with_spread
        Whether the calibration knows the spread.

    Notes
    -----
    Expression is never negative, so an interval is cut at 0, which costs no coverage.
    """
    quantile, offset = (genes[name].to_numpy(np.float32) for name in COLUMNS[:2])
    half = quantile * (spread + offset) if with_spread else np.broadcast_to(quantile * offset, predicted.shape)
    return np.maximum(predicted - half, 0, dtype=np.float32), np.maximum(predicted + half, 0, dtype=np.float32)


def _groups(runs: list[Run]) -> tuple[np.ndarray, str, str]:
    """The group of every held-out spot, the kind of the groups, and what coverage between them is worth."""
    patients, sections = [], []
    for run in runs:
        # blocks of a section are held out by several runs
        suffix = f" ({run.before.uns['stexp']['fold']})" if run.protocol.hold_out == "block" else ""
        patients.append(run.before.obs["patient"].to_numpy(str))
        sections.append(np.char.add(run.before.obs["section"].to_numpy(str), suffix))
    patient, section = np.concatenate(patients), np.concatenate(sections)
    seen = "" if runs[0].protocol.hold_out == "patient" else ", whose other spots or sections were trained on"
    n = len(np.unique(patient))
    if n >= PATIENTS:
        return patient, "patients", f"measured between {n} patients{seen}" + ("; optimistic for a new one" * bool(seen))
    if len(np.unique(section)) > 1:
        of = "one patient" if n == 1 else f"{n} patients"
        note = f"measured between held-out sections of {of}{seen}; a new patient may be covered less"
        return section, "sections", note
    half = spatial_blocks(runs[0].before.obsm["spatial"], 2)
    labels = np.char.add(section, np.where(half == half.min(), " (one half)", " (other half)"))
    return labels, "halves", "measured between the halves of one section: optimistic for any other"


def _mean(values: np.ndarray) -> np.ndarray:
    """Over rows, NaN left out; NaN where nothing is left."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0, dtype=np.float64) / known.sum(axis=0)


def _plain(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
