"""M2ORT: size and output against the published architecture, tokens of one place, levels that are no other's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.m2ort import M2ORT, CrossLevelBlock, resolutions

SMALL = {"tile_px": 16, "patch_px": 4, "dim": 24, "depth": 2, "heads": 2, "head_dim": 8, "hidden": 20}


def make_model(n_genes: int = 30, *, seed: int = 0, **kwargs) -> M2ORT:
    torch.manual_seed(seed)
    return M2ORT(n_genes, **SMALL | kwargs).eval()


def test_published_size():
    with torch.device("meta"):
        model = M2ORT(250)
    dim, inner, hidden, third = 768, 12 * 64, 512, 256
    size = 0
    for values, width in ((3 * 16**2, dim), (3 * 8**2, dim // 2), (3 * 4**2, dim // 4)):
        size += 2 * values + (values + 1) * width + (width + 1) * third + 2 * third
    size += dim + (196 + 1) * dim
    size += 8 * (2 * dim + 3 * third * inner + (inner + 1) * dim + 2 * dim + (dim + 1) * hidden + (hidden + 1) * dim)
    size += 2 * dim + (dim + 1) * 250
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert sum(parameter.numel() for parameter in M2ORT(250, dim=24, hidden=8, tile_px=224).parameters()) < size


@torch.no_grad()
def test_output_is_that_of_the_published_architecture():
    model = make_model(7)
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    image = torch.rand(2, 3, 16, 16)
    for tile, predicted in zip(image, model(image), strict=True):
        levels = [tile, *(F.interpolate(tile[None], size=(s, s), mode="bilinear", antialias=True)[0] for s in (8, 4))]
        tokens = [model.cls_token[0, 0]]
        for row in range(4):
            for column in range(4):
                parts = []
                for level, embed in zip(levels, model.embeddings, strict=True):
                    px = level.shape[-1] // 4
                    values = level[:, row * px : (row + 1) * px, column * px : (column + 1) * px].flatten()
                    values = embed[1](F.layer_norm(values, values.shape, embed[0].weight, embed[0].bias))
                    parts.append(embed[4](embed[3](F.gelu(values))))
                tokens.append(torch.cat(parts))
        x = torch.stack(tokens) + model.position[0]
        for block in model.blocks:
            x = slow_block(x, block)
        expected = model.gene_head(model.norm(x[0]))
        torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-4)


def slow_block(x: torch.Tensor, block: CrossLevelBlock) -> torch.Tensor:
    """One head after the other, queries from the first third of tokens (L, dim), keys and values from the others."""
    n, heads = len(x), block.heads
    q, k, v = (p(part) for p, part in zip(block.projections, block.norm(x).chunk(3, dim=1), strict=True))
    width = q.shape[1] // heads
    gathered = torch.empty(n, heads * width)
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        weight = torch.exp(q[:, own] @ k[:, own].T / width**0.5)
        gathered[:, own] = weight @ v[:, own] / weight.sum(dim=1, keepdim=True)
    x = x + block.to_out(gathered)
    return x + block.mlp(x)


@torch.no_grad()
def test_a_token_is_the_same_ground_at_every_level():
    """What changes inside one square of the tile changes that token, in the part of each level, and no other."""
    model = make_model(tile_px=32, patch_px=8)
    image = torch.rand(1, 3, 32, 32)
    before = model.tokens(resolutions(image))
    assert before.shape == (1, 16, 24)
    for row, column in ((0, 0), (1, 2), (3, 3)):
        changed = image.clone()
        changed[..., 8 * row + 2 : 8 * row + 6, 8 * column + 2 : 8 * column + 6] = 0
        off = (model.tokens(resolutions(changed)) - before)[0].abs() > 1e-6
        assert off.any(dim=1).nonzero().flatten().tolist() == [4 * row + column]
        assert off[4 * row + column].unflatten(0, (3, 8)).any(dim=1).all()


@torch.no_grad()
def test_it_matters_which_level_gives_queries_keys_and_values():
    block = make_model().blocks[0]
    x = torch.randn(2, 5, 24)
    attended = block.attend(x)
    for order in ((1, 0, 2), (0, 2, 1), (2, 1, 0)):
        swapped = torch.cat([x.chunk(3, dim=-1)[i] for i in order], dim=-1)
        assert float((block.attend(swapped) - attended).abs().max()) > 1e-2


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_batch():
    model, image = make_model(), torch.rand(5, 3, 16, 16)
    alone = torch.cat([model(tile[None]) for tile in image])
    torch.testing.assert_close(alone, model(image), rtol=1e-4, atol=1e-5)
    assert float(alone.std(dim=0).mean()) > 1e-3


def test_sizes_that_do_not_fit_are_refused():
    for arguments, words in (
        ({"patch_px": 6}, r"model\.patch_px=6: a multiple of 4"),
        ({"tile_px": 18}, r"model\.patch_px=4: tiles have 18 px"),
        ({"dim": 25}, r"model\.dim=25: a multiple of 3"),
    ):
        with pytest.raises(InputError, match=words):
            make_model(**arguments)
    with pytest.raises(InputError, match=r"model\.tile_px=16: tiles have 32 px.*scales_um.*tile_px=32"):
        make_model()(torch.rand(1, 3, 32, 32))


def test_overfits_a_few_spots_with_the_published_optimizer(data: SpotDataModule):
    model = make_model(len(data.panel), lr=3e-3, dim=48)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["lr"] == 3e-3
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))
    model.log = lambda *args, **kwargs: None
    model.train()
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    predicted = model.eval().predict_step(batch).predicted.detach()
    spread = float(batch.target.var(dim=0, correction=0).mean())
    assert float((predicted - batch.target).square().mean()) < 0.05 * spread
    np.testing.assert_equal(predicted.dtype, torch.float32)
