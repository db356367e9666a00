"""The scale of predictions that another tool made: recognised, and mapped onto that of a protocol where it is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stexp.errors import InputError, did_you_mean
from stexp.protocol import Protocol

TARGET = "target"
"""The scale of the protocol's own truth."""


@dataclass(frozen=True)
class Scale:
    """log(1 + total x share of a spot's counts over the transcriptome).

    Parameters
    ----------
    total
        Counts of a spot after scaling; None: counts as they are.
    base
        Of the logarithm; None: none is taken.
    """

    total: float | None
    base: float | None

    def linear(self, values: np.ndarray) -> np.ndarray:
        """Scaled counts without the logarithm."""
        return values if self.base is None else np.expm1(values * math.log(self.base))

    def of_counts(self, counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
        """Counts (Q, G) of spots with `total_counts` (Q,) on this scale."""
        total = np.where(total_counts == 0, 1, total_counts)[:, None]
        values = counts if self.total is None else counts * (self.total / total)
        return values if self.base is None else np.log1p(values) / math.log(self.base)


_TOTALS = {"counts": None, "cp10k": 1e4, "cpm": 1e6, "share": 1.0}
_LOGS = {"": None, "ln_1p_": math.e, "log2_1p_": 2.0, "log10_1p_": 10.0}
SCALES = {f"{log}{unit}": Scale(total, base) for unit, total in _TOTALS.items() for log, base in _LOGS.items()}
"""Scales that may be named: counts, cp10k, cpm or share (of the spot), plain or as ln, log2 or log10 of 1 + x."""
UNMAPPED = {
    "zscore": "z-scores have lost the mean and the spread of each gene",
    "other": "a scale of its own is not that of the protocol",
}
"""Scales that may be named and cannot be mapped -> why."""
NAMES = (TARGET, *SCALES, *UNMAPPED)
FITS_WITHIN = 0.35
"""Difference of gene means, as a share of their sum, up to which predictions are on a scale."""
TIE = 0.1
"""Predictions that fit the protocol's scale worse than another by no more are taken to be on it."""


def check_scale(name: str) -> None:
    """InputError unless a scale has this name."""
    if name not in NAMES:
        raise InputError(f"scale={name}: choose {', '.join(NAMES)}{did_you_mean(name, NAMES)}")


@dataclass(frozen=True)
class Measured:
    """What was measured at N spots of G genes.

    Parameters
    ----------
    observed : (N, G)
        On the scale of the protocol's truth.
    counts : (N, G)
        NaN columns were not measured.
    total_counts : (N,)
        Over the transcriptome.
    """

    observed: np.ndarray
    counts: np.ndarray
    total_counts: np.ndarray

    def means(self) -> dict[str, np.ndarray]:
        """Mean of every gene, (G,), on every scale that is known."""
        means = {name: scale.of_counts(self.counts, self.total_counts).mean(axis=0) for name, scale in SCALES.items()}
        return {TARGET: self.observed.mean(axis=0), **means}


def recognise(predicted: np.ndarray, sides: Sequence[Measured]) -> str | None:
    """The scale that predictions look to be on, by their signs, whole numbers, and the means of genes.

    Parameters
    ----------
    predicted : (Q, G)
    sides
        What was measured of the same genes at the test spots, and at training spots, whose depth may be another and be
        that of the predictions.

    Returns
    -------
    str or None
        `TARGET`, a name of `SCALES`, ``zscore``, or None where nothing fits.
    """
    measured = ~np.any([np.isnan(side.counts).any(axis=0) for side in sides], axis=0)
    values = np.asarray(predicted, dtype=np.float64)[:, measured]
    if not values.size or np.ptp(values) == 0:
        return None
    if (values == np.round(values)).all() and values.min() >= 0 and values.max() >= 2:
        return "counts"
    own, off = values.mean(axis=0), dict.fromkeys((TARGET, *SCALES), 1.0)
    for side in sides:
        for name, means in side.means().items():
            mean = means[measured]
            off[name] = min(off[name], float(np.abs(own - mean).sum() / (np.abs(own) + np.abs(mean)).sum()))
    nearest = min(off, key=off.__getitem__)
    if off[TARGET] <= FITS_WITHIN and off[TARGET] <= off[nearest] + TIE:
        return TARGET
    if (values < 0).mean() >= 0.1:
        return "zscore"
    return nearest if off[nearest] <= FITS_WITHIN else None


def is_target(name: str, protocol: Protocol) -> bool:
    """Whether a scale is that of the protocol's truth."""
    if name == TARGET:
        return True
    own = Scale(protocol.target_sum, math.e if protocol.log == "natural" else 10.0)
    return protocol.truth == "spot" and protocol.library == "transcriptome" and SCALES.get(name) == own


def why_unmapped(name: str, protocol: Protocol, n_missing: int, n_outside: int, whole_sections: bool) -> str | None:
    """Why predictions on a scale cannot be put on that of the protocol; None where they can.

    Parameters
    ----------
    n_missing
        Genes of the panel that are not predicted.
    n_outside
        Genes that the test sections measure and that are not predicted.
    whole_sections
        Whether every spot of the test sections is predicted.
    """
    if is_target(name, protocol):
        return None
    if name in UNMAPPED:
        return UNMAPPED[name]
    if protocol.truth == "residuals":
        return f"residuals are deviations from what a spot's depth lets expect, which {name} does not hold"
    if protocol.truth == "gene":
        if SCALES[name].total is not None:
            return f"protocol {protocol.name} scales a gene by its counts over the section, which {name} does not hold"
        return None if whole_sections else "a gene is scaled by its counts over the section, of which spots are missing"
    if protocol.library == "panel":
        return (
            f"a spot is scaled by its counts in the panel, of which {n_missing} genes are missing"
            if n_missing
            else None
        )
    if SCALES[name].total is None and n_outside:
        return (
            f"a spot is scaled by its counts over the transcriptome, of which {n_outside} measured genes are not "
            f"predicted; the measured counts of a test spot are not for a prediction to know"
        )
    return None


def to_protocol(
    name: str,
    every_gene: np.ndarray,
    panel: np.ndarray,
    protocol: Protocol,
    section: np.ndarray,
) -> np.ndarray:
    """Predictions of the panel on the scale of the protocol's truth; see `why_unmapped` for whether that goes.

    Parameters
    ----------
    every_gene : (Q, H)
        Of all genes that were predicted, on the scale `name`; finite.
    panel : (G,)
        Columns of the panel.
    section : (Q,)
        Of each spot.

    Returns
    -------
    (Q, G) float64
        NaN where 1 + x is not above 0, which has no logarithm.
    """
    scale = SCALES[name]
    linear = scale.linear(np.asarray(every_gene, dtype=np.float64))
    genes = linear[:, panel]
    if protocol.truth == "gene":
        total = np.empty_like(genes)
        for one in np.unique(section):
            total[section == one] = genes[section == one].sum(axis=0)
    elif protocol.library == "panel":
        total = genes.sum(axis=1, keepdims=True)
    elif scale.total is None:
        total = linear.sum(axis=1, keepdims=True)
    else:
        total = np.full((len(genes), 1), scale.total)
    scaled = genes * (protocol.target_sum / np.where(total == 0, 1, total))
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.log1p(np.where(scaled > -1, scaled, np.nan))
    return out / math.log(10) if protocol.log == "log10" else out
