"""The references that a run retrieves from, as a bank; and fewer of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree
from sklearn.cluster import MiniBatchKMeans

from stexp.data.genes import normalise
from stexp.errors import InputError
from stexp.inference.bank import Bank
from stexp.inference.prototype_bank import AnyBank, PrototypeBank
from stexp.runs.finished import FinishedRun


def bank_of(run: FinishedRun) -> AnyBank | None:
    """The references of a run that retrieves, with all genes that they and every section that trained measure."""
    if run.retrieval is None:
        return None
    if run.protocol.truth == "residuals":
        raise InputError(
            f"{run.folder.path} retrieves residuals (protocol.truth), which are deviations from whole sections; what "
            f"predicts slides holds single references: a method that does not retrieve would fit, or truth=spot"
        )
    embeddings, how = run.for_retrieval
    data, rows = run.data, run.references(how.reference)
    spots = data.spots.iloc[rows]
    used = {*spots["section"], *data.names("train", "validation")}
    genes = sorted(set.intersection(*(set(section.genes) for section in data.sections if section.name in used)))
    standing = run.standing(rows)
    if standing is not None:
        names = standing.names
        return PrototypeBank(
            embedding=standing.embedding.numpy(),
            section=names["section"].to_numpy(str),
            patient=names["patient"].to_numpy(str),
            spot=names["spot"].to_numpy(str),
            values=_mean_expression(run, rows, standing.member.numpy(), genes),
            genes=genes,
        )
    counts, rest = [], []
    for section in data.sections:
        chosen = np.isin(np.flatnonzero(data.spots["section"].to_numpy() == section.name), rows)
        if chosen.any():
            x = section.spots.X[:, section.genes.get_indexer(genes)]
            counts.append(x[chosen])
            rest.append(sp.csr_matrix(x[~chosen].sum(axis=0)))
    return Bank(
        embedding=embeddings.obsm["spot_embedding"][rows].astype(np.float32),
        section=spots["section"].to_numpy(str),
        patient=spots["patient"].to_numpy(str),
        spot=spots["spot"].to_numpy(str),
        counts=sp.vstack(counts, format="csr"),
        total_counts=spots["total_counts"].to_numpy(np.float64),
        genes=genes,
        rest=sp.vstack(rest, format="csr") if run.protocol.truth == "gene" else None,
    )


def _mean_expression(run: FinishedRun, rows: np.ndarray, member: np.ndarray, genes: list[str]) -> np.ndarray:
    """Mean expression (P, G) of the references `rows` of every prototype, normalised as in training."""
    group, total = np.full(len(run.data.spots), -1), np.zeros((member.max() + 1, len(genes)))
    group[rows] = member
    names, protocol = run.data.spots["section"].to_numpy(), run.protocol
    for section in run.data.sections:
        own = group[names == section.name]
        if (own < 0).all():
            continue
        counts, spots = section.spots.X[:, section.genes.get_indexer(genes)].toarray(), section.total_counts
        scaled = protocol
        if protocol.truth == "spot" and protocol.library == "panel":
            spots = np.asarray(section.spots.X[:, section.genes.get_indexer(run.panel)].sum(axis=1)).ravel()
            scaled = replace(protocol, library="transcriptome")
        np.add.at(total, own[own >= 0], normalise(counts, spots, scaled)[own >= 0])
    return (total / np.bincount(member)[:, None]).astype(np.float32)


def nearest_to_centres(embedding: np.ndarray, n: int) -> np.ndarray:
    """Rows of the embeddings (N, D) nearest to the centres of `n` clusters of them, ascending; each once."""
    clusters = MiniBatchKMeans(n, random_state=0, n_init=1, batch_size=4096).fit(embedding)
    return np.unique(cKDTree(embedding).query(clusters.cluster_centers_)[1])


def compress(bank: AnyBank, dtype: str, prototypes: int | None) -> AnyBank:
    """A bank as it comes back from a file of smaller embeddings, or of fewer references.

    Parameters
    ----------
    dtype
        Of the embeddings.
    prototypes
        Keep only those nearest to the centres of as many clusters of the embeddings; None: all.
    """
    if isinstance(bank, PrototypeBank):
        if prototypes is not None:
            raise InputError(
                f"prototypes={prototypes}: the references are {len(bank)} prototypes already, learned by "
                f"model.prototypes; prototypes=null would fit"
            )
        values = bank.values.astype(dtype).astype(np.float32)
        return replace(bank, embedding=bank.embedding.astype(dtype).astype(np.float32), values=values)
    if prototypes is not None:
        if isinstance(prototypes, bool) or not (isinstance(prototypes, int) and 1 <= prototypes <= len(bank)):
            raise InputError(
                f"prototypes={prototypes}: a whole number from 1 to {len(bank)}, the references, would fit"
            )
        bank = bank.take(nearest_to_centres(bank.embedding, prototypes))
    return replace(bank, embedding=bank.embedding.astype(dtype).astype(np.float32))
