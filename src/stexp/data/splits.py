"""Which spots train, validate and test in a fold."""

from __future__ import annotations

from collections import Counter

import numpy as np

from stexp import InputError
from stexp.data.section import Section
from stexp.protocol import Protocol

ROLES = ("train", "validation", "test", "reference")


def folds(sections: list[Section], protocol: Protocol) -> list[str]:
    """Names that ``fold=`` takes: patients or sections, of those with an image."""
    return list(dict.fromkeys(_unit(s, protocol) for s in sections if s.slide is not None))


def assign_roles(sections: list[Section], protocol: Protocol, fold: str) -> dict[str, np.ndarray]:
    """The role of every spot of every section in one fold.

    Parameters
    ----------
    fold
        The patient or section held out, one of :func:`folds`.

    Returns
    -------
    dict
        Section name -> (n_spots,) array of ``"train"``, ``"validation"``, ``"test"`` or, for training-side
        sections without an image, ``"reference"``. Sections that share the held-out unit but cannot be
        predicted (no image) are left out.

    Notes
    -----
    Validation is the largest unit that leaves something to train on: a patient where three or more are on
    the training side, else the last section, else a quarter of the only section's spots, cut off by a
    straight line so that neighbours stay together. Which patient: the one whose number of spots is the
    median, so that neither the largest nor the smallest is lost for training.
    """
    for name, n in Counter(section.name for section in sections).items():
        if n > 1:
            raise InputError(f"{n} sections are called {name}; names must be unique")
    known = folds(sections, protocol)
    if fold not in known:
        raise InputError(_unknown_fold(sections, protocol, fold, known))
    roles: dict[str, np.ndarray] = {}
    training: list[Section] = []
    for section in sections:
        held_out = _unit(section, protocol) == fold
        if section.slide is None:
            if not held_out:
                roles[section.name] = np.full(len(section), "reference", dtype="<U10")
            continue
        roles[section.name] = np.full(len(section), "test" if held_out else "train", dtype="<U10")
        if held_out and len(section) < 2:
            raise InputError(f"section {section.name} has 1 spot; a correlation over spots needs at least 2")
        if not held_out:
            training.append(section)
    if not training:
        raise InputError(f"fold {fold}: no section with an image is left to train on")
    if protocol.validation:
        for name, mask in _validation(training).items():
            roles[name][mask] = "validation"
    n_train = sum(int((role == "train").sum()) for role in roles.values())
    if n_train < 2:
        raise InputError(f"fold {fold}: {n_train} spot is left to train on; a contrast needs at least 2")
    return roles


def _validation(training: list[Section]) -> dict[str, np.ndarray]:
    spots_of: dict[str, int] = {}
    for section in training:
        spots_of[section.patient] = spots_of.get(section.patient, 0) + len(section)
    if len(spots_of) >= 3:
        by_size = sorted(spots_of, key=lambda patient: (spots_of[patient], patient))
        chosen = by_size[len(by_size) // 2]
        return {s.name: np.ones(len(s), bool) for s in training if s.patient == chosen}
    if len(training) >= 2:
        return {training[-1].name: np.ones(len(training[-1]), bool)}
    only = training[0]
    if len(only) < 8:
        raise InputError(
            f"section {only.name} alone trains and has {len(only)} spots; too few to keep some for validation"
        )
    # by x, then y: a line that leans a little, so that spots of one column can fall on both sides
    order = np.lexsort((only.xy_px[:, 1], only.xy_px[:, 0]))
    mask = np.zeros(len(only), bool)
    mask[order[-(len(only) // 4) :]] = True
    return {only.name: mask}


def _unit(section: Section, protocol: Protocol) -> str:
    return section.patient if protocol.hold_out == "patient" else section.name


def _unknown_fold(sections: list[Section], protocol: Protocol, fold: str, known: list[str]) -> str:
    what = protocol.hold_out
    message = f"fold={fold} is no {what} with an image; choose one of {', '.join(known) or '(none)'}, or all"
    for section in sections:
        if section.name == fold and what == "patient":
            owner = f"{fold} is a section of patient {section.patient}"
            return f"{message} ({owner}; protocol {protocol.name} holds out patients)"
        if section.patient == fold and what == "section":
            return f"{message} ({fold} is a patient; protocol {protocol.name} holds out sections)"
        if fold in (section.name, section.patient) and section.slide is None:
            return f"{message} ({fold} has counts but no image)"
    return message
