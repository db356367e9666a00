"""Objects from plain data: what a config, or the description of an exported model, may call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from importlib.metadata import entry_points
from typing import Any

from stexp.arguments import check_keys
from stexp.errors import InputError, did_you_mean

ALLOWED = ("stexp.", "pytorch_lightning.callbacks.", "pytorch_lightning.loggers.", "pytorch_lightning.trainer.")
"""Where the classes are defined that a config may call; of functions, only ``read_<name>`` of the reader <name>."""
ENTRY_POINTS = "stexp.plugins"
"""Group of entry points by which an installed package says that it is a plug-in."""

_allowed: dict[str, None] = {}  # plug-ins that this process was told to allow, in their order

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


def allow(package: str) -> None:
    """Let configs name the classes, and the functions ``read_<name>``, that a plug-in defines.

    Whoever starts a process says so, on its command line or in its code; a config, a run folder or an exported model
    never does, or opening one would run whatever code lies about.

    Parameters
    ----------
    package
        Dotted name of a module or package.
    """
    _allowed[package] = None


@functools.cache
def installed_plugins() -> dict[str, str]:
    """Modules of the installed packages that say they are plug-ins -> the distribution that brings them."""
    found = entry_points(group=ENTRY_POINTS)
    return {each.module: each.dist.name if each.dist else each.name for each in found}


def plugins() -> list[str]:
    """Plug-ins that configs may name: those allowed, then those installed."""
    return list(dict.fromkeys([*_allowed, *installed_plugins()]))


def plugin_of(path: object) -> str | None:
    """The plug-in that a dotted path leads into; None of what is no part of one."""
    return next((name for name in plugins() if isinstance(path, str) and path.startswith(f"{name}.")), None)


def plugins_in(node: Any) -> list[str]:
    """Plug-ins whose classes plain data name, each once."""
    if isinstance(node, dict):
        own, inner = [plugin_of(node.get("_target_"))], [plugins_in(value) for value in node.values()]
    else:
        own, inner = [], [plugins_in(value) for value in node] if isinstance(node, list) else []
    return list(dict.fromkeys(name for name in [*own, *(each for part in inner for each in part)] if name))


def require_plugins(names: object, what: object) -> None:
    """Import the plug-ins that a run or a model was made with, which whoever opens it must have named.

    Parameters
    ----------
    names
        As a config or a description says; whatever it holds, nothing is imported that is not allowed.
    what
        The run or model, for the message.

    Raises
    ------
    InputError
        One of them is neither named nor installed.
    """
    wanted: list[Any] = [] if names is None else list(names) if isinstance(names, list | dict) else [names]
    for name in wanted:
        if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w{,99}(\.[A-Za-z_]\w{,99}){,9}", name, re.ASCII)):
            raise InputError(f"{what} is damaged: its plugins are no names of modules")
    absent = [name for name in wanted if name not in plugins()]
    if absent:
        raise InputError(
            f"{what} was made with the plug-in {' and '.join(absent)}, whose code runs where it is opened: if you "
            f"trust that code, add plugins=[{','.join(absent)}] to the command, or plugins={absent} to load_model"
        )
    for name in wanted:
        importlib.import_module(name)


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
        elif part and is_package and _exists(module):
            scope = importlib.import_module(module)
        else:
            modules = [module.name for module in pkgutil.iter_modules(getattr(scope, "__path__", []))]
            near = did_you_mean(part, [*modules, *dir(scope)])
            raise InputError(f"_target_ {path} cannot be found: there is no {module}{near}")
    return scope


def _exists(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that calls itself otherwise than the path that led to it
        return False


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
    function = named_callable(target)
    parameters = inspect.signature(function).parameters
    of_extra = {key: value for key, value in extra.items() if key in parameters}
    check_keys(function, {**arguments, **of_extra}, target)
    if not function.__module__.startswith("pytorch_lightning."):
        return function(**arguments, **of_extra)
    try:
        return function(**arguments, **of_extra)
    except Exception as error:  # Lightning checks its arguments itself, and has no common class for what it refuses
        raise InputError(f"{target}: {' '.join(str(error).split())[:300]}") from error


def named_callable(target: str) -> Any:
    """What a target names, where a config may call it."""
    plugin = plugin_of(target)
    is_named = plugin is not None or target.startswith(("stexp.", "pytorch_lightning."))
    function: Any = get_object(target) if is_named else None
    # judged by where it is defined: a name may lead through a module's imports to something else
    module, name = f"{getattr(function, '__module__', '')}.", getattr(function, "__name__", "")
    folder, _, reader = module.rstrip(".").rpartition(".")
    is_reader = folder == "stexp.data.readers" and name == f"read_{reader}"
    is_class = inspect.isclass(function) and module.startswith(ALLOWED)
    if plugin is not None:
        is_reader = module.startswith(f"{plugin}.") and name.startswith("read_")
        is_class = inspect.isclass(function) and module.startswith(f"{plugin}.")
    if is_class or (is_reader and inspect.isfunction(function)):
        return function
    top = target.partition(".")[0]
    if plugin is not None:
        end = f"of the plug-in {plugin} it may name classes, and functions read_<name>, that are defined there"
    elif is_named or top in sys.stdlib_module_names:
        end = "a config may name classes of stexp, Lightning's Trainer, callbacks and loggers, and the read function "
        end += "of a reader"
    else:
        end = f"if {top} is a plug-in whose code you trust, plugins=[{top}] allows it"
    raise InputError(f"_target_ {target} is not allowed; {end}")
