"""What is expected of a gene is its mean over held-out sections; that it beats its floor takes three patients."""

from __future__ import annotations

import numpy as np
import pandas as pd

from stexp.inference.expected import Accuracy, expect, reliability_of_flags

GENES = ["X", "Y", "Z"]


def accuracy(patient: str, pearson: list[float], a: list[float], b: list[float], section: str = "") -> Accuracy:
    table = pd.DataFrame({"pearson": pearson, "a": a, "b": b}, index=pd.Index(GENES, name="gene"))
    return Accuracy(section or f"{patient}1", patient, table)


def test_means_and_the_best_floor():
    nan = np.nan
    table = expect(
        [
            accuracy("A", [0.5, 0.2, nan], [0.1, 0.4, nan], [0.3, 0.1, nan]),
            accuracy("B", [0.3, nan, nan], *[[0.2] * 3] * 2),
        ],
        GENES,
    )
    np.testing.assert_allclose(table["expected_pearson"], [0.4, 0.2, nan])
    np.testing.assert_allclose(table["expected_floor"], [0.25, 0.3, 0.2])
    assert table["expected_floor_name"].tolist() == ["b", "a", "a"]
    assert table["n_held_out_sections"].tolist() == [2, 1, 0] and table["beats_floor"].isna().all()


def test_flags_take_three_patients_not_sections():
    one = ([0.5, 0.2, 0.1], [0.4] * 3, [0.3] * 3)
    sections = [accuracy("A", *one, section=f"A{i}") for i in range(5)]
    assert expect(sections, GENES)["beats_floor"].isna().all() and reliability_of_flags(sections, GENES) is None
    patients = [accuracy(name, *one) for name in "ABC"]
    assert expect(patients, GENES)["beats_floor"].tolist() == [True, False, False]
    patients[2].pearson.loc["X"] = np.nan  # not measured in the third
    assert expect(patients, GENES)["beats_floor"].isna().tolist() == [True, False, False]


def test_how_often_flags_held_is_counted_on_the_patient_left_out():
    # X beats its floor in A and B, not in C; Y never does; Z everywhere
    patients = [
        accuracy("A", [0.5, 0.1, 0.9], [0.3, 0.4, 0.1], [0.1] * 3),
        accuracy("B", [0.5, 0.1, 0.9], [0.3, 0.4, 0.1], [0.1] * 3),
        accuracy("C", [0.2, 0.1, 0.9], [0.3, 0.4, 0.1], [0.1] * 3),
    ]
    # flagged for A by B and C: X (0.35 > 0.3), holds; for B the same; for C by A and B: X, fails; Z three times, holds
    assert reliability_of_flags(patients, GENES) == {"patients": 3, "flags": 6, "held": round(5 / 6, 4), "missed": 0.0}
