"""Arguments of the Python interface, held against their annotations before anything is done."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_type_hints

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, InstanceOf, TypeAdapter, ValidationError

from stexp.errors import InputError

_Function = TypeVar("_Function", bound=Callable)
_CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True)


def typed(function: _Function) -> _Function:
    """Refuse an argument of another type than annotated, in one line; numbers of numpy become Python's.

    Raises
    ------
    InputError
        From the decorated: the first argument that does not fit, and the annotation that it should. Arguments that are
        missing or unknown are TypeErrors, as of any function.
    """
    signature = inspect.signature(function)

    @functools.cache  # by the first call all that annotations name is there
    def adapters() -> dict[str, TypeAdapter]:
        hints = get_type_hints(function)
        several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = [name for name, parameter in signature.parameters.items() if parameter.kind not in several]
        return {name: _adapter(hints[name]) for name in named if name in hints}

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, adapter in adapters().items():
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            if isinstance(value, np.generic):
                value = bound.arguments[name] = value.item()
            _check(name, value, adapter, signature.parameters[name].annotation)
        return function(*bound.args, **bound.kwargs)

    return call  # type: ignore[return-value]


def _adapter(hint: Any) -> TypeAdapter:
    if inspect.isclass(hint) and (is_dataclass(hint) or issubclass(hint, BaseModel)):
        return TypeAdapter(InstanceOf[hint])  # a record that exists was checked when it was made
    return TypeAdapter(hint, config=_CONFIG)


def _check(name: str, value: Any, adapter: TypeAdapter, annotation: Any) -> None:
    arrays = (np.ndarray, pd.Index, pd.Series)  # of names: as good as a list
    for candidate in (value, *([value.tolist()] if isinstance(value, arrays) and value.ndim == 1 else [])):
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return
    if inspect.isclass(value):
        raise InputError(f"{name}: {value.__name__} is a class; an object of it, {value.__name__}(...), would fit")
    shown = repr(value) if isinstance(value, str | int | float | list | tuple | dict | None) else ""
    raise InputError(
        f"{name}: {f'{shown[:60]}, ' if shown else ''}{type(value).__name__}, does not fit; {annotation} would"
    )
