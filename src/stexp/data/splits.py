"""Which spots train, validate and test in a fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from stexp.data.section import Section
from stexp.errors import InputError, UnknownName
from stexp.protocol import Protocol

ROLES = ("train", "validation", "test", "reference", "gap")


def folds(sections: list[Section], protocol: Protocol) -> list[str]:
    """Names that ``fold=`` takes: patients, sections or the tested cohort, of those with an image; or blocks."""
    if protocol.hold_out == "block":
        return [f"block{i + 1}" for i in range(protocol.blocks)] if any(s.slide is not None for s in sections) else []
    if protocol.hold_out == "cohort" and not any(section.cohort for section in sections):
        raise InputError("protocol.hold_out=cohort holds out another data set, which test_data= names")
    names = list(dict.fromkeys(_unit(section, protocol) for section in sections if section.slide is not None))
    names = [name for name in names if name]  # a cohort that trains has none
    for name in names:
        if name.lower() in ("all", "null", "none"):
            raise InputError(f"a {protocol.hold_out} is called {name}, which fold= takes for something else; rename it")
    return names


def units(section: Section, protocol: Protocol) -> np.ndarray:
    """The patient, section or block that each spot is held out with, (n_spots,)."""
    if protocol.hold_out == "block":
        return np.char.add("block", (spatial_blocks(np.floor(section.xy_px), protocol.blocks) + 1).astype(str))
    return np.full(len(section), _unit(section, protocol))


def assign_roles(
    sections: list[Section], protocol: Protocol, fold: str, side_px: Callable[[Section], int] = lambda section: 0
) -> dict[str, np.ndarray]:
    """The role of every spot of every section in one fold.

    Parameters
    ----------
    fold
        The patient, section or block held out, one of :func:`folds`.
    side_px
        Side of a section's tiles; a tile that is tested shares no pixel with one that trains or validates, nor do
        blocks that train with blocks that validate.

    Returns
    -------
    dict
        Section name -> (n_spots,) array of ``"train"``, ``"validation"``, ``"test"``; ``"reference"`` for
        training-side sections without an image; ``"gap"`` for spots next to a held-out block, or next to a held-out
        section on the same slide, which are not used. Sections that share the held-out unit but cannot be predicted
        (no image) are left out.

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
    names = check_fold(sections, protocol, fold)
    if protocol.hold_out == "block":
        test = names.index(fold)
        return _check_training({s.name: _block_roles(s, protocol, test, side_px(s)) for s in sections}, fold)
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
        raise InputError(
            f"fold {fold}: no section with an image is left to train on; protocol=blocks holds out parts of sections"
        )
    if protocol.validation:
        for name, mask in _validation(training).items():
            roles[name][mask] = "validation"
    _part_on_slides(sections, roles, side_px)
    return _check_training(roles, fold)


def spot_table(sections: list[Section], roles: dict[str, np.ndarray]) -> pd.DataFrame:
    """Every spot of the sections with its role, a row each, in their order."""
    parts = []
    for section in sections:
        array_xy = section.array_xy
        parts.append(
            pd.DataFrame(
                {
                    "section": section.name,
                    "patient": section.patient,
                    "spot": section.spots.obs_names.to_numpy(str),
                    "role": roles[section.name],
                    "array_x": array_xy[:, 0],
                    "array_y": array_xy[:, 1],
                    "total_counts": section.total_counts,
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    table.index = table["section"] + ":" + table["spot"]
    return table


def role_lines(spots: pd.DataFrame) -> list[str]:
    """Lines that say how many spots of which sections have each role, and where validation is little apart."""
    of_role = {role: part for role, part in spots.groupby("role", sort=False)}
    lines = []
    for role in ROLES:
        if role in of_role:
            names = of_role[role]["section"].unique()
            lines.append(f"{role}: {len(of_role[role])} spots of {len(names)} section(s): {', '.join(names)}")
    if "validation" in of_role and "train" in of_role:
        training, validating = of_role["train"], of_role["validation"]
        sections, patients = (sorted(set(training[key]) & set(validating[key])) for key in ("section", "patient"))
        if sections:
            lines.append(
                f"validation spots are a block of {', '.join(sections)}, the rest of which trains: what they choose "
                f"is chosen on the tissue and stain of the training"
            )
        elif patients:
            lines.append(
                f"the validation section is of {', '.join(patients)}, of whom others train: there are fewer than three "
                f"patients to train on"
            )
    return lines


def with_roles(sections: list[Section], spots: pd.DataFrame, *roles: str) -> list[Section]:
    """The sections that have spots of some roles, with those spots alone; `spots` as of :func:`spot_table`."""
    has_role = spots["role"].isin(roles).to_numpy()
    ends = np.cumsum([len(section) for section in sections])
    masks = np.split(has_role, ends[:-1])
    return [section.take(mask) for section, mask in zip(sections, masks, strict=True) if mask.any()]


def spatial_blocks(xy: np.ndarray, n: int) -> np.ndarray:
    """Number of the block, 0..n-1, that each of the N points falls into.

    The points are cut across the longer side of their bounding box into two parts of as equal size as `n` allows,
    then each part is cut again.

    Parameters
    ----------
    xy : (N, 2)
    """
    out = np.zeros(len(xy), dtype=np.int64)
    if n == 1 or len(xy) == 0:
        return out
    axis = int(np.ptp(xy, axis=0).argmax())
    order = np.lexsort((xy[:, 1 - axis], xy[:, axis]))
    left = n // 2
    cut = round(len(xy) * left / n)
    out[order[:cut]] = spatial_blocks(xy[order[:cut]], left)
    out[order[cut:]] = left + spatial_blocks(xy[order[cut:]], n - left)
    return out


def _block_roles(section: Section, protocol: Protocol, test: int, side: int) -> np.ndarray:
    if section.slide is None:
        return np.full(len(section), "reference", dtype="<U10")
    xy = np.floor(section.xy_px)  # where tiles are centred
    if len(section) < 2 * protocol.blocks:
        raise InputError(
            f"section {section.name}: {len(section)} spots cannot be cut into {protocol.blocks} blocks of two or more"
        )
    block = spatial_blocks(xy, protocol.blocks)
    roles = np.where(block == test, "test", "train").astype("<U10")
    if protocol.validation:
        roles[block == (test + 1) % protocol.blocks] = "validation"
    # tiles share pixels where their centres are nearer than their side, both in x and in y
    for role, others in (("test", ("train", "validation")), ("validation", ("train",))):
        centres = xy[roles == role]
        if side and len(centres):
            near = cKDTree(centres).query(xy, p=np.inf)[0] < side
            roles[near & np.isin(roles, others)] = "gap"
    return roles


def _part_on_slides(sections: list[Section], roles: dict[str, np.ndarray], side_px: Callable[[Section], int]) -> None:
    """Set spots apart as ``"gap"`` whose tiles share pixels with tested ones of another section on the same slide."""
    on_slide: dict[Path, list[Section]] = {}
    for section in sections:
        if section.slide is not None and section.name in roles:
            on_slide.setdefault(section.slide.path.absolute(), []).append(section)
    for sharing in on_slide.values():
        tested = [section for section in sharing if (roles[section.name] == "test").any()]
        if not 0 < len(tested) < len(sharing):
            continue
        side = max(map(side_px, sharing))
        centres = cKDTree(np.floor(np.concatenate([section.xy_px for section in tested])))
        for section in sharing:
            near = centres.query(np.floor(section.xy_px), p=np.inf)[0] < side
            roles[section.name][near & np.isin(roles[section.name], ("train", "validation"))] = "gap"


def _check_training(roles: dict[str, np.ndarray], fold: str) -> dict[str, np.ndarray]:
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
    if protocol.hold_out == "cohort":
        return section.cohort
    return section.patient if protocol.hold_out == "patient" else section.name


def check_fold(sections: list[Section], protocol: Protocol, fold: str) -> list[str]:
    """The names of :func:`folds`; InputError unless a fold is one of them."""
    names = folds(sections, protocol)
    if fold not in names:
        raise UnknownName(_unknown_fold(sections, protocol, fold, names), [fold], names, typed="fold={}")
    return names


def _unknown_fold(sections: list[Section], protocol: Protocol, fold: str, names: list[str]) -> str:
    what = protocol.hold_out
    message = f"fold={fold} is no {what} with an image; choose one of {', '.join(names) or '(none)'}, or all"
    alike = [name for name in names if name.lower() == fold.lower()]
    if alike:
        return f"{message}; did you mean {alike[0]}?"
    for section in sections:
        if section.name == fold and what == "patient":
            owner = f"{fold} is a section of patient {section.patient}"
            return f"{message} ({owner}; protocol {protocol.name} holds out patients)"
        if section.patient == fold and what == "section":
            return f"{message} ({fold} is a patient; protocol {protocol.name} holds out sections)"
        if fold in (section.name, section.patient) and section.slide is None:
            return f"{message} ({fold} has counts but no image)"
    return message
