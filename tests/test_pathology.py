"""Published pathology encoders: their sizes, and their loading, on weights made up here under the published names."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from encoders import FOLDER, randomise, settings, tiles
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from safetensors.torch import save_file

from stexp.config import build
from stexp.errors import InputError
from stexp.models.encoders import weights as encoder_weights
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.pathology import ConchV15, ConvStem, ctranspath

# millions of parameters, as LazySlide lists them (src/lazyslide/models/vision at 5ac53f7); CONCH v1.5 alone it does not
PUBLISHED = {
    "uni": 303.4,
    "uni2_h": 681.4,
    "virchow2": 631.2,
    "h_optimus_0": 1130,
    "h_optimus_1": 1130,
    "prov_gigapath": 1130,
    "phikon_v2": 303.4,
    "ctranspath": 27.5,
    "h0_mini": 85.7,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "timm"))
def test_every_encoder_is_built_in_full_and_is_what_its_yaml_says(name):
    with torch.device("meta"):  # shapes without memory: the largest have 1.1 billion parameters
        encoder = build(settings(name, pretrained=False))
        px = 100 if encoder.input_size else 224
        assert encoder(torch.rand(2, 3, px, px)).shape == (2, encoder.num_features)
    if encoder.card is not None:
        assert encoder.card.dim == encoder.num_features and encoder.card.url.startswith("https://")
    if name in PUBLISHED:
        millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
        assert millions == pytest.approx(PUBLISHED[name], abs=0.05 if PUBLISHED[name] < 1000 else 5)
        assert encoder.frozen and encoder.card.um_per_px


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def norm(x, state, name, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q, k, v, heads):
    """Attention head by head, as it is defined."""
    parts = zip(*(tensor.chunk(heads, dim=-1) for tensor in (q, k, v)), strict=True)
    return torch.cat([(a @ b.mT / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in parts], dim=-1)


@pytest.mark.parametrize(
    "name", ["uni", "uni2_h", "virchow2", "h_optimus_0", "h_optimus_1", "prov_gigapath", "h0_mini"]
)
def test_weights_named_as_timm_names_them_are_loaded_and_pooled_as_the_card_says(name, tmp_path):
    small = {"depth": 2, "embed_dim": 48, "num_heads": 2}
    config = settings(name, model_args=small, checkpoint=str(tmp_path / "weights.pth"))
    layers = {"SwiGLUPacked": timm.layers.SwiGLUPacked, "silu": torch.nn.SiLU}
    model_args = {key: layers.get(value, value) for key, value in config.model_args.items()}
    published = randomise(timm.create_model(config.architecture, num_classes=0, global_pool="", **model_args))
    torch.save(published.state_dict(), config.checkpoint)
    encoder = build(config)
    image = tiles(2, 224)
    with torch.no_grad():
        tokens = published((image - encoder.mean) / encoder.std)
        prefix = tokens.shape[1] - (224 // published.patch_embed.patch_size[0]) ** 2
        expected = tokens[:, 0]
        if name in ("virchow2", "h0_mini"):
            assert prefix == 5
            expected = torch.cat([expected, tokens[:, prefix:].mean(dim=1)], dim=1)
        torch.testing.assert_close(encoder(image), expected)
    assert "state_dict" not in encoder.model.pretrained_cfg, "weights are held once"


def transformers_dinov2(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a ViT under the names of transformers' Dinov2Model, with a mask token as it has."""
    state, width = model.state_dict(), model.num_features
    out = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.mask_token": torch.zeros(1, width),
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for part, value in zip(("query", "key", "value"), state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"{theirs}.attention.attention.{part}.{kind}"] = value.clone()
            out[f"{theirs}.attention.output.dense.{kind}"] = state[f"{ours}.attn.proj.{kind}"]
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                out[f"{theirs}.{part}.{kind}"] = state[f"{ours}.{part}.{kind}"]
        for j in (1, 2):
            out[f"{theirs}.layer_scale{j}.lambda1"] = state[f"{ours}.ls{j}.gamma"]
    return out


def dinov2(image, state, heads, eps=1e-6):
    """Class token of transformers' Dinov2Model, written from its names."""
    x = F.conv2d(
        image,
        state["embeddings.patch_embeddings.projection.weight"],
        state["embeddings.patch_embeddings.projection.bias"],
        stride=16,
    )
    x = torch.cat([state["embeddings.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
    x = x + state["embeddings.position_embeddings"]
    for i in range(sum(key.endswith("query.weight") for key in state)):
        at = f"encoder.layer.{i}"
        y = norm(x, state, f"{at}.norm1", eps)
        y = attend(*(linear(y, state, f"{at}.attention.attention.{part}") for part in ("query", "key", "value")), heads)
        x = x + linear(y, state, f"{at}.attention.output.dense") * state[f"{at}.layer_scale1.lambda1"]
        y = F.gelu(linear(norm(x, state, f"{at}.norm2", eps), state, f"{at}.mlp.fc1"))
        x = x + linear(y, state, f"{at}.mlp.fc2") * state[f"{at}.layer_scale2.lambda1"]
    return norm(x, state, "layernorm", eps)[:, 0]


def test_phikon_v2_is_read_in_the_naming_of_transformers(tmp_path):
    small = {"depth": 2, "embed_dim": 32, "num_heads": 4}
    config = settings("phikon_v2", model_args=small, checkpoint=str(tmp_path / "model.safetensors"))
    made = randomise(timm.create_model("vit_large_patch16_224", num_classes=0, init_values=1e-5, **small))
    published = transformers_dinov2(made)
    save_file({key: value.contiguous() for key, value in published.items()}, config.checkpoint)
    encoder, image = build(config), tiles(2, 224)
    with torch.no_grad():
        expected = dinov2((image - encoder.mean) / encoder.std, published, heads=4)
        torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-5)


def test_ctranspath_is_read_in_the_naming_of_the_old_swin(tmp_path):
    """Against torchvision's Swin-T, which like the old one ends a stage with its downsampling."""
    theirs = torchvision.models.swin_t(weights=None)
    theirs.features[0][0], theirs.head = ConvStem(embed_dim=96, patch_size=4, img_size=224).proj, torch.nn.Identity()
    randomise(theirs)
    published = {}
    for key, value in theirs.state_dict().items():
        key = re.sub(r"^features\.0\.0\.", "patch_embed.proj.", key)
        key = re.sub(r"^features\.0\.2\.", "patch_embed.norm.", key)
        key = re.sub(r"^features\.([1357])\.(\d)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}.", key)
        key = re.sub(r"^features\.([246])\.", lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.", key)
        published[key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")] = value
    published["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)  # buffers that it kept
    config = settings("ctranspath", checkpoint=str(tmp_path / "ctranspath.pth"))
    torch.save({"model": published}, config.checkpoint)
    encoder, image = build(config), tiles(2, 224)
    with torch.no_grad():
        expected = theirs((image - encoder.mean) / encoder.std)
        torch.testing.assert_close(encoder(image), expected, rtol=1e-3, atol=1e-4)


def conch(image, state, heads):
    """CONCH v1.5 as TITAN's code has it: positions interpolated as in DINO, then all tokens pooled by one query."""
    x = F.conv2d(image, state["trunk.patch_embed.proj.weight"], state["trunk.patch_embed.proj.bias"], stride=16)
    side, width = x.shape[-1], x.shape[1]
    positions = state["trunk.pos_embed"]
    grid = positions[:, 1:].reshape(1, 14, 14, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((side + 0.1) / 14, (side + 0.1) / 14), mode="bicubic")
    positions = torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)
    x = torch.cat([state["trunk.cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + positions
    for i in range(sum(key.endswith("attn.qkv.weight") for key in state)):
        at = f"trunk.blocks.{i}"
        y = attend(*linear(norm(x, state, f"{at}.norm1", 1e-6), state, f"{at}.attn.qkv").chunk(3, dim=-1), heads)
        x = x + linear(y, state, f"{at}.attn.proj") * state[f"{at}.ls1.gamma"]
        y = F.gelu(linear(norm(x, state, f"{at}.norm2", 1e-6), state, f"{at}.mlp.fc1"))
        x = x + linear(y, state, f"{at}.mlp.fc2") * state[f"{at}.ls2.gamma"]
    x = norm(norm(x, state, "trunk.norm", 1e-6), state, "attn_pool_contrast.ln_k", 1e-5)
    k, v = linear(x, state, "attn_pool_contrast.to_kv").chunk(2, dim=-1)
    query = norm(state["attn_pool_contrast.query"], state, "attn_pool_contrast.ln_q", 1e-5)
    pooled = attend(linear(query, state, "attn_pool_contrast.to_q").expand(len(x), -1, -1), k, v, heads=8)
    return norm(linear(pooled, state, "attn_pool_contrast.to_out")[:, 0], state, "ln_contrast", 1e-5)


def test_conch_v1_5_is_read_with_its_positions_brought_to_448_px(tmp_path):
    small = {"depth": 1, "embed_dim": 32, "num_heads": 4}
    published = randomise(ConchV15(**small, img_size=224)).state_dict()
    assert published["trunk.pos_embed"].shape == (1, 1 + 14 * 14, 32)
    config = settings("conch_v1_5", model_args=small, checkpoint=str(tmp_path / "pytorch_model_vision.bin"))
    torch.save(published, config.checkpoint)
    encoder, image = build(config), tiles(2, 448)
    with torch.no_grad():
        expected = conch((image - encoder.mean) / encoder.std, published, heads=4)
        torch.testing.assert_close(encoder(image), expected, rtol=1e-3, atol=1e-4)
    # what is saved from here has 28 x 28 positions, and goes in as it is
    torch.save(encoder.model.state_dict(), config.checkpoint)
    torch.testing.assert_close(build(config).model.state_dict(), encoder.model.state_dict(), rtol=0, atol=0)


def test_own_architectures_can_be_tuned_in_part():
    small = {"depth": 3, "embed_dim": 32, "num_heads": 4}
    for tuning, n in (("lora", 3 * 2 * 2), ("last", None)):
        encoder = build(settings("conch_v1_5", pretrained=False, frozen=False, tuning=tuning, model_args=small))
        trained = [key for key, parameter in encoder.named_parameters() if parameter.requires_grad]
        if n is None:  # the last two blocks, the norm, and the pooling after them
            assert {re.match(r"model\.(trunk\.blocks\.\d|trunk\.\w+|\w+)", key)[1] for key in trained} == {
                *("trunk.blocks.1", "trunk.blocks.2", "trunk.norm", "attn_pool_contrast", "ln_contrast"),
            }
        else:
            assert len(trained) == n


def test_weights_of_a_deeper_model_are_not_taken_for_these(tmp_path):
    def model(depth: int) -> torch.nn.Module:
        return timm.create_model("test_vit", num_classes=0, depth=depth)

    save_file(model(8).state_dict(), tmp_path / "deeper.safetensors")
    with pytest.raises(InputError, match=r"the file holds 24 tensors that it has no place for, blocks.6"):
        ImageEncoder("test_vit", checkpoint=str(tmp_path / "deeper.safetensors"))
    save_file(ctranspath(num_classes=0, embed_dim=24).state_dict(), tmp_path / "narrow.safetensors")
    with pytest.raises(InputError, match=r"do not load into ctranspath: .*size mismatch"):
        build(settings("ctranspath", checkpoint=str(tmp_path / "narrow.safetensors")))


def test_the_hub_is_asked_for_the_repository_and_file_of_the_yaml(monkeypatch, tmp_path):
    small, asked = {"depth": 1, "embed_dim": 32, "num_heads": 4}, []
    made = randomise(timm.create_model("vit_large_patch16_224", num_classes=0, init_values=1e-5, **small))
    states = {
        "MahmoodLab/UNI": made.state_dict(),
        "owkin/phikon-v2": transformers_dinov2(made),
        "MahmoodLab/conchv1_5": randomise(ConchV15(**small)).state_dict(),
    }

    def from_hub(repository: str, filename: str, revision: str | None = None) -> str:
        asked.append((repository, filename))
        if filename == "model.safetensors":
            raise EntryNotFoundError("404")
        torch.save(states[repository], tmp_path / filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(encoder_weights, "hf_hub_download", from_hub)
    monkeypatch.setattr(encoder_weights, "hub_answers", lambda: True)
    image = tiles(1, 224)
    with torch.no_grad():
        uni, phikon, _ = (build(settings(name, model_args=small)) for name in ("uni", "phikon_v2", "conch_v1_5"))
        torch.testing.assert_close(uni(image), phikon(image))  # the same weights in two namings
    assert asked == [
        ("MahmoodLab/UNI", "model.safetensors"),
        ("MahmoodLab/UNI", "pytorch_model.bin"),
        ("owkin/phikon-v2", "model.safetensors"),
        ("owkin/phikon-v2", "pytorch_model.bin"),
        ("MahmoodLab/conchv1_5", "pytorch_model_vision.bin"),
    ]


@pytest.mark.parametrize("token", [None, "hf_x"])
def test_a_gated_model_says_where_to_accept_what(monkeypatch, token):
    class Refused(GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "401 Client Error.\nAccess to model MahmoodLab/UNI is restricted.")

    def refuse(*_args, **_kwargs):
        raise Refused if token else OSError("offline")

    monkeypatch.setattr(encoder_weights, "hf_hub_download", refuse)
    monkeypatch.setattr(encoder_weights, "get_token", lambda: token)
    monkeypatch.setattr(encoder_weights, "hub_answers", lambda: False)
    small = {"depth": 1, "embed_dim": 32, "num_heads": 4}
    with pytest.raises(InputError, match="weights of uni are given") as caught:
        build(settings("uni", model_args=small))
    message = str(caught.value)
    for part in ("https://huggingface.co/MahmoodLab/UNI", "HF_TOKEN", "image_encoder.checkpoint=FILE"):
        assert part in message
    assert "\n" not in message
    with pytest.raises(InputError, match=r"weights of phikon_v2 could not be fetched \(") as caught:
        build(settings("phikon_v2", model_args=small))
    assert "HF_TOKEN" not in str(caught.value)


def test_weights_that_are_on_no_hub_are_asked_for_as_a_file():
    with pytest.raises(
        InputError, match=r"ctranspath are not on the hub; bring them from https://github.com/Xiyue-Wang"
    ):
        build(settings("ctranspath"))
