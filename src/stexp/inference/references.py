"""The references that a run retrieves from, as a bank; and fewer of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch
from scipy.spatial import cKDTree
from sklearn.cluster import MiniBatchKMeans

from stexp.errors import InputError
from stexp.inference.bank import Bank
from stexp.inference.rebuild import class_of_method
from stexp.models.closed_form import LEARNT_FROM
from stexp.models.consensus import Consensus
from stexp.models.low_rank import reference_rows
from stexp.runs.finished import FinishedRun

CONSENSUS = ("model.reference", "model.scores")
"""Tensors of :class:`~stexp.models.consensus.Consensus` that its bank stands for."""


def bank_of(run: FinishedRun, weights: dict[str, torch.Tensor]) -> Bank | None:
    """The references of a run that retrieves, with all genes that they and every section that trained measure.

    Those of ``consensus`` are the spots that it searches, embedded as its weights have them; None of one that learned
    residuals: what they deviate from are whole sections.
    """
    if issubclass(class_of_method(run.config["model"]), Consensus):
        if run.protocol.truth == "residuals":
            return None
        learnt, embedding = run.data.rows(*LEARNT_FROM), weights[CONSENSUS[0]].numpy()
        rows = learnt if len(learnt) == len(embedding) else learnt[reference_rows(len(learnt))]
        return _bank(run, rows, embedding)
    if run.retrieval is None:
        return None
    if run.protocol.truth == "residuals":
        raise InputError(
            f"{run.folder.path} retrieves residuals (protocol.truth), which are deviations from whole sections; what "
            f"predicts slides holds single references: a method that does not retrieve would fit, or truth=spot"
        )
    embeddings, how = run.for_retrieval
    rows = run.references(how.reference)
    return _bank(run, rows, embeddings.obsm["spot_embedding"][rows])


def without_references(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a model beside which its bank is written: of ``consensus``, without what stands there."""
    return {key: value[:0] if key in CONSENSUS else value for key, value in weights.items()}


def _bank(run: FinishedRun, rows: np.ndarray, embedding: np.ndarray) -> Bank:
    data = run.data
    spots = data.spots.iloc[rows]
    used = {*spots["section"], *data.names("train", "validation")}
    genes = sorted(set.intersection(*(set(section.genes) for section in data.sections if section.name in used)))
    counts, rest = [], []
    for section in data.sections:
        chosen = np.isin(np.flatnonzero(data.spots["section"].to_numpy() == section.name), rows)
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
        rest=sp.vstack(rest, format="csr") if run.protocol.truth == "gene" else None,
    )


def compress(bank: Bank, dtype: str, prototypes: int | None) -> Bank:
    """A bank as it comes back from a file of smaller embeddings, or of fewer references.

    Parameters
    ----------
    dtype
        Of the embeddings.
    prototypes
        Keep only those nearest to the centres of as many clusters of the embeddings; None: all.
    """
    if prototypes is not None:
        if isinstance(prototypes, bool) or not (isinstance(prototypes, int) and 1 <= prototypes <= len(bank)):
            raise InputError(
                f"prototypes={prototypes}: a whole number from 1 to {len(bank)}, the references, would fit"
            )
        clusters = MiniBatchKMeans(prototypes, random_state=0, n_init=1, batch_size=4096).fit(bank.embedding)
        bank = bank.take(np.unique(cKDTree(bank.embedding).query(clusters.cluster_centers_)[1]))
    return replace(bank, embedding=bank.embedding.astype(dtype).astype(np.float32))
