"""A small Transformer on the section's own grid, after stEnTrans (github.com/shuailinxue/stEnTrans)."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from stexp.completion.tasks import Completed, SpotTask, error_per_gene, relative_error
from stexp.data.progress import track

STEPS, LOOK_EVERY = 300, 100
GENES = 32
"""Maps of a step."""
PATCH = 4
"""Cells of a token's side."""
DRAWS = 4
"""Predictions, each from another placing on the canvas."""


class GridTransformer(nn.Module):
    """Maps of single genes, known at some cells, to all cells of a square canvas.

    Parameters
    ----------
    side
        Cells of the canvas, a multiple of `patch`.
    patch
        Cells of a token's side.
    """

    def __init__(self, side: int, patch: int = PATCH, dim: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patch, self.n = patch, side // patch
        self.read = nn.Linear(2 * patch**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(self.n**2, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.write = nn.Linear(dim, patch**2)
        nn.init.zeros_(self.write.weight)  # the mean of what is shown, at first
        nn.init.zeros_(self.write.bias)

    def forward(self, values: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Values (B, side, side), 0 where they are not `given` (side, side), to (B, side, side)."""
        p, n = self.patch, self.n
        both = torch.stack([values, given.expand_as(values)], dim=1)
        patches = both.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        written = self.write(self.blocks(self.read(patches) + self.position))
        return written.view(len(values), n, n, p, p).permute(0, 1, 3, 2, 4).reshape(len(values), n * p, n * p)


class GridMaps:
    """The maps of all genes of a task on its grid, standardised by what is shown."""

    def __init__(self, task: SpotTask) -> None:
        self.xy = torch.from_numpy(task.array_xy - task.array_xy.min(axis=0))
        self.extent = int(self.xy.max()) + 1
        self.side = -(-(self.extent + PATCH) // PATCH) * PATCH
        self.shown = torch.from_numpy(np.flatnonzero(task.shown))
        self.mean, self.sd = task.expression.mean(axis=0), task.expression.std(axis=0)
        self.sd = np.where(self.sd > 0, self.sd, 1)
        self.values = torch.from_numpy(((task.expression - self.mean) / self.sd).T.astype(np.float32))

    def placed(self, generator: torch.Generator) -> torch.Tensor:
        """Cells of all spots on the canvas, (N,): turned, mirrored and moved by chance.

        Cells of hidden spots have no truth to learn from; since every cell of the canvas is a shown spot's now and
        then, the network cannot but learn what holds everywhere.
        """
        swap, *mirror = torch.randint(2, (3,), generator=generator).tolist()
        xy = self.xy.flip(1) if swap else self.xy
        xy = torch.stack([self.extent - 1 - own if flip else own for own, flip in zip(xy.T, mirror, strict=True)], 1)
        xy = xy + torch.randint(self.side - self.extent + 1, (2,), generator=generator)
        return xy[:, 1] * self.side + xy[:, 0]

    def drawn(self, genes: torch.Tensor, spots: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps (B, side, side) of some genes, with some of the shown spots (positions among them); and where."""
        at = cells[self.shown[spots]]
        maps = torch.zeros(len(genes), self.side**2)
        maps[:, at] = self.values[genes][:, spots]
        given = torch.zeros(self.side**2)
        given[at] = 1
        return maps.view(-1, self.side, self.side), given.view(self.side, self.side)

    @torch.no_grad()
    def predict(
        self,
        model: GridTransformer,
        spots: torch.Tensor,
        at: torch.Tensor,
        generator: torch.Generator,
        n: int,
        share: float = 1,
    ) -> np.ndarray:
        """Expression of all genes at spots `at` of the section, (n, len(at), G), each time from a share of `spots`."""
        model.eval()
        draws = []
        for _ in range(n):
            cells = self.placed(generator)
            kept = spots[torch.randperm(len(spots), generator=generator)[: max(2, round(share * len(spots)))]]
            parts = [
                model(*self.drawn(genes, kept, cells)).flatten(1)[:, cells[at]]
                for genes in torch.arange(len(self.values)).split(4 * GENES)
            ]
            draws.append(torch.cat(parts).T.double().numpy() * self.sd + self.mean)
        return np.stack(draws)


def train_transformer(task: SpotTask, maps: GridMaps, steps: int) -> tuple[GridTransformer, np.ndarray, int]:
    """Train to fill in what is thinned out of the shown spots; a fold of them chooses when to stop.

    Returns
    -------
    model
    held_out : (S, G)
        The fold, predicted from the others; NaN elsewhere.
    step
        At which the model was taken.
    """
    generator = torch.Generator().manual_seed(task.seed)
    model = GridTransformer(maps.side)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, (0.5, 0.6))
    fold = torch.from_numpy(task.folds[0])
    validation, training = torch.where(fold)[0], torch.where(~fold)[0]
    best: tuple[float, dict, np.ndarray, int] | None = None
    for step in track(range(steps + 1), steps + 1, "transformer on the section's grid"):
        if step % LOOK_EVERY == 0 or step == steps:
            held_out = np.full(task.expression.shape, np.nan)
            held_out[fold.numpy()] = maps.predict(model, training, maps.shown[validation], generator, 2).mean(axis=0)
            error = relative_error(task, held_out)
            if best is None or error < best[0]:
                best = error, copy.deepcopy(model.state_dict()), held_out, step
        model.train()
        share = 0.3 + 0.5 * float(torch.rand((), generator=generator))
        order = training[torch.randperm(len(training), generator=generator)]
        n_kept = min(max(2, round(share * len(order))), len(order) - 1)
        kept, thinned = order[:n_kept], order[n_kept:]
        genes = torch.randint(len(maps.values), (GENES,), generator=generator)
        cells = maps.placed(generator)
        written = model(*maps.drawn(genes, kept, cells)).flatten(1)[:, cells[maps.shown[thinned]]]
        loss = F.mse_loss(written, maps.values[genes][:, thinned])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert best is not None
    model.load_state_dict(best[1])
    return model, best[2], best[3]


def grid_transformer(task: SpotTask, steps: int = STEPS) -> Completed:
    """A small Transformer that reads a gene's map as an image and learns on the section's own thinned grid.

    Notes
    -----
    As published: one map a gene, patches of it as tokens, trained on the section alone to give its own grid back from a
    thinned one, Adam with 1e-3 and betas of 0.5 and 0.6. Differences: 3 layers of 64 dimensions (there 12), so that a
    CPU trains it in a minute; thinned at random to 30 to 80 % (there every second spot), so that any pattern can be
    completed; the grid is turned, mirrored and moved on its canvas by chance, in training and prediction, since cells
    of hidden spots have no truth to learn from; a second channel says which cells are given; maps are standardised; a
    fifth of the shown spots chooses when to stop.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        maps = GridMaps(task)
        model, held_out, step = train_transformer(task, maps, steps)
        hidden, every = torch.from_numpy(np.flatnonzero(~task.shown)), torch.arange(len(maps.shown))
        generator = torch.Generator().manual_seed(task.seed)
        mean = maps.predict(model, every, hidden, generator, DRAWS).mean(axis=0)
        draws = maps.predict(model, every, hidden, generator, DRAWS // 2, 0.8)
    error = error_per_gene(task.expression, held_out)
    return Completed(mean, np.sqrt(np.var(draws, axis=0) + error**2), held_out, {"step": step})
