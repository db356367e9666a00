"""What an exported model says of itself, from the run that it comes from."""

from __future__ import annotations

import inspect
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from torch import nn

from stexp import __version__, construct
from stexp.data.digests import file_digest
from stexp.errors import InputError
from stexp.inference.rebuild import FETCHING, class_of, class_of_method, plain
from stexp.models.encoders.frozen import UNTUNED
from stexp.runs import plugins
from stexp.runs.finished import FinishedRun
from stexp.training.checkpoints import load_checkpoint

log = logging.getLogger(__name__)

UNKNOWN_LICENCE = "not stated; that of the training data holds for the reference spots"
ROLES = ("train", "validation", "test", "reference")


def describe_model(run: FinishedRun) -> tuple[dict, dict[str, torch.Tensor]]:
    """``model.json`` as far as the run alone says it, and the weights.

    Raises
    ------
    InputError
        The run has no checkpoint, or its method needs more than tiles.
    """
    config, path = run.config, run.folder.checkpoint
    checkpoint = load_checkpoint(path)
    state = checkpoint["SpotDataModule"]
    node = {key: value for key, value in config["model"].items() if key != "name"}
    name = config["model"]["name"]
    method = class_of_method(node)
    if not method.predicts_slides:
        needed = "whole sections" if method.batching == "section" else "more than the tile of a spot"
        raise InputError(f"{name} cannot predict a slide: it reads {needed}, and a slide is read tile by tile")
    encoder, features = config["image_encoder"], None
    sizes = {"n_genes": len(state["panel"]), "n_positions": state["array_size"]}
    weights = {f"model.{key}": value for key, value in checkpoint["state_dict"].items()}
    if "image_encoder" in node:
        node["image_encoder"] = without_weights(node["image_encoder"], build_encoder(node["image_encoder"], bare=True))
    if "n_features" in inspect.signature(method).parameters:
        pl.seed_everything(config["seed"], verbose=False)  # random weights are those of the run's seed
        untuned = {**encoder, **UNTUNED}  # as the run read it, whatever its config says of training
        built = build_encoder(untuned)
        features = without_weights(untuned, built)
        weights |= {f"features.{key}": value for key, value in built.state_dict().items()}
        sizes["n_features"] = built.num_features
    facts = {
        "method": name,
        "model": node,
        "sizes": sizes,
        "features_by": features,
        "k": run.chosen.get("k"),
        "panel": state["panel"],
        "protocol": asdict(run.protocol),
        "data": config["data"]["name"],
        "fold": run.fold,
        "tile": _tile(run, state),
        "stain": state["stain"],
        "precision": run.provenance["precision"],
        "channels_last": bool(config["hardware"]["channels_last"]),
        "stexp": __version__,
        "plugins": plugins.record(config.get("plugins") or []),
        "licences": {
            "weights": _licence(encoder),
            "data": config["data"].get("licence") or UNKNOWN_LICENCE,
        },
        "trained": {
            "run": run.folder.path.resolve().name,
            "checkpoint": file_digest(path),
            **{key: run.provenance.get(key) for key in ("command", "commit", "dirty", "date", "data_manifest", "from")},
            **({"spots": run.provenance["spots"]} if "spots" in run.provenance else {}),  # runs of before lack it
            "sections": {role: run.data.names(role) for role in ROLES},
        },
    }
    return facts, weights


def _tile(run: FinishedRun, state: dict) -> dict:
    """Pixels and micrometres of a tile, and the scales of the sections that trained."""
    trained = set(run.data.names("train"))
    scales = {section.name: section.um_per_px for section in run.data.sections if section.name in trained}
    stated = [um for um in scales.values() if um is not None]
    if stated and max(stated) > 1.1 * min(stated) and state["tile_um"] is None:
        log.warning(
            "tiles of raw pixels at %.3g to %.3g um/px: a slide is read at the median", min(stated), max(stated)
        )
    return {
        "px": state["tile_px"],
        "um": state["tile_um"],
        "trained_um_per_px": float(np.median(stated)) if len(stated) == len(scales) else None,
        "um_per_px": scales,
    }


def build_encoder(node: dict, *, bare: bool = False) -> nn.Module:
    """The image encoder of a config; `bare` without its weights, so that nothing is fetched."""
    class_of(node, "stexp.models.encoders.", nn.Module, "encoder")
    node = {key: plain(key, value) for key, value in node.items()}
    return construct.build(_taken(node) | (FETCHING if bare else {}))


def without_weights(node: dict, encoder: nn.Module) -> dict:
    """Arguments of an encoder that fetch nothing, its input normalisation as numbers."""
    numbers = {key: encoder.get_buffer(key).flatten().tolist() for key in ("mean", "std")}
    return _taken(node) | FETCHING | numbers


def _taken(node: dict) -> dict:
    taken = inspect.signature(construct.get_object(node["_target_"])).parameters
    return {key: value for key, value in node.items() if key == "_target_" or key in taken}


def _licence(encoder: dict) -> str:
    if not encoder.get("pretrained") and not encoder.get("checkpoint"):
        return "trained from random weights"
    card = encoder.get("card")
    if card:
        return f"{card['licence']} ({card['url']})"
    if encoder.get("checkpoint"):
        return f"that of {Path(encoder['checkpoint']).name}, which is not known here"
    config = timm.get_pretrained_cfg(encoder.get("architecture") or encoder["name"])
    return (config and config.license) or "not stated by timm"
