"""Consensus: ridges and nearest neighbours on frozen features agree on an expression of low rank.

A method of this project. All of it is one calculation; what is open is chosen on spots that the members did not see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls

from stexp.arguments import Count, NotNegative, Positive, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.features import TileEncoder
from stexp.errors import InputError
from stexp.evaluation.metrics import mean_pearson
from stexp.models.closed_form import LEARNT_FROM, ClosedForm
from stexp.models.low_rank import Components, Members, smooth
from stexp.models.method import Prediction
from stexp.models.retrieval import Neighbours, ReferenceIndex
from stexp.models.table import Table

AT_MOST = 8192
"""Spots on which is chosen what is open: compact blocks of each section where there are more.

There are then fewer references, too, than when all are searched, so that few neighbours may be given too little weight.
"""
AT_ONCE = 4096  # spots whose spread over all genes is computed at once


class Consensus(ClosedForm):
    """Expression of low rank from a weighted mean of ridges and nearest neighbours, smoothed over the section.

    Frozen features of several views of a tile, standardised, are reduced to principal components, the embedding.
    Expression is reduced to its first principal components, the scores. Ridges of several penalties, and means over
    several numbers of neighbours, predict the scores from the embedding; their weighted mean is smoothed over the
    section and taken back to genes by several ranks, which are averaged: the first components count in all of them. The
    spread of the members is the uncertainty.

    Weights of the members, the radius of the smoothing and the scale of the whole are learned on training and
    validation spots, each predicted by members, embedding and scores that were fitted without its patient (of three or
    more), else without its section, else without its block of the only section. Weights fit the scores, and are drawn
    to equal ones; the radius has the best Pearson correlation; the scale is a least-squares slope.

    Parameters
    ----------
    n_genes, n_features
        G and F; they come from the data and the image encoder.
    scales, turns
        Views of a tile; the data and the image encoder read them here, see
        :class:`~stexp.models.encoders.image.ImageEncoder`.
    n_components
        D, of the embedding.
    penalties
        Of the ridges, in mean eigenvalues of the covariance of the embedding; an empty list: no ridges.
    neighbours
        k of the means over neighbours, by cosine; an empty list: none.
    ranks
        Of the expression, averaged: a component counts by the share of them that have it.
    radii_um
        Standard deviations of the Gaussian that smooths, in micrometres, to choose from. Where a section's scale is
        not known, nothing is smoothed.
    trust
        In equal weights of the members, as many times as in those that fit spots left out best.
    """

    together = True
    centre: torch.Tensor  # (F,)
    axes: torch.Tensor  # (F, D)
    slopes: torch.Tensor  # (P, D, R)
    intercepts: torch.Tensor  # (P, R)
    reference: torch.Tensor  # (N, D)
    scores: torch.Tensor  # (N, R)
    mean: torch.Tensor  # (G,)
    loadings: torch.Tensor  # (R, G)
    weights: torch.Tensor  # (M,), of ridges and means over neighbours; they add up to 1
    chosen: torch.Tensor  # (3,): radius in micrometres, scale, and the correlation with spots left out

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_features: int,
        *,
        scales: list[Positive] | tuple[Positive, ...] | None = (0.5, 1, 2),
        turns: Literal[1, 2, 4] = 2,
        n_components: Width = 128,
        penalties: list[Positive] | tuple[Positive, ...] = (1, 3, 10, 30),
        neighbours: list[Count] | tuple[Count, ...] = (10, 25, 50, 100),
        ranks: list[Count] | tuple[Count, ...] = (1, 2, 3, 5, 8, 12, 20, 32),
        radii_um: list[NotNegative] | tuple[NotNegative, ...] = (0, 50, 75, 100, 150, 200, 300),
        trust: Positive = 1.0,
    ) -> None:
        super().__init__()
        if not ranks or not (penalties or neighbours):
            name = "penalties=[] and model.neighbours" if ranks else "ranks"
            raise InputError(f"model.{name}=[]: one number at least would fit")
        self.n_components, self.penalties, self.neighbours = n_components, penalties, neighbours
        self.ranks, self.radii_um, self.trust = ranks, sorted({0.0, *map(float, radii_um)}), float(trust)
        n_members = len(penalties) + len(neighbours)
        for name, shape in (
            ("centre", (n_features,)),
            ("axes", (n_features, 0)),
            ("slopes", (len(penalties), 0, 0)),
            ("intercepts", (len(penalties), 0)),
            ("reference", (0, 0)),
            ("scores", (0, 0)),
            ("mean", (n_genes,)),
            ("loadings", (0, n_genes)),
            ("weights", (n_members,)),
            ("chosen", (3,)),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self._of_spots: Prediction | None = None
        self._place = torch.empty(0, dtype=torch.int64)  # of each spot of the data among those of `_of_spots`

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take what was learned, of as many references, dimensions and components as there were."""
        for name, value in state_dict.items():
            if name in self._buffers:
                self.register_buffer(name, torch.empty_like(value, device=self.mean.device))
        return super().load_state_dict(state_dict, strict, assign)

    def reads_features_of(self, encoder: TileEncoder) -> bool:
        """Features of any frozen encoder are all that is read of a tile."""
        return True

    # fit

    def fit_to(self, data: SpotDataModule) -> None:
        """Choose on spots that are left out in turn, then fit to all."""
        self.fit_table(Table.of(data, data.rows(*LEARNT_FROM)))

    def fit_table(self, table: Table) -> None:
        """`fit_to` spots in a table."""
        choice = choose(table.thinned(AT_MOST), self)
        space, expression, members = self.fit_members(table)
        learned = {name: getattr(members, name) for name in ("slopes", "intercepts", "reference", "scores")}
        learned |= {"centre": space.centre, "axes": space.axes, "mean": expression.centre}
        learned |= {"loadings": self.loadings_of(expression), "weights": torch.from_numpy(choice.weights)}
        learned["chosen"] = torch.tensor([choice.radius_um, choice.scale, choice.pearson])
        self.load_state_dict({name: value.float().contiguous() for name, value in learned.items()})

    def loadings_of(self, expression: Components) -> torch.Tensor:
        """Genes' loadings on the scores (R, G), each component by the share of the ranks that have it."""
        loadings, ranks = expression.axes.T, torch.tensor(self.ranks)
        return loadings * (ranks > torch.arange(len(loadings))[:, None]).float().mean(dim=1, keepdim=True)

    def fit_members(self, table: Table) -> tuple[Components, Components, Members]:
        """The embedding, the scores of expression, and the members, from some spots."""
        space = Components.fit(table.features, self.n_components, standardise=True)
        expression = Components.fit(table.expression, max(self.ranks))
        z, scores = space(torch.from_numpy(table.features)), expression(torch.from_numpy(table.expression))
        return space, expression, Members.fit(z, scores, self.penalties, self.neighbours)

    def tune(self, data: SpotDataModule) -> dict:
        """What was chosen on spots that were left out."""
        radius, scale, pearson = self.chosen.tolist()
        names = [f"ridge {penalty:g}" for penalty in self.penalties] + [f"{k} neighbours" for k in self.neighbours]
        return {
            "radius_um": round(radius, 3),
            "weights": dict(zip(names, [round(weight, 4) for weight in self.weights.tolist()], strict=True)),
            "scale": round(scale, 4),
            "out_of_fold_pearson": round(pearson, 4),
        }

    # predict

    @property
    def members(self) -> Members:
        """As they were fitted."""
        return Members(self.slopes, self.intercepts, self.reference, self.scores, self.neighbours)

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Frozen features of tiles (B, F) to embeddings (B, D)."""
        return Components(self.centre, self.axes)(features)

    @torch.no_grad()
    def predict_together(self, embedding: torch.Tensor, xy_um: torch.Tensor) -> Prediction:
        """Expression of all spots of one section or slide, its spread, and how near and many its references are.

        Parameters
        ----------
        embedding : (Q, D)
        xy_um : (Q, 2)
            NaN where the scale is not known; then nothing is smoothed.
        """
        made, nearest = self._agree(embedding, xy_um)
        if nearest is None:
            return made
        columns = {
            "neighbour_distance": (nearest.weight * nearest.distance).sum(dim=1).cpu().numpy(),
            "neighbour_effective_k": (1 / nearest.weight.square().sum(dim=1)).cpu().numpy(),
        }
        return replace(made, obs=pd.DataFrame(columns))

    def _agree(self, embedding: torch.Tensor, xy_um: torch.Tensor) -> tuple[Prediction, Neighbours | None]:
        """Prediction of a section's spots, and the references behind its retrieved part with their weights in it.

        None where means over neighbours have no weight: no reference is behind the prediction.
        """
        members, nearest = self.members(embedding.to(self.reference))
        n, n_spots, rank = members.shape
        xy = xy_um.cpu().numpy().astype(np.float64)
        radius, scale = self.chosen[:2].tolist()
        values = members.permute(1, 0, 2).reshape(n_spots, -1).cpu().numpy()
        smoothed = smooth(values, xy, radius if np.isfinite(xy).all() else 0.0)
        members = scale * torch.from_numpy(smoothed).to(self.mean).view(n_spots, n, rank).permute(1, 0, 2)
        agreed = torch.einsum("m,mqr->qr", self.weights, members)
        made = Prediction(
            torch.addmm(self.mean, agreed, self.loadings),
            uncertainty=torch.cat([self._spread(part) for part in (members - agreed).split(AT_ONCE, dim=1)]),
            image_embedding=embedding,
        )
        share = self.members.share_of_neighbours(self.weights)
        if share is None:
            return made, None
        return made, replace(nearest, weight=share.to(self.mean).expand_as(nearest.distance))

    def _spread(self, apart: torch.Tensor) -> torch.Tensor:
        """Standard deviation among members of every gene (Q, G), from how far apart their scores (M, Q, R) are."""
        variance = apart.new_zeros(apart.shape[1], self.loadings.shape[1])
        for weight, scores in zip(self.weights, apart, strict=True):
            of_genes = scores @ self.loadings
            variance.addcmul_(of_genes, of_genes, value=float(weight))
        return variance.sqrt_()

    def on_validation_start(self) -> None:
        self.predict_spots(self.data, "validation")

    def on_predict_start(self) -> None:
        self.predict_spots(self.data, "test")

    @torch.no_grad()
    def predict_spots(self, data: SpotDataModule, role: str) -> None:
        """Predict all spots of a role, section by section, for `predict_step` to look up."""
        rows, learnt = data.rows(role), data.rows(*LEARNT_FROM)
        if not len(rows):
            return
        section = data.spots["section"].to_numpy(str)
        origin = data.spots.iloc[learnt]
        index = ReferenceIndex(self.reference, origin["section"].to_numpy(str), origin["patient"].to_numpy(str))
        parts = []
        for name in data.names(role):
            own = rows[section[rows] == name]
            features = torch.from_numpy(data.tile_features[own]).to(self.mean)
            made, nearest = self._agree(self.embed_features(features), torch.from_numpy(data.xy_um[own]))
            if nearest is not None:
                heaviest, weight = nearest.heaviest()
                named = {"neighbours": torch.from_numpy(learnt)[heaviest.cpu()], "neighbour_weights": weight}
                made = replace(made, obs=index.provenance(nearest), **named)
            parts.append(made)
        self._of_spots = Prediction.concatenate(parts)
        self._place = torch.full((len(data.spots),), -1)
        self._place[torch.from_numpy(rows)] = torch.arange(len(rows))

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G) and what else is known of it, as predicted with the rest of the section."""
        assert self._of_spots is not None  # whatever predicts begins with all spots
        return self._of_spots.take(self._place[batch.spot.cpu()])


# what is open, chosen on spots that are left out


@dataclass(frozen=True)
class Choice:
    """What is learned on spots that were left out; see :class:`Consensus`."""

    weights: np.ndarray  # (M,)
    radius_um: float
    scale: float
    pearson: float


@dataclass(frozen=True)
class LeftOut:
    """A group of spots, as members see it that were fitted to the others."""

    rows: np.ndarray  # (n,) of the table
    mean: np.ndarray  # (G,)
    loadings: np.ndarray  # (R, G), tapered
    members: np.ndarray  # (M, n, R)
    scores: np.ndarray  # (n, R), as measured


def leave_out(table: Table, method: Consensus) -> Iterator[LeftOut]:
    """Each group of spots in turn."""
    for group in np.unique(table.group):
        rows = np.flatnonzero(table.group == group)
        space, expression, members = method.fit_members(table.take(np.flatnonzero(table.group != group)))
        seen, _ = members(space(torch.from_numpy(table.features[rows])))
        scores = expression(torch.from_numpy(table.expression[rows]))
        yield LeftOut(
            rows, *(value.numpy() for value in (expression.centre, method.loadings_of(expression), seen, scores))
        )


def choose(table: Table, method: Consensus) -> Choice:
    """Weights, radius and scale; see :class:`Consensus`."""
    parts = list(leave_out(table, method))
    weights = fit_weights(parts, method.trust)
    # a block is judged by itself: that it differs from the other blocks is no merit
    unit = np.char.add(np.char.add(table.section, " "), table.group)
    mean, added = np.empty_like(table.expression), np.empty_like(table.expression)
    for part in parts:
        mean[part.rows] = part.mean
        added[part.rows] = np.tensordot(weights, part.members, 1) @ part.loadings

    best, radius, smoothed = -np.inf, 0.0, added
    for each in method.radii_um if np.isfinite(table.xy_um).all() else [0.0]:
        values = _smooth_sections(table, added, each)
        score = round(mean_pearson(table.expression, mean + values, unit), 4)
        if score > best:  # ties: the smaller
            best, radius, smoothed = score, each, values
    slope = float(((table.expression - mean) * smoothed).sum() / max(np.square(smoothed).sum(), 1e-12))
    return Choice(weights, radius, max(slope, 0.0), best)


def fit_weights(parts: list[LeftOut], trust: float) -> np.ndarray:
    """Weights of the members (M,), at least 0 and 1 together.

    They are least squares of the scores of spots left out, with a penalty on the distance from equal weights that
    counts `trust` times as much as the members themselves do on average.
    """
    n = len(parts[0].members)
    gram, product = np.zeros((n, n)), np.zeros(n)
    for part in parts:
        members = part.members.reshape(n, -1).astype(np.float64)
        gram += members @ members.T
        product += members @ part.scores.ravel()
    equal = max(product.sum() / max(gram.sum(), 1e-12), 0.0)
    penalty = max(trust * np.trace(gram) / n, 1e-12)
    root = np.linalg.cholesky(gram + penalty * np.eye(n))
    weights, _ = nnls(root.T, np.linalg.solve(root, product + penalty * equal))
    return weights / weights.sum() if weights.sum() > 0 else np.full(n, 1 / n)


def _smooth_sections(table: Table, values: np.ndarray, radius: float) -> np.ndarray:
    out = np.empty_like(values)
    for name in np.unique(table.section):
        rows = table.section == name
        out[rows] = smooth(values[rows], table.xy_um[rows].astype(np.float64), radius)
    return out
