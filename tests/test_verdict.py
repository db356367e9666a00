"""The verdict on a run: what it counts as a win, and how sure it is of that."""

from __future__ import annotations

import numpy as np
import pytest

from stexp.evaluation.compare import compare
from stexp.evaluation.score import summary
from stexp.evaluation.verdict import by_score, verdict

OWN = [0.30, 0.33, 0.36, 0.31, 0.35, 0.32]


def metrics_of(
    own: list[float], floors: dict[str, list[float]], patients: str, heg: float = 0.0, genes: int = 60
) -> dict:
    """Scores by section; HEG50 is ACG, but for the method's, which is `heg` higher."""

    def scores(value: float | None, add: float = 0.0) -> dict:
        return {"pearson_acg": value, "pearson_heg50": None if value is None else value + add}

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    return {
        "data": "demo",
        "model": "mclstexp",
        "protocol": "strict",
        "fold": "B",
        "n_spots": 900,
        "n_genes": genes,
        "chosen": {"k": 50, "k_validation_pearson": {"50": 0.2}},
        "scores": scores(mean(own), heg),
        "floors": {name: scores(mean(values)) for name, values in floors.items()},
        "ceiling": scores(0.8),
        "sections": {
            f"S{i}": {
                "patient": patient,
                "scores": scores(value, heg),
                "floors": {name: scores(values[i]) for name, values in floors.items()},
            }
            for i, (value, patient) in enumerate(zip(own, patients, strict=True))
        },
        "scored_as": {"paper": {"scores": scores(0.9), "floors": {}, "ceiling": scores(0.95)}},
    }


def below(by: float | list[float]) -> list[float]:
    return list(np.array(OWN) - by)


def test_a_win_on_many_sections_carries_the_interval_of_the_paired_differences() -> None:
    differences = [0.02, 0.05, 0.03, 0.04, 0.05, 0.02]
    judged = verdict(metrics_of(OWN, {"colour_ridge": below(differences), "mean": below(0.3)}, "AABBCC"))
    outcome = compare(differences, list("AABBCC"))
    assert judged.outcome == "win" and judged.statement.startswith("It beats every floor")
    assert (
        f"colour ridge by 0.035 (95 % interval {outcome.low:.3f} to {outcome.high:.3f} over 6 sections"
        in judged.statement
    )
    assert "not other patients" not in judged.statement and "above colour ridge in 6 of 6 sections" in judged.statement
    alone = verdict(metrics_of(OWN, {"colour_ridge": below(differences)}, "AAAAAA"))
    assert alone.outcome == "win" and "of 1 patient; it covers other sections, not other patients" in alone.statement


def test_two_sections_of_one_patient_are_no_win() -> None:
    judged = verdict(metrics_of([0.340, 0.344], {"colour_ridge": [0.329, 0.331]}, "AA"))
    assert judged.outcome == "unclear"
    assert "2 sections of 1 patient are too few" in judged.statement and "+0.012" in judged.statement


def test_an_interval_that_holds_nothing_is_no_win() -> None:
    differences = [0.2, -0.1, 0.15, -0.12, 0.1, -0.08]
    judged = verdict(metrics_of(OWN, {"mean": below(0.2), "colour_ridge": below(differences)}, "ABCDEF"))
    low, high = compare(differences, list("ABCDEF")).low, compare(differences, list("ABCDEF")).high
    assert low < 0 < high and judged.outcome == "unclear"
    assert f"colour ridge by 0.025 (95 % interval {low:.3f} to {high:.3f}" in judged.statement


def test_every_floor_must_be_beaten_surely_not_only_the_best() -> None:
    wild = below([0.4, -0.2, 0.4, -0.2, 0.4, -0.2])
    judged = verdict(metrics_of(OWN, {"colour_ridge": below(0.05), "coordinates": wild}, "ABCDEF"))
    assert judged.outcome == "unclear" and "coordinates" in judged.statement


@pytest.mark.parametrize(("heg", "genes"), [(0.0, 60), (-0.06, 60)])
def test_a_floor_that_is_as_high_is_a_loss_on_those_genes(heg: float, genes: int) -> None:
    floors = {"colour_ridge": OWN if heg == 0 else below(0.05), "mean": below(0.3)}
    judged = verdict(metrics_of(OWN, floors, "ABCDEF", heg=heg, genes=genes))
    assert judged.outcome == "loss"
    where = "all genes" if heg == 0 else "the 50 highest"
    assert f"On {where} it does not beat colour ridge" in judged.statement
    if heg:
        assert "On all genes it is above every floor" in judged.statement
        assert verdict(metrics_of(OWN, floors, "ABCDEF", heg=heg, genes=50)).outcome == "win"


def test_oracles_do_not_count_and_without_a_floor_nothing_is_claimed() -> None:
    floors = {"depth_oracle": list(np.array(OWN) + 0.2), "colour_ridge": below(0.05)}
    judged = verdict(metrics_of(OWN, floors, "ABCDEF"))
    assert judged.outcome == "win" and "depth oracle 0.528" in judged.numbers
    del floors["colour_ridge"]
    judged = verdict(metrics_of(OWN, floors, "ABCDEF"))
    assert judged.outcome == "loss" and "nothing can be said" in judged.statement


def test_the_terminal_ranks_explains_and_ends_with_the_verdict() -> None:
    metrics = metrics_of(OWN, {"mean": below(0.3), "knn_features": below(-0.01), "colour_ridge": below(0.05)}, "ABCDEF")
    lines = summary(metrics).splitlines()
    names = [line[2:36].strip() for line in lines[2:7]]
    assert names == [
        "ceiling: counting noise",
        "floor: knn features",
        "> mclstexp",
        "floor: colour ridge",
        "floor: mean",
    ]
    assert lines[-1] == verdict(metrics).statement and lines[-2] == verdict(metrics).numbers
    text = "\n".join(lines)
    assert text.count("ACG: Pearson correlation") == text.count("HEG50: over the 50") == 1
    assert "scored as" not in text and "k = 50 neighbours" in text and "k_validation" not in text
    assert "scored as paper" in summary(metrics, verbose=True)


def test_predictions_of_a_training_that_nobody_states_beat_nothing() -> None:
    metrics = metrics_of(OWN, {"mean": below(0.3)}, "AABBCC")
    stated = {"elsewhere": {"trained_on": ["B1"], "coverage": {"n_genes": 60}}}
    assert verdict(metrics | stated).outcome == "win"
    stated["elsewhere"]["trained_on"] = None
    judged = verdict(metrics | stated)
    assert judged.outcome == "unclear"
    assert "beats" not in judged.statement and "not stated" in judged.statement
    worse = metrics_of(OWN, {"mean": below(-0.3)}, "AABBCC")
    assert verdict(worse | stated).outcome == "loss"


def test_floors_without_a_score_come_last() -> None:
    floors = {"a": None, "b": -0.2, "c": float("nan"), "d": 0.1, "e": -0.1}
    ranked = by_score({name: {"pearson_acg": value} for name, value in floors.items()})
    assert [name for name, _ in ranked] == ["d", "e", "b", "a", "c"]
