"""Predict spatial gene expression from H&E images, and score it honestly."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from stexp.errors import InputError

if TYPE_CHECKING:
    from stexp.api import datasets, plot
    from stexp.api.compare import compare
    from stexp.api.data import SpotDataModule
    from stexp.api.evaluate import evaluate
    from stexp.api.fit import fit
    from stexp.api.floors import floors
    from stexp.api.model import Model, load_model
    from stexp.api.score import Score
    from stexp.api.sections import (
        read_alex10x,
        read_cscc,
        read_her2st,
        read_hest,
        read_samplesheet,
        read_spatialdata,
        read_visium,
        read_visium_hd,
        read_xenium,
    )
    from stexp.data.section import Section
    from stexp.inference.lazyslide import TilePredictor
    from stexp.protocol import Protocol
    from stexp.reporting.spatialdata import add_to

__path__.append(str(Path(__file__).parent / "cli"))  # `python -m stexp.train` runs cli/train.py

try:
    __version__ = version("stexp")
except PackageNotFoundError:  # a checkout on the path that is not installed
    __version__ = "0+unknown"
__all__ = [
    "InputError",
    "Model",
    "Protocol",
    "Score",
    "Section",
    "SpotDataModule",
    "TilePredictor",
    "__version__",
    "add_to",
    "compare",
    "datasets",
    "evaluate",
    "fit",
    "floors",
    "load_model",
    "plot",
    "read_alex10x",
    "read_cscc",
    "read_her2st",
    "read_hest",
    "read_samplesheet",
    "read_spatialdata",
    "read_visium",
    "read_visium_hd",
    "read_xenium",
]

_MODULE_OF = {
    "Model": "stexp.api.model",
    "Protocol": "stexp.protocol",
    "Score": "stexp.api.score",
    "Section": "stexp.data.section",
    "SpotDataModule": "stexp.api.data",
    "TilePredictor": "stexp.inference.lazyslide",
    "add_to": "stexp.reporting.spatialdata",
    "compare": "stexp.api.compare",
    "evaluate": "stexp.api.evaluate",
    "fit": "stexp.api.fit",
    "floors": "stexp.api.floors",
    "load_model": "stexp.api.model",
    **dict.fromkeys(
        (
            "read_alex10x",
            "read_cscc",
            "read_her2st",
            "read_hest",
            "read_samplesheet",
            "read_spatialdata",
            "read_visium",
            "read_visium_hd",
            "read_xenium",
        ),
        "stexp.api.sections",
    ),
}
"""Public name -> the module that has it, imported on first use: most bring torch, which scores and tables need not."""
_MODULES = {"datasets": "stexp.api.datasets", "plot": "stexp.api.plot"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
