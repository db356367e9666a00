"""Spatial domains: clusters of spots by image and expression, and their agreement with labels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from stexp.errors import InputError
from stexp.evaluation.spatial import adjacency, rows_to_one
from stexp.reporting.places import spot_ids

DOMAINS = ("image", "expression", "joint", "multimodal", "graph")
LEARNED = ("multimodal", "graph")
METHODS = ("kmeans", "leiden", "mixture")
LAYERS = ("predicted", "observed")
COMPONENTS, VARIABLE = 30, 2000  # principal components; genes they are of, at most
FEWER = 20  # principal components of what is learned of both modalities, as stMMC has it
LEIDEN_NEIGHBOURS = 15


def spatial_domains(
    adata: ad.AnnData,
    by: str = "joint",
    *,
    method: str | None = None,
    n_domains: int = 6,
    resolution: float = 1.0,
    smooth: bool = True,
    expression: str = "predicted",
    seed: int = 0,
) -> pd.Categorical:
    """Clusters of spots, of all sections together; "1" is the largest.

    Parameters
    ----------
    by
        ``image``: the tiles' embeddings; ``expression``: the 2,000 most variable genes; ``joint``: both, with the same
        total variance; each as its first 30 principal components. ``multimodal``: what a small graph network makes of
        both and of place, see :mod:`stexp.models.multimodal`, as 20 components; ``graph``: of expression and place.
    method, n_domains, resolution
        ``kmeans`` or ``mixture`` (normal distributions of one covariance) into `n_domains`, or ``leiden`` at
        `resolution` on the 15 nearest in the space of the components. None: see :func:`default_method`.
    smooth
        Average the components of a spot with those of the spots it touches, so that domains hang together; of what a
        network learned, which has averaged them: a spot joins the domain of most of them.
    expression
        ``predicted``, or ``observed`` where it is known: genes not measured everywhere are left out.

    Raises
    ------
    InputError
        Unknown or impossible arguments, no image embedding, no observed expression, or leiden without igraph.
    """
    if by not in DOMAINS:
        raise InputError(f"downstream.domains={by}: choose {', '.join(DOMAINS)}")
    method = method or default_method(by)
    if method not in METHODS:
        raise InputError(f"downstream.method={method}: choose {', '.join(METHODS)}")
    if method != "leiden" and not (isinstance(n_domains, int) and 1 <= n_domains <= adata.n_obs):
        raise InputError(f"downstream.n_domains={n_domains}: a whole number from 1 to {adata.n_obs} would fit")
    blocks = [] if by in ("expression", "graph") else [_image(adata, by)]
    if by != "image":
        blocks.insert(0, _variable_genes(adata, expression))
    around = sp.csr_matrix(adjacency(adata) + sp.eye(adata.n_obs))
    if by in LEARNED:
        # torch takes seconds to import, and all else here does without
        from stexp.models.multimodal import reconstruct_modalities

        xy, section = np.asarray(adata.obsm["spatial"], dtype=np.float64), adata.obs["section"].to_numpy(str)
        blocks, _ = reconstruct_modalities(blocks[0], blocks[1] if by == "multimodal" else None, xy, section, seed=seed)
    features = np.concatenate([_components(block, seed) for block in blocks], axis=1)
    if by in LEARNED:
        features = _components(features, seed, FEWER)
    elif smooth:
        features = rows_to_one(around) @ features
    labels = _clusters(features, method, n_domains, resolution, seed)
    if by in LEARNED and smooth:
        labels = majority(labels, around)
    # a mixture, or a majority, may leave a cluster empty
    rank = np.argsort(np.argsort(-np.bincount(labels), kind="stable"))[labels] + 1
    return pd.Categorical(rank.astype(str), categories=[str(i + 1) for i in range(rank.max())])


def default_method(by: str) -> str:
    """``mixture`` for what a network learned, as stMMC has it; else ``kmeans``."""
    return "mixture" if by in LEARNED else "kmeans"


def majority(labels: np.ndarray, around: sp.csr_matrix) -> np.ndarray:
    """Of every spot the label that most of the spots around it have, itself among them; its own where several do."""
    one_hot = sp.csr_matrix((np.ones(len(labels)), (np.arange(len(labels)), labels)))
    votes = np.asarray((around @ one_hot + 0.5 * one_hot).todense())
    return votes.argmax(axis=1)


def _image(adata: ad.AnnData, by: str) -> np.ndarray:
    if "image_embedding" not in adata.obsm:
        raise InputError(f"downstream.domains={by}: this method gives no image embedding; take expression")
    return np.asarray(adata.obsm["image_embedding"], dtype=np.float64)


def _variable_genes(adata: ad.AnnData, layer: str) -> np.ndarray:
    """The 2,000 genes that vary most in a layer, of those that every spot has, (N, G)."""
    if layer not in LAYERS:
        raise InputError(f"downstream.expression={layer}: choose {' or '.join(LAYERS)}")
    if layer not in adata.layers:
        raise InputError(f"downstream.expression={layer}: nothing was measured here; predicted would fit")
    values = np.asarray(adata.layers[layer])
    values = values[:, np.isfinite(values).all(axis=0)]
    if not values.shape[1]:
        raise InputError(f"downstream.expression={layer}: no gene is measured in every spot; predicted would fit")
    most = np.argsort(-values.var(axis=0), kind="stable")[:VARIABLE]
    return values[:, np.sort(most)].astype(np.float64)


def _clusters(features: np.ndarray, method: str, n_domains: int, resolution: float, seed: int) -> np.ndarray:
    if len(features) < 2:
        return np.zeros(len(features), dtype=np.int64)
    if method == "leiden":
        return _leiden(features, resolution, seed)
    if method == "kmeans":
        from sklearn.cluster import KMeans  # scikit-learn takes a second to import, here and below

        return KMeans(n_domains, n_init=10, random_state=seed).fit_predict(features)
    from sklearn.mixture import GaussianMixture

    spread = features.std(axis=0).mean() or 1.0  # its floor of the covariance is absolute
    mixture = GaussianMixture(n_domains, covariance_type="tied", n_init=10, random_state=seed)
    return mixture.fit_predict(features / spread)


def agreement(domains: Sequence[str], labels: pd.Series, section: np.ndarray) -> pd.DataFrame:
    """Adjusted Rand index and normalised mutual information with labels (NaN: none), per section that has any."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    rows, labelled, names = [], labels.notna().to_numpy(), np.asarray(domains)
    for name in pd.unique(section[labelled]):
        spots = labelled & (section == name)
        pair = labels.to_numpy(str)[spots], names[spots]
        scores = {"ari": adjusted_rand_score(*pair), "nmi": normalized_mutual_info_score(*pair)}
        rows.append({"section": name, "n_spots": int(spots.sum()), "n_labels": len(set(pair[0])), **scores})
    return pd.DataFrame(rows, columns=["section", "n_spots", "n_labels", "ari", "nmi"])


def read_labels(adata: ad.AnnData, source: str | None) -> pd.Series | None:
    """Labels of the spots: a column of obs, a table with spot, label and (of several sections) section, or ``label``.

    Raises
    ------
    InputError
        Neither a column nor a table, or one that no spot is in.
    """
    if source is None or source in adata.obs:
        column = source or "label"
        return adata.obs[column].astype(object) if column in adata.obs else None
    path = Path(source)
    if not path.is_file():
        raise InputError(f"downstream.labels={source}: no column of obs ({', '.join(adata.obs)}) and no file")
    table = pd.read_csv(path, sep=None, engine="python", dtype=str)
    if not {"spot", "label"} <= set(table):
        raise InputError(f"{path} has the columns {', '.join(map(str, table))}; spot and label would fit")
    keys = ["section", "spot"] if "section" in table else ["spot"]
    spots = pd.DataFrame({"section": adata.obs["section"].astype(str), "spot": spot_ids(adata)}, adata.obs_names)
    if table.duplicated(keys).any() or ("section" not in keys and spots["section"].nunique() > 1):
        raise InputError(f"{path} names a spot twice, or lacks the column section that tells spots apart")
    label = spots.merge(table[[*keys, "label"]], how="left", on=keys)["label"].to_numpy(object)
    if pd.isna(label).all():
        raise InputError(f"{path}: none of its spots ({', '.join(table['spot'][:3])}) is predicted here")
    return pd.Series(label, adata.obs_names)


def _components(values: np.ndarray, seed: int, most: int = COMPONENTS) -> np.ndarray:
    """First principal components, scaled so that all together have variance 1."""
    from sklearn.decomposition import PCA

    n = min(most, *values.shape)
    solver = "full" if n == min(values.shape) else "randomized"
    components = PCA(n, svd_solver=solver, random_state=seed).fit_transform(values)
    total = components.var(axis=0).sum()
    return components / np.sqrt(total) if total > 0 else components


def _leiden(features: np.ndarray, resolution: float, seed: int) -> np.ndarray:
    """Leiden communities of the nearest neighbours, weighted by the share of neighbours that two spots have in common.

    Not scanpy's: that compiles umap first, a minute on a small machine.
    """
    from sklearn.neighbors import kneighbors_graph

    if not (isinstance(resolution, int | float) and 0 < resolution < np.inf):
        raise InputError(f"downstream.resolution={resolution}: a number above 0 would fit")
    try:
        import igraph  # optional
    except ImportError:
        raise InputError("downstream.method=leiden needs a package: pip install 'stexp[leiden]'") from None
    near = kneighbors_graph(features, min(LEIDEN_NEIGHBOURS, len(features) - 1)) + sp.eye(len(features))
    common = sp.csr_matrix(near @ near.T)
    common.data /= 2 * near[0].sum() - common.data  # Jaccard: every spot has the same number
    i, j = (edges := sp.triu((near + near.T).multiply(common), 1).tocoo()).coords
    graph = igraph.Graph(len(features), np.column_stack([i, j]).tolist())
    igraph.set_random_number_generator(random.Random(seed))
    try:
        communities = graph.community_leiden("modularity", edges.data.tolist(), resolution, n_iterations=-1)
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(communities.membership)
