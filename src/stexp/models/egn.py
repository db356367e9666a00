"""EGN: a vision transformer guided by the expression of similar tiles (Yang et al. 2023, arXiv 2210.16721)."""

from __future__ import annotations

import math
from typing import Literal

import pandas as pd
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import nn

from stexp.arguments import Colour, ColourSpread, Count, Depth, OptionalDepth, Pixels, Rate, Weight, Width, checked
from stexp.data.batches import SpotBatch
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.blocks import GeneHead, TransformerBlock
from stexp.models.losses import correlation_loss
from stexp.models.method import Method, Prediction

WARM_UP = 100  # steps of `restarts`


class EGN(Method):
    """Vision transformer whose every second block is revised by the tile's nearest exemplars and their expression.

    Exemplars are training spots whose frozen features (of the image encoder that the run names) are nearest in
    Euclidean distance. In training they are of training spots; validation spots are searched for among the same,
    test spots among training and validation spots.

    Parameters
    ----------
    n_genes, n_features
        G and F; they come from the data and the image encoder.
    tile_px, patch_px
        Side of a tile, and of the square patches that are the transformer's tokens; the first is a multiple of the
        second.
    dim, depth, heads, head_dim, hidden
        Of the transformer; `hidden` is the width of its MLPs.
    bridge_every, bridge_heads, bridge_dim
        Every so many blocks have an exemplar bridge; its heads, and their dimensions.
    bridge_residual
        What the bridge adds the patches' part to, for the window: its ``given`` view (published code), or the one
        that exemplars ``revised`` (paper).
    projector_depth
        Residual MLPs that the views of window and exemplars share.
    n_exemplars
        k.
    apart
        An exemplar is of another ``section`` (published code), of another ``patient`` (paper), or only another
        ``spot``.
    correlation_weight
        Of :func:`~stexp.models.losses.correlation_loss`, which is added to the mean squared error.
    mean, std
        Input normalisation of RGB in 0..1.
    schedule
        Learning rate: ``cosine`` to 0 over the training (paper); ``restarts`` (published code): twice an epoch, 100
        steps from a fifth of `lr` up to it, then back on a cosine; ``none``.
    lr, weight_decay
        Of AdamW.

    Notes
    -----
    As in github.com/Yan98/EGN, v1, which takes exemplars by an ImageNet ResNet-50. The extractor that the paper trains
    instead, a StyleGAN's encoder, is not there. Left out are its layers that no output depends on. Its expression is
    log10(1 + count), each gene scaled to 0..1; here that of the protocol.
    """

    predicts_slides = False
    mean: torch.Tensor  # (3, 1, 1)
    std: torch.Tensor

    @checked("model")
    def __init__(
        self,
        n_genes: int,
        n_features: int,
        *,
        tile_px: Pixels,
        patch_px: Pixels = 32,
        dim: Width = 1024,
        depth: Depth = 8,
        heads: Width = 16,
        head_dim: Width = 64,
        hidden: Width = 4096,
        bridge_every: Depth = 2,
        bridge_heads: Width = 8,
        bridge_dim: Width = 64,
        bridge_residual: Literal["given", "revised"] = "given",
        projector_depth: OptionalDepth = 2,
        n_exemplars: Count = 9,
        apart: Literal["section", "patient", "spot"] = "section",
        correlation_weight: Weight = 0.5,
        mean: Colour = (0.5476, 0.5218, 0.6881),
        std: ColourSpread = (0.2461, 0.2101, 0.1649),
        schedule: Literal["cosine", "restarts", "none"] = "cosine",
        lr: Rate = 5e-4,
        weight_decay: Weight = 1e-4,
    ) -> None:
        super().__init__()
        if bridge_every > depth:
            raise InputError(f"model.bridge_every={bridge_every}: there are {depth} blocks, and no bridge to exemplars")
        if tile_px % patch_px:
            raise InputError(f"model.patch_px={patch_px}: tiles have {tile_px} px; a divisor of that would fit")
        n_patches = (tile_px // patch_px) ** 2
        self.to_patches = nn.Conv2d(3, dim, patch_px, stride=patch_px)
        self.position = nn.Parameter(torch.randn(n_patches, dim))
        self.projector = Projector(n_genes, n_features, dim, projector_depth)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, head_dim, hidden) for _ in range(depth))
        self.bridges = nn.ModuleDict(
            {
                str(i): Bridge(dim, bridge_heads, bridge_dim, n_patches, bridge_residual)
                for i in range(bridge_every - 1, depth, bridge_every)
            }
        )
        last = list(self.bridges.values())[-1]
        last.get_submodule("exemplar_norm").requires_grad_(False)  # of exemplars that nothing reads any more
        self.pool = AttentionPool(dim)
        self.head = nn.Sequential(nn.LayerNorm(2 * dim), GeneHead(2 * dim, n_genes))
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.n_exemplars, self.apart, self.correlation_weight = n_exemplars, apart, correlation_weight
        self.schedule, self.lr, self.weight_decay = schedule, lr, weight_decay

    def forward(
        self, image: torch.Tensor, features: torch.Tensor, exemplars: torch.Tensor, expression: torch.Tensor
    ) -> torch.Tensor:
        """Expression (B, G) of tiles.

        Parameters
        ----------
        image : (B, 3, H, W)
            RGB in 0..1.
        features : (B, F)
            Of the tiles.
        exemplars : (B, k, F)
            Features of their exemplars.
        expression : (B, k, G)
            Of their exemplars.
        """
        window, exemplars, expression = self.projector(features, exemplars, expression)
        x = self.to_patches((image - self.mean) / self.std).flatten(2).transpose(1, 2) + self.position
        for i, block in enumerate(self.blocks):
            assert isinstance(block, TransformerBlock)
            x = x + block.attend(x + self.position)
            if str(i) in self.bridges:
                x, window, exemplars = self.bridges[str(i)](x, window, exemplars, expression)
            x = x + block.ff(block.ff_norm(x))
        return self.head(torch.cat([self.pool(x), window.squeeze(1)], dim=1))

    # exemplars

    def on_fit_start(self) -> None:
        self.set_exemplars(self.data, ("train",), ("train", "validation"))

    def on_predict_start(self) -> None:
        self.set_exemplars(self.data, ("train", "validation"), ("test",))

    def set_exemplars(self, data: SpotDataModule, bank: tuple[str, ...], queries: tuple[str, ...]) -> None:
        """Search the exemplars of the spots of some roles among those of others.

        Raises
        ------
        InputError
            A spot has fewer than `n_exemplars`.
        """
        rows, query_rows = torch.from_numpy(data.rows(*bank)), torch.from_numpy(data.rows(*queries))
        kinds = range(len(data.spots)) if self.apart == "spot" else pd.factorize(data.spots[self.apart])[0]
        kind = torch.as_tensor(kinds)
        features = torch.from_numpy(data.tile_features[:])
        on = self.device
        exemplars = nearest_exemplars(features.to(on), kind.to(on), rows.to(on), query_rows.to(on), self.n_exemplars)
        if exemplars is None:
            raise InputError(
                f"spots to {queries[-1]} have fewer than model.n_exemplars={self.n_exemplars} exemplars of another "
                f"{self.apart} among the {len(rows)} spots to {' and '.join(bank)}; choose fewer, or "
                f"model.apart={'section or ' if self.apart == 'patient' else ''}spot"
            )
        self._exemplars = torch.full((len(data.spots), self.n_exemplars), -1, device=self.device)
        self._exemplars[query_rows] = exemplars
        self._bank_features = features[rows].to(self.device)
        self._bank_expression = torch.from_numpy(data.target[rows.numpy()]).to(self.device)

    def predict(self, batch: SpotBatch) -> torch.Tensor:
        """Expression (B, G) of spots whose exemplars were searched for."""
        index = self._exemplars[batch.spot]
        return self(batch.tiles, batch.tile_features, self._bank_features[index], self._bank_expression[index]).float()

    # training

    def training_step(self, batch: SpotBatch, batch_idx: int) -> torch.Tensor:
        predicted = self.predict(batch)
        mse, correlation = (predicted - batch.target).square().mean(), correlation_loss(predicted, batch.target)
        self.log("train/mse", mse.detach(), prog_bar=True, batch_size=len(batch))
        self.log("train/pearson", 1 - correlation.detach(), batch_size=len(batch))
        return mse + self.correlation_weight * correlation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        if self.schedule == "none":
            return optimizer
        steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs
        if not isinstance(steps, int) or epochs is None or epochs < 1:
            raise InputError(f"model.schedule={self.schedule} needs to know the end: trainer.max_epochs, 1 or more")
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if self.schedule == "cosine":
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        else:
            cycle = steps // epochs // 2
            if cycle <= WARM_UP:
                raise InputError(
                    f"model.schedule=restarts begins anew every half epoch, {cycle} steps, {WARM_UP} of which warm up; "
                    f"model.schedule=cosine would fit"
                )
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: restarts(step % cycle, cycle))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def predict_step(self, batch: SpotBatch, batch_idx: int = 0) -> Prediction:
        """Expression (B, G)."""
        return Prediction(self.predict(batch))


class Projector(nn.Module):
    """Features of window and exemplars, and the exemplars' expression, to the width of the transformer."""

    def __init__(self, n_genes: int, n_features: int, dim: int, depth: int) -> None:
        super().__init__()
        self.window = nn.Linear(n_features, dim)
        self.exemplar = nn.Linear(n_features + n_genes, dim)
        self.shared = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)) for _ in range(depth)
        )
        self.expression = nn.Linear(n_genes, dim)

    def forward(
        self, features: torch.Tensor, exemplars: torch.Tensor, expression: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, F), (B, k, F), (B, k, G) -> (B, 1, dim), (B, k, dim), (B, k, dim)."""
        described = self.exemplar(torch.cat([exemplars, expression], dim=2))
        views = torch.cat([self.window(features)[:, None], described], dim=1)
        for mlp in self.shared:
            views = views + mlp(views)
        return views[:, :1], views[:, 1:], self.expression(expression)


class Bridge(nn.Module):
    """Exemplars revise the window's view, which gates the patches: one gate a patch and head."""

    def __init__(self, dim: int, heads: int, head_dim: int, n_patches: int, residual: str) -> None:
        super().__init__()
        inner = 4 * head_dim  # whatever `heads` is, as the published code has it
        self.relate = nn.Sequential(nn.Linear(2 * dim, inner), nn.SiLU(), nn.Linear(inner, 2 * dim))
        self.value = nn.Linear(dim, dim)
        self.exemplar_norm = nn.LayerNorm(dim)
        self.to_gate = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, heads * n_patches))
        self.to_heads = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, heads * head_dim))
        self.to_patches = nn.Linear(heads * head_dim, dim, bias=False)
        self.to_window = nn.Linear(heads * head_dim, dim, bias=False)
        self.heads, self.residual = heads, residual

    def forward(
        self, patches: torch.Tensor, window: torch.Tensor, exemplars: torch.Tensor, expression: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, P, dim), (B, 1, dim), (B, k, dim), (B, k, dim) -> the first three, revised."""
        value = self.value(expression)
        for_window, for_exemplars = self.relate(torch.cat([window - exemplars, exemplars], dim=2)).chunk(2, dim=2)
        revised = window + (for_window.sigmoid() * value).mean(dim=1, keepdim=True)
        exemplars = self.exemplar_norm(exemplars + for_exemplars.sigmoid() * value)
        gate = self.to_gate(revised).sigmoid().view(len(window), self.heads, -1).transpose(1, 2)  # (B, P, heads)
        gated = (self.to_heads(patches).unflatten(2, (self.heads, -1)) * gate[..., None]).flatten(2)
        window = revised if self.residual == "revised" else window
        return patches + self.to_patches(gated), window + self.to_window(gated.mean(dim=1, keepdim=True)), exemplars


class AttentionPool(nn.Module):
    """Patches to one vector: their mean, and half of a mean weighted by each channel itself (Zhu and Wu 2021)."""

    def __init__(self, dim: int, sharpness: float = 0.1, weight: float = 0.5) -> None:
        super().__init__()
        self.score = nn.Linear(dim, dim)
        self.sharpness, self.weight = sharpness, weight

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, P, dim) -> (B, dim)."""
        score = self.score(patches)
        return score.mean(dim=1) + self.weight * (score * (self.sharpness * score).softmax(dim=1)).sum(dim=1)


@torch.no_grad()
def nearest_exemplars(
    features: torch.Tensor, kind: torch.Tensor, bank: torch.Tensor, queries: torch.Tensor, k: int, chunk: int = 1024
) -> torch.Tensor | None:
    """The k spots of a bank that are nearest to each query and of another kind.

    Parameters
    ----------
    features : (N, F)
        Searched in Euclidean distance.
    kind : (N,)
        Section, patient or spot, as a number.
    bank, queries : (R,), (Q,)
        Rows.

    Returns
    -------
    (Q, k) or None
        Positions in `bank`, nearest first; None where a query has fewer than k.
    """
    if k > len(bank):
        return None
    features = features - features[bank].mean(dim=0)  # the square below loses fewer digits
    references, nearest_rows = features[bank], []
    for part in queries.split(chunk):
        distance = torch.addmm(references.square().sum(dim=1), features[part], references.T, alpha=-2)
        distance.masked_fill_(kind[part][:, None] == kind[bank], torch.inf)
        smallest, position = distance.topk(k, dim=1, largest=False)
        if smallest.isinf().any():
            return None
        nearest_rows.append(position)
    return torch.cat(nearest_rows)


def restarts(step: int, cycle: int) -> float:
    """Share of the learning rate at a step of a cycle: a fifth, up in `WARM_UP` steps, down on a cosine."""
    if step < WARM_UP:
        return 0.2 + 0.8 * step / WARM_UP
    return 0.2 + 0.4 * (1 + math.cos(math.pi * (step - WARM_UP) / (cycle - WARM_UP)))
