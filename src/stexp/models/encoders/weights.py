"""Weights of image encoders: from files, from the Hugging Face hub, in timm's naming and in others."""

from __future__ import annotations

import difflib
import functools
import os
import pickle  # for the name of the error that torch.load raises
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import timm
import torch
from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from safetensors import SafetensorError
from torch import nn

from stexp.arguments import Positive, Width, checked
from stexp.errors import InputError
from stexp.models.encoders.pathology import ARCHITECTURES, timm_names

_LAYERS = {"SwiGLUPacked": timm.layers.SwiGLUPacked}  # that a yaml may name
LONGEST = 200
"""Letters of a library's message that an error of ours repeats."""
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@checked("image_encoder.card")
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

    dim: Width
    um_per_px: Positive | list[Positive] | None
    licence: str
    url: str
    gated: bool = False


@dataclass(frozen=True)
class Weights:
    """Where the weights of an encoder come from."""

    name: str
    hub: str | None
    hub_file: str | None
    checkpoint: str | None
    card: Card | None


def create_model(architecture: str, weights: Weights | None, model_args: dict) -> nn.Module:
    """A timm model or one of `ARCHITECTURES`, with random weights where `weights` is None."""
    own = ARCHITECTURES.get(architecture)
    if own is None and (set(architecture) & set(":/\\") or not timm.is_model(architecture)):
        models = [*timm.list_models(), *ARCHITECTURES]
        near = [model for model in models if architecture in model][:4]
        near = near or difflib.get_close_matches(architecture, models, n=4)
        raise InputError(f"timm has no model {architecture!r}" + (f"; near it: {', '.join(near)}" if near else ""))
    model_args = {key: _LAYERS.get(value, value) if key == "mlp_layer" else value for key, value in model_args.items()}
    make = own or functools.partial(timm.create_model, architecture)
    if weights is None:
        return make(**model_args)
    if weights.checkpoint is not None:
        return _from_file(make, own is not None, weights, weights.checkpoint, model_args)
    if own is not None and weights.hub is None:
        where = f"; bring them from {weights.card.url}, and" if weights.card else ":"
        raise InputError(f"weights of {weights.name} are not on the hub{where} give image_encoder.checkpoint=FILE")
    return _from_hub(make, own is not None, weights, model_args)


def _from_file(make, own: bool, weights: Weights, path: str, model_args: dict) -> nn.Module:
    if not Path(path).is_file():
        raise InputError(f"image_encoder.checkpoint={path} does not exist")
    try:
        return _load(make, own, _read_state(Path(path)), model_args)
    except Exception as error:  # pickle, key and shape errors have no common class
        raise InputError(f"weights in {path} do not load into {weights.name}: {one_line(error)}") from error


def _from_hub(make, own: bool, weights: Weights, model_args: dict) -> nn.Module:
    offline = constants.HF_HUB_OFFLINE
    if not hub_answers():
        # the hub's client would retry for a minute; offline it looks into its cache and says at once
        constants.HF_HUB_OFFLINE = True
    try:
        if weights.hub is None:
            with _tensors_only():
                return make(pretrained=True, **model_args)
        return _load(make, own, _read_state(_fetch(weights.hub, weights.hub_file)), model_args)
    except Exception as error:  # hub, network, pickle and shape errors have no common class
        if (
            weights.card is not None
            and weights.card.gated
            and (get_token() is None or isinstance(error, GatedRepoError))
        ):
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


def _fetch(hub: str, hub_file: str | None) -> Path:
    """A repository's file of weights, ``owner/name`` or ``owner/name@revision``, from the hub or its cache."""
    repository, _, revision = hub.partition("@")
    names = _HUB_FILES if hub_file is None else (hub_file,)
    for name in names[:-1]:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except EntryNotFoundError:
            continue
    return Path(hf_hub_download(repository, names[-1], revision=revision or None))


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of weights, wherever training scripts put it; tensors only, nothing is executed."""
    if path.suffix == ".safetensors":
        state = safetensors.torch.load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # averaged weights first, as timm has it
        places = ("state_dict_ema", "model_ema", "state_dict", "model")
        state = next((state[place] for place in places if isinstance(state.get(place), dict)), state)
    for wrapper in ("module.", "_orig_mod."):  # of parallel training, of compiled modules
        if all(key.startswith(wrapper) for key in state):
            state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return dict(state)


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let every ``torch.load`` of other packages refuse what is not a tensor; older timm reads pickles whole."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


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


def _check_fits(model: Any, state: dict[str, torch.Tensor]) -> None:
    # without the classifier timm no longer asks for all keys, and a file for another model would pass. fc_norm:
    # files of a ViT with a class token have it under another name, and timm starts it as identity
    names = set(model.state_dict())
    needed = [key for key in names if not key.startswith("fc_norm.")]
    missing = sorted(key for key in needed if key not in state)
    if missing:
        raise KeyError(f"{len(missing)} of its {len(needed)} tensors are not in the file, {missing[0]} for one")
    patch = "patch_embed.proj.weight"  # timm would resample patches of another size
    if patch in names and state[patch].ndim == 4 and state[patch].shape[2:] != model.state_dict()[patch].shape[2:]:
        raise KeyError(f"the file is of a model with patches of {state[patch].shape[-1]} px")
    # a deeper model of the same widths holds all that is needed, and more of the same parts
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    parts = {key.split(".")[0] for key in names}
    more = sorted(key for key in set(state) - names if key.split(".")[0] in parts and not key.startswith(heads))
    if more:
        raise KeyError(f"the file holds {len(more)} tensors that it has no place for, {more[0]} for one")


def one_line(error: Exception) -> str:
    """What an error of torch, pickle or the hub says, on one line: all of it, or the sentences that fit."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    if len(text) > LONGEST:
        words = text[:LONGEST].rpartition(" ")[0] or text[:LONGEST]
        text = words.rpartition(". ")[0] or f"{words} ..."
    return re.sub(r"(?<!\.)\.$", "", text) or type(error).__name__


def hub_answers(timeout: float = 5.0) -> bool:
    """Whether a connection to the hub can be made, or goes through a proxy."""
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
