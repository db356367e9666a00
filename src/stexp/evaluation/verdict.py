"""What the numbers of a run say, in words, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from stexp.evaluation.compare import Comparison, compare, smallest_p
from stexp.evaluation.coverage import is_training_unstated, n_scored_genes

SIGNIFICANT = 0.05
"""Units that could not reach this p if all of them agreed are too few to say anything."""
GENES_OF_SCORE = {"pearson_acg": "all genes", "pearson_heg50": "the 50 highest"}


@dataclass(frozen=True)
class Verdict:
    """The scores of a run beside its floors, in words.

    Parameters
    ----------
    numbers
        The method's Pearson beside best floor, oracles and ceiling.
    statement
        Which floors it does not beat, on all genes and on the 50 highest, and how sure that is.
    outcome
        ``win``: above every floor on both, by more than what differs between sections explains; ``unclear``: above,
        but no more than that; ``loss``: not above, or without a score or floor. Oracles do not count.
    """

    numbers: str
    statement: str
    outcome: Literal["win", "unclear", "loss"]


def label(name: str) -> str:
    """A name as it is read: colour_ridge -> colour ridge."""
    return name.replace("_", " ")


def number(value: float | None, digits: int = 3) -> str:
    """Fixed digits; a dash where there is no value."""
    return "–" if value is None else f"{value:.{digits}f}"


def count(n: int, noun: str) -> str:
    """A number with its noun: 1 section, 2 sections."""
    return f"{n} {noun}" + ("s" if n != 1 else "")


def is_oracle(floor: str) -> bool:
    """Whether a floor reads the counts of the test spots; those that do say it in their name."""
    return floor.endswith("_oracle")


def by_score(floors: Mapping[str, Mapping[str, float | None]], score: str = "pearson_acg") -> list[tuple[str, Any]]:
    """Floors with their scores, the highest first, those without a score (None or NaN) last."""

    def place(item: tuple[str, Mapping[str, float | None]]) -> tuple[bool, float]:
        value = item[1].get(score)
        return (True, 0.0) if value is None or math.isnan(value) else (False, -value)

    return sorted(floors.items(), key=place)


SEEN = ("same_section_in_training", "copies_in_training", "same_patient_in_training", "same_patient_in_reference")
"""Leaks of the audit with which a score says nothing of a patient that was not seen; the worst first."""


def verdict(metrics: Mapping[str, Any]) -> Verdict:
    """Judge the scores of a run; with a leak of tissue or patients, nothing is called a win.

    Parameters
    ----------
    metrics
        ``metrics.json``. Sections without a ``patient`` are taken for those of one patient.
    """
    judged = _judge(metrics)
    leaks = [name for name in SEEN if name in metrics.get("leaks", [])]
    if not leaks:
        return judged
    said = f"The audit has a leak, {label(leaks[0])}: this is no score on a patient that was not seen."
    return replace(judged, statement=f"{said} {judged.statement}", outcome=min(judged.outcome, "unclear", key=_WORST))


_WORST = ("loss", "unclear", "win").index


def _judge(metrics: Mapping[str, Any]) -> Verdict:
    """The verdict by floors alone.

    Parameters
    ----------
    metrics
        ``metrics.json``. Sections without a ``patient`` are taken for those of one patient.
    """
    scores, floors, best = metrics["scores"], metrics["floors"], best_floor(metrics)
    acg = scores.get("pearson_acg")
    parts = [f"Pearson {number(acg)} over {n_scored_genes(metrics)} genes"]
    parts += [f"best floor: {label(best)} {number(floors[best]['pearson_acg'])}"] if best else ["no floor"]
    parts += [f"{label(name)} {number(own.get('pearson_acg'))}" for name, own in floors.items() if is_oracle(name)]
    parts.append(f"counting-noise ceiling {number(metrics['ceiling'].get('pearson_acg'))}")
    numbers = "; ".join(parts) + "."
    if best is None or acg is None:
        return Verdict(numbers, "Without a score and a floor nothing can be said about skill.", "loss")

    higher = {score: _floors_not_beaten(metrics, score) for score in _judged_scores(metrics)}
    if any(higher.values()):
        sentences = [
            f"On {GENES_OF_SCORE[score]} it does not beat {names}."
            if names
            else f"On {GENES_OF_SCORE[score]} it is above every floor (oracles aside)."
            for score, names in higher.items()
        ]
        return Verdict(numbers, " ".join([*sentences, *_wins(metrics, best)]), "loss")

    where = " and on ".join(GENES_OF_SCORE[score] for score in higher)
    doubts = [_doubt(metrics, name, score) for score in higher for name in _floors_by_score(metrics, score)]
    if is_training_unstated(metrics):
        doubts.insert(0, "what it was trained on is not stated, the held-out patients perhaps")
    difference = compare_with_floor(metrics, best, "pearson_acg")
    if difference is None or any(doubts):
        doubt = next(filter(None, doubts))
        statement = f"It is above every floor (oracles aside), on {where}, but {doubt}."
        return Verdict(numbers, " ".join([statement, *_wins(metrics, best)]), "unclear")
    statement = f"It beats every floor (oracles aside), on {where}: {label(best)} by {_interval(difference)}."
    return Verdict(numbers, " ".join([statement, *_wins(metrics, best)]), "win")


def compare_with_floor(metrics: Mapping[str, Any], floor: str, score: str) -> Comparison | None:
    """The method less a floor over the sections that both have a score in; None where there is none."""
    pairs = _pairs(metrics, floor, score)
    return compare([own - other for own, other, _ in pairs], [patient for *_, patient in pairs]) if pairs else None


def best_floor(metrics: Mapping[str, Any]) -> str | None:
    """Name of the floor with the highest Pearson over all genes, oracles left out."""
    return next(iter(_floors_by_score(metrics, "pearson_acg")), None)


def has_more_than_highest(metrics: Mapping[str, Any]) -> bool:
    """Whether the 50 highest genes are others than all genes."""
    return metrics["n_genes"] > 50


def _judged_scores(metrics: Mapping[str, Any]) -> list[str]:
    """Scores that some floor has, the 50 highest genes only where there are others."""
    scores = list(GENES_OF_SCORE) if has_more_than_highest(metrics) else ["pearson_acg"]
    return [score for score in scores if _floors_by_score(metrics, score)]


def _floors_by_score(metrics: Mapping[str, Any], score: str) -> dict[str, float]:
    """Floors that have a score, the best first; oracles left out."""
    values = {name: own.get(score) for name, own in metrics["floors"].items() if not is_oracle(name)}
    return dict(sorted(((k, v) for k, v in values.items() if v is not None), key=lambda item: -item[1]))


def _floors_not_beaten(metrics: Mapping[str, Any], score: str) -> str:
    """Floors that are as high as the method or higher, with their scores; empty where it is above all of them."""
    own, floors = metrics["scores"].get(score), _floors_by_score(metrics, score)
    as_high = {name: value for name, value in floors.items() if own is None or value >= own}
    return ", ".join(f"{label(name)} ({number(value)})" for name, value in as_high.items())


def _doubt(metrics: Mapping[str, Any], floor: str, score: str) -> str:
    """Why being above a floor may be chance; empty where it is not."""
    difference, on = compare_with_floor(metrics, floor, score), GENES_OF_SCORE[score]
    if difference is None:
        return f"no section has both scores on {on}"
    if smallest_p(difference.n_units) >= SIGNIFICANT:
        few = f"{_sections(difference)} {'is' if difference.n_sections == 1 else 'are'} too few to call that a win"
        return f"{few} (on {on}, {label(floor)}: {difference.difference:+.3f})"
    if difference.low is None or difference.low <= 0:
        return f"not surely: on {on}, {label(floor)} by {_interval(difference)}"
    return ""


def _interval(difference: Comparison) -> str:
    covers = "" if difference.over_patients else "; it covers other sections, not other patients"
    return (
        f"{difference.difference:.3f} (95 % interval {number(difference.low)} to {number(difference.high)} over "
        f"{_sections(difference)}{covers})"
    )


def _sections(difference: Comparison) -> str:
    return f"{count(difference.n_sections, 'section')} of {count(difference.n_patients, 'patient')}"


def _wins(metrics: Mapping[str, Any], floor: str) -> list[str]:
    """A sentence on how many sections are above a floor; none where there is one section."""
    pairs = _pairs(metrics, floor, "pearson_acg")
    wins = sum(own > other for own, other, _ in pairs)
    return [f"It is above {label(floor)} in {wins} of {len(pairs)} sections."] if len(pairs) > 1 else []


def _pairs(metrics: Mapping[str, Any], floor: str, score: str) -> list[tuple[float, float, str]]:
    """The method's score, a floor's score and the patient, of the sections that have both scores."""
    sections = metrics["sections"].values()
    pairs = [
        (part["scores"].get(score), part["floors"].get(floor, {}).get(score), str(part.get("patient")))
        for part in sections
    ]
    return [pair for pair in pairs if None not in pair[:2]]
