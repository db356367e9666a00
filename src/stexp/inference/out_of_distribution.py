"""Which tiles are unlike all that a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from stexp.data.splits import spatial_blocks

NEIGHBOURS = 10  # whose mean distance counts
LIMIT = 0.99  # percentile of the training's own distances beyond which a tile is strange: one in a hundred of them is
MOST = 20_000  # training tiles that are kept
SAME = 0.005  # distance below which two tiles are the same: float16 tells apart what is 0.001 from each other
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

    def share_of_same(self, embedding: np.ndarray) -> float:
        """Share of tiles (Q, D) that are training tiles themselves, as far as their embeddings show."""
        query = F.normalize(torch.from_numpy(embedding).float(), dim=1).half()
        # of length 1 to all digits again: the distance is small beside what float16 leaves of it
        query, known = (F.normalize(each.float(), dim=1) for each in (query, torch.from_numpy(self.embedding)))
        return float((_distance(query, known, 1) < SAME).mean())


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


def learn(
    embed: Callable[[np.ndarray], np.ndarray | None],
    spots: pd.DataFrame,
    xy_px: np.ndarray,
    training: np.ndarray,
    held_out: np.ndarray,
) -> tuple[KnownTiles, dict] | tuple[None, None]:
    """What training tiles look like to a method; None of methods without an embedding.

    Parameters
    ----------
    embed
        Rows of `spots` -> embeddings of their tiles (n, D), or None.
    spots
        Columns patient and section.
    xy_px : (N, 2)
        Of the spots.
    training, held_out
        Rows of spots that trained (or validated), and that did not.

    Returns
    -------
    KnownTiles
    dict
        ``spots`` that are kept; ``apart``: what a tile is not compared within (its patient, section or block);
        ``limit``; ``held_out_share``, of held-out tiles beyond it.
    """
    rows = training[:: max(1, math.ceil(len(training) / MOST))]
    embedding = embed(rows)
    if embedding is None:
        return None, None
    apart = next((name for name in ("patient", "section") if spots[name].iloc[rows].nunique() > 1), "block")
    groups = spatial_blocks(xy_px[rows], 4) if apart == "block" else spots[apart].iloc[rows].to_numpy(str)
    known = KnownTiles.of(embedding, groups)
    unseen = embed(held_out[:: max(1, math.ceil(len(held_out) / HELD_OUT))])
    assert unseen is not None  # a method embeds all tiles or none
    _, percentile = known.score(unseen)
    share = round(float((percentile > LIMIT).mean()), 4)
    return known, {"spots": len(rows), "apart": apart, "limit": LIMIT, "held_out_share": share}
