"""The ablation reads the columns of the scales it keeps, and pairs sections with the whole method."""

from __future__ import annotations

import ablation
import numpy as np
import pytest

from stexp.models import consensus


def test_columns_of_a_scale_are_those_of_its_view():
    np.testing.assert_array_equal(ablation.columns([0.5, 1, 2], 12, [1]), np.arange(4, 8))
    np.testing.assert_array_equal(ablation.columns([0.5, 1, 2], 12, [0.5, 2]), np.r_[0:4, 8:12])


def test_differences_are_to_the_whole_method_in_the_same_section():
    def scores(value: float, patient: str) -> dict:
        return {**dict.fromkeys(ablation.SCORES, value), "patient": patient}

    whole = {"seconds": 1.0, "B:B1": scores(0.3, "B"), "C:C1": scores(0.1, "C"), "C:C2": scores(0.2, "C")}
    part = {"seconds": 2.0, "C:C2": scores(0.1, "C"), "B:B1": scores(0.3, "B"), "C:C1": scores(0.1, "C")}
    table = ablation.compared({ablation.WHOLE: whole, "part": part})
    assert table["part"]["mse"]["difference"] == pytest.approx(-0.1 / 3) and table["part"]["seconds"] == 2.0
    assert table["part"]["mse"]["high"] <= 1e-9 and "difference" not in table[ablation.WHOLE]["mse"]
    assert len({line.count("|") for line in ablation.lines(table)}) == 1


def test_trust_is_put_back():
    before = consensus.TRUST
    with ablation.trusting(9.0):
        assert consensus.TRUST == 9.0
    assert before == consensus.TRUST
