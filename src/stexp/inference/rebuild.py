"""The network of an exported model, built again from its description and its weights.

A description may come from anyone: it builds methods and encoders of stexp, and nothing else. Nothing in it fetches,
reads or writes, and no tensor is made that the weights do not account for.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stexp import construct
from stexp.errors import InputError
from stexp.inference.tensors import AGAIN
from stexp.models.adapter import as_method, method_class
from stexp.models.method import Method

ENCODER_KEYS = ("image_encoder",)
"""Arguments of a method that may be an encoder."""
FETCHING = {"pretrained": False, "checkpoint": None, "hub": None, "hub_file": None}
"""Arguments of an encoder that would bring weights of its own, and what they are instead."""
Class = TypeVar("Class")
ROOM = 1 << 24  # numbers that a network may make beside its weights: buffers, and what is drawn on the way


def rebuild_method(node: dict, weights: dict[str, torch.Tensor], sizes: dict[str, int]) -> Method:
    """A method of `stexp.models` or of a plug-in in evaluation mode, with the weights under ``model.``.

    Parameters
    ----------
    node
        Its class, under ``_target_``, and its arguments; an encoder among them is such a node, too.
    sizes
        Further arguments, those of them that it takes.

    Raises
    ------
    InputError
        A class that is no method that reads single tiles, an argument that is no plain value, or weights that do not
        fit.
    """
    kind = class_of_method(node)
    if not kind.predicts_slides:
        raise InputError(f"{kind.__name__} reads more than the tile of a spot, and a slide is read tile by tile")
    arguments = {key: _encoder_node(node[key]) for key in ENCODER_KEYS if key in node}
    rest = {key: plain(key, value) for key, value in node.items() if key not in ENCODER_KEYS}
    return as_method(_with_weights({**rest, **arguments}, weights, "model.", sizes))


def rebuild_encoder(node: dict, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """An encoder of `stexp.models.encoders`, or a plug-in, in evaluation mode, with the weights ``features.``."""
    return _with_weights(_encoder_node(node), weights, "features.", {})


def _encoder_node(node: Any) -> dict:
    kind = class_of(node, "stexp.models.encoders.", torch.nn.Module, "encoder")
    if node.get("pretrained") not in (None, False) or node.get("checkpoint") is not None:
        raise InputError(f"the model names weights outside of its folder (pretrained, checkpoint); {AGAIN}")
    rest = {key: plain(key, value) for key, value in node.items() if key not in FETCHING}
    taken = inspect.signature(kind).parameters
    return rest | {key: value for key, value in FETCHING.items() if key in taken}


def class_of_method(node: Any) -> type[Method]:
    """The method that a node names."""
    return method_class(class_of(node, "stexp.models.", pl.LightningModule, "method"))


def class_of(node: Any, package: str, base: type[Class], what: str) -> type[Class]:
    """The class that a node names; InputError where it is no `base` of `package` or of a plug-in."""
    target = node.get("_target_") if isinstance(node, dict) else node
    path = construct.MOVED.get(target, target) if isinstance(target, str) else ""
    kind = None
    plugin = construct.plugin_of(path)
    if re.fullmatch(re.escape(package if plugin is None else f"{plugin}.") + r"[A-Za-z_][\w.]*", path):
        try:
            kind = construct.get_object(path)
        except (ImportError, AttributeError):
            kind = None
    if inspect.isclass(kind) and issubclass(kind, base) and f"{kind.__module__}.{kind.__qualname__}" == path:
        return kind
    raise InputError(
        f"the model names {str(target)[:100]}, which is no {what} of stexp, or of a plug-in that is named here"
    )


def plain(key: str, value: Any) -> Any:
    """The value of an argument: finite numbers, words, lists and objects of them, and no further ``_target_``."""
    if isinstance(value, dict):
        if "_target_" in value:
            raise InputError(f"the model names {str(value['_target_'])[:100]} as {key}, which is no encoder of stexp")
        return {name: plain(f"{key}.{name}", inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [plain(key, inner) for inner in value]
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) < 2**53):
        raise InputError(f"the model is built with {key}={value:.3g}; a finite number below 2^53 would fit")
    return value


def _with_weights(node: dict, weights: dict[str, torch.Tensor], prefix: str, sizes: dict[str, int]) -> Any:
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    with _AsLargeAs(list(state.values())):
        module = construct.build(node, **sizes)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the weights do not fit {node['_target_']} of this stexp: {reason}") from error
    return module.eval().requires_grad_(False)


class _AsLargeAs(TorchDispatchMode):
    """Refuse tensors that are not to be explained by a network's weights, before they are made.

    Parameters
    ----------
    weights
        What the network is to be filled with.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        super().__init__()
        numbers = sum(weight.numel() for weight in weights)
        # a parameter may be drawn in more precision and once more as a copy
        self._left = 4 * numbers + ROOM
        self._calls_left = 200 * len(weights) + 10_000

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._calls_left -= 1
        self._left -= _numbers(func, args)
        if self._left < 0 or self._calls_left < 0:
            raise InputError(f"the model describes a network larger than its weights; {AGAIN}")
        return func(*args, **(kwargs or {}))


def _numbers(func: Any, args: tuple) -> int:
    """How many numbers an operation makes that takes no tensor: as its sizes say, or its end."""
    if any(isinstance(each, torch.Tensor) for each in args):
        return 0
    sizes = [each for each in args if isinstance(each, list | tuple) and all(isinstance(side, int) for side in each)]
    if sizes:
        return max(math.prod(size) for size in sizes)
    ranges = func.overloadpacket.__name__ in ("arange", "linspace", "logspace", "eye", "randperm")
    return int(max((abs(each) for each in args if isinstance(each, int | float)), default=0)) if ranges else 0
