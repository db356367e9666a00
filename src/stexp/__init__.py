"""Predict spatial gene expression from H&E images, and score it honestly."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from stexp.errors import InputError

if TYPE_CHECKING:
    from stexp.inference.predictor import load_model

__path__.append(str(Path(__file__).parent / "cli"))  # `python -m stexp.train` runs cli/train.py

try:
    __version__ = version("stexp")
except PackageNotFoundError:  # a checkout on the path that is not installed
    __version__ = "0+unknown"
__all__ = ["InputError", "__version__", "load_model"]


def __getattr__(name: str) -> object:
    if name == "load_model":  # imports torch, which scores, tables and reports do without
        from stexp.inference.predictor import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
