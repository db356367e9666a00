"""Objects from plain data: what a config, or the description of an exported model, may call."""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from stexp.errors import InputError

ALLOWED = ("stexp.", "pytorch_lightning.callbacks.", "pytorch_lightning.loggers.", "pytorch_lightning.trainer.")
"""Where the classes are defined that a config may call; of functions, only ``read`` of a reader."""


def get_object(path: str) -> Any:
    """What a dotted path names; modules on the way are imported."""
    first, *rest = path.split(".")
    found, module = importlib.import_module(first), first
    for part in rest:
        module = f"{module}.{part}"
        if not part:
            raise ImportError(f"{path!r} has an empty part")
        try:
            found = getattr(found, part)
        except AttributeError:
            if not inspect.ismodule(found):
                raise
            found = importlib.import_module(module)
    return found


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
        A target outside `ALLOWED`, or a key that the target does not take (with the nearest it does).
    """
    if isinstance(node, list):
        return [build(item) for item in node]
    if not isinstance(node, dict):
        return node
    arguments = {key: build(value) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return arguments
    target = node["_target_"]
    try:
        found = get_object(target) if str(target).startswith(("stexp.", "pytorch_lightning.")) else None
    except Exception as error:  # of the import, whatever the module raises
        raise InputError(f"_target_ {target} cannot be found: {' '.join(str(error).split())[:200]}") from error
    # judged by where it is defined: a name may lead through a module's imports to something else
    module = f"{getattr(found, '__module__', '')}."
    is_reader = module.startswith("stexp.data.readers.") and getattr(found, "__name__", "") == "read"
    if not (is_reader or (inspect.isclass(found) and module.startswith(ALLOWED))):
        raise InputError(
            f"_target_ {target} is not allowed; a config may name classes of stexp, Lightning's Trainer, callbacks "
            f"and loggers, and the read function of a reader"
        )
    known = inspect.signature(found).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        for key in arguments:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise InputError(f"{target} takes no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    try:
        return found(**arguments, **{key: value for key, value in extra.items() if key in known})
    except InputError:
        raise
    except MemoryError:
        raise
    except (TypeError, ValueError, ImportError, ArithmeticError, AssertionError, LookupError, RuntimeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which may not be imported here
            raise
        # a value that no one checked, a package not installed
        raise InputError(f"{target}: {' '.join(str(error).split())[:300]}") from error
