"""Which tiles are unlike all that a model was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from stexp.data.batches import SpotIndex
from stexp.data.splits import spatial_blocks

if TYPE_CHECKING:
    from stexp.inference.trained import TrainedMethod
    from stexp.runs.finished import Run

NEIGHBOURS = 10  # whose mean distance counts
LIMIT = 0.99  # percentile of the training's own distances beyond which a tile is strange: one in a hundred of them is
MOST = 20_000  # training tiles that are kept
HELD_OUT = 512  # held-out tiles on which false alarms are counted
AT_ONCE = 1024  # queries


@dataclass(frozen=True, eq=False)
class KnownTiles:
    """Embeddings of training tiles, and how far they lie from those of others.

    Parameters
    ----------
    embedding : (N, D) float16
        Of length 1.
    distance : (N,) float32
        Ascending; of every tile its mean Euclidean distance to the `k` nearest of other groups.
    k
    """

    embedding: np.ndarray
    distance: np.ndarray
    k: int

    @classmethod
    def of(cls, embedding: np.ndarray, groups: np.ndarray) -> KnownTiles:
        """Of embeddings (N, D), each tile compared to those of other groups (N,) than its own: patients, say.

        Notes
        -----
        Nearest neighbours among unit vectors as in Sun et al. 2022 (arXiv 2204.06507). A tile's own section is left
        out since a new slide has no neighbours of its own section either.
        """
        unit = F.normalize(torch.from_numpy(embedding).float(), dim=1).half()
        _, codes = np.unique(groups, return_inverse=True)
        k = min(NEIGHBOURS, len(codes) - int(np.bincount(codes).max()))
        own = _distance(unit, unit, k, codes)
        return cls(unit.numpy(), np.sort(own), k)

    def score(self, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance of tiles (Q, D) to the k nearest training tiles, and its percentile (0..1) among theirs, (Q,)."""
        query = F.normalize(torch.from_numpy(embedding).float(), dim=1).half()
        distance = _distance(query, torch.from_numpy(self.embedding), self.k)
        return distance, np.searchsorted(self.distance, distance, side="right") / len(self.distance)


@torch.inference_mode()
def _distance(query: torch.Tensor, known: torch.Tensor, k: int, groups: np.ndarray | None = None) -> np.ndarray:
    known, out = known.float(), []
    code = None if groups is None else torch.from_numpy(groups)
    for start in range(0, len(query), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        cosine = query[part].float() @ known.T
        if code is not None:
            cosine[code[part, None] == code[None]] = -torch.inf
        nearest = cosine.topk(k, dim=1).values
        out.append((2 - 2 * nearest).clamp(min=0).sqrt().mean(dim=1))
    return torch.cat(out).numpy()


def learn(source: Run, model: TrainedMethod, device: torch.device) -> tuple[KnownTiles, dict] | tuple[None, None]:
    """What a run's training and validation tiles look like to its method; None of methods without an embedding.

    Returns
    -------
    KnownTiles
    dict
        ``spots`` that are kept; ``apart``: what a tile is not compared within (its patient, section or block);
        ``limit``; ``held_out_share``, of held-out tiles beyond it.
    """
    spots = source.data.spots
    rows = source.data.rows("train", "validation")
    rows = rows[:: max(1, math.ceil(len(rows) / MOST))]
    embedding = _embed(source, model, rows, device)
    if embedding is None:
        return None, None
    apart = next((name for name in ("patient", "section") if spots[name].iloc[rows].nunique() > 1), "block")
    groups = spatial_blocks(source.data.xy_px[rows], 4) if apart == "block" else spots[apart].iloc[rows].to_numpy(str)
    known = KnownTiles.of(embedding, groups)
    test = source.data.rows("test")
    _, percentile = known.score(_embed(source, model, test[:: max(1, math.ceil(len(test) / HELD_OUT))], device))
    share = round(float((percentile > LIMIT).mean()), 4)
    return known, {"spots": len(rows), "apart": apart, "limit": LIMIT, "held_out_share": share}


def _embed(source: Run, model: TrainedMethod, rows: np.ndarray, device: torch.device) -> np.ndarray | None:
    made = []
    for part in np.array_split(rows, math.ceil(len(rows) / 64)):
        batch = source.data.batch(SpotIndex(torch.from_numpy(part), image=False))
        out = model.encode(source.data.tiles(part, device), batch.xy_um, batch.array_xy)
        if "image_embedding" not in out:
            return None
        made.append(out["image_embedding"].cpu().numpy())
    return np.concatenate(made)
