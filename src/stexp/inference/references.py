"""The references that a run retrieves from, as a bank; and fewer of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch
from scipy.spatial import cKDTree
from sklearn.cluster import MiniBatchKMeans

from stexp.data.datamodule import SpotDataModule
from stexp.data.genes import normalise
from stexp.errors import InputError
from stexp.inference.bank import Bank
from stexp.inference.prototype_bank import AnyBank, PrototypeBank
from stexp.inference.rebuild import class_of_method
from stexp.models.closed_form import LEARNT_FROM
from stexp.models.consensus import Consensus
from stexp.models.low_rank import reference_rows
from stexp.models.prototypes import Standing
from stexp.runs.finished import FinishedRun

CONSENSUS = ("model.reference", "model.scores")
"""Tensors of :class:`~stexp.models.consensus.Consensus` that its bank stands for."""


def bank_of(run: FinishedRun, weights: dict[str, torch.Tensor]) -> AnyBank | None:
    """The references of a run that retrieves, with all genes that they and every section that trained measure.

    Those of ``consensus`` are the spots that it searches, embedded as its weights have them; None of one that learned
    residuals: what they deviate from are whole sections.
    """
    if issubclass(class_of_method(run.config["model"]), Consensus):
        if run.protocol.truth == "residuals":
            return None
        learnt, embedding = run.data.rows(*LEARNT_FROM), weights[CONSENSUS[0]].numpy()
        rows = learnt if len(learnt) == len(embedding) else learnt[reference_rows(len(learnt))]
        return spots_of(run.data, rows, embedding)
    if run.retrieval is None:
        return None
    if run.protocol.truth == "residuals":
        raise InputError(
            f"{run.folder.path} retrieves residuals (protocol.truth), which are deviations from whole sections; what "
            f"predicts slides holds single references: a method that does not retrieve would fit, or truth=spot"
        )
    embeddings, how = run.for_retrieval
    rows = run.references(how.reference)
    standing = run.standing(rows)
    if standing is not None:
        return prototypes_of(run.data, rows, standing)
    return spots_of(run.data, rows, embeddings.obsm["spot_embedding"][rows])


def without_references(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model beside which its bank is written: of ``consensus``, without what stands there."""
    return {key: value[:0] if key in CONSENSUS else value for key, value in weights.items()}


def shared_genes(data: SpotDataModule, rows: np.ndarray) -> list[str]:
    """Genes that the sections of the spots `rows`, and all that trained, measure."""
    used = {*data.spots["section"].iloc[rows], *data.names("train", "validation")}
    return sorted(set.intersection(*(set(section.genes) for section in data.sections if section.name in used)))


def spots_of(data: SpotDataModule, rows: np.ndarray, embedding: np.ndarray) -> Bank:
    """The references `rows` of the data's spots, embedded as (R, D)."""
    spots, genes = data.spots.iloc[rows], shared_genes(data, rows)
    counts, rest = [], []
    for section in data.sections:
        chosen = np.isin(data.rows_of(section), rows)
        if chosen.any():
            x = section.spots.X[:, section.genes.get_indexer(genes)]
            counts.append(x[chosen])
            rest.append(sp.csr_matrix(x[~chosen].sum(axis=0)))
    return Bank(
        embedding=embedding.astype(np.float32),
        section=spots["section"].to_numpy(str),
        patient=spots["patient"].to_numpy(str),
        spot=spots["spot"].to_numpy(str),
        counts=sp.vstack(counts, format="csr"),
        total_counts=spots["total_counts"].to_numpy(np.float64),
        genes=genes,
        rest=sp.vstack(rest, format="csr") if data.protocol.truth == "gene" else None,
    )


def prototypes_of(data: SpotDataModule, rows: np.ndarray, standing: Standing) -> PrototypeBank:
    """What stands for the references `rows`, with their mean expression normalised as in training."""
    names, genes, protocol = standing.names, shared_genes(data, rows), data.protocol
    group, total = np.full(len(data.spots), -1), np.zeros((len(names), len(genes)))
    group[rows] = member = standing.member.cpu().numpy()
    for section in data.sections:
        own = group[data.rows_of(section)]
        if (own < 0).all():
            continue
        counts, depth, scaled = section.spots.X, section.total_counts, protocol
        if protocol.truth == "spot" and protocol.library == "panel":
            depth = np.asarray(counts[:, section.genes.get_indexer(data.panel)].sum(axis=1)).ravel()
            scaled = replace(protocol, library="transcriptome")
        values = normalise(counts[:, section.genes.get_indexer(genes)].toarray(), depth, scaled)
        np.add.at(total, own[own >= 0], values[own >= 0])
    return PrototypeBank(
        embedding=standing.embedding.cpu().numpy(),
        section=names["section"].to_numpy(str),
        patient=names["patient"].to_numpy(str),
        spot=names["spot"].to_numpy(str),
        values=(total / np.bincount(member)[:, None]).astype(np.float32),
        genes=genes,
    )


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
