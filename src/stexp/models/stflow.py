"""STFlow: flow matching from noise to the expression of a whole section (Huang et al. 2025, arXiv 2506.05361)."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.nn import functional as F

from stexp.arguments import Count, Depth, OpenShare, Positive, Rate, Seed, Whole, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.data.features import TileEncoder
from stexp.errors import InputError
from stexp.models.blocks import GeneHead, start_as_mean
from stexp.models.frame_attention import FrameAttention, Surrounding, surrounding, swiglu
from stexp.models.method import Method, Prediction

FIRST_TIME = 0.01  # of the flow when predictions begin
FREQUENCIES = 256  # sines and cosines that tell the time
FEED_FORWARD = 4  # its width, in tokens'


_Times = Annotated[int, Field(ge=2, le=10_000)]
_Logit = Annotated[float, Field(ge=-10, le=10, description="a number from -10 to 10")]
_Total = Annotated[float, Field(gt=0, le=1000)]


class STFlow(Method):
    """Expression drawn from a prior flows, in a few steps, to that of all spots of a section at once.

    At time t between 0 and 1 the state is x_t = (1 - t) x_0 + t x_1, x_0 drawn from log(1 + zero-inflated negative
    binomial) and x_1 the expression. A network guesses x_1 from x_t, t, and the frozen features of the tiles; it is
    trained by the mean squared error at a random time. A prediction goes from x_0 to the guess of the last step by
    Euler's method along v = (guess - x_t) / (1 - t).

    Parameters
    ----------
    n_genes, n_features
        G and F; they come from the data and the image encoder.
    dim, depth, heads
        Of the network; 4 and `heads` divide `dim`.
    n_neighbours
        Spots that a spot attends to; see :func:`~stexp.models.frame_attention.surrounding`.
    dropout
        In attention and MLPs.
    output_dropout
        Behind the last layers, as in the code; squared errors then shrink predictions, by about 6 % at 0.2 and four
        blocks.
    total_count, logits, zero_logits
        Of the prior: counts have mean total_count x exp(logits), and are 0 besides with probability
        sigmoid(zero_logits).
    n_times
        From 0.01 to 1, of a prediction; the network runs once less.
    draws
        Of the prior for one prediction, which is their mean, with their standard deviation as its uncertainty where
        there are several.
    seed
        Of these draws, together with the name of the section: the same section is predicted the same.
    clip
        Of the norm of the gradient.
    lr
        Of Adam.
    start_from_mean
        The last layers' biases start as the mean expression of the training spots (published: at random).
    standardise
        Features enter with mean 0 and deviation 1 over the training spots (published: as they are).

    Notes
    -----
    The authors' repository holds a README; the code is as copies of it that others keep have it. There training sees
    ten random windows of each section an epoch, here the section; places are pixels, here spacings of the section;
    neighbours are the eight nearest, here all as near as the eighth, and on regular arrays frames lean to the axes of
    the section: copies of a section that are turned or mirrored are then predicted alike. They pick the epoch by the
    test sections, here by validation. Expression is that of the protocol, there log(1 + count). A guess is the mean
    over what all blocks say, and predictions are 0 at least.
    """

    batching = "section"
    predicts_slides = False
    centre: torch.Tensor  # (F,), of the training spots
    scale: torch.Tensor  # (F,)

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_features: int,
        *,
        dim: Width = 128,
        depth: Depth = 4,
        heads: Width = 4,
        n_neighbours: Whole = 8,
        dropout: OpenShare = 0.2,
        output_dropout: OpenShare = 0.2,
        total_count: _Total = 1.0,
        logits: _Logit = 0.1,
        zero_logits: _Logit = 0.0,
        n_times: _Times = 5,
        draws: Count = 1,
        seed: Seed = 0,
        clip: Positive = 1.0,
        lr: Rate = 5e-4,
        start_from_mean: bool = False,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 2:
            raise InputError(f"model.dim={dim}: an even number that model.heads={heads} divides would fit")
        self.of_features = nn.Linear(n_features, dim)
        self.of_time = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, n_genes, heads, dropout, output_dropout) for _ in range(depth))
        self.n_neighbours, self.prior = n_neighbours, Prior(total_count, logits, zero_logits)
        self.n_times, self.draws, self.seed = n_times, draws, seed
        self.clip, self.lr, self.start_from_mean, self.standardise = clip, lr, start_from_mean, standardise
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self._around: dict[bytes, Surrounding] = {}  # of sections that were seen, by their places

    def reads_features_of(self, encoder: TileEncoder) -> bool:
        """Features of any frozen encoder are all that is read of tiles."""
        return True

    def forward(self, y: torch.Tensor, t: torch.Tensor, features: torch.Tensor, around: Surrounding) -> torch.Tensor:
        """The guess (N, G) of a section's expression from a state `y` (N, G) at time `t` (), and features (N, F)."""
        x = self.of_features((features - self.centre) / self.scale) + self.of_time(frequencies(t))
        guesses = []
        for block in self.blocks:
            x, y = block(x, y, around)
            guesses.append(y)
        return torch.stack(guesses).mean(dim=0)

    def around(self, batch: SpotBatch) -> Surrounding:
        """Neighbours of the spots of a batch, one section or what a role has of it."""
        rows = batch.spot.cpu().numpy()
        if rows.tobytes() not in self._around:
            self._around[rows.tobytes()] = surrounding(self.data.xy_px[rows], self.n_neighbours).to(self.device)
        return self._around[rows.tobytes()]

    # training

    def on_fit_start(self) -> None:
        if self.data.protocol.truth == "residuals":
            raise InputError("model=stflow predicts nothing below 0, as residuals are; protocol.truth=spot would fit")
        self._around.clear()
        if self.trainer.ckpt_path is None:  # else the weights are those of a training that did so
            self.start_from(self.data)

    @torch.no_grad()
    def start_from(self, data: SpotDataModule) -> None:
        """Take from the training spots what `start_from_mean` and `standardise` ask for."""
        if self.standardise:
            features = data.tile_features[data.rows("train")].astype(np.float64)
            spread = features.std(axis=0)
            self.centre.copy_(torch.from_numpy(features.mean(axis=0)))
            self.scale.copy_(torch.from_numpy(np.where(spread > 0, spread, 1)))
        if self.start_from_mean:
            for block in self.blocks:
                assert isinstance(block, Block)
                start_as_mean(block.last, data)

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        end, t = batch.target, torch.rand(())
        # of torch's own draws, which a run that goes on has again
        start = self.prior.draw(end.shape, np.random.default_rng(int(torch.randint(2**62, ())))).to(end)
        guess = self((1 - t) * start + t * end, t.to(end), batch.tile_features, self.around(batch))
        loss = F.mse_loss(guess, end)
        self.log("train/mse", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as published, unless the trainer says otherwise."""
        value = self.clip if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, value, gradient_clip_algorithm or "norm")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    # prediction

    def on_predict_start(self) -> None:
        self._around.clear()

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (N, G) of a section, and its uncertainty where it is drawn several times."""
        section = self.data.section_names[int(batch.section[0])]
        rng = np.random.default_rng([self.seed, zlib.crc32(section.encode())])
        shape, around = batch.target.shape, self.around(batch)
        ends = torch.stack(
            [
                self.flow(self.prior.draw(shape, rng).to(batch.tile_features), batch.tile_features, around)
                for _ in range(self.draws)
            ]
        )
        return Prediction(ends.mean(dim=0), ends.std(dim=0) if self.draws > 1 else None)

    def flow(self, y: torch.Tensor, features: torch.Tensor, around: Surrounding) -> torch.Tensor:
        """From a draw of the prior `y` (N, G) to expression (N, G)."""
        times = torch.linspace(FIRST_TIME, 1, self.n_times, device=y.device)
        guess = y
        for now, then in pairwise(times):
            guess = self(y, now, features, around).float()
            y = y + (then - now) * (guess - y) / (1 - now)
        return guess.clamp(min=0)  # at the last time the state is the guess


class Prior:
    """log(1 + counts), zero-inflated negative binomial and alike for all spots and genes.

    Parameters
    ----------
    total_count, logits, zero_logits
        See :class:`STFlow`.
    """

    def __init__(self, total_count: float, logits: float, zero_logits: float) -> None:
        self.total_count, self.success = total_count, 1 / (1 + math.exp(logits))
        self.zero = 1 / (1 + math.exp(-zero_logits))

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
        """Draws of a shape, float32."""
        counts = rng.negative_binomial(self.total_count, self.success, shape) * (rng.random(shape) >= self.zero)
        return torch.from_numpy(np.log1p(counts, dtype=np.float32))


class Block(nn.Module):
    """Attention to neighbours, MLP, and a guess of the expression."""

    def __init__(self, dim: int, n_genes: int, heads: int, dropout: float, output_dropout: float) -> None:
        super().__init__()
        self.attention = FrameAttention(dim, n_genes, heads, dropout)
        self.mlp = swiglu(dim, FEED_FORWARD * dim, dim, dropout)
        self.hidden = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Dropout(dropout))
        self.last = GeneHead(dim, n_genes)
        self.output_dropout = nn.Dropout(output_dropout)

    def forward(self, x: torch.Tensor, y: torch.Tensor, around: Surrounding) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (N, dim) and expression (N, G) to the next."""
        x = x + self.attention(x, y, around)
        x = x + self.mlp(x)
        return x, self.output_dropout(self.last(self.hidden(x)))


def frequencies(t: torch.Tensor) -> torch.Tensor:
    """Cosines and sines (FREQUENCIES,) of a time, of periods that grow from 2 pi by a factor of 10,000."""
    half = FREQUENCIES // 2
    angle = t * torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    return torch.cat([angle.cos(), angle.sin()])
