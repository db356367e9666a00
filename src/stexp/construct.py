"""Objects from plain data: what a config, or the description of an exported model, may call."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from typing import Any

from stexp.arguments import check_keys
from stexp.errors import InputError, did_you_mean

ALLOWED = ("stexp.", "pytorch_lightning.callbacks.", "pytorch_lightning.loggers.", "pytorch_lightning.trainer.")
"""Where the classes are defined that a config may call; of functions, only ``read_<name>`` of the reader <name>."""

MOVED = {
    "stexp.callbacks.EpochLines": "stexp.training.callbacks.EpochLines",
    "stexp.callbacks.Health": "stexp.training.callbacks.Health",
    "stexp.callbacks.ReseedEpochs": "stexp.training.callbacks.ReseedEpochs",
    "stexp.callbacks.ScoreValidation": "stexp.training.callbacks.ScoreValidation",
    "stexp.logs.WandbRun": "stexp.training.loggers.WandbRun",
    "stexp.models.image_encoders.ImageEncoder": "stexp.models.encoders.image.ImageEncoder",
} | {
    f"stexp.data.readers.{name}.read": f"stexp.data.readers.{name}.read_{name}"
    for name in ("alex10x", "cscc", "demo", "her2st", "hest", "samplesheet", "visium")
}
"""Targets that run folders and exported models of earlier versions name -> where they are today."""


def get_object(path: str) -> Any:
    """What a dotted path names, where it is today; modules on the way are imported.

    Raises
    ------
    InputError
        There is nothing of this name. What a module raises while it is imported comes as it is.
    """
    path = MOVED.get(path, path)
    parts = path.split(".")
    scope: Any = None
    for n, part in enumerate(parts):
        module = ".".join(parts[: n + 1])
        is_package = scope is None or hasattr(scope, "__path__")
        if n and part and hasattr(scope, part):
            scope = getattr(scope, part)
        elif part and is_package and (module in sys.modules or importlib.util.find_spec(module)):
            scope = importlib.import_module(module)
        else:
            modules = [module.name for module in pkgutil.iter_modules(getattr(scope, "__path__", []))]
            near = did_you_mean(part, [*modules, *dir(scope)])
            raise InputError(f"_target_ {path} cannot be found: there is no {module}{near}")
    return scope


def build(node: Any, **extra: Any) -> Any:
    """Call what ``_target_`` names with the other keys as arguments, inner nodes first.

    Parameters
    ----------
    node
        Plain data; dict and list without ``_target_`` come back as they are.
    extra
        What the outermost call gets besides, as it is: those of them that it names.

    Raises
    ------
    InputError
        A target outside `ALLOWED`, a key that the target does not take (with the nearest it does) or lacks, or a
        value that it refuses. Any other error of a class of stexp is a bug, and comes as it is.
    """
    if isinstance(node, list):
        return [build(item) for item in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: build(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    target = MOVED.get(str(node["_target_"]), str(node["_target_"]))
    function: Any = get_object(target) if target.startswith(("stexp.", "pytorch_lightning.")) else None
    # judged by where it is defined: a name may lead through a module's imports to something else
    module = f"{getattr(function, '__module__', '')}."
    folder, _, reader = module.rstrip(".").rpartition(".")
    is_reader = folder == "stexp.data.readers" and getattr(function, "__name__", "") == f"read_{reader}"
    if not (is_reader or (inspect.isclass(function) and module.startswith(ALLOWED))):
        raise InputError(
            f"_target_ {target} is not allowed; a config may name classes of stexp, Lightning's Trainer, callbacks "
            f"and loggers, and the read function of a reader"
        )
    parameters = inspect.signature(function).parameters
    of_extra = {key: value for key, value in extra.items() if key in parameters}
    check_keys(function, {**arguments, **of_extra}, target)
    if module.startswith("stexp."):
        return function(**arguments, **of_extra)
    try:
        return function(**arguments, **of_extra)
    except Exception as error:  # Lightning checks its arguments itself, and has no common class for what it refuses
        raise InputError(f"{target}: {' '.join(str(error).split())[:300]}") from error
