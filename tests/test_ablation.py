"""The ablation reads the columns of the scales it keeps, judges on the training side, and pairs sections."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import ablation
import ablation_table
import numpy as np
import pytest
from encoders import MadeUpFeatures
from sections import make_data

from stexp.config.compose import compose
from stexp.errors import InputError
from stexp.models.table import Table
from stexp.protocol import Protocol

TRAINING, TEST = ablation.SIDES
SMALL = {"n_components": 6, "penalties": [1.0], "neighbours": [3], "ranks": [1, 2], "radii_um": [0]}


def test_columns_of_a_scale_are_those_of_its_view():
    np.testing.assert_array_equal(ablation.columns([0.5, 1, 2], 12, [1]), np.arange(4, 8))
    np.testing.assert_array_equal(ablation.columns([0.5, 1, 2], 12, [0.5, 2]), np.r_[0:4, 8:12])


def test_the_page_of_results_has_a_table_of_each_record():
    part = {"seconds": 1.4, **{side: {score: {"mean": 0.1} for score in ablation.SCORES} for side in ablation.SIDES}}
    command = "python experiments/ablation.py --folds B C --seeds 0 1 data=her2st"
    page = ablation_table.tables({"ablation-x": {"command": command, "table": {"whole": part}}})
    assert "(../experiments/results/ablation-x.json), folds B C:" in page and "| whole | 0.1000 |" in page


def test_differences_are_to_the_whole_method_in_the_same_section():
    def scores(value: float, patient: str) -> dict:
        return {**dict.fromkeys(ablation.SCORES, value), "patient": patient}

    def record(seconds: float, of_training: dict, of_test: dict) -> dict:
        return {"seconds": seconds, TRAINING: of_training, TEST: of_test}

    training = {"B:C1": scores(0.1, "C"), "C:B1": scores(0.4, "B"), "D:C1": scores(0.3, "C")}
    test = {"B:B1": scores(0.3, "B"), "C:C1": scores(0.1, "C"), "C:C2": scores(0.2, "C")}
    whole = record(1.0, training, test)
    lower = {
        key: scores(value["mse"] - (0.3 if key == "C:B1" else 0), value["patient"]) for key, value in training.items()
    }
    part = record(2.0, lower, {"C:C2": scores(0.1, "C"), "B:B1": scores(0.3, "B"), "C:C1": scores(0.1, "C")})
    table = ablation.compared({ablation.WHOLE: whole, "part": part})
    assert table["part"][TEST]["mse"]["difference"] == pytest.approx(-0.1 / 3) and table["part"]["seconds"] == 2.0
    assert table["part"][TRAINING]["mse"]["difference"] == pytest.approx(-0.15), "of two sections, not of three fits"
    assert table["part"][TRAINING]["mse"]["n_sections"] == 2
    assert table["part"][TEST]["mse"]["high"] <= 1e-9 and "difference" not in table[ablation.WHOLE][TEST]["mse"]
    heading, *rows = ablation.lines(table)
    assert TRAINING in heading and f"pearson_acg ({TEST})" in heading and "decides nothing" in heading
    assert len({line.count("|") for line in rows}) == 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    encoder = MadeUpFeatures(np.random.default_rng(0).normal(size=(150, 8)).astype(np.float32))
    return make_data(tmp_path_factory.mktemp("data"), Protocol("strict", validation=False), encoder=encoder)


def test_the_training_side_is_predicted_by_what_never_saw_it(data, monkeypatch):
    """Whatever is measured in the test sections, and in a section that is left out, the predictions of it stay."""
    table = Table.of(data, data.rows("train"))
    sizes, own = (len(data.panel), 8), table.group == table.group[0]
    before, changed = ablation.left_out(table, sizes, SMALL), data.target[np.arange(len(data.spots))]
    rows = table.rows[own]
    changed[rows] = np.random.default_rng(1).permutation(changed[rows]) + 3
    after = ablation.left_out(replace(table, expression=changed), sizes, SMALL)
    np.testing.assert_array_equal(after[own], before[own])
    assert np.abs(after[~own] - before[~own]).max() > 0.1
    first = ablation.score(data, np.arange(8), SMALL)
    target = data.target[np.arange(len(data.spots))]
    target[data.rows("test")] = 0.0
    monkeypatch.setattr(data, "target", target)
    again = ablation.score(data, np.arange(8), SMALL)
    assert again[TRAINING] == first[TRAINING] and again[TEST] != first[TEST]
    with pytest.raises(InputError, match="two groups"):
        ablation.left_out(table.take(np.flatnonzero(np.isin(table.group, np.unique(table.group)[:2]))), sizes, SMALL)


def test_keys_of_the_model_change_the_whole_method_and_all_variants(monkeypatch):
    seen = []
    data = SimpleNamespace(tile_features=np.zeros((4, 6)))
    monkeypatch.setattr(ablation, "serve", lambda keys, folds, sections: [("B", data)])

    def score(data, kept, arguments):
        seen.append(arguments)
        return {side: {"B1": {**dict.fromkeys(ablation.SCORES, 0.0), "patient": "B"}} for side in ablation.SIDES}

    monkeypatch.setattr(ablation, "score", score)
    keys = ["model.ranks=[3]", "model.neighbours=[7]", "model.trust=2", "model.turns=1", "model.scales=[1]"]
    measured = ablation.measure(keys, ["B"], [], [])
    whole = dict(compose("train", ["model=consensus", *keys]).model)
    assert seen[0]["ranks"] == [3] and seen[0]["trust"] == whole["trust"] == 2
    assert {tuple(each["neighbours"]) for each in seen} == {(7,), ()}
    assert "without turned views" not in measured and "without learned weights" in measured
    assert sum(each["trust"] is None for each in seen) == 1
    assert "without ridges" in measured and measured.keys().isdisjoint(["with ridges", "with learned weights"])
    assert "plain, with low rank" in measured and "plain, with turned views" not in measured
    assert measured.keys().isdisjoint(["without scale 1", "plain, with all scales"]), "there is one"


def test_other_inputs_and_random_weights_are_rows_of_the_whole_method(monkeypatch):
    served, data = [], SimpleNamespace(tile_features=np.zeros((4, 6)))
    monkeypatch.setattr(ablation, "serve", lambda keys, folds, sections: served.append(keys) or [("B", data)])
    monkeypatch.setattr(ablation, "score", lambda data, kept, arguments: {side: {} for side in ablation.SIDES})
    monkeypatch.setattr(ablation.np, "mean", lambda values: 0.0)
    measured = ablation.measure(["data=demo"], ["B"], [3], [], ["levels, macenko"])
    assert {"whole, levels, macenko", "random weights, seed 3"} < measured.keys()
    assert ["data=demo", "image_encoder.output=levels", "data.stain=macenko"] in served
    assert ["data=demo", "image_encoder.pretrained=false", "image_encoder.checkpoint=null", "seed=3"] in served
    control = ablation.measure(["data=demo"], ["B"], [3, 4], [], control_only=True)
    assert set(control) == {"whole", "random weights, seed 3", "random weights, seed 4"}


def test_a_part_alone_is_beside_plain_ridges(data):
    """Each adds one part to them, or takes one from the whole."""
    for name, part in ablation.VARIANTS.items():
        if name.startswith("plain, with "):
            assert len(ablation.ALONE.keys() - part.keys()) == 1
    scores = {
        "whole": 0.5,
        "plain": 0.1,
        "plain, with low rank": 0.3,
        "without low rank": 0.2,
    }
    sides = {
        name: {
            "seconds": 1.0,
            **{
                side: {f"B:C{i}": {**dict.fromkeys(ablation.SCORES, value + i / 100), "patient": "C"} for i in range(3)}
                for side in ablation.SIDES
            },
        }
        for name, value in scores.items()
    }
    table = ablation.compared(sides)
    differences = {name: part[TRAINING]["mse"].get("difference") for name, part in table.items()}
    expected = {"whole": None, "plain": -0.4, "plain, with low rank": 0.2, "without low rank": -0.3}
    assert differences == {name: value and pytest.approx(value) for name, value in expected.items()}
