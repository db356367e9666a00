"""``result.json`` of a completed section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from stexp.evaluation.records import Finite, Provenance, Scores, read_json
from stexp.evaluation.verdict import label

RESULT, DENSE, PER_GENE = "result.json", "dense.h5ad", "per_gene.csv"


class Difference(TypedDict, total=False):
    """Best method less best floor; the interval is over blocks of spots."""

    value: Finite
    low: Finite
    high: Finite


class Result(TypedDict):
    """What the page, and whoever reads the file, can count on; sizes stand beside under names of their own."""

    data: str
    section: str
    patient: str
    known: Literal["spots", "genes"]
    pattern: str
    image_encoder: str | None
    protocol: dict[str, Any]
    given: str
    ceiling: Scores
    floors: dict[str, Scores]
    methods: dict[str, Scores]
    notes: dict[str, str]
    settings: dict[str, dict[str, Any]]
    error_on_shown: Scores
    map: str
    best_floor: str
    best_method: str | None
    difference: Difference | None
    outcome: Literal["win", "unclear", "loss"]
    verdict: str
    provenance: Provenance


def about_map(result: Mapping[str, Any]) -> str:
    """Which floor or method the maps and ``predictions.h5ad`` are by, in a sentence."""
    return f"The maps and predictions.h5ad are by {label(result['map'])}; show= names another."


def read_result(folder: Path) -> Any:
    """``result.json`` of a folder; InputError where it is missing, damaged, or does not fit :class:`Result`."""
    return read_json(folder / RESULT, Result)
