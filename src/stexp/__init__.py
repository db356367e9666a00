"""Predict spatial gene expression from H&E images, and score it honestly."""

__version__ = "0.1.0"


class InputError(ValueError):
    """What a user gave does not fit; the message is one line that says what would."""
