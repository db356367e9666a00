"""What of an image encoder trains: updates of low rank, or its last blocks."""

from __future__ import annotations

import re

import pytest
import torch
from encoders import tiles

from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.tuning import LoRALinear


def step(encoder: ImageEncoder, image: torch.Tensor, n: int = 3) -> set[str]:
    """Train a few steps; names of parameters and buffers that are others afterwards."""
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in encoder.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(n):
        optimizer.zero_grad()
        encoder(image).square().sum().backward()
        optimizer.step()
    return {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_lora_starts_as_identity_and_trains_updates_of_the_attention_alone(name):
    small = {"test_vit": {}, "swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1, 1, 1)}}[name]
    arguments = {"pretrained": False, "model_args": {"img_size": 64, **small}}
    plain = ImageEncoder(name, **arguments).eval()
    encoder = ImageEncoder(name, tuning="lora", lora_rank=3, lora_alpha=6, **arguments)
    missing = encoder.load_state_dict(plain.state_dict(), strict=False).missing_keys  # weights keep their names
    assert missing and all(key.rsplit(".")[-1] in ("lora_a", "lora_b") for key in missing)
    image = tiles(2, 64)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(image), plain(image))
    trained = {key: p for key, p in encoder.named_parameters() if p.requires_grad}
    assert set(trained) == set(missing)
    widths = [block.attn.proj.in_features for block in plain.model.modules() if hasattr(block, "attn")]
    assert sum(p.numel() for p in trained.values()) == sum(3 * (d + 3 * d) + 3 * (d + d) for d in widths)
    encoder.train()
    assert all(isinstance(module, ImageEncoder) or not module.training for module in encoder.modules())
    assert step(encoder, image) == set(missing)
    # a checkpoint brings the same features back
    fresh = ImageEncoder(name, tuning="lora", lora_rank=3, lora_alpha=6, **arguments).eval()
    fresh.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fresh(image), encoder.eval()(image), rtol=0, atol=0)
        assert not torch.allclose(fresh(image), plain(image), atol=1e-3)


def test_lora_is_a_low_rank_addition_to_the_weight():
    torch.manual_seed(0)
    linear = torch.nn.Linear(7, 5)
    lora = LoRALinear(linear, rank=2, alpha=6)
    torch.nn.init.normal_(lora.lora_b)
    merged = linear.weight + 6 / 2 * lora.lora_b @ lora.lora_a
    x = torch.rand(3, 7)
    torch.testing.assert_close(lora(x), x @ merged.T + linear.bias)
    assert torch.linalg.matrix_rank(merged - linear.weight) == 2


@pytest.mark.parametrize(
    ("name", "model_args", "n", "expected"),
    [
        ("test_vit", {"img_size": 32}, 2, r"model\.(blocks\.[45]|norm|fc_norm)\."),
        ("test_resnet", {}, 1, r"model\.layer4\.0\."),
        (
            "convnext_tiny",
            {"depths": [1, 1, 1, 2], "dims": [8, 8, 8, 8]},
            1,
            r"model\.(stages\.3\.blocks\.1|head\.norm)\.",
        ),
        ("densenet121", {"block_config": [1, 1, 1, 2]}, 1, r"model\.features\.(denseblock4\.denselayer2|norm5)\."),
    ],
)
def test_the_last_blocks_train_and_nothing_before_them_moves(name, model_args, n, expected):
    encoder = ImageEncoder(name, pretrained=False, tuning="last", last_blocks=n, model_args=model_args).train()
    trained = {key for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, _ in encoder.named_parameters() if re.match(expected, key)} != set()
    moved = step(encoder, tiles(4, 32) + 0.1)
    assert trained <= moved
    assert all(re.match(expected, key) for key in moved), "batch statistics of frozen blocks stay, too"
