"""Scores of predicted against observed expression: per gene, per section, then means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stexp.errors import InputError

CORRELATIONS = ("pearson_acg", "pearson_heg50", "pearson_given_depth", "spearman_acg")
FOLLOWS_DEPTH = "follows_depth"
"""Says of a prediction what it shows; neither more nor less is better, see `DEPTH_NOTE`."""
DEPTH_NOTE = "a prediction that follows depth tells of depth; near 0 is best"
ERRORS = ("mse", "mse_gene_mean", "mse_within_gene", "mae", "rmse", "r2", "ccc", "rvd")
SCORES = (*CORRELATIONS, FOLLOWS_DEPTH, *ERRORS)


def pearson_per_gene(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson correlation of every gene over the spots of one section.

    Parameters
    ----------
    observed : (Q, G)
        Columns with NaN are genes that were not measured in these spots.
    predicted : (Q, G)
        Finite wherever the gene was measured.

    Returns
    -------
    (G,) float64
        NaN where the observed gene is constant or not measured: nothing can be scored. 0 where only the
        prediction is constant: that is no skill, and it counts.

    Raises
    ------
    InputError
        Shapes that differ, or predictions missing for measured genes.

    Notes
    -----
    The published code of mclSTExp drops genes with constant predictions as well as those with constant truth,
    so that a method may raise its mean by not predicting.
    """
    observed, predicted, measured = _checked(observed, predicted)
    return _correlation(observed, predicted, measured & ~_constant(observed), _constant(predicted))


def spearman_per_gene(observed: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Spearman correlation of every gene, ties with their average rank; otherwise as `pearson_per_gene`."""
    observed, predicted, measured = _checked(observed, predicted)
    varies, flat = measured & ~_constant(observed), _constant(predicted)
    of_observed, of_predicted = (_ranks(np.where(measured, x, 0)) for x in (observed, predicted))
    return _correlation(of_observed, of_predicted, varies, flat)


def pearson_given_depth(observed: np.ndarray, predicted: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    """Partial correlation of every gene over the spots of one section, given the depth of the spots.

    What is left of the Pearson correlation once both sides are rid of what a straight line on log(1 + total counts)
    explains. Expression of shallow spots rises with their depth under any normalisation, and images show depth (dense
    tissue has more of it), so that a correlation alone does not tell a gene from the number of molecules caught.

    Parameters
    ----------
    observed, predicted : (Q, G)
        As `pearson_per_gene`.
    total_counts : (Q,)
        Of each spot, over the whole transcriptome.

    Returns
    -------
    (G,) float64
        As `pearson_per_gene`; 0 also where depth explains the prediction wholly.
    """
    observed, predicted, measured = _checked(observed, predicted)
    depth = np.log1p(np.asarray(total_counts, dtype=np.float64))
    depth = depth - depth.mean()
    norm = np.linalg.norm(depth)
    depth = depth / norm if norm else depth

    def rest(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What depth leaves, and where that is nothing but rounding of float32."""
        values = np.where(measured, values, 0.0)
        centred = values - values.mean(axis=0)
        left = centred - np.outer(depth, depth @ centred)
        return left, _constant(values) | (np.linalg.norm(left, axis=0) <= 1e-5 * np.linalg.norm(centred, axis=0))

    (ours, nothing), (theirs, flat) = rest(observed), rest(predicted)
    return _correlation(ours, theirs, measured & ~nothing, flat)


def mean_pearson(observed: np.ndarray, predicted: np.ndarray, section: np.ndarray) -> float:
    """Pearson per gene over the spots of a section, mean over genes, mean over the sections in `section` (Q,)."""
    per_section = [
        mean_or_none(pearson_per_gene(observed[section == name], predicted[section == name]))
        for name in np.unique(section)
    ]
    return mean_or_none([np.nan if value is None else value for value in per_section]) or 0.0


def score_section(
    observed: np.ndarray,
    predicted: np.ndarray,
    heg: np.ndarray,
    errors: bool = True,
    total_counts: np.ndarray | None = None,
) -> dict:
    """All scores of one section.

    Parameters
    ----------
    observed, predicted : (Q, G)
        Spots of one section; NaN columns of `observed` are genes not measured there.
    heg : (G,) bool or (n,) int
        The highest expressed genes.
    errors
        False for predictions without a scale, whose errors mean nothing.
    total_counts : (Q,)
        Of each spot, for the score that is rid of them.

    Returns
    -------
    dict
        ``pearson_acg``, ``spearman_acg`` : mean over the genes that vary in `observed`.
        ``pearson_heg50`` : the same over those of `heg`.
        ``pearson_given_depth`` : mean of `pearson_given_depth`, None without `total_counts`.
        ``follows_depth`` : correlation over spots of the mean prediction of all genes with log(1 + total counts); 0
        where that mean is constant, None without `total_counts` or where these are.
        ``mse``, ``mae``, ``rmse`` : over all spots and measured genes.
        ``mse_gene_mean``, ``mse_within_gene`` : the two parts of ``mse``; see `error_parts`.
        ``r2``, ``ccc`` : 1 - residual / total sum of squares and Lin's concordance, mean over genes that vary.
        ``rvd`` : mean over measured genes of ((var_pred - var_obs) / (var_obs + 0.01))^2.
        ``n_constant_genes`` : measured genes without variance in `observed`.
        None stands for what cannot be computed.
    """
    observed, predicted, measured = _checked(observed, predicted)
    pearson = pearson_per_gene(observed, predicted)
    scores: dict = dict.fromkeys(SCORES)
    scores["pearson_acg"] = mean_or_none(pearson)
    scores["pearson_heg50"] = mean_or_none(pearson[heg])
    if total_counts is not None:
        scores["pearson_given_depth"] = mean_or_none(pearson_given_depth(observed, predicted, total_counts))
        if measured.any():
            depth = np.log1p(np.asarray(total_counts, dtype=np.float64))[:, None]
            scores[FOLLOWS_DEPTH] = mean_or_none(
                pearson_per_gene(depth, predicted[:, measured].mean(axis=1, keepdims=True))
            )
    scores["spearman_acg"] = mean_or_none(spearman_per_gene(observed, predicted))
    if errors and measured.any():
        scores |= _errors(observed[:, measured], predicted[:, measured])
    scores["n_constant_genes"] = int((measured & _constant(observed)).sum())
    return scores


def error_parts(observed: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error of every gene in two parts that sum to it.

    Nearly all that a prediction gains in MSE over predicting nothing is to know how high each gene is, for which no
    image is needed (Chen and Hicks 2026); what an image can add is the second part.

    Parameters
    ----------
    observed, predicted : (Q, G)
        Finite; spots of one section.

    Returns
    -------
    gene_mean : (G,)
        Squared difference of the gene's mean predicted and mean observed expression.
    within_gene : (G,)
        Mean squared difference of what is left once each side is rid of its mean.
    """
    difference = np.asarray(predicted, dtype=np.float64) - np.asarray(observed, dtype=np.float64)
    offset = difference.mean(axis=0)
    return offset**2, np.square(difference - offset).mean(axis=0)


def mean_over_sections(scores: Sequence[Mapping]) -> dict:
    """Mean of every score over sections, each section with the same weight.

    Sections are never pooled: differences between them, such as depth, are easy to predict and would pass for skill.
    None where no section has the score; counts (``n_...``) are left out, since a mean of them says nothing.
    """
    if not scores:
        raise InputError("no section to average over")
    return {
        key: mean_or_none([np.nan if each[key] is None else each[key] for each in scores])
        for key in scores[0]
        if not key.startswith("n_")
    }


def top_genes(mean_expression: np.ndarray, n: int = 50) -> np.ndarray:
    """Indices of the `n` genes with the highest mean, (n,), highest first; ties in panel order, NaN last."""
    return np.argsort(-np.asarray(mean_expression, dtype=np.float64), kind="stable")[:n]


def mean_or_none(values: np.ndarray | Sequence[float]) -> float | None:
    """Mean of the values that are not NaN; None if there are none."""
    x = np.asarray(values, dtype=np.float64)
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else None


def _checked(observed: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both as float64, and which genes were measured, (G,)."""
    observed, predicted = np.asarray(observed, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if observed.ndim != 2 or observed.shape != predicted.shape or len(observed) == 0:
        raise InputError(
            f"observed {observed.shape} and predicted {predicted.shape} must both be spots x genes, one spot or more"
        )
    measured = ~np.isnan(observed).any(axis=0)
    missing = int((~np.isfinite(predicted[:, measured])).any(axis=0).sum())
    if missing:
        raise InputError(f"predictions of {missing} of {int(measured.sum())} measured genes are NaN or infinite")
    return observed, predicted, measured


def _constant(values: np.ndarray) -> np.ndarray:
    """Genes without variance, (G,) bool.

    float32 means over neighbours differ in the last digits where the exact ones are equal; a correlation of such
    rounding errors would be noise. Hence the tolerance, some ten times the spacing of float32.
    """
    largest, smallest = values.max(axis=0), values.min(axis=0)
    return largest - smallest <= 1e-6 * np.maximum(np.abs(largest), np.abs(smallest))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank of every spot (Q, G) among those of a gene, from 1; equal ones share the mean of their ranks.

    As :func:`scipy.stats.rankdata` has them, in a fifth of its time: that sorts so that equal values keep their order,
    which takes long and changes nothing here.
    """
    n, rows = len(values), np.ascontiguousarray(values.T)
    order = np.argsort(rows, axis=1)
    ordered = np.take_along_axis(rows, order, axis=1)
    is_first = np.ones(rows.shape, dtype=bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(is_first)
    mean_rank = starts % n + (np.diff(starts, append=rows.size) + 1) / 2
    ranks = np.empty(rows.shape)
    np.put_along_axis(ranks, order, mean_rank[np.cumsum(is_first) - 1].reshape(rows.shape), axis=1)
    return ranks.T


def _correlation(a: np.ndarray, b: np.ndarray, varies: np.ndarray, flat: np.ndarray) -> np.ndarray:
    out = np.full(a.shape[1], np.nan)
    out[varies & flat] = 0.0
    genes = varies & ~flat
    a, b = a[:, genes] - a[:, genes].mean(axis=0), b[:, genes] - b[:, genes].mean(axis=0)
    a, b = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=0)
    out[genes] = np.clip((a * b).sum(axis=0), -1.0, 1.0)
    return out


def _errors(observed: np.ndarray, predicted: np.ndarray) -> dict:
    difference = predicted - observed
    mse_gene = (difference**2).mean(axis=0)
    var_obs, var_pred = observed.var(axis=0), predicted.var(axis=0)
    covariance = ((observed - observed.mean(axis=0)) * (predicted - predicted.mean(axis=0))).mean(axis=0)
    varies = ~_constant(observed)
    ccc = 2 * covariance[varies] / (var_obs + var_pred + difference.mean(axis=0) ** 2)[varies]
    mse = float(mse_gene.mean())
    gene_mean, within_gene = error_parts(observed, predicted)
    return {
        "mse": mse,
        "mse_gene_mean": float(gene_mean.mean()),
        "mse_within_gene": float(within_gene.mean()),
        "mae": float(np.abs(difference).mean()),
        "rmse": mse**0.5,
        "r2": mean_or_none(1 - mse_gene[varies] / var_obs[varies]),
        "ccc": mean_or_none(ccc),
        "rvd": float((((var_pred - var_obs) / (var_obs + 0.01)) ** 2).mean()),
    }
