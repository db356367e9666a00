"""Retrieve and correct: what an MLP adds to retrieved expression (after CHRep, arXiv 2604.21573, second phase)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stexp.evaluation.metrics import mean_pearson
from stexp.models.blocks import GeneHead
from stexp.models.losses import correlation_loss
from stexp.models.retrieval import Neighbours

# the paper states none of these
HIDDEN, DROPOUT = 256, 0.3
PENALTY = 1.0  # of the mean square of the residual
EPOCHS, BATCH, LR, WEIGHT_DECAY = 30, 128, 1e-3, 1e-3
AT_MOST = 50_000  # training spots: every so many-th where there are more

CORRECTION_EPOCHS = "correction_epochs"
"""Key of what was chosen: the epoch that a correction is left at."""


class Correction(nn.Module):
    """Image embedding to a residual of expression: nothing, until :func:`fit_correction`.

    Its weights are no part of the contrastive training: they ask for no gradient.
    """

    def __init__(self, n_dims: int, n_genes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(n_dims), nn.Linear(n_dims, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), GeneHead(HIDDEN, n_genes)
        )
        self.start_anew()
        self.requires_grad_(False)

    def start_anew(self) -> None:
        """Draw the weights, so that the residual is 0."""
        for layer in self.layers:
            if isinstance(layer, nn.LayerNorm | nn.Linear):
                layer.reset_parameters()
        head = self.layers[-1]
        assert isinstance(head, GeneHead)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, D) to what is added to their expression, (B, G) float32."""
        with torch.autocast(query.device.type, enabled=False):
            return self.layers(query.float())


@dataclass(frozen=True)
class Retrieved:
    """N spots and what is retrieved for them.

    Attributes
    ----------
    query : (N, D)
        Image embeddings.
    estimate : (N, G)
        Mean expression of their neighbours.
    target : (N, G)
        Their expression.
    section : (N,)
    """

    query: torch.Tensor
    estimate: torch.Tensor
    target: torch.Tensor
    section: np.ndarray


def without_itself(neighbours: Neighbours, own: torch.Tensor) -> Neighbours:
    """The same, one fewer: without the query's own reference, or without the last where that is not among them.

    Parameters
    ----------
    own : (Q,)
        Row of each query's own reference; -1: it has none.
    """
    dropped = neighbours.index == own[:, None]
    dropped[:, -1] |= ~dropped.any(dim=1)
    kept = [x[~dropped].view(len(own), -1) for x in (neighbours.index, neighbours.distance, neighbours.weight)]
    return Neighbours(kept[0], kept[1], kept[2] / kept[2].sum(dim=1, keepdim=True))


def fit_correction(correction: Correction, training: Retrieved, validation: Retrieved | None, seed: int) -> int:
    """Train the residual on what is retrieved for training spots, and leave it at its best epoch.

    Mean squared and absolute error and 1 - Pearson of the corrected expression, and a penalty on the mean square of the
    residual.

    Parameters
    ----------
    validation
        Spots on which an epoch is best; epoch 0 is no correction. None: the last epoch.

    Returns
    -------
    int
        The epoch it is left at.
    """
    devices = [training.query.device] if training.query.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        correction.start_anew()
        correction.requires_grad_(True)
        optimizer = torch.optim.AdamW(correction.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        best, best_score = 0, _score(correction, validation)
        state = {key: value.clone() for key, value in correction.state_dict().items()}
        for epoch in range(1, EPOCHS + 1):
            correction.train()
            for rows in torch.randperm(len(training.query)).split(BATCH):
                rows = rows.to(training.query.device)
                residual, target = correction(training.query[rows]), training.target[rows]
                predicted = training.estimate[rows] + residual
                error = predicted - target
                loss = error.square().mean() + error.abs().mean() + correlation_loss(predicted, target)
                optimizer.zero_grad()
                (loss + PENALTY * residual.square().mean()).backward()
                optimizer.step()
            score = _score(correction, validation)
            if validation is None or score > best_score:
                best, best_score = epoch, score
                state = {key: value.clone() for key, value in correction.state_dict().items()}
        correction.load_state_dict(state)
    correction.requires_grad_(False).eval()
    return best


@torch.no_grad()
def _score(correction: Correction, spots: Retrieved | None) -> float:
    if spots is None:
        return 0.0
    correction.eval()
    predicted = spots.estimate + correction(spots.query)
    return mean_pearson(spots.target.cpu().numpy(), predicted.cpu().numpy(), spots.section)
