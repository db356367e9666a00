"""A masked graph model: hidden expression is filled in from the spot's own image or genes and its neighbours'."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import nn
from torch.nn import functional as F

from stexp.completion.genes import a_fifth, within_section
from stexp.completion.tasks import Completed, GeneTask, SpotTask, error_per_gene, relative_error
from stexp.data.progress import track

NEIGHBOURS = 6
EPOCHS, LOOK_EVERY = 40, 5
COMPONENTS = 64
"""Principal components of features or genes that are read, and of genes that are written."""
DRAWS = 8
AT_ONCE, FOR_AXES = 512, 5000
"""Cells without places in a step; rows that principal axes are of."""


@dataclass(frozen=True)
class Neighbours:
    """Spots around each spot."""

    rows: torch.Tensor  # (N, k), k may be 0
    weights: torch.Tensor  # (N, k), rows sum to 1

    @classmethod
    def of(cls, xy: np.ndarray | None, n: int) -> Neighbours:
        """The nearest of each of n spots, itself not among them, all alike; none where there are no places."""
        k = 0 if xy is None else min(NEIGHBOURS, n - 1)
        if xy is None or k < 1:
            return cls(torch.empty(n, 0, dtype=torch.int64), torch.empty(n, 0))
        rows = torch.from_numpy(cKDTree(xy).query(xy, k=k + 1)[1][:, 1:].astype(np.int64))
        return cls(rows, torch.full((n, k), 1 / k))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D); 0 without neighbours."""
        return torch.einsum("nk,nkd->nd", self.weights, values[self.rows])


class MaskedGraph(nn.Module):
    """Layers that each add, to a spot, what an MLP makes of it and of the mean of its neighbours."""

    def __init__(self, n_in: int, n_out: int, dim: int = 128, depth: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        self.read = nn.Linear(n_in, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(dim, dim))
            for _ in range(depth)
        )
        last = nn.Linear(dim, n_out)
        nn.init.zeros_(last.weight)  # the mean, at first
        nn.init.zeros_(last.bias)
        self.write = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(dropout), last)

    def forward(self, x: torch.Tensor, neighbours: Neighbours) -> torch.Tensor:
        """(N, I) and the neighbours of each spot to (N, O)."""
        h = self.read(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            own = norm(h)
            h = h + layer(torch.cat([own, neighbours.mean(own)], dim=1))
        return self.write(h)


class FilledGraph(nn.Module):
    """A `MaskedGraph` beside a share, by component, of the weighted mean of the neighbours that show expression."""

    def __init__(self, n_given: int, n_components: int) -> None:
        super().__init__()
        self.graph = MaskedGraph(n_given + 2 * n_components + 1, n_components)
        self.share = nn.Parameter(torch.full((n_components,), 0.5))
        self.rate = nn.Parameter(torch.zeros(()))  # log of how fast neighbours count less with distance, per pitch

    def forward(self, section: _Section, kept: torch.Tensor) -> torch.Tensor:
        """Scores of all spots of a section, (N, C), from the expression of those `kept`."""
        flag = torch.zeros(len(section.given), 1)
        flag[kept] = 1
        rows, distance = section.nearest(kept)
        neighbours = Neighbours(rows, (-distance * self.rate.exp()).softmax(dim=1))
        around = neighbours.mean(section.scores)
        root = section.scores.shape[1] ** 0.5
        x = torch.cat([section.given, section.scores * flag / root, around / root, flag], dim=1)
        return self.share * around + self.graph(x, neighbours)


@dataclass(frozen=True)
class Components:
    """Principal components of standardised values."""

    mean: np.ndarray
    sd: np.ndarray
    axes: np.ndarray  # (C, G)

    @classmethod
    def of(cls, values: np.ndarray, most: int = COMPONENTS) -> Components:
        mean, sd = values.mean(axis=0), values.std(axis=0)
        sd = np.where(sd > 0, sd, 1)
        _, _, axes = np.linalg.svd((values - mean) / sd, full_matrices=False)
        return cls(mean, sd, axes[:most])

    def scores(self, values: np.ndarray) -> np.ndarray:
        return ((values - self.mean) / self.sd) @ self.axes.T


def _float(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


@dataclass(frozen=True)
class _Section:
    """Spots of a section: what is read of each besides expression, expression that may be read, and the truth."""

    given: torch.Tensor  # (N, I)
    scores: torch.Tensor  # (N, C), 0 where hidden
    truth: torch.Tensor  # (N, G), standardised
    measured: torch.Tensor  # rows
    xy: torch.Tensor  # (N, 2)

    def nearest(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the spots `kept` those nearest to each, itself not among them: rows and distances, (N, at most 6) each."""
        distance = torch.cdist(self.xy, self.xy[kept])
        distance[kept, torch.arange(len(kept))] = torch.inf
        nearest = distance.topk(min(NEIGHBOURS, len(kept) - 1), largest=False)
        return kept[nearest.indices], nearest.values


def masked_graph(task: SpotTask, epochs: int = EPOCHS) -> Completed:
    """Expression of hidden spots from their tiles, their neighbours' tiles, and their neighbours' expression.

    Trained on the shown spots and on other sections, of whose spots as many are masked, to give masked spots back; a
    fifth of the shown spots chooses when to stop.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        genes = Components.of(np.concatenate([task.expression, task.references]).astype(np.float64))
        own, others = _graphs(task, genes)
        axes = _float(genes.axes)
        model = FilledGraph(own.given.shape[1], len(axes))
        optimiser = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1)
        fold = torch.from_numpy(task.folds[0])
        validation, training = own.measured[fold], own.measured[~fold]
        share = float(task.shown.mean())

        def written(section: _Section, kept: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return model(section, kept)[at] @ axes

        def predict(kept: torch.Tensor, at: torch.Tensor) -> np.ndarray:
            model.eval()
            with torch.no_grad():
                return written(own, kept, at).double().numpy() * genes.sd + genes.mean

        best: tuple[float, dict, np.ndarray, int] | None = None
        for epoch in track(range(epochs + 1), epochs + 1, "masked graph model"):
            if epoch % LOOK_EVERY == 0 or epoch == epochs:
                held_out = np.full(task.expression.shape, np.nan)
                held_out[fold.numpy()] = predict(training, validation)
                error = relative_error(task, held_out)
                if best is None or error < best[0]:
                    best = error, copy.deepcopy(model.state_dict()), held_out, epoch
            model.train()
            for section in [*others, own]:
                among = training if section is own else section.measured
                order = among[torch.randperm(len(among))]
                # of the section itself half is masked, since most of it is hidden already
                n_kept = min(max(2, round((0.5 if section is own else share) * len(order))), len(order) - 1)
                masked = order[n_kept:]
                loss = F.mse_loss(written(section, order[:n_kept], masked), section.truth[masked])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        assert best is not None
        model.load_state_dict(best[1])
        hidden, n = torch.from_numpy(np.flatnonzero(~task.shown)), len(own.measured)
        mean = predict(own.measured, hidden)
        draws = [predict(own.measured[torch.randperm(n)[: max(2, round(0.8 * n))]], hidden) for _ in range(DRAWS)]
    error_of = error_per_gene(task.expression, best[2])
    return Completed(mean, np.sqrt(np.var(draws, axis=0) + error_of**2), best[2], {"epoch": best[3]})


def _graphs(task: SpotTask, genes: Components) -> tuple[_Section, list[_Section]]:
    """The section of a task, and the sections of its references."""
    seen = task.features if task.features is not None else np.zeros((len(task.xy), 0))
    others = task.reference_features if task.reference_features is not None else np.zeros((len(task.references), 0))
    components = Components.of(np.concatenate([seen, others]).astype(np.float64)) if seen.shape[1] else None

    def section(features: np.ndarray, expression: np.ndarray, shown: np.ndarray, xy: np.ndarray) -> _Section:
        scores = np.zeros((len(xy), len(genes.axes)))
        truth = np.zeros((len(xy), len(genes.mean)))
        scores[shown], truth[shown] = genes.scores(expression), (expression - genes.mean) / genes.sd
        given = components.scores(features) / len(components.axes) ** 0.5 if components else features
        return _Section(
            _float(given),
            _float(scores),
            _float(truth),
            torch.from_numpy(np.flatnonzero(shown)),
            _float(xy),
        )

    graphs = []
    for name in np.unique(task.reference_section):
        rows = task.reference_section == name
        every = np.ones(int(rows.sum()), dtype=bool)
        graphs.append(section(others[rows], task.references[rows], every, task.reference_xy[rows]))
    return section(seen, task.expression, task.shown, task.xy), [graph for graph in graphs if len(graph.measured) > 3]


def masked_genes(task: GeneTask, epochs: int = EPOCHS) -> Completed:
    """Hidden genes from the shown genes of a spot and of its neighbours, learned on the reference.

    A fifth of the shown genes is masked at random in every step. A fifth of the sections of the reference, or of its
    cells where it has one section alone, is left out and chooses when to stop.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        left_out = a_fifth(task)
        groups = _groups(task, left_out)
        hidden = _by_section(task.reference_hidden, task.reference_section)
        shown = _float(_by_section(task.reference_shown, task.reference_section))
        places = [None if task.reference_xy is None else task.reference_xy[rows] for rows in groups]
        neighbours = [Neighbours.of(xy, len(rows)) for xy, rows in zip(places, groups, strict=True)]
        axes = _float(Components.of(hidden[~left_out][:: max(1, len(hidden) // FOR_AXES)]).axes)
        own = _float(_standardised(task.expression))
        around = Neighbours.of(None if task.reference_xy is None else task.xy, len(own))
        scale = own.shape[1] ** -0.5
        model = MaskedGraph(own.shape[1], len(axes))
        optimiser = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0.1)

        def masked(values: torch.Tensor) -> torch.Tensor:
            return values * ((torch.rand(values.shape[1]) < 0.8).float() / 0.8)

        def predict(x: torch.Tensor, beside: Neighbours) -> np.ndarray:
            model.eval()
            with torch.no_grad():
                return (model(x * scale, beside) @ axes).double().numpy()

        judging = [i for i, rows in enumerate(groups) if left_out[rows[0]]]
        training = [i for i in range(len(groups)) if i not in judging]
        best: tuple[float, dict, np.ndarray, int] | None = None
        for epoch in track(range(epochs + 1), epochs + 1, "masked graph model of genes"):
            if epoch % LOOK_EVERY == 0 or epoch == epochs:
                rest = np.concatenate([predict(shown[groups[i]], neighbours[i]) - hidden[groups[i]] for i in judging])
                error = float(rest.var(axis=0).mean())
                if best is None or error < best[0]:
                    best = error, copy.deepcopy(model.state_dict()), np.sqrt(np.square(rest).mean(axis=0)), epoch
            model.train()
            for i in (training[j] for j in torch.randperm(len(training)).tolist()):
                written = model(masked(shown[groups[i]]) * scale, neighbours[i]) @ axes
                loss = F.mse_loss(written, _float(hidden[groups[i]]))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        assert best is not None
        model.load_state_dict(best[1])
        mean = predict(own, around)
        draws = [predict(masked(own), around) for _ in range(DRAWS)]
    spread = within_section(task.reference_hidden, task.reference_section).std(axis=0)
    sd = np.sqrt(np.var(draws, axis=0) + best[2] ** 2)
    nothing = np.full(task.expression.shape, np.nan)
    return Completed(task.reference_hidden.mean(axis=0) + mean * spread, sd * spread, nothing, {"epoch": best[3]})


def _groups(task: GeneTask, left_out: np.ndarray) -> list[np.ndarray]:
    """Rows of the reference that are read together: sections, or, of cells without places, a few hundred at a time."""
    rng = np.random.default_rng([task.seed, 24])
    groups = []
    for name in np.unique(task.reference_section):
        for side in (False, True):
            rows = np.flatnonzero((task.reference_section == name) & (left_out == side))
            if task.reference_xy is None:
                groups += np.array_split(rng.permutation(rows), -(-len(rows) // AT_ONCE)) if len(rows) else []
            elif len(rows):
                groups.append(rows)
    return groups


def _by_section(values: np.ndarray, section: np.ndarray) -> np.ndarray:
    """`_standardised` within every section, (R, G)."""
    out = np.empty(values.shape)
    for name in np.unique(section):
        out[section == name] = _standardised(values[section == name])
    return out


def _standardised(values: np.ndarray) -> np.ndarray:
    """Each gene of one section without its mean, in its standard deviations; 0 where it does not vary."""
    values = np.asarray(values, dtype=np.float64)
    sd = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(sd > 0, sd, 1)
