"""Predict spatial gene expression from H&E images, and score it honestly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stexp.predictor import load_model

__version__ = "0.1.0"
__all__ = ["InputError", "__version__", "load_model"]


class InputError(ValueError):
    """What a user gave does not fit; the message is one line that says what would."""


def __getattr__(name: str) -> object:
    if name == "load_model":  # imports torch, which scores, tables and reports do without
        from stexp.predictor import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
