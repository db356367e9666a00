"""Arrays from a safetensors file that a stranger may have written: what they are is judged before they are read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from stexp.data.slides.formats import free_memory
from stexp.errors import InputError

AGAIN = "export it again, or copy it again"
FLOATS = frozenset({"F16", "F32", "F64"})
COUNTS = frozenset({"U8", "U16", "U32", "U64", "I32", "I64"})
INTEGERS = COUNTS | {"I8", "I16"}


def damaged(path: Path, reason: object) -> InputError:
    """The error of a file that is not as `stexp-export` writes it."""
    return InputError(f"{path} is damaged: {' '.join(str(reason).split())[:200]}; {AGAIN}")


def check_size(path: Path, bytes_per_byte: float = 1.0) -> None:
    """Refuse a file that does not fit into the free memory."""
    need, free = path.stat().st_size * bytes_per_byte, free_memory()
    if free is not None and need > free:
        raise InputError(f"{path} needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray] | Mapping[str, torch.Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write arrays of numpy or torch, and texts, as safetensors; OSError, which names the file, where that fails."""
    module = safetensors.torch if any(map(torch.is_tensor, arrays.values())) else safetensors.numpy
    try:
        module.save_file(dict(arrays), path, metadata=None if texts is None else dict(texts))
    except SafetensorError as error:  # what the system said is in its text alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    if texts is not None:
        _sort_texts(path)


def _sort_texts(path: Path) -> None:
    """Put the texts in order, which safetensors does not: the same model is the same bytes, with the same digest."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) != size:
            raise ValueError(f"the header of {path} would take {len(text)} bytes instead of {size}")
        file.seek(8)
        file.write(text)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict; every number in it is finite."""
    check_size(path)
    try:
        weights = safetensors.torch.load_file(path)
    except (SafetensorError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise damaged(path, error) from error
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise damaged(path, f"{name} holds values that are no finite numbers")
    return weights


def read_arrays(
    path: Path, needed: Mapping[str, tuple[frozenset[str], int]], optional: Mapping[str, tuple[frozenset[str], int]]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays that are expected, and the file's texts.

    Parameters
    ----------
    needed, optional
        Name -> types as safetensors calls them, and the number of dimensions.

    Raises
    ------
    InputError
        Another array, type or shape than expected, values that are no finite numbers, or a damaged file.
    """
    check_size(path)
    expected = {**needed, **optional}
    try:
        with safe_open(path, "np") as file:
            names = set(file.keys())
            if names - set(expected) or set(needed) - names:
                raise damaged(path, f"it holds {', '.join(sorted(names))}, and {', '.join(sorted(needed))} are needed")
            for name in names:
                part, (types, n_dims) = file.get_slice(name), expected[name]
                if part.get_dtype() not in types or len(part.get_shape()) != n_dims:
                    raise damaged(path, f"{name} is of type {part.get_dtype()} and shape {part.get_shape()}")
            texts = dict(file.metadata() or {})
        arrays = safetensors.numpy.load_file(path)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(path, error) from error
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise damaged(path, f"{name} holds values that are no finite numbers")
    return arrays, texts
