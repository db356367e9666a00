"""Embedding of spots by image and expression together, for spatial domains (after stMMC, arXiv 2411.02534).

A graph convolution per modality, their learned mix, four terms of Deep Graph Infomax and the reconstruction of what the
spots had. It takes about ten seconds for a few hundred spots.

As in the authors' code (NabaviLab/stMMC): expression is averaged along the graph of the 3 nearest spots, the image
along that of the 3 spots with the most similar expression; 32 dimensions, reconstruction weighted 10, Adam at 0.01, 600
epochs, no dropout. Where it differs, it is ours:

- Theirs reconstructs expression alone, so that what only the image tells is lost; here the mix is to give back both
  modalities, each weighted 10.
- Both modalities are standardised; theirs scales expression and takes the image as it is.
- Of several sections no edge in space leads from one to another.
- The components of similar expression are as many as the spots allow, 50 at most.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from torch import nn
from torch.nn import functional as F

from stexp.evaluation.spatial import rows_to_one

WIDTH, NEIGHBOURS, COMPONENTS = 32, 3, 50
RECONSTRUCTION = 10.0  # weight beside the four contrastive terms
EPOCHS, LR = 600, 0.01


def nearest_graph(places: np.ndarray, group: np.ndarray | None = None) -> sp.csr_matrix:
    """The 3 nearest of every row, itself left out, within its group; (N, N), 0 and 1, directed.

    Parameters
    ----------
    places : (N, D)
    group : (N,)
        None: all are one.
    """
    n = len(places)
    group = np.zeros(n, dtype=int) if group is None else group
    i, j = [], []
    for name in pd.unique(group):
        rows = np.flatnonzero(group == name)
        k = min(NEIGHBOURS, len(rows) - 1)
        if k > 0:
            near = cKDTree(places[rows]).query(places[rows], k + 1)[1]
            other = near != np.arange(len(rows))[:, None]
            other[:, -1] &= ~other.all(axis=1)  # of spots in one place a spot may not find itself
            i.append(np.repeat(rows, k))
            j.append(rows[near[other]])
    edges = (np.concatenate(i), np.concatenate(j)) if i else (np.empty(0, int), np.empty(0, int))
    return sp.csr_matrix((np.ones(len(edges[0])), edges), (n, n))


def propagation(graph: sp.csr_matrix) -> sp.csr_matrix:
    """D^-1/2 A D^-1/2 + I, A being the graph in both directions with loops: what a convolution multiplies by."""
    both = sp.csr_matrix(((graph + graph.T + sp.eye(graph.shape[0])) > 0).astype(np.float64))
    scale = sp.diags(1 / np.sqrt(np.asarray(both.sum(axis=1)).ravel()))
    return sp.csr_matrix(scale @ both @ scale + sp.eye(graph.shape[0]))


class GraphConvolution(nn.Module):
    """P x W: values of every spot through one matrix, then along its edges."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_in, n_out)))

    def forward(self, values: torch.Tensor, propagate: torch.Tensor) -> torch.Tensor:
        """Values (N, F) to (N, D); `propagate` is :func:`propagation` of the graph, sparse."""
        return torch.sparse.mm(propagate, values @ self.weight)


class Discriminator(nn.Module):
    """x W s + b: whether a spot belongs to its surroundings, as a logit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, width)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, spots: torch.Tensor, surroundings: torch.Tensor) -> torch.Tensor:
        """Both (N, D), to (N,)."""
        return ((spots @ self.weight) * surroundings).sum(dim=1) + self.bias


def infomax(
    discriminator: Discriminator, embedding: torch.Tensor, corrupted: torch.Tensor, around: torch.Tensor
) -> torch.Tensor:
    """Two terms of Deep Graph Infomax: a spot belongs to its surroundings, one of shuffled values does not; and back.

    Parameters
    ----------
    embedding, corrupted : (N, D)
        Of the spots, and of the same graph with its spots' values shuffled.
    around : (N, N) sparse
        Rows sum to 1: a spot and its neighbours. Their mean, of length 1 and through a sigmoid, is the surroundings.

    Returns
    -------
    Tensor, shape ()
        The sum of two mean binary cross entropies, of log(2) each where nothing is told apart.
    """
    loss = embedding.new_zeros(())
    for own, other in ((embedding, corrupted), (corrupted, embedding)):
        surroundings = torch.sigmoid(F.normalize(torch.sparse.mm(around, own), dim=1))
        belongs, does_not = discriminator(own, surroundings), discriminator(other, surroundings)
        loss = loss + (F.softplus(-belongs).mean() + F.softplus(does_not).mean()) / 2
    return loss


class GraphMix(nn.Module):
    """A convolution for each modality, the mix of both, and the ways back.

    Parameters
    ----------
    widths
        Of expression and, where there is one, the image.
    """

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(GraphConvolution(width, WIDTH) for width in widths)
        self.decoders = nn.ModuleList(GraphConvolution(WIDTH, width) for width in widths)
        self.discriminators = nn.ModuleList(Discriminator(WIDTH) for _ in widths)
        self.share = nn.Parameter(torch.tensor(0.5))  # of expression in the mix; free, as published

    def encode(self, values: list[torch.Tensor], graphs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of each modality (N, F) to (N, 32)."""
        parts = zip(self.encoders, values, graphs, strict=True)
        return [encoder(value, graph) for encoder, value, graph in parts]

    def decode(self, hidden: list[torch.Tensor], in_space: torch.Tensor) -> list[torch.Tensor]:
        """The modalities, (N, F) each, from the mix."""
        mixed = hidden[0] if len(hidden) == 1 else self.share * hidden[0] + (1 - self.share) * hidden[1]
        return [decoder(mixed, in_space) for decoder in self.decoders]


def reconstruct_modalities(
    expression: np.ndarray,
    image: np.ndarray | None,
    xy: np.ndarray,
    section: np.ndarray,
    *,
    seed: int = 0,
) -> tuple[list[np.ndarray], float]:
    """Expression and image as both and place together tell them: what domains are clusters of.

    Parameters
    ----------
    expression : (N, G)
        Measured or predicted.
    image : (N, F)
        Features or embeddings of the tiles; None: by expression and place alone.
    xy, section : (N, 2), (N,)

    Returns
    -------
    list of (N, G) and (N, F)
        Standardised; of expression alone without an image.
    float
        Share of expression in the learned mix; 1 without an image.
    """
    scaled = [standardised(expression), *([] if image is None else [standardised(image)])]
    width = min(COMPONENTS, *scaled[0].shape)
    alike = PCA(width, svd_solver="full" if width == min(scaled[0].shape) else "randomized", random_state=seed)
    neighbours = [nearest_graph(xy, section), nearest_graph(alike.fit_transform(scaled[0]))][: len(scaled)]
    graphs = [as_tensor(propagation(graph)) for graph in neighbours]
    around = [as_tensor(with_itself(graph)) for graph in neighbours]
    values = [torch.from_numpy(value.astype(np.float32)) for value in scaled]
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)
        mix = GraphMix([value.shape[1] for value in values])
        optimizer = torch.optim.Adam(mix.parameters(), lr=LR)
        for _ in range(EPOCHS):
            hidden = mix.encode(values, graphs)
            corrupted = mix.encode([value[torch.randperm(len(value))] for value in values], graphs)
            loss = torch.zeros(())
            for made, value in zip(mix.decode(hidden, graphs[0]), values, strict=True):
                loss = loss + RECONSTRUCTION * F.mse_loss(made, value)
            for at, discriminator in enumerate(mix.discriminators):
                assert isinstance(discriminator, Discriminator)
                loss = loss + infomax(discriminator, hidden[at].relu(), corrupted[at].relu(), around[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        decoded = mix.decode(mix.encode(values, graphs), graphs[0])
        return [each.numpy() for each in decoded], 1.0 if image is None else mix.share.item()


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1; constant ones 0."""
    values = np.asarray(values, dtype=np.float64)
    centred, spread = values - values.mean(axis=0), values.std(axis=0)
    return centred / np.where(spread > 1e-8 * (1 + np.abs(values).max(axis=0)), spread, np.inf)


def with_itself(graph: sp.csr_matrix) -> sp.csr_matrix:
    """Mean of a spot and its neighbours, as a matrix: rows sum to 1."""
    return rows_to_one(sp.csr_matrix(graph + sp.eye(graph.shape[0])))


def as_tensor(matrix: sp.csr_matrix) -> torch.Tensor:
    """A sparse matrix of scipy as one of torch, float32."""
    coo = matrix.tocoo()
    where = torch.from_numpy(np.stack(coo.coords).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float32))
    return torch.sparse_coo_tensor(where, values, coo.shape, check_invariants=True).coalesce()
