"""The authors' weights: the published architecture, written down once more and plainly, gives the same embeddings."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from stexp.errors import InputError
from stexp.models.mclstexp import MclSTExp

GENES, POSITIONS, HEADS, HEAD_DIM, DIM = 12, 40, 8, 64, 256


class PreNorm(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(GENES), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(GENES, 3 * HEADS * HEAD_DIM, bias=False)
        self.to_out = nn.Sequential(nn.Linear(HEADS * HEAD_DIM, GENES), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        heads = []
        for h in range(HEADS):
            part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
            weight = torch.softmax(q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(HEAD_DIM), dim=-1)
            heads.append(weight @ v[..., part])
        return self.to_out(torch.cat(heads, dim=-1))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(GENES, GENES), nn.GELU(), nn.Dropout(0.0), nn.Linear(GENES, GENES), nn.Dropout(0.0)
        )

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = PreNorm(Attention()), PreNorm(FeedForward())

    def forward(self, x):
        x = self.attn(x) + x
        return self.ff(x) + x


class Head(nn.Module):
    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.projection, self.fc, self.layer_norm = nn.Linear(n_features, DIM), nn.Linear(DIM, DIM), nn.LayerNorm(DIM)

    def forward(self, x):
        projected = self.projection(x)
        return self.layer_norm(self.fc(nn.functional.gelu(projected)) + projected)


class Backbone(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        if name == "vit":
            self.model = timm.create_model("vit_base_patch32_224", num_classes=0, global_pool="avg")
        else:
            self.model = nn.Sequential(*list(torchvision.models.get_model(name, weights=None).children())[:-1])

    def forward(self, image):
        features = self.model(image)
        return features if features.ndim == 2 else features.mean(dim=(2, 3))


class Published(nn.Module):
    """mclSTExp_Attention with the names of its state dict."""

    def __init__(self, name: str, n_features: int, depth: int) -> None:
        super().__init__()
        self.x_embed, self.y_embed = nn.Embedding(POSITIONS, GENES), nn.Embedding(POSITIONS, GENES)
        self.image_encoder = Backbone(name)
        self.spot_encoder = nn.Sequential(*[Block() for _ in range(depth)])
        self.image_projection, self.spot_projection = Head(n_features), Head(GENES)

    def image(self, image):
        return self.image_projection(self.image_encoder(image))

    def spot(self, expression, xy):
        x = expression + self.x_embed(xy[:, 0]) + self.y_embed(xy[:, 1])
        return self.spot_projection(self.spot_encoder(x.unsqueeze(0))).squeeze(0)


def published(name: str = "densenet121", n_features: int = 1024, depth: int = 2) -> Published:
    torch.manual_seed(0)
    model = Published(name, n_features, depth).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as a trained model has them, not 0 and 1
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def inputs(px: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return (
        torch.rand(3, 3, px, px, generator=draws),
        3 * torch.rand(9, GENES, generator=draws),
        torch.randint(0, POSITIONS, (9, 2), generator=draws),
    )


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "n_features", "depth", "px"),
    [
        ("densenet121", 1024, 2, 64),
        ("resnet18", 512, 1, 64),
        ("resnet50", 2048, 3, 64),
        ("vit", 768, 2, 224),
    ],
)
def test_embeddings_equal_those_of_the_published_architecture(tmp_path, name, n_features, depth, px):
    theirs = published(name, n_features, depth)
    torch.save(theirs.state_dict(), tmp_path / "authors.pth")
    ours = MclSTExp.from_authors(tmp_path / "authors.pth")
    assert not ours.training
    image, expression, xy = inputs(px)
    torch.testing.assert_close(ours.embed_image(image), theirs.image(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.embed_spots(expression, xy), theirs.spot(expression, xy), rtol=0, atol=1e-5)
    assert (theirs.image(image)[0] - theirs.image(image)[1]).abs().max() > 1e-3  # tiles matter,
    assert (theirs.spot(expression, xy.roll(1, 0)) - theirs.spot(expression, xy)).abs().max() > 1e-2  # positions, too


@pytest.fixture(scope="module")
def theirs() -> Published:
    return published("resnet18", 512, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",  # saved from data-parallel training
        lambda key: key.replace("spot_encoder", "well_encoder").replace("spot_projection", "well_projection"),
    ],
    ids=["data-parallel", "older naming"],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_ways_to_save_them_are_accepted(tmp_path, theirs, rename, suffix):
    state = {rename(key): value for key, value in theirs.state_dict().items()}
    path = tmp_path / f"authors{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    ours = MclSTExp.from_authors(path)
    image, expression, xy = inputs(64)
    torch.testing.assert_close(ours.embed_image(image), theirs.image(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.embed_spots(expression, xy), theirs.spot(expression, xy), rtol=0, atol=1e-5)


def without(state: dict, prefix: str) -> dict:
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: without(state, "x_embed"),
        lambda state: without(state, "y_embed"),
        lambda state: without(state, "spot_encoder.0.ff"),
        lambda state: without(state, "spot_encoder"),
        lambda state: without(state, "image_projection.fc"),
        lambda state: without(state, "image_encoder"),
        lambda state: without(state, "image_encoder.model.7.1"),
        lambda state: state | {"spot_encoder.0.attn.fn.to_gate.weight": torch.zeros(2, 2)},
        lambda state: state | {"spot_projection.projection.weight": torch.zeros(DIM, GENES + 1)},
        lambda state: state | {"x_embed.weight": torch.zeros(3)},
        lambda state: {"state_dict": state},
        lambda state: [1, 2],
        lambda state: {},
    ],
)
def test_a_state_dict_of_something_else_is_refused(tmp_path, theirs, change):
    torch.save(change(dict(theirs.state_dict())), tmp_path / "authors.pth")
    with pytest.raises(InputError) as caught:
        MclSTExp.from_authors(tmp_path / "authors.pth")
    assert "authors.pth" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_half_a_file_is_refused(tmp_path, theirs):
    torch.save(theirs.state_dict(), tmp_path / "authors.pth")
    content = (tmp_path / "authors.pth").read_bytes()
    (tmp_path / "authors.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"authors.pth is no file of tensors"):
        MclSTExp.from_authors(tmp_path / "authors.pth")
