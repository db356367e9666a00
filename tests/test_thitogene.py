"""THItoGene: size and output against the published architecture, its parts, what it learns."""

from __future__ import annotations

import pytest
import torch
from slow_transformer import load, random_state, shapes, slow_block
from test_hist2st import slow_adjacency
from torch.nn import functional as F

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.thitogene import DynamicConv2d, GraphAttention, THItoGene, squash

SMALL = {
    "tile_px": 44, "tile_share": 1.0, "capsules": 3, "capsule_dim": 8, "depth": 1, "heads": 2, "head_dim": 8,
    "hidden": 16, "graph_heads": 2, "graph_hidden": 12, "graph_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(data: SpotDataModule) -> SpotDataModule:
    """With its tiles."""
    data.setup()
    return data


def make_model(n_genes: int = 30, n_positions: int = 5, **kwargs) -> THItoGene:
    torch.manual_seed(0)
    return THItoGene(n_genes, n_positions, **SMALL | kwargs).eval()


def test_published_size():
    with torch.device("meta"):
        model = THItoGene(785, 64)
    parts = {
        "convolution": 3_815,  # kernels 4 x 16 x 3 x 16; squeeze 3 x 16 and norm 32; factors 51 + 272 + 272 + 68
        "capsules": 317_344,  # convolutions and norms 142,688; depthwise 9 x 9: 10,496; routing 20 x 16 x (8 x 64 + 1)
        "position": 2 * 64 * 64,
        "blocks": 4 * (4 * 1408 + 1408 * 3072 + 1025 * 1408 + 1408 * 2048 + 2048 + 2049 * 1408),
        "graph_in": 8 * (1408 * 1024 + 2 * 1024),
        "graph_out": 8192 * 512 + 2 * 512,
        "gene_head": 513 * 1024 + 2048 + 1025 * 785,
    }
    assert {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in parts} == parts
    assert sum(p.numel() for p in model.parameters()) == sum(parts.values()) == 63_586_712
    assert model.capsules.primary.kernel_size == (9, 9)


@torch.no_grad()
def test_output_is_that_of_the_published_architecture():
    caps, route, dim, inner, hidden, nhid, out, genes = 3, 4, 20, 16, 12, 6, 10, 7
    od, cn, squeeze = "odconv2d.attention", "caps_layer", 16
    sizes = {
        "odconv2d.weight": (4, 16, 3, 4, 4),
        f"{od}.fc.weight": (squeeze, 3, 1, 1),
        "x_embed.weight": (8, route),
        "y_embed.weight": (8, route),
        f"{cn}.primary_caps.depthwise_conv.weight": (128, 1, 1, 1),
        f"{cn}.primary_caps.depthwise_conv.bias": (128,),
        f"{cn}.digit_caps.W": (caps, 16, 8, route),
        f"{cn}.digit_caps.b": (caps, 16, 1),
        "gat.out_att.W": (2 * nhid, out),
        "gat.out_att.a": (2 * out, 1),
        "gene_head.0.weight": (1024, out),
        "gene_head.0.bias": (1024,),
        "gene_head.2.weight": (1024,),
        "gene_head.2.bias": (1024,),
        "gene_head.3.weight": (genes, 1024),
        "gene_head.3.bias": (genes,),
    }
    for name, n in (("channel_fc", 3), ("filter_fc", 16), ("spatial_fc", 16), ("kernel_fc", 4)):
        sizes |= {f"{od}.{name}.weight": (n, squeeze, 1, 1), f"{od}.{name}.bias": (n,)}
    norms = {f"{od}.bn": squeeze} | {f"{cn}.batch_norm{i}": n for i, n in ((1, 32), (2, 64), (3, 64), (4, 128))}
    for name, n in norms.items():
        sizes |= {f"{name}.{kind}": (n,) for kind in ("weight", "bias", "running_mean", "running_var")}
    for i, (n_out, n_in, size) in enumerate(((32, 16, 5), (64, 32, 3), (64, 64, 3), (128, 64, 3)), start=1):
        sizes |= {f"{cn}.conv{i}.weight": (n_out, n_in, size, size), f"{cn}.conv{i}.bias": (n_out,)}
    for i in range(2):
        sizes |= {f"gat.attention_{i}.W": (dim, nhid), f"gat.attention_{i}.a": (2 * nhid, 1)}
    layer = ("vit.transformer.layers.0.0", "vit.transformer.layers.0.1")
    theirs = random_state(sizes | shapes(*layer, dim, inner, hidden))
    theirs["odconv2d.weight"] /= 100  # pixels are large
    theirs[f"{od}.bn.running_mean"] += 30
    theirs[f"{od}.bn.running_var"] *= 2000

    ours = THItoGene(
        genes, 8, tile_px=44, capsules=caps, capsule_dim=route, depth=1, heads=2, head_dim=8, hidden=hidden,
        graph_heads=2, graph_hidden=nhid, graph_dim=out, n_neighbours=2,
    ).eval()  # fmt: skip
    load(ours.blocks[0], theirs, *layer)
    renamed = {"convolution.weight": theirs["odconv2d.weight"].flatten(3)}
    names = {
        "convolution.squeeze.0": f"{od}.fc", "convolution.squeeze.1": f"{od}.bn", "convolution.by_input":
        f"{od}.channel_fc", "convolution.by_output": f"{od}.filter_fc", "convolution.by_place": f"{od}.spatial_fc",
        "convolution.by_kernel": f"{od}.kernel_fc", "capsules.primary": f"{cn}.primary_caps.depthwise_conv",
        "position.x_embed": "x_embed", "position.y_embed": "y_embed", "gene_head.0": "gene_head.0",
        "gene_head.2": "gene_head.2", "gene_head.3": "gene_head.3",
    }  # fmt: skip
    for i in range(4):
        names |= {f"capsules.convolutions.{3 * i}": f"{cn}.conv{i + 1}"}
        names |= {f"capsules.convolutions.{3 * i + 1}": f"{cn}.batch_norm{i + 1}"}
    for a, b in names.items():
        for kind in ("weight", "bias", "running_mean", "running_var"):
            if f"{b}.{kind}" in theirs:
                value = theirs[f"{b}.{kind}"]
                renamed[f"{a}.{kind}"] = value.flatten(1) if b.startswith(od) and value.ndim == 4 else value
    renamed |= {"capsules.weight": theirs[f"{cn}.digit_caps.W"], "capsules.bias": theirs[f"{cn}.digit_caps.b"][..., 0]}
    for a, b in (("graph_in", ["gat.attention_0", "gat.attention_1"]), ("graph_out", ["gat.out_att"])):
        renamed[f"{a}.weight.weight"] = torch.cat([theirs[f"{head}.W"] for head in b], dim=1).T
        vectors = [theirs[f"{head}.a"][:, 0].chunk(2) for head in b]
        renamed[f"{a}.asking"], renamed[f"{a}.answering"] = (torch.stack(part) for part in zip(*vectors, strict=True))
    missing, unexpected = ours.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(name.startswith("blocks.") or name.endswith("num_batches_tracked") for name in missing)

    array_xy = torch.tensor([[0, 0], [1, 0], [2, 1], [0, 3], [5, 7], [4, 2]])
    image = torch.rand(6, 3, 88, 88, generator=torch.Generator().manual_seed(1))
    image *= torch.linspace(0.2, 1, 6)[:, None, None, None]
    expected = slow_thitogene(theirs, 255 * image[:, :, 22:66, 22:66], array_xy, caps, route)
    assert expected.std(dim=0).min() > 1e-3
    torch.testing.assert_close(ours(image, array_xy), expected, rtol=1e-3, atol=1e-4)


def slow_thitogene(
    w: dict[str, torch.Tensor], tiles: torch.Tensor, array_xy: torch.Tensor, caps: int, route: int
) -> torch.Tensor:
    """The published architecture in evaluation mode: one tile, one capsule and one pair of spots after the other."""
    od, cn = "odconv2d.attention", "caps_layer"

    def batch_norm(x: torch.Tensor, where: str) -> torch.Tensor:
        shape = (-1, *[1] * (x.ndim - 1))
        mean, var, weight, bias = (
            w[f"{where}.{kind}"].view(shape) for kind in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def squashed(v: torch.Tensor) -> torch.Tensor:
        n = v.square().sum().sqrt()
        return (1 - 1 / n.exp()) * v / n

    tokens = []
    for tile, (column, row) in zip(tiles, array_xy.tolist(), strict=True):
        seen = F.relu(batch_norm(w[f"{od}.fc.weight"].flatten(1) @ tile.mean(dim=(1, 2)), f"{od}.bn"))
        by = {
            name: w[f"{od}.{name}_fc.weight"].flatten(1) @ seen + w[f"{od}.{name}_fc.bias"]
            for name in ("channel", "filter", "spatial", "kernel")
        }
        kernels = by["kernel"].softmax(0)
        kernel = sum(share * weight for share, weight in zip(kernels, w["odconv2d.weight"], strict=True))
        kernel = kernel * by["spatial"].sigmoid().view(4, 4)
        x = F.conv2d(tile * by["channel"].sigmoid()[:, None, None], kernel, stride=4)
        x = F.relu(x * by["filter"].sigmoid()[:, None, None])
        for i, stride in enumerate((1, 1, 1, 2), start=1):
            x = F.conv2d(x, w[f"{cn}.conv{i}.weight"], w[f"{cn}.conv{i}.bias"], stride=stride)
            x = F.relu(batch_norm(x, f"{cn}.batch_norm{i}"))
        depthwise = f"{cn}.primary_caps.depthwise_conv"
        primary = x.flatten() * w[f"{depthwise}.weight"].flatten() + w[f"{depthwise}.bias"]
        primary = [squashed(v) for v in primary.view(16, 8)]
        votes = [[primary[j] @ w[f"{cn}.digit_caps.W"][k, j] for j in range(16)] for k in range(caps)]
        agreement = torch.tensor([[sum(float(u @ other) for other in votes[k]) for u in votes[k]] for k in range(caps)])
        share = (agreement / route**0.5).softmax(dim=0) + w[f"{cn}.digit_caps.b"][..., 0]
        digits = [squashed(sum(share[k, j] * votes[k][j] for j in range(16))) for k in range(caps)]
        tokens.append(torch.cat([*digits, w["x_embed.weight"][column], w["y_embed.weight"][row]]))
    x = slow_block(torch.stack(tokens), w, "vit.transformer.layers.0.0", "vit.transformer.layers.0.1", heads=2)
    adjacency = slow_adjacency(array_xy, 2, None)
    x = torch.cat([F.elu(slow_attention(x, adjacency, w, f"gat.attention_{i}")) for i in range(2)], dim=1)
    x = F.elu(slow_attention(x, adjacency, w, "gat.out_att"))
    x = F.relu(x @ w["gene_head.0.weight"].T + w["gene_head.0.bias"])
    x = F.layer_norm(x, (1024,), w["gene_head.2.weight"], w["gene_head.2.bias"])
    return x @ w["gene_head.3.weight"].T + w["gene_head.3.bias"]


def slow_attention(x: torch.Tensor, adjacency: torch.Tensor, w: dict[str, torch.Tensor], head: str) -> torch.Tensor:
    x = x @ w[f"{head}.W"]
    rows = []
    for i in range(len(x)):
        near = adjacency[i].nonzero()[:, 0].tolist()
        scores = torch.stack([F.leaky_relu(torch.cat([x[i], x[j]]) @ w[f"{head}.a"][:, 0], 0.01) for j in near])
        rows.append(sum(share * x[j] for share, j in zip(scores.softmax(0), near, strict=True)))
    return torch.stack(rows)


def test_squash_keeps_the_direction_and_has_a_gradient_at_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], requires_grad=True)
    out = squash(x)
    torch.testing.assert_close(out[0], torch.tensor([0.6, 0.8]) * (1 - torch.tensor(-5.0).exp()))
    torch.testing.assert_close(out[2], x[2], rtol=1e-3, atol=0)
    out.sum().backward()
    assert x.grad.isfinite().all() and torch.equal(out[1], torch.zeros(2))


def test_layers_start_as_published():
    """Kaiming normal by fan-out for the dynamic convolution, Xavier uniform x 1.414 for each head of the attention."""
    torch.manual_seed(0)
    convolution = DynamicConv2d(3, 16, 4)
    assert float(convolution.weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    attention = GraphAttention(60, 40, 5, 0.0)
    head = torch.empty(60, 40)
    torch.nn.init.xavier_uniform_(head, gain=1.414)
    assert float(attention.weight.weight.detach().abs().max()) == pytest.approx(float(head.abs().max()), rel=0.01)
    vector = torch.empty(80, 1)
    limit = max(float(torch.nn.init.xavier_uniform_(vector, gain=1.414).abs().max()) for _ in range(5))
    assert float(attention.asking.detach().abs().max()) == pytest.approx(limit, rel=0.05)


@torch.no_grad()
def test_a_section_of_one_spot_is_predicted_and_does_not_train():
    image = torch.rand(1, 3, 44, 44, generator=torch.Generator().manual_seed(4))
    model = make_model()
    assert model(image, torch.tensor([[1, 2]])).isfinite().all()
    assert model.training_step([image], 0) is None  # of one spot


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_overfits_eight_spots(data):
    model = make_model(len(data.panel), data.array_size, lr=3e-3, dropout=0.0)
    batch = data.batch(SpotIndex(torch.from_numpy(data.rows("train")[:8])))
    optimizer = model.configure_optimizers()
    model.train()
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * batch.target.var(dim=0).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_px": 40}, "model.tile_px=40: a number of at least 44 that 4 divides would fit"),
        ({"capsules": 0}, "model.capsules=0: a whole number of at least 1 would fit"),
        ({"n_neighbours": 0}, "model.n_neighbours=0: a whole number of at least 1 would fit"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_model(**arguments)
