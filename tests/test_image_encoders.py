"""Image encoders: what goes in, what trains, where weights come from."""

from __future__ import annotations

import logging
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from encoders import settings, tiles
from huggingface_hub import constants
from safetensors.torch import save_file

from stexp.config import build
from stexp.errors import InputError
from stexp.models.encoders import image as image_encoders
from stexp.models.encoders import weights as encoder_weights
from stexp.models.encoders.frozen import weights_digest
from stexp.models.encoders.image import ImageEncoder
from stexp.models.encoders.weights import from_torchvision, load_tensors

TINY = "test_resnet"


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


def test_tiles_of_another_size_are_resized_and_that_is_said_once(caplog):
    caplog.set_level(logging.INFO, logger=image_encoders.__name__)
    image_encoders._log_resizing.cache_clear()
    encoder = ImageEncoder("test_vit", pretrained=False, input_size=160).eval()
    expected = F.interpolate(tiles(2, 60), (160, 160), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(encoder(tiles(2, 60)), encoder(expected), rtol=0, atol=0)
        encoder(tiles(2, 60))
    assert [record.message for record in caplog.records] == [
        "tiles of 60 px are resized to the 160 px that test_vit takes"
    ]
    # antialiased: a board of single pixels shrinks to grey, where sampling would keep black or white
    board = (torch.arange(320)[:, None] + torch.arange(320)) % 2 * torch.ones(1, 3, 1, 1)
    grey = encoder.prepare(board) * encoder.std + encoder.mean
    assert (grey - 0.5).abs().max() < 0.05


def test_outputs_of_a_transformer():
    torch.manual_seed(0)
    model_args = {"reg_tokens": 3, "img_size": 32}
    whole = ImageEncoder("test_vit", pretrained=False, output="cls+mean", model_args=model_args).eval()
    found = {}
    for output in ("cls", "mean", "cls+mean"):
        encoder = ImageEncoder("test_vit", pretrained=False, output=output, model_args=model_args).eval()
        encoder.load_state_dict(whole.state_dict())
        with torch.no_grad():
            found[output] = encoder(tiles())
        assert found[output].shape == (4, encoder.num_features)
    tokens = whole.model.forward_features(whole.prepare(tiles()))  # class, 3 registers, 2 x 2 patches
    assert tokens.shape[1] == 1 + 3 + 4
    torch.testing.assert_close(found["cls"], tokens[:, 0])
    torch.testing.assert_close(found["mean"], tokens[:, 4:].mean(dim=1))
    assert torch.equal(found["cls+mean"], torch.cat([found["cls"], found["mean"]], dim=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "mean"}, "image_encoder.output=mean: test_resnet has no class token; pooled would fit"),
        (
            {"output": "levels"},
            "image_encoder.output=levels is of a frozen network; .*frozen=true would fit",
        ),
        ({"output": "max"}, "image_encoder.output=max: choose pooled, cls, mean, cls.mean or levels"),
        ({"tuning": "frozen"}, "image_encoder.tuning=frozen: choose all, last or lora"),
        ({"tuning": "lora"}, "image_encoder.tuning=lora is for attention, and this encoder has none"),
        ({"tuning": "last", "last_blocks": 5}, "image_encoder.last_blocks=5: this encoder has 4"),
        ({"tuning": "last", "frozen": True}, "tuning=last needs image_encoder.frozen=false"),
        ({"last_blocks": 0}, "image_encoder.last_blocks=0: a whole number of at least 1 would fit"),
        ({"lora_rank": 1.5}, "image_encoder.lora_rank=1.5: a whole number of at least 1 would fit"),
        ({"lora_alpha": 0}, "image_encoder.lora_alpha=0: a number above 0 would fit"),
        ({"input_size": 0}, "image_encoder.input_size=0: a whole number of at least 1"),
        ({"card": {"licence": "MIT", "size": 3}}, "image_encoder.card takes no key 'size'"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        build(settings("tiny", **changes))


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
        return weights_digest(ImageEncoder("mobilenetv2_100", pretrained=False, **kwargs), None)

    settings = [
        {},
        {"mean": [0, 0, 0]},
        {"std": [1, 1, 1]},
        {"model_args": {"pad_type": "same"}},
        {"model_args": {"global_pool": "max"}},
        {"input_size": 64},
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


def test_an_older_timm_that_reads_pickles_whole_runs_nothing(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"conv1.weight": _Evil(tmp_path / "ran")}, protocol=2))

    def older(name, pretrained=False, **_):
        return torch.load(tmp_path / "weights.pth", weights_only=False)

    monkeypatch.setattr(timm, "create_model", older)
    monkeypatch.setattr(encoder_weights, "hub_answers", lambda: True)
    with pytest.raises(InputError, match="could not be fetched"):
        ImageEncoder(TINY, pretrained=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["state_dict", "model", "model_ema"])
def test_weights_are_found_where_training_scripts_put_them(tmp_path, place):
    model = timm.create_model(TINY, num_classes=0)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({place: state, "epoch": 3}, tmp_path / "x.pth")
    encoder = ImageEncoder(TINY, checkpoint=str(tmp_path / "x.pth"))
    torch.testing.assert_close(dict(encoder.model.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_args", "says"),
    [
        ({"checkpoint_path": "x.pth"}, "model_args.checkpoint_path is not taken"),
        ({"pretrained_cfg": "x"}, "model_args.pretrained_cfg is not taken"),
        ({"cache_dir": "x"}, "model_args.cache_dir is not taken"),
        ({"padtype": "same"}, "did you mean pad_type"),
        ({"act_layer": {"_target_": "x"}}, "model_args.act_layer=.*a number, a word or a list"),
    ],
)
def test_arguments_of_timm_are_those_of_the_list(model_args, says):
    with pytest.raises(InputError, match=says):
        ImageEncoder(TINY, pretrained=False, model_args=model_args)


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp", "../resnet18"])
def test_a_place_is_no_architecture(name):
    with pytest.raises(InputError, match="timm has no model"):
        ImageEncoder(name, pretrained=False)


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
    monkeypatch.setattr(encoder_weights, "hub_answers", lambda: False)
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
    assert not encoder_weights.hub_answers()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert encoder_weights.hub_answers()
    assert len(calls) == 1


# real weights


@pytest.mark.data
def test_the_real_mobilenet_tells_textures_apart(real_data):
    path = real_data.parent / "weights" / "mobilenetv2_100_imagenet.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the real data")
    encoder = build(settings("mobilenetv2", checkpoint=str(path), frozen=True)).train()
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
    other = build(settings("mobilenetv2", checkpoint=str(path), frozen=True, model_args={"pad_type": ""}))(crops)
    agreement = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(features.numpy(), other.numpy(), strict=True)])
    assert agreement < 0.9


def test_what_a_library_says_is_repeated_in_whole_sentences():
    one_line, first = encoder_weights.one_line, "An error happened while trying to locate the file."
    assert one_line(OSError(first)) == first.removesuffix(".")
    assert one_line(OSError(f"{first} {'Please check your connection and try again ' * 9}")) == first.removesuffix(".")
    words = "some words without an end " * 20
    shortened = one_line(OSError(words))
    assert shortened.endswith(" ...") and words.startswith(shortened.removesuffix("..."))
    assert one_line(KeyError("a\nb")) == "a b" and one_line(ValueError()) == "ValueError"


@torch.no_grad()
@pytest.mark.parametrize("scales", [None, [0.5, 1]])
def test_levels_are_means_and_deviations_of_every_map_of_the_network(scales):
    torch.manual_seed(0)
    encoder = ImageEncoder(TINY, pretrained=False, frozen=True, output="levels", scales=scales)
    randomise_norms(encoder.model)
    network = timm.create_model(TINY, features_only=True).eval()  # which gives its maps by itself
    assert not network.load_state_dict(encoder.model.state_dict(), strict=False).missing_keys
    image = tiles(3, 64)
    views = [image] if scales is None else [image[..., 16:48, 16:48], image]
    expected = []
    for view in views:
        for level in network(encoder.prepare(view)):
            pixels = level.double().flatten(2).numpy()
            expected += [pixels.mean(axis=2), pixels.std(axis=2)]
    features = encoder(image)
    assert features.shape == (3, encoder.num_features)
    np.testing.assert_allclose(features, np.concatenate(expected, axis=1), rtol=1e-3, atol=1e-4)


def test_features_of_levels_have_a_key_of_their_own():
    torch.manual_seed(0)
    levels = ImageEncoder(TINY, pretrained=False, frozen=True, output="levels")
    torch.manual_seed(0)
    assert weights_digest(levels, None) != weights_digest(ImageEncoder(TINY, pretrained=False, frozen=True), None)
