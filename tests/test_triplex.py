"""TRIPLEX: its size, its output against a slow reading of the published architecture, what it sees, that it learns."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from encoders import frozen
from sections import make_data
from torch.nn import functional as F

from stexp.data.batches import SpotIndex
from stexp.data.datamodule import SpotDataModule
from stexp.errors import InputError
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.views import array_neighbours, feature_map, nearest_spots
from stexp.models.encoders.weights import from_torchvision
from stexp.models.triplex import Triplex
from stexp.protocol import Protocol

SMALL = {
    "dim": 16,
    "side": 3,
    **{f"{name}_heads": 2 for name in ("fusion", "global", "neighbour")},
    **{f"{name}_hidden": 24 for name in ("fusion", "global", "neighbour")},
    **{f"{name}_dropout": 0.0 for name in ("fusion", "global", "neighbour")},
}


def make_encoder(seed: int = 0) -> ImageEncoder:
    torch.manual_seed(seed)
    return ImageEncoder("test_resnet", pretrained=False, frozen_norm=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> SpotDataModule:
    folder = tmp_path_factory.mktemp("sections")
    return make_data(folder, Protocol("strict"), encoder=frozen(make_encoder(), folder / "cache"))


def make_model(data: SpotDataModule, *, seed: int = 0, **kwargs) -> Triplex:
    torch.manual_seed(seed)
    model = Triplex(make_encoder(seed), len(data.panel), data.n_features, **SMALL | kwargs).eval()
    model._trainer = SimpleNamespace(datamodule=data)
    model.on_fit_start()
    return model


def batch_of(data: SpotDataModule, rows: np.ndarray):
    return data.batch(SpotIndex(torch.from_numpy(rows)))


# against the published description


def test_published_size():
    with torch.device("meta"):
        model = Triplex(ImageEncoder("resnet18", pretrained=False), 250, 512)
    attention, norms = 4 * 512**2 + 512, 4 * 512
    wide, narrow = (2 * 512 * hidden + hidden + 512 for hidden in (2048, 512))
    expected = {
        "image_encoder": 11_176_512,  # ResNet-18 (11,689,512) without its 1,000 classes
        "neighbour_encoder": 3 * (attention + norms + narrow + 16 * 25) + 1024,
        "global_encoder": 3 * (attention + norms + wide) + 512 * 9 + 512 + 1024,
        "fusion": attention + norms + wide,
        "fusion_norm": 1024,
        "heads": 4 * 513 * 250,
    }
    found = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    assert {name: n for name, n in found.items() if n} == expected
    assert sum(found.values()) == 29_031_640


def authors_state(n_genes: int, depths: dict[str, int], hidden: int, k: int) -> dict[str, torch.Tensor]:
    """Random weights under the authors' names (commit ac50e05), of width 512."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int, around: float = 0.0, spread: float = 1.0) -> torch.Tensor:
        return around + spread * torch.randn(*shape, generator=draw)

    resnet = torchvision.models.resnet18()
    for name, value in resnet.state_dict().items():  # statistics of 0 and 1 would hide an order that differs
        if "running" in name:
            value.uniform_(*((-0.2, 0.2) if name.endswith("mean") else (0.5, 1.5)), generator=draw)
    state = {
        f"target_encoder.{k}": v for k, v in torch.nn.Sequential(*list(resnet.children())[:-2]).state_dict().items()
    }

    def linear(name: str, out: int, into: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = tensor(out, into, spread=into**-0.5)
        if bias:
            state[f"{name}.bias"] = tensor(out, spread=0.1)

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = tensor(512, around=1, spread=0.2), tensor(512, spread=0.2)

    def layer(name: str, cross: bool = False) -> None:
        norm(f"{name}.0.norm")
        norm(f"{name}.1.norm")
        for part, out in (("to_q", 512), ("to_kv", 1024)) if cross else (("to_qkv", 1536),):
            linear(f"{name}.0.fn.{part}", out, 512, bias=False)
        linear(f"{name}.0.fn.to_out.0", 512, 512)
        linear(f"{name}.1.fn.net.0", hidden, 512)
        linear(f"{name}.1.fn.net.3", 512, hidden)

    for i in range(depths["neighbour"]):
        layer(f"neighbor_encoder.layer.layers.{i}")
        state[f"neighbor_encoder.layer.layers.{i}.0.fn.attention_biases"] = tensor(4, k * k)
    norm("neighbor_encoder.norm")
    layer("global_encoder.layer1.layers.0")
    for i in range(depths["global"] - 1):
        layer(f"global_encoder.layer2.layers.{i}")
    state["global_encoder.pos_layer.proj1.weight"] = tensor(512, 1, 3, 3, spread=0.3)
    state["global_encoder.pos_layer.proj1.bias"] = tensor(512, spread=0.3)
    norm("global_encoder.norm")
    for i in range(depths["fusion"]):
        layer(f"fusion_encoder.fusion_layer.layers.{i}", cross=True)
    norm("fusion_encoder.norm")
    for head in ("fc", "fc_target", "fc_neighbor", "fc_global"):
        linear(head, n_genes, 512)
    return state


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' names to ours."""
    _, resnet = from_torchvision(state, "target_encoder.")
    out = {f"image_encoder.model.{key}": value for key, value in resnet.items()}
    biases = []
    for key, value in state.items():
        if key.startswith("target_encoder."):
            continue
        if key.endswith("attention_biases"):
            biases.append(value)
            continue
        key = key.replace("neighbor_encoder.layer.layers.", "neighbour_encoder.blocks.")
        key = key.replace("global_encoder.layer1.layers.0.", "global_encoder.blocks.0.")
        for i in range(8):
            key = key.replace(f"global_encoder.layer2.layers.{i}.", f"global_encoder.blocks.{i + 1}.")
        key = key.replace("fusion_encoder.fusion_layer.layers.", "fusion.").replace(
            "fusion_encoder.norm", "fusion_norm"
        )
        key = key.replace("neighbor_encoder.", "neighbour_encoder.").replace("pos_layer.proj1", "position.conv")
        key = key.replace(".0.norm.", ".attn_norm.").replace(".1.norm.", ".ff_norm.")
        key = key.replace(".1.fn.net.", ".ff.").replace(".0.fn.", ".")
        for theirs, ours in (
            ("fc_target", "target"),
            ("fc_neighbor", "neighbour"),
            ("fc_global", "whole"),
            ("fc", "fused"),
        ):
            if key.startswith(f"{theirs}."):
                key = f"heads.{ours}.{key.split('.')[1]}"
        if "to_qkv" in key:
            out[key.replace("to_qkv", "to_q")], out[key.replace("to_qkv", "to_kv")] = value[:512], value[512:]
        else:
            out[key] = value
    return out | {"neighbour_encoder.bias": torch.stack(biases)}


def slow_layer(state, name: str, heads: int, x, other=None, logits_of=None):
    """One pre-norm block as the paper has it, token by token; `logits_of(head, i, j)` changes a logit."""

    def normed(tokens, which):
        return F.layer_norm(tokens, (512,), state[f"{name}.{which}.norm.weight"], state[f"{name}.{which}.norm.bias"])

    query, key_value = normed(x, 0), normed(x if other is None else other, 0)
    if f"{name}.0.fn.to_qkv.weight" in state:
        to_q, to_k, to_v = state[f"{name}.0.fn.to_qkv.weight"].split(512)
    else:
        to_q, (to_k, to_v) = state[f"{name}.0.fn.to_q.weight"], state[f"{name}.0.fn.to_kv.weight"].split(512)
    width, gathered = 512 // heads, torch.zeros(len(x), 512)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = query @ to_q[part].T, key_value @ to_k[part].T, key_value @ to_v[part].T
        for i in range(len(x)):
            logits = [float(q[i] @ k[j]) / width**0.5 for j in range(len(k))]
            if logits_of is not None:
                logits = [logits_of(head, i, j, logit) for j, logit in enumerate(logits)]
            weights = np.exp(np.array(logits) - max(logits))
            gathered[i, part] = torch.from_numpy(weights / weights.sum()).float() @ v
    x = x + F.linear(gathered, state[f"{name}.0.fn.to_out.0.weight"], state[f"{name}.0.fn.to_out.0.bias"])
    hidden = F.gelu(F.linear(normed(x, 1), state[f"{name}.1.fn.net.0.weight"], state[f"{name}.1.fn.net.0.bias"]))
    return x + F.linear(hidden, state[f"{name}.1.fn.net.3.weight"], state[f"{name}.1.fn.net.3.bias"])


def slow_position(state, x, array_xy):
    """Tokens on a dense grid, convolved, read where spots are, and added."""
    place = array_xy - array_xy.min(dim=0).values
    width, height = (place.max(dim=0).values + 1).tolist()
    dense = torch.zeros(1, 512, width, height)
    for (column, row), token in zip(place.tolist(), x, strict=True):
        dense[0, :, column, row] = token
    weight, bias = (state[f"global_encoder.pos_layer.proj1.{kind}"] for kind in ("weight", "bias"))
    moved = F.conv2d(dense, weight, bias, padding=1, groups=512)
    return x + torch.stack([moved[0, :, column, row] for column, row in place.tolist()])


def slow_norm(state, name: str, x):
    return F.layer_norm(x, (512,), state[f"{name}.weight"], state[f"{name}.bias"])


@torch.no_grad()
def test_output_is_that_of_the_published_architecture():
    k, depths, heads = 3, {"neighbour": 2, "global": 3, "fusion": 2}, 4
    state = authors_state(7, depths, 48, k)
    sizes = {f"{name}_{what}": value for name in depths for what, value in (("heads", heads), ("hidden", 48))}
    sizes |= {f"{name}_depth": depth for name, depth in depths.items()}
    encoder = ImageEncoder("resnet18", pretrained=False, mean=[0, 0, 0], std=[1, 1, 1])
    ours = Triplex(encoder, 7, 512, side=k, **sizes).eval()
    ours.load_state_dict(renamed(state))
    draw = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 96, 96, generator=draw)
    around, features = torch.randn(2, k * k, 512, generator=draw), torch.randn(9, 512, generator=draw)
    # an array with holes, out of order, as wide as it is not high
    array_xy = torch.tensor([[7, 5], [3, 4], [4, 4], [3, 5], [9, 4], [4, 6], [8, 5], [5, 5], [12, 4]])
    seen = torch.tensor([[False] * 3 + [True] * 6, [True, True, False] * 3])
    spots = torch.tensor([3, 7])

    resnet = torchvision.models.resnet18()
    body = torch.nn.Sequential(*list(resnet.children())[:-2]).eval()
    body.load_state_dict({key.split(".", 1)[1]: v for key, v in state.items() if key.startswith("target_encoder.")})
    whole = slow_layer(state, "global_encoder.layer1.layers.0", heads, features)
    whole = slow_position(state, whole, array_xy)
    for i in range(depths["global"] - 1):
        whole = slow_layer(state, f"global_encoder.layer2.layers.{i}", heads, whole)
    whole = slow_norm(state, "global_encoder.norm", whole)[spots]
    expected = []
    for b in range(2):
        target = body(image[b : b + 1])[0].flatten(1).T
        neighbour = around[b]
        for i in range(depths["neighbour"]):
            name = f"neighbor_encoder.layer.layers.{i}"
            bias = state[f"{name}.0.fn.attention_biases"]

            def near(head, i, j, logit, bias=bias, b=b):
                down, across = abs(i // k - j // k), abs(i % k - j % k)
                return logit + float(bias[head, down * k + across]) if seen[b, j] else -65504.0

            neighbour = slow_layer(state, name, heads, neighbour, logits_of=near)
        neighbour = slow_norm(state, "neighbor_encoder.norm", neighbour)
        fused = [whole[b : b + 1], whole[b : b + 1]]
        for i in range(depths["fusion"]):
            name = f"fusion_encoder.fusion_layer.layers.{i}"
            fused[0] = slow_layer(state, name, heads, fused[0], target)
            fused[1] = slow_layer(
                state,
                name,
                heads,
                fused[1],
                neighbour,
                lambda head, i, j, logit, b=b: logit if seen[b, j] else -65504.0,
            )
        fused = slow_norm(state, "fusion_encoder.norm", fused[0] + fused[1])[0]
        tokens = {"fc": fused, "fc_target": target.mean(0), "fc_neighbor": neighbour.mean(0), "fc_global": whole[b]}
        expected.append([F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"]) for name, x in tokens.items()])

    tokens = ours.see_section(features, torch.from_numpy(array_neighbours(array_xy.numpy(), 3)))[spots]
    found = ours(image, around, seen, ours.grid[None], tokens)
    assert list(found) == ["fused", "target", "neighbour", "whole"]
    for i, predicted in enumerate(found.values()):
        theirs = torch.stack([row[i] for row in expected])
        assert theirs.std() > 0.1
        torch.testing.assert_close(predicted, theirs, rtol=1e-3, atol=1e-4)


def test_loss_is_the_published_one():
    model = Triplex(make_encoder(), 6, 16, **SMALL, alpha=0.3)
    draw = np.random.default_rng(0)
    fused, *others = heads = [draw.normal(size=(5, 6)) for _ in range(4)]
    target = draw.normal(size=(5, 6))
    expected = ((fused - target) ** 2).mean()
    for head in others:
        expected += 0.7 * ((head - target) ** 2).mean() + 0.3 * ((fused - head) ** 2).mean()
    given = dict(zip(("fused", "target", "neighbour", "whole"), map(torch.from_numpy, heads), strict=True))
    assert float(model.loss(given, torch.from_numpy(target))) == pytest.approx(expected)


# what a spot is seen with


@pytest.mark.parametrize(
    "name", ["test_resnet", "resnet18", "densenet121", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
@torch.no_grad()
def test_feature_map_is_what_the_encoder_pools(name):
    args = {"model_args": {"global_pool": "avg"}} if name.startswith("vit") else {}
    torch.manual_seed(0)
    encoder = ImageEncoder(name, pretrained=False, **args).eval()
    image = torch.rand(2, 3, 224, 224)
    tokens = feature_map(encoder, image)
    assert tokens.shape == (2, 196 if name.startswith("vit") else 49, encoder.num_features)
    pooled = tokens.mean(dim=1)
    if name.startswith("vit"):
        pooled = encoder.model.fc_norm(encoder.model.patch_embed.norm(feature_map(encoder, image)).mean(dim=1))
    torch.testing.assert_close(pooled, encoder(image), rtol=1e-4, atol=1e-5)


def test_nearest_spots_are_the_block_of_a_square_array():
    across = np.array([(x, y) for y in range(7) for x in range(7)], dtype=float) * 37.0
    rows, seen, place = nearest_spots(across, 25)
    middle = 24
    assert seen.all() and rows[middle, 0] == middle
    offset = place[middle] - place[middle, 0]
    assert sorted(map(tuple, offset.round(6).tolist())) == [(x, y) for x in range(-2, 3) for y in range(-2, 3)]
    rows, seen, _ = nearest_spots(across[:6], 25)
    assert seen.sum(axis=1).tolist() == [6] * 6 and (rows[:, 6:] == np.arange(6)[:, None]).all()
    assert nearest_spots(across[:1], 9)[1].tolist() == [[True] + [False] * 8]


@torch.no_grad()
@pytest.mark.parametrize("neighbours", ["tiles", "spots"])
def test_prediction_does_not_depend_on_the_batch(data, neighbours):
    model = make_model(data, neighbours=neighbours)
    torch.nn.init.normal_(model.neighbour_encoder.bias)
    rows = np.random.default_rng(0).permutation(data.rows("train", "test"))[:9]
    together = model.predict_step(batch_of(data, rows)).predicted
    alone = torch.cat([model.predict_step(batch_of(data, rows[i : i + 1])).predicted for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("neighbours", ["tiles", "spots"])
def test_every_view_is_its_own_and_of_its_own_section(data, neighbours):
    """A tile changes its own spot alone, features of another spot of the section change all but the target head."""
    model = make_model(data, neighbours=neighbours)
    rows = data.rows("test")
    batch = batch_of(data, rows[[0, 12, 30]])  # two spots of C1, one of C2
    before = model.see(batch)
    batch.image = batch.image.clone()
    batch.image[0] = 1 - batch.image[0]
    after = model.see(batch)
    changed = {name: (after[name] != before[name]).any(dim=1).tolist() for name in before}
    assert changed["fused"] == changed["target"] == [True, False, False]
    assert changed["neighbour"] == changed["whole"] == [False] * 3
    features = data.features.copy()
    features[rows[1]] += 1  # beside the first, far from the second
    kept = {"spots": data.spots, "section_names": data.section_names, "xy_px": data.xy_px}
    model._trainer.datamodule = SimpleNamespace(**kept, tile_features=features)
    model.setup("predict")
    seen = model.see(batch)
    changed = {name: (seen[name] != after[name]).any(dim=1).tolist() for name in before}
    assert changed["fused"] == changed["whole"] == [True, True, False]
    assert changed["target"] == [False] * 3
    assert changed["neighbour"] == [neighbours == "spots", False, False]


def test_gradients_are_those_without_calculating_again(data):
    model = make_model(data)
    view = model.view(0)
    weights = torch.randn(len(view.features), 16)
    found = []
    for see in (model.see_section, lambda x, around: model.global_encoder(model.global_width(x), around)):
        model.zero_grad()
        (see(view.features, view.around) * weights).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert {name.split(".")[0] for name in found[0]} == {"global_encoder", "global_width"}
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


# learning


@pytest.mark.slow
@pytest.mark.parametrize("neighbours", ["tiles", "spots"])
def test_overfits_eight_spots(data, neighbours):
    rows, draw = data.rows("train")[:8], torch.Generator().manual_seed(0)
    batch = batch_of(data, rows)
    # tiles of noise look alike: each gets a colour, and the section features to tell its spots apart
    batch.image = (0.5 * batch.image + 0.5 * torch.rand(8, 3, 1, 1, generator=draw)).contiguous()
    features = torch.randn(data.features.shape, generator=draw).numpy()
    model = make_model(data, neighbours=neighbours, dim=32, lr=5e-3).train()
    kept = {"spots": data.spots, "section_names": data.section_names, "xy_px": data.xy_px}
    model._trainer.datamodule = SimpleNamespace(**kept, tile_features=features)
    batch.features = torch.from_numpy(features[rows])
    optimizer = model.configure_optimizers()["optimizer"]
    for _ in range(200):
        optimizer.zero_grad()
        model.loss(model.see(batch), batch.target).backward()
        optimizer.step()
    predicted = model.eval().predict_step(batch).predicted.detach()
    error = (predicted - batch.target).square().mean() / batch.target.var(dim=0).mean()
    assert error < 0.05, "a spot is told from seven others"


def test_the_learning_rate_falls_by_steps(data):
    model = make_model(data, lr=1e-3, lr_step=2, lr_decay=0.5)
    made = model.configure_optimizers()
    rates = []
    for _ in range(5):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"].step()
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4]


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_tokens_of_sections_are_kept_only_where_weights_stay(data, tmp_path):
    """Predicting through a trainer, then training, then predicting: nothing of the first is left."""
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    model = make_model(data, lr=1e-2)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tmp_path, log_every_n_steps=1, **quiet
    )
    before = torch.cat([out.predicted for out in trainer.predict(model, datamodule=data)])
    trainer.fit(model, datamodule=data)
    after = torch.cat([out.predicted for out in trainer.predict(model, datamodule=data)])
    assert model._tokens is None
    rows = data.rows("test")
    with torch.no_grad():
        direct = model.eval().predict_step(batch_of(data, rows)).predicted
    torch.testing.assert_close(after, direct, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


@torch.no_grad()
def test_nonnegative_clamps_every_head(data):
    batch = batch_of(data, data.rows("test")[:6])
    plain, clamped = (make_model(data, nonnegative=value).see(batch) for value in (False, True))
    assert any((value < 0).any() for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(clamped[name], value.clamp(min=0))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"neighbours": "hexagons"}, "model.neighbours=hexagons: choose tiles or spots"),
        ({"side": 4}, "model.side=4: an odd whole number .* would fit"),
        ({"kernel_size": 2}, "model.kernel_size=2: an odd whole number"),
        ({"global_heads": 3}, "model.global_heads=3: a divisor of model.dim=16 would fit"),
        ({"neighbour_depth": 0}, "model.neighbour_depth=0: a whole number of at least 1 would fit"),
        ({"fusion_dropout": 1.0}, "model.fusion_dropout=1.0: a number from 0 to below 1 would fit"),
        ({"alpha": -0.1}, "model.alpha=-0.1: a number from 0 to 1 would fit"),
        ({"lr_decay": 0}, "model.lr_decay=0: a number above 0, up to 1 would fit"),
    ],
)
def test_bad_values_are_one_line(kwargs, says):
    with pytest.raises(InputError, match=says):
        Triplex(make_encoder(), 6, 16, **SMALL | kwargs)
