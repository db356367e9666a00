"""Hist2ST: size and output against the published architecture, its graph, its three losses, what is kept in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_transformer import load, random_state, shapes, slow_block
from torch.nn import functional as F

from stexp.data.batches import SpotBatch, SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.blocks import neighbour_graph
from stexp.models.hist2st import Hist2ST
from stexp.models.losses import zinb_nll

SMALL = {"tile_px": 16, "patch_px": 4, "channels": 8, "depth": 1, "heads": 2, "head_dim": 8, "tile_share": 1.0}


@pytest.fixture(scope="module")
def data(data: SpotDataModule) -> SpotDataModule:
    """With its tiles."""
    data.setup()
    return data


def first_spots(data: SpotDataModule, n: int) -> SpotBatch:
    return data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:n])))


def make_model(n_genes: int = 30, n_positions: int = 5, **kwargs) -> Hist2ST:
    torch.manual_seed(0)
    return Hist2ST(n_genes, n_positions, **SMALL | kwargs).eval()


def test_published_size():
    with torch.device("meta"):
        model = Hist2ST(785, 64)
    # the authors' tutorial prints 303.159 MB for 785 genes, and 4.7 K for the first convolution
    n = sum(p.numel() for p in model.parameters())
    assert n == 75_789_833 and round(4 * n / 1e6, 3) == 303.159
    assert sum(p.numel() for p in model.patch_embedding.parameters()) == 4736


GRAPH = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [1, 2], [7, 7]])  # the last is alone


@torch.no_grad()
def test_output_is_that_of_the_published_architecture():
    channels, kernel, dim, inner, genes = 16, 3, 32, 16, 5
    sizes = {
        "patch_embedding.weight": (channels, 3, 3, 3),
        "patch_embedding.bias": (channels,),
        "x_embed.weight": (8, dim),
        "y_embed.weight": (8, dim),
        "vit.transformer.down.0.weight": (channels // 8, channels, 1, 1),
        "vit.transformer.down.0.bias": (channels // 8,),
        "gene_head.0.weight": (dim,),
        "gene_head.0.bias": (dim,),
        "gene_head.1.weight": (genes, dim),
        "gene_head.1.bias": (genes,),
    }
    for i in range(2):
        mixer = f"vit.transformer.layer1.{i}"
        for where, shape in (("dw.0", (1, kernel, kernel)), ("dw.3", (1, kernel, kernel)), ("pw.0", (channels, 1, 1))):
            sizes |= {f"{mixer}.{where}.weight": (channels, *shape), f"{mixer}.{where}.bias": (channels,)}
        for where in ("dw.1", "dw.4", "pw.2"):
            for kind in ("weight", "bias", "running_mean", "running_var"):
                sizes[f"{mixer}.{where}.{kind}"] = (channels,)
        sizes |= shapes(f"vit.transformer.layer2.{i}.attn", f"vit.transformer.layer2.{i}.ff", dim, inner, dim)
        sizes[f"vit.transformer.layer3.{i}.weight"] = (dim, dim)
        for kind, shape in (("weight_ih", (4 * dim, dim)), ("weight_hh", (4 * dim, dim)), ("bias_ih", (4 * dim,))):
            sizes[f"vit.transformer.jknet.0.{kind}_l{i}"] = shape
        sizes[f"vit.transformer.jknet.0.bias_hh_l{i}"] = (4 * dim,)
    theirs = random_state(sizes)
    theirs["patch_embedding.weight"] /= 200  # pixels are large

    ours = Hist2ST(
        genes, 8, tile_px=12, patch_px=3, channels=channels, kernel_size=kernel, depth=2, heads=2, head_dim=8,
        graph_depth=2, n_neighbours=3, zinb_weight=0, n_views=0,
    ).eval()  # fmt: skip
    state = {}
    for name in ours.state_dict():
        if not name.startswith("blocks.") and not name.endswith("num_batches_tracked"):
            their = name
            for a, b in (
                ("position.", ""), ("mixers.", "vit.transformer.layer1."), ("depthwise.", "dw."), ("pointwise.", "pw."),
                ("down.", "vit.transformer.down.0."), ("over_depth.", "vit.transformer.jknet.0."),
            ):  # fmt: skip
                their = their.replace(a, b)
            if name.startswith("graph_blocks."):
                their = f"vit.transformer.layer3.{name.split('.')[1]}.weight"
            state[name] = theirs[their]
    missing, _ = ours.load_state_dict(state, strict=False)
    assert all(name.startswith("blocks.") or name.endswith("num_batches_tracked") for name in missing)
    for i, block in enumerate(ours.blocks):
        load(block, theirs, f"vit.transformer.layer2.{i}.attn", f"vit.transformer.layer2.{i}.ff")
    image = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    expected = slow_hist2st(theirs, 255 * image[:, :, 6:18, 6:18], GRAPH[:5])
    assert expected.std(dim=0).min() > 1e-3
    torch.testing.assert_close(ours(image, GRAPH[:5]), expected, rtol=1e-4, atol=1e-5)


def slow_hist2st(w: dict[str, torch.Tensor], tiles: torch.Tensor, array_xy: torch.Tensor) -> torch.Tensor:
    """The published architecture in evaluation mode, with an adjacency matrix and an LSTM written out."""
    t = "vit.transformer"

    def batch_norm(x: torch.Tensor, where: str) -> torch.Tensor:
        mean, var, weight, bias = (
            w[f"{where}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    tokens = []
    for tile, (column, row) in zip(tiles, array_xy.tolist(), strict=True):
        x = F.conv2d(tile[None], w["patch_embedding.weight"], w["patch_embedding.bias"], stride=3)
        for i in range(2):
            block, y = f"{t}.layer1.{i}", x
            for convolution, norm in (("dw.0", "dw.1"), ("dw.3", "dw.4")):
                weight, bias = w[f"{block}.{convolution}.weight"], w[f"{block}.{convolution}.bias"]
                y = F.gelu(batch_norm(F.conv2d(y, weight, bias, padding=1, groups=16), f"{block}.{norm}"))
            x = F.conv2d(x + y, w[f"{block}.pw.0.weight"], w[f"{block}.pw.0.bias"])
            x = batch_norm(F.gelu(x), f"{block}.pw.2")
        x = F.conv2d(x, w[f"{t}.down.0.weight"], w[f"{t}.down.0.bias"]).flatten()
        tokens.append(x + w["x_embed.weight"][column] + w["y_embed.weight"][row])
    x = torch.stack(tokens)
    for i in range(2):
        x = slow_block(x, w, f"{t}.layer2.{i}.attn", f"{t}.layer2.{i}.ff", heads=2)
    adjacency = slow_adjacency(array_xy, 3, 2.0)
    depths = []
    for i in range(2):
        x = F.relu(w[f"{t}.layer3.{i}.weight"] @ (adjacency / adjacency.sum(1, keepdim=True) @ x).T).T
        x = x / x.norm(dim=1, keepdim=True)
        depths.append(x)
    for layer in range(2):
        lstm, h, c = f"{t}.jknet.0", torch.zeros_like(x), torch.zeros_like(x)
        out = []
        for x in depths:
            gates = x @ w[f"{lstm}.weight_ih_l{layer}"].T + w[f"{lstm}.bias_ih_l{layer}"]
            gates = gates + h @ w[f"{lstm}.weight_hh_l{layer}"].T + w[f"{lstm}.bias_hh_l{layer}"]
            i, f, g, o = gates.chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        depths = out
    x = F.layer_norm(torch.stack(depths).mean(0), (32,), w["gene_head.0.weight"], w["gene_head.0.bias"])
    return x @ w["gene_head.1.weight"].T + w["gene_head.1.bias"]


def slow_adjacency(array_xy: torch.Tensor, k: int, max_distance: float | None) -> torch.Tensor:
    """(N, N), 1 where the column's spot is among the k nearest of the row's, the row's own left out."""
    n = len(array_xy)
    out = torch.zeros(n, n)
    for i in range(n):
        distance = {j: float((array_xy[i] - array_xy[j]).float().norm()) for j in range(n) if j != i}
        for j in sorted(distance, key=lambda j: (round(distance[j], 6), *array_xy[j].tolist()))[:k]:
            if max_distance is None or distance[j] <= max_distance:
                out[i, j] = 1
    return out


@pytest.mark.parametrize(("k", "max_distance"), [(3, None), (3, 2.0), (4, 1.0), (9, None)])
def test_graph_equals_a_loop_over_spots(k, max_distance):
    index, is_near = neighbour_graph(GRAPH, k, max_distance)
    found = torch.zeros(6, 6)
    for i, j in is_near.nonzero().tolist():
        found[i, index[i, j]] += 1
    expected = slow_adjacency(GRAPH, k, max_distance)
    alone = expected.sum(dim=1) == 0
    assert bool(alone[5]) == (max_distance is not None)
    expected[alone, alone.nonzero()[:, 0]] = 1  # who has no neighbour has itself
    torch.testing.assert_close(found, expected)


def test_graph_of_one_spot_is_itself():
    index, is_near = neighbour_graph(torch.tensor([[3, 4]]), 4, 2.0)
    assert index.tolist() == [[0]] and is_near.tolist() == [[True]]


@torch.no_grad()
def test_a_spot_alone_or_a_section_of_one_has_a_prediction():
    model = make_model(n_positions=8)
    image = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    assert model(image, GRAPH).isfinite().all()
    assert model(image[:1], GRAPH[:1]).isfinite().all()


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_loss_is_the_weighted_sum_of_its_three_parts(data):
    batch = first_spots(data, 12)
    model = make_model(len(data.panel), data.array_size, n_views=3)
    logged = {}
    model.log = lambda name, value, **_: logged.update({name: float(value.detach())})
    turns = iter((0, 1, 2))
    model.change = lambda tiles: tiles.rot90(next(turns), (2, 3))
    loss = model.training_step(batch, 0)

    graph = neighbour_graph(batch.array_xy, 4, 2.0)
    hidden = [model.embed(batch.image.rot90(turn, (2, 3)), batch.array_xy, graph) for turn in range(3)]
    predicted = [model.gene_head(h) for h in hidden]
    weight = torch.softmax(torch.cat([model.view_weight(h) for h in hidden], dim=1), dim=1)  # (N, 3)
    target = sum(weight[:, i, None] * predicted[i] for i in range(3))
    size = batch.counts.sum(1) / float(np.median(batch.counts.sum(1)))
    zinb = zinb_nll(
        batch.counts,
        model.mean_head(hidden[0]).exp() * size[:, None],
        F.softplus(model.dispersion_head(hidden[0])),
        model.zero_head(hidden[0]),
    )
    expected = {
        "train/mse": ((predicted[0] - batch.target) ** 2).mean(),
        "train/zinb": zinb,
        "train/distillation": ((target - predicted[0]) ** 2).mean(),
    }
    assert logged == {name: pytest.approx(float(value), rel=1e-4) for name, value in expected.items()}
    assert logged["train/distillation"] > 0
    total = logged["train/mse"] + 0.25 * logged["train/zinb"] + 0.5 * logged["train/distillation"]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_what_is_calculated_twice_changes_nothing(data):
    batch = first_spots(data, 20)
    found = []
    for recompute_from in (1, 1000):
        model = make_model(len(data.panel), data.array_size, recompute_from=recompute_from, dropout=0.3).train()
        torch.manual_seed(5)
        loss = model.training_step(batch, 0)
        loss.backward()
        found.append(
            {
                "loss": loss.detach(),
                "draw": torch.rand(1),
                **{name: p.grad for name, p in model.named_parameters()},
                **{name: b for name, b in model.named_buffers() if "running" in name},
            }
        )
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_overfits_eight_spots(data):
    model = make_model(len(data.panel), data.array_size, lr=1e-2, dropout=0.0, n_views=0)
    batch = first_spots(data, 8)
    chosen = model.configure_optimizers()
    optimizer = chosen["optimizer"]
    model.train()
    for _ in range(400):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
    residual = (model(batch.image, batch.array_xy) - batch.target).square().mean()
    assert residual < 0.1 * batch.target.var(dim=0).mean()


def test_learning_rate_falls_by_a_tenth_every_fifty_epochs():
    chosen = make_model().configure_optimizers()
    rates = []
    for _ in range(101):
        rates.append(chosen["optimizer"].param_groups[0]["lr"])
        chosen["optimizer"].step()
        chosen["lr_scheduler"].step()
    assert rates[49] == rates[0] == 1e-5
    assert rates[50] == pytest.approx(0.9e-5) and rates[100] == pytest.approx(0.81e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 12}, "model.channels=12: a number that 8 divides would fit"),
        ({"tile_px": 3}, "model.tile_px=3: a number of at least model.patch_px=4 would fit"),
        ({"n_views": -1}, "model.n_views=-1: a whole number of at least 0 would fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)
