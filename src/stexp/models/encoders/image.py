"""Image encoders: timm models and published pathology encoders, with the input that their weights need."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import pickle  # for the name of the error that torch.load raises
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants, get_token
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from torch import nn

from stexp.errors import InputError
from stexp.models.encoders.pathology import ARCHITECTURES, timm_names
from stexp.models.encoders.tuning import add_lora, train_last, trained_parts

log = logging.getLogger(__name__)

OUTPUTS = ("pooled", "cls", "mean", "cls+mean")
TUNINGS = ("all", "last", "lora")
_LAYERS = {"SwiGLUPacked": timm.layers.SwiGLUPacked}  # that a yaml may name


@dataclass(frozen=True)
class Card:
    """What its authors say of an encoder.

    Parameters
    ----------
    dim
        Features a tile, F.
    um_per_px
        Scale of the images it was trained on; a list where there are several, None: photographs.
    licence, url
        Of the weights.
    gated
        They are given to who accepts conditions on `url`.
    """

    dim: int
    um_per_px: float | list[float] | None
    licence: str
    url: str
    gated: bool = False


class ImageEncoder(nn.Module):
    """A model without its classifier: images in 0..1 to features.

    Parameters
    ----------
    name
        What it is called; timm's name of the architecture, unless `architecture` says that.
    architecture
        timm's name, ``ctranspath`` or ``conch_v1_5``.
    pretrained
        Load weights: from `checkpoint` where given, else from `hub`, else those of timm. False: random weights.
    hub, hub_file
        Repository on the Hugging Face hub, and the file in it where it has another name than timm looks for.
    checkpoint
        Local file (``.safetensors``, or ``.pth`` holding tensors only), in timm's naming or one that
        :func:`timm_names` knows.
    frozen
        No gradient, and evaluation mode throughout.
    tuning
        What trains where it is not frozen: ``all`` of it, its ``last`` blocks with what follows them, or ``lora``,
        updates of low rank in the attention. Parts that do not train stay in evaluation mode.
    last_blocks
        Of ``tuning="last"``: how many, as timm counts blocks.
    lora_rank, lora_alpha
        Of ``tuning="lora"``, see :class:`LoRALinear`.
    frozen_norm
        Batch normalisation stays in evaluation mode while the rest trains, for weights whose stored
        statistics are not those of tissue.
    input_size
        Pixels a side that images are resized to (bilinear, antialiased); None: they go in as they are.
    output
        ``pooled`` as the model itself pools; of a transformer also its class token (``cls``), the ``mean`` of its
        patch tokens, or both one after the other (``cls+mean``), after the last norm.
    mean, std
        Input normalisation of RGB in 0..1; None: timm's for these weights.
    final_activation
        False leaves out the ReLU between the last batch norm and the pooling of a DenseNet, as the published
        code of mclSTExp does (it pools ``densenet121().features``).
    model_args
        Further arguments of ``timm.create_model``, e.g. ``{"pad_type": "same"}``.
    card
        Arguments of :class:`Card`.

    Attributes
    ----------
    model
        The timm model.
    num_features
        F.

    Raises
    ------
    InputError
        Unknown architecture, or weights that are not to be had or do not fit.
    """

    def __init__(
        self,
        name: str,
        *,
        architecture: str | None = None,
        pretrained: bool = True,
        hub: str | None = None,
        hub_file: str | None = None,
        checkpoint: str | None = None,
        frozen: bool = False,
        tuning: str = "all",
        last_blocks: int = 2,
        lora_rank: int = 8,
        lora_alpha: float = 16,
        frozen_norm: bool = False,
        input_size: int | None = None,
        output: str = "pooled",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        final_activation: bool = True,
        model_args: dict | None = None,
        card: dict | None = None,
    ) -> None:
        super().__init__()
        _check_choices(frozen, tuning, last_blocks, lora_rank, lora_alpha, input_size, output)
        self.name, self.frozen, self.frozen_norm = name, frozen, frozen_norm
        self.input_size, self.output = input_size, output
        self.card = None if card is None else Card(**card)
        args = {"num_classes": 0, **(model_args or {})}
        if output != "pooled":
            args["global_pool"] = ""  # all tokens, normalised
        # what names features that are kept: neither weights nor printed layers hold all of it
        self.built_as = f"{architecture or name} {sorted(args.items())} {final_activation}"
        weights = _Weights(name, hub, hub_file, checkpoint, self.card) if pretrained else None
        self.model = _create(architecture or name, weights, args)
        if not final_activation:
            last = getattr(getattr(self.model, "features", None), "norm5", None)
            if not hasattr(last, "act"):
                raise InputError(f"image_encoder.final_activation=false: {name} has no activation after its last norm")
            last.act = nn.Identity()
        self.num_features: int = self.model.num_features * (2 if output == "cls+mean" else 1)
        if output != "pooled" and not getattr(self.model, "num_prefix_tokens", 0):
            raise InputError(f"image_encoder.output={output}: {name} has no class token; pooled would fit")
        config = self.model.pretrained_cfg
        for key, value in (("mean", mean or config["mean"]), ("std", std or config["std"])):
            self.register_buffer(key, torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        if frozen:
            self.requires_grad_(False)
        elif tuning == "last":
            train_last(self.model, last_blocks)
        elif tuning == "lora":
            add_lora(self.model, lora_rank, lora_alpha)
        self.train(self.training)

    def train(self, mode: bool = True) -> ImageEncoder:
        super().train(mode and not self.frozen)
        if self.training and not all(parameter.requires_grad for parameter in self.parameters()):
            self.model.eval()
            for part in trained_parts(self.model):
                part.train()
        if self.frozen_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in 0..1 as `model` takes them: resized and normalised."""
        if self.input_size is not None and image.shape[-2:] != (self.input_size, self.input_size):
            _say_resized(self.name, image.shape[-1], self.input_size)
            image = F.interpolate(image, size=(self.input_size, self.input_size), mode="bilinear", antialias=True)
        return (image - self.mean) / self.std

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in 0..1 to features (B, F)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = self.model(self.prepare(image))
            if self.output == "pooled":
                return found
            parts = {"cls": found[:, 0], "mean": found[:, self.model.num_prefix_tokens :].mean(dim=1)}
            return torch.cat([parts[part] for part in self.output.split("+")], dim=1)


def _check_choices(
    frozen: bool, tuning: str, last_blocks: int, lora_rank: int, lora_alpha: float, input_size: int | None, output: str
) -> None:
    for key, value, choices in (("tuning", tuning, TUNINGS), ("output", output, OUTPUTS)):
        if value not in choices:
            raise InputError(f"image_encoder.{key}={value}: choose {', '.join(choices)}")
    if frozen and tuning != "all":
        raise InputError(f"image_encoder.frozen=true trains nothing; tuning={tuning} needs image_encoder.frozen=false")
    for key, value in (("last_blocks", last_blocks), ("lora_rank", lora_rank), ("input_size", input_size)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise InputError(f"image_encoder.{key}={value}: a whole number of at least 1 would fit")
    if not lora_alpha > 0:
        raise InputError(f"image_encoder.lora_alpha={lora_alpha}: a number above 0 would fit")


@functools.cache  # once for each pair of sizes
def _say_resized(name: str, px: int, input_size: int) -> None:
    log.info("tiles of %d px are resized to the %d px that %s takes", px, input_size, name)


@dataclass(frozen=True)
class _Weights:
    """Where the weights of an encoder come from."""

    name: str
    hub: str | None
    hub_file: str | None
    checkpoint: str | None
    card: Card | None


def _create(architecture: str, weights: _Weights | None, model_args: dict) -> nn.Module:
    own = ARCHITECTURES.get(architecture)
    if own is None and not timm.is_model(architecture):
        models = [*timm.list_models(), *ARCHITECTURES]
        near = [model for model in models if architecture in model][:4]
        near = near or difflib.get_close_matches(architecture, models, n=4)
        raise InputError(f"timm has no model {architecture!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    model_args = {key: _LAYERS.get(value, value) if key == "mlp_layer" else value for key, value in model_args.items()}
    make = own or functools.partial(timm.create_model, architecture)
    if weights is None:
        return make(**model_args)
    if weights.checkpoint is not None:
        return _from_file(make, own is not None, weights, model_args)
    if own is not None and weights.hub is None:
        where = f"; bring them from {weights.card.url}, and" if weights.card else ":"
        raise InputError(f"weights of {weights.name} are not on the hub{where} give image_encoder.checkpoint=FILE")
    return _from_hub(make, own is not None, weights, model_args)


def _from_file(make, own: bool, weights: _Weights, model_args: dict) -> nn.Module:
    path = weights.checkpoint
    if not Path(path).is_file():
        raise InputError(f"image_encoder.checkpoint={path} does not exist")
    try:
        return _load(make, own, timm.models.load_state_dict(str(path)), model_args)
    except Exception as error:  # pickle, key and shape errors have no common class
        raise InputError(f"weights in {path} do not load into {weights.name}: {one_line(error)}") from error


def _from_hub(make, own: bool, weights: _Weights, model_args: dict) -> nn.Module:
    offline = constants.HF_HUB_OFFLINE
    if not _hub_answers():
        # the hub's client would retry for a minute; offline it looks into its cache and says at once
        constants.HF_HUB_OFFLINE = True
    try:
        if weights.hub is None:
            return make(pretrained=True, **model_args)
        file = {"filename": weights.hub_file} if weights.hub_file else {}
        return _load(make, own, timm.models.load_state_dict_from_hf(weights.hub, **file), model_args)
    except Exception as error:  # hub, network, pickle and shape errors have no common class
        gated = weights.card is not None and weights.card.gated
        if gated and (get_token() is None or isinstance(error, GatedRepoError)):
            raise InputError(
                f"weights of {weights.name} are given to who accepts their conditions on {weights.card.url}: do that, "
                f"and set HF_TOKEN to a token of the same account; or give a file (image_encoder.checkpoint=FILE)"
            ) from error
        raise InputError(
            f"weights of {weights.name} could not be fetched ({one_line(error)}). Without network, give them as a file "
            f"(image_encoder.checkpoint=FILE) or start from random weights (image_encoder.pretrained=false)"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline  # the network may be back for the next encoder


def _load(make, own: bool, state: dict[str, torch.Tensor], model_args: dict) -> nn.Module:
    state = timm_names(state)
    if own:
        model = make(**model_args)
        _check_fits(model, state)
        model.load_state_dict(state)
        return model
    # timm drops the classifier, and brings positions to another image size
    model = make(
        pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state), "custom_load": False}, **model_args
    )
    model.pretrained_cfg.pop("state_dict", None)  # it would be held a second time
    _check_fits(model, state)
    return model


def _check_fits(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    # without the classifier timm no longer asks for all keys, and a file for another model would pass. fc_norm:
    # files of a ViT with a class token have it under another name, and timm starts it as identity
    known = set(model.state_dict())
    needed = [key for key in known if not key.startswith("fc_norm.")]
    missing = sorted(key for key in needed if key not in state)
    if missing:
        raise KeyError(f"{len(missing)} of its {len(needed)} tensors are not in the file, {missing[0]} for one")
    patch = "patch_embed.proj.weight"  # timm would resample patches of another size
    if patch in known and state[patch].ndim == 4 and state[patch].shape[2:] != model.state_dict()[patch].shape[2:]:
        raise KeyError(f"the file is of a model with patches of {state[patch].shape[-1]} px")
    # a deeper model of the same widths holds all that is needed, and more of the same parts
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    parts = {key.split(".")[0] for key in known}
    more = sorted(key for key in set(state) - known if key.split(".")[0] in parts and not key.startswith(heads))
    if more:
        raise KeyError(f"the file holds {len(more)} tensors that it has no place for, {more[0]} for one")


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
