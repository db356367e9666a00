"""Consensus: ridges and nearest neighbours on frozen features agree on an expression of low rank.

A method of this project. All of it is one calculation; what is open is chosen on spots that the members did not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from stexp.arguments import Count, NotNegative, Positive, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.features import TileEncoder
from stexp.errors import InputError
from stexp.models.choice import choose
from stexp.models.closed_form import LEARNT_FROM, ClosedForm
from stexp.models.low_rank import Components, Fitted, Members, project, reference_rows, smooth_blocks
from stexp.models.method import Prediction
from stexp.models.retrieval import ReferenceIndex
from stexp.models.table import AT_ONCE, Table

AT_MOST = 8192
"""Spots on which is chosen what is open: compact blocks of each section where there are more.

There are then fewer references, too, than when all are searched, so that few neighbours may be given too little weight.
"""


@dataclass(frozen=True)
class Readout:
    """From scores of expression (R) to genes.

    Parameters
    ----------
    mean : (G,)
    loadings : (R, G)
        Tapered: each component by the share of the ranks that have it.
    """

    mean: torch.Tensor
    loadings: torch.Tensor


@dataclass(frozen=True)
class Gallery:
    """References that have names, and their scores of expression (N, R)."""

    index: ReferenceIndex
    scores: torch.Tensor


class Consensus(ClosedForm):
    """Expression of low rank from the mean of ridges and nearest neighbours, smoothed over the section.

    Frozen features of several views of a tile, standardised, are reduced to principal components, the embedding.
    Expression is reduced to its first principal components, the scores. Ridges of several penalties, and means over
    several numbers of neighbours, predict the scores from the embedding; their mean is smoothed over the section and
    taken back to genes by several ranks, which are averaged: the first components count in all of them. The spread of
    the members is the uncertainty.

    The radius of the smoothing and the scale of the whole are learned on training and validation spots, each predicted
    by members, embedding and scores that were fitted without its patient (of three or more), else without its section,
    else without its block of the only section: the radius has the best Pearson correlation; the scale is a
    least-squares slope. Weights of the members can be learned there too, to fit the scores; equal ones did as well on
    HER2+ and nearly as well on a mouse colon.

    A gene outside the panel that the references measure is predicted from the same scores: its loadings are least
    squares of its expression in the references on their scores, tapered as those of the panel are, which this gives
    for a gene of the panel.

    Spots to learn from are read in blocks; components, ridges and scores of many take time as their number and memory
    as a block. What is open is chosen on about 8192 of them, and about 65,000 are searched at most.

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
        In equal weights of the members, as many times as in those that fit spots left out best; None: equal ones.
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
        trust: Positive | None = None,
    ) -> None:
        super().__init__()
        if not ranks or not (penalties or neighbours):
            name = "penalties=[] and model.neighbours" if ranks else "ranks"
            raise InputError(f"model.{name}=[]: one number at least would fit")
        self.n_components, self.penalties, self.neighbours = n_components, penalties, neighbours
        self.ranks, self.radii_um, self.trust = ranks, sorted({0.0, *map(float, radii_um)}), trust
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
        choice = choose(table.thinned(AT_MOST), self.fit_members, self.radii_um, self.trust)
        fitted = self.fit_members(table)
        learned = {name: getattr(fitted.members, name) for name in ("slopes", "intercepts", "reference", "scores")}
        learned |= {"centre": fitted.space.centre, "axes": fitted.space.axes, "mean": fitted.expression.centre}
        learned |= {"loadings": fitted.loadings, "weights": torch.from_numpy(choice.weights)}
        learned["chosen"] = torch.tensor([choice.radius_um, choice.scale, choice.pearson])
        self.load_state_dict({name: value.float().contiguous() for name, value in learned.items()})

    def taper(self, n: int) -> torch.Tensor:
        """Share of the ranks that have each of n components, (n, 1)."""
        return (torch.tensor(self.ranks) > torch.arange(n)[:, None]).float().mean(dim=1, keepdim=True)

    def fit_members(self, table: Table) -> Fitted:
        """The embedding, the scores of expression, and the members, from some spots."""
        space = Components.fit(lambda: table.blocks(table.features), self.n_components, standardise=True)
        expression = Components.fit(lambda: table.blocks(table.expression), max(self.ranks))
        both = zip(table.blocks(table.features), table.blocks(table.expression), strict=True)
        parts = ((space(torch.from_numpy(x)), expression(torch.from_numpy(y))) for x, y in both)
        members = Members.fit(parts, len(table), self.penalties, self.neighbours)
        loadings = expression.axes.T * self.taper(expression.axes.shape[1])
        return Fitted(space, expression, members, loadings)

    def tune(self, data: SpotDataModule) -> dict:
        """What was chosen on spots that were left out."""
        radius, scale, pearson = self.chosen.tolist()
        n = len(self.reference)
        names = [f"ridge {penalty:g}" for penalty in self.penalties] + [f"{k} neighbours" for k in self.neighbours]
        return {
            "radius_um": round(radius, 3),
            "weights": dict(zip(names, [round(weight, 4) for weight in self.weights.tolist()], strict=True)),
            "scale": round(scale, 4),
            "out_of_fold_pearson": round(pearson, 4),
            "searched": n,
        }

    # predict

    @property
    def members(self) -> Members:
        """As they were fitted."""
        return Members(self.slopes, self.intercepts, self.reference, self.scores, self.neighbours)

    @property
    def readout(self) -> Readout:
        """Of the panel."""
        return Readout(self.mean, self.loadings)

    def readout_of(self, expression: torch.Tensor, scores: torch.Tensor | None = None) -> Readout:
        """Of other genes, from their expression in references (N, G') and `scores` of these; None: of all."""
        scores = self.scores if scores is None else scores
        mean, slopes = project(scores.cpu(), expression)
        return Readout(mean.to(self.mean), (slopes * self.taper(len(slopes))).to(self.mean))

    def scores_of(self, expression: torch.Tensor, genes: slice = slice(None)) -> torch.Tensor:
        """Scores (N, R) of expression of the panel; of some `genes` of it (N, G'), what they add to the scores."""
        axes = self.loadings[:, genes] / self.taper(len(self.loadings)).to(self.loadings)
        return (expression.to(self.mean) - self.mean[genes]) @ axes.T

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Frozen features of tiles (B, F) to embeddings (B, D)."""
        return Components(self.centre, self.axes)(features)

    @torch.no_grad()
    def predict_together(
        self,
        embedding: torch.Tensor,
        xy_um: torch.Tensor,
        readout: Readout | None = None,
        gallery: Gallery | None = None,
    ) -> Prediction:
        """Expression of all spots of one section or slide, its spread, and the references behind it.

        Parameters
        ----------
        embedding : (Q, D)
        xy_um : (Q, 2)
            NaN where the scale is not known; then nothing is smoothed.
        readout
            Of the genes to predict; None: of the panel.
        gallery
            References to search, and their names; None: those it was fitted to, which it does not name.

        Returns
        -------
        Prediction
            References are those of the means over neighbours, by the weights that they have in them; none where those
            means have no weight.
        """
        readout = readout or self.readout
        members = self.members
        if gallery is not None:
            members = replace(members, reference=gallery.index.embedding, scores=gallery.scores)
        values, of_neighbours = self._remember(members, embedding, gallery)
        xy = xy_um.cpu().numpy().astype(np.float64)
        radius, scale = self.chosen[:2].tolist()
        shape = len(values), readout.loadings.shape[1]
        predicted, uncertainty = self.mean.new_empty(shape), self.mean.new_empty(shape)
        for rows, smoothed in smooth_blocks(values, xy, radius if np.isfinite(xy).all() else 0.0):
            of_members = scale * torch.from_numpy(smoothed).to(self.mean).view(len(smoothed), len(self.weights), -1)
            agreed = torch.einsum("m,qmr->qr", self.weights, of_members)
            torch.addmm(readout.mean, agreed, readout.loadings, out=predicted[rows])
            uncertainty[rows] = self._spread((of_members - agreed[:, None]).unbind(dim=1), readout.loadings)
        return replace(of_neighbours, predicted=predicted, uncertainty=uncertainty, image_embedding=embedding)

    def _remember(
        self, members: Members, embedding: torch.Tensor, gallery: Gallery | None
    ) -> tuple[np.ndarray, Prediction]:
        """Scores of the members (Q, M * R), and of the references behind them what a prediction says, block by block.

        Of many spots neighbours would take more memory than all else, so that few numbers of them are kept.
        """
        share = members.share_of_neighbours(self.weights)
        values = np.empty((len(embedding), len(self.weights) * members.scores.shape[1]), dtype=np.float32)
        obs, heaviest, start = [], [], 0
        for scores, nearest in members.blocks(embedding.to(self.reference)):
            n = scores.shape[1]
            values[start : start + n] = scores.permute(1, 0, 2).reshape(n, -1).cpu().numpy()
            start += n
            if share is None:
                continue
            nearest = replace(nearest, weight=share.to(self.mean).expand_as(nearest.distance))
            if gallery is not None:
                obs.append(gallery.index.provenance(nearest))
                heaviest.append(nearest.heaviest())
                continue
            columns = {
                "neighbour_distance": (nearest.weight * nearest.distance).sum(dim=1).cpu().numpy(),
                "neighbour_effective_k": (1 / nearest.weight.square().sum(dim=1)).cpu().numpy(),
            }
            obs.append(pd.DataFrame(columns))
        which, weights = (torch.cat(each) for each in zip(*heaviest, strict=True)) if heaviest else (None, None)
        told = pd.concat(obs, ignore_index=True) if obs else None
        return values, Prediction(self.mean.new_empty(0), obs=told, neighbours=which, neighbour_weights=weights)

    def _spread(self, apart: Iterable[torch.Tensor], loadings: torch.Tensor) -> torch.Tensor:
        """Standard deviation among members of every gene (q, G), from how far apart the scores of each (q, R) are."""
        variance = torch.zeros((), device=loadings.device)
        for weight, scores in zip(self.weights, apart, strict=True):
            variance = variance + weight * (scores @ loadings).square_()
        return variance.sqrt()

    def on_validation_start(self) -> None:
        self.predict_spots(self.data, "validation")

    def on_predict_start(self) -> None:
        self.predict_spots(self.data, "test")

    @torch.no_grad()
    def predict_spots(self, data: SpotDataModule, role: str) -> None:
        """Predict all spots of a role, section by section, for `predict_step` to look up."""
        rows = data.rows(role)
        if not len(rows):
            return
        learnt = data.rows(*LEARNT_FROM)
        searched = learnt[reference_rows(len(learnt))]
        origin = data.spots.iloc[searched]
        index = ReferenceIndex(self.reference, origin["section"].to_numpy(str), origin["patient"].to_numpy(str))
        gallery, section, parts = Gallery(index, self.scores), data.spots["section"].to_numpy(str), []
        for name in data.names(role):
            own = rows[section[rows] == name]
            blocks = np.array_split(own, -(-len(own) // AT_ONCE))
            features = (torch.from_numpy(data.tile_features[block]).to(self.mean) for block in blocks)
            embedding = torch.cat([self.embed_features(block) for block in features])
            made = self.predict_together(embedding, torch.from_numpy(data.xy_um[own]), gallery=gallery)
            if made.neighbours is not None:
                made = replace(made, neighbours=torch.from_numpy(searched)[made.neighbours.cpu()])
            parts.append(made)
        self._of_spots = Prediction.concatenate(parts)
        self._place = torch.full((len(data.spots),), -1)
        self._place[torch.from_numpy(rows)] = torch.arange(len(rows))

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G) and what else is known of it, as predicted with the rest of the section."""
        assert self._of_spots is not None  # whatever predicts begins with all spots
        return self._of_spots.take(self._place[batch.spot.cpu()])
