"""Sections of a data set that trained a model, known again by their content: names alone may be those of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from stexp.data.digests import file_digest
from stexp.data.duplicates import count_prints, spots_on_record
from stexp.data.section import Section
from stexp.evaluation.records import Manifest, Spots

KEY = "training"
"""Of ``uns["stexp"]`` of a model's predictions of sections: a `TrainingRecord` as JSON."""
ROLES = ("train", "validation", "reference")


class Training(TypedDict):
    """The sections that one training read, their files and hashes of their spots."""

    sections: list[str]
    data_manifest: Manifest
    spots: Spots


class TrainingRecord(TypedDict):
    """Every training that led to a model, the last one first.

    ``fold``: digest of the data of the last one, see :func:`stexp.data.identity.data_digest`; None: not on record.
    """

    fold: str | None
    trainings: Annotated[list[Training], Field(min_length=1)]


def training_record(trained: Mapping[str, Any], fold: str | None = None) -> TrainingRecord:
    """What predictions say of the training of their model.

    Parameters
    ----------
    trained
        ``sections`` by role, ``data_manifest``, ``spots`` and ``from`` (the same of the model that training began at),
        as ``model.json`` has them.
    """
    trainings: list[Training] = []
    for step in _lineage(trained):
        roles, files, spots = (step.get(key) or {} for key in ("sections", "data_manifest", "spots"))
        names = list(dict.fromkeys(name for role in ROLES for name in roles.get(role) or []))
        of_files, of_spots = ({name: held[name] for name in names if name in held} for held in (files, spots))
        trainings.append({"sections": names, "data_manifest": of_files, "spots": of_spots})
    return {"fold": fold, "trainings": trainings}


def sections_of_training(
    trainings: Sequence[Training], sections: Sequence[Section], tiles: Mapping[str, np.ndarray]
) -> list[str] | None:
    """The sections that trained a model, by the content of a file or the hashes of their spots.

    Parameters
    ----------
    trainings
        See `TrainingRecord`.
    sections
        Of a data set.
    tiles
        Section -> :func:`~stexp.data.duplicates.tile_prints` of its spots, where they are at hand.

    Returns
    -------
    list of str or None
        None where no section of the training is on record, or one without a file or spot to know it by.
    """
    counts: dict[str, np.ndarray] = {}
    names: set[str] = set()
    for training in trainings:
        files, spots = training["data_manifest"], training["spots"]
        on_record = [
            bool(files.get(name) or spots.get(name, {"counts": []})["counts"]) for name in training["sections"]
        ]
        if not on_record or not all(on_record):
            return None
        shared = Counter(digest for of_section in files.values() for digest in set(of_section.values()))
        for section in sections:
            if any(shared[file_digest(path)] == 1 for path in section.files):
                names.add(section.name)
                continue
            if section.name not in counts:
                counts[section.name] = count_prints(section.spots.X)
            own = counts[section.name], tiles.get(section.name)
            if any(spots_on_record(of_section, *own) for of_section in spots.values()):
                names.add(section.name)
    return [section.name for section in sections if section.name in names]


def _lineage(trained: Any) -> Iterator[Mapping[str, Any]]:
    while isinstance(trained, Mapping):
        yield trained
        trained = trained.get("from")
