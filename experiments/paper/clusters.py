"""Clusters of spots against a pathologist's labels, as in Figure S3 of the paper; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from stexp.data.genes import normalise
from stexp.data.section import Section
from stexp.errors import InputError
from stexp.protocol import Protocol

COMPONENTS = 9
STARTS = 400
UNDETERMINED = "undetermined"
OBSERVED = {"genes": "panel", "library": "panel", "target_sum": 1e4, "scale": "none", "spots": "all"}
"""How the observed expression is scaled here: of all in `definitions`, the nearest to the paper's column."""


def definitions() -> list[dict]:
    """Ways to scale observed expression that the paper's text leaves open.

    The base of the logarithm is not among them: it multiplies everything, and clusters do not change.
    """
    matrices = [("panel", "panel"), ("panel", "transcriptome"), ("all", "transcriptome")]
    spot_wise = [(*matrix, target) for matrix in matrices for target in (1e4, 1e6)]
    ways = [(*way, scale) for way in [*spot_wise, ("panel", "gene", 1e4)] for scale in ("none", "standardised")]
    keys = ("genes", "library", "target_sum", "scale", "spots")
    return [dict(zip(keys, (*way, spots), strict=True)) for way in ways for spots in ("all", "labelled")]


def observed(section: Section, panel: list[str], definition: dict) -> np.ndarray:
    """Observed expression of a section's spots under one of `definitions`, (N, G).

    Parameters
    ----------
    definition
        ``genes``: the ``panel`` or ``all`` of the section; ``library``: sum of a spot over the ``panel`` or the
        ``transcriptome``, or ``gene``, where every gene sums to `target_sum` over the spots; ``target_sum``.
    """
    genes = panel if definition["genes"] == "panel" else list(section.genes)
    by_gene = definition["library"] == "gene"
    protocol = Protocol(
        name="clusters",
        library="panel" if by_gene else definition["library"],
        target_sum=definition["target_sum"],
        truth="gene" if by_gene else "spot",
    )
    return normalise(section.counts(genes), section.total_counts, protocol)


def labels_of(section: Section) -> np.ndarray:
    """The pathologist's label of every spot, (N,) str; empty where there is none, or an undetermined one."""
    if "label" not in section.spots.obs:
        raise InputError(f"section {section.name} has no pathologist's labels (ST-pat/lbl)")
    labels = section.spots.obs["label"].fillna("").to_numpy(str)
    return np.where(labels == UNDETERMINED, "", labels)


def cluster(values: np.ndarray, k: int, scale: str = "none", starts: int = STARTS, seed: int = 0) -> np.ndarray:
    """k-means on the first nine principal components, from so many starts that the seed hardly matters.

    Parameters
    ----------
    values : (N, G)
    k
        Clusters.
    scale
        ``"standardised"``: every gene has variance 1 before.
    starts
        Each ends where no single spot can move (`settled`); the smallest sum of squares is kept.

    Returns
    -------
    (N,) int
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    values = np.asarray(values, dtype=np.float64)
    if scale == "standardised":
        spread = values.std(axis=0)
        values = (values - values.mean(axis=0))[:, spread > 0] / spread[spread > 0]
    if min(values.shape) < COMPONENTS or len(values) < k:
        raise InputError(f"{values.shape[0]} spots x {values.shape[1]} genes are too few for nine components")
    components = PCA(COMPONENTS, svd_solver="full").fit_transform(values)
    runs = [KMeans(k, n_init=1, random_state=seed * starts + i).fit(components).labels_ for i in range(starts)]
    return min((settled(components, each) for each in runs), key=lambda pair: pair[1])[0]


def settled(x: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, float]:
    """Move single points, the one that gains most first, until none lowers the sum of squares (Hartigan 1975).

    k-means itself stops at many more places: it moves a point only where another centre is nearer, and so forgets that
    the point pulls its own centre.

    Parameters
    ----------
    x : (N, D)
    clusters : (N,) int

    Returns
    -------
    clusters : (N,)
    float
        Sum of squared distances to the centres.
    """
    rows, clusters = np.arange(len(x)), clusters.copy()
    while True:
        member = np.eye(clusters.max() + 1)[clusters]
        n = member.sum(axis=0)
        distance = np.square(x[:, None] - (member.T @ x / n[:, None])[None]).sum(axis=2)
        own = distance[rows, clusters]
        # alone in its cluster, a point has nothing to gain
        leaving = own * (n / np.maximum(n - 1, 1))[clusters]
        change = distance * n / (n + 1) - leaving[:, None]
        change[rows, clusters] = 0
        point, to = np.unravel_index(change.argmin(), change.shape)
        if change[point, to] > -1e-9 * own.sum():
            return clusters, float(own.sum())
        clusters[point] = to


def against_labels(
    values: np.ndarray, labels: np.ndarray, scale: str = "none", spots: str = "all", **options
) -> tuple[np.ndarray, float, float]:
    """Cluster spots into as many clusters as there are labels, and compare on those that have one.

    Parameters
    ----------
    values : (N, G)
    labels : (N,) str
        Empty where a spot has none.
    spots
        Which are clustered: ``"all"`` or the ``"labelled"``.

    Returns
    -------
    clusters : (N,)
        -1: not clustered.
    ari, nmi
        Adjusted Rand index; normalised mutual information (arithmetic mean).
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    labelled = labels != ""
    k = len(set(labels[labelled]))
    if k < 2:
        raise InputError(f"clusters: {k} labels; two or more can be compared with")
    chosen = labelled if spots == "labelled" else np.ones(len(labels), dtype=bool)
    clusters = np.full(len(labels), -1)
    clusters[chosen] = cluster(values[chosen], k, scale, **options)
    pair = labels[labelled], clusters[labelled]
    return clusters, float(adjusted_rand_score(*pair)), float(normalized_mutual_info_score(*pair))


def matched(clusters: np.ndarray, labels: np.ndarray) -> dict[int, str]:
    """The label that each cluster is drawn as: pairs that share the most spots (Hungarian method), one to one."""
    from scipy.optimize import linear_sum_assignment

    labelled = (labels != "") & (clusters >= 0)
    shared = pd.crosstab(clusters[labelled], labels[labelled])
    rows, columns = linear_sum_assignment(-shared.to_numpy())
    return {int(shared.index[i]): str(shared.columns[j]) for i, j in zip(rows, columns, strict=True)}


def search(
    sections: list[Section], panel: list[str], printed: dict[str, tuple[float, float]], starts: int = STARTS
) -> pd.DataFrame:
    """Every definition on every section, against the printed values.

    Parameters
    ----------
    printed
        Section -> printed ARI and NMI of the observed expression.

    Returns
    -------
    DataFrame
        A row for each definition: its keys, ``<section>_ari``, ``<section>_nmi`` and ``distance``, the mean absolute
        difference from the printed values over sections and both measures; nearest first.
    """
    rows = []
    for definition in definitions():
        row, off = dict(definition), []
        for section in sections:
            values = observed(section, panel, definition)
            scores = against_labels(
                values, labels_of(section), definition["scale"], definition["spots"], starts=starts
            )[1:]
            off += np.abs(np.subtract(scores, printed[section.name])).tolist()
            row |= dict(zip(_columns(section.name), scores, strict=True))
        rows.append({**row, "distance": float(np.mean(off))})
    return pd.DataFrame(rows).sort_values("distance", ignore_index=True)


def _columns(section: str) -> Iterable[str]:
    return f"{section}_ari", f"{section}_nmi"
