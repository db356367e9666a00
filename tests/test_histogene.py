"""HisToGene: size and output against the published architecture, what a token is made of, what it learns."""

from __future__ import annotations

import pytest
import torch
from slow_transformer import load, random_state, shapes, slow_block

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.blocks import ArrayEmbedding, central, start_as_mean
from stexp.models.histogene import HisToGene

SMALL = {"dim": 32, "depth": 2, "heads": 2, "head_dim": 8, "hidden": 24}


@pytest.fixture(scope="module")
def data(data: SpotDataModule) -> SpotDataModule:
    """With its tiles."""
    data.setup()
    return data


def make_model(n_genes: int = 30, n_positions: int = 5, **kwargs) -> HisToGene:
    torch.manual_seed(0)
    return HisToGene(n_genes, n_positions, **SMALL | {"tile_px": 8, "tile_share": 1.0} | kwargs).eval()


def test_published_size():
    with torch.device("meta"):
        model = HisToGene(785, 35)
    # the authors' tutorial prints 426.356 MB for 785 genes, in its layers 38.5 M, 35.8 K, 35.8 K, 67.2 M and 806 K
    n = sum(p.numel() for p in model.parameters())
    assert n == 106_588_945 and round(4 * n / 1e6, 3) == 426.356
    assert round(sum(p.numel() for p in model.blocks.parameters()) / 1e6, 1) == 67.2


@torch.no_grad()
def test_output_is_that_of_the_published_architecture():
    n, px, dim, inner, hidden, genes = 9, 6, 20, 16, 12, 7
    sizes = {
        "patch_embedding.weight": (dim, 3 * px * px),
        "patch_embedding.bias": (dim,),
        "x_embed.weight": (8, dim),
        "y_embed.weight": (8, dim),
        "gene_head.0.weight": (dim,),
        "gene_head.0.bias": (dim,),
        "gene_head.1.weight": (genes, dim),
        "gene_head.1.bias": (genes,),
    }
    layers = [(f"vit.transformer.layers.{i}.0", f"vit.transformer.layers.{i}.1") for i in range(2)]
    for layer in layers:
        sizes |= shapes(*layer, dim, inner, hidden)
    theirs = random_state(sizes)
    theirs["patch_embedding.weight"] /= 500  # pixels are large

    ours = HisToGene(genes, 8, tile_px=px, dim=dim, depth=2, heads=4, head_dim=4, hidden=hidden, dropout=0.5).eval()
    for block, layer in zip(ours.blocks, layers, strict=True):
        load(block, theirs, *layer)
    # they flatten a tile as x, y, colour
    pixels = theirs["patch_embedding.weight"].view(dim, px, px, 3).permute(0, 3, 2, 1).flatten(1)
    ours.patch_embedding.load_state_dict({"weight": pixels, "bias": theirs["patch_embedding.bias"]})
    ours.position.load_state_dict({name: theirs[name] for name in ("x_embed.weight", "y_embed.weight")})
    ours.gene_head.load_state_dict({name: theirs[f"gene_head.{name}"] for name in ours.gene_head.state_dict()})

    draws = torch.Generator().manual_seed(1)
    image = torch.rand(n, 3, 2 * px, 2 * px, generator=draws)
    array_xy = torch.randint(8, (n, 2), generator=draws)
    tokens = []
    for tile, (x, y) in zip(255 * image, array_xy.tolist(), strict=True):
        middle = tile[:, px // 2 : px // 2 + px, px // 2 : px // 2 + px]
        flat = torch.stack([middle[:, row, column] for column in range(px) for row in range(px)]).flatten()
        token = theirs["patch_embedding.weight"] @ flat + theirs["patch_embedding.bias"]
        tokens.append(token + theirs["x_embed.weight"][x] + theirs["y_embed.weight"][y])
    x = torch.stack(tokens)
    for layer in layers:
        x = slow_block(x, theirs, *layer, heads=4)
    x = torch.nn.functional.layer_norm(x, (dim,), theirs["gene_head.0.weight"], theirs["gene_head.0.bias"])
    expected = x @ theirs["gene_head.1.weight"].T + theirs["gene_head.1.bias"]
    assert expected.std(dim=0).min() > 1e-2
    torch.testing.assert_close(ours(image, array_xy), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_section_is_a_set_of_spots_that_see_each_other():
    model = make_model()
    draws = torch.Generator().manual_seed(2)
    image, array_xy = torch.rand(6, 3, 8, 8, generator=draws), torch.randint(5, (6, 2), generator=draws)
    whole = model(image, array_xy)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(model(image[order], array_xy[order]), whole[order], rtol=1e-4, atol=1e-5)
    assert (model(image[:5], array_xy[:5]) - whole[:5]).abs().max() > 1e-4
    assert (model(image, (array_xy + 1) % 5) - whole).abs().max() > 1e-3


@torch.no_grad()
def test_without_positions_any_array_will_do():
    model = make_model(n_positions=3, positions=False)
    image = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    far = torch.tensor([[0, 0], [500, 3], [2, 90], [7, 7]])
    torch.testing.assert_close(model(image, far), model(image, far.flip(0)), rtol=0, atol=0)
    with pytest.raises(InputError, match="do not fit"):
        make_model(n_positions=3)(image, far)


@torch.no_grad()
def test_the_last_layer_can_start_as_the_training_mean(data):
    model = make_model(len(data.panel), data.array_size, start_from_mean=True)
    start_as_mean(model.gene_head[-1], data)
    model.gene_head[-1].weight.zero_()
    predicted = model.predict_step(data.batch(SpotIndex(torch.from_numpy(data.rows("test")[:25])))).predicted
    expected = torch.from_numpy(data.target[data.rows("train")]).mean(dim=0).expand(25, -1)
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-5)


def test_the_middle_of_a_tile():
    image = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    assert torch.equal(central(image, 0.5, 112), image[:, :, 56:168, 56:168])
    assert torch.equal(central(image, 1.0, 224), image)
    # a fourth of the side without a shift: antialiased, so that the mean stays
    smaller = central(image, 1.0, 56)
    assert smaller.shape == (2, 3, 56, 56)
    torch.testing.assert_close(smaller.mean(dim=(2, 3)), image.mean(dim=(2, 3)), rtol=0, atol=2e-3)
    ramp = torch.arange(64.0).expand(1, 3, 64, 64)
    torch.testing.assert_close(
        central(ramp, 0.5, 16)[0, 0, 0, 1:-1], 16.5 + 2 * torch.arange(1.0, 15), atol=1e-4, rtol=0
    )


def test_a_coordinate_without_a_row_is_refused():
    table = ArrayEmbedding(4, 3)
    x, y = table(torch.tensor([[3, 0], [1, 2]]))
    assert torch.equal(x, table.x_embed.weight[[3, 1]]) and torch.equal(y, table.y_embed.weight[[0, 2]])
    with pytest.raises(InputError, match="from 0 to 4 do not fit the learned position table of 4 rows"):
        table(torch.tensor([[0, 4]]))
    with pytest.raises(InputError, match="from -1 to 2 do not fit"):
        table(torch.tensor([[-1, 2]]))
    with torch.device("meta"), pytest.raises(InputError, match="Are they pixels"):
        ArrayEmbedding(70_000, 8)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_overfits_eight_spots(data):
    model = make_model(len(data.panel), data.array_size, lr=1e-2, dropout=0.0)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    model.train()
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    expected = ((model(batch.image, batch.array_xy) - batch.target) ** 2).mean()
    assert losses[-1] < 0.05 * batch.target.var(dim=0).mean()
    assert float(expected.detach()) == pytest.approx(losses[-1], abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_share": 1.5}, "model.tile_share=1.5: a number above 0, up to 1 would fit"),
        ({"dropout": 1.0}, "model.dropout=1.0: a number from 0 to below 1 would fit"),
        ({"lr": 0.0}, "model.lr=0.0: a number above 0, up to 1 would fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)
