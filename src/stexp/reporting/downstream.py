"""What is made of predicted expression: domains, variable genes, scores of gene sets, where predictions come from."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import yaml
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, norm

from stexp.errors import InputError
from stexp.evaluation import predictions
from stexp.evaluation.metrics import mean_or_none, pearson_per_gene

log = logging.getLogger(__name__)

DOMAINS = ("image", "expression", "joint")
METHODS = ("kmeans", "leiden")
TOUCHING = 1.3  # spacings: neighbours on a hexagonal or square grid, diagonals left out
COMPONENTS, VARIABLE = 30, 2000  # principal components; genes they are of, at most
LEIDEN_NEIGHBOURS = 15
CONTROLS = 50  # genes per gene of a set, as scanpy's default; and at least so many genes in a bin of expression
BINS = (2, 25)  # fewest that scanpy takes, and its default


def adjacency(adata: ad.AnnData) -> sp.csr_matrix:
    """Spots that touch: within 1.3 of the spacing in the same section; (N, N), 0 and 1, symmetric."""
    xy, section = np.asarray(adata.obsm["spatial"], dtype=np.float64), adata.obs["section"].to_numpy(str)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for name in pd.unique(section):
        rows = np.flatnonzero(section == name)
        reach = TOUCHING * predictions.spacing(xy[rows])
        pairs.append(rows[cKDTree(xy[rows]).query_pairs(reach, output_type="ndarray")])
    i, j = np.concatenate(pairs).T
    half = sp.coo_matrix((np.ones(len(i)), (i, j)), (len(xy), len(xy)))
    return sp.csr_matrix(half + half.T)


def rows_to_one(weights: sp.csr_matrix) -> sp.csr_matrix:
    """Every row divided by its sum; rows without any stay empty."""
    total = np.asarray(weights.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags(np.divide(1, total, out=np.zeros_like(total), where=total > 0)) @ weights)


def morans_i(values: np.ndarray, weights: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Moran's I of every gene, and how unlikely it is without spatial order.

    Parameters
    ----------
    values : (N, G)
    weights : (N, N)
        Of a spot's neighbours; the diagonal is 0.

    Returns
    -------
    I : (G,)
        n / W x sum_ij w_ij z_i z_j / sum_i z_i^2 (Moran 1950); NaN for genes that are constant or hold NaN.
    z : (G,)
        I less its mean -1 / (n - 1), by its standard deviation where values are drawn from one normal distribution
        (Cliff and Ord 1981).
    """
    values = np.asarray(values, dtype=np.float64)
    n, total = len(values), weights.sum()
    if n < 3 or total == 0:
        return np.full(values.shape[1], np.nan), np.full(values.shape[1], np.nan)
    spread = np.ptp(values, axis=0)
    varies = spread > 1e-6 * np.abs(values).max(axis=0)  # NaN compares as False
    centred = values[:, varies] - values[:, varies].mean(axis=0)
    moran, z = np.full((2, values.shape[1]), np.nan)
    moran[varies] = n / total * (centred * (weights @ centred)).sum(axis=0) / (centred**2).sum(axis=0)
    both = weights + weights.T
    s1 = both.multiply(both).sum() / 2
    s2 = (np.asarray(both.sum(axis=1)) ** 2).sum()
    mean = -1 / (n - 1)
    variance = (n**2 * s1 - n * s2 + 3 * total**2) / (total**2 * (n**2 - 1)) - mean**2
    z[varies] = (moran[varies] - mean) / np.sqrt(variance)
    return moran, z


def variable_genes(adata: ad.AnnData) -> pd.DataFrame:
    """Moran's I of the prediction in each section, and of the truth where it is known.

    Returns
    -------
    DataFrame
        section, gene, ``predicted`` and ``predicted_q``, and with a truth ``observed`` and ``observed_q``: I over spots
        that touch, rows of weights summing to 1, and the false discovery rate among the section's genes; by falling
        ``predicted``.

    Notes
    -----
    Predictions are smoother than counts: their I is higher and nearly always significant. What ranks genes in truth
    too is seen by comparing both columns.
    """
    weights, section, tables = rows_to_one(adjacency(adata)), adata.obs["section"].to_numpy(str), []
    for name in pd.unique(section):
        here = np.flatnonzero(section == name)
        table = pd.DataFrame({"section": name, "gene": adata.var_names.to_numpy(str)})
        for layer in ("predicted", "observed"):
            if layer in adata.layers:
                table[layer], z = morans_i(adata.layers[layer][here], weights[here][:, here])
                table[f"{layer}_q"] = np.nan
                known = np.flatnonzero(~np.isnan(z))
                if len(known):
                    table.loc[known, f"{layer}_q"] = false_discovery_control(norm.sf(z[known]))
        tables.append(table.sort_values("predicted", ascending=False, kind="stable", na_position="last"))
    return pd.concat(tables, ignore_index=True)


def spatial_domains(
    adata: ad.AnnData,
    by: str = "joint",
    *,
    method: str = "kmeans",
    n_domains: int = 6,
    resolution: float = 1.0,
    smooth: bool = True,
    seed: int = 0,
) -> pd.Categorical:
    """Clusters of spots, of all sections together; "1" is the largest.

    Parameters
    ----------
    by
        ``image``: the tiles' embeddings; ``expression``: the prediction (its 2,000 most variable genes); ``joint``:
        both, with the same total variance. Each as its first 30 principal components.
    method, n_domains, resolution
        ``kmeans`` into `n_domains`, or ``leiden`` at `resolution` on the 15 nearest in the space of the components.
    smooth
        Average the components of a spot with those of the spots it touches, so that domains hang together.

    Raises
    ------
    InputError
        Unknown or impossible arguments, no image embedding, or leiden without the package igraph.
    """
    if by not in DOMAINS:
        raise InputError(f"downstream.domains={by}: choose {', '.join(DOMAINS)}")
    blocks = []
    if by != "expression":
        if "image_embedding" not in adata.obsm:
            raise InputError(f"downstream.domains={by}: this method gives no image embedding; take expression")
        blocks.append(np.asarray(adata.obsm["image_embedding"], dtype=np.float64))
    if by != "image":
        predicted = np.asarray(adata.layers["predicted"])
        most = np.argsort(-predicted.var(axis=0), kind="stable")[:VARIABLE]
        blocks.append(predicted[:, np.sort(most)].astype(np.float64))
    features = np.concatenate([_components(block, seed) for block in blocks], axis=1)
    if smooth:
        features = rows_to_one(sp.csr_matrix(adjacency(adata) + sp.eye(len(features)))) @ features
    if method == "leiden":
        labels = _leiden(features, resolution, seed)
    elif method == "kmeans":
        from sklearn.cluster import KMeans

        if not (isinstance(n_domains, int) and 1 <= n_domains <= len(features)):
            raise InputError(f"downstream.n_domains={n_domains}: a whole number from 1 to {len(features)} would fit")
        labels = KMeans(n_domains, n_init=10, random_state=seed).fit_predict(features)
    else:
        raise InputError(f"downstream.method={method}: choose {' or '.join(METHODS)}")
    by_size = np.argsort(-np.bincount(labels), kind="stable")
    rank = np.argsort(by_size)[labels] + 1
    return pd.Categorical(rank.astype(str), categories=[str(i + 1) for i in range(len(by_size))])


def agreement(domains: Sequence[str], labels: pd.Series, section: np.ndarray) -> pd.DataFrame:
    """Adjusted Rand index and normalised mutual information with labels (NaN: none), per section that has any."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    rows, known, domains = [], labels.notna().to_numpy(), np.asarray(domains)
    for name in pd.unique(section[known]):
        here = known & (section == name)
        pair = labels.to_numpy(str)[here], domains[here]
        scores = {"ari": adjusted_rand_score(*pair), "nmi": normalized_mutual_info_score(*pair)}
        rows.append({"section": name, "n_spots": int(here.sum()), "n_labels": len(set(pair[0])), **scores})
    return pd.DataFrame(rows, columns=["section", "n_spots", "n_labels", "ari", "nmi"])


def read_labels(adata: ad.AnnData, given: str | None) -> pd.Series | None:
    """Labels of the spots: a column of obs, a table with spot, label and (of several sections) section, or ``label``.

    Raises
    ------
    InputError
        Neither a column nor a table, or one that no spot is in.
    """
    if given is None or given in adata.obs:
        column = given or "label"
        return adata.obs[column].astype(object) if column in adata.obs else None
    path = Path(given)
    if not path.is_file():
        raise InputError(f"downstream.labels={given}: no column of obs ({', '.join(adata.obs)}) and no file")
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


def spot_ids(adata: ad.AnnData) -> np.ndarray:
    """Ids of the spots within their section."""
    return adata.obs["spot"].to_numpy(str) if "spot" in adata.obs else adata.obs_names.to_numpy(str)


def read_gene_sets(path: str | Path) -> dict[str, list[str]]:
    """Gene sets of a gmt (MSigDB), a yaml or json (name: [genes]), or a csv or tsv (columns set, gene).

    Raises
    ------
    InputError
        No such file, or not of that form.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"downstream.gene_sets={path} does not exist")
    suffix = path.suffix.lower()
    try:
        if suffix == ".gmt":
            rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            sets = {row[0]: [gene.strip() for gene in row[2:] if gene.strip()] for row in rows}
        elif suffix in (".yaml", ".yml", ".json"):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            sets = {str(name): [str(gene) for gene in genes] for name, genes in content.items()}
        elif suffix in (".csv", ".tsv"):
            table = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", dtype=str, keep_default_na=False)
            sets = {str(name): list(genes) for name, genes in table.groupby("set", sort=False)["gene"]}
        else:
            raise InputError(f"gene sets {path}: gmt, yaml, json, csv or tsv would fit")
    except InputError:
        raise
    except (ValueError, AttributeError, TypeError, KeyError, yaml.YAMLError) as error:
        raise InputError(f"gene sets {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not sets or not all(sets.values()):
        raise InputError(f"gene sets {path}: there is none, or one without genes")
    return {name: list(dict.fromkeys(genes)) for name, genes in sets.items()}


def gene_set_scores(adata: ad.AnnData, sets: dict[str, list[str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score of every spot for every gene set, by scanpy's score_genes on the prediction.

    Parameters
    ----------
    sets
        Name -> genes; those that are not predicted are left out, and so are the scores of sets without any.

    Returns
    -------
    scores : DataFrame, N spots
        A column a set: mean of its genes less the mean of genes that are expressed alike, drawn at random.
    sets : DataFrame
        set, ``n_genes``, ``n_predicted``, ``missing``, and with a truth ``pearson`` of the score with the same score
        of the observed expression, mean over sections.

    Raises
    ------
    InputError
        No set has a predicted gene, or none is left to compare one with.
    """
    measured = np.ones(adata.n_vars, dtype=bool)
    if "observed" in adata.layers:
        measured = ~np.isnan(np.asarray(adata.layers["observed"])).any(axis=0)
    section, scores, rows = adata.obs["section"].to_numpy(str), {}, []
    for name, genes in sets.items():
        found = [gene for gene in genes if gene in adata.var_names]
        row = {"set": name, "n_genes": len(genes), "n_predicted": len(found)}
        row["missing"] = " ".join(gene for gene in genes if gene not in adata.var_names)
        if found:
            scores[name] = _score(adata, "predicted", name, found, np.ones(adata.n_vars, dtype=bool))
        if found and "observed" in adata.layers:
            known, pearson = [gene for gene in found if measured[adata.var_names.get_loc(gene)]], []
            if known:
                truth = _score(adata, "observed", name, known, measured)
                for each in pd.unique(section):
                    here = section == each
                    pearson.append(pearson_per_gene(truth[here, None], scores[name][here, None])[0])
            row["pearson"] = mean_or_none(pearson)
        rows.append(row)
    if not scores:
        raise InputError(f"none of the genes of {len(sets)} gene set(s) is predicted here; predict with genes=all")
    return pd.DataFrame(scores, index=adata.obs_names), pd.DataFrame(rows)


def neighbour_table(adata: ad.AnnData, spots: str | Sequence[str] = "all") -> pd.DataFrame:
    """The references that a prediction comes from most, a row for each of up to five.

    Parameters
    ----------
    spots
        ``all``, or names of spots.

    Returns
    -------
    DataFrame
        spot, rank, weight (of all retrieved references a spot's weights sum to 1), reference, and its section, patient
        and, where known, spot.

    Raises
    ------
    InputError
        The method does not retrieve, or a spot is not there.
    """
    if "neighbours" not in adata.obsm or "references" not in adata.uns:
        raise InputError("downstream.neighbours: these predictions name no references; their method does not retrieve")
    if isinstance(spots, str) and spots == "all":
        rows = np.arange(adata.n_obs)
    else:
        names = [spots] if isinstance(spots, str) else [str(spot) for spot in spots]
        rows = adata.obs_names.get_indexer(names)
        if (rows < 0).any():
            unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
            raise InputError(
                f"downstream.neighbours: {', '.join(unknown[:5])} not among the {adata.n_obs} spots "
                f"({', '.join(adata.obs_names[:3])}, ...)"
            )
    which, weight = adata.obsm["neighbours"][rows], adata.obsm["neighbour_weights"][rows]
    references = adata.uns["references"].iloc[which.ravel()]
    table = pd.DataFrame(
        {
            "spot": np.repeat(adata.obs_names.to_numpy(str)[rows], which.shape[1]),
            "rank": np.tile(np.arange(1, which.shape[1] + 1), len(rows)),
            "weight": weight.ravel(),
            "reference": references.index.to_numpy(str),
        }
    )
    for key in references:
        table[f"reference_{key}"] = references[key].to_numpy(str)
    return table


def _components(values: np.ndarray, seed: int) -> np.ndarray:
    """First principal components, scaled so that all together have variance 1."""
    from sklearn.decomposition import PCA

    n = min(COMPONENTS, *values.shape)
    found = PCA(n, svd_solver="full" if n == min(values.shape) else "randomized", random_state=seed)
    components = found.fit_transform(values)
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
        import igraph
    except ImportError:
        raise InputError("downstream.method=leiden needs a package: pip install 'stexp[leiden]'") from None
    near = kneighbors_graph(features, min(LEIDEN_NEIGHBOURS, len(features) - 1)) + sp.eye(len(features))
    common = sp.csr_matrix(near @ near.T)
    common.data /= 2 * near[0].sum() - common.data  # Jaccard: every spot has the same number
    i, j = (edges := sp.triu((near + near.T).multiply(common), 1).tocoo()).coords
    graph = igraph.Graph(len(features), np.column_stack([i, j]).tolist())
    igraph.set_random_number_generator(random.Random(seed))
    try:
        found = graph.community_leiden("modularity", edges.data.tolist(), resolution, n_iterations=-1)
    finally:
        igraph.set_random_number_generator(random)
    return np.asarray(found.membership)


def _score(adata: ad.AnnData, layer: str, name: str, genes: list[str], measured: np.ndarray) -> np.ndarray:
    import scanpy as sc

    table = ad.AnnData(np.asarray(adata.layers[layer])[:, measured])
    table.var_names = adata.var_names[measured]
    # a panel has few genes: bins of expression that hold enough to compare with
    bins = int(np.clip(table.n_vars // CONTROLS, *BINS))
    try:
        sc.tl.score_genes(table, genes, ctrl_size=CONTROLS, n_bins=bins, score_name="score", random_state=0)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"gene set {name} cannot be scored among {table.n_vars} genes ({reason})") from error
    return table.obs["score"].to_numpy(np.float64)
