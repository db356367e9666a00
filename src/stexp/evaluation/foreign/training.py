"""Sections of a data set that trained a model, known again by their content: names alone may be those of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from stexp.data.duplicates import FEWEST_SPOTS, files_on_record, prints_of, spots_on_record
from stexp.data.section import Section
from stexp.evaluation.records import Manifest, Spots

KEY = "training"
"""Of ``uns["stexp"]`` of a model's predictions of sections: a `TrainingRecord` as JSON."""
ROLES = ("train", "validation", "reference")


class Training(TypedDict):
    """The sections that one training learnt, validated or retrieved from, and hashes of their spots.

    ``data_manifest``: files of all sections that it read, by which a file of several is known as one.
    """

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
        of_spots = {name: spots[name] for name in names if name in spots}
        trainings.append({"sections": names, "data_manifest": dict(files), "spots": of_spots})
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
        None where a section of the training is none of these by its files, which proves nothing of files that were
        changed, and has too few spots on record to be known by them; or where no section is on record.
    """
    counts: dict[str, np.ndarray] = {}
    names: set[str] = set()
    for training in trainings:
        trained, spots = set(training["sections"]), training["spots"]
        by_files = files_on_record(training["data_manifest"], sections)
        matches = {section.name: by_files.get(section.name, set()) & trained for section in sections}
        for section in sections:
            if section.name not in counts:
                counts[section.name] = prints_of(section)
            own = counts[section.name], tiles.get(section.name)
            matches[section.name] |= {name for name, of_section in spots.items() if spots_on_record(of_section, *own)}
        names |= {name for name, others in matches.items() if others}
        telling = {name for name, of_section in spots.items() if len(of_section["counts"]) >= FEWEST_SPOTS}
        if not trained or not trained <= telling.union(*matches.values()):
            return None
    return [section.name for section in sections if section.name in names]


def _lineage(trained: Any) -> Iterator[Mapping[str, Any]]:
    while isinstance(trained, Mapping):
        yield trained
        trained = trained.get("from")
