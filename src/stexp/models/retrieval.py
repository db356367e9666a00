"""Expression of a query tile from the reference spots whose embeddings are near."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch.nn import functional as F

from stexp.arguments import checked
from stexp.data.rows import Rows
from stexp.errors import InputError
from stexp.models.method import Prediction

Distance = Literal["cosine", "l1", "l2"]
Weighting = Literal["inverse_square", "softmax", "mean", "similarity"]
TEMPERATURE = 0.1  # of the weighting by similarity, which CHRep does not state
Reference = Annotated[str | int | list[str | int], Field(description="image, all or a list of sections")]


@dataclass
class Neighbours:
    """The k references retrieved for each of Q queries, by falling cosine similarity."""

    index: torch.Tensor  # (Q, k) rows of the reference
    distance: torch.Tensor  # (Q, k) in the distance asked for
    weight: torch.Tensor  # (Q, k), rows sum to 1

    def heaviest(self, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and weights of the n references that count most, (Q, min(n, k)); among equals the more similar."""
        weight, order = self.weight.sort(dim=1, descending=True, stable=True)
        return self.index.gather(1, order[:, :n]), weight[:, :n]


class ReferenceIndex:
    """Reference spots that can be searched by embedding.

    Parameters
    ----------
    embedding : (N, D)
        Spot embeddings; they stay on their device, where the search runs.
    section, patient : (N,)
        Where each reference comes from.

    Notes
    -----
    Search is exact and chunked over queries and references: beside the embeddings it holds `chunk` x
    `chunk_references` similarities and k candidates per query, whatever N is.
    """

    def __init__(self, embedding: torch.Tensor, section: np.ndarray, patient: np.ndarray) -> None:
        if not len(embedding) == len(section) == len(patient):
            raise ValueError(f"{len(embedding)} embeddings, {len(section)} sections, {len(patient)} patients")
        self.embedding = embedding.float()
        self.section = pd.Categorical(section)
        self.patient = pd.Categorical(patient)
        self._norm = self.embedding.norm(dim=1).clamp(min=1e-12)

    def __len__(self) -> int:
        return len(self.embedding)

    @checked()
    def search(
        self,
        query: torch.Tensor,
        k: int,
        distance: Distance = "l2",
        weighting: Weighting = "inverse_square",
        *,
        chunk: int = 1024,
        chunk_references: int = 65536,
    ) -> Neighbours:
        """Top k references by cosine similarity, weighted by their distance to the query.

        Parameters
        ----------
        query : (Q, D)
        k
            Neighbours per query, at most N.
        distance
            ``l1`` (published code) or ``l2`` (paper), between embeddings as they are; ``cosine``:
            1 - cosine similarity.
        weighting
            ``inverse_square``: 1 / d^2 (published); ``softmax``: exp(-d); ``mean``: all the same; ``similarity``:
            exp(cosine similarity / 0.1), whatever `distance` is (CHRep, temperature ours).

        Raises
        ------
        InputError
            k out of range, unknown distance or weighting.
        """
        how = {"chunk": chunk, "chunk_references": chunk_references}
        return self.search_for(query, [k], distance, weighting, **how)[k]

    def search_for(
        self,
        query: torch.Tensor,
        ks: Sequence[int],
        distance: Distance,
        weighting: Weighting,
        *,
        chunk: int = 1024,
        chunk_references: int = 65536,
    ) -> dict[int, Neighbours]:
        """`search` for several k, in one search for the most."""
        most = max(ks)
        if not 1 <= min(ks) <= most <= len(self):
            raise InputError(f"k={most}, but there are {len(self)} reference spots; choose 1 to {len(self)}")
        # a search in bf16 loses a tenth of the neighbours
        with torch.autocast(self.embedding.device.type, enabled=False):
            parts = [self._search(q, most, distance, chunk_references) for q in query.to(self.embedding).split(chunk)]
        index, similarity, d = (torch.cat(part) for part in zip(*parts, strict=True))
        weight = {k: _weights(d[:, :k], similarity[:, :k], weighting) for k in ks}
        return {k: Neighbours(index[:, :k], d[:, :k], weight[k]) for k in ks}

    def _search(self, query: torch.Tensor, k: int, distance: Distance, chunk: int) -> tuple[torch.Tensor, ...]:
        """Rows, cosine similarity and distance of the k most similar, (Q, k) each."""
        unit = F.normalize(query, dim=1)
        best, index = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        for start in range(0, len(self), chunk):
            part = slice(start, start + chunk)
            similarity = (unit @ self.embedding[part].T).div_(self._norm[part])
            value, where = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best, index = torch.cat([best, value], 1), torch.cat([index, where + start], 1)
            if best.shape[1] > k:
                best, order = best.topk(k, dim=1)
                index = index.gather(1, order)
        if distance == "cosine":
            return index, best, (1 - best).clamp(min=0)
        # few queries at a time: their k neighbours' embeddings are held at once, in a CPU best within its cache
        rows = max(1, (1 << (20 if query.device.type == "cpu" else 24)) // (k * query.shape[1]))
        p, d = 1 if distance == "l1" else 2, []
        for q, i in zip(query.split(rows), index.split(rows), strict=True):
            difference = self.embedding.index_select(0, i.reshape(-1)).view(*i.shape, -1).sub_(q[:, None])
            d.append(torch.linalg.vector_norm(difference, ord=p, dim=2))
        return index, best, torch.cat(d)

    def average(
        self, neighbours: Neighbours, expression: torch.Tensor | Rows, *, spread: bool = True, chunk_genes: int = 128
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weighted mean and standard deviation of the neighbours' expression.

        Parameters
        ----------
        expression : (N, G)
            Of the references, in their order: the panel, or any other genes measured in them. Of a table that is no
            tensor the rows of neighbours are taken.

        Returns
        -------
        mean, sd : (Q, G)
            `sd` is the weighted standard deviation among the neighbours; None without `spread`.
        """
        used, among = neighbours.index.unique(return_inverse=True)
        few = 2 * len(used) < len(expression)  # of many references most are nobody's neighbours
        if not isinstance(expression, torch.Tensor):
            made = torch.from_numpy(expression[used.cpu().numpy() if few else slice(None)])
            expression = made.to(neighbours.index.device)
        elif few:
            expression = expression[used.to(expression.device)]
        index = (among if few else neighbours.index).to(expression.device)
        weight = neighbours.weight.to(expression)
        means, deviations = [], []
        for values in expression.split(chunk_genes, dim=1):
            # centred on their mean, so that the difference of squares below keeps its digits
            centre = values.mean(dim=0)
            values = (values - centre).contiguous()
            mean = F.embedding_bag(index, values, per_sample_weights=weight, mode="sum")
            means.append(mean + centre)
            if spread:
                square = F.embedding_bag(index, values.square_(), per_sample_weights=weight, mode="sum")
                deviations.append((square - mean.square()).clamp_(min=0).sqrt_())
        return torch.cat(means, 1), torch.cat(deviations, 1) if spread else None

    def provenance(self, neighbours: Neighbours) -> pd.DataFrame:
        """Describe where the prediction of each query comes from.

        Returns
        -------
        DataFrame, Q rows
            ``neighbour_section`` and ``neighbour_patient``: those with the largest summed weight, and
            ``..._weight``, that sum; ``neighbour_distance``: weighted mean distance;
            ``neighbour_effective_k``: 1 / sum of squared weights, how many neighbours count.
        """
        index, weight = neighbours.index.cpu().numpy(), neighbours.weight.cpu().numpy()
        columns = {}
        for name, origin in (("section", self.section), ("patient", self.patient)):
            share = np.zeros((len(index), len(origin.categories)))
            np.add.at(share, (np.arange(len(index))[:, None], origin.codes[index]), weight)
            top = share.argmax(axis=1)
            columns[f"neighbour_{name}"] = origin.categories.to_numpy(str)[top]
            columns[f"neighbour_{name}_weight"] = share[np.arange(len(share)), top]
        columns["neighbour_distance"] = (weight * neighbours.distance.cpu().numpy()).sum(axis=1)
        columns["neighbour_effective_k"] = 1 / np.square(weight).sum(axis=1)
        return pd.DataFrame(columns)


def retrieve(
    index: ReferenceIndex,
    query: torch.Tensor,
    expression: torch.Tensor | Rows,
    k: int,
    distance: Distance,
    weighting: Weighting,
    *,
    spread: bool = True,
) -> Prediction:
    """Search, average and explain: the prediction of Q queries, without their embeddings.

    Parameters
    ----------
    expression : (N, G)
        Of the references.
    spread
        Also the standard deviation among the neighbours, the provenance of each query, and its heaviest neighbours.
    """
    neighbours = index.search(query, k, distance, weighting)
    mean, sd = index.average(neighbours, expression, spread=spread)
    if not spread:
        return Prediction(mean)
    rows, weights = neighbours.heaviest()
    return Prediction(
        mean, uncertainty=sd, obs=index.provenance(neighbours), neighbours=rows, neighbour_weights=weights
    )


def choose_references(spots: pd.DataFrame, which: Reference) -> np.ndarray:
    """Positions in `spots` (columns section, role) of the references to search.

    Parameters
    ----------
    which
        ``image``: sections that have an image; ``all``; or names of sections.

    Raises
    ------
    InputError
        A section that is unknown or not on the training side of the fold, or nothing chosen.
    """
    if which == "all":
        return np.arange(len(spots))
    if which == "image":
        chosen = spots["role"] != "reference"
    else:
        names = [str(name) for name in (which if isinstance(which, list | tuple) else [which])]
        on_training_side = list(spots["section"].unique())
        unknown = [name for name in names if name not in on_training_side]
        if unknown:
            raise InputError(
                f"reference {', '.join(map(str, unknown))} is not on the training side; choose image, all, "
                f"or of {', '.join(on_training_side)}"
            )
        chosen = spots["section"].isin(names)
    if not chosen.any():
        raise InputError(f"reference={which} leaves no spot to retrieve from")
    return np.flatnonzero(chosen)


def _weights(distance: torch.Tensor, similarity: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    if weighting == "similarity":
        return (similarity / TEMPERATURE).softmax(dim=1)
    if weighting == "mean":
        return torch.full_like(distance, 1 / distance.shape[1])
    if weighting == "softmax":
        return torch.softmax(-distance, dim=1)
    # relative to the nearest: the same weights, without overflow where a distance is near 0
    nearest = distance.min(dim=1, keepdim=True).values.clamp(min=1e-12)
    weight = (nearest / distance.clamp(min=1e-12)).square()
    return weight / weight.sum(dim=1, keepdim=True)
