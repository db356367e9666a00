"""Checks of what a user chose: annotations say what fits, pydantic holds values against them, one line says the rest.

::

    @checked("model")
    def __init__(self, image_encoder: ImageEncoder, *, depth: Depth = 2, distance: Literal["l1", "l2"] = "l2"): ...

``depth=0`` is then ``model.depth=0: a whole number of at least 1 would fit``.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import textwrap
from collections.abc import Callable, Collection
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from stexp.errors import InputError, did_you_mean


def _check_odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("even")
    return value


# what goes beyond the upper bounds is a slip of the hand, and would end in the memory or in an overflow
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
SeveralSeeds = Annotated[int, Field(ge=0, le=100, description="a whole number from 0 to 100")]
Pixels = Annotated[int, Field(ge=1, le=2**14)]
Width = Annotated[int, Field(ge=1, le=2**16)]
"""Dimensions of a layer, or heads."""
Depth = Annotated[int, Field(ge=1, le=1000)]
"""Layers, at least one."""
OptionalDepth = Annotated[int, Field(ge=0, le=1000)]
Odd = Annotated[int, Field(ge=1, le=999, description="an odd whole number from 1 to 999"), AfterValidator(_check_odd)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(ge=0, lt=1)]
Between = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
"""Of a term of a loss, or weight decay."""
Colour = Annotated[
    list[float] | tuple[float, ...],
    Field(min_length=3, max_length=3, description="three numbers, of red, green and blue,"),
]
ColourSpread = Annotated[
    list[Positive] | tuple[Positive, ...],
    Field(min_length=3, max_length=3, description="three numbers above 0, of red, green and blue,"),
]

_Callable = TypeVar("_Callable", bound=Callable)
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
_PLAIN |= {NoneType: "null", dict: "keys with values", list: "a list", tuple: "a list"}
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def checked(prefix: str = "") -> Callable[[_Callable], _Callable]:
    """Decorate a function, an ``__init__`` or a dataclass so that its arguments must fit their annotations.

    Strictly: True is not 1, ``"3"`` is not 3 and 3.0 is no whole number (but 3 is a number); neither NaN nor infinity
    is one. Parameters whose annotation is not plain (tensors, modules, sections) are passed on as they are.

    Parameters
    ----------
    prefix
        Where the parameters stand in a config, ``model`` for ``model.k``.

    Raises
    ------
    InputError
        From the decorated: the first argument that does not fit, in one line that says what would.
    """

    def decorate(function: _Callable) -> _Callable:
        if inspect.isclass(function):
            function.__init__ = decorate(function.__init__)  # type: ignore[method-assign]
            return function
        signature = inspect.signature(function)

        @functools.cache  # by the first call all that annotations name is there
        def plain_parameters() -> dict[str, Any]:
            hints = get_type_hints(function, include_extras=True)
            hints.pop("return", None)
            named = [p.name for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            return {name: hints[name] for name in named if name in hints and _is_plain(hints[name])}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            for name, annotation in plain_parameters().items():
                if name in arguments:
                    check(f"{prefix}.{name}" if prefix else name, arguments[name], annotation)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def check(key: str, value: Any, annotation: Any) -> None:
    """InputError where a value does not fit an annotation, in one line that begins ``key=value``."""
    try:
        _validator(annotation).validate_python(value)
    except ValidationError:
        pass  # its errors name every branch of a union; what would fit is said in one sentence
    else:
        return
    fitting = _fitting(annotation, value)
    words = [str(word) for part in _parts(annotation) if get_origin(part) is Literal for word in get_args(part)]
    meant = did_you_mean(value, words) if isinstance(value, str) else ""
    text = f"choose {fitting}" if _is_choice(annotation) else f"{fitting} would fit"
    raise InputError(f"{key}={_typed(value, annotation)}: {text}{meant}")


def check_keys(function: Callable, keys: Collection[str], name: str) -> None:
    """InputError where a function takes no such key, or lacks one that it needs.

    Parameters
    ----------
    name
        What the message calls the function.
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in keys:
        if key not in parameters and not takes_any:
            raise InputError(f"{name} takes no key {key!r}{did_you_mean(str(key), parameters)}")
    for key, parameter in parameters.items():
        of_any_number = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if key not in keys and parameter.default is parameter.empty and not of_any_number:
            raise InputError(f"{name} lacks the key {key!r}")


def check_fields(document: str, content: Any, fields: Any, remedy: str) -> None:
    """InputError where plain data do not fit a TypedDict, in one line that names the keys.

    Strictly, as :func:`checked`; keys that the TypedDict does not name are left alone.

    Parameters
    ----------
    document
        What the message calls the data.
    remedy
        End of the message.
    """
    try:
        _fields_validator(fields).validate_python(content, strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        lacking = [_dotted(each["loc"]) for each in errors if each["type"] == "missing"]
        if lacking:
            raise InputError(f"{document} has no {', '.join(lacking[:5])}; {remedy}") from None
        where, value, reason = errors[0]["loc"], errors[0]["input"], errors[0]["msg"]
        key = f"{_dotted(where)}=" if where else ""
        shown = textwrap.shorten(json.dumps(value, default=repr), 80, placeholder="...")
        raise InputError(f"{document}: {key}{shown}: {reason[0].lower()}{reason[1:]}; {remedy}") from None


def _dotted(where: tuple[int | str, ...]) -> str:
    """The place of a value, its own keys in the form that they are printed in."""
    return ".".join(json.dumps(str(key))[1:-1][:80] for key in where)


@functools.cache
def _fields_validator(fields: Any) -> TypeAdapter:
    return TypeAdapter(fields)


@functools.cache
def _validator(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=_STRICT)


def _parts(annotation: Any) -> tuple:
    """Parts of a union; the annotation itself where it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


@functools.cache
def _is_plain(annotation: Any) -> bool:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _is_plain(inner[0])
    if origin in (Union, UnionType, list, tuple, dict):
        return all(_is_plain(part) for part in inner if part is not Ellipsis)
    return origin is Literal or annotation in _PLAIN


def _is_choice(annotation: Any) -> bool:
    """Whether all that fits is a handful of words."""
    return all(part is NoneType or get_origin(part) is Literal for part in _parts(annotation))


def _fitting(annotation: Any, value: Any) -> str:
    """What would fit instead of a value, as the subject of a sentence."""
    sorts: list[str] = []
    for part in _parts(annotation):
        origin, inner = get_origin(part), get_args(part)
        if origin is Literal:
            sorts += map(str, inner)
        elif origin is Annotated:
            fields = [item for item in inner[1:] if isinstance(item, FieldInfo)]
            described = [field.description for field in fields if field.description]
            sorts.append(described[0] if described else _PLAIN[inner[0]] + _bounds(fields, value))
        elif origin in (list, tuple):
            sorts.append(f"a list, each {_fitting(inner[0], None)},")
        else:
            sorts.append(_PLAIN[origin or part])
    sorts = list(dict.fromkeys(sorts))  # of list and tuple the same
    return " or ".join(part for part in (", ".join(sorts[:-1]), sorts[-1]) if part)


def _bounds(fields: list[FieldInfo], value: Any) -> str:
    """Bounds of a number; an upper one that only guards against slips is named where it is passed."""
    bounds = {type(item): item for field in fields for item in field.metadata}
    low = bounds[Ge].ge if Ge in bounds else bounds[Gt].gt if Gt in bounds else -math.inf
    high = bounds[Le].le if Le in bounds else bounds[Lt].lt if Lt in bounds else math.inf
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if high > 1 and not (is_number and value > high):
        return f" above {low:g}" if Gt in bounds else f" of at least {low:g}" if Ge in bounds else ""
    if Gt in bounds and Lt in bounds:
        return f" between {low:g} and {high:g}"
    start = f" above {low:g}, up to" if Gt in bounds else f" from {low:g} to" if Ge in bounds else " up to"
    return f"{start} {'below ' if Lt in bounds else ''}{high if isinstance(high, int) else f'{high:g}'}"


def _typed(value: Any, annotation: Any) -> str:
    """A value as a command line has it; text that looks like a number in quotes, where a number would fit."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not _is_choice(annotation) and value.replace(".", "").lstrip("+-").isdigit():
        return repr(value)
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."
