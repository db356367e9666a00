"""Image encoders: any timm model, with the input normalisation its weights need."""

from __future__ import annotations

import difflib
import os
import pickle  # for the name of the error that torch.load raises
import socket
from pathlib import Path
from urllib.parse import urlsplit

import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn

from stexp import InputError


class ImageEncoder(nn.Module):
    """A timm model without its classifier: images in 0..1 to pooled features.

    Parameters
    ----------
    name
        timm's name of the architecture.
    pretrained
        Load weights: from `checkpoint` where given, else from the hub. False: random weights.
    checkpoint
        Local file (``.safetensors``, or ``.pth`` holding tensors only), keys as timm names them.
    frozen
        No gradient, and evaluation mode throughout.
    frozen_norm
        Batch normalisation stays in evaluation mode while the rest trains, for weights whose stored
        statistics are not those of tissue.
    mean, std
        Input normalisation of RGB in 0..1; None: timm's for these weights.
    final_activation
        False leaves out the ReLU between the last batch norm and the pooling of a DenseNet, as the published
        code of mclSTExp does (it pools ``densenet121().features``).
    model_args
        Further arguments of ``timm.create_model``, e.g. ``{"pad_type": "same"}``.

    Raises
    ------
    InputError
        Unknown architecture, or weights that are not to be had or do not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = True,
        checkpoint: str | None = None,
        frozen: bool = False,
        frozen_norm: bool = False,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        final_activation: bool = True,
        model_args: dict | None = None,
    ) -> None:
        super().__init__()
        self.name, self.frozen, self.frozen_norm = name, frozen, frozen_norm
        self.model = _create(name, pretrained, checkpoint, model_args or {})
        if not final_activation:
            last = getattr(getattr(self.model, "features", None), "norm5", None)
            if not hasattr(last, "act"):
                raise InputError(f"image_encoder.final_activation=false: {name} has no activation after its last norm")
            last.act = nn.Identity()
        self.num_features: int = self.model.num_features
        config = self.model.pretrained_cfg
        for key, value in (("mean", mean or config["mean"]), ("std", std or config["std"])):
            self.register_buffer(key, torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        if frozen:
            self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode and not self.frozen)
        if self.frozen_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in 0..1 to features (B, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.model((image - self.mean) / self.std)


def _create(name: str, pretrained: bool, checkpoint: str | None, model_args: dict) -> nn.Module:
    if not timm.is_model(name):
        models = timm.list_models()
        near = [model for model in models if name in model][:4] or difflib.get_close_matches(name, models, n=4)
        raise InputError(f"timm has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    model_args = {"num_classes": 0, **model_args}
    if not pretrained:
        return timm.create_model(name, pretrained=False, **model_args)
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise InputError(f"image_encoder.checkpoint={checkpoint} does not exist")
        model_args["pretrained_cfg_overlay"] = {"file": str(checkpoint)}
    offline = constants.HF_HUB_OFFLINE
    if checkpoint is None and not _hub_answers():
        # the hub's client would retry for a minute; offline it looks into its cache and says at once
        constants.HF_HUB_OFFLINE = True
    try:
        model = timm.create_model(name, pretrained=True, **model_args)
        if checkpoint is not None:
            _check_complete(model, checkpoint)
        return model
    except Exception as error:  # hub, network, pickle and shape errors have no common class
        reason = one_line(error)
        if checkpoint is not None:
            raise InputError(f"weights in {checkpoint} do not load into {name}: {reason}") from error
        raise InputError(
            f"weights of {name} could not be fetched ({reason}). Without network, give them as a file "
            f"(image_encoder.checkpoint=FILE) or start from random weights (image_encoder.pretrained=false)"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline  # the network may be back for the next encoder


def _check_complete(model: nn.Module, checkpoint: str) -> None:
    # without the classifier timm no longer asks for all keys, and a file for another model would pass. fc_norm:
    # files of a ViT with a class token have it under another name, and timm starts it as identity
    needed = [key for key in model.state_dict() if not key.startswith("fc_norm.")]
    there = timm.models.load_state_dict(checkpoint)
    missing = [key for key in needed if key not in there]
    if missing:
        raise KeyError(f"{len(missing)} of its {len(needed)} tensors are not in the file, {missing[0]} for one")


def one_line(error: Exception) -> str:
    """What an error of torch, pickle or the hub says, on one line of bounded length."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _hub_answers(timeout: float = 5.0) -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy resolves names, this machine need not
    address = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname, address.port or 443), timeout):
            return True
    except OSError:
        return False


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from a file that holds nothing but tensors."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, SafetensorError) as error:
        raise InputError(f"{path} is no file of tensors: {one_line(error)}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{path} is no file of tensors: a state dict was expected")
    return state


def from_torchvision(state: dict[str, torch.Tensor], prefix: str) -> tuple[str, dict[str, torch.Tensor]]:
    """timm's name and keys for a torchvision backbone kept as ``nn.Sequential(*children[:-1])``.

    Parameters
    ----------
    state
        A state dict in the naming of mclSTExp's authors.
    prefix
        Where the backbone starts, ``"image_encoder.model."``.

    Returns
    -------
    name, state
        ``densenet121``, ``resnet18/50/101`` or ``vit_base_patch32_224``, and its weights.
    """
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if "0.conv0.weight" in part:
        return "densenet121", {"features" + key[1:]: value for key, value in part.items()}
    if "0.weight" in part and "4.0.conv1.weight" in part:
        children = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
        blocks = len({key.split(".")[1] for key in part if key.startswith("6.")})
        bottleneck = "4.0.conv3.weight" in part
        name = {(2, False): "resnet18", (6, True): "resnet50", (23, True): "resnet101"}.get((blocks, bottleneck))
        if name is not None:
            return name, {f"{children[key.split('.')[0]]}.{key.split('.', 1)[1]}": value for key, value in part.items()}
    if "patch_embed.proj.weight" in part:
        return "vit_base_patch32_224", part
    raise InputError(f"the image encoder under {prefix!r} is none of DenseNet-121, ResNet-18/50/101, ViT-B/32")
