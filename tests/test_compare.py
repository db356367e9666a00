"""Statistics over sections of patients, against slow versions and what must hold for any data."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stexp.evaluation.compare import (
    bootstrap_interval,
    compare,
    compare_each,
    floors_beaten,
    holm,
    per_section,
    sign_flip_p,
    smallest_p,
    summarise,
)

differences = st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=1, max_size=9)


@pytest.mark.parametrize("sizes", [(3, 1, 2), (2, 2, 2, 4), (4, 2), (5,)])
def test_bootstrap_is_that_of_plain_loops(sizes: tuple[int, ...]) -> None:
    data = np.random.default_rng(1)
    values = [data.normal(size=n) for n in sizes]
    patients = np.repeat([f"P{i}" for i in range(len(sizes))], sizes)
    n_draws, largest, rng = 300, max(sizes), np.random.default_rng(7)
    drawn: list[list[float]] = [[] for _ in range(n_draws)]
    for slot in range(len(sizes)):
        chosen = rng.integers(len(sizes), size=n_draws) if len(sizes) >= 3 else [slot] * n_draws
        uniform = rng.random((n_draws, largest))
        for draw in range(n_draws):
            mine = values[chosen[draw]]
            drawn[draw] += [mine[int(uniform[draw, i] * len(mine))] for i in range(len(mine))]
    expected = np.quantile([np.mean(each) for each in drawn], [0.025, 0.975])
    found = bootstrap_interval(np.concatenate(values), patients, n_draws, seed=7)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, patients = np.random.default_rng(0), np.repeat([f"P{i:02}" for i in range(12)], 3)
    inside = []
    for seed in range(300):
        values = 0.3 + (rng.normal(size=(12, 1)) + rng.normal(size=(12, 3))).ravel()
        low, high = bootstrap_interval(values, patients, 500, seed)
        inside.append(low <= 0.3 <= high)
    assert 0.89 <= np.mean(inside) <= 0.98  # 0.93 in a thousand


def test_patients_that_differ_widen_the_interval() -> None:
    values = np.repeat([-1.0, 0.0, 1.0, 2.0], 5)
    low, high = bootstrap_interval(values, np.repeat(list("ABCD"), 5))
    assert high - low > 1.5
    assert bootstrap_interval(values[5:15], np.repeat(list("BC"), 5)) == (0.5, 0.5)  # both kept: nothing varies within


def test_no_interval_where_nothing_can_be_drawn_anew() -> None:
    assert bootstrap_interval(np.array([0.1, 0.2]), np.array(["A", "B"])) == (None, None)
    assert bootstrap_interval(np.array([0.1]), np.array(["A"])) == (None, None)


@settings(max_examples=50, deadline=None)
@given(differences)
def test_permutation_test_is_that_of_every_sign(values: list[float]) -> None:
    observed = abs(sum(values)) - 1e-9
    patterns = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=len(values))
    ]
    assert sign_flip_p(values) == np.mean([each >= observed for each in patterns])
    assert sign_flip_p(values) >= smallest_p(len(values))


def test_units_that_agree_reach_the_smallest_p() -> None:
    for n in (1, 5, 6, 15):
        assert sign_flip_p(np.arange(1, n + 1) / 10) == smallest_p(n) == 2.0 ** (1 - n)
    assert smallest_p(5) > 0.05 > smallest_p(6)
    assert sign_flip_p(np.ones(40)) == smallest_p(40) == 1 / 10_001


def test_random_signs_agree_with_the_exact_tail() -> None:
    values = np.random.default_rng(3).normal(0.3, 1, 18)
    exact = np.abs((1 - 2 * ((np.arange(2**18)[:, None] >> np.arange(18)) & 1)) @ values)
    assert sign_flip_p(values) == pytest.approx((exact >= abs(values.sum()) - 1e-9).mean(), abs=0.015)


def test_patients_flip_whole_where_there_are_six() -> None:
    patients = np.repeat([f"P{i}" for i in range(6)], 3)
    found = compare(np.full(18, 0.1), patients)
    assert (found.unit, found.n_units, found.p) == ("patients", 6, 2 / 64)
    fewer = compare(np.full(15, 0.1), patients[:15])
    assert (fewer.unit, fewer.n_units, fewer.p) == ("sections", 15, 2 / 2**15)
    assert fewer.over_patients and not compare(np.full(6, 0.1), patients[:6]).over_patients


def test_holm_by_hand() -> None:
    # sorted 0.01 0.02 0.03 0.2: times 4, 3, 2, 1, never falling
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_and_keeps_the_order(p: list[float]) -> None:
    corrected = holm(p)
    assert all(raw <= c <= 1 for c, raw in zip(corrected, p, strict=True))
    assert all(corrected[i] <= corrected[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])
    assert min(corrected) == pytest.approx(min(1, min(p) * len(p)))


def scores(**columns: list) -> pd.DataFrame:
    return pd.DataFrame({"patient": "A", "fold": "A", "seed": 0, **columns})


def test_seeds_and_parts_of_a_section_are_averaged_before_sections() -> None:
    table = scores(
        section=["A1", "A1", "A1", "A2"], seed=[0, 1, 0, 0], fold=["b1", "b1", "b2", "b1"], acg=[0.1, 0.3, 0.6, 0.0]
    )
    # A1: fold b1 0.2, fold b2 0.6
    np.testing.assert_allclose(per_section(table, ["acg"])["acg"], [0.4, 0.0])


def test_spreads_are_over_what_their_names_say() -> None:
    table = scores(
        patient=["A", "A", "B"] * 2,
        section=["A1", "A2", "B1"] * 2,
        fold=["A", "A", "B"] * 2,
        seed=[0] * 3 + [1] * 3,
        acg=[0.0, 0.2, 0.7, 0.2, 0.4, 0.9],
    )
    found = summarise(table, ["acg"])
    assert found["acg"] == pytest.approx(0.4)
    assert found["acg_sd_sections"] == pytest.approx(np.std([0.1, 0.3, 0.8], ddof=1))
    assert found["acg_sd_patients"] == pytest.approx(np.std([0.2, 0.8], ddof=1))
    assert found["acg_sd_seeds"] == pytest.approx(np.std([0.3, 0.5], ddof=1))
    # a seed that lacks a section has a mean of other sections, and says nothing of spread
    assert np.isnan(summarise(table.iloc[:5], ["acg"])["acg_sd_seeds"])
    alone = summarise(table.iloc[:1], ["acg"])
    assert alone["acg"] == 0 and np.isnan([value for key, value in alone.items() if key != "acg"]).all()


def test_a_tie_with_a_floor_is_no_win_and_errors_are_better_low() -> None:
    table = scores(
        kind=["method", "floor", "floor", "floor", "oracle"],
        name=["m", "low", "same", "high", "o"],
        section=["A1"] * 5,
        mse=[0.5, 0.4, 0.5, 0.6, 0.9],
    )
    assert floors_beaten(table, "mse", lower_is_better=True) == {"floors_beaten": 1, "n_floors": 3}
    assert floors_beaten(table, "mse", lower_is_better=False) == {"floors_beaten": 1, "n_floors": 3}


def test_comparisons_pair_sections_and_correct_over_all() -> None:
    index = pd.MultiIndex.from_tuples([(f"P{i}", f"P{i}1") for i in range(6)], names=["patient", "section"])
    base = np.linspace(0, 1, 6)
    values = pd.DataFrame({"base": base, "same": base, "better": base + 0.1, "gap": [np.nan, *base[1:]]}, index=index)
    found = compare_each(values, ["same", "better", "gap"], "base").set_index("method")
    assert found.loc["same", ["difference", "low", "high", "p", "p_holm"]].tolist() == [0, 0, 0, 1, 1]
    assert found.loc["better", "p_holm"] == pytest.approx(3 * 2 / 64)  # far smaller than the spread over patients
    assert found.loc["better", "difference"] == pytest.approx(0.1)
    assert found.loc["gap", "n_sections"] == 5
    assert compare_each(values, [], "base").empty
