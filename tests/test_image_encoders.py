"""Image encoders: what goes in, what trains, where weights come from."""

from __future__ import annotations

import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import save_file

from stexp import InputError
from stexp.config import CONF, build
from stexp.data.features import _weights_digest
from stexp.models import image_encoders
from stexp.models.image_encoders import ImageEncoder, from_torchvision, load_tensors

TINY = "test_resnet"


def tiles(n: int = 4, px: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, px, px, generator=torch.Generator().manual_seed(seed))


def randomise_norms(model: torch.nn.Module, seed: int = 0) -> None:
    """Batch statistics and affine parameters that matter."""
    draws = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=draws))


def batch_statistics(encoder: ImageEncoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in encoder.named_buffers() if "running" in name}


# what goes in


def test_mean_and_std_are_applied():
    mean, std = [0.7, 0.5, 0.6], [0.2, 0.3, 0.1]
    encoder = ImageEncoder(TINY, pretrained=False, mean=mean, std=std).eval()
    normalised = (tiles() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(encoder(tiles()), encoder.model(normalised))
        assert encoder(tiles()).shape == (4, encoder.num_features)
        encoder = ImageEncoder(TINY, pretrained=False, mean=[0, 0, 0], std=[1, 1, 1]).eval()
        torch.testing.assert_close(encoder(tiles()), encoder.model(tiles()), rtol=0, atol=0)


def test_without_mean_and_std_those_of_timm_are_taken():
    encoder = ImageEncoder(TINY, pretrained=False)
    config = timm.get_pretrained_cfg(TINY)
    np.testing.assert_allclose(encoder.mean.flatten(), config.mean, rtol=1e-6)
    np.testing.assert_allclose(encoder.std.flatten(), config.std, rtol=1e-6)


# what trains


def test_frozen_means_no_gradient_no_drift_and_evaluation_mode():
    encoder = ImageEncoder(TINY, pretrained=False, frozen=True)
    parent = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.num_features, 2)).train()
    assert not any(module.training for module in encoder.modules())
    before = batch_statistics(encoder)
    parent(tiles()).sum().backward()
    assert parent[1].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in encoder.parameters())
    for name, value in batch_statistics(encoder).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_frozen_norm_keeps_batch_statistics_while_the_rest_trains(frozen_norm):
    encoder = ImageEncoder(TINY, pretrained=False, frozen_norm=frozen_norm).train()
    before = batch_statistics(encoder)
    encoder(tiles()).square().sum().backward()
    moved = any(not torch.equal(value, before[name]) for name, value in batch_statistics(encoder).items())
    assert moved is not frozen_norm
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    if frozen_norm:  # a tile's features do not depend on the other tiles, even in training
        torch.testing.assert_close(encoder(tiles())[:1], encoder(tiles()[:1]), rtol=1e-4, atol=1e-5)


# DenseNet as the published code has it


@pytest.fixture(scope="module")
def densenet() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.densenet121(weights=None).eval()
    randomise_norms(model)
    return model


def test_pooling_before_the_last_activation_equals_torchvision_features(densenet):
    encoder = ImageEncoder("densenet121", pretrained=False, mean=[0, 0, 0], std=[1, 1, 1], final_activation=False)
    encoder.eval()
    _, state = from_torchvision(
        {
            f"x.0.{k.removeprefix('features.')}": v
            for k, v in densenet.state_dict().items()
            if k.startswith("features.")
        },
        "x.",
    )
    encoder.model.load_state_dict(state)
    with torch.no_grad():
        expected = densenet.features(tiles(2, 64)).mean(dim=(2, 3))
        torch.testing.assert_close(encoder(tiles(2, 64)), expected, rtol=1e-5, atol=1e-5)
    assert (expected < 0).float().mean() > 0.1


def test_with_the_last_activation_nothing_is_negative_and_other_models_refuse_to_leave_it_out():
    with torch.no_grad():
        assert (ImageEncoder("densenet121", pretrained=False).eval()(tiles(2, 64)) >= 0).all()
    with pytest.raises(InputError, match="final_activation=false: resnet18 has no activation after its last norm"):
        ImageEncoder("resnet18", pretrained=False, final_activation=False)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnets_are_recognised(name):
    theirs = torchvision.models.get_model(name, weights=None).eval()
    randomise_norms(theirs)
    backbone = torch.nn.Sequential(*list(theirs.children())[:-1])
    found, state = from_torchvision({f"x.{k}": v for k, v in backbone.state_dict().items()}, "x.")
    assert found == name
    encoder = ImageEncoder(name, pretrained=False, mean=[0, 0, 0], std=[1, 1, 1]).eval()
    encoder.model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(encoder(tiles(2, 64)), backbone(tiles(2, 64)).flatten(1), rtol=1e-5, atol=1e-5)


def test_kept_features_are_those_of_these_weights_in_these_layers():
    def key(**kwargs):
        torch.manual_seed(0)
        return _weights_digest(ImageEncoder("mobilenetv2_100", pretrained=False, **kwargs), None)

    settings = [
        {},
        {"mean": [0, 0, 0]},
        {"std": [1, 1, 1]},
        {"model_args": {"pad_type": "same"}},
        {"model_args": {"global_pool": "max"}},
    ]
    assert key() == key()
    assert len({key(**setting) for setting in settings}) == len(settings)


# weights from a file


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classifier", [True, False])
def test_weights_come_from_a_local_file(tmp_path, suffix, classifier):
    model = timm.create_model(TINY, num_classes=1000 if classifier else 0).eval()
    randomise_norms(model, seed=1)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    encoder = ImageEncoder(TINY, checkpoint=str(path), mean=[0, 0, 0], std=[1, 1, 1]).eval()
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(tiles()), pre_logits=True)
        torch.testing.assert_close(encoder(tiles()), expected)


def test_weights_of_a_model_that_timm_loads_from_npz_come_from_a_file_too(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    encoder = ImageEncoder("vit_tiny_patch16_224", checkpoint=str(tmp_path / "vit.safetensors"))
    torch.testing.assert_close(encoder.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def write_other_model(path: Path) -> None:
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)


def write_half_the_model(path: Path) -> None:
    state = timm.create_model(TINY, num_classes=0).state_dict()
    save_file({key: state[key] for key in list(state)[: len(state) // 2]}, path)


def write_other_shapes(path: Path) -> None:
    save_file({key: torch.zeros(3, 1) for key in timm.create_model(TINY, num_classes=0).state_dict()}, path)


def write_half_a_file(path: Path) -> None:
    save_file(timm.create_model(TINY, num_classes=0).state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("write", [write_other_model, write_half_the_model, write_other_shapes, write_half_a_file])
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, write):
    write(tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=rf"weights in .*weights.safetensors do not load into {TINY}") as caught:
        ImageEncoder(TINY, checkpoint=str(tmp_path / "weights.safetensors"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [lambda path: ImageEncoder(TINY, checkpoint=str(path)), load_tensors])
def test_a_file_that_holds_more_than_tensors_is_not_run(tmp_path, load):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"conv1.weight": _Evil(tmp_path / "ran")}, protocol=2))
    with pytest.raises(InputError):
        load(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.safetensors", b"not safetensors at all"),
        ("x.pth", b"not a pickle"),
        ("x.pth", b""),
        ("x.pth", pickle.dumps([1, 2], protocol=2)),
    ],
)
def test_files_without_tensors_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is no file of tensors") as caught:
        load_tensors(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_and_models_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint=.*gone.pth does not exist"):
        ImageEncoder(TINY, checkpoint=str(tmp_path / "gone.pth"))
    with pytest.raises(InputError, match=r"gone.pth does not exist"):
        load_tensors(tmp_path / "gone.pth")
    with pytest.raises(InputError, match=r"timm has no model 'densenet122'; near it: .*densenet121"):
        ImageEncoder("densenet122", pretrained=False)
    with pytest.raises(InputError, match=r"timm has no model 'qqq'$"):
        ImageEncoder("qqq", pretrained=False)


def test_without_network_the_message_says_what_else_there_is(tmp_path, monkeypatch):
    def no_network(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(image_encoders, "_hub_answers", lambda: False)
    with pytest.raises(InputError, match="weights of densenet121 could not be fetched") as caught:
        ImageEncoder("densenet121")
    message = str(caught.value)
    assert "image_encoder.checkpoint=FILE" in message and "image_encoder.pretrained=false" in message
    assert not constants.HF_HUB_OFFLINE, "the network may be back for the next encoder"
    assert "\n" not in message


def test_the_hub_is_asked_once_and_not_at_all_behind_a_proxy(monkeypatch):
    calls = []

    def refuse(address, _timeout):
        calls.append(address)
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not image_encoders._hub_answers()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert image_encoders._hub_answers()
    assert len(calls) == 1


# real weights


@pytest.mark.data
def test_the_real_mobilenet_tells_textures_apart(real_data):
    path = real_data.parent / "weights" / "mobilenetv2_100_imagenet.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the real data")
    config = OmegaConf.load(CONF / "image_encoder" / "mobilenetv2.yaml")
    encoder = build(OmegaConf.merge(config, {"checkpoint": str(path), "frozen": True})).train()
    from sklearn.datasets import load_sample_images

    # 8 crops of each of two photographs; crops of one should lie nearer to each other than to the other's
    images = [torch.from_numpy(np.array(image)) for image in load_sample_images().images]
    crops = torch.stack(
        [
            image[y : y + 224, x : x + 224].permute(2, 0, 1) / 255
            for image in images
            for y in (0, 200)
            for x in (0, 130, 260, 390)
        ]
    )
    features = encoder(crops)
    assert features.shape == (16, 1280) and features.min() >= 0 and not features.requires_grad
    unit = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    similarity = unit @ unit.T - 9 * torch.eye(16)
    label = torch.arange(16) // 8
    assert (label[similarity.argmax(dim=1)] == label).all()
    # as its README has it: the largest features of photographs, and other features under timm's own padding
    assert 4 < float(features.max()) < 8
    both_sides = {"checkpoint": str(path), "frozen": True, "model_args": {"pad_type": ""}}
    other = build(OmegaConf.merge(config, both_sides))(crops)
    agreement = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(features.numpy(), other.numpy(), strict=True)])
    assert agreement < 0.9
